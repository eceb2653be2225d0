"""fastopt as a quantizer of transformers: `from_pretrained` packs models, and loads folders that fastopt packed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastopt.files.container import describe, disassemble
from fastopt.files.safetensors_file import PAD
from fastopt.models.folders import METHOD
from fastopt.models.model import PackedModel, load
from fastopt.models.recipe import Recipe
from fastopt.tensors.packed import PackedTensor, Precision
from fastopt.torch.modules import tensor_of
from fastopt.torch.names import names_in
from fastopt.torch.packing import TRANSPOSED, fill_, pack_, unpack_, weights_of


class FastoptConfig(QuantizationConfigMixin):
    """How ``from_pretrained(..., quantization_config=FastoptConfig(...))`` packs a model.

    Parameters
    ----------
    bits : 8, 6, 5, 4, 3, 2 or None
    precision : "exact", "int8" or "blas"
        As in `fastopt.torch.pack_`.
    **options
        The fields of `fastopt.Recipe`.
    """

    def __init__(self, bits: int | None = 4, precision: Precision = "exact", **options: Any) -> None:
        options.pop("quant_method", None)
        Recipe(bits=bits, **options)  # raises for options that are wrong
        self.quant_method: Any = METHOD
        self.bits, self.precision = bits, precision
        self.__dict__.update(options)

    @property
    def options(self) -> dict[str, Any]:
        """All arguments."""
        return {name: value for name, value in self.__dict__.items() if name != "quant_method"}


class FastoptQuantizer(HfQuantizer):
    """Packs a model after it was loaded, or gives it the weights of a folder that is packed."""

    quantization_config: FastoptConfig
    is_trainable = True  # adapters on a frozen base
    is_compileable = True

    def __init__(self, quantization_config: FastoptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.model: PackedModel | None = None  # that of the folder
        self.names: dict[str, str] = {}  # of its tensors, and their names in the model
        self.renamed = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise if the model is to be on another device."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        for device in devices - {None, "auto"}:
            if torch.device(device).type != "cpu":
                raise ValueError(f"device_map: expected the CPU for a model that fastopt packs, got {device}")

    def update_device_map(self, device_map: Any) -> Any:
        """Return the device map: all is on the CPU."""
        return None if device_map is None else {"": "cpu"}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether `save_pretrained` can write the model: not if it would rename what is in the metadata."""
        return not self.renamed

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: the arrays and the metadata of a file of fastopt."""
        arrays: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        weights = weights_of(model)
        for name, weight in weights.items():
            parts, entry = disassemble(name, weight)
            arrays.update((part, tensor_of(array)) for part, array in parts.items())
            if entry is not None:
                entries[name] = entry
        return arrays, describe(weights, entries, None)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            files = [Path(file) for file in checkpoint_files]
            self.model = load(files[0] if len(files) == 1 else files[0].parent)
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(PAD)}"}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return conversions that let transformers load nothing in the place of tensors that are packed."""
        if self.model is None:
            return weight_conversions
        self.names = names_in(model, list(self.model), weight_conversions)
        renamings = [rule for rule in weight_conversions if isinstance(rule, WeightRenaming)]
        placeholders = []
        for name, tensor in self.model.items():
            if isinstance(tensor, PackedTensor):
                renamed = rename_source_key(name, renamings, [])[0]
                target = renamed.removesuffix(TRANSPOSED)
                parts = [renamed + part.removeprefix(name) for part in disassemble(name, tensor)[0]]
                sources = [f"^{re.escape(part)}$" for part in parts]
                placeholders.append(WeightConverter(sources, target, [_Placeholder()]))
        return [*placeholders, *weight_conversions]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.model is None:
            pack_(model, **config.options)
        else:
            weights = {self.names[name]: tensor for name, tensor in self.model.items()}
            fill_(model, weights, config.precision)
            self.model, config.bits = None, None  # the bits are in the file
        rules = [rule for rule in getattr(model, "_weight_conversions", ()) if not _is_placeholder(rule)]
        model._weight_conversions, self.renamed = rules, bool(rules)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_(model)
        return model


class _Placeholder(ConversionOps):
    """Takes the parts of a packed tensor, and gives memory that is not touched before its module is packed."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        return {full_layer_name: torch.empty_like(model.get_parameter_or_buffer(full_layer_name), device="cpu")}


def _is_placeholder(rule: Any) -> bool:
    return any(isinstance(operation, _Placeholder) for operation in getattr(rule, "operations", ()))


def install() -> None:
    """Make fastopt known to transformers, whose `from_pretrained` then loads what ``fastopt pack`` wrote, and packs.

    Examples
    --------
    >>> import fastopt.torch.transformers as ftt
    >>> ftt.install()
    >>> model = AutoModel.from_pretrained("packed_folder")  # doctest: +SKIP
    >>> model = AutoModel.from_pretrained(name, quantization_config=ftt.FastoptConfig(bits=4))  # doctest: +SKIP
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(FastoptConfig)
        register_quantizer(METHOD)(FastoptQuantizer)
