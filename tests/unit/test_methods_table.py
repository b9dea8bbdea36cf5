"""The table of methods: every name leads to a class with a card that says what a person needs to choose."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from lce_dist.compat.method import Method
from lce_dist.compat.methods import METHODS, MethodInputs, _Table, build_method
from lce_dist.compat.methods.bct import Bct
from lce_dist.compat.methods.l2 import L2
from lce_dist.compat.methods.maps import MAPS
from lce_dist.compat.methods.nccl import Nccl
from lce_dist.compat.methods.ract import Ract
from lce_dist.compat.old_space import OldSpace
from lce_dist.compat.vector_weights import VectorWeights
from lce_dist.config import BridgeKind, CompatConfig, HeadConfig
from lce_dist.errors import ConfigError
from lce_dist.world import World

NAMES = ["lce", "bct", "l2", "ract", "nccl", "unibct", "advbct", "mixbct", "rbt"]


def inputs(**config: object) -> MethodInputs:
    centre = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    space = OldSpace(centre, torch.zeros(5), torch.full((5,), 3), 5, 0)
    compat = CompatConfig.model_validate(config)
    return MethodInputs(compat, HeadConfig(margin_cos=0.4), space, None, 4, 4, 1, 10, World())


def test_the_table_has_these_methods_and_the_first_is_the_default():
    assert list(METHODS) == NAMES and CompatConfig().method == NAMES[0] and len(METHODS) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_title_source_needs_manners_and_cost(name):
    found = METHODS[name]
    assert isinstance(found, type) and issubclass(found, Method)
    card = found.card
    assert card.needs and card.needs <= {"centres", "batch", "all"}
    assert card.manners and card.manners <= {"direct", "backward", "forward"}
    assert "arXiv" in card.source and "20" in card.source
    # what n identities and m images cost, of which there is something to say in each case
    assert "n identities" in card.cost and ("m images" in card.cost or "a image" in card.cost)
    assert card.title.split(":")[0].split(" ")[0].lower() == name
    assert len({METHODS[other].card.title for other in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_carded_as_methods_are(name):
    card = MAPS[name]
    assert name in get_args(BridgeKind) and name not in METHODS
    assert card.needs and card.needs <= {"centres", "all"} and card.manners <= {"direct", "backward", "forward"}
    assert re.search(r"(19|20)\d\d", card.source)
    assert "n identities" in card.cost and "m images" in card.cost and "Deployed" in card.cost
    assert {"procrustes", "fct"} <= MAPS.keys()


@pytest.mark.parametrize(
    ("name", "kind", "default"), [("bct", Bct, 1.0), ("l2", L2, 10.0), ("ract", Ract, 1.0), ("nccl", Nccl, 1.0)]
)
def test_methods_without_parameters_are_built_with_their_own_weight_or_the_configs(name, kind, default):
    method = build_method(name, inputs())
    assert type(method) is kind and method._weight == default == kind.WEIGHT
    assert build_method(name, inputs(method_weight=0.25))._weight == 0.25
    assert not list(method.parameters()) and not method.state_dict() and method.maps() == {} and method.anchor() is None
    assert method.uses_old_vectors == (name != "bct")


@pytest.mark.parametrize(
    ("config", "dims", "pair", "contrast"),
    [
        ({"mode": "training-direct"}, (4, 4), 0.0, 1.0),  # five classes span four dimensions
        ({"mode": "training-direct"}, (6, 6), 8.0, 0.0),
        ({"mode": "training-backward"}, (4, 4), 0.0, 0.0),
        ({"mode": "training-backward"}, (6, 4), 16.0, 0.0),
        ({"mode": "training-forward"}, (4, 6), 8.0, 0.0),
        ({"mode": "training-direct", "pair_weight": 0.0}, (6, 6), 0.0, 0.0),
        ({"mode": "training-direct", "pair_weight": 3.0, "contrast_weight": 0.0}, (4, 4), 3.0, 0.0),
        ({"mode": "training-direct", "contrast_weight": 2.5}, (6, 6), 8.0, 2.5),
    ],
)
def test_lces_terms_on_vectors_follow_the_number_of_classes_unless_they_are_set(config, dims, pair, contrast):
    new_dim, old_dim = dims
    method = build_method("lce", replace(inputs(**config), new_dim=new_dim, old_dim=old_dim))
    assert method._weights == VectorWeights(contrast, pair)
    assert method.uses_old_vectors == (pair > 0.0 or config["mode"] == "training-forward")


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"compat.method is 'mixbt', which is unknown; did you mean 'mixbct'"):
        build_method("mixbt", inputs())
    with pytest.raises(ConfigError, match="known: lce, bct, l2"):
        build_method("zzzz", inputs())


def test_a_method_that_cannot_be_imported_does_not_break_the_others():
    table = _Table({"gone": "nowhere.Nothing", "l2": "l2.L2"})
    assert "gone" in table and table["l2"] is L2
    with pytest.raises(ModuleNotFoundError, match=r"methods\.nowhere"):
        table["gone"]
