"""The command ``lce methods``: what there is to choose from, what each needs of the old model, and what it costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lce_dist.compat.method import Card

_NEEDS = {"centres": "its class centres", "batch": "its vectors of each batch", "all": "its vectors of all images"}


def add_methods_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``methods`` to the commands of ``lce``."""
    methods = commands.add_parser("methods", help="methods of compatible training, and maps: needs, cost, source")
    methods.add_argument("--markdown", action="store_true", help="print the table of docs/methods.md")
    methods.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> None:
    from lce_dist.compat.methods import METHODS
    from lce_dist.compat.methods.maps import MAPS

    tables = {"compat.method": {name: METHODS[name].card for name in METHODS}, "compat.bridge": MAPS}
    if arguments.markdown:
        print("\n\n".join(markdown_table(key, cards) for key, cards in tables.items()))
        return
    words = {
        "compat.method": "The new model is trained to be compatible",
        "compat.bridge": "Both models exist, and a map is fitted",
    }
    for key, cards in tables.items():
        print(f"{words[key]} ({key}):")
        for name, card in cards.items():
            print(f"{name}: {card.title}")
            print(f"  manners: {', '.join(sorted(card.manners))}; needs of the old model: {_needs(card)}")
            print(f"  cost: {card.cost}")
            print(f"  source: {card.source}")


def markdown_table(key: str, cards: dict[str, Card]) -> str:
    """One line a method, or a map; key: of the config, which names it."""
    lines = [f"| `{key}` | | manners | needs of the old model | cost | source |", "|---|---|---|---|---|---|"]
    for name, card in cards.items():
        manners = ", ".join(sorted(card.manners))
        lines.append(f"| `{name}` | {card.title} | {manners} | {_needs(card)} | {card.cost} | {card.source} |")
    return "\n".join(lines)


def _needs(card: Card) -> str:
    return "; ".join(text for key, text in _NEEDS.items() if key in card.needs)
