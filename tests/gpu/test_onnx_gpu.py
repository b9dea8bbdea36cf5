"""An old model in ONNX runs where the images are: on the CUDA provider of onnxruntime, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import ModelFile, open_model
from lce_dist.models.onnx_model import OnnxModel

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a GPU and onnxruntime-gpu",
)


def test_an_onnx_model_runs_on_the_gpu_and_gives_the_vectors_of_the_network(tmp_path: Path) -> None:
    net = build_net("tiny8", 24, 48, seed=1).eval()
    path = tmp_path / "old.onnx"
    names = {"input_names": ["data"], "output_names": ["out"], "dynamic_axes": {"data": {0: "b"}, "out": {0: "b"}}}
    torch.onnx.export(net, (torch.zeros(1, 3, 48, 48),), str(path), dynamo=False, **names)
    device = torch.device("cuda")
    model = open_model(ModelFile(path), 48, device)
    assert isinstance(model.network, OnnxModel)
    assert model.network._session.get_providers()[0] == "CUDAExecutionProvider"
    images = torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = model(images.to(device))
    with torch.no_grad():
        truth = net(images)
    assert found.device.type == "cuda"
    # products of a GPU may be in TF32: ten bits
    torch.testing.assert_close(found.cpu(), truth, rtol=1e-2, atol=1e-2 * float(truth.abs().max()))
