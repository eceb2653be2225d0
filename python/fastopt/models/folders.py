"""Folders of models, as Hugging Face's libraries write them: the weights, and a config and a tokenizer beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastopt._types import PathLike
from fastopt.files.atomic import replacing, write_text
from fastopt.files.sources import is_safetensors, model_files
from fastopt.files.weights import Weights

METHOD = "fastopt"  # the name of this library in the config of a packed model, by which transformers finds it
_CONFIG, _KEY = "config.json", "quantization_config"
_INDEX = ".index.json"
_SUFFIX = re.compile(r"\.[A-Za-z]\w*")  # that of "Llama-3.2" is none
# Files of weights, which are not copied: the packed file is in their place.
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".tflite", ".part", ".ot",  # codespell:ignore ot
}  # fmt: skip


def is_folder(weights: Weights, target: PathLike) -> bool:
    """Return whether a model is written to a folder: it comes from one, and `target` is one, or has no suffix."""
    target = Path(target)
    return weights.folder is not None and (target.is_dir() or not _SUFFIX.fullmatch(target.suffix))


def file_to_write(weights: Weights, target: PathLike) -> Path:
    """Return the file, or the index of the files, in which the weights are written: `target`, or one in that folder.

    Raises
    ------
    ValueError
        If the folder holds the weights of another model, which a reader would take for these.
    """
    target = Path(target)
    if weights.folder is None or not is_folder(weights, target):
        return target
    found = model_files(weights.folder)
    file = target / (f"model.safetensors{_INDEX}" if weights.shards else "model.safetensors")
    if isinstance(found, Path) and is_safetensors(found):
        file = target / found.name
    if target.is_dir():
        for other in (*target.glob(f"*{_INDEX}"), *(() if weights.shards else target.glob("*.safetensors"))):
            if other != file:
                raise ValueError(f"{target}: holds other weights, {other.name}; remove them, or name another folder")
    return file


def copy_others(weights: Weights, target: PathLike, *, packed: bool) -> None:
    """Copy the files of a folder that are not weights to another one, and note in its config whether it is packed.

    Parameters
    ----------
    weights : Weights
        The model of the folder to copy from.
    target : path-like
        The folder to copy to, which may be the same.
    packed : bool
        True if the weights were packed, False if they were unpacked.
    """
    if weights.folder is None or not is_folder(weights, target):
        return
    for file in _others(weights.folder):
        copy = Path(target) / file.relative_to(weights.folder)
        config = _config_of(file) if file == weights.folder / _CONFIG else None
        if config is not None:
            if packed:
                config.setdefault(_KEY, {"quant_method": METHOD})
            elif isinstance(config.get(_KEY), dict) and config[_KEY].get("quant_method") == METHOD:
                del config[_KEY]
            write_text(copy, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        elif not (copy.exists() and copy.samefile(file)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as temporary:
                shutil.copyfile(file, temporary)


def _others(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, and of folders in it, that are neither weights nor hidden."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _others(path)
        elif path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(_INDEX):
            yield path


def _config_of(path: Path) -> dict[str, Any] | None:
    """Return the config of a model; None if the file is something else."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return config if isinstance(config, dict) and ("model_type" in config or "architectures" in config) else None
