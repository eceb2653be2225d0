"""What every packed tensor has in common."""

from typing import Literal, TypeAlias

from fastopt._types import Array
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor

Weight: TypeAlias = "Array | QuantizedTensor | SparseTensor"


def storage_of(
    tensor: Weight,
) -> tuple[Literal["dense", "quantized", "sparse", "sparse+quantized"], int | None, int | None]:
    """Return how a tensor is stored: its kind, bits and group size."""
    if isinstance(tensor, QuantizedTensor):
        return "quantized", tensor.bits, tensor.group_size
    if not isinstance(tensor, SparseTensor):
        return "dense", None, None
    if isinstance(tensor.values, QuantizedTensor):
        return "sparse+quantized", tensor.values.bits, tensor.values.group_size
    return "sparse", None, None


def unpacked(tensor: Weight) -> Array:
    """Return a tensor of any kind as a plain array."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize()
    return tensor.to_dense() if isinstance(tensor, SparseTensor) else tensor
