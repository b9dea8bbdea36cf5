"""Failures in a row: what goes wrong now and then is tried again, what goes wrong without any progress between ends."""

from __future__ import annotations


class InARow:
    """Counts failures since the last progress. limit: how many are borne."""

    def __init__(self, limit: int) -> None:
        self._limit, self.count = limit, 0

    def failed(self) -> bool:
        """Count one more; whether that is more than are borne."""
        self.count += 1
        return self.count > self._limit

    def progressed(self) -> None:
        """Begin anew."""
        self.count = 0
