"""A pod that is asked to go: it asks its run to save, and goes when that is done, at once where nothing trains, or after its time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from launch import leaving
from launch.leaving import main, save
from lce_dist.training.requests import SAVE_FILE

CHECKOUT = Path(__file__).resolve().parents[2]


def run_at(root: Path, name: str) -> Path:
    run = root / name
    checkpoint(run, 10)
    (run / "config.json").write_text("{}")
    (run / "launch.json").write_text("{}")
    return run


def checkpoint(run: Path, step: int) -> None:
    folder = run / "new" / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")


def answer(run: Path, step: int) -> threading.Thread:
    """A stage that trains: it takes the request away, writes for a while, and commits."""

    def work() -> None:
        while not (run / SAVE_FILE).exists():
            time.sleep(0.01)
        (run / SAVE_FILE).unlink()
        (run / "new" / "checkpoints" / f"step-{step:08d}.partial").mkdir()
        time.sleep(0.5)
        checkpoint(run, step)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def took_s(run: Path, grace_s: float) -> tuple[list[str], float]:
    started = time.monotonic()
    return save([run], grace_s), time.monotonic() - started


def test_it_waits_for_the_checkpoint_and_no_longer(tmp_path: Path) -> None:
    assert leaving._SAVE_FILE == SAVE_FILE
    run = run_at(tmp_path, "one")
    trains = answer(run, 20)
    said, seconds = took_s(run, 30.0)
    trains.join()
    assert said[0].startswith(f"{run}: saved as new/step-00000020 (") and 0.4 < seconds < 5.0


def test_a_checkpoint_of_the_same_step_written_again_counts(tmp_path: Path) -> None:
    run = run_at(tmp_path, "one")
    trains = answer(run, 10)
    said, _ = took_s(run, 30.0)
    trains.join()
    assert "saved as new/step-00000010" in said[0]


def test_nobody_who_answers_costs_the_time_and_no_more(tmp_path: Path) -> None:
    run = run_at(tmp_path, "one")
    said, seconds = took_s(run, 0.5)
    assert said == [f"{run}: not saved within 0.5 s"] and seconds < 3.0
    assert (run / SAVE_FILE).exists()


def test_what_does_not_train_holds_no_pod_up(tmp_path: Path) -> None:
    for name in ("report.json", "failure.log"):
        run = run_at(tmp_path, name)
        (run / name).write_text("{}")
        assert took_s(run, 30.0)[0] == [] and not (run / SAVE_FILE).exists()
        later = (run / name).stat().st_mtime_ns + 10**9  # started again since
        os.utime(run / "launch.json", ns=(later, later))
        assert took_s(run, 0.3)[0] == [f"{run}: not saved within 0.3 s"]
    assert save([tmp_path / "nobody"], 30.0) == []


def test_the_command_knows_a_run_from_a_folder_of_runs(tmp_path: Path) -> None:
    one, two = run_at(tmp_path, "one"), run_at(tmp_path, "two")
    assert main([str(one), "0.1"]) == 0
    assert (one / SAVE_FILE).exists() and not (two / SAVE_FILE).exists()
    assert main([str(tmp_path), "0.1"]) == 0
    assert (two / SAVE_FILE).exists()


def test_it_starts_in_a_moment(tmp_path: Path) -> None:
    words = "import sys; import launch.leaving; print('torch' in sys.modules or 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
