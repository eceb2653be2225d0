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
#include "kernels/optim/optim.inl"
//
#include "kernels/prune.inl"
//
#include "kernels/sparse/sparse.inl"
//
#include "kernels/limits.inl"
#endif

constexpr Products kProducts = {prepared_bytes, prepare_x_any, panel_bytes, prepare_panel_any, linear_quantized};

}  // namespace

#define FASTOPT_TEXT(x) #x
#define FASTOPT_NAME(x) FASTOPT_TEXT(x)
#define FASTOPT_JOIN(a, b) a##b

#if defined(FASTOPT_PRODUCTS_ONLY)

#define FASTOPT_TABLE(isa) FASTOPT_JOIN(products_, isa)

extern const Products FASTOPT_TABLE(FASTOPT_ISA);
const Products FASTOPT_TABLE(FASTOPT_ISA) = kProducts;

#else

#define FASTOPT_TABLE(isa) FASTOPT_JOIN(kernels_, isa)

extern const Kernels FASTOPT_TABLE(FASTOPT_ISA);
const Kernels FASTOPT_TABLE(FASTOPT_ISA) = {
    FASTOPT_NAME(FASTOPT_ISA),
    kRules,
    sizeof kRules / sizeof kRules[0],
    sum_squares_any,
    range,
    fit_any,
    quantize_any,
    dequantize_any,
    pack_any,
    unpack_any,
    kProducts,
    linear_sparse,
    transpose_tile,
    linear_sparse_tile,
    magnitude_histogram_any,
    count_ties_any,
    collect_magnitudes_any,
    prune_any,
    keep_largest_any,
    clear_any,
    nonzero_mask_any,
    count_bits,
    compress_row_any,
    expand_row_any,
    scatter_row_any,
    mask_columns,
    gap_columns,
    column_gaps,
    limit_read,
    limit_write,
    limit_update,
};

#endif

}  // namespace fastopt
