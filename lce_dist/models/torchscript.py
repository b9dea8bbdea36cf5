"""TorchScript files: the text of their code is searched for what reaches outside before any of it is loaded.

A TorchScript file is a program. Its interpreter knows no Python, so no pickle of it runs; but it has operators
that write and map files, and code of the file may run while it is loaded (``__setstate__``). Whoever wants to use
one must name it in the text, as a word of its own; a file in which such a word stands anywhere is refused.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lce_dist.errors import CheckpointError

# aten::save writes a file, aten::from_file maps one (and makes it), rpc talks to other machines.
# Classes of C++ can be made by name alone; operators of other libraries do as their authors like.
_REACHING_OUT = re.compile(
    rb"\b(?:save|from_file|rpc_\w+|PythonOp|IgnoredPythonOp|classes)\b"
    rb"|\bops\b(?!\.(?:aten|prim|prims|quantized)\.)\S{0,40}"
)
_PLAIN_TYPES = re.compile(r"__torch__\.|torch\.|collections\.OrderedDict$")


def load_torchscript(path: Path, content: bytes, device: torch.device) -> nn.Module:
    """The network in ``content``, the bytes of ``path``, in eval mode on ``device``.

    Errors: CheckpointError for a file that is damaged, or that names an operator which reaches outside.
    """
    try:
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(content))  # the reader that torch.jit.load uses
        names = reader.get_all_records()
        if len({name.lower() for name in names}) != len(names):
            raise CheckpointError(f"model {path} holds two records of one name; refused. Export it again")
        for name in names:
            if name.endswith(".py"):
                _check_code(path, reader.get_record(name))
            elif name.endswith(".pkl"):
                _check_pickle(path, reader.get_record(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; people's files are as they are
            network: nn.Module = torch.jit.load(io.BytesIO(content), map_location=device)
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"model {path} is damaged TorchScript ({reason}); copy it again") from None
    return network.eval()


def _check_code(path: Path, code: bytes) -> None:
    found = _REACHING_OUT.search(code)
    if found is not None:
        raise CheckpointError(
            f"model {path} is TorchScript that names {found[0].decode(errors='replace')!r}; refused, because "
            "such operators can reach files and other machines. Export it as ONNX or save its state dict"
        )


def _check_pickle(path: Path, content: bytes) -> None:
    strings: list[str] = []
    for opcode, value, _ in pickletools.genops(content):  # reads, and runs nothing
        name = None
        if opcode.name == "GLOBAL":
            name = str(value).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            name = ".".join(strings[-2:])
        elif isinstance(value, str):
            strings.append(value)
        if name is not None and (not _PLAIN_TYPES.match(name) or "classes" in name.split(".")):
            raise CheckpointError(
                f"model {path} is TorchScript that holds code ({name}) beside its tensors; refused, because "
                "loading it could run it. Export it again, or save its state dict"
            )
