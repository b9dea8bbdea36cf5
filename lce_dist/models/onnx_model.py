"""ONNX files through onnxruntime, which knows no Python; the files that a model names are checked before it opens them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lce_dist.errors import CheckpointError, SetupError

_LOG = logging.getLogger(__name__)

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}

# Where tensors can hide: field numbers of messages inside messages (onnx.proto3, IR versions to 13).
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_DEEPEST = 64


class OnnxModel(nn.Module):
    """A network that onnxruntime runs, on ``device`` where this build of it can.

    input_shape: of its one image tensor, None where the exporter left a size open. input_dtype: what it wants.
    """

    def __init__(self, session: Any, input_dtype: torch.dtype) -> None:
        super().__init__()
        self._session = session
        (image,) = session.get_inputs()
        self._name = image.name
        self.input_shape = tuple(size if isinstance(size, int) else None for size in image.shape)
        self.input_dtype = input_dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.to("cpu", self.input_dtype).contiguous().numpy()
        (result,) = self._session.run(None, {self._name: values})
        return torch.from_numpy(result).to(images.device)


def looks_like_onnx(content: bytes) -> bool:
    """Whether ``content`` parses as a protobuf message with an IR version and a graph."""
    try:
        fields = {field for field, _ in _fields(memoryview(content))}
    except ValueError:
        return False
    return {1, 7} <= fields


def onnx_digest(path: Path, content: bytes) -> str:
    """64 hex digits over the file and the files of weights that it names."""
    digest = hashlib.sha256(content)
    for name in _external_files(path, content):
        with (path.parent / name).open("rb") as file:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_onnx(path: Path, content: bytes, device: torch.device) -> OnnxModel:
    """The network in ``content``, the bytes of ``path``.

    Errors: SetupError without onnxruntime; CheckpointError for a file that is damaged, names weights outside its own
    folder, or whose input is not one float tensor of images.
    """
    try:
        import onnxruntime
    except ImportError:
        raise SetupError(f"model {path} is ONNX, and onnxruntime is not installed; pip install onnxruntime") from None
    external = _external_files(path, content)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors come back as exceptions
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        # bytes have no folder, so that without external weights no other file can be reached
        session = onnxruntime.InferenceSession(str(path) if external else content, options, providers=providers)
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no other base
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"model {path} is ONNX that onnxruntime refuses ({reason})") from None
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        _LOG.warning("model %s runs on the CPU: this onnxruntime has no CUDA; pip install onnxruntime-gpu", path)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise CheckpointError(
            f"model {path} takes {len(inputs)} tensors and gives {len(outputs)}; must take one image tensor "
            "(b, 3, S, S) and give one tensor (b, D). Cut the graph with onnx.utils.extract_model"
        )
    if inputs[0].type not in _DTYPES:
        raise CheckpointError(
            f"model {path} takes {inputs[0].type}; must take floats ({', '.join(_DTYPES)}), because the "
            "preprocessing gives floats. Put a Cast in front of the graph"
        )
    return OnnxModel(session, _DTYPES[inputs[0].type])


def _external_files(path: Path, content: bytes) -> list[str]:
    """Names of the files of weights beside ``path``, sorted. Errors: CheckpointError for any other place."""
    try:
        names = sorted({bytes(name).decode() for name in _locations(memoryview(content), "model", 0)})
    except ValueError as error:
        raise CheckpointError(f"model {path} is damaged ONNX ({error}); copy it again") from None
    for name in names:
        if name in ("", ".", "..") or set("/\\\0*") & set(name):
            raise CheckpointError(
                f"model {path} wants weights from {name[:80]!r}; must be the name of a file in its own folder. "
                "Save it again with onnx.save_model(..., location='weights.bin')"
            )
        weights = path.parent / name
        if weights.is_symlink() or not weights.is_file():
            raise CheckpointError(
                f"model {path} wants weights from {name!r}, which is not a plain file beside it; copy it there"
            )
    return names


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[memoryview]:
    """Every ``location`` of external data in a message, however deep."""
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} messages inside each other")
    if kind == "entry":
        values = dict(_fields(message))
        key, value = values.get(1), values.get(2)
        if key is not None and bytes(key) == b"location":
            yield value if value is not None else memoryview(b"")
        return
    inside = _INSIDE[kind]
    for field, content in _fields(message):
        if field in inside and content is not None:
            yield from _locations(content, inside[field], depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """(field number, content) of a protobuf message; content is None for plain numbers. Errors: ValueError."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        field, wire = key >> 3, key & 7
        content = None
        if wire == 0:
            _, place = _varint(message, place)
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        elif wire == 2:
            length, place = _varint(message, place)
            content = message[place : place + length]
            place += length
        else:
            raise ValueError(f"wire type {wire} is not known")
        if place > len(message) or field == 0:
            raise ValueError("it ends too early")
        yield field, content


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        if place >= len(message) or shift > 63:
            raise ValueError("it ends too early")
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
