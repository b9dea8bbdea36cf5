"""A model that turns images into vectors: a stage of a run, or a model file as an old model may be given."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from launch.prepare import input_of, open_new_model, open_old_model
from launch.runs import LAUNCH_FILE, read_launch
from lce_dist.config import Config, parse_config
from lce_dist.errors import CheckpointError, ConfigError
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import FrozenModel, ModelFile, freeze_net, open_model
from lce_dist.models.preprocess import OUR_INPUT, InputSpec
from lce_dist.models.weights import load_weights

STAGES = ("old", "new", "independent")
DEFAULT_IMAGE_SIZE = 112
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class GivenModel:
    """A model as the command line names it; what is None or the default was not said. input: of a model file."""

    path: Path
    net: str | None = None
    embedding_dim: int | None = None
    image_size: int | None = None
    input: InputSpec = OUR_INPUT


@dataclass(frozen=True, eq=False)
class Embedder:
    """(b, 3, S, S) RGB in [-1, 1] of ``image_size`` -> (b, embedding_dim), and of which model the vectors are (``space``)."""

    network: FrozenModel
    embedding_dim: int
    image_size: int
    space: str


def open_embedder(given: GivenModel, device: torch.device) -> Embedder:
    """The model on ``device``. ``space`` is that of the run's report (or its parent_space), for as long as input is not changed.

    Errors: CheckpointError for what is absent, damaged or holds code; ConfigError for settings that do not fit.
    """
    path = given.path
    config = _config_of(path.parent) if path.name in STAGES else None
    if config is None and not path.is_dir():
        size = given.image_size or DEFAULT_IMAGE_SIZE
        file = ModelFile(path, given.net, given.embedding_dim, given.input)
        model = open_model(file, size, device)
        return _embedder(model, size)
    _refuse_settings(given)
    found = _of_folder(path, device) if config is None else _of_run(path, config, device)
    return _flipped(found) if given.input.flip_average else found


def _refuse_settings(given: GivenModel) -> None:
    for flag, said in (
        ("net", given.net is not None),
        ("embedding-dim", given.embedding_dim is not None),
        ("image-size", given.image_size is not None),
        ("input-size, --channels, --mean or --std", dataclasses.replace(given.input, flip_average=False) != OUR_INPUT),
    ):
        if said:
            raise ConfigError(f"--{flag} is for a model file; {given.path} is of a run, which knows its own. Remove it")


def _config_of(run_dir: Path) -> Config | None:
    """The run's settings, with places that hold from anywhere where the run kept such; None where there is no run."""
    if (run_dir / LAUNCH_FILE).is_file():
        return read_launch(run_dir)[0]
    path = run_dir / "resolved.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError:
        raise ConfigError(f"{path} is damaged; run the training command again, it writes the file") from None
    return parse_config(values, str(path), json_mode=True)


def _of_run(path: Path, config: Config, device: torch.device) -> Embedder:
    name, size = path.name, config.data.image_size
    if name == "old" and config.old.weights is not None:
        return _embedder(open_old_model(config, Path(), device), size)
    if name == "new" and config.new.weights is not None and config.compat.mode != "mapping-direct":
        return _embedder(open_new_model(config, Path(), device), size)
    if name == "old" and config.old.net is None:
        raise ConfigError(f"{path.parent} has stored vectors for its old model (old.vectors); there is no model to run")
    section = config.old if name == "old" else config.new
    assert section.net is not None, "the config was checked"
    # of mapping-direct, too: the rotation is among the weights that the run leaves
    weights = path / _WEIGHTS
    if not weights.is_file():
        raise CheckpointError(
            f"{weights} is not there; the run's stage {name!r} has not finished, or was not asked for"
        )
    net = build_net(section.net, section.embedding_dim, size, seed=0)
    load_weights(net, weights)
    turned = name == "new" and config.compat.mode == "mapping-direct"
    seen = input_of(config.new.input) if turned else OUR_INPUT
    return _embedder(freeze_net(net.to(device), section.net, section.embedding_dim, seen), size)


def _of_folder(path: Path, device: torch.device) -> Embedder:
    """A stage's folder without its run: the file of weights says what it is."""
    weights = path / _WEIGHTS
    try:
        with safe_open(weights, "pt") as file:
            card = file.metadata() or {}
        net, dim, size = card["net"], int(card["embedding_dim"]), int(card["image_size"])
        said: Any = json.loads(card.get("input", "{}"))
        said = {key: tuple(one) if isinstance(one, list) else one for key, one in said.items()}
        seen = InputSpec(**said)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} holds no {_WEIGHTS}; name a stage of a run (RUN_DIR/NAME/new), or a model file"
        ) from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{weights} does not say its net, embedding_dim and image_size ({error}); name the file itself, with --net and "
            "--embedding-dim"
        ) from None
    network = build_net(net, dim, size, seed=0)
    load_weights(network, weights)
    return _embedder(freeze_net(network.to(device), net, dim, seen), size)


def _embedder(model: FrozenModel, image_size: int) -> Embedder:
    return Embedder(model, model.embedding_dim, image_size, model.fingerprint)


def _flipped(one: Embedder) -> Embedder:
    """The mean of the unit vectors of image and mirror: another model, so another space."""
    return _embedder(one.network.with_input(dataclasses.replace(one.network.input, flip_average=True)), one.image_size)
