// Sparse storage and products with it. A row is stored as its entries: numbers and their positions, or, under a mask of
// blocks, 16 numbers for each position. Where elements are only moved, they are integers of their width.

#include "kernels/sparse/layouts.inl"
//
#include "kernels/sparse/rows.inl"
//
#include "kernels/sparse/tiles.inl"

constexpr SparseKernels kSparse = {
    .linear = linear_sparse,
    .transpose_tile = transpose_tile,
    .linear_tile = linear_sparse_tile,
    .nonzero_mask = nonzero_mask_any,
    .count_bits = count_bits,
    .compress_row = compress_row_any,
    .expand_row = expand_row_any,
    .scatter_row = scatter_row_any,
    .mask_columns = mask_columns,
    .gap_columns = gap_columns,
    .column_gaps = column_gaps,
};
