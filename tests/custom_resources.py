"""Custom resources checked as an API server does it: unknown fields, defaults, types, and the CEL rules of a CRD.

KubeRay's schemas lie in ``tests/data``; a typo in a RayJob is otherwise found by the cluster alone.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import celpy
import jsonschema

Schema = dict[str, Any]
_DATA = Path(__file__).parent / "data" / "kuberay-1.7.0"
_KUBERNETES_OWN = {"apiVersion", "kind", "metadata"}  # checked by the server itself, whatever the CRD says


def crd_faults(thing: dict[str, Any]) -> list[str]:
    """What an API server would refuse, or prune, of a RayJob or RayCluster; one line each. Errors: KeyError for another kind."""
    schema = _schemas()[thing["apiVersion"], thing["kind"]]
    spec = {key: copy.deepcopy(value) for key, value in thing.items() if key not in _KUBERNETES_OWN}
    own = {**schema, "properties": {k: v for k, v in schema["properties"].items() if k not in _KUBERNETES_OWN}}
    unknown = _fill_and_find_unknown(own, spec, thing["kind"])
    own["required"] = [key for key in schema.get("required", []) if key not in _KUBERNETES_OWN]
    wrong = [
        f"{'.'.join([thing['kind'], *map(str, error.absolute_path)])}: {error.message[:150]}"
        for error in jsonschema.Draft202012Validator(_as_json_schema(own)).iter_errors(spec)
    ]
    # a rule is evaluated on what has the right types
    return unknown + wrong + ([] if wrong else _broken_rules(own, spec, thing["kind"]))


@functools.cache
def _schemas() -> dict[tuple[str, str], Schema]:
    found = {}
    for path in sorted(_DATA.glob("*.json.gz")):
        crd = json.loads(gzip.decompress(path.read_bytes()))
        found[f"{crd['group']}/{crd['version']}", crd["kind"]] = crd["schema"]
    return found


def _fill_and_find_unknown(schema: Schema, value: Any, path: str) -> list[str]:
    """Defaults are written into ``value``, as the server does before it validates; fields of no schema are named."""
    faults = []
    if isinstance(value, list):
        for number, item in enumerate(value):
            faults += _fill_and_find_unknown(schema.get("items", {}), item, f"{path}.{number}")
    if not isinstance(value, dict):
        return faults
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, inner in known.items():
        if "default" in inner and value.get(key) is None and not (key in value and inner.get("nullable")):
            value[key] = copy.deepcopy(inner["default"])
    anything_goes = schema.get("x-kubernetes-preserve-unknown-fields") or not (known or schema.get("type"))
    for key in list(value):
        if value[key] is None and not known.get(key, {}).get("nullable"):
            del value[key]  # an explicit null is a field left out
        elif key in known:
            faults += _fill_and_find_unknown(known[key], value[key], f"{path}.{key}")
        elif isinstance(others, dict):
            faults += _fill_and_find_unknown(others, value[key], f"{path}.{key}")
        elif not anything_goes and others is not True:
            faults.append(f"{path}.{key}: unknown field")
    return faults


def _as_json_schema(schema: Any) -> Any:
    """A structural schema in the words of JSON Schema: two of Kubernetes' own extensions change which types are right."""
    if isinstance(schema, list):
        return [_as_json_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    # "properties" holds names, which may look like words of a schema
    made = {
        key: {name: _as_json_schema(one) for name, one in value.items()}
        if key == "properties"
        else value
        if key in ("default", "enum", "required")
        else _as_json_schema(value)
        for key, value in schema.items()
    }
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if made.pop("nullable", False) and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _broken_rules(schema: Schema, value: Any, path: str) -> list[str]:
    faults = []
    for rule in schema.get("x-kubernetes-validations", []):
        if re.search(r"\boldSelf\b", rule["rule"]):
            continue  # about a change; there is none yet
        if not _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)}):
            faults.append(f"{path}: {rule.get('message', rule['rule'])}")
    if isinstance(value, dict):
        for key, inner in value.items():
            own = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(own, dict):
                faults += _broken_rules(own, inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            faults += _broken_rules(schema.get("items", {}), item, f"{path}.{number}")
    return faults


@functools.cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))
