"""An exported map gives what ours gives, in programs that know nothing of us."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from launch.cli import main
from lce_dist.compat.artefact import map_rows, read_bridge, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import ModelFile, freeze_net, open_model
from lce_dist.models.preprocess import OUR_INPUT
from lce_dist.models.weights import save_weights

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
SIZE, DIM, OLD = 32, 12, 8


def stored(folder: Path, kind: str, dim_out: int = OLD, direction: str = "new_to_old", **about: str) -> Path:
    bridge = build_bridge(kind, DIM, dim_out, seed=3)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    for tensor in bridge.state_dict().values():  # no part of it silent
        if tensor.is_floating_point() and kind != "orthogonal":
            tensor.copy_(torch.rand(tensor.shape, generator=draw) * 0.4 + 0.1)
    save_bridge(
        folder, bridge.eval(), {"kind": kind, "dim_in": DIM, "dim_out": dim_out, "direction": direction, **about}
    )
    return folder


def some(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def answer(file: Path, rows: torch.Tensor) -> torch.Tensor:
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
        return torch.from_numpy(found)
    return torch.jit.load(str(file))(rows)


@pytest.mark.parametrize(
    ("kind", "dim_out"), [("linear", 8), ("mlp", 8), ("orthogonal", 8), ("stacked", 8), ("paper", 12)]
)
def test_a_map_alone(tmp_path: Path, kind: str, dim_out: int) -> None:
    bridge = stored(tmp_path / "bridge", kind, dim_out)
    rows = 3.0 * some(7, DIM)
    truth = map_rows(read_bridge(bridge), rows)
    for name in ("onnx", "torchscript"):
        out = tmp_path / (f"map.{'onnx' if name == 'onnx' else 'pt'}")
        assert main(["bridge", "export", str(bridge), "--format", name, "--out", str(out)]) == 0
        for count in (1, 7):
            torch.testing.assert_close(answer(out, rows[:count]), truth[:count], atol=1e-5, rtol=1e-4)
    plain = tmp_path / "map.safetensors"
    assert main(["bridge", "export", str(bridge), "--format", "safetensors", "--out", str(plain)]) == 0
    if kind in ("linear", "orthogonal"):
        turned = F.normalize(rows).numpy() @ load_file(plain)["matrix"].T
        np.testing.assert_allclose(turned / np.linalg.norm(turned, axis=1, keepdims=True), truth.numpy(), atol=1e-5)


def test_the_new_model_with_its_map_is_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = build_net("tiny8", DIM, SIZE, seed=4).eval()
    card = {"net": "tiny8", "embedding_dim": str(DIM), "image_size": str(SIZE)}
    save_weights(net, tmp_path / "new" / "model.safetensors", card)
    space = freeze_net(net, "tiny8", DIM, OUR_INPUT).fingerprint
    bridge = stored(tmp_path / "bridge", "mlp", from_space=space)
    images = some(5, 3, SIZE, SIZE)
    with torch.no_grad():
        truth = map_rows(read_bridge(bridge), net(images))
    words = ["bridge", "export", str(bridge), "--with", str(tmp_path / "new"), "--format"]
    for name, file in (("onnx", "query.onnx"), ("torchscript", "query.pt")):
        out = tmp_path / file
        assert main([*words, name, "--out", str(out)]) == 0
        for count in (1, 5):
            torch.testing.assert_close(answer(out, images[:count]), truth[:count], atol=1e-4, rtol=1e-3)
        # and our own door takes it for a model
        torch.testing.assert_close(
            open_model(ModelFile(out), SIZE, torch.device("cpu"))(images), truth, atol=1e-4, rtol=1e-3
        )
    capsys.readouterr()
    other = stored(tmp_path / "other", "mlp", from_space="0" * 16)
    forth = stored(tmp_path / "forth", "mlp", direction="old_to_new")
    for command, told in (
        ([*words, "onnx", "--out", str(tmp_path / "query.onnx")], "is not overwritten"),
        ([*words, "safetensors", "--out", str(tmp_path / "x")], "holds no program"),
        (["bridge", "export", str(other), *words[3:], "onnx", "--out", str(tmp_path / "x")], "the map begins at"),
        (["bridge", "export", str(forth), *words[3:], "onnx", "--out", str(tmp_path / "x")], "goes old_to_new"),
        ([*words[:4], str(tmp_path), "--format", "onnx", "--out", str(tmp_path / "x")], "name RUN_DIR/NAME/new"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1
