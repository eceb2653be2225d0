// b-bit min-max quantization. Codes pass through a buffer of one byte each that stays in L1. So groups and rows may
// have any length, and the widths differ only in packing.inl.

#include "kernels/quant/packing.inl"
//
#include "kernels/quant/grid.inl"
//
#include "kernels/quant/fit.inl"
//
#include "kernels/quant/quantize.inl"
//
#include "kernels/quant/dequantize.inl"

[[maybe_unused]] constexpr QuantKernels kQuant = {
    .range = range,
    .fit = fit_any,
    .quantize = quantize_any,
    .dequantize = dequantize_any,
    .pack = pack_any,
    .unpack = unpack_any,
};
