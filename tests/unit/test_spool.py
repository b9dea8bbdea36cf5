"""A spool keeps every record that append returned for, whatever was cut off behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lce_dist.errors import RunError
from lce_dist.spool import Spool, read_cursor, write_cursor


def _events(spool: Spool, offset: int = 0) -> list[dict]:
    return [event for event, _ in spool.read_from(offset)]


def _child(code: str, path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE, text=True)


def test_every_cut_of_the_last_record_leaves_the_others_and_accepts_new_ones(tmp_path: Path) -> None:
    first, last, new = {"a": 1}, {"b": "ünï\ncode", "c": [1.5, None]}, {"d": 2}
    path = tmp_path / "whole.jsonl"
    spool = Spool(path)
    spool.append(first)
    start = path.stat().st_size
    spool.append(last)
    spool.close()
    whole = path.read_bytes()
    assert len(whole) - start > 20
    for cut in range(start, len(whole) + 1):
        torn = tmp_path / f"cut{cut}.jsonl"
        torn.write_bytes(whole[:cut])
        spool = Spool(torn)
        spool.append(new)
        expected = [first, last, new] if cut == len(whole) else [first, new]
        assert _events(spool) == expected, cut
        assert spool.count_from(0) == len(expected)
        spool.close()


def test_a_torn_tail_longer_than_one_read_block_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"a":1}\n' + b'{"b":"' + b"x" * 200_000)
    spool = Spool(path)
    assert path.read_bytes() == b'{"a":1}\n'
    spool.close()
    path.write_bytes(b"y" * 200_000)
    spool = Spool(path)
    assert path.stat().st_size == 0
    spool.close()


def test_an_incomplete_line_is_not_read_until_it_is_complete(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.jsonl")
    spool.append({"a": 1})
    with open(spool.path, "ab") as file:
        file.write(b'{"b":')
        file.flush()
        assert _events(spool) == [{"a": 1}]
        assert spool.count_from(0) == 1
        file.write(b"2}\n")
    assert _events(spool) == [{"a": 1}, {"b": 2}]
    spool.close()


def test_offsets_continue_where_the_reader_stopped(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.jsonl")
    for number in range(10):
        spool.append({"n": number})
    offsets = [offset for _, offset in spool.read_from(0)]
    for number, offset in enumerate(offsets):
        assert _events(spool, offset) == [{"n": n} for n in range(number + 1, 10)]
        assert spool.count_from(offset) == 9 - number
    spool.close()


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b'{"half":\n', b"[1, 2]\n", b"\xff\xfe\n"])
def test_a_damaged_line_inside_becomes_an_empty_event(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"a":1}\n' + damage + b'{"b":2}\n')
    spool = Spool(path)
    assert _events(spool) == [{"a": 1}, {}, {"b": 2}]
    spool.close()


def test_threads_do_not_mix_their_records(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.jsonl")

    def write(thread: int) -> None:
        for number in range(200):
            spool.append({"thread": thread, "number": number, "filler": "x" * number})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = _events(spool)
    assert len(events) == 800
    for thread_number in range(4):
        assert [e["number"] for e in events if e["thread"] == thread_number] == list(range(200))
    spool.close()


def test_kill_9_loses_no_record_whose_append_returned(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom lce_dist.spool import Spool\ns = Spool(pathlib.Path(sys.argv[1]))\n"
        "n = 0\nwhile True:\n    s.append({'n': n})\n    sys.stdout.write(f'{n}\\n'); sys.stdout.flush()\n    n += 1\n"
    )
    path = tmp_path / "s.jsonl"
    expected_start = 0
    for _ in range(2):
        child = _child(code, path)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(500)]
        child.kill()
        lines += child.stdout.read().splitlines(keepends=True)
        acknowledged = max(int(line) for line in lines if line.endswith("\n"))
        child.wait()
        spool = Spool(path)
        numbers = [event["n"] for event in _events(spool)][expected_start:]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= acknowledged + 1
        expected_start += len(numbers)
        spool.close()


def test_a_second_process_is_refused_and_a_killed_one_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    code = (
        "import sys, pathlib, time\nfrom lce_dist.spool import Spool\n"
        "s = Spool(pathlib.Path(sys.argv[1]))\nprint('open', flush=True)\ntime.sleep(60)"
    )
    child = _child(code, path)
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=rf"pid {child.pid}\b.*run\.name"):
        Spool(path)
    child.kill()
    child.wait()
    Spool(path).close()


def test_a_full_disk_leaves_the_spool_as_it_was(tmp_path: Path) -> None:
    # A file size limit stands for the full disk: the kernel cuts the write short, then refuses it.
    code = (
        "import resource, signal, sys, pathlib\nfrom lce_dist.spool import Spool\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "s = Spool(pathlib.Path(sys.argv[1]))\ns.append({'a': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))\n"
        "try:\n    s.append({'b': 'x' * 100})\nexcept OSError:\n    print('refused')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "s.append({'c': 3})\ns.close()\n"
    )
    path = tmp_path / "s.jsonl"
    assert _child(code, path).communicate()[0] == "refused\n"
    assert path.read_text() == '{"a":1}\n{"c":3}\n'


def test_append_after_close_is_an_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.jsonl")
    spool.close()
    spool.close()
    with pytest.raises(ValueError, match="closed"):
        spool.append({"a": 1})


def test_the_cursor_is_replaced_as_a_whole_and_damage_reads_as_none(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    assert read_cursor(path) is None
    write_cursor(path, {"offset": 1})
    write_cursor(path, {"offset": 2, "steps": {"new": {"train/loss": 7}}})
    assert read_cursor(path) == {"offset": 2, "steps": {"new": {"train/loss": 7}}}
    assert list(tmp_path.iterdir()) == [path]
    whole = path.read_bytes()
    for cut in range(len(whole) - 2):
        path.write_bytes(whole[:cut])
        assert read_cursor(path) is None
    path.write_text(json.dumps([1]))
    assert read_cursor(path) is None
