"""Measurements for status: the newest few hundred of one quantity."""

from __future__ import annotations

from collections import deque


class Samples:
    """The newest few hundred measurements of one quantity, in ms."""

    def __init__(self, size: int = 600) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        self._values.append(value)

    def quantiles(self) -> dict[str, float | None]:
        """{"p50", "p99"}, None before the first."""
        if not self._values:
            return {"p50": None, "p99": None}
        ordered = sorted(self._values)
        return {"p50": round(ordered[len(ordered) // 2], 2), "p99": round(ordered[int(len(ordered) * 0.99)], 2)}
