"""What vTensor memory cost a server between two looks at its figures in ``/server_info``."""

from __future__ import annotations

import time
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from servers import Remote


@dataclass(frozen=True)
class Look:
    """A server's figures at one moment, ``at_s`` of ``time.perf_counter``."""

    at_s: float
    figures: dict[str, Any]
    """The vtensor section of ``/server_info``; empty for another server."""

    @classmethod
    def at(cls, server: Remote) -> Look:
        try:
            figures = server.vtensor()
        except (urllib.error.URLError, OSError, ValueError):
            figures = {}
        return cls(time.perf_counter(), figures)


Span = tuple[Look, Look]

UNITS = {
    "driver_calls_per_token": "1/tok",
    "driver_share": "1",
    "memory_look_share": "1",
    "memory_look_mean": "ms",
    "mapping_wait_share": "1",
    "mapping_wait_p99": "ms",
}


def costs(spans: Sequence[Span], output_tokens: int) -> dict[str, float]:
    """Of some spans of time together, in which so many tokens were generated; nothing for a stock server.

    Driver calls are of all kinds, whether a launch waited for them or not; looks at free memory are counted apart.
    Shares are of the time that passed, which is the scheduler's; ``mapping_wait_p99`` is its bucket's upper edge.
    """
    if not all(before.figures and after.figures for before, after in spans):
        return {}
    seconds = sum(after.at_s - before.at_s for before, after in spans)

    def grown(name: str) -> float:
        return float(sum(_total(after.figures[name]) - _total(before.figures[name]) for before, after in spans))

    found = {
        "driver_calls_per_token": grown("driver_calls") / max(1, output_tokens),
        "driver_share": grown("driver_seconds") / seconds,
        "memory_look_share": grown("memory_look_seconds") / seconds,
        "memory_look_mean": 1000 * grown("memory_look_seconds") / max(1.0, grown("memory_looks")),
        "mapping_wait_share": grown("mapping_wait_seconds") / seconds,
    }
    p99_s = _p99_seconds(spans)
    return found if p99_s is None else found | {"mapping_wait_p99": 1000 * p99_s}


def _p99_seconds(spans: Sequence[Span]) -> float | None:
    """None: nothing waited."""
    last = spans[-1][1].figures
    counts = [0] * len(last["mapping_wait_counts"])
    for before, after in spans:
        for at, count in enumerate(after.figures["mapping_wait_counts"]):
            counts[at] += count - before.figures["mapping_wait_counts"][at]
    seen, edges = 0, [*last["mapping_wait_buckets_seconds"], last["mapping_wait_longest_seconds"]]
    for count, edge in zip(counts, edges, strict=True):
        seen += count
        if count and seen >= 0.99 * sum(counts):
            return float(edge)
    return None


def _total(value: Any) -> float:
    return float(sum(value.values()) if isinstance(value, dict) else value)
