"""The command ``lce``: train, plan; data and classifiers. Our own errors are one line; exit codes are for scripts."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.bridge_cli import add_bridge_commands
from launch.ckpt_cli import add_ckpt_commands
from launch.data_cli import add_data_commands
from launch.doctor_cli import add_doctor_command
from launch.embed_cli import add_embed_command
from launch.evaluate_cli import add_evaluate_commands
from launch.gate_cli import add_gate_command
from launch.generations_cli import add_generations_command
from launch.head_cli import add_head_commands
from launch.kubernetes import OVERLAYS
from launch.kubernetes_cli import add_kubernetes_commands, submit_to_kubernetes
from launch.methods_cli import add_methods_command
from launch.runs_cli import add_run_commands, node_range
from launch.sync_cli import add_sync_command
from lce_dist.config import Config, load_config, parse_config
from lce_dist.errors import ConfigError, Interrupted, LceError

if TYPE_CHECKING:  # heavy imports wait until a command needs them
    from launch.train import TrainOptions

_CHECKOUT = Path(__file__).resolve().parents[1]
_EXIT_CODES = "exit codes: 0 done, 1 failed run, 2 config or data, 3 findings, 4 machine or cluster, 5 interrupted (the same command goes on)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _place_for_matplotlib()
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except LceError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return Interrupted.exit_code
    return 0


def _place_for_matplotlib() -> None:
    """It says two lines, in each process, where it cannot keep its settings at home: a folder for this command then."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    if "MPLCONFIGDIR" not in os.environ:
        try:
            (home / "matplotlib").mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = tempfile.mkdtemp(prefix="lce-matplotlib-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ["MPLCONFIGDIR"] = folder


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lce", description=__doc__, epilog=_EXIT_CODES, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train old, new and report whether the upgrade is safe",
        description="Train a backward-compatible model: old model, its space, new model, evaluation.",
        epilog="examples:\n"
        "  launch/train.sh --nodes 4\n"
        "  launch/train.sh --nodes 4 --config configs/omniglot.toml --with-independent\n"
        "  launch/train.sh --nodes 2 --config mine.toml --set optim.lr=0.05 --name slower\n"
        "  launch/train.sh --nodes 4 --config mine.toml --check\n"
        "  launch/train.sh --nodes 2:4 --config mine.toml\n"
        "  RAY_ADDRESS=http://HEAD:8265 launch/train.sh --nodes 4\n"
        "  launch/train.sh --nodes 4 --target k8s --image IMAGE --dry-run\n"
        "  launch/train.sh --nodes 2:4 --target k8s --image IMAGE --follow\n\n" + _EXIT_CODES,
        formatter_class=raw,
    )
    _add_run_flags(train)
    train.add_argument(
        "--target",
        choices=("auto", "local", "ray", "k8s"),
        default="auto",
        help="where: this machine, the cluster of RAY_ADDRESS, Kubernetes (default: ray if RAY_ADDRESS is set, else local)",
    )
    train.add_argument("--image", help="k8s: container image (default: lce-dist:0.1.0)")
    train.add_argument("--storage", help="k8s: name of the claim with the folders runs and data (default: lce-storage)")
    train.add_argument("--namespace", help="k8s: namespace (default: lce-dist)")
    train.add_argument("--overlay", choices=OVERLAYS, help="k8s: kustomize overlay (default: gpu)")
    train.add_argument(
        "--queue", metavar="NAME", help="k8s: wait in this LocalQueue until all pods fit (overlay kueue)"
    )
    train.add_argument("--dry-run", action="store_true", help="k8s: print the manifests instead of applying them")
    train.add_argument(
        "--wait", action="store_true", help="k8s: return when the job has ended, with its exit code (elsewhere always)"
    )
    train.add_argument("--follow", action="store_true", help="k8s: show its log and progress, too (elsewhere always)")
    train.set_defaults(run=_train)

    job = commands.add_parser("job", help="the same run, started inside a Ray cluster (what a submitted job executes)")
    _add_run_flags(job)
    job.add_argument(
        "--config-json-env", metavar="NAME", help="read the resolved config from this environment variable"
    )
    job.set_defaults(run=_job)

    plan = commands.add_parser(
        "plan",
        help="what a run needs before it is started: memory, time, and what would not fit",
        description="Bytes per rank by part, bytes on the wire, operations, the time of a step and of an epoch, the "
        "bottleneck,\nand which setting would make fit what does not. Nothing is trained; times are calculated.",
        epilog="examples:\n"
        "  lce plan configs/quickstart.toml --gpu cpu --calibrate\n"
        "  lce plan mine.toml --classes 2059906 --images 42474557 --ranks-per-node 8 --gpu h200\n"
        "  lce plan mine.toml --classes 10000000 --images 206000000 --nodes 8 --ranks-per-node 8 --gpu a100 --json\n"
        "  lce plan mine.toml --classes 1000000 29000000 --images 20600000 598000000 --ranks-per-node 8   (a table)\n\n"
        + _EXIT_CODES
        + "\n4: a plan does not fit the machine",
        formatter_class=raw,
    )
    plan.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable"
    )
    plan.add_argument(
        "--classes", type=int, nargs="+", default=[], metavar="N", help="identities of the new training set"
    )
    plan.add_argument(
        "--images", type=int, nargs="+", default=[], metavar="N", help="images (default: both from the config's data)"
    )
    plan.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    plan.add_argument("--ranks-per-node", type=int, default=1, help="GPUs, or workers, on each node (default: 1)")
    plan.add_argument("--gpu", default="h200", metavar="KIND", help="h200, h100, a100, l4 or cpu (default: h200)")
    plan.add_argument("--calibrate", action="store_true", help="cpu: measure this machine's rates first (seconds)")
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes, FLOP and seconds")
    plan.set_defaults(run=_plan)

    add_head_commands(commands)
    add_bridge_commands(commands)
    add_embed_command(commands)
    add_evaluate_commands(commands)
    add_gate_command(commands)
    add_generations_command(commands)
    add_sync_command(commands)
    add_methods_command(commands)
    add_run_commands(commands)
    add_kubernetes_commands(commands)
    add_ckpt_commands(commands)

    add_data_commands(commands)
    add_doctor_command(commands)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=_CHECKOUT / "configs" / "quickstart.toml", help="TOML file (default: quickstart)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable"
    )
    parser.add_argument(
        "--nodes",
        type=node_range,
        default=(None, 1),
        metavar="N or MIN:MAX",
        help="Ray nodes; MIN:MAX goes on with fewer when some are lost, and grows again (default: 1)",
    )
    parser.add_argument("--workers-per-node", type=int, default=1, help="workers, or GPUs, on each node (default: 1)")
    parser.add_argument("--name", help="run name; results are in RUN_DIR/NAME (default: the config's run.name)")
    parser.add_argument("--run-dir", help="where runs are kept (default: the config's run.dir, ./runs)")
    parser.add_argument(
        "--with-independent", action="store_true", help="also train the new model without compatibility, as a control"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="look at config, data, models, storage, MLflow and memory, and train nothing; k8s: at what is seen from here",
    )
    parser.add_argument(
        "--gpu",
        metavar="KIND",
        help="h200, h100, a100 or l4, for the check of memory, where the cluster does not say it",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what this run has done so far")


def _config(arguments: argparse.Namespace) -> Config:
    overrides = list(arguments.set)
    if arguments.name is not None:
        overrides.append(f"run.name={_toml_string(arguments.name)}")
    if arguments.run_dir is not None:
        overrides.append(f"run.dir={_toml_string(arguments.run_dir)}")
    return load_config(arguments.config, overrides)


def _toml_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _train(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    target = arguments.target
    if target == "auto":
        target = "ray" if os.environ.get("RAY_ADDRESS") else "local"
    if target != "k8s":
        for flag in ("image", "storage", "namespace", "overlay", "queue", "dry_run"):
            if getattr(arguments, flag):
                raise ConfigError(
                    f"--{flag.replace('_', '-')} belongs to --target k8s; the target is {target}. Remove it"
                )
    if target == "k8s":
        submit_to_kubernetes(arguments, config)
    elif target == "ray":
        from launch.submit import submit_to_ray

        submit_to_ray(arguments.config, config, _options(arguments, on_cluster=True))
    else:
        _run_here(arguments, config, on_cluster=False)


def _job(arguments: argparse.Namespace) -> None:
    name = arguments.config_json_env
    config = _config(arguments) if name is None else parse_config(json.loads(os.environ[name]), name, json_mode=True)
    _run_here(arguments, config, on_cluster=True)


def _run_here(arguments: argparse.Namespace, config: Config, on_cluster: bool) -> None:
    from rich.console import Console

    from launch.train import train

    train(config, _options(arguments, on_cluster), Console())


def _options(arguments: argparse.Namespace, on_cluster: bool) -> TrainOptions:
    from launch.train import TrainOptions

    least, most = arguments.nodes
    return TrainOptions(
        most,
        arguments.workers_per_node,
        arguments.with_independent,
        arguments.fresh,
        on_cluster,
        least,
        arguments.check,
        arguments.gpu,
    )


def _plan(arguments: argparse.Namespace) -> None:
    from launch.plan import GPU_KINDS, Asked, plan_text

    if arguments.gpu not in GPU_KINDS:
        raise ConfigError(f"--gpu is {arguments.gpu!r}; must be one of {', '.join(GPU_KINDS)}")
    asked = Asked(
        arguments.classes,
        arguments.images,
        arguments.nodes,
        arguments.ranks_per_node,
        arguments.gpu,
        arguments.calibrate,
        arguments.json,
    )
    text, refusal = plan_text(load_config(arguments.config, arguments.set), asked)
    print(text)
    if refusal is not None:
        raise refusal


def command() -> NoReturn:
    """``main`` as a process of its own, which ends with its code whatever native threads are at.

    A driver that was asked to stop leaves Ray's threads at work; taking the interpreter down beneath them ended, now and then, in
    SIGSEGV after the last word was said: -11 where scripts look for 5.
    """
    code = main()
    if "ray" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
