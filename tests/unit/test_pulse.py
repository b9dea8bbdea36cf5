"""A run that stands still: when it is told, and whom it names."""

from __future__ import annotations

import threading
import time

from launch.pulse import Place, Pulse, Stall, missing, where_is, whom_it_waits_for
from lce_dist.training.flight import FlightRecord


def steps(stall: Stall, first: int, last: int, every_s: float) -> float:
    for step in range(first, last):
        stall.see(metrics(step), step * every_s)
    return (last - 1) * every_s


def metrics(step: int, stage: str = "new") -> dict[str, object]:
    return {"type": "metrics", "stage": stage, "step": step, "total_steps": 1000, "metrics": {"loss/total": 1.0}}


def test_told_once_and_again_after_it_went_on():
    stall = Stall(10.0)
    last_s = steps(stall, 1, 10, 1.0)
    assert not stall.is_new(last_s + 9.0)
    assert stall.is_new(last_s + 11.0) and not stall.is_new(last_s + 12.0)
    stall.see(metrics(10), last_s + 20.0)
    assert not stall.is_new(last_s + 21.0) and stall.is_new(last_s + 31.0)


def test_slow_steps_and_the_first_ones_get_longer():
    stall = Stall(10.0)
    last_s = steps(stall, 1, 10, 8.0)
    assert not stall.is_new(last_s + 39.0) and stall.is_new(last_s + 41.0)
    stall = Stall(10.0)
    stall.see(metrics(1), 0.0)
    assert not stall.is_new(49.0) and stall.is_new(51.0)


def test_only_a_stage_that_trains_can_stall():
    stall = Stall(10.0)
    assert stall.seconds(1e6) == 0.0 and not stall.is_new(1e6)
    last_s = steps(stall, 1, 10, 1.0)
    stall.see({"type": "checkpoint", "stage": "new", "step": 9}, last_s + 8.0)
    assert not stall.is_new(last_s + 15.0)
    for event in (metrics(1000), {"type": "stage_done", "stage": "new"}, {"type": "workers_up", "num_ranks": 2}):
        steps(stall, 1, 10, 1.0)
        stall.see(event, 20.0)
        assert not stall.is_new(1e6), event


def place(rank: int, where: str, waits: bool) -> Place:
    return Place(rank, f"host{rank}", 100 + rank, f"node{rank}", where, waits)


def test_the_one_that_is_not_in_the_collective_is_named():
    places = {rank: (place(rank, "lce_dist/head/layer.py:9 in forward", True), 1.0) for rank in (0, 1, 3, 4)}
    places[2] = place(2, "pipelines/stream.py:77 in __next__", False), 2.0
    assert whom_it_waits_for(places) == (
        "rank 2 (host2, pid 102) is at pipelines/stream.py:77 in __next__; "
        "ranks 0-1, 3-4 wait for others at lce_dist/head/layer.py:9 in forward"
    )
    assert [one.rank for one in missing(places)] == [2]


def test_one_that_says_nothing_any_more_is_named():
    places = {0: (place(0, "a.py:1 in f", True), 1.0), 1: (place(1, "b.py:2 in g", False), 50.0)}
    assert whom_it_waits_for(places) == (
        "rank 1 (host1, pid 101) has not been heard of for 50 s; rank 0 waits for others at a.py:1 in f"
    )
    assert [one.rank for one in missing(places)] == [1]


def test_nobody_is_ended_where_nobody_waits():
    places = {rank: (place(rank, "lce_dist/storage.py:9 in save", False), 1.0) for rank in range(3)}
    assert missing(places) == [] and whom_it_waits_for(places) == "ranks 0-2 are at lce_dist/storage.py:9 in save"
    assert whom_it_waits_for({}) == "no worker has been heard of"


class SlowList(list):
    def append(self, value):
        time.sleep(5.0)


def test_a_thread_is_found_in_our_code():
    record = FlightRecord.__new__(FlightRecord)
    record._steps, record._mark = SlowList(), 0.0
    thread = threading.Thread(target=lambda: record.note(1, 0.0, 1, 0.1, 0.1, None, None), daemon=True)
    thread.start()
    time.sleep(0.3)
    where, waits = where_is(thread.ident)
    assert where.startswith("lce_dist/training/flight.py:") and where.endswith(" in note") and not waits


def test_the_pulse_beats_while_its_block_lasts():
    told = []
    with Pulse(3, "node", told.append):
        deadline_s = time.monotonic() + 5.0
        while not told and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert told and told[0]["rank"] == 3 and Place(**told[0]).node_id == "node"
