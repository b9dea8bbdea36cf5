"""What runs on Kubernetes stand on, made once a namespace by its owner: accounts, walls, claims, quota, MLflow, the submitters' role."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.kubectl import build, copy_manifests, get_object, kubectl
from launch.kubernetes import (
    CLAIM,
    OVERLAYS,
    PLATFORM,
    check_claim,
    check_namespace,
    image_change,
    is_size,
    platform_of,
)
from lce_dist.errors import ConfigError


@dataclass(frozen=True)
class PlatformOptions:
    """What the owner asks for. Checked here: ConfigError names the option, its value and the rule.

    storage: a size of the claim ``lce-storage`` (None: the platform's own), or the name of a claim that exists and is used in its place.
    buckets: Ray's pods may reach HTTPS outside. monitoring: a PodMonitor for the Prometheus operator.
    """

    overlay: str
    namespace: str
    image: str
    storage: str | None = None
    buckets: bool = False
    monitoring: bool = False

    def __post_init__(self) -> None:
        if self.overlay not in OVERLAYS:
            raise ConfigError(f"overlay is {self.overlay!r}; must be one of {', '.join(sorted(OVERLAYS))}")
        check_namespace(self.namespace)
        image_change(self.image)
        if self.storage is not None and not is_size(self.storage):
            check_claim(self.storage)


def render_platform(options: PlatformOptions) -> str:
    """All objects of the platform as YAML, the Namespace first. Errors: SetupError."""
    with tempfile.TemporaryDirectory(prefix="lce-k8s-") as directory:
        root = Path(directory)
        copy_manifests(root / "k8s")
        (root / "kustomization.yaml").write_text(json.dumps(_kustomization(options), indent=1), encoding="utf-8")
        return build(root)


def set_up(options: PlatformOptions) -> None:
    """Create or renew the platform on the cluster of kubectl's current context.

    Errors: ConfigError where that would put a shared MLflow back on SQLite, away from its runs; those of ``render_platform``.
    """
    manifests = render_platform(options)
    about = get_object("configmap", PLATFORM, options.namespace)
    if about is not None and about["data"].get("mlflow") == "postgresql" and platform_of(options.overlay) != "team":
        raise ConfigError(
            f"overlay is {options.overlay!r}; MLflow of namespace {options.namespace} is on PostgreSQL, and that overlay would put "
            f"it on an empty SQLite file. Use --overlay team, or first: kubectl --namespace {options.namespace} delete configmap "
            f"{PLATFORM}"
        )
    kubectl(["apply", "--filename", "-"], manifests)


def _kustomization(options: PlatformOptions) -> dict[str, Any]:
    platform = platform_of(options.overlay)
    components = ["k8s/components/bucket-network"] if options.buckets and platform != "team" else []
    components += ["k8s/monitoring"] if options.monitoring else []
    claim = {"kind": "PersistentVolumeClaim", "name": CLAIM}
    patches = []
    if options.storage is not None and is_size(options.storage):
        size = [{"op": "replace", "path": "/spec/resources/requests/storage", "value": options.storage}]
        patches.append({"target": claim, "patch": json.dumps(size)})
    elif options.storage is not None:
        removal = {"$patch": "delete", "apiVersion": "v1", "kind": claim["kind"], "metadata": {"name": claim["name"]}}
        patches.append({"target": claim, "patch": json.dumps(removal)})
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": options.namespace,
        "resources": [f"k8s/platform/{platform}"],
        "components": components,
        "images": [image_change(options.image)],
        "patches": patches,
    }
