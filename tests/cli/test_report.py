"""Tables at several widths, JSON, and what the page is told."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import fastopt as fo
from fastopt.cli import page, tables


def model():
    rng = np.random.default_rng(0)
    names = [f"model.decoder.layers.{i}.self_attn.{part}_proj.weight" for i in range(3) for part in "qkv"]
    shapes = {**dict.fromkeys(names, (64, 128)), "model.embed_tokens.weight": (200, 64), "lm_head[0].bias": (9,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


PACKED = fo.pack(model(), bits=4, overrides={"*v_proj*": {"sparsity": 0.5}})


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("table", ["facts", "report", "difference"])
def test_tables_fit_the_terminal(columns, table, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    if table == "facts":
        tables.print_facts(Path("m.safetensors"), fo.inspect(PACKED))
    elif table == "report":
        tables.print_report(PACKED.report(model()))
    else:
        tables.print_difference(fo.diff(model(), PACKED))
    shown = capsys.readouterr().out.splitlines()
    rows = [line for line in shown if "_proj.weight" in line]
    assert len(rows) == 9
    assert max(map(len, shown[:-4])) <= columns
    assert all("…" not in row.split("weight")[1] for row in rows)  # numbers are never cut
    assert "k_proj.weight" in rows[0]
    assert sum("model.decoder.layers." in line for line in shown) == 3  # said once for each layer


def test_names_are_no_markup(capsys):
    tables.print_facts(Path("m.safetensors"), fo.inspect({"[red]w[/red]": np.zeros(3)}))
    assert "[red]w[/red]" in capsys.readouterr().out


def test_report_tells_totals_and_reasons():
    lines = tables.report_lines(PACKED.report(model()))
    assert lines[0] == "kept as they are: 1 tensor, 36 B (fewer than min_size 4096)"
    told = PACKED.report(model())
    assert f"{told.bits_per_weight:.2f} bits per weight" in lines[1]
    assert f"SNR {told.error.snr:.1f} dB" in lines[2]


def test_layers_are_in_order(capsys, monkeypatch):
    facts = fo.inspect({f"layers.{i}.{part}": np.zeros(3) for i in (10, 9, 1) for part in ("weight", "bias")})
    for columns, expected in (
        ("80", [part for i in (1, 9, 10) for part in (f"layers.{i}", "bias", "weight")]),
        (None, [f"layers.{i}.{part}" for i in (1, 9, 10) for part in ("bias", "weight")]),  # to a pipe
    ):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        tables.print_facts(Path("m.safetensors"), facts)
        shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert shown[2 : 2 + len(expected)] == expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.0.attention.weight", "encoder.layer.0"),
        ("h.11.mlp.0.weight", "h.11"),
        ("3.weight", "3"),
        ("fc1.weight", ""),
        ("weight", ""),
        ("layers.2", ""),
    ],
)
def test_layers(name, layer):
    assert tables.layer_of(name) == layer


def test_sizes():
    texts = {
        0: "0 B",
        999: "999 B",
        1000: "1.00 kB",
        123_456: "123.5 kB",
        90_858_704: "90.86 MB",
        5 * 10**12: "5.00 TB",
    }
    assert {count: tables.size_text(count) for count in texts} == texts


def test_json_has_only_what_json_has():
    found = fo.diff({"w": np.ones(3, np.float32)}, {"w": np.ones(3, np.float32)})
    text = tables.to_json({"infinite": math.inf, "nan": math.nan, "nested": [(1.5, None)], "found": found})
    told = json.loads(text, parse_constant=pytest.fail)
    assert (told["infinite"], told["nan"], told["nested"]) == (None, None, [[1.5, None]])
    assert told["found"]["total"]["snr"] is None
    assert told["found"]["total"]["cosine"] == 1


# ---- the page ----------------------------------------------------------------------------------------------------


def test_histogram_counts_every_value():
    w = model()["model.embed_tokens.weight"]
    q = fo.quantize(w, 4, outliers=0.01)
    h = page.histogram(w, q)
    assert sum(h["before"]) == sum(h["after"]) == w.size
    both = np.stack([w, q.dequantize()])
    assert (h["low"], h["high"], h["notes"]) == (float(both.min()), float(both.max()), [])
    edges = np.linspace(h["low"], h["high"], len(h["before"]) + 1)
    np.testing.assert_array_equal(h["after"], np.histogram(q.dequantize(), edges)[0])


@pytest.mark.parametrize("group_size", [32, None])
def test_grids_are_where_codes_lie(group_size):
    w = model()["model.embed_tokens.weight"]
    q = fo.quantize(w, 4, group_size=group_size)
    grids = page.histogram(w, q)["grids"]
    assert len(grids) == (3 if group_size else 1)
    levels = q.minimum.astype(np.float64)[..., None] + q.scale.astype(np.float64)[..., None] * np.arange(16)
    spans = levels[..., -1] - levels[..., 0]
    for grid, span in zip(grids, (spans.min(), np.sort(spans, axis=None)[spans.size // 2], spans.max()), strict=False):
        assert grid["levels"][-1] - grid["levels"][0] == pytest.approx(span, rel=1e-4)
        assert abs(levels - np.array(grid["levels"])).max(axis=-1).min() < 1e-5


def test_histogram_of_pruned_and_of_far_values():
    w = model()["model.embed_tokens.weight"]
    w[0, :2] = 100, -50
    h = page.histogram(w, fo.prune(w, sparsity=0.25).quantize(8))
    assert "25.0% of the values are zero after, and not drawn" in h["notes"]
    assert any(
        note.startswith("2 further than 8 standard deviations") and note.endswith("to 100") for note in h["notes"]
    )
    assert sum(h["before"]) == w.size - 2


def test_histogram_of_a_sample(monkeypatch):
    monkeypatch.setattr(page, "_SAMPLE", 1000)
    for shape in ((200, 64), (12800,), (2, 6400)):
        w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        h = page.histogram(w, fo.quantize(w, 8))
        assert 1000 <= sum(h["before"]) <= 2000
        assert h["notes"][0].endswith("of 12,800 values are counted")


@pytest.mark.parametrize("values", [[], [np.nan, np.inf]])
def test_no_histogram_of_nothing(values):
    assert page.histogram(np.array(values, np.float32), None) is None


def test_histogram_of_one_value():
    h = page.histogram(np.full(10, 3, np.float32), None)
    assert h["low"] < 3 < h["high"]
    assert sum(h["before"]) == 10
