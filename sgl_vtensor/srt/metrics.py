"""Figures for Prometheus, on SGLang's own ``/metrics`` (``--enable-metrics``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_vtensor.vmm.base import CALL_SECONDS

WAIT_BUCKETS_SECONDS = (50e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)

GAUGES: dict[str, str] = {
    "limit_bytes": "KV memory that may be backed now.",
    "capacity_bytes": "KV memory that the pool can hold at most.",
    "backed_bytes": "Physical memory of the pool's pages; one page of padding comes on top.",
    "used_bytes": "Memory of pages in use: by requests, or by cached prefixes.",
    "cached_bytes": "Memory of cached prefixes.",
    "free_backed_bytes": "Memory of free pages that is kept ready.",
    "shared_pages": "Pages that more than one running request has.",
    "running_pages": "Pages that running requests have, each counted once.",
    "seen_pages": "The same, counted for each request that has it.",
    "mappings": "Mappings of pages in rows.",
}
COUNTERS: dict[str, str] = {
    "pages_created": "Pages that were given physical memory.",
    "pages_created_ahead": "Those of them that no launch waited for.",
    "pages_released": "Pages given back to the device.",
    "mappings_ahead": "Mappings made for requests that waited.",
    "tokens_hit": "Tokens of prompts that were found in the cache.",
    "tokens_computed": "Tokens of prompts that were not.",
    "tokens_copied": "Cached tokens that were copied into a request's own page.",
    "decode_pages": "Pages that decode steps looked at, counted for each request and step.",
    "decode_pages_saved": "Those of them that were read together with another request's.",
}
"""Each is a key of ``Runtime.stats``."""


class Metrics:
    """What ``Runtime.stats`` says, for Prometheus. All names begin with ``vtensor_``.

    Args:
        labels: those of SGLang's own scheduler metrics, so that dashboards join them.
        registry: where they are kept; by default where SGLang's are.
    """

    def __init__(self, labels: Mapping[str, str], *, registry: Any = None) -> None:
        # Not at import: prometheus_client chooses its storage when SGLang has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        names, where = list(labels), {"registry": registry or REGISTRY}

        def gauge(name: str, text: str, *more: str) -> Any:
            return Gauge(f"vtensor_{name}", text, [*names, *more], multiprocess_mode="mostrecent", **where)

        def counter(name: str, text: str, *more: str) -> Any:
            return Counter(f"vtensor_{name}", text, [*names, *more], **where)

        self._labels = dict(labels)
        self._gauges = {name: gauge(name, text) for name, text in GAUGES.items()}
        self._counters = {name: counter(name, text) for name, text in COUNTERS.items()}
        self._rows = gauge("rows", "Rows by state.", "state")
        self._errors = counter("driver_errors", "Calls that the driver refused, by kind.", "kind")
        self._seconds = Histogram(
            "vtensor_driver_seconds", "Calls of the driver by kind.", [*names, "kind"], buckets=CALL_SECONDS, **where
        )
        self._evicted = counter("pages_evicted", "Cached pages dropped by us, by reason.", "reason")
        self._waits = Histogram(
            "vtensor_mapping_wait_seconds",
            "How long launches waited for mappings.",
            names,
            buckets=WAIT_BUCKETS_SECONDS,
            **where,
        )
        self._counted: dict[tuple[str, str], float] = {}

    def update(
        self, stats: Mapping[str, Any], waits_seconds: list[float], driver_histogram: Mapping[str, list[int]]
    ) -> None:
        """Take over the figures.

        Args:
            waits_seconds: every wait for mappings since the last update.
            driver_histogram: ``VmmDriver.histogram``.
        """
        page_bytes = stats["page_bytes"]
        values = {
            "limit_bytes": stats["limit_bytes"],
            "capacity_bytes": stats["num_pages"] * page_bytes,
            "backed_bytes": stats["backed_bytes"],
            "used_bytes": stats["pages_in_use"] * page_bytes,
            "cached_bytes": stats["pages_cached"] * page_bytes,
            "free_backed_bytes": stats["pages_free_backed"] * page_bytes,
            "shared_pages": stats["pages_shared"],
            "running_pages": stats["pages_running"],
            "seen_pages": stats["pages_seen"],
            "mappings": stats["mappings"],
        }
        for name, value in values.items():
            self._gauges[name].labels(**self._labels).set(value)
        for state in ("running", "parked"):
            self._rows.labels(**self._labels, state=state).set(stats[f"rows_{state}"])
        for name, counter in self._counters.items():
            self._count(counter, name, stats[name])
        for kind, errors in stats["driver_errors"].items():
            self._count(self._errors, "errors", errors, kind=kind)
            self._add_calls(kind, driver_histogram[kind], stats["driver_seconds"][kind])
        for reason in ("limit", "age"):
            self._count(self._evicted, "evicted", stats[f"pages_evicted_by_{reason}"], reason=reason)
        for seconds in waits_seconds:
            self._waits.labels(**self._labels).observe(seconds)

    def _add_calls(self, kind: str, counts: list[int], seconds: float) -> None:
        """The driver has counted already: to ``observe`` each call here would cost as much as the call."""
        child = self._seconds.labels(**self._labels, kind=kind)
        for bucket, (place, total) in zip(child._buckets, enumerate(counts), strict=True):
            bucket.inc(self._new((f"calls_{kind}", str(place)), total))
        child._sum.inc(self._new(("seconds", kind), seconds))

    def _count(self, counter: Any, name: str, total: float, **more: str) -> None:
        counter.labels(**self._labels, **more).inc(self._new((name, next(iter(more.values()), "")), total))

    def _new(self, key: tuple[str, str], total: float) -> float:
        """Counters of Prometheus take steps; ours are totals."""
        step = total - self._counted.get(key, 0)
        self._counted[key] = total
        return step
