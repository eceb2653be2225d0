"""Packed tensors: quantization, pruning, sparse storage and products."""
