// b-bit min-max quantization. Codes pass through a block of bytes that stays in L1, so groups and rows may have any
// length, and 8, 4 and 2 bits differ in pack and unpack alone.

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
