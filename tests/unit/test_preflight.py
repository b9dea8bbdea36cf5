"""What is looked at before a run spends anything."""

from __future__ import annotations

import http.server
import os
import threading
from pathlib import Path

import pytest

from launch.cli import main
from launch.preflight import (
    Gpu,
    check_plan,
    check_space,
    check_writable,
    checkpoint_bytes,
    gpu_of_cluster,
    gpu_of_kind,
    memory_note,
    notes,
    unreachable_tracking,
)
from launch.prepare import prepare
from launch.runs_cli import node_range
from launch.train import TrainOptions
from lce_dist.config import load_config
from lce_dist.errors import ConfigError, SetupError
from lce_dist.models.catalog import build_net
from pipelines.pack import pack_images
from tests.unit.test_verify import jpeg

CONFIG = """
[data]
image_size = 32
heldout_identities = 4
[data.synthetic]
identities = 12
photos_per_identity = 3
photo_size = 32
[old]
net = "tiny8"
embedding_dim = 16
epochs = 1.0
[new]
net = "tiny8"
embedding_dim = 16
epochs = 2.0
[head]
loss = "softmax"
[optim]
global_batch = 8
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "small.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_check_tells_what_would_be_and_leaves_no_run(workplace, capsys):
    assert main(["train", "--config", "small.toml", "--check", "--nodes", "1:2", "--with-independent"]) == 0
    told = capsys.readouterr().out
    assert (
        "data: 8 identities to train on, 4 held out; old model: 2 steps; new model: 6 steps; independent model: 6"
        in told
    )
    assert "checked: nothing was trained" in told and "GPU memory: no GPU is used" in told
    assert not (workplace / "runs" / "quickstart").exists()


def test_a_server_that_does_not_answer_is_told_and_no_error(workplace, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["train", "--config", "small.toml", "--check"]) == 0
    assert "MLflow at http://127.0.0.1:9 does not answer (" in capsys.readouterr().out


def test_servers_that_answer():
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path.split("/")[1]))
            self.end_headers()

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert [unreachable_tracking(f"{base}/{code}") for code in (200, 401, 404)] == [None] * 3
        assert unreachable_tracking(f"{base}/503") == "it answers 503"
        server.shutdown()
    assert unreachable_tracking("sqlite:///x.db") is None


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, workplace, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/nothing")):
        with pytest.raises(SetupError, match=rf"run.dir is {place}; it cannot be written: .*\. Use another --run-dir"):
            check_writable(place)
    assert main(["train", "--config", "small.toml", "--run-dir", "/proc/nothing"]) == SetupError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
    check_writable(tmp_path / "new" / "place")
    assert list((tmp_path / "new" / "place").iterdir()) == []


def test_room_for_checkpoints(workplace, monkeypatch):
    config = load_config(workplace / "small.toml")
    prepared = prepare(config, 1, False, workplace / "cache", lambda *count: None)
    parameters = sum(p.numel() for p in build_net("tiny8", 16, 32, seed=0).parameters())
    assert checkpoint_bytes(config, prepared) == 8 * parameters + 8 * 8 * 16
    check_space(config, prepared, workplace / "run")
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(SetupError, match=r"GiB free; 2 checkpoints \(checkpoint.keep\) and the one"):
        check_space(config, prepared, workplace / "run")


def test_memory_is_looked_at_before_a_gpu_is_taken(workplace):
    config = load_config(workplace / "small.toml")
    many = (10_000_000, 200_000_000)
    need = check_plan(config, *many, gpu_of_kind("h200"), 1, 1)
    assert need == pytest.approx(check_plan(config, *many, Gpu("a card", need + 1.0), 1, 1))
    with pytest.raises(SetupError, match=r"needs .* GB a rank; a rank of a card can use"):
        check_plan(config, *many, Gpu("a card", need - 1.0), 1, 1)
    h200 = gpu_of_kind("h200")
    assert f"a rank needs {need / 1e9:.1f} GB by lce plan; h200 has" in memory_note(config, many, True, h200, 1, 1)
    assert "not known" in memory_note(config, many, True, None, 1, 1)
    assert "not known" in memory_note(config, None, True, h200, 1, 1)
    assert "no GPU" in memory_note(config, many, False, None, 1, 1)
    with pytest.raises(ConfigError, match="--gpu is 'h300'; must be one of h200, h100, a100, l4"):
        gpu_of_kind("h300")


def test_what_a_cluster_says_of_its_gpus():
    assert gpu_of_cluster({"H100", "L4"}) == gpu_of_kind("l4")
    assert gpu_of_cluster({"A100-80G"}) == gpu_of_kind("a100")
    for unknown in (set(), {"A100"}, {"H100", "V100"}):
        assert gpu_of_cluster(unknown) is None


def test_a_run_on_kubernetes_is_looked_at_from_here(workplace, capsys):
    command = ["train", "--config", "small.toml", "--target", "k8s", "--nodes", "2", "--check"]
    assert main([*command, "--gpu", "l4"]) == 0
    told = capsys.readouterr().out
    assert "data: 8 identities and 24 images to train on; the batch divides" in told
    assert "GPU memory: a rank needs " in told and "l4 has 23.6 GB" in told
    assert "the RayJob would be lce-dist/quickstart-" in told and "nothing was submitted" in told
    assert main(command) == 0
    assert "GPU memory: not known" in capsys.readouterr().out
    for more, words in (
        (["--nodes", "3"], "optim.global_batch is 8; must be a multiple of ranks"),
        (["--gpu", "h300"], "--gpu is 'h300'"),
        (["--set", "compat.method=nothing"], "compat.method"),
        (
            ["--set", "data.synthetic=none", "--set", 'data.shards="/somewhere/faces"'],
            "data.shards is '/somewhere/faces'",
        ),
        (["--set", "data.synthetic.identities=4"], "data.heldout_identities"),
    ):
        assert main([*command, *more]) == 2, more
        assert words in capsys.readouterr().err
    big = ["--set", "data.synthetic.identities=400000000", "--gpu", "l4"]
    assert main([*command, *big]) == 4
    assert "a rank of l4 can use" in capsys.readouterr().err
    inside = ["--set", "data.synthetic=none", "--set", 'data.shards="/data/faces"', "--gpu", "l4"]
    assert main([*command, *inside]) == 0
    told = capsys.readouterr().out
    assert "data: in the claim" in told and "GPU memory: not known" in told and "what data.shards name there" in told


def test_numbers_of_nodes():
    assert node_range("4") == (None, 4) and node_range("2:4") == (2, 4)
    options = TrainOptions(4, 2, False, False, False, 2)
    assert options.nodes_text == "2:4" and list(options.possible_ranks) == [4, 5, 6, 7, 8]
    assert TrainOptions(4, 1, False, False, False).nodes_text == "4"
    for least, most in ((0, 4), (5, 4)):
        with pytest.raises(ConfigError, match=f"--nodes is {least}:{most}; the first must be at least 1"):
            TrainOptions(most, 1, False, False, False, least)
    with pytest.raises(SystemExit):
        main(["train", "--nodes", "two"])


@pytest.mark.parametrize(("shuffle", "shuffled", "told"), [
    ("blocks", False, True), ("blocks", None, False), ("blocks", True, False), ("global", False, False),
])  # fmt: skip
def test_block_shuffling_of_what_is_not_shuffled_is_told(workplace, shuffle, shuffled, told):
    photos = [(f"p{n // 2}", f"{n}.jpg", jpeg(n)) for n in range(12)]
    data = pack_images(photos, [f"p{n}" for n in range(6)], 12, workplace / "faces", "faces", "s", shuffled=shuffled)
    assert data.manifest.shuffled is shuffled
    text = CONFIG.replace("[data]", f'[data]\nshards = "faces"\nshuffle = "{shuffle}"')
    start, end = text.index("[data.synthetic]"), text.index("[old]")
    (workplace / "packed.toml").write_text(text[:start] + text[end:])
    found = [one for one in notes(load_config(workplace / "packed.toml"), workplace, data) if "shuffled: false" in one]
    assert len(found) == told
