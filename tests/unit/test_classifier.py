"""A classifier on disk: what is exported, joins and leaves is right to the bit; what is wrong changes nothing."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.head_cli import add_head_commands
from launch.prepare import draw_faces, prepare
from lce_dist import blocks, storage
from lce_dist.config import DataConfig, SyntheticConfig, load_config
from lce_dist.errors import CheckpointError, ConfigError, DataError, LceError, RunError
from lce_dist.head.classifier import (
    OldRows,
    export,
    grow,
    keys_file,
    read_card,
    read_keys,
    save_classifier,
    shrink,
    unknown_keys,
)
from lce_dist.head.identity import as_bytes, from_bytes, identity_tensor, pack_keys, unpack_keys
from lce_dist.head.rows import ClassRows
from lce_dist.models.catalog import build_net
from lce_dist.models.weights import load_weights, save_weights
from lce_dist.world import World
from pipelines.manifest import PackedDataset
from pipelines.pixels import decode_sample

KEYS, DIM = ["bob", "anna", "Ünal", "c d", "eve"], 6
OLD = ("old_centre", "old_cos_boundary", "old_count")


def values(count: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(count, DIM, generator=generator),
        "old_centre": F.normalize(torch.randn(count, DIM, generator=generator)),
        "old_cos_boundary": torch.rand(count, generator=generator),
        "old_count": torch.randint(1, 99, (count,), generator=generator),
    }


def made(out: Path, keys: list[str], tensors: dict[str, torch.Tensor], model: dict[str, object] | None = None) -> Path:
    weight = tensors["weight"]
    rows = ClassRows.from_weight(weight, (), "fp32", "fp32", False, len(keys), 0, 1)
    old = OldRows(*(tensors[name] for name in OLD)) if "old_centre" in tensors else None
    save_classifier(out, rows, identity_tensor(keys, 0, World()), old, model or {"net": "n"}, World())
    return out


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return made(tmp_path / "classifier", KEYS, values(5))


def contents(directory: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Keys and other tensors of a classifier, through storage.load."""
    shapes = storage.read_manifest(directory, World()).shapes
    dtypes = {"identity": torch.uint8, "old_count": torch.int64}
    tensors = {name: torch.zeros(shape, dtype=dtypes.get(name, torch.float32)) for name, shape in shapes.items()}
    storage.load(directory, tensors, World())
    return unpack_keys(from_bytes(tensors.pop("identity").numpy())), tensors


@given(st.lists(st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1)))
@settings(max_examples=60, deadline=None)
def test_keys_survive_their_bytes(keys: list[str]) -> None:
    packed = pack_keys(keys, "class", 0)
    assert unpack_keys(packed) == keys
    assert unpack_keys(from_bytes(as_bytes(packed, packed.dtype.itemsize + 3))) == keys


@pytest.mark.parametrize("bad", ["", "a\0", "\0a", "two\nlines", "\udcff"])
def test_a_key_that_would_not_survive_is_named_by_its_class(bad: str) -> None:
    with pytest.raises(DataError, match="identity key of class 12 is") as caught:
        pack_keys(["fine", "fine too", bad], "class", 10)
    assert "two" not in str(caught.value)


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
def test_export_has_the_chosen_rows_in_the_order_asked_for(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    everyone, some = tmp_path / "new folder" / "all.safetensors", tmp_path / "some.safetensors"
    assert export(classifier, None, everyone) == 5
    assert export(classifier, ["eve", "bob", "Ünal"], some) == 3
    weight = values(5)["weight"]
    assert torch.equal(load_file(everyone)["weight"], weight)
    assert torch.equal(load_file(some)["weight"], weight[[4, 0, 2]])
    assert read_keys(keys_file(everyone)) == KEYS
    assert keys_file(some).read_text() == "eve\nbob\nÜnal\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["some.keys.txt", "some.safetensors"]


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
def test_who_joins_comes_after_who_is_there_and_in_the_order_of_keys(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    new_keys, means = ["zoe", "a much longer key", "bo"], values(3, seed=2)
    assert grow(classifier, new_keys, means["weight"], tmp_path / "grown") == 8
    keys, tensors = contents(tmp_path / "grown")
    assert keys == [*KEYS, "a much longer key", "bo", "zoe"]
    truth = values(5)
    for name, tensor in truth.items():
        assert torch.equal(tensors[name][:5], tensor), name
    median = sorted(row.double().norm().item() for row in truth["weight"])[2]
    for place, mean in zip((7, 5, 6), means["weight"], strict=True):
        torch.testing.assert_close(tensors["weight"][place], mean * (median / mean.norm()))
    assert not tensors["old_centre"][5:].any() and not tensors["old_count"][5:].any()
    assert tensors["old_cos_boundary"][5:].tolist() == [-1.0] * 3
    assert read_card(tmp_path / "grown").model == {"net": "n"}

    grow(classifier, new_keys, means["weight"], tmp_path / "with old", OldRows(*(means[name] for name in OLD)))
    _, tensors = contents(tmp_path / "with old")
    for name in OLD:
        assert torch.equal(tensors[name][5:], means[name][[1, 2, 0]]), name


def test_who_leaves_is_gone_and_the_order_of_the_others_stays(classifier: Path, tmp_path: Path) -> None:
    assert shrink(classifier, ["eve", "bob", "c d"], tmp_path / "small") == 3
    keys, tensors = contents(tmp_path / "small")
    assert keys == ["bob", "c d", "eve"]
    for name, tensor in values(5).items():
        assert torch.equal(tensors[name], tensor[[0, 3, 4]]), name
    everything = b"".join(path.read_bytes() for path in (tmp_path / "small").rglob("*"))
    assert b"anna" not in everything and b"eve" in everything


def test_grown_and_shrunk_back_is_what_it_was(classifier: Path, tmp_path: Path) -> None:
    grow(classifier, ["new", "newer"], torch.ones(2, DIM), tmp_path / "grown")
    shrink(tmp_path / "grown", KEYS, tmp_path / "back")
    keys, tensors = contents(tmp_path / "back")
    assert keys == KEYS and all(torch.equal(tensors[name], tensor) for name, tensor in values(5).items())
    without_old = made(tmp_path / "plain", KEYS, {"weight": values(5)["weight"]})
    grow(without_old, ["new"], torch.ones(1, DIM), tmp_path / "plain grown")
    assert not read_card(tmp_path / "plain grown").has_old and read_card(tmp_path / "back").has_old


def test_unknown_keys_are_those_without_a_row(classifier: Path) -> None:
    assert unknown_keys(classifier, ["zoe", "anna", "ann", "annaa", "eve"]) == ["zoe", "ann", "annaa"]


BAD: dict[str, tuple[Callable[[Path, Path], object], type[LceError], str]] = {
    "unknown keys": (
        lambda c, out: export(c, ["bob", "secret1", "eve", "secret2"], out / "r.safetensors"),
        DataError,
        "2 of 4 keys are no identities of .*; the first is line 2",
    ),
    "keys twice": (
        lambda c, out: shrink(c, ["bob", "eve", "anna", "eve", "bob"], out),
        DataError,
        "2 of 5 keys are named before; the first is line 4",
    ),
    "nobody stays": (lambda c, out: shrink(c, [], out), DataError, "at least 1 class"),
    "known already": (
        lambda c, out: grow(c, ["secret", "eve"], torch.ones(2, DIM), out),
        DataError,
        "1 of 2 new identities are in .* already; the first is line 2",
    ),
    "new ones twice": (lambda c, out: grow(c, ["secret", "secret"], torch.ones(2, DIM), out), DataError, "line 2"),
    "a dimension": (
        lambda c, out: grow(c, ["secret"], torch.ones(1, DIM + 1), out),
        DataError,
        r"shape \(1, 7\); must be at least 1 identity and \(1, 6\)",
    ),
    "nobody joins": (lambda c, out: grow(c, [], torch.ones(0, DIM), out), DataError, "0 new identities"),
    "no direction": (
        lambda c, out: grow(c, ["x", "secret"], torch.tensor([[1.0] * DIM, [0.0] * DIM]), out),
        DataError,
        "1 of 2 new identities have no direction .*; the first is line 2",
    ),
    "not finite": (
        lambda c, out: grow(c, ["secret"], torch.full((1, DIM), torch.nan), out),
        DataError,
        "1 of 1 new identities have no direction",
    ),
    "a NUL": (lambda c, out: grow(c, ["sec\0ret"], torch.ones(1, DIM), out), DataError, "of line 1 is empty"),
    "a suffix": (lambda c, out: export(c, None, out / "r.bin"), DataError, r"ends in '.bin'; must be .safetensors"),
    "no classifier": (lambda c, out: export(c.parent, None, out / "r.safetensors"), CheckpointError, "is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_without_a_key_and_leaves_nothing(classifier: Path, tmp_path: Path, name: str) -> None:
    action, kind, says = BAD[name]
    with pytest.raises(kind, match=says) as caught:
        action(classifier, tmp_path / "out")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


def test_old_rows_for_a_classifier_without_any_are_refused(tmp_path: Path) -> None:
    plain, new = made(tmp_path / "plain", KEYS, {"weight": values(5)["weight"]}), values(1)
    with pytest.raises(DataError, match="has no old space"):
        grow(plain, ["x"], new["weight"], tmp_path / "out", OldRows(*(new[name] for name in OLD)))


def test_nothing_is_overwritten(classifier: Path, tmp_path: Path) -> None:
    export(classifier, ["bob"], tmp_path / "r.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for action in (
        lambda: export(classifier, None, tmp_path / "r.safetensors"),
        lambda: shrink(classifier, ["bob"], classifier),
        lambda: grow(classifier, ["new"], torch.ones(1, DIM), classifier),
    ):
        with pytest.raises(RunError, match="exists and is not overwritten"):
            action()
    (tmp_path / "r.safetensors").unlink()  # the keys alone are reason enough
    with pytest.raises(RunError, match=r"r\.keys\.txt exists"):
        export(classifier, None, tmp_path / "r.safetensors")
    del before[tmp_path / "r.safetensors"]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_place_that_cannot_be_written_is_one_line(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for action in (
        lambda: shrink(classifier, ["bob"], tmp_path / "file" / "out"),
        lambda: export(classifier, None, tmp_path / "file" / "r.safetensors"),
    ):
        with pytest.raises(RunError, match="cannot be written"):
            action()


@pytest.mark.parametrize("spoil", ["flip", "truncate", "delete"])
def test_a_damaged_classifier_is_refused(classifier: Path, tmp_path: Path, spoil: str) -> None:
    (shard,) = classifier.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if spoil == "flip":
        content[-40] ^= 1
        shard.write_bytes(content)
    elif spoil == "truncate":
        shard.write_bytes(content[:-4])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match="is missing, truncated or changed"):
        shrink(classifier, ["bob"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_files_and_manifest_that_do_not_fit_are_refused(classifier: Path, tmp_path: Path) -> None:
    manifest = json.loads((classifier / "manifest.json").read_text())
    manifest["shapes"] = {name: [6, *shape[1:]] for name, shape in manifest["shapes"].items()}
    del manifest["sha256"]  # as of a release that did not seal them
    (classifier / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has 5 rows in its files; the manifest says 6"):
        export(classifier, None, tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b"fine\n\xff", "is no UTF-8 .byte 5."), (None, "cannot be read"), (b"a\n\nb\n", "of line 2")],
)
def test_a_keys_file_is_checked(classifier: Path, tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "ids").write_bytes(content)
    with pytest.raises(DataError, match=says):
        shrink(classifier, read_keys(tmp_path / "ids"), tmp_path / "out")


def test_memory_is_bounded_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, dim, block = 200_000, 32, 1 << 19
    keys = [f"{number:06}" for number in range(count)]
    made(tmp_path / "big", keys, {"weight": torch.randn(count, dim)})
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    keep, rows = keys[::1000], torch.randn(10, dim)
    tracemalloc.start()
    try:
        shrink(tmp_path / "big", keep, tmp_path / "small")
        grow(tmp_path / "big", [f"new {number}" for number in range(10)], rows, tmp_path / "grown")
        export(tmp_path / "big", None, tmp_path / "all.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * block + 3 * 8 * count, peak  # the table has 25.6 MB
    assert torch.equal(load_file(tmp_path / "all.safetensors")["weight"], contents(tmp_path / "big")[1]["weight"])


def _stuck(folder: Path) -> None:
    """Grow, and stop for good when half of it is written."""

    def progress(done: int, total: int) -> None:
        if done >= total // 2:
            (folder / "half").touch()
            time.sleep(600)

    blocks.BLOCK_BYTES = 50
    grow(folder / "classifier", ["new"], torch.ones(1, DIM), folder / "grown", progress=progress)


def test_a_kill_in_the_middle_leaves_nothing_under_the_name(classifier: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_stuck, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "half").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "grown.partial").exists() and not (tmp_path / "grown").exists()
    with pytest.raises(CheckpointError, match="never finished"):
        read_card(tmp_path / "grown.partial")
    assert contents(classifier)[0] == KEYS
    assert grow(classifier, ["new"], torch.ones(1, DIM), tmp_path / "grown") == 6  # the same command again
    assert contents(tmp_path / "grown")[0] == [*KEYS, "new"] and not (tmp_path / "grown.partial").exists()


def lce(*arguments: object) -> None:
    """``lce head ...`` as typed."""
    parser = argparse.ArgumentParser(prog="lce")
    add_head_commands(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(argument) for argument in arguments])
    parsed.run(parsed)


def test_the_commands(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lce("head", "show", classifier)
    shown = capsys.readouterr().out
    assert "5 classes of 6 values, with old centres" in shown and "net: n" in shown
    assert not any(key in shown for key in KEYS)
    (tmp_path / "ids").write_text("eve\nanna\n")
    lce("head", "export", classifier, "--ids", tmp_path / "ids", "--out", tmp_path / "r.safetensors")
    lce("head", "export", classifier, "--out", tmp_path / "all.safetensors")
    lce("head", "shrink", classifier, "--ids", tmp_path / "ids", "--out", tmp_path / "small")
    assert "2 of 5 classes" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "r.safetensors")["weight"], values(5)["weight"][[4, 1]])
    assert contents(tmp_path / "small")[0] == ["anna", "eve"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    config = SyntheticConfig(identities=5, photos_per_identity=4, photo_size=48)
    return draw_faces(config, tmp_path_factory.mktemp("faces") / "packed", lambda what, done, total: None)


def test_the_grow_command_adds_the_models_class_means(faces: PackedDataset, tmp_path: Path) -> None:
    card = {"stage": "new", "net": "tiny8", "embedding_dim": str(DIM), "image_size": "48", "fingerprint": "f"}
    save_weights(build_net("tiny8", DIM, 48, seed=3), tmp_path / "model.safetensors", card)
    known = [faces.identities[1], faces.identities[3]]
    classifier = made(tmp_path / "classifier", known, {"weight": values(2)["weight"]}, card)
    arguments = ("head", "grow", classifier, "--weights", tmp_path / "model.safetensors", "--data", faces.directory)
    lce(*arguments, "--out", tmp_path / "grown")
    keys, tensors = contents(tmp_path / "grown")
    assert keys == known + [key for key in sorted(faces.identities) if key not in known]
    assert torch.equal(tensors["weight"][:2], values(2)["weight"])
    net = build_net("tiny8", DIM, 48, seed=9)
    load_weights(net, tmp_path / "model.safetensors")
    net.eval()
    for row, key in zip(tensors["weight"][2:], keys[2:], strict=True):
        samples = np.flatnonzero(faces.index["label"] == faces.identities.index(key))
        pixels = np.stack([decode_sample(faces, int(sample)) for sample in samples]).astype(np.float32)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0
        with torch.no_grad():
            mean = F.normalize(net(images)).mean(0)
        assert F.cosine_similarity(row, mean, dim=0) > 0.9999

    save_weights(net, tmp_path / "other.safetensors", card | {"fingerprint": "g"})
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    for weights, says in (("other", "has fingerprint 'g'"), ("bare", "do not say their"), ("absent", "cannot be read")):
        with pytest.raises(CheckpointError, match=says):
            lce(*arguments[:4], tmp_path / f"{weights}.safetensors", *arguments[5:], "--out", tmp_path / "no")
    with pytest.raises(DataError, match="there is nothing to add"):
        lce("head", "grow", tmp_path / "grown", *arguments[3:], "--out", tmp_path / "no")
    with pytest.raises(RunError, match="not overwritten"):
        lce(*arguments, "--out", tmp_path / "grown")
    assert not list(tmp_path.glob("no*"))


def test_a_run_is_bound_to_what_it_starts_from_and_not_to_where_that_lies(
    faces: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkout = Path(__file__).resolve().parents[2]
    plain = load_config(checkout / "configs" / "quickstart.toml", ["data.heldout_identities=2", "optim.global_batch=4"])
    plain = plain.model_copy(
        update={"data": DataConfig(shards=str(faces.directory), heldout_identities=2, image_size=32)}
    )
    dim = plain.new.embedding_dim

    def prepared(path: str | None) -> dict[str, object]:
        config = plain.model_copy(update={"head": plain.head.model_copy(update={"start_from": path})})
        return prepare(config, 1, False, tmp_path, lambda what, done, total: None).identity(config)

    wide = {"weight": torch.randn(5, dim)}
    for name in ("a", "b"):
        made(tmp_path / name, KEYS, wide)
    made(tmp_path / "c", KEYS, {"weight": torch.randn(5, dim)})
    assert prepared("a") == prepared("b") == prepared(str(tmp_path / "a"))
    assert len({json.dumps(prepared(path), sort_keys=True) for path in (None, "a", "c")}) == 3
    made(tmp_path / "narrow", KEYS, values(5))
    with pytest.raises(ConfigError, match=f"head.start_from is narrow, whose rows have 6 values; must be .* .{dim}."):
        prepared("narrow")
    with pytest.raises(CheckpointError, match=r"nowhere/manifest\.json is missing"):
        prepared("nowhere")


def test_written_files_are_plain_safetensors(classifier: Path, tmp_path: Path) -> None:
    shrink(classifier, KEYS, tmp_path / "copy")
    with safe_open(tmp_path / "copy" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"weight", "identity", *OLD}
        assert torch.equal(file.get_tensor("weight"), values(5)["weight"])
    assert storage.damage(tmp_path / "copy", World()) is None
