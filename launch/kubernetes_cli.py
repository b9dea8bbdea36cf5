"""``lce train --target k8s`` and ``lce k8s setup``: what was typed becomes options, and what happened becomes a line."""

from __future__ import annotations

import argparse

from launch.kubernetes import OVERLAYS, KubernetesOptions, overlay_has_gpus, render, submit
from launch.rayjobs import ENDED, wait_for_job
from lce_dist.config import Config
from lce_dist.errors import ConfigError

_IMAGE, _NAMESPACE, _CLAIM = "lce-dist:0.1.0", "lce-dist", "lce-storage"


def add_kubernetes_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``k8s setup`` to the commands of ``lce``."""
    raw = argparse.RawDescriptionHelpFormatter
    group = commands.add_parser("k8s", help="what runs on Kubernetes stand on (for the owner of the cluster)")
    kinds = group.add_subparsers(required=True, metavar="COMMAND")
    setup = kinds.add_parser(
        "setup",
        help="make or renew a namespace for runs: accounts, network policies, claims, quota, MLflow, the submitters' role",
        description="Once a namespace, by its owner; lce train --target k8s then makes nothing but the run itself.",
        epilog="examples:\n  lce k8s setup --image IMAGE:0.1.0\n  lce k8s setup --overlay team --image IMAGE:0.1.0 --dry-run",
        formatter_class=raw,
    )
    setup.add_argument("--overlay", choices=OVERLAYS, default="gpu", help="as for lce train (default: gpu)")
    setup.add_argument("--namespace", default=_NAMESPACE, help=f"default: {_NAMESPACE}")
    setup.add_argument("--image", default=_IMAGE, help=f"of MLflow's pod (default: {_IMAGE})")
    setup.add_argument(
        "--storage",
        metavar="SIZE or CLAIM",
        help=f"size of the claim {_CLAIM} (default: 200Gi), or a claim that is there already, for lce train --storage",
    )
    setup.add_argument("--buckets", action="store_true", help="let runs reach HTTPS outside, for shards at a URL")
    setup.add_argument("--monitoring", action="store_true", help="add a PodMonitor (needs the Prometheus operator)")
    setup.add_argument("--dry-run", action="store_true", help="print the objects instead of applying them")
    setup.set_defaults(run=_setup)


def _setup(arguments: argparse.Namespace) -> None:
    from launch.kubernetes_platform import PlatformOptions, render_platform, set_up

    options = PlatformOptions(
        arguments.overlay,
        arguments.namespace,
        arguments.image,
        arguments.storage,
        arguments.buckets,
        arguments.monitoring,
    )
    if arguments.dry_run:
        print(render_platform(options), end="")
        return
    set_up(options)
    print(f"namespace {options.namespace} is set up; who may submit there:")
    print(f"  kubectl --namespace {options.namespace} create rolebinding NAME --role lce-submitter --user NAME")


def kubernetes_options(arguments: argparse.Namespace, config: Config) -> KubernetesOptions:
    """What was typed after ``lce train --target k8s``. Errors: ConfigError."""
    if arguments.fresh:
        raise ConfigError(
            "--fresh is for runs here; every retry of a Kubernetes job would start over. Use another --name"
        )
    if arguments.run_dir is not None:
        raise ConfigError("--run-dir is for runs here; a Kubernetes job writes to /runs of its claim. Use --storage")
    overlay = arguments.overlay or ("gpu" if arguments.queue is None else "kueue")
    return KubernetesOptions(
        nodes=arguments.nodes[1],
        min_nodes=arguments.nodes[0],
        workers_per_node=arguments.workers_per_node,
        gpus_per_node=arguments.workers_per_node if overlay_has_gpus(overlay) else 0,
        image=arguments.image or _IMAGE,
        config_path=arguments.config,
        storage=arguments.storage or _CLAIM,
        namespace=arguments.namespace or _NAMESPACE,
        overlay=overlay,
        queue=arguments.queue,
        name=config.run.name,
        overrides=tuple(arguments.set),
        with_independent=arguments.with_independent,
        gpu=arguments.gpu,
    )


def submit_to_kubernetes(arguments: argparse.Namespace, config: Config) -> None:
    """Show, check or submit the run, and follow it where that was asked for. Errors: those of ``submit``."""
    options = kubernetes_options(arguments, config)
    if arguments.dry_run:
        print(render(options), end="")
        return
    if arguments.check:
        from launch.kubernetes_check import look

        for line in look(options, config):
            print(line)
        return
    submitted = submit(options)
    job, run = f"{options.namespace}/{submitted.name}", config.run.name
    if arguments.follow or arguments.wait:
        wait_for_job(submitted.name, options.namespace, arguments.follow)
        return
    there = f"--target k8s --namespace {options.namespace}"
    if submitted.state is None:
        print(f"RayJob {job} is on its way; follow it with:\n  lce logs {run} {there} --follow")
    elif submitted.state in ENDED:
        print(
            f"RayJob {job} ended before ({submitted.state}); nothing was started. What it said, and how to do it again:"
        )
        print(f"  lce logs {run} {there}\n  lce resume {run} {there}")
    elif submitted.stopped:
        print(f"RayJob {job} was stopped; nothing was started. To go on:\n  lce resume {run} {there}")
    else:
        print(f"RayJob {job} is there already ({submitted.state}); follow it with:\n  lce logs {run} {there} --follow")
