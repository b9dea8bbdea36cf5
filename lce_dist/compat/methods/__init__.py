"""Every method of compatible training by name; a new one is a file beside this and a line in the table.

A method's file holds one subclass of ``Method`` with a ``card`` and ``build(inputs)``, which reads what it needs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Protocol

from lce_dist.compat.method import Card, Method
from lce_dist.compat.old_space import OldSpace
from lce_dist.config import CompatConfig, HeadConfig
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import ConfigError
from lce_dist.world import World


@dataclass(frozen=True)
class MethodInputs:
    """What methods are built from; space is this shard's.

    old_vectors: a pass over the old vectors of all training images, as many rounds on every rank; None where they
    cannot be had. new_dim, old_dim: lengths of the vectors. steps: of the whole training.
    """

    config: CompatConfig
    head: HeadConfig
    space: OldSpace
    old_vectors: Callable[[], Iterable[EmbeddedRows]] | None
    new_dim: int
    old_dim: int
    seed: int
    steps: int
    world: World


class MethodClass(Protocol):
    """A subclass of ``Method`` that the table can name."""

    card: ClassVar[Card]

    def build(self, inputs: MethodInputs) -> Method:
        """The method as the config says; collective where it reads ``old_vectors``."""
        ...


class _Table(Mapping[str, MethodClass]):
    """Names to classes; a class's module is imported when it is asked for."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> MethodClass:
        module, _, class_name = self._places[name].partition(".")
        found: MethodClass = getattr(import_module(f"{__name__}.{module}"), class_name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


METHODS: Mapping[str, MethodClass] = _Table(
    {
        "lce": "lce.Lce",
        "bct": "bct.Bct",
        "l2": "l2.L2",
        "ract": "ract.Ract",
        "nccl": "nccl.Nccl",
        "unibct": "unibct.UniBct",
        "advbct": "advbct.AdvBct",
        "mixbct": "mixbct.MixBct",
        "rbt": "rbt.Rbt",
    }
)


def find_method(name: str) -> MethodClass:
    """The method ``name`` of the table. Errors: ConfigError for a name that it has not."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}."
        raise ConfigError(f"compat.method is {name!r}, which is unknown; {hint}")
    return METHODS[name]


def build_method(name: str, inputs: MethodInputs) -> Method:
    """As :func:`find_method`, built."""
    return find_method(name).build(inputs)
