"""The dashboard and the alerts ask for figures that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent / "dashboards"


def made() -> set[str]:
    """Names of all our metrics, as Prometheus stores them."""
    from prometheus_client import CollectorRegistry

    from sgl_vtensor.srt.metrics import Metrics
    from sgl_vtensor.vmm.base import CALL_SECONDS

    registry = CollectorRegistry()
    metrics = Metrics({"model_name": "m"}, registry=registry)
    counts = """page_bytes limit_bytes num_pages backed_bytes pages_in_use pages_cached pages_free_backed pages_shared
        pages_running pages_seen mappings rows_running rows_parked pages_created pages_released tokens_copied tokens_hit
        tokens_computed pages_evicted_by_limit pages_evicted_by_age mappings_ahead pages_created_ahead decode_pages
        decode_pages_saved"""
    figures: dict[str, Any] = dict.fromkeys(counts.split(), 1)
    drivers = {"driver_errors": {"map": 1}, "driver_seconds": {"map": 1.0}}
    metrics.update(figures | drivers, [0.001], {"map": [1] * (len(CALL_SECONDS) + 1)})
    return {sample.name for family in registry.collect() for sample in family.samples}


def strings(value: Any, key: str) -> Iterator[str]:
    """All strings under ``key``, however deep."""
    if isinstance(value, dict):
        for name, more in value.items():
            if name == key and isinstance(more, str):
                yield more
            yield from strings(more, key)
    elif isinstance(value, list):
        for more in value:
            yield from strings(more, key)


def test_every_figure_that_is_asked_for_is_made() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    alerts = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    asked = [*strings(dashboard, "expr"), *strings(dashboard, "query"), *strings(alerts, "expr")]
    assert len(asked) > 15
    names = {name for text in asked for name in re.findall(r"\bvtensor_\w+", text)}
    known = made()
    assert names <= known
    left = {name for name in known if not name.endswith(("_created", "_count")) and name not in names}
    assert left <= {"vtensor_capacity_bytes", "vtensor_tokens_copied_total"}, "figures that nobody looks at"


def test_panels_do_not_lie_on_each_other() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(places) == len(set(places)) == len({panel["id"] for panel in dashboard["panels"]})
