"""Failures count in a row only; progress between them begins the count anew."""

from __future__ import annotations

import pytest

from launch.failures import InARow


def test_failures_with_progress_between_never_end_a_run() -> None:
    failures = InARow(2)
    for _ in range(10):
        assert not failures.failed() and not failures.failed()
        failures.progressed()


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_one_more_than_is_borne_in_a_row(limit: int) -> None:
    failures = InARow(limit)
    assert [failures.failed() for _ in range(limit + 1)] == [False] * limit + [True]
    assert failures.count == limit + 1
