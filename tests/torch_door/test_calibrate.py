"""Hooks collect the inputs of layers, and packing uses them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn

import fastopt as fo
import fastopt.torch as ft
from fastopt.train.param_tree import as_array


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs_of(layer, name, *batches):
    """Return what `calibrate` says of the inputs of a layer alone."""
    with torch.no_grad(), ft.calibrate(nn.ModuleDict({name: layer})) as calib:
        for x in batches:
            layer(x)
    return calib


def test_linear():
    a, b = torch.randn(3, 5, 64), torch.randn(64)
    want = fo.Calibration(products=True)
    want.update("fc.weight", a.numpy())
    want.update("fc.weight", b.numpy())
    layer = nn.Linear(64, 32)
    with ft.calibrate(nn.ModuleDict({"fc": layer}), products=True) as calib:
        layer(a)
        layer(input=b)
    assert calib == want
    layer(a)  # the hooks are gone
    assert calib == want
    assert not layer._forward_pre_hooks
    half = inputs_of(layer.bfloat16(), "fc", a.bfloat16())
    assert half["fc.weight"].rows == 15


@pytest.mark.parametrize("conv", [
    nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"), nn.Conv1d(6, 8, 5, stride=2, padding=2),
    nn.Conv1d(6, 8, 4, padding="same"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_takes_its_patches(conv):
    """The sums of squares of the outputs follow from the products of the inputs."""
    x = torch.randn(2, conv.in_channels, *(13,) * (conv.weight.ndim - 2))
    with torch.no_grad(), ft.calibrate(conv, products=True) as calib:
        y = conv(x) - conv.bias.reshape(-1, *(1,) * (conv.weight.ndim - 2))
        conv(x[0])  # without a batch
    sums, w = calib["weight"], as_array(conv.weight).reshape(8, -1).astype(float)
    y = torch.cat([y, y[:1]]).double()
    squares = y.square().transpose(0, 1).flatten(1).sum(1).numpy()
    np.testing.assert_allclose(np.einsum("oi,ij,oj->o", w, sums.products, w), squares, rtol=1e-4)
    np.testing.assert_allclose(w @ sums.sum, y.transpose(0, 1).flatten(1).sum(1).numpy(), rtol=1e-3, atol=1e-3)
    assert sums.rows == y.numel() // 8


def test_names_are_those_of_pack_():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
            self.head.weight = self.embed.weight
            self.grouped = nn.Conv1d(64, 64, 3, groups=2, padding=1)

        def forward(self, ids):
            return self.head(self.grouped(self.embed(ids).mT).mT)

    model, ids = Tied(), torch.randint(100, (2, 7))
    with ft.calibrate(model) as calib:
        model(ids)
    assert calib.rows == {"embed.weight": 14}  # the inputs of the head
    weights = {name: as_array(p).copy() for name, p in model.named_parameters()}
    report = ft.pack_(model, bits=4, calibration=calib)
    want = fo.pack(weights, bits=4, calibration=calib)
    assert model.head.packed == want["embed.weight"]
    assert report.tensors[0] == want.report(weights).tensors[0]
    assert model.head.packed != fo.quantize(weights["embed.weight"], bits=4)
    with pytest.raises(ValueError, match=r"calibration: has inputs of 'embed\.weight'"):
        ft.pack_(nn.Linear(64, 64), calibration=calib)


def test_packing_by_inputs_keeps_outputs():
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight *= torch.logspace(0, -1, 256)  # large weights where inputs are small
    x = torch.randn(500, 256) * torch.logspace(-2, 1, 256)
    calib = inputs_of(layer, "fc", x)
    errors = []
    for options in ({}, {"calibration": calib}):
        model = nn.ModuleDict({"fc": nn.Linear(256, 64)})
        model["fc"].load_state_dict(layer.state_dict())
        ft.pack_(model, bits=2, group_size=-1, **options)
        errors.append(torch.linalg.vector_norm(model["fc"](x) - layer(x)).item())
    assert errors[1] < 0.9 * errors[0]


def test_compiled_modules_are_watched_too():
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch cannot suspend its compiler")
    model = torch.compile(nn.Sequential(nn.Linear(64, 64)), backend="eager")
    x = torch.randn(3, 64)
    model(x)
    with torch.no_grad(), ft.calibrate(model) as calib:
        model(x)
    assert list(calib.rows.values()) == [3]
    report = ft.pack_(model, calibration=calib)
    assert [t.kind for t in report.tensors] == ["quantized", "dense"]


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    model, x = nn.ModuleDict({"c_fc": utils.Conv1D(32, 64)}), torch.randn(5, 64)
    with ft.calibrate(model) as calib:
        model["c_fc"](x)
    np.testing.assert_allclose(calib["c_fc.weight"].sum, x.double().sum(0))
    ft.pack_(model, calibration=calib)


def test_wrong_inputs():
    layer = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="'weight': x: expected finite values"), ft.calibrate(layer):
        layer(torch.full((1, 64), torch.nan))
    assert not layer._forward_pre_hooks
    with pytest.raises(TypeError, match="module"), ft.calibrate("model"):
        pass
