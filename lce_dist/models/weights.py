"""Weights in files: safetensors out, safetensors or a plain torch state dict in, and never any code.

Every file is checked against the network in full before the first number is copied into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lce_dist.errors import CheckpointError, RunError

# the second is arcface_torch's, beside its head and optimizer
_WRAPPERS = ("state_dict", "state_dict_backbone", "model_state_dict", "model")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_COUNTER = ".num_batches_tracked"  # read by momentum=None alone; files from before torch 0.4.1 and converters lack it


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill ``net`` from safetensors or a torch state dict, told apart by content; exactly its tensors, no more, no less.

    A wrapper (``state_dict``, ``model_state_dict``, ``model``), arcface_torch's ``checkpoint_gpu_0.pt`` around its backbone, and a
    "module." in front of every name (DistributedDataParallel) are removed; counters of batches, which no forward reads, may lack.
    Errors: CheckpointError for a file that is absent, damaged, holds code, or does not fit; ``net`` is as before.
    """
    if not path.is_file():
        raise CheckpointError(f"weights {path} is not a file; name a file of safetensors or a torch state dict")
    with path.open("rb") as file:
        head = file.read(9)
    if is_safetensors(head):
        tensors = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):  # a zip, or the pickle of torch before 1.6: read without running any of it
        tensors = _read_torch(path)
    else:
        raise CheckpointError(
            f"weights {path} is damaged, or neither safetensors nor a torch state dict; copy it again or convert it"
        )
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    counters = {name: tensor for name, tensor in net.state_dict().items() if name.endswith(_COUNTER)}
    tensors = counters | tensors
    _check_fit(net, tensors, path)
    net.load_state_dict(tensors)


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins, in its first 9 bytes, as safetensors: the length of a header, and its brace.

    To be asked before any other kind: the length's bytes may be those that a pickle or a zip begins with.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER


def save_weights(net: nn.Module, path: Path, card: dict[str, str]) -> None:
    """Write all tensors of ``net``, floats as float32, with ``card`` as the file's metadata; whole or not at all.

    Errors: RunError where the file system refuses. **Memory**: one float32 copy of the network.
    """
    tensors = {}
    for name, tensor in net.state_dict().items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # clone: trained parameters may be views of one flat ZeRO buffer, which safetensors may refuse
        tensors[name] = tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=card)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"weights {path} cannot be written: {error}; free space or choose another run.dir") from None


def fingerprint(net: nn.Module) -> str:
    """16 hex digits over names, shapes, dtypes and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights {path} is damaged or not safetensors ({error}); copy it again") from None


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:  # of a path torch.load would look at the ending
            value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise CheckpointError(f"weights {path} is damaged or not a torch file; copy it again") from None
        raise CheckpointError(
            f"weights {path} holds code ({code[1]}) beside its tensors; refused, because loading it would run it. "
            "Save the state dict alone: torch.save(net.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or "it ends too early"
        raise CheckpointError(f"weights {path} is damaged or not a torch file ({reason}); copy it again") from None
    for wrapper in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
            break
    if not isinstance(value, dict):
        raise CheckpointError(f"weights {path} holds a {type(value).__name__}; must be a state dict (name -> tensor)")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"weights {path}: {name!r} is a {type(tensor).__name__}; must be a tensor. "
                'Save net.state_dict() alone, or under "state_dict"'
            )
    return dict(value)


def _check_fit(net: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Name the first tensor that is missing, unexpected or mis-shaped."""
    wanted = net.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or unexpected:
        parts = [
            f"{kind} {names[0]!r}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            for kind, names in (("lacks", missing), ("has an unexpected", unexpected))
            if names
        ]
        raise CheckpointError(
            f"weights {path} {' and '.join(parts)}; must hold exactly the {len(wanted)} tensors of this net. "
            "Set net to the network that the file was saved from"
        )
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"weights {path}: {name!r} has shape {tuple(tensors[name].shape)}; this net needs "
                f"{tuple(tensor.shape)}. Set net, embedding_dim and image_size to those that the file was saved from"
            )
