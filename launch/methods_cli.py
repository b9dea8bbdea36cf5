"""The command ``lce methods``: what there is to choose from, what each needs of the old model, and what it costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lce_dist.compat.method import Card

_NEEDS = {"centres": "its class centres", "batch": "its vectors of each batch", "all": "its vectors of all images"}


def add_methods_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``methods`` to the commands of ``lce``."""
    methods = commands.add_parser("methods", help="the methods of compatible training: needs, cost, source")
    methods.add_argument("--markdown", action="store_true", help="print the table of docs/methods.md")
    methods.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> None:
    from lce_dist.compat.methods import METHODS

    cards = {name: METHODS[name].card for name in METHODS}
    if arguments.markdown:
        print(markdown_table(cards))
        return
    for name, card in cards.items():
        print(f"{name}: {card.title}")
        print(f"  manners: {', '.join(sorted(card.manners))}; needs of the old model: {_needs(card)}")
        print(f"  cost: {card.cost}")
        print(f"  source: {card.source}")


def markdown_table(cards: dict[str, Card]) -> str:
    """One line a method."""
    lines = ["| `compat.method` | | manners | needs of the old model | cost | source |", "|---|---|---|---|---|---|"]
    for name, card in cards.items():
        manners = ", ".join(sorted(card.manners))
        lines.append(f"| `{name}` | {card.title} | {manners} | {_needs(card)} | {card.cost} | {card.source} |")
    return "\n".join(lines)


def _needs(card: Card) -> str:
    return "; ".join(text for key, text in _NEEDS.items() if key in card.needs)
