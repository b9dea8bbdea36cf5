"""A map as a file for servers without this package: alone, or behind the new model, as ONNX, TorchScript or plain tensors."""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import nn

from lce_dist.compat.artefact import read_bridge, read_card
from lce_dist.compat.bridges import Bridge
from lce_dist.errors import CheckpointError, ConfigError, RunError, SetupError
from lce_dist.models.old_model import ModelFile, freeze_net, open_model
from lce_dist.models.preprocess import InputSpec, prepare_images

FORMATS = ("onnx", "torchscript", "safetensors")
_OPSET = 17


class MapOfRows(nn.Module):
    """(n, D) rows of any length -> (n, E) unit rows, as ``map_rows``."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.bridge(F.normalize(vectors)))


class MapOfImages(nn.Module):
    """(n, 3, S, S) RGB in [-1, 1] -> (n, E) unit rows: the new model, then its map into the old space."""

    def __init__(self, network: nn.Module, seen: InputSpec, bridge: Bridge) -> None:
        super().__init__()
        self.network, self.map = network, MapOfRows(bridge)
        self._seen = seen

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        prepared = prepare_images(images, self._seen)
        vectors: torch.Tensor = self.network(prepared)
        if self._seen.flip_average:
            vectors = F.normalize(vectors) + F.normalize(self.network(prepared.flip(3)))
        mapped: torch.Tensor = self.map(vectors)
        return mapped


def export_bridge(directory: Path, model: Path | None, kind: str, out: Path) -> str:
    """Write the map in ``directory`` (behind the new model in ``model``) to ``out``; what it takes and gives, in words.

    safetensors holds the numbers of a map alone: ``matrix`` (E, D) where it is linear, else a state dict. The file appears
    whole or not at all. Errors: ConfigError for what does not go together, CheckpointError, SetupError without onnx, RunError.
    """
    bridge, card = _plain(read_bridge(directory)), read_card(directory)
    if kind == "safetensors":
        if model is not None:
            raise ConfigError(
                "--with is given and --format is safetensors, which holds no program; use onnx or torchscript"
            )
        weight = bridge.matrix.weight if bridge.residual is None else None
        tensors = {"matrix": weight.detach()} if isinstance(weight, torch.Tensor) else dict(bridge.state_dict())
        about = {key: str(card[key]) for key in ("kind", "direction", "dim_in", "dim_out")}
        _write(out, tensor_bytes({name: one.contiguous() for name, one in tensors.items()}, about))
        return f"{', '.join(tensors)} of unit rows of {bridge.dim_in} values to {bridge.dim_out}"
    deployed: nn.Module
    if model is None:
        deployed, example, names = MapOfRows(bridge), torch.ones(2, bridge.dim_in), ("vectors", "mapped")
        told = f"vectors (n, {bridge.dim_in}) to unit vectors (n, {bridge.dim_out})"
    else:
        if card["direction"] != "new_to_old":
            raise ConfigError(
                f"map {directory} goes {card['direction']}; --with puts the new model in front of a map from new to old (backward)"
            )
        deployed, size = _behind_model(model, bridge, card)
        example, names = torch.zeros(2, 3, size, size), ("images", "mapped")
        told = f"images (n, 3, {size}, {size}), RGB from -1 to 1, to unit vectors (n, {bridge.dim_out})"
    deployed = deployed.eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters are deprecated in favour of others that need more packages
        _write(out, _onnx(deployed, example, names) if kind == "onnx" else _torchscript(deployed, example))
    return told


def _plain(bridge: Bridge) -> Bridge:
    """The same map; an orthogonal one as the matrix that it is."""
    if bridge.kind != "orthogonal":
        return bridge
    plain = Bridge("linear", bridge.dim_in, bridge.dim_out).eval().requires_grad_(False)
    weight = bridge.matrix.weight
    assert isinstance(weight, torch.Tensor)
    plain.start_from(weight.detach())
    return plain


def _behind_model(directory: Path, bridge: Bridge, card: dict[str, Any]) -> tuple[MapOfImages, int]:
    """The new model that a run left in ``directory``, checked to be the one that the map begins at, and its image size."""
    path = directory / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        net, dim, size = about["net"], int(about["embedding_dim"]), int(about["image_size"])
        seen = InputSpec()
        if "input" in about:
            values = json.loads(about["input"])
            seen = InputSpec(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"--with {directory}: {path.name} is not there or does not say what it is ({error}); name RUN_DIR/NAME/new"
        ) from None
    model = open_model(ModelFile(path, net, dim, seen), size, torch.device("cpu"))
    space = freeze_net(model.network, net, dim, seen).fingerprint
    if dim != bridge.dim_in or card.get("from_space", space) != space:
        raise ConfigError(
            f"--with {directory} has vectors of {dim} values and space {space!r}; the map begins at {bridge.dim_in} values and "
            f"{card.get('from_space')!r}. Name the new model of the map's own run"
        )
    return MapOfImages(model.network, seen, bridge), size


def _onnx(deployed: nn.Module, example: torch.Tensor, names: tuple[str, str]) -> bytes:
    try:
        import onnx  # noqa: F401 - the exporter imports it
    except ImportError:
        raise SetupError("--format is onnx, and the package onnx is not installed; pip install onnx") from None
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(
            deployed,
            (example,),
            f"{folder}/model.onnx",
            dynamo=False,
            opset_version=_OPSET,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_axes={name: {0: "n"} for name in names},
        )
        return Path(folder, "model.onnx").read_bytes()


def _torchscript(deployed: nn.Module, example: torch.Tensor) -> bytes:
    written = io.BytesIO()
    torch.jit.save(torch.jit.trace(deployed, example), written)
    return written.getvalue()


def _write(out: Path, content: bytes) -> None:
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{out} cannot be written: {error}. Free space or choose another place") from None
