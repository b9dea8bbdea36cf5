"""The one weight of each method, chosen by tries on identities and seeds that the study never tests on.

Three tries at a quarter of the method's own default, at it, and at four times it; while the best is at an end, one more
beyond it (to six); then one between the best and its better neighbour. What is best is decided by P_1, the mean of two seeds,
over a share of the *training* identities that is held out of the tuning's own models; LCE and its rivals are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.compatibility_data import Source
from benchmarks.compatibility_plan import SCENARIOS, Contestant, Plan, Scenario, Study, plan_of
from benchmarks.compatibility_report import Get, rows_of
from lce_dist.compat import methods
from lce_dist.config import weights_for

SEEDS = (101, 102)  # none of the study's
SHARE = 0.3  # of the training identities
SCENARIO = next(scenario for scenario in SCENARIOS if scenario.name == "extended-class")
_FACTORS = {"mixbct": 1.6}  # its weight is a share of the rows: four times 0.3 of them there are not
_LIMITS = {"mixbct": 1.0}
MOST_TRIES = 7  # six outwards, one between
_NUMBERS = ("M(o,o)", "M(n,o)", "M(n,n)", "M(*,*)", "P_1")


def tuning_source(source: Source) -> Source:
    """``source`` with other identities to test on."""
    return replace(source, name=f"{source.name} (tuning)", tuning_share=SHARE)


@dataclass(frozen=True)
class Try:
    """A weight and the numbers that it reached, by the names of the report."""

    weight: float
    numbers: dict[str, float]

    @property
    def score(self) -> float:
        return self.numbers["P_1"]


@dataclass(frozen=True)
class Tuned:
    """What was tried for one contestant on one data set, and what is taken: the best."""

    source: str
    contestant: str
    key: str
    default: float
    tries: tuple[Try, ...]

    @property
    def chosen(self) -> float:
        return max(self.tries, key=lambda one: one.score).weight

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Tuned:
        """What ``plain`` gave to a record."""
        tries = tuple(
            Try(one["weight"], {name: value for name, value in one.items() if name != "weight"})
            for one in plain["tries"]
        )
        return cls(plain["source"], plain["contestant"], plain["key"], plain["default"], tries)

    def plain(self) -> dict[str, Any]:
        tries = [{"weight": one.weight, **one.numbers} for one in self.tries]
        about = {"source": self.source, "contestant": self.contestant, "key": self.key, "default": self.default}
        return {**about, "chosen": self.chosen, "tries": tries}


def default_weight(contestant: Contestant, scale: float) -> float:
    """The weight that a run has which says none."""
    compat = dict(contestant.compat)
    if contestant.weight_key == "method_weight":
        return float(vars(methods.METHODS[compat["method"]])["WEIGHT"])
    return float(str(weights_for(scale, compat["mode"])["align_weight"]))


def first_tries(default: float, factor: float) -> tuple[float, ...]:
    return (default / factor, default, default * factor)


def next_try(tries: Sequence[tuple[float, float]], factor: float, limit: float) -> float | None:
    """The weight to try after some (weight, score): outwards from an end, else once between; None when there is none.

    It stays below ``limit``.
    """
    ordered = sorted(tries)
    best = max(range(len(ordered)), key=lambda place: ordered[place][1])
    weights = [weight for weight, _ in ordered]
    outwards = weights[0] / factor if best == 0 else weights[-1] * factor
    if best in (0, len(ordered) - 1) and len(tries) < MOST_TRIES - 1 and outwards < limit:
        return outwards
    neighbours = [ordered[place] for place in (best - 1, best + 1) if 0 <= place < len(ordered)]
    if any(max(weights[best], near) / min(weights[best], near) < 0.9 * factor for near, _ in neighbours):
        return None  # it was between already
    side = max(neighbours, key=lambda near: near[1])[0]
    return weights[best] * float(factor ** (0.5 if side > weights[best] else -0.5))


def tune(
    study: Study, tuned: Iterable[tuple[Source, Contestant]], get: Get, perform: Callable[[Plan], None]
) -> dict[tuple[str, str], Tuned]:
    """Weights by (source, contestant), as ``Study.weights`` has them; those whose tries are not all done are left out.

    ``perform`` does the tasks of a plan; ``get`` reads what it left.
    """
    asked = {(source.name, one.name): (source, one) for source, one in tuned}
    methods_of = {key: str(dict(one.compat).get("method")) for key, (_, one) in asked.items()}
    factors = {key: _FACTORS.get(method, 4.0) for key, method in methods_of.items()}
    defaults = {key: default_weight(one, study.budgets[source.name].scale) for key, (source, one) in asked.items()}
    weights = {key: first_tries(default, factors[key]) for key, default in defaults.items()}
    open_keys = list(asked)
    tries: dict[tuple[str, str], tuple[Try, ...]] = {}
    while open_keys:
        done = _tried(study, [asked[key] for key in open_keys], weights, get, perform)
        tries |= done
        for key in set(open_keys) - done.keys():
            tries.pop(key, None)
        grown = []
        for key in done:
            scores = [(one.weight, one.score) for one in done[key]]
            more = next_try(scores, factors[key], _LIMITS.get(methods_of[key], math.inf))
            if more is not None:
                weights[key] += (more,)
                grown.append(key)
        open_keys = grown
    return {
        key: Tuned(source.name, one.name, one.weight_key, defaults[key], tries[key])
        for key, (source, one) in asked.items()
        if key in tries
    }


def _tried(
    study: Study,
    asked: Sequence[tuple[Source, Contestant]],
    weights: dict[tuple[str, str], tuple[float, ...]],
    get: Get,
    perform: Callable[[Plan], None],
) -> dict[tuple[str, str], tuple[Try, ...]]:
    """All tries of those of which every one is done."""
    plans = {
        (source.name, one.name, weight): _plan(study, source, one, weight)
        for source, one in asked
        for weight in weights[source.name, one.name]
    }
    tasks = {task.key: task for plan in plans.values() for task in plan.tasks}
    perform(Plan((), tuple(tasks.values())))
    found: dict[tuple[str, str], tuple[Try, ...]] = {}
    for source, one in asked:
        tries = []
        for weight in weights[source.name, one.name]:
            (row,) = rows_of(plans[source.name, one.name, weight].cells, get)
            if row.missing is None:
                tries.append(Try(weight, {name: round(row.mean(name), 6) for name in _NUMBERS}))
        if len(tries) == len(weights[source.name, one.name]):
            found[source.name, one.name] = tuple(tries)
    return found


def _plan(study: Study, source: Source, contestant: Contestant, weight: float) -> Plan:
    own = tuning_source(source)
    scenario: Scenario = SCENARIO
    alone = Study(
        (own,),
        {own.name: study.fingerprints[source.name]},
        {own.name: study.budgets[source.name]},
        (scenario,),
        (contestant,),
        SEEDS,
        {(own.name, contestant.name): weight},
    )
    return plan_of(alone, lambda place: True)


def tuning_table(tuned: Iterable[Tuned]) -> str:
    """Markdown: what was tried, by P_1 on the identities held out for it; the chosen one in bold."""
    lines = [
        "",
        "### Weights",
        "",
        f"Tried in {SCENARIO.name}, seeds {SEEDS[0]} and {SEEDS[1]}, on {SHARE:.0%} of the training identities, held out; P_1.",
        "",
        "| | weight | default | tried |",
        "|---|---|---|---|",
    ]
    for one in tuned:
        shown = []
        for tried in sorted(one.tries, key=lambda tried: tried.weight):
            words = f"{tried.weight:.3g}: {tried.score:.4f}"
            shown.append(f"**{words}**" if tried.weight == one.chosen else words)
        lines.append(f"| {one.source}: {one.contestant} | `{one.key}` | {one.default:g} | {', '.join(shown)} |")
    return "\n".join(lines) + "\n"
