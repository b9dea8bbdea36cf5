"""torch.export files read as data: the graph is a list of aten calls, and we make the calls ourselves.

``torch.export.load`` is not used: it unpickles without restriction (weights, constants and example inputs that
a first, restricted try refuses), evaluates symbolic sizes as Python text, and loads compiled libraries. Nothing
of that is needed to run a network: its weights lie in the file as plain bytes, its graph as JSON.

**Source**: the format, schema version 8, as torch 2.13 writes it (torch/_export/serde/schema.py).
"""

from __future__ import annotations

import io
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lce_dist.errors import CheckpointError

SCHEMA_MAJOR = 8

_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_STRIDED = 7
_TARGET = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_REACHING_OUT = {"from_file", "save"}  # aten's operators that touch files
# Names with an underscore are aten's inside, much of it unchecked; these are what exporters write for networks.
_INSIDE = {
    "_adaptive_avg_pool2d",
    "_assert_tensor_metadata",
    "_log_softmax",
    "_native_batch_norm_legit_no_training",
    "_softmax",
    "_to_copy",
    "_unsafe_view",
}
_TRAINING = {"train", "training"}  # what dropout and batch norm call their switch
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "_operator.add": operator.add,
    "_operator.sub": operator.sub,
    "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv,
    "_operator.getitem": operator.getitem,
}


class ExportedProgram(nn.Module):
    """A network that runs its exported graph, one aten call after the other.

    input_shape: of its one image tensor, None where the exporter left a size open. input_dtype: what it wants.
    """

    def __init__(self, graph: dict[str, Any], names: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = names  # of the graph's lifted inputs: the tensor that each stands for
        self._buffer_names = {name: f"tensor_{number}" for number, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            self.register_buffer(self._buffer_names[name], tensor)
        (self._image,) = (value["as_tensor"]["name"] for value in graph["inputs"] if _name_of(value) not in names)
        self._result = graph["outputs"][0]["as_tensor"]["name"]
        self._calls = [_call(node) for node in graph["nodes"] if "_assert" not in node["target"]]
        self._dead = _last_uses(self._calls, keep={self._result, *names})
        meta = graph["tensor_values"][self._image]
        self.input_shape = tuple(size.get("as_int") for size in meta["sizes"])
        self.input_dtype = _DTYPES[meta["dtype"]]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values: dict[str, Any] = {
            name: self.get_buffer(self._buffer_names[tensor]) for name, tensor in self._names.items()
        }
        values[self._image] = images.to(self.input_dtype)
        for (function, inputs, outputs), dead in zip(self._calls, self._dead, strict=True):
            positional, keyword = [], {}
            for name, kind, value in inputs:
                argument = _value(value, values, images.device)
                if kind == "positional":
                    positional.append(argument)
                else:
                    keyword[name] = argument
            _keep(function(*positional, **keyword), outputs, values)
            for name in dead:  # a deep network's maps would not fit together
                values.pop(name, None)
        result: torch.Tensor = values[self._result]
        return result


def load_exported_program(path: Path, content: bytes, device: torch.device) -> ExportedProgram:
    """The network in ``content``, the bytes of ``path``, on ``device``.

    Errors: CheckpointError for a file that is damaged, of another schema, in training mode, or that holds more than
    tensors and aten calls (pickles, custom objects, compiled libraries, operators of other libraries).
    """
    try:
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(content))
        records = set(reader.get_all_records())
        program = json.loads(reader.get_record("models/model.json"))
        major = program["schema_version"]["major"]
        if major != SCHEMA_MAJOR:
            raise CheckpointError(
                f"model {path} has export schema {major}; this release reads {SCHEMA_MAJOR} (torch 2.8 and later). "
                "Export it again with torch.export.save"
            )
        foreign = sorted(name for name in records if name.startswith("data/aotinductor/"))
        if foreign:
            raise CheckpointError(f"model {path} holds compiled code ({foreign[0]}); refused. Export without it")
        tensors: dict[str, torch.Tensor] = {}
        for folder, config in (("weights", "model_weights_config"), ("constants", "model_constants_config")):
            entries = json.loads(reader.get_record(f"data/{folder}/{config}.json"))["config"]
            tensors |= {name: _tensor(path, reader, folder, name, entry) for name, entry in entries.items()}
        graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
        _check_mode(path, graph, signature)
        _check_targets(path, graph)
        names = _lifted(path, signature, tensors)
        return ExportedProgram(graph, names, tensors).to(device)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"model {path} is a damaged torch.export file ({reason}); copy it again") from None


def _tensor(path: Path, reader: Any, folder: str, name: str, entry: dict[str, Any]) -> torch.Tensor:
    record = entry["path_name"]
    if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", record):
        raise CheckpointError(
            f"model {path} stores {name!r} as a pickle or an object, not as plain numbers; refused, because "
            "torch.export.load would run what it holds. Export a plain network, or save its state dict"
        )
    meta = entry["tensor_meta"]
    if meta["layout"] != _STRIDED:
        raise CheckpointError(f"model {path}: {name!r} is not a dense tensor; export a dense network")
    sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
    content = reader.get_record(f"data/{folder}/{record}")
    if not content:
        return torch.zeros(sizes, dtype=_DTYPES[meta["dtype"]])
    flat = torch.frombuffer(bytearray(content), dtype=_DTYPES[meta["dtype"]])
    return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])


def _operator(target: str) -> Callable[..., Any] | None:
    """The function behind a name in the graph; None for all but arithmetic and aten operators that compute."""
    name = _TARGET.fullmatch(target)
    if name is None:
        return _ARITHMETIC.get(target)
    if name[1] in _REACHING_OUT or (name[1].startswith("_") and name[1] not in _INSIDE):
        return None
    packet = getattr(torch.ops.aten, name[1], None)
    # other attributes of either are Python's own
    if not isinstance(packet, torch._ops.OpOverloadPacket) or name[2] not in packet.overloads():
        return None
    function: Callable[..., Any] = getattr(packet, name[2])
    return function


def _check_targets(path: Path, graph: dict[str, Any]) -> None:
    for node in graph["nodes"]:
        if _operator(node["target"]) is None:
            raise CheckpointError(
                f"model {path} calls {node['target'][:80]!r}; only aten operators that compute are run. "
                "Export the plain network in eval mode, or use ONNX"
            )


def _check_mode(path: Path, graph: dict[str, Any], signature: dict[str, Any]) -> None:
    mutated = any(kind.endswith("_mutation") for spec in signature["output_specs"] for kind in spec)
    switched_on = any(
        item["name"] in _TRAINING and item["arg"] == {"as_bool": True}
        for node in graph["nodes"]
        for item in node["inputs"]
    )
    if mutated or switched_on:
        raise CheckpointError(f"model {path} was exported in training mode; call eval() and export it again")


def _lifted(path: Path, signature: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Graph inputs that are weights, buffers and constants: the tensor that each stands for."""
    outputs = [kind for spec in signature["output_specs"] for kind in spec]
    names, images = {}, 0
    for spec in signature["input_specs"]:
        ((kind, value),) = spec.items()
        if kind == "user_input" and "as_tensor" in value["arg"]:
            images += 1
        elif kind in ("parameter", "buffer", "tensor_constant"):
            names[value["arg"]["name"]] = value[f"{kind}_name"]
        else:
            raise CheckpointError(f"model {path} takes an input of kind {kind!r}; must take one image tensor")
    if images != 1 or outputs != ["user_output"]:
        raise CheckpointError(
            f"model {path} takes {images} tensors and gives {len(outputs)}; must take one image tensor "
            "(b, 3, S, S) and give one tensor (b, D)"
        )
    absent = next((name for name in names.values() if name not in tensors), None)
    if absent is not None:
        raise CheckpointError(f"model {path} lacks the tensor {absent!r} that its graph names; export it again")
    return names


_Call = tuple[Callable[..., Any], list[tuple[str, str, dict[str, Any]]], list[dict[str, Any]]]


def _call(node: dict[str, Any]) -> _Call:
    function = _operator(node["target"])
    assert function is not None  # _check_targets came before
    plain = node["target"] in _ARITHMETIC  # whose parameters have no names
    inputs = [
        (item["name"], "keyword" if item.get("kind") == 2 and not plain else "positional", item["arg"])
        for item in node["inputs"]
    ]
    return function, inputs, node["outputs"]


def _value(argument: dict[str, Any], values: dict[str, Any], device: torch.device) -> Any:
    ((kind, content),) = argument.items()
    if kind == "as_none":
        return None
    if kind in ("as_int", "as_ints", "as_bool", "as_bools", "as_string"):
        return content
    if kind == "as_float":
        return float(content)  # infinities are text in JSON
    if kind == "as_floats":
        return [float(item) for item in content]
    if kind == "as_tensor":
        return values[content["name"]]
    if kind == "as_tensors":
        return [values[item["name"]] for item in content]
    if kind in ("as_optional_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        return _named_or_plain(content, values)
    if kind in ("as_optional_tensors", "as_sym_ints"):
        return [_named_or_plain(item, values) for item in content]
    if kind == "as_scalar_type":
        return _DTYPES[content]
    if kind == "as_memory_format":
        return _MEMORY_FORMATS[content]
    if kind == "as_device":
        return device  # where the images are, not where the exporter was
    if kind == "as_layout" and content == _STRIDED:
        return torch.strided
    raise ValueError(f"an argument of kind {kind} is not known")


def _named_or_plain(item: dict[str, Any], values: dict[str, Any]) -> Any:
    ((kind, content),) = item.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return values[content["name"]]
    return values[content] if kind == "as_name" else content


def _name_of(output: dict[str, Any]) -> str:
    ((kind, content),) = output.items()
    if kind == "as_tensor":
        name: str = content["name"]
        return name
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        name = content["as_name"]
        return name
    raise ValueError(f"a result of kind {kind} is not known")


def _keep(result: Any, outputs: list[dict[str, Any]], values: dict[str, Any]) -> None:
    if len(outputs) == 1 and "as_tensors" in outputs[0]:
        names = [item["name"] for item in outputs[0]["as_tensors"]]
    else:
        names = [_name_of(output) for output in outputs if "as_none" not in output]
        if len(outputs) == 1:
            result = (result,)
    if names:
        values.update(zip(names, result, strict=False))


def _last_uses(calls: list[_Call], keep: set[str]) -> list[list[str]]:
    """Of each call, the values that nothing reads later."""
    seen = set(keep)
    dead: list[list[str]] = []
    for _, inputs, _ in reversed(calls):
        names = {name for _, _, value in inputs for name in _mentioned(value)} - seen
        seen |= names
        dead.append(sorted(names))
    return dead[::-1]


def _mentioned(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [
            name
            for key, item in value.items()
            for name in ([item] if key in ("name", "as_name") and isinstance(item, str) else _mentioned(item))
        ]
    return [name for item in value for name in _mentioned(item)] if isinstance(value, list) else []
