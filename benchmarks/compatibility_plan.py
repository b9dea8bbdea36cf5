"""What the study compares: scenarios of change, contestants, sizes, and the tasks that follow from them.

Every scenario changes one thing between old and new. Changes of loss, network or dimension come with the data of
extended-class, as an upgrade has them, so that there is something to gain.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.compatibility_data import Share, Source
from benchmarks.compatibility_work import Task
from lce_dist.compat import methods
from lce_dist.compat.vector_weights import CONTRAST_WEIGHT
from lce_dist.config import Config, parse_config
from lce_dist.errors import ConfigError

FAR = 1e-2
VERSION = 1  # of what a result means; a new number makes all of them anew


@dataclass(frozen=True)
class Side:
    """What one of the two models is."""

    net: str
    dim: int
    loss: str
    share: Share


@dataclass(frozen=True)
class Scenario:
    name: str
    old: Side
    new: Side


ALL = Share("images")
_BASE = Side("tiny16", 128, "cosface", ALL)
_HALF_CLASSES = replace(_BASE, share=Share("identities", 0.0, 0.5))
SCENARIOS = (
    Scenario("extended-data", replace(_BASE, share=Share("images", 0.0, 0.5)), _BASE),
    Scenario("extended-class", _HALF_CLASSES, _BASE),
    # disjoint parts of one size would make models of one strength: nothing to gain
    Scenario(
        "open-data",
        replace(_BASE, share=Share("images", 0.0, 0.3)),
        replace(_BASE, share=Share("images", 0.3, 1.0)),
    ),
    Scenario(
        "open-class",
        replace(_BASE, share=Share("identities", 0.0, 0.3)),
        replace(_BASE, share=Share("identities", 0.3, 1.0)),
    ),
    Scenario("loss: softmax to cosface", replace(_HALF_CLASSES, loss="softmax"), _BASE),
    Scenario("network: small to large", replace(_HALF_CLASSES, net="tiny8"), _BASE),
    Scenario("network: large to small", _HALF_CLASSES, replace(_BASE, net="tiny8")),
    Scenario("dimension: 128 to 512", _HALF_CLASSES, replace(_BASE, dim=512)),
    Scenario("dimension: 512 to 128", replace(_HALF_CLASSES, dim=512), _BASE),
)


@dataclass(frozen=True)
class Contestant:
    """A way to compatibility; compat: what its run has in the section [compat] (None: no compatibility at all).

    tuned: its one weight is chosen before the study (compatibility_tuning.py). scenarios: where it takes part (None: in
    all).
    """

    name: str
    kind: Literal["none", "training", "mapping"]
    compat: tuple[tuple[str, Any], ...] = ()
    tuned: bool = False
    scenarios: tuple[str, ...] | None = None

    @property
    def weight_key(self) -> str:
        """The key of [compat] that holds its one weight."""
        return "method_weight" if "method" in dict(self.compat) else "align_weight"


# its mode is one that every scenario allows; nothing of it is used
INDEPENDENT = Contestant("independent", "none", (("mode", "training-backward"),))
LCE_DIRECT, LCE_BACKWARD, LCE_FORWARD = "LCE direct", "LCE backward", "LCE forward"
LCE_DEFAULT = "LCE direct, default weights"
_PAIR_SHARE = "pair_share"  # of the head's scale, in place of the key pair_weight
MAP_BACKWARD, MAP_FORWARD = "mapping backward, chosen T", "mapping forward, chosen T"
# presets, maps that lose to others, and what a term is worth: shown in some scenarios, so that the tuning is paid for
_FEW = ("extended-class", "open-class", "network: small to large")
_TRAINED = (
    Contestant(LCE_DIRECT, "training", (("mode", "training-direct"),), tuned=True),
    Contestant(LCE_BACKWARD, "training", (("mode", "training-backward"),), tuned=True),
    Contestant(LCE_FORWARD, "training", (("mode", "training-forward"),), tuned=True),
    Contestant(LCE_DEFAULT, "training", (("mode", "training-direct"),)),
    # by default one of the two, as the number of classes says
    *(
        Contestant(
            f"LCE {manner}, {words}",
            "training",
            (("mode", f"training-{manner}"), (_PAIR_SHARE, share)),
            scenarios=_FEW[:1],
        )
        for manner, pairs in (("direct", 1.0 / 8.0), ("backward", 1.0 / 4.0), ("forward", 1.0 / 8.0))
        for words, share in (("pair term", pairs), ("no pair term", 0.0))
    ),
    *(
        Contestant(
            f"LCE {manner}, {words}",
            "training",
            (("mode", f"training-{manner}"), ("preset", preset)),
            scenarios=_FEW if manner == "direct" else _FEW[:1],
        )
        for preset, words in (("paper", "paper"), ("reference-code", "reference"))
        for manner in (("direct", "backward", "forward") if preset == "paper" else ("direct",))
    ),
)


def contestants() -> tuple[Contestant, ...]:
    """LCE in each manner and preset, every other method of the table in its manners, and the maps alone."""
    rivals = []
    for name, method in methods.METHODS.items():
        if name == "lce":
            continue
        for manner in sorted(method.card.manners):
            title = name if manner == "direct" else f"{name} {manner}"
            compat = (("method", name), ("mode", f"training-{manner}"))
            rivals.append(Contestant(title, "training", compat, tuned=True))
    maps = [Contestant("mapping direct, procrustes", "mapping", (("mode", "mapping-direct"),))]
    for manner, chosen in (("backward", MAP_BACKWARD), ("forward", MAP_FORWARD)):
        for bridge in ("auto", "procrustes", "least_squares", "paper", *(("fct",) if manner == "forward" else ())):
            words = {"auto": chosen, "paper": f"mapping {manner}, the paper's T", "fct": "mapping forward, FCT"}
            title = words.get(bridge, f"mapping {manner}, {bridge}")
            settings: list[tuple[str, Any]] = [("bridge", bridge), ("mode", f"mapping-{manner}")]
            if bridge != "auto":  # nothing is chosen: fewer identities have to be held out in turn
                settings.append(("bridge_heldout", 0.5))
            few = _FEW if bridge in ("paper", "fct") else None
            maps.append(Contestant(title, "mapping", tuple(sorted(settings)), scenarios=few))
    return (INDEPENDENT, *_TRAINED, *rivals, *maps)


@dataclass(frozen=True)
class Budget:
    """How long models train on one data set, in batches of ``global_batch`` images, and under which scale."""

    old_steps: int
    new_steps: int
    global_batch: int
    lr: float
    scale: float


@dataclass(frozen=True)
class Study:
    """What runs; fingerprints: of the data sets. weights: of contestants that are tuned, by (source, contestant)."""

    sources: tuple[Source, ...]
    fingerprints: dict[str, str]
    budgets: dict[str, Budget]
    scenarios: tuple[Scenario, ...]
    contestants: tuple[Contestant, ...]
    seeds: tuple[int, ...]
    weights: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelJob:
    """Train ``side`` alone; role: "old" or "new"."""

    source: str
    config: Config
    side: Side
    role: Literal["old", "new"]
    seed: int
    steps: int


@dataclass(frozen=True)
class CellJob:
    """One contestant in one scenario; old, independent: keys of the models that it stands on."""

    source: str
    config: Config
    scenario: Scenario
    contestant: Contestant
    seed: int
    steps: int
    old: str
    independent: str


@dataclass(frozen=True)
class Cell:
    """A place in the tables: its task, or the reason why there is none; neither where its weight is not tuned yet."""

    source: str
    scenario: Scenario
    contestant: Contestant
    seed: int
    task: Task | None
    refused: str | None
    old: str
    independent: str


@dataclass(frozen=True)
class Plan:
    cells: tuple[Cell, ...]
    tasks: tuple[Task, ...]  # models before what needs them, seed after seed


def plan_of(study: Study, chosen: Callable[[str], bool]) -> Plan:
    """Every cell that is ``chosen`` by "source, scenario, contestant, seed N" with its task, or why the system refuses it."""
    cells: list[Cell] = []
    tasks: dict[str, Task] = {}
    for seed in study.seeds:
        for source in study.sources:
            for scenario in study.scenarios:
                old = model_task(study, source, scenario.old, "old", seed)
                new = model_task(study, source, scenario.new, "new", seed)
                for contestant in study.contestants:
                    if contestant.scenarios is not None and scenario.name not in contestant.scenarios:
                        continue
                    if not chosen(f"{source.name}, {scenario.name}, {contestant.name}, seed {seed}"):
                        continue
                    tasks |= {old.key: old, new.key: new}
                    cell = _cell(study, source, scenario, contestant, seed, old.key, new.key)
                    cells.append(cell)
                    if cell.task is not None:
                        tasks[cell.task.key] = cell.task
    return Plan(tuple(cells), tuple(tasks.values()))


def model_task(study: Study, source: Source, side: Side, role: Literal["old", "new"], seed: int) -> Task:
    budget = study.budgets[source.name]
    steps = budget.old_steps if role == "old" else budget.new_steps
    config = _config(study, source, side, side, {}, seed)
    settings = {
        **_common(study, source, config),
        "kind": "model",
        "side": asdict(side),
        "role": role,
        "seed": seed,
        "steps": steps,
    }
    title = f"{source.name}, {role} model {side.net} {side.dim} {side.loss} on {side.share}, seed {seed}"
    job = ModelJob(source.name, config, side, role, seed, steps)
    return Task(title, f"{source.name} {role} model {side.net} {side.dim}", settings, job)


def _cell(
    study: Study, source: Source, scenario: Scenario, contestant: Contestant, seed: int, old: str, independent: str
) -> Cell:
    def refused(reason: str) -> Cell:
        return Cell(source.name, scenario, contestant, seed, None, reason, old, independent)

    compat = dict(contestant.compat)
    if _PAIR_SHARE in compat:
        compat["pair_weight"] = compat.pop(_PAIR_SHARE) * study.budgets[source.name].scale
    weight = study.weights.get((source.name, contestant.name))
    if contestant.tuned and weight is not None:
        compat[contestant.weight_key] = weight
    try:
        config = _config(study, source, scenario.old, scenario.new, compat, seed)
    except ConfigError as error:
        return refused(str(error).removeprefix("study: "))
    if (
        contestant.kind == "mapping"
        and config.compat.bridge in _EQUAL_DIMENSIONS
        and scenario.old.dim != scenario.new.dim
    ):
        return refused(f"{config.compat.bridge} keeps angles, so both dimensions must be equal")
    if contestant.tuned and weight is None:
        return Cell(source.name, scenario, contestant, seed, None, None, old, independent)
    steps = study.budgets[source.name].new_steps
    settings = {
        **_common(study, source, config),
        "kind": "cell",
        "old": old,
        "independent": independent,
        "share": asdict(scenario.new.share),
        "contestant": contestant.kind,
        "compat": _compat_of(contestant, config),
        "code": _code_of(contestant, config),
        "seed": seed,
        "steps": steps if contestant.kind == "training" else 0,
    }
    title = f"{source.name}, {scenario.name}, {contestant.name}, seed {seed}"
    group = f"{source.name} {contestant.name} {scenario.new.net} {scenario.new.dim}"
    job = CellJob(source.name, config, scenario, contestant, seed, steps, old, independent)
    task = Task(title, group, settings, job, (old, independent))
    return Cell(source.name, scenario, contestant, seed, task, None, old, independent)


_EQUAL_DIMENSIONS = ("procrustes", "orthogonal")
_MARGINS: dict[str, dict[str, float]] = {
    "softmax": {},
    "cosface": {"margin_cos": 0.2},
    "arcface": {"margin_rad": 0.3},
}


def _config(study: Study, source: Source, old: Side, new: Side, compat: dict[str, Any], seed: int) -> Config:
    """A run's config, as strict as any: what it refuses, the study reports as refused."""
    budget = study.budgets[source.name]
    # numbers of steps are the study's; the head's loss is the new model's
    values = {
        "run": {"seed": seed},
        "data": source.data.model_dump(mode="json", exclude_none=True),
        "augment": source.augment.model_dump(mode="json"),
        "old": {"net": old.net, "embedding_dim": old.dim},
        "new": {"net": new.net, "embedding_dim": new.dim},
        "head": {"loss": new.loss, "scale": budget.scale, **_MARGINS[new.loss]},
        "compat": compat,
        "optim": {"global_batch": budget.global_batch, "lr": budget.lr, "zero_stage": 0},
        "checkpoint": {"every_steps": 10**9},
        "tracking": {"every_steps": 10**9},
    }
    return parse_config(values, "study", json_mode=True)


def _common(study: Study, source: Source, config: Config) -> dict[str, Any]:
    sections = ("augment", "head", "optim", "new", "old")
    tuning = {"tuning_share": source.tuning_share} if source.tuning_share > 0.0 else {}
    return {
        **tuning,
        "version": VERSION,
        "data": study.fingerprints[source.name],
        "tested": source.data.heldout_identities,
        "image_size": source.data.image_size,
        **{section: getattr(config, section).model_dump(mode="json") for section in sections},
    }


_TRAINING_ALONE = ("contrast_weight",)


def _compat_of(contestant: Contestant, config: Config) -> dict[str, Any]:
    """What of [compat] a contestant depends on: a new key for maps must not make BCT anew, nor the other way round."""
    section = config.compat.model_dump(mode="json")
    if contestant.kind == "training" and config.compat.method != "lce":
        return {key: section[key] for key in ("mode", "method", "method_weight")}
    if contestant.kind == "mapping":
        section = {key: value for key, value in section.items() if key not in _TRAINING_ALONE}
    elif config.compat.manner == "direct" and config.compat.contrast_weight is None:
        section["contrast_weight"] = f"{CONTRAST_WEIGHT:g} where classes are many"
    return {} if contestant.kind == "none" else section


def _code_of(contestant: Contestant, config: Config) -> str:
    """Hash of the files that make the contestant what it is, so that a changed method is run again."""
    package = Path(methods.__file__).parent
    files: list[Path] = []
    if contestant.kind == "mapping":
        files = [package.parent / name for name in ("bridges.py", "closed_form.py", "fit.py")]
    elif contestant.kind == "training":
        files = [Path(inspect.getfile(methods.METHODS[config.compat.method].build))]
        if config.compat.method in ("bct", "unibct", "rbt"):
            files.append(package.parent / "frozen_rows.py")
        if config.compat.method == "lce":
            files += [package.parent / name for name in ("lce.py", "transformed.py")]
            if config.compat.manner != "direct":
                files += [package.parent / name for name in ("bridges.py", "closed_form.py", "fit.py")]
    return _hash_of(files)


def _hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
