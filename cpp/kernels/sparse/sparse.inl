// Sparse storage and products with it. What is stored of a row are its entries: numbers with their columns, or, under
// a mask of blocks, 16 numbers at a time. Elements are integers of their width where they are only moved.

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
