"""Estimators of scikit-learn, packed: they predict as the originals do."""

import pickle

import numpy as np
import pytest

import fastopt as fo

pytest.importorskip("sklearn", reason="the extra `demo` is not installed")
from sklearn import datasets, linear_model, neural_network, svm
from sklearn.cross_decomposition import PLSRegression
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

pytestmark = pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.ConvergenceWarning")


@pytest.fixture(scope="module")
def digits():
    x, y = datasets.load_digits(return_X_y=True)
    return x / 16, y


def labels(y):
    return np.array([["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][i] for i in y])


@pytest.mark.parametrize(
    "estimator",
    [
        linear_model.LogisticRegression(max_iter=50),
        linear_model.RidgeClassifier(),
        linear_model.SGDClassifier(loss="log_loss", random_state=0),
        linear_model.Perceptron(random_state=0),
        svm.LinearSVC(random_state=0),
        LinearDiscriminantAnalysis(),
        neural_network.MLPClassifier((24, 16), max_iter=40, random_state=0),
        neural_network.MLPClassifier((24,), activation="tanh", max_iter=40, random_state=0),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
@pytest.mark.parametrize("classes", [2, 10])
def test_classifiers(estimator, classes, digits):
    x, y = digits
    x, y = x[y < classes], labels(y[y < classes])
    if isinstance(estimator, LinearDiscriminantAnalysis):  # the columns that never change make it singular
        x = x + np.random.default_rng(0).normal(0, 0.05, x.shape)
    half = len(x) // 2
    estimator.fit(x[:half], y[:half])
    packed = fo.pack(estimator, bits=8)
    assert any(isinstance(tensor, fo.QuantizedTensor) for tensor in packed.values())
    agree = np.mean(packed.predict(x) == estimator.predict(x))
    assert agree > 0.98
    assert packed.predict(x).dtype == estimator.predict(x).dtype
    assert abs(packed.score(x, y) - estimator.score(x, y)) < 0.02
    for method in ("decision_function", "predict_proba"):
        assert hasattr(packed, method) == hasattr(estimator, method)
        if hasattr(estimator, method):
            want, got = getattr(estimator, method)(x), getattr(packed, method)(x)
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    again = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(again.predict(x), packed.predict(x))
    assert list(packed.classes_) == list(estimator.classes_)


@pytest.mark.parametrize(
    "estimator",
    [
        linear_model.Ridge(),
        linear_model.Ridge(fit_intercept=False),
        linear_model.PoissonRegressor(),
        linear_model.HuberRegressor(),
        linear_model.Lasso(alpha=0.01),
        PLSRegression(3),
        neural_network.MLPRegressor(hidden_layer_sizes=(20,), max_iter=60, random_state=0),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_regressors(estimator, digits):
    x, y = digits
    estimator.fit(x, y)
    packed = fo.pack(estimator, bits=8)
    want, got = estimator.predict(x), packed.predict(x)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


def test_outputs_and_sparse_inputs(digits):
    scipy = pytest.importorskip("scipy.sparse")
    x, y = digits
    many = linear_model.Ridge().fit(x, np.eye(10)[y])
    packed = fo.pack(many, bits=8)
    assert np.abs(packed.predict(x) - many.predict(x)).max() < 0.02
    for estimator in (linear_model.LogisticRegression(max_iter=50), neural_network.MLPClassifier((9,), max_iter=5)):
        packed = fo.pack(estimator.fit(x, y), bits=8)
        assert np.allclose(packed.predict_proba(scipy.csr_matrix(x)), packed.predict_proba(x), atol=1e-3)


def test_pipelines(digits):
    x, y = digits
    steps = StandardScaler(), neural_network.MLPClassifier((24,), max_iter=30, random_state=0)
    whole = make_pipeline(*steps).fit(x, y)
    packed = fo.pack(whole, bits=8)
    assert np.abs(packed.predict_proba(x) - whole.predict_proba(x)).max() < 0.1
    assert abs(packed.score(x, y) - whole.score(x, y)) < 0.01
    assert isinstance(whole[-1].coefs_[0], np.ndarray)
    with pytest.raises(TypeError, match="expected a fitted estimator"):
        fo.pack(make_pipeline(StandardScaler()).fit(x), bits=8)


def test_options(digits, tmp_path):
    x, y = digits
    mlp = neural_network.MLPClassifier((32,), max_iter=60, random_state=0).fit(x, y)
    small = fo.pack(mlp, bits=4)
    assert small.nbytes < 1900
    assert small.score(x, y) > mlp.score(x, y) - 0.01
    assert small["coefs_.0"].shape == (32, 64)  # [out, in]
    assert isinstance(small["intercepts_.0"], np.ndarray)
    assert fo.pack(mlp, sparsity=0.3, bits=8).score(x, y) > 0.9
    assert isinstance(fo.pack(mlp, bits=8, min_size=1000)["coefs_.1"], np.ndarray)
    small.save(tmp_path / "mlp.safetensors")
    assert fo.load(tmp_path / "mlp.safetensors")["coefs_.0"] == small["coefs_.0"]
    assert mlp.coefs_[0].shape == (64, 32)  # the original is what it was
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        small.fit(x, y)
    assert repr(small).startswith("PackedEstimator(MLPClassifier, 4 tensors")


def test_refused(digits):
    x, y = digits
    for estimator in (svm.SVC(kernel="linear").fit(x[:99], y[:99]), linear_model.LogisticRegression()):
        with pytest.raises(TypeError, match="expected a fitted estimator that keeps its coefficients"):
            fo.pack(estimator, bits=8)
    with pytest.raises(TypeError, match="a path, a Keras model or an estimator of scikit-learn, got int"):
        fo.pack(3, bits=8)


def test_a_report_takes_the_estimator():
    x = np.random.default_rng(0).standard_normal((50, 64))
    ridge = linear_model.Ridge().fit(x, x @ np.arange(64.0))
    assert 0 < fo.pack(ridge, bits=4).report(ridge).error.relative < 0.1
