"""One door for frozen models, old ones and new ones: any file that people have them in becomes one module over our images.

Files are told apart by content, never by name. None of them can run Python code: tensors are read without
unpickling objects, exported programs as data, and TorchScript and ONNX have interpreters of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.errors import CheckpointError, ConfigError
from lce_dist.models.catalog import build_net, net_name
from lce_dist.models.exported_program import ExportedProgram, load_exported_program
from lce_dist.models.onnx_model import OnnxModel, load_onnx, looks_like_onnx, onnx_digest
from lce_dist.models.preprocess import OUR_INPUT, InputSpec, prepare_images
from lce_dist.models.torchscript import load_torchscript
from lce_dist.models.weights import fingerprint, is_safetensors, load_weights

Kind = Literal["tensors", "torchscript", "exported", "onnx"]

# Vectors of one image alone and among others may differ by rounding, in 16 bits by more; no more than this.
_SAME_COS = 0.999


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """Where a model lies. ``net`` and ``embedding_dim`` build the network for a file that holds tensors only."""

    path: Path
    net: str | None = None
    embedding_dim: int | None = None
    input: InputSpec = OUR_INPUT


class FrozenModel(nn.Module):
    """(b, 3, S, S) float32 RGB in [-1, 1] -> (b, embedding_dim) float32, not normalised; eval mode, no gradient.

    With ``input.flip_average`` the mean of two unit vectors, image and mirror. fingerprint: 16 hex digits over
    weights and preprocessing.
    """

    def __init__(self, network: nn.Module, embedding_dim: int, digest: str, input_spec: InputSpec) -> None:
        super().__init__()
        self.network = network.eval()
        for parameter in self.network.parameters():  # ScriptModules have no requires_grad_ of their own
            parameter.requires_grad = False
        self.embedding_dim = embedding_dim
        self.input = input_spec
        self._digest = digest
        text = json.dumps([digest, dataclasses.asdict(input_spec)], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[0] == 0:
            return images.new_zeros((0, self.embedding_dim), dtype=torch.float32)
        prepared = prepare_images(images, self.input)
        vectors: torch.Tensor = self.network(prepared).float()
        if self.input.flip_average:
            mirrored = self.network(prepared.flip(3)).float()
            vectors = (F.normalize(vectors) + F.normalize(mirrored)) / 2
        return vectors

    def train(self, mode: bool = True) -> FrozenModel:
        """Does nothing: a frozen model stays in eval mode."""
        return self

    def with_input(self, input_spec: InputSpec) -> FrozenModel:
        """The same network behind another preprocessing."""
        return FrozenModel(self.network, self.embedding_dim, self._digest, input_spec)


def freeze_net(net: nn.Module, name: str, embedding_dim: int, input_spec: InputSpec) -> FrozenModel:
    """One of our own networks, frozen; its fingerprint is that of its file read by :func:`open_model`."""
    return FrozenModel(net, embedding_dim, f"{net_name(name)} {fingerprint(net)}", input_spec)


def open_model(file: ModelFile, image_size: int, device: torch.device) -> FrozenModel:
    """The model in ``file`` on ``device``, for our images of ``image_size`` pixels a side.

    It is run on two images, so what cannot work fails here. **Memory**: the file, once, while it is read.
    Errors: CheckpointError for a file that is absent, damaged, holds code, or does not give (b, D); ConfigError for
    settings that do not fit the file; SetupError for ONNX without onnxruntime.
    """
    path, size = file.path, file.input.size or image_size
    if file.input.size == image_size:  # said or not, it is the same model
        file = dataclasses.replace(file, input=dataclasses.replace(file.input, size=None))
    kind = model_kind(path)
    if kind == "tensors":
        return _open_tensors(file, size, device)
    if file.net is not None:
        raise ConfigError(f"net is {file.net!r}, and {path} brings its own network. Remove net")
    content = path.read_bytes()
    network: nn.Module
    if kind == "onnx":
        network = load_onnx(path, content, device)
        digest = onnx_digest(path, content)
    else:
        load = load_torchscript if kind == "torchscript" else load_exported_program
        network = load(path, content, device)
        digest = hashlib.sha256(content).hexdigest()
    del content
    if isinstance(network, ExportedProgram | OnnxModel):
        network = _as_declared(path, network, size)
    network, found_dim = _try_out(path, network, size, device)
    if file.embedding_dim not in (None, found_dim):
        raise ConfigError(f"embedding_dim is {file.embedding_dim}; {path} gives {found_dim}. Set it to {found_dim}")
    return FrozenModel(network, found_dim, digest, file.input)


def model_kind(path: Path) -> Kind:
    """What ``path`` holds, by its content. Errors: CheckpointError for what none of the readers reads."""
    if not path.is_file():
        raise CheckpointError(f"model {path} is not a file; name a .safetensors, .pt, .pth, .pt2 or .onnx file")
    with path.open("rb") as file:
        head = file.read(16)
    if is_safetensors(head):
        return "tensors"
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head[:1] == b"\x80":  # a pickle as torch before 1.6 saved
        return "tensors"
    if looks_like_onnx(path.read_bytes()):
        return "onnx"
    raise CheckpointError(
        f"model {path} is damaged or of no known kind; must be safetensors, a torch state dict, TorchScript, "
        "torch.export or ONNX. Copy it again or export it as ONNX"
    )


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        raise CheckpointError(f"model {path} is damaged: a zip without its end; copy it again") from None
    if "models/model.json" in names:
        return "exported"
    if "serialized_exported_program.json" in names:
        raise CheckpointError(
            f"model {path} was exported by torch before 2.8, whose format can hold code; refused. "
            "Export it again with torch.export.save"
        )
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "torchscript"
    if "data.pkl" in names:
        return "tensors"
    raise CheckpointError(
        f"model {path} is a zip of no known kind; must be a torch state dict, TorchScript or torch.export. "
        "Name the file itself, not an archive that holds it"
    )


def _open_tensors(file: ModelFile, size: int, device: torch.device) -> FrozenModel:
    if file.net is None or file.embedding_dim is None:
        raise ConfigError(
            f"{file.path} holds tensors without a network; set net and embedding_dim to those that it was trained with"
        )
    net = build_net(file.net, file.embedding_dim, size, seed=0)
    load_weights(net, file.path)
    model = freeze_net(net.to(device), file.net, file.embedding_dim, file.input)
    _run(file.path, model.network, -torch.ones(1, 3, size, size, device=device))
    return model


class _InPieces(nn.Module):
    """A network that takes ``rows`` images at a time, no more and no less; the last piece is filled up."""

    def __init__(self, network: nn.Module, rows: int) -> None:
        super().__init__()
        self.network = network
        self.rows = rows

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pieces = []
        for piece in images.split(self.rows):
            filling = piece[-1:].expand(self.rows - len(piece), -1, -1, -1)
            pieces.append(self.network(torch.cat((piece, filling)))[: len(piece)])
        return torch.cat(pieces)


def _as_declared(path: Path, network: ExportedProgram | OnnxModel, size: int) -> nn.Module:
    """Hold the declared shape of the input against our images; a fixed batch is met in pieces."""
    shape = network.input_shape
    fits = len(shape) == 4 and shape[1] in (3, None)
    if not fits or not network.input_dtype.is_floating_point:
        shown = " x ".join("any" if side is None else str(side) for side in shape)
        raise CheckpointError(
            f"model {path} takes {shown} of {network.input_dtype}; must take floats (b, 3, S, S). "
            "Export it with channels first"
        )
    if any(side not in (size, None) for side in shape[2:]):
        raise ConfigError(
            f"model {path} takes images of {shape[2]} x {shape[3]} pixels; they would come with {size} x {size}. "
            f"Set input.size to {shape[2]}"
        )
    return network if shape[0] is None else _InPieces(network, shape[0])


def _try_out(path: Path, network: nn.Module, size: int, device: torch.device) -> tuple[nn.Module, int]:
    """The network, one image at a time where it must be, and D."""
    black = -torch.ones(1, 3, size, size, device=device)
    alone = _run(path, network, black)
    if not torch.allclose(alone, _run(path, network, black), rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise CheckpointError(
            f"model {path} gives one image two different vectors: it was exported in training mode. "
            "Call eval() and export it again"
        )
    grey = torch.linspace(-1.0, 1.0, size, device=device).expand(1, 3, size, size)
    try:
        both = _run(path, network, torch.cat((black, grey)), rows=2)
        # images that change each other's vectors: a batch of one folded into the graph, or statistics of the batch
        joined = bool((F.cosine_similarity(both[:1], alone) < _SAME_COS).any())
    except CheckpointError:
        joined = True
    if joined:
        network = _InPieces(network, 1)
        _run(path, network, torch.cat((black, grey)), rows=2)
    return network, alone.shape[1]


@torch.no_grad()
def _run(path: Path, network: nn.Module, images: torch.Tensor, rows: int = 1) -> torch.Tensor:
    shown = " x ".join(str(side) for side in images.shape)
    vectors = _answer(path, network, images, shown)
    if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2 or vectors.shape[0] != rows or vectors.shape[1] == 0:
        found = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
        raise CheckpointError(
            f"model {path} gives {found} for images {shown}; must be one tensor ({rows}, D). "
            "Export the part of it that ends in the embedding"
        )
    if not vectors.is_floating_point() or not vectors.isfinite().all():
        raise CheckpointError(
            f"model {path} gives {vectors.dtype} with values that are not finite or no floats for a black image; "
            "check input.mean and input.std, or export it again"
        )
    return vectors.float()


def _answer(path: Path, network: Callable[[torch.Tensor], object], images: torch.Tensor, shown: str) -> object:
    try:
        return network(images)
    except Exception as error:  # noqa: BLE001 - a foreign program on its first image: any failure is its own
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else type(error).__name__
        raise CheckpointError(
            f"model {path} fails on images {shown} ({reason}); must take (b, 3, S, S). "
            "Set input.size to the size that it was trained with"
        ) from None
