// One table of kernels. CMake compiles this file once per instruction set, each time with another FASTOPT_ISA; with
// FASTOPT_PRODUCTS_ONLY for those that share the rest of their table with another set.
//
// Everything lies in an anonymous namespace and nothing of the standard library with a body is used: an inline
// function emitted here with AVX-512 in it could replace the baseline's copy at link time, and crash an older CPU.
#include "kernels/contract.hpp"

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastopt {
namespace {

#include "kernels/simd/simd.hpp"
//
#include "kernels/quant/quant.inl"
//
#include "kernels/linear/linear.inl"
#if !defined(FASTOPT_PRODUCTS_ONLY)
#include "kernels/quant/two_level.inl"
//
#include "kernels/quant/gptq.inl"
//
#include "kernels/optim/optim.inl"
//
#include "kernels/prune.inl"
//
#include "kernels/sparse/sparse.inl"
//
#include "kernels/limits.inl"
#endif

}  // namespace

#define FASTOPT_TEXT(x) #x
#define FASTOPT_NAME(x) FASTOPT_TEXT(x)
#define FASTOPT_JOIN(a, b) a##b

#if defined(FASTOPT_PRODUCTS_ONLY)

#define FASTOPT_TABLE(isa) FASTOPT_JOIN(products_, isa)

extern const Products FASTOPT_TABLE(FASTOPT_ISA);
const Products FASTOPT_TABLE(FASTOPT_ISA) = kProducts<false>;
#if defined(__AMX_INT8__)
extern const Products products_amx;
const Products products_amx = kProducts<true>;
#endif

#else

#define FASTOPT_TABLE(isa) FASTOPT_JOIN(kernels_, isa)

extern const Kernels FASTOPT_TABLE(FASTOPT_ISA);
const Kernels FASTOPT_TABLE(FASTOPT_ISA) = {
    .isa = FASTOPT_NAME(FASTOPT_ISA),
    .optim = kOptim,
    .quant = kQuant,
    .two_level = kTwoLevel,
    .gptq = kGptq,
    .products = kProducts<false>,
    .sparse = kSparse,
    .prune = kPrune,
    .limits = kLimits,
};

#endif

}  // namespace fastopt
