// The vector type and the primitives that kernels are written in: the only folder with code for one instruction set.
// Included by kernels.cpp alone, inside its anonymous namespace.
#pragma once

#include "kernels/simd/vector.hpp"
//
#include "kernels/simd/math.hpp"
//
#include "kernels/simd/convert.hpp"
//
#include "kernels/simd/shuffle.hpp"
//
#include "kernels/simd/dot.hpp"
//
#include "kernels/simd/tile.hpp"
//
#include "kernels/simd/mask.hpp"
//
#include "kernels/simd/flush.hpp"
