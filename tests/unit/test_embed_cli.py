"""`lce embed` with real networks, real files and DALI: the vectors of evaluation, keys, spaces, going on, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from launch import embed
from launch.cli import main
from launch.job import Job, embedded
from lce_dist.compat.artefact import map_rows, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.compat.rotation import fold_rotation
from lce_dist.config import load_config
from lce_dist.embedding import gather_all
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import ModelFile, freeze_net, open_model
from lce_dist.models.preprocess import OUR_INPUT, InputSpec
from lce_dist.models.weights import save_weights
from lce_dist.vector_files import open_vectors
from lce_dist.world import World
from pipelines.manifest import PackedDataset
from pipelines.pack import pack_folder

SIZE, DIM = 32, 24
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 JPEGs of 30 people: more than two blocks of 128."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    draw = np.random.default_rng(0)
    for person in range(30):
        (folder / f"p{person:02}").mkdir(parents=True)
        for photo in range(10):
            pixels = draw.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((SIZE, SIZE)).save(folder / f"p{person:02}" / f"{photo}.jpg", quality=95)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What training leaves of its models."""
    out = tmp_path / "runs" / "mine"
    settings = [f"data.image_size={SIZE}"]
    for stage, seed in (("old", 1), ("new", 2)):
        settings += [f"{stage}.net=tiny8", f"{stage}.embedding_dim={DIM}"]
        card = {"stage": stage, "net": "tiny8", "embedding_dim": str(DIM), "image_size": str(SIZE)}
        save_weights(build_net("tiny8", DIM, SIZE, seed), out / stage / "model.safetensors", card)
    config = load_config(QUICKSTART, settings)
    (out / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
    return out


def read(path: Path) -> tuple[list[str], np.ndarray, list[str] | None, str | None]:
    file = open_vectors(path)
    blocks = list(file.blocks())
    who = [one for block in blocks for one in block.identities or []]
    keys = [key for block in blocks for key in block.keys]
    return keys, np.concatenate([block.rows_bD for block in blocks]), who or None, file.space


def evaluated(run: Path, net: nn.Module, dataset: PackedDataset) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D) and sample ids (N,) as a run's evaluation computes them."""
    config = load_config(QUICKSTART, [f"data.image_size={SIZE}"])
    job = Job(config, dataset.directory, run, run, "", "", Path(), False, {}, {})
    view = dataset.select(dataset.identities)
    vectors, _, ids = gather_all(embedded(job, net.eval(), DIM, view, World())(), World())
    return vectors.numpy(), ids.numpy()


def space_of(net: nn.Module) -> str:
    """As reports, maps and the next run name it."""
    return freeze_net(net, "tiny8", DIM, OUR_INPUT).fingerprint


def lce(*words: object) -> int:
    return main(["embed", *map(str, words), "--device", "cpu"])


def refusal(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    capsys.readouterr()
    assert lce(*words) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lce: ")]
    return line


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".npy"])
def test_vectors_are_those_of_evaluation(tmp_path, photos, run_dir, suffix, capsys):
    packed = pack_folder(photos, tmp_path / "packed", "photos")
    net = build_net("tiny8", DIM, SIZE, seed=2)
    truth, ids = evaluated(tmp_path, net, packed)
    out = tmp_path / "out" / f"new{suffix}"
    assert lce(run_dir / "new", tmp_path / "packed", "--out", out) == 0
    assert "300 unit vectors of 24 values, 30 identities" in capsys.readouterr().out
    keys, rows, who, space = read(out)
    assert keys == sorted(keys) and who == [key.partition("/")[0] for key in keys]
    place = {int(key.partition("/")[2]): row for row, key in enumerate(keys)}
    np.testing.assert_array_equal(rows[[place[int(one)] for one in ids]], truth)
    assert space == space_of(net)
    assert {path.stat().st_mode & 0o777 for path in out.parent.iterdir()} == {0o600}
    assert out.parent.stat().st_mode & 0o777 == 0o700
    # the same images as a folder, under their own names
    if suffix == ".npz":
        assert lce(run_dir / "new", photos, "--out", tmp_path / "named.npz") == 0
        named, again, people, _ = read(tmp_path / "named.npz")
        assert named == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg"))
        assert people == [key.partition("/")[0] for key in named]
        lines = tmp_path / "names.txt"
        lines.write_text("".join(f"{name}\n" for name in reversed(named)))
        assert lce(run_dir / "new", tmp_path / "packed", "--names", lines, "--out", tmp_path / "told.npz") == 0
        told = read(tmp_path / "told.npz")
        assert told[0] == named
        np.testing.assert_array_equal(told[1], again)
        assert {row.tobytes() for row in again} == {row.tobytes() for row in rows}


def test_a_name_stands_for_its_own_image(tmp_path, photos, run_dir):
    lce(run_dir / "new", photos, "--out", tmp_path / "new.npz")
    keys, rows, _, _ = read(tmp_path / "new.npz")
    net = build_net("tiny8", DIM, SIZE, seed=2).eval()
    for key in (keys[3], keys[177]):
        pixels = torch.from_numpy(np.asarray(Image.open(photos / key), dtype=np.float32)).permute(2, 0, 1)
        with torch.no_grad():
            one = F.normalize(net(pixels[None] / 127.5 - 1.0))[0].numpy()
        cos = rows @ one
        assert keys[int(np.argmax(cos))] == key and cos.max() > 0.999  # two decoders differ by a grey level


def test_mirrored_vectors_are_averaged_and_of_a_space_of_their_own(tmp_path, photos, run_dir):
    lce(run_dir / "new", photos, "--out", tmp_path / "flip.npz", "--flip-average")
    lce(run_dir / "new", photos, "--out", tmp_path / "plain.npz")
    mirrored = tmp_path / "mirrored"
    for path in sorted(photos.rglob("*.jpg")):
        target = mirrored / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target.with_suffix(".png"))
    lce(run_dir / "new", mirrored, "--out", tmp_path / "mirrored.npz")
    flip, plain, other = (read(tmp_path / f"{name}.npz") for name in ("flip", "plain", "mirrored"))
    both = plain[1] + other[1]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    near, plain_near = (np.einsum("nd,nd->n", one[1], both) for one in (flip, plain))
    assert near.min() > 0.99 and (near > plain_near).all()  # the mirrored files were compressed once more
    assert flip[3] != plain[3] == other[3]


def test_model_files_are_read_as_old_weights_are(tmp_path, photos, run_dir, capsys):
    net = build_net("tiny8", DIM, SIZE, seed=2).eval()
    torch.save(net.state_dict(), tmp_path / "tensors.pt")
    torch.jit.trace(net, torch.zeros(2, 3, SIZE, SIZE)).save(str(tmp_path / "traced.pt"))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(net, (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "program.pt2")
    lce(run_dir / "new", photos, "--out", tmp_path / "run.npz")
    plain = read(tmp_path / "run.npz")
    tensors = ("--net", "tiny8", "--embedding-dim", DIM)
    for name, more in (("tensors.pt", tensors), ("traced.pt", ()), ("program.pt2", ())):
        out = tmp_path / f"{name}.npz"
        assert lce(tmp_path / name, photos, "--image-size", SIZE, *more, "--out", out) == 0
        keys, rows, _, space = read(out)
        assert keys == plain[0]
        np.testing.assert_allclose(rows, plain[1], atol=2e-5)
        file = ModelFile(tmp_path / name, *(tensors[1::2] if more else (None, None)))
        assert space == open_model(file, SIZE, torch.device("cpu")).fingerprint
    # channels and pixel scale
    spec = ("--channels", "bgr", "--mean", 100, 110, 120, "--std", 50, 60, 70)
    assert lce(tmp_path / "traced.pt", photos, "--image-size", SIZE, *spec, "--out", tmp_path / "bgr.npz") == 0
    model = open_model(
        ModelFile(tmp_path / "traced.pt", input=InputSpec(None, "bgr", (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))),
        SIZE,
        torch.device("cpu"),
    )
    packed = pack_folder(photos, tmp_path / "packed", "photos")
    truth, _ = evaluated(tmp_path, model, packed)
    bgr = read(tmp_path / "bgr.npz")
    assert bgr[3] == model.fingerprint
    assert {row.tobytes() for row in bgr[1]} == {row.tobytes() for row in truth}
    # a file that would run a program, and settings that a run has already
    torch.save(nn.Linear(2, 2), tmp_path / "code.pt")
    assert "holds code" in refusal(capsys, tmp_path / "code.pt", photos, *tensors, "--out", tmp_path / "x.npz")
    assert "--net is for a model file" in refusal(
        capsys, run_dir / "new", photos, "--net", "tiny8", "--out", tmp_path / "x.npz"
    )
    assert "set net and embedding_dim" in refusal(capsys, tmp_path / "tensors.pt", photos, "--out", tmp_path / "x.npz")


def test_a_stage_tells_what_it_is(tmp_path, photos, run_dir, capsys):
    """With or without its run; the given weights of a run; the rotation that is part of a new model."""
    lce(run_dir / "old", photos, "--out", tmp_path / "old.npz")
    old = read(tmp_path / "old.npz")
    assert old[3] == space_of(build_net("tiny8", DIM, SIZE, seed=1))
    alone = tmp_path / "copied"
    alone.mkdir()
    (alone / "model.safetensors").write_bytes((run_dir / "old" / "model.safetensors").read_bytes())
    lce(alone, photos, "--out", tmp_path / "alone.npz")
    np.testing.assert_array_equal(read(tmp_path / "alone.npz")[1], old[1])
    # a run whose old model was given as a file
    config = json.loads((run_dir / "resolved.json").read_text())
    config["old"]["weights"] = str(run_dir / "old" / "model.safetensors")
    other = tmp_path / "runs" / "next"
    other.mkdir()
    (other / "resolved.json").write_text(json.dumps(config))
    lce(other / "old", photos, "--out", tmp_path / "given.npz")
    given = read(tmp_path / "given.npz")
    np.testing.assert_array_equal(given[1], old[1])
    file = ModelFile(run_dir / "old" / "model.safetensors", "tiny8", DIM)
    assert given[3] == open_model(file, SIZE, torch.device("cpu")).fingerprint
    assert "has not finished" in refusal(capsys, other / "new", photos, "--out", tmp_path / "x.npz")
    # mapping-direct
    config = json.loads((run_dir / "resolved.json").read_text())
    config["compat"] = {"mode": "mapping-direct"}
    (run_dir / "resolved.json").write_text(json.dumps(config))
    net = build_net("tiny8", DIM, SIZE, seed=2)
    fold_rotation(net, torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)))[0])
    card = {"stage": "new rotated", "net": "tiny8", "embedding_dim": str(DIM), "image_size": str(SIZE)}
    save_weights(net, run_dir / "new" / "model.safetensors", card)
    lce(run_dir / "new", photos, "--out", tmp_path / "turned.npz")
    turned = read(tmp_path / "turned.npz")
    assert turned[3] == space_of(net) != space_of(build_net("tiny8", DIM, SIZE, seed=2))


def test_a_map_is_applied_and_checked(tmp_path, photos, run_dir, capsys):
    space = space_of(build_net("tiny8", DIM, SIZE, seed=2))
    card = {"kind": "linear", "dim_in": DIM, "dim_out": 10, "direction": "new_to_old"}
    made = build_bridge("linear", DIM, 10, seed=3).eval()
    save_bridge(tmp_path / "bridge", made, {**card, "from_space": space, "to_space": "old space"})
    lce(run_dir / "new", photos, "--out", tmp_path / "mapped.npz", "--bridge", tmp_path / "bridge")
    lce(run_dir / "new", photos, "--out", tmp_path / "plain.npz")
    mapped, plain = read(tmp_path / "mapped.npz"), read(tmp_path / "plain.npz")
    np.testing.assert_allclose(mapped[1], map_rows(made, torch.from_numpy(plain[1])).numpy(), atol=1e-6)
    assert (mapped[0], mapped[3]) == (plain[0], "old space")
    line = refusal(capsys, run_dir / "old", photos, "--out", tmp_path / "x.npz", "--bridge", tmp_path / "bridge")
    assert f"'{space}'" in line and "fitted to this model" in line and not (tmp_path / "x.npz.partial").exists()


def test_the_same_command_goes_on(tmp_path, photos, run_dir, capsys, monkeypatch):
    lce(run_dir / "new", photos, "--out", tmp_path / "whole.npz")
    out, work = tmp_path / "new.npz", tmp_path / "new.npz.partial"
    seen: list[int] = []
    check = embed._check

    def stopped(unit_bD: np.ndarray, keys: list[str], first: int) -> None:
        seen.append(first)
        if first >= 128:
            raise KeyboardInterrupt
        check(unit_bD, keys, first)

    monkeypatch.setattr(embed, "_check", stopped)
    assert lce(run_dir / "new", photos, "--out", out) == 5
    assert str(work) in capsys.readouterr().err and not out.exists()
    assert work.stat().st_mode & 0o777 == 0o700
    with (work / "rows.f32").open("ab") as file:  # a row that was cut off
        file.write(b"\x00" * 100)
    seen.clear()
    monkeypatch.setattr(embed, "_check", lambda *words: (seen.append(words[2]), check(*words)))
    assert lce(run_dir / "new", photos, "--out", out) == 0
    assert seen == [128, 256] and "going on after 128 of 300 images" in capsys.readouterr().err
    for one, other in zip(read(out), read(tmp_path / "whole.npz"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not work.exists()
    assert "exists and is not overwritten" in refusal(capsys, run_dir / "new", photos, "--out", out, code=1)
    # another model begins anew
    monkeypatch.setattr(embed, "_check", stopped)
    lce(run_dir / "new", photos, "--out", tmp_path / "two.npz")
    seen.clear()
    monkeypatch.setattr(embed, "_check", lambda *words: (seen.append(words[2]), check(*words)))
    assert lce(run_dir / "old", photos, "--out", tmp_path / "two.npz") == 0
    assert seen == [0, 128, 256]


def test_flat_folders_and_images_that_are_none(tmp_path, photos, run_dir, capsys):
    flat = tmp_path / "lfw"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:20]):
        (flat / f"{number:06}.jpg").write_bytes(path.read_bytes())
    (flat / "pairs.csv").write_text("first,second,genuine\n000000.jpg,000001.jpg,1\n000000.jpg,000010.jpg,0\n")
    assert lce(run_dir / "new", flat, "--out", tmp_path / "lfw.parquet") == 0
    keys, _, who, _ = read(tmp_path / "lfw.parquet")
    assert keys == [f"{number:06}.jpg" for number in range(20)] and who is None
    assert (
        main(["evaluate", "pairs", str(flat / "pairs.csv"), "--query", str(tmp_path / "lfw.parquet"), "--folds", "0"])
        == 0
    )
    (flat / "000007.jpg").write_bytes(b"no image")
    assert "000007.jpg" in refusal(capsys, run_dir / "new", flat, "--out", tmp_path / "x.npz")
    assert not (tmp_path / "x.npz.partial").exists()
    assert "does not exist" in refusal(capsys, run_dir / "new", tmp_path / "none", "--out", tmp_path / "x.npz")
    assert "must be .parquet" in refusal(capsys, run_dir / "new", flat, "--out", tmp_path / "x.csv")
    (tmp_path / "few.txt").write_text("p00/0.jpg\n")
    pack_folder(photos, tmp_path / "packed", "photos")
    line = refusal(
        capsys, run_dir / "new", tmp_path / "packed", "--names", tmp_path / "few.txt", "--out", tmp_path / "x.npz"
    )
    assert "names 1 of the 300 images" in line


def test_a_model_without_a_direction_is_an_error(tmp_path, photos, run_dir, capsys):
    net = build_net("tiny8", DIM, SIZE, seed=2)
    with torch.no_grad():
        next(iter(net.parameters())).fill_(float("nan"))
    save_weights(net, run_dir / "new" / "model.safetensors", {})
    assert "without a direction" in refusal(capsys, run_dir / "new", photos, "--out", tmp_path / "x.npz", code=1)


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"line\nbreak.jpg"])
def test_a_name_that_no_vector_can_have_is_refused_before_the_work(
    name: bytes, tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd" / "ann"
    folder.mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE)).save(folder / "1.jpg")
    (folder / "1.jpg").rename(folder / os.fsdecode(name))
    assert main(["embed", str(run_dir / "new"), str(folder.parent), "--out", str(tmp_path / "odd.parquet")]) == 2
    error = capsys.readouterr().err
    assert "must have a name of UTF-8 text without line breaks" in error and "Traceback" not in error
    assert not list(tmp_path.glob("odd.parquet*"))
