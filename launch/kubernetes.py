"""A run on Kubernetes: options become one kustomization on top of ``k8s/``, and kubectl builds and applies it.

The RayJob's name is a hash of all that would be applied, so submitting the same run again finds the job that is already there, and
a run that differs in anything never passes for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.kubectl import build, copy_manifests, get_object, kubectl, last_line
from launch.rayjobs import FAILED, is_queued, jobs_of
from lce_dist.config import PLACES, Config, load_config
from lce_dist.errors import ConfigError, RunError, SetupError

PLATFORM = "lce-platform"  # the ConfigMap that says what a namespace has
IMAGE, CLAIM = "lce-dist", "lce-storage"
_RUN_DIR, _DATA_DIR = "/runs", "/data"
_NAME_LENGTH = 47  # KubeRay's limit for a RayJob, which leaves room for the suffixes of what it makes
_UNNAMED = "lce-train"
_STOP_S = 10  # for a driver to end, after its checkpoint
_END_S = 35  # for a pod's Ray to end, after its checkpoint


@dataclass(frozen=True)
class _Share:
    """What one worker process gets; ``shm_gib`` is part of ``memory_gib``. The same numbers stand in the overlay."""

    directory: str
    cpus: int
    memory_gib: int
    shm_gib: int
    has_gpus: bool
    platform: str = "base"
    reaches_buckets: bool = False


_OVERLAYS: Mapping[str, _Share] = MappingProxyType(
    {
        "base": _Share("base", 4, 16, 4, has_gpus=False),
        "gpu": _Share("overlays/gpu", 8, 64, 16, has_gpus=True),
        "gpu-elastic": _Share("overlays/gpu-elastic", 8, 64, 16, has_gpus=True),
        "kind-cpu": _Share("overlays/kind-cpu", 1, 4, 1, has_gpus=False, platform="kind-cpu"),
        "kueue": _Share("overlays/kueue", 8, 64, 16, has_gpus=True),
        "team": _Share("overlays/team", 8, 64, 16, has_gpus=True, platform="team", reaches_buckets=True),
    }
)
OVERLAYS = tuple(_OVERLAYS)
_QUEUE_PATH = "/metadata/labels/kueue.x-k8s.io~1queue-name"


def overlay_has_gpus(overlay: str) -> bool:
    """Whether the worker pods of an overlay have GPUs."""
    return _OVERLAYS[overlay].has_gpus


def platform_of(overlay: str) -> str:
    """On which platform of ``k8s/platform`` an overlay's runs stand."""
    return _OVERLAYS[overlay].platform


@dataclass(frozen=True)
class KubernetesOptions:
    """What a submission adds to a config. Checked here: ConfigError names the option, its value and the rule.

    ``storage`` is the name of a claim. ``name`` is the run's name. min_nodes: the run starts on ``nodes`` and goes on with
    as few as these while pods are replaced. queue: the LocalQueue of overlay ``kueue``. gpu: its kind, for the check of memory.
    """

    nodes: int
    workers_per_node: int
    gpus_per_node: int
    image: str
    config_path: Path
    storage: str
    namespace: str
    name: str
    overlay: str = "gpu"
    overrides: tuple[str, ...] = ()
    with_independent: bool = False
    min_nodes: int | None = None
    queue: str | None = None
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.overlay not in _OVERLAYS:
            raise ConfigError(f"overlay is {self.overlay!r}; must be one of {', '.join(sorted(_OVERLAYS))}")
        for option in ("nodes", "workers_per_node"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{option} is {getattr(self, option)}; must be at least 1")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ConfigError(f"nodes is {self.nodes_text}; the first must be at least 1 and at most the second")
        if not overlay_has_gpus(self.overlay) and self.gpus_per_node != 0:
            raise ConfigError(
                f"gpus_per_node is {self.gpus_per_node}; overlay {self.overlay!r} has none. Use 0, or overlay 'gpu'"
            )
        if overlay_has_gpus(self.overlay) and self.gpus_per_node < self.workers_per_node:
            raise ConfigError(
                f"gpus_per_node is {self.gpus_per_node}; a node's {self.workers_per_node} workers need one each. "
                f"Use {self.workers_per_node}, or overlay 'base'"
            )
        if self.queue is not None and self.overlay != "kueue":
            raise ConfigError(f"queue is {self.queue!r}; overlay {self.overlay!r} waits in none. Use overlay 'kueue'")
        if self.queue is not None and not _is_object_name(self.queue):
            raise ConfigError(f"queue is {self.queue!r}; must be the name of a LocalQueue in the namespace")
        split_image(self.image)
        if is_size(self.storage):
            raise ConfigError(
                f"storage is {self.storage!r}, a size; the platform makes the claim {CLAIM}, and sizes it: lce k8s setup "
                f"--storage {self.storage}. Name a claim, or leave it out"
            )
        check_claim(self.storage)
        check_namespace(self.namespace)
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", self.name):
            raise ConfigError(f"name is {self.name!r}; must be lower-case letters, digits, '.', '_' or '-', at most 63")

    @property
    def nodes_text(self) -> str:
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}:{self.nodes}"


def job_name(options: KubernetesOptions) -> str:
    """The RayJob's name: the run's name, then ten hex digits over all that would be applied.

    Errors: those of ``render``.
    """
    return _rendered(options, _checked_config(options))[0]


def render(options: KubernetesOptions) -> str:
    """The run's ConfigMap and RayJob as YAML.

    Errors: ConfigError (config), SetupError (kubectl missing, or it cannot build the manifests).
    """
    return _rendered(options, _checked_config(options))[1]


@dataclass(frozen=True)
class Submitted:
    """The RayJob of a run, and the operator's word for its state when it was there already (None: it was made).

    stopped: by ``lce stop``; a queue holds a job suspended while it waits, too.
    """

    name: str
    state: str | None
    stopped: bool = False


def submit(options: KubernetesOptions) -> Submitted:
    """Create the run on the cluster of kubectl's current context, or find it when it is there already.

    Errors: those of ``render``; RunError when the same run failed before, or is at work with other settings; SetupError
    when the namespace has no platform, and for what the cluster answers.
    """
    config = _checked_config(options)
    name, manifests = _rendered(options, config)
    _check_platform(options, config)
    job = get_object("rayjobs.ray.io", name, options.namespace)
    if job is not None:
        status = job.get("status", {})
        state = status.get("jobDeploymentStatus") or "Waiting"
        if state in FAILED:
            # KubeRay never starts a finished RayJob again, so applying it once more would look like success.
            raise RunError(
                f"RayJob {options.namespace}/{name} is {state}: {last_line(status.get('message', '')) or 'no message'}. "
                f"To go on from its last checkpoint: lce resume {options.name} --target k8s --namespace {options.namespace}"
            )
        return Submitted(name, state, state == "Suspended" and not is_queued(job))
    others = [other for other in jobs_of(options.name, options.namespace) if other.at_work]
    if others:
        raise RunError(
            f"run {options.name} is at work as RayJob {options.namespace}/{others[-1].name} ({others[-1].state}), with another "
            f"config, image, size or storage. Use another --name, or first: lce stop {options.name} --target k8s --namespace "
            f"{options.namespace}"
        )
    kubectl(["apply", "--filename", "-"], manifests)
    return Submitted(name, None)


def _check_platform(options: KubernetesOptions, config: Config) -> None:
    """Whether the namespace has what a run stands on. Errors: SetupError with what its owner has to type."""
    setup = f"lce k8s setup --namespace {options.namespace} --overlay {options.overlay}"
    about = get_object("configmap", PLATFORM, options.namespace)
    if about is None:
        raise SetupError(
            f"namespace {options.namespace} is not set up (it has no ConfigMap {PLATFORM}). Ask the cluster's owner for: {setup}"
        )
    outside = [(key, value) for key, value in places(config) if "://" in value]
    if outside and about.get("data", {}).get("buckets") != "open":
        key, value = outside[0]
        raise SetupError(
            f"{key} is {value!r}; the platform of namespace {options.namespace} lets no pod reach a bucket. Ask the cluster's "
            f"owner for: {setup} --buckets"
        )


def _checked_config(options: KubernetesOptions) -> Config:
    config = load_config(options.config_path, list(options.overrides))
    if config.cluster.device not in ("auto", "gpu" if overlay_has_gpus(options.overlay) else "cpu"):
        raise ConfigError(
            f"cluster.device is {config.cluster.device!r}; overlay {options.overlay!r} does not fit it. Use 'auto'"
        )
    for key, value in places(config):
        if "://" not in value and not value.startswith((f"{_DATA_DIR}/", f"{_RUN_DIR}/")):
            raise ConfigError(
                f"{key} is {value!r}; pods see the folders {_DATA_DIR} and {_RUN_DIR} of the storage claim "
                f"alone. Copy it into the claim's folder data and name it {_DATA_DIR}/..."
            )
    return config


def places(config: Config) -> list[tuple[str, str]]:
    """Each file, folder or address that the config names, with the setting that names it."""
    values, found = config.model_dump(mode="json"), []
    for section, key in PLACES:
        named = values[section][key]
        found += [(f"{section}.{key}", value) for value in (named if isinstance(named, list) else [named]) if value]
    return found


def _rendered(options: KubernetesOptions, config: Config) -> tuple[str, str]:
    """The RayJob's name, and all objects."""
    with tempfile.TemporaryDirectory(prefix="lce-k8s-") as directory:
        root = Path(directory)
        copy_manifests(root / "k8s")
        (root / "config.toml").write_bytes(options.config_path.read_bytes())

        def built(name: str) -> str:
            # JSON is YAML, so nothing here depends on how a text is quoted.
            text = json.dumps(_kustomization(options, config, name), indent=1)
            (root / "kustomization.yaml").write_text(text, encoding="utf-8")
            return build(root)

        name = _job_name(options.name, built(_UNNAMED))
        return name, built(name)


def _job_name(run: str, content: str) -> str:
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    stem = re.sub(r"[^a-z0-9]+", "-", run)
    stem = stem if stem[0].isalpha() else f"run-{stem.lstrip('-')}"
    return f"{stem[: _NAME_LENGTH - len(digest) - 1].rstrip('-')}-{digest}"


def _kustomization(options: KubernetesOptions, config: Config, name: str) -> dict[str, Any]:
    share = _OVERLAYS[options.overlay]
    needs_bucket = not share.reaches_buckets and any("://" in value for _, value in places(config))
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": options.namespace,
        "resources": [f"k8s/{share.directory}"],
        "components": ["k8s/components/bucket"] if needs_bucket else [],
        "images": [image_change(options.image)],
        "configMapGenerator": [{"name": "lce-config", "behavior": "replace", "files": ["config.toml"]}],
        "patches": [
            {
                "target": {"kind": "RayJob"},
                "patch": json.dumps(_job_patch(options, config, name)),
                "options": {"allowNameChange": True},
            }
        ],
    }


def _job_patch(options: KubernetesOptions, config: Config, name: str) -> list[dict[str, Any]]:
    share, workers = _OVERLAYS[options.overlay], options.workers_per_node
    grace_s = config.checkpoint.grace_s
    head = "/spec/rayClusterSpec/headGroupSpec/template/spec"
    group = "/spec/rayClusterSpec/workerGroupSpecs/0"
    pod = f"{group}/template/spec"
    entrypoint = (
        f"python -m launch.cli job --config /etc/lce/config.toml --nodes {options.nodes_text} "
        f"--workers-per-node {workers} --name {options.name} --run-dir {_RUN_DIR}"
    )
    asked = [word for override in options.overrides for word in ("--set", override)]
    asked += ["--with-independent"] if options.with_independent else []
    asked += ["--gpu", options.gpu] if options.gpu is not None else []
    entrypoint = " ".join([entrypoint, *map(shlex.quote, asked)])
    amounts = {"cpu": str(share.cpus * workers), "memory": f"{share.memory_gib * workers}Gi"}
    if options.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(options.gpus_per_node)
    patch: list[dict[str, Any]] = [
        {"op": "replace", "path": "/metadata/name", "value": name},
        {"op": "replace", "path": "/spec/entrypoint", "value": entrypoint},
        {"op": "replace", "path": f"{group}/replicas", "value": options.nodes},
        {"op": "replace", "path": f"{group}/minReplicas", "value": options.min_nodes or options.nodes},
        {"op": "replace", "path": f"{group}/maxReplicas", "value": options.nodes},
        {"op": "test", "path": f"{pod}/containers/0/name", "value": "ray-worker"},
        {"op": "replace", "path": f"{pod}/containers/0/resources", "value": {"requests": amounts, "limits": amounts}},
        {"op": "test", "path": f"{pod}/volumes/1/name", "value": "shm"},
        {"op": "replace", "path": f"{pod}/volumes/1/emptyDir/sizeLimit", "value": f"{share.shm_gib * workers}Gi"},
    ]
    if options.queue is not None:
        patch.append({"op": "replace", "path": _QUEUE_PATH, "value": options.queue})
    stop = f"{head}/containers/0/env/3"
    patch.append({"op": "test", "path": f"{stop}/name", "value": "RAY_JOB_STOP_WAIT_TIME_S"})
    patch.append({"op": "replace", "path": f"{stop}/value", "value": str(grace_s + _STOP_S)})
    leave = ["python", "-m", "launch.leaving", f"{_RUN_DIR}/{options.name}", str(grace_s)]
    for spec in (head, pod):
        patch += [
            {"op": "test", "path": f"{spec}/volumes/0/name", "value": "storage"},
            {
                "op": "replace",
                "path": f"{spec}/volumes/0/persistentVolumeClaim/claimName",
                "value": options.storage,
            },
            {"op": "replace", "path": f"{spec}/terminationGracePeriodSeconds", "value": grace_s + _END_S},
            {"op": "replace", "path": f"{spec}/containers/0/lifecycle/preStop/exec/command", "value": leave},
        ]
    return patch


def is_size(storage: str) -> bool:
    """Whether a text is a size: a claim's name has no capital letter, and a size has one in its unit."""
    return re.fullmatch(r"[1-9][0-9]*[MGT]i", storage) is not None


def check_claim(storage: str) -> None:
    """Whether a text can be a claim's name. Errors: ConfigError."""
    if not _is_object_name(storage):
        raise ConfigError(f"storage is {storage!r}; must be the name of a claim, or for lce k8s setup a size (200Gi)")


def check_namespace(namespace: str) -> None:
    """Whether runs may live there. Errors: ConfigError."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", namespace):
        raise ConfigError(f"namespace is {namespace!r}; must be lower-case letters, digits and '-', at most 63")
    if namespace == "default" or namespace.startswith("kube-"):
        raise ConfigError(
            f"namespace is {namespace!r}; the network policies close it to everything else. Use another one"
        )


def image_change(image: str) -> dict[str, str]:
    """Kustomize's words for the image of all pods. Errors: ConfigError."""
    repository, tag, digest = split_image(image)
    return {"name": IMAGE, "newName": repository, **({"digest": digest} if digest else {"newTag": tag})}


def _is_object_name(storage: str) -> bool:
    # A bare number is a legal name too, but whoever writes one means a size and forgot the unit.
    return re.fullmatch(r"(?=.{1,253}$)(?![0-9]+$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?", storage) is not None


def split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest of an image; ConfigError when neither tag nor digest fixes what runs."""
    match = re.fullmatch(r"([a-z0-9][\w.:/-]*?)(?::([\w][\w.-]{0,127}))?(?:@(sha256:[0-9a-f]{64}))?", image, re.ASCII)
    repository, tag, digest = match.groups(default="") if match else ("", "", "")
    if not repository or not (digest or tag) or (tag == "latest" and not digest):
        raise ConfigError(f"image is {image!r}; must be REPOSITORY:TAG (not latest) or REPOSITORY@sha256:DIGEST")
    return repository, tag, digest
