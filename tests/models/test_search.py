"""The search for bits by the score of the whole model."""

import json
import math
import sys

import numpy as np
import pytest
from helpers import same_bits

import fastopt as fo

WEIGHT = {"first": 1.0, "second": 30.0, "third": 0.0}  # how much an error of each layer costs


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal((48, 128)).astype("f4") for name in WEIGHT}
    return {**made, "bias": np.zeros(48, "f4")}


class Judge:
    """A score that knows which layers matter, and counts how often it was asked."""

    def __init__(self, weights, sign=-1):
        self.weights, self.sign, self.asked = weights, sign, 0

    def __call__(self, model):
        self.asked += 1
        errors = {name: np.asarray(model[name]) - self.weights[name] for name in WEIGHT}
        loss = sum(WEIGHT[name] * float(np.square(error).mean()) for name, error in errors.items())
        return 10 + self.sign * loss


def test_bits_go_where_they_count(weights):
    judge = Judge(weights)
    found = fo.search(weights, judge, fit="lsq", budget=0.1)
    assert judge.asked <= 1 + 3 + 8
    assert found.original == 10
    assert found.best.loss <= 0.1 == found.budget
    assert found.bits["third"] <= found.bits["first"] < found.bits["second"]
    assert found.sensitivity["second"] > found.sensitivity["first"] > found.sensitivity["third"] == 0
    packed = fo.pack(weights, found.recipe)
    assert Judge(weights)(packed) == found.best.score
    assert packed.nbytes <= found.best.nbytes
    # A choice by errors alone, of as many bytes, is worse.
    alike = fo.pack(weights, fit="lsq", target_bits=8 * packed.nbytes / sum(w.size for w in weights.values()))
    assert 10 - Judge(weights)(alike) > 1.5 * found.best.loss
    assert [trial.nbytes for trial in found.trials] == sorted(trial.nbytes for trial in found.trials)
    assert all(trial.loss > 0.1 for trial in found.trials if trial.nbytes < found.best.nbytes)
    assert "chosen" in str(found)
    assert "second" in str(found)


def test_a_budget_is_also_a_share_and_scores_may_be_minimized(weights):
    assert fo.search(weights, Judge(weights), fit="lsq", budget="1%").budget == 0.1
    found = fo.search(weights, Judge(weights, +1), fit="lsq", budget=0.1, minimize=True)
    assert found.recipe == fo.search(weights, Judge(weights), fit="lsq", budget=0.1).recipe


def test_more_loss_makes_smaller_models(weights):
    sizes = [fo.search(weights, Judge(weights), fit="lsq", budget=b).best.nbytes for b in (0.02, 0.2, 2, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_few_evaluations_still_find_a_model(weights, evaluations):
    judge = Judge(weights)
    found = fo.search(weights, judge, fit="lsq", budget=0.05, evaluations=evaluations)
    assert found.best.loss <= 0.05
    assert judge.asked <= 4 + evaluations


def test_options_of_a_recipe_hold(weights):
    recipe = fo.Recipe(fit="lsq", group_size=32, exclude=["third"], overrides={"first": {"bits": 8}})
    found = fo.search(weights, Judge(weights), recipe, budget=0.5)
    assert found.bits.keys() == {"second"}
    packed = fo.pack(weights, found.recipe)
    assert packed["first"].bits == 8
    assert packed["second"].group_size == 32
    assert same_bits(packed["third"], weights["third"])


def test_tied_tensors_stay_one(weights):
    tied = {**weights, "again": weights["second"]}
    found = fo.search(tied, Judge(weights), fit="lsq", budget=0.1)
    assert "again" not in found.bits
    packed = fo.pack(tied, found.recipe)
    assert packed["again"] is packed["second"]


def test_an_interrupted_search_goes_on(weights, tmp_path):
    state, judge = tmp_path / "state.json", Judge(weights)
    whole = fo.search(weights, judge, fit="lsq", budget=0.1)

    class Stops(Judge):
        def __call__(self, model):
            if self.asked == 3:
                raise KeyboardInterrupt
            return super().__call__(model)

    stopped = []
    while True:  # three scores at a time
        part = Stops(weights)
        stopped.append(part)
        try:
            found = fo.search(weights, part, fit="lsq", budget=0.1, state=state)
        except KeyboardInterrupt:
            continue
        break
    assert len(stopped) > 2
    assert sum(part.asked for part in stopped) == judge.asked
    assert str(found) == str(whole)
    assert found.recipe == whole.recipe
    again = Judge(weights)
    assert fo.search(weights, again, fit="lsq", budget=0.1, state=state).recipe == whole.recipe
    assert again.asked == 0
    fo.search(weights, again, fit="lsq", budget=0.01, state=state)  # its single tensors are known
    assert 0 < again.asked <= 8
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_state_of_another_search_is_refused(weights, tmp_path):
    state = tmp_path / "state.json"
    fo.search(weights, Judge(weights), fit="lsq", budget=0.1, state=state)
    before = state.read_bytes()
    other = {**weights, "first": weights["first"] * np.linspace(1, 2, 128, dtype="f4")}
    for args, options in (
        ((other, Judge(other)), {"fit": "lsq"}),
        ((weights, Judge(weights)), {"fit": "minmax"}),
        ((weights, Judge(weights)), {"fit": "lsq", "minimize": True}),
    ):
        with pytest.raises(ValueError, match=r"^state: .* belongs to a search with other weights or options"):
            fo.search(*args, budget=0.1, state=state, **options)
    assert state.read_bytes() == before
    for text in ("", "[]", "{}", '{"scores": 3}', '{"scores": {"original": null}}', "[" * 10000):
        state.write_text(text)
        with pytest.raises(ValueError, match=r"^state: .* is not the state of a search"):
            fo.search(weights, Judge(weights), fit="lsq", budget=0.1, state=state)


def test_bad_scores_and_options(weights, tmp_path):
    state = tmp_path / "state.json"

    def scores(*values):
        left = list(values)
        return lambda model: left.pop(0)

    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"^evaluate: .*(nan|inf)"):
            fo.search(weights, scores(bad), budget=1)
    with pytest.raises(ValueError, match=r"^evaluate: expected a number, got nan for second$"):
        fo.search(weights, scores(1, 1, math.nan), budget=1, state=state)
    assert len(json.loads(state.read_text())["scores"]) == 2  # those before it are kept
    with pytest.raises(TypeError, match=r"^evaluate: expected a number, got None for the original model"):
        fo.search(weights, lambda model: None, budget=1)
    with pytest.raises(ValueError, match=r"^budget: no model that was tried is within 0; the least loss is 9"):
        fo.search(weights, scores(10, *[1] * 20), budget=0)
    for budget in (-1, math.nan, "x%", "", None, True, [1]):
        with pytest.raises(ValueError, match=r"^budget: expected a number, 0 or more"):
            fo.search(weights, Judge(weights), budget=budget)
    for options in ({"bits": 4}, {"evaluations": 0}, {"evaluations": True}, {"exclude": ["*"]}):
        with pytest.raises(ValueError, match=r"^(bits|evaluations|weights): expected"):
            fo.search(weights, Judge(weights), budget=1, **options)


def test_an_infinite_loss_is_a_loss(weights):
    """A perplexity may overflow."""

    def evaluate(model):
        loss = Judge(weights, +1)(model) - 10
        return math.inf if loss > 1 else loss

    found = fo.search(weights, evaluate, fit="lsq", budget=0.1, minimize=True)
    assert found.best.loss <= 0.1
    assert math.isfinite(found.best.score)


def test_scores_that_show_nothing_leave_the_choice_to_errors(weights):
    found = fo.search(weights, lambda model: 1, fit="lsq", budget=0)
    assert len(set(found.bits.values())) == 1
    assert found.best.nbytes == min(trial.nbytes for trial in found.trials)


def test_progress(weights):
    told = []
    fo.search(weights, Judge(weights), fit="lsq", budget=0.1, notify=lambda *args: told.append(args))
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {1 + 3 + 8}
    assert [note for _, _, note in told][:4] == ["the original model", "first", "second", "third"]


def test_chart(weights, tmp_path):
    pytest.importorskip("matplotlib")
    found = fo.search({"a$b_c^": weights["first"]}, lambda model: 1.0 + model.nbytes, budget="100%")
    found.chart(tmp_path / "chart.svg")
    assert b"<svg" in (tmp_path / "chart.svg").read_bytes()


def test_a_chart_needs_matplotlib(weights, tmp_path, monkeypatch):
    found = fo.search(weights, lambda model: 1, budget=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a chart needs matplotlib: pip install matplotlib"):
        found.chart(tmp_path / "chart.svg")
