"""fastopt.torch beside torch: optimizer steps of a BERT and of a small CNN, and products of packed modules."""

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import harness
import torch

import fastopt as fo
import fastopt.torch as ft
from fastopt.cli.timing import FASTOPT, Case, limit

Shapes = list[tuple[int, ...]]
FUSED, INT8, DYNAMIC = "torch fused", "fastopt int8", "torch int8"


def bert() -> Shapes:
    """Shapes of the 103 parameters of MiniLM-L6: 22.7 million weights."""
    layer: Shapes = [(384, 384), (384,)] * 4 + [(384,)] * 2 + [(1536, 384), (1536,), (384, 1536), (384,)] + [(384,)] * 2
    return [(30522, 384), (512, 384), (2, 384), (384,), (384,), *layer * 6, (384, 384), (384,)]


CNN: Shapes = [(16, 1, 3, 3), (16,), (32, 16, 3, 3), (32,), (64, 32, 3, 3), (64,), (64, 64), (64,), (10, 64), (10,)]


def step_case(name: str, shapes: Shapes) -> Case:
    """AdamW with clipping, one step over all tensors."""

    def params() -> list[torch.Tensor]:
        made = [torch.nn.Parameter(torch.full(shape, 0.5)) for shape in shapes]
        for p in made:
            p.grad = torch.full_like(p, 1e-3)
        return made

    ours, theirs, viewed = params(), params(), params()
    arrays = [p.detach().numpy() for p in viewed]  # in torch's memory too: NumPy's has larger pages
    grads = [p.grad.numpy() for p in viewed if p.grad is not None]
    opt = ft.AdamW(ours, lr=1e-5, max_norm=1.0)
    fused = torch.optim.AdamW(theirs, lr=1e-5, fused=True)
    plain = fo.AdamW(arrays, lr=1e-5, max_norm=1.0)

    def fused_step() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        fused.step()

    size = sum(map(math.prod, shapes))
    return Case(
        name=f"AdamW, clipping, {name}, {len(shapes)} tensors",
        size=size,
        nbytes=32 * size,
        contenders={FASTOPT: [opt.step], "fo.AdamW": [partial(plain.step, grads)], FUSED: [fused_step]},
        limit=limit(read=20 * size, write=12 * size),
    )


def module_case(name: str, model: torch.nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor]) -> Case:
    """A forward pass with 4 bits; the error is 1 minus the smallest cosine between a row and that of float32."""
    exact, int8 = copy.deepcopy(model), copy.deepcopy(model)
    ft.pack_(exact, bits=4)
    ft.pack_(int8, bits=4, precision="int8")
    with warnings.catch_warnings():  # it is deprecated, but in wide use
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    models = {FASTOPT: exact, INT8: int8, "torch": model, DYNAMIC: dynamic}

    def forward(net: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return run(net, x)

    def error(net: torch.nn.Module) -> float:
        a, b = forward(net).flatten(1), forward(model).flatten(1)
        return 1 - float(torch.nn.functional.cosine_similarity(a, b).min())

    size = sum(p.numel() for p in model.parameters())
    return Case(
        name=name,
        size=size,
        nbytes=4 * size,
        contenders={who: [partial(forward, net)] for who, net in models.items()},
        limit=limit(read=4 * size, write=0),
        errors={who: partial(error, net) for who, net in models.items()},
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    torch.manual_seed(0)
    yield step_case("MiniLM", bert())
    yield step_case("small CNN", CNN)
    linear, side = torch.nn.Linear, 1024 if options.quick else 4096
    mlp = torch.nn.Sequential(
        linear(784, side), torch.nn.ReLU(), linear(side, side), torch.nn.ReLU(), linear(side, 10)
    ).eval()
    for rows in (1, 64):
        yield module_case(f"MLP 784-{side}-{side}-10, {rows} rows", mlp, torch.randn(rows, 784), lambda net, x: net(x))
    transformers: Any = harness.peer("transformers")
    if transformers is not None:
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        encoder = transformers.BertModel(config).eval()
        for sentences in (1, 32):
            ids = torch.randint(config.vocab_size, (sentences, 22))
            name = f"BERT as MiniLM, random weights, {sentences} sentences"
            yield module_case(name, encoder, ids, lambda net, x: net(x).pooler_output)


if __name__ == "__main__":
    harness.main(cases)
