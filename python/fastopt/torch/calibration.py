"""Calibrate a module: hooks that add the inputs of its layers to a `fastopt.Calibration` while batches run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastopt.models.calibration import Calibration
from fastopt.torch.modules import PackedConv1D, is_layer
from fastopt.torch.packing import places_of, require_module
from fastopt.train.param_tree import as_array


@contextlib.contextmanager
def calibrate(module: torch.nn.Module, *, products: bool = False) -> Iterator[Calibration]:
    """Collect the inputs of the layers of a module, while batches run through it.

    Parameters
    ----------
    module : torch.nn.Module
        Its ``Linear``, ``Conv1d`` and ``Conv2d`` layers, and transformers' ``Conv1D``, are watched, unless they are
        packed. A convolution with groups is not: each group has inputs of its own.
    products : bool
        As in `fastopt.Calibration`.

    Yields
    ------
    fastopt.Calibration
        Named as `pack_` names weights. Padding of batches is counted too: leave it out, or mask it.

    Examples
    --------
    >>> import torch
    >>> import fastopt.torch as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> with torch.no_grad(), ft.calibrate(model) as calib:
    ...     _ = model(torch.ones(10, 128))
    >>> calib
    Calibration(2 weights, 10 rows)
    >>> report = ft.pack_(model, bits=4, calibration=calib)
    """
    require_module(module)
    calibration = Calibration(products=products)
    with contextlib.ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):  # what is compiled already would not call the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for place in places_of(module):
            for owner, layer in place.owners:
                if owner == "weight" and any(is_layer(type(layer), watched) for watched in _WATCHED):
                    hook = layer.register_forward_pre_hook(_adder(calibration, place.name), with_kwargs=True)
                    stack.callback(hook.remove)
        yield calibration


_WATCHED = [torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, PackedConv1D.layer]


def _adder(calibration: Calibration, name: str) -> Callable[..., None]:
    """Return a hook that adds the inputs of a layer whose weight has this name."""

    def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach().cpu()
        if not isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d):
            calibration.update(name, as_array(x))
        elif layer.groups == 1:
            for image in x if x.ndim == layer.weight.ndim else x[None]:
                calibration.update(name, as_array(_patches(layer, image)))

    return add


def _patches(layer: Any, image: torch.Tensor) -> torch.Tensor:
    """Return what a convolution multiplies its weight with, as rows: channels first, then places of the kernel."""
    if layer.padding_mode == "zeros":
        padded = torch.nn.functional.pad(image[None], layer._reversed_padding_repeated_twice)
    else:
        padded = torch.nn.functional.pad(image[None], layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    rows = padded
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        rows = rows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    spatial = len(layer.kernel_size)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return rows.permute(order).flatten(1 + spatial).flatten(0, spatial)
