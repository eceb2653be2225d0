"""Modules with packed weights: the bits of fastopt, and the manners of torch.nn."""

import copy
import io
import pickle

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


class Tied(nn.Module):
    """A language model in small: the embedding is also the last layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids):
        return self.head(self.norm(self.hidden(self.embed(ids))))


def mlp():
    return nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64, bias=False))


def dense(model):
    """A copy of a packed model with decoded weights, which torch runs."""
    model = copy.deepcopy(model)
    ft.unpack_(model)
    return model


@pytest.mark.parametrize("options", [
    {}, {"bits": 8}, {"bits": 6}, {"bits": 5}, {"bits": 3}, {"bits": 2},
    {"bits": 4, "group_size": -1, "outliers": 0.01}, {"bits": None, "sparsity": 0.5},
    {"bits": 8, "sparsity": 0.5}, {"bits": None, "pattern": "2:4"}, {"precision": "int8"}, {"precision": "blas"},
])  # fmt: skip
@pytest.mark.parametrize("rows", [(), (1,), (3, 20), (0,)])
def test_linear_has_the_bits_of_fastopt(options, rows):
    layer = nn.Linear(160, 64)
    weight, bias = as_array(layer.weight).copy(), as_array(layer.bias)
    report = ft.pack_(layer, **options)
    precision = options.get("precision", "exact")
    packing = {"bits": 4, **{k: v for k, v in options.items() if k != "precision"}}
    want = fo.pack({"weight": weight}, **packing)["weight"]
    assert layer.packed == want
    assert report.tensors[0].nbytes == want.nbytes
    x = torch.randn(*rows, 160)
    assert np.array_equal(layer(x).detach().numpy(), fo.linear(x.numpy(), want, bias, precision=precision))
    torch.testing.assert_close(torch.from_numpy(want.to_dense()), layer.weight.as_subclass(torch.Tensor))


def test_dtypes():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = mlp().to(dtype)
        ft.pack_(model)
        x = torch.randn(5, 128, dtype=dtype)
        assert model(x).dtype == dtype
        assert dense(model)[0].weight.dtype == dtype
        torch.testing.assert_close(model(x).double(), dense(model).double()(x.double()), rtol=0.05, atol=0.05)
    model = mlp()
    ft.pack_(model)
    scale = model[0].scale
    assert model.to(torch.bfloat16)[0].scale is scale  # codes and scales stay what they are
    assert model(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(torch.randn(2, 128)).dtype == torch.bfloat16
    with torch.inference_mode():
        x = torch.randn(2, 128)
        y = model(x)
    assert torch.equal(y, model(x.clone()).detach())


@pytest.mark.parametrize("options", [{}, {"bits": None, "sparsity": 0.5}, {"outliers": 0.02}])
def test_bfloat16_weights_keep_their_bits(options, tmp_path):
    model = mlp().to(torch.bfloat16)
    want = fo.pack({"w": as_array(model[0].weight).copy()}, **{"bits": 4, **options})["w"]
    ft.pack_(model, **options)
    assert torch.equal(model[0].dense().float(), torch.from_numpy(want.to_dense().astype("float32")))
    ft.save(model, tmp_path / "m.safetensors")
    other = mlp().to(torch.bfloat16)
    ft.load_(other, tmp_path / "m.safetensors")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_input_of_other_dtypes_is_refused(dtype):
    model = mlp()
    ft.pack_(model)
    with pytest.raises(TypeError, match=f"x: expected a tensor of a float type, got {dtype}"):
        model(torch.ones(2, 128, dtype=dtype))


def test_conv1d_of_transformers(tmp_path):
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    model, x = nn.Sequential(utils.Conv1D(96, 128)), torch.randn(2, 3, 128)
    weight = as_array(model[0].weight).copy()
    ft.pack_(model, bits=8)
    assert model[0].packed == fo.quantize(np.ascontiguousarray(weight.T), bits=8)
    assert "nf=96, nx=128, quantized, bits=8" in repr(model)
    torch.testing.assert_close(model(x), dense(model)(x), rtol=1e-4, atol=1e-4)
    ft.save(model, tmp_path / "m.safetensors")
    other = nn.Sequential(utils.Conv1D(96, 128))
    ft.load_(other, tmp_path / "m.safetensors")
    assert torch.equal(other(x), model(x))


def test_a_model_is_packed_by_the_same_choice_as_an_array():
    model = Tied()
    weights = {name: as_array(p).copy() for name, p in model.named_parameters()}
    options = {"exclude": ["*norm*"], "overrides": {"embed*": {"bits": 8}}, "min_size": 1000}
    report = ft.pack_(model, **options)
    want = fo.pack(weights, bits=4, **options).report(weights)
    assert [(t.name, t.kind, t.bits, t.nbytes, t.error) for t in report.tensors] == [
        (t.name, t.kind, t.bits, t.nbytes, t.error) for t in want.tensors
    ]
    assert "LayerNorm" in report.tensors[3].reason
    recipe = fo.Recipe(bits=2, include=["hidden*"])
    model = Tied()
    assert [t.bits for t in ft.pack_(model, recipe).tensors] == [None, 2, None, None, None]
    report = ft.pack_(Tied(), target_bits=5.0)
    assert report.bits_per_weight <= 5.5
    assert ft.pack_(model, bits=8).tensors  # what is packed stays, the rest follows
    assert model.hidden.packed.bits == 2
    assert model.embed.packed.bits == 8


def test_tied_weights_stay_tied():
    model = Tied()
    ids = torch.randint(100, (2, 7))
    ft.pack_(model)
    assert model.embed.codes is model.head.codes
    torch.testing.assert_close(model(ids), dense(model)(ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embed(ids), model.embed.weight[ids])
    both = copy.deepcopy(model)
    assert both.embed.codes is both.head.codes is not model.head.codes
    ft.unpack_(model)
    assert type(model.embed) is nn.Embedding
    assert model.embed.weight is model.head.weight
    assert model.embed.weight.requires_grad
    model.other = nn.ParameterList([model.embed.weight])  # held by what cannot pack it
    assert "ParameterList" in ft.pack_(model).tensors[0].reason
    assert model.embed.weight is model.head.weight is model.other[0]
    with pytest.raises(IndexError, match="ids"):
        both.embed(torch.tensor([100]))


@pytest.mark.parametrize("conv", [
    nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.Conv2d(64, 64, 3, groups=2, padding_mode="circular", padding=1),
    nn.Conv1d(64, 32, 5, dilation=2),
])  # fmt: skip
def test_convolutions(conv):
    conv = copy.deepcopy(conv)
    x = torch.randn(2, conv.in_channels, *(12,) * (conv.weight.ndim - 2), requires_grad=True)
    ft.pack_(conv, bits=8)
    assert isinstance(conv, ft.PackedModule)
    out = conv(x)
    assert torch.equal(out, dense(conv)(x))
    out.sum().backward()
    assert x.grad is not None


def test_gradients_of_input_and_bias():
    model = mlp()
    ft.pack_(model)
    want = dense(model)
    x = torch.randn(6, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    want(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].bias.grad, want[0].bias.grad, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]
    with pytest.raises(RuntimeError, match="unpack_"):
        model[0].weight.requires_grad_()
    with pytest.raises(RuntimeError, match="unpack_"):
        model[0].weight.requires_grad = True
    for net in (model, want):  # a penalty on the gradient
        y.grad = None
        (grad,) = torch.autograd.grad(net(y).square().sum(), y, create_graph=True)
        grad.square().sum().backward()
        if net is model:
            x.grad = y.grad
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(
        torch.ops.fastopt.linear.default,
        (x, model[0].buffers_of_weight, model[0].about, model[0].bias, "exact"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_state_dict():
    model = Tied()
    ft.pack_(model)
    ids = torch.randint(100, (2, 7))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    other = Tied()
    ft.pack_(other)
    before = other(ids)
    other.load_state_dict(state)
    assert not torch.equal(before, model(ids))
    assert torch.equal(other(ids), model(ids))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert torch.equal(copied(ids), model(ids))
    wrong = Tied()
    ft.pack_(wrong, bits=8)
    with pytest.raises(RuntimeError, match="codes"):
        wrong.load_state_dict(state)


def test_files(tmp_path):
    model = Tied()
    ids = torch.randint(100, (2, 7))
    model.count += 4
    ft.pack_(model, bits=8)
    ft.save(model, tmp_path / "m.safetensors")
    assert fo.load(tmp_path / "m.safetensors")["embed.weight"] == model.embed.packed
    torch.manual_seed(1)
    other = Tied()
    ft.load_(other, tmp_path / "m.safetensors", precision="exact")
    assert torch.equal(other(ids), model(ids))
    assert other.count == 7
    assert other.embed.codes is other.head.codes
    ft.load_(other, tmp_path / "m.safetensors")  # again, into a packed one
    ft.unpack_(other)
    ft.save(other, tmp_path / "d.safetensors")
    ft.load_(model, tmp_path / "d.safetensors")
    assert type(model.hidden) is nn.Linear
    assert torch.equal(model(ids), other(ids))

    fo.pack({name: as_array(t) for name, t in Tied().state_dict().items()}, bits=4).save(tmp_path / "p.safetensors")
    ft.load_(model, tmp_path / "p.safetensors")  # which holds the tied weight twice
    assert model.head.packed.bits == 4
    with pytest.raises(ValueError, match=r"missing \['0.bias', '0.weight'"):
        ft.load_(mlp(), tmp_path / "p.safetensors")
    model = Tied()
    model.hidden = nn.Linear(64, 65)
    with pytest.raises(ValueError, match=r"'hidden\.weight': expected shape"):
        ft.load_(model, tmp_path / "p.safetensors")
    model.register_buffer("table", torch.zeros(4).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="array 'table': "):
        ft.save(model, tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.parametrize("packed", [True, False])
def test_a_module_without_memory(tmp_path, packed):
    model, ids = Tied(), torch.randint(100, (2, 7))
    if packed:
        ft.pack_(model)
    ft.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty, other = Tied(), mlp()
    with pytest.raises(ValueError, match="missing"):
        ft.load_(other, tmp_path / "m.safetensors")
    assert other[0].weight.is_meta
    ft.load_(empty, tmp_path / "m.safetensors")
    assert torch.equal(empty(ids), model(ids))
    assert empty.count == model.count
    assert empty.embed.codes is empty.head.codes if packed else empty.embed.weight is empty.head.weight
    assert empty.norm.weight.requires_grad


def test_pack_takes_a_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 64).bfloat16())
    model[1].other = model[2].weight
    state = model.state_dict()
    packed = fo.pack(state, bits=4, min_size=4096)
    assert packed["0.weight"] == fo.quantize(model[0].weight.detach().numpy(), 4)
    assert packed["2.weight"].dtype.name == "bfloat16"
    assert packed["1.other"] is packed["2.weight"]
    assert packed["1.num_batches_tracked"].shape == ()
    assert packed.report(state).error.relative < 0.1
    assert fo.diff(state, packed).total.relative < 0.1
    assert [facts.name for facts in fo.inspect(state)] == [*state]
    fo.export(model[0].state_dict(), tmp_path / "m.npz", to="npz")
    assert np.array_equal(np.load(tmp_path / "m.npz")["weight"], model[0].weight.detach().numpy())
    assert fo.search(state, lambda packed: 1.0, budget=0, evaluations=1).bits.keys() == {"0.weight", "1.other"}
    with pytest.raises(ValueError, match=r"'w' is stored as torch\.sparse_coo, expected a dense tensor$"):
        fo.pack({"w": torch.eye(64).to_sparse()}, bits=4)
    with pytest.raises(TypeError, match=r"got Sequential; fastopt\.torch\.pack_ packs modules of torch"):
        fo.pack(model, bits=4)


def test_what_stays():
    attention = nn.MultiheadAttention(64, 4)
    embed = nn.Embedding(100, 64, max_norm=1.0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    model = nn.ModuleList([attention, embed, normed, nn.Bilinear(16, 16, 16), nn.Embedding(100, 64)])
    report = ft.pack_(model, bits=None, sparsity=0.5)
    assert {t.kind for t in report.tensors} == {"dense"}
    assert not any(isinstance(m, ft.PackedModule) for m in model.modules())
    assert "max_norm" in report.tensors[4].reason
    x = torch.randn(3, 2, 64)
    attention(x, x, x)


@pytest.mark.parametrize(("wrong", "kind"), [
    ({"bits": 7}, ValueError), ({"bit": 4}, TypeError), ({"precision": "fast"}, ValueError), ({"recipe": 4}, TypeError),
])  # fmt: skip
def test_wrong_options_are_refused(wrong, kind):
    model = mlp()
    with pytest.raises(kind):
        ft.pack_(model, **wrong)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="module"):
        ft.pack_({"w": 1})
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2\.weight"):
        ft.pack_(model)
    assert type(model[0]) is nn.Linear


def test_hooks_and_references_stay():
    layer = nn.Linear(128, 64)
    model, seen = nn.Sequential(layer, layer), []
    layer.register_forward_hook(lambda *args: seen.append(1))
    ft.pack_(model[0])
    assert model[1] is layer
    layer(torch.ones(128))
    assert seen == [1]
    assert "bits=4" in repr(layer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore:At pre-dispatch tracing", "ignore::FutureWarning")
def test_compile_and_export():
    model = Tied().eval()
    ft.pack_(model)
    ids = torch.randint(100, (2, 7))
    want = model(ids)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), want)
    program = torch.export.export(model, (ids,))
    assert "fastopt.linear" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(ids), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(ids), want)
    traced = torch.jit.trace(model, (ids,))
    more = torch.randint(100, (2, 7))
    torch.testing.assert_close(traced(more), model(more))
    x = torch.randn(4, 128, requires_grad=True)
    net = mlp()
    ft.pack_(net)
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert x.grad is not None


def test_adapters_on_a_packed_base():
    base = mlp()
    ft.pack_(base)
    adapter = nn.Linear(64, 64)
    opt = ft.AdamW([*adapter.parameters()], lr=1e-2)
    x, goal = torch.randn(32, 128), torch.randn(32, 64)
    losses = []
    for _ in range(20):
        loss = (adapter(base(x)) - goal).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
