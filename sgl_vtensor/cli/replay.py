"""``sgl-vtensor replay FILE``: the trace of a server, run again here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sgl_vtensor.cli.progress import waiting
from sgl_vtensor.config import format_bytes
from sgl_vtensor.core.projection import project
from sgl_vtensor.core.replay import Figures, Result, replay
from sgl_vtensor.core.trace import Event, TraceReader

EVENTS_SHOWN = 1000


class ShownReader(TraceReader):
    """Says how far it has come."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        super().__init__(path)
        self._show = show

    def events(self) -> Iterator[Event]:
        for event in super().events():
            if event.number % EVENTS_SHOWN == 0:
                self._show(f"{event.number:,} events again")
            yield event


def run(path: Path, *, page_tokens: int | None, num_rows: int | None, check_every: int | None, as_json: bool) -> int:
    """Replay, compare, check, and say what it took; 1 if something broke."""
    with waiting("The trace is read") as show:
        reader = ShownReader(path, show)
        results = {"recorded": replay(reader, check_every=check_every)}
        if results["recorded"].broken is None and (page_tokens is not None or num_rows is not None):
            results["other"] = project(reader, page_tokens=page_tokens, num_rows=num_rows, check_every=check_every)
    broken = any(result.broken is not None for result in results.values())
    if as_json:
        print(json.dumps({name: _for_programs(result) for name, result in results.items()}, indent=1))
    else:
        _show(path, reader, results)
    return int(broken)


def _for_programs(result: Result) -> dict[str, Any]:
    figures = dataclasses.asdict(result.figures) | {"peak_bytes": result.figures.peak_bytes}
    broken = None
    if result.broken is not None:
        broken = {"event": result.broken.event.number, "op": result.broken.event.op.name, "what": result.broken.what}
    rest = {"driver": result.driver, "check_every": result.check_every, "bytes_left_out": result.bytes_left_out}
    return figures | rest | {"events": result.events, "seconds": result.seconds, "broken": broken}


def _show(path: Path, reader: TraceReader, results: dict[str, Result]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    header, recorded = reader.header, results["recorded"]
    console.print(
        f"{path}: a pool of {header.num_pages} pages of {header.layout.page_tokens} tokens "
        f"({format_bytes(header.layout.page_bytes)}), {header.num_rows - 1} rows, on the {header.driver} driver."
    )
    if recorded.bytes_left_out:
        console.print(f"Its end was not written whole: {recorded.bytes_left_out} bytes are left out.")
    for result in results.values():
        if result.broken is not None:
            console.print(f"BROKEN at {result.broken}", markup=False)
            return
    console.print(
        f"{recorded.events:,} events again in {recorded.seconds:.1f} s ({_rate(recorded):,.0f} a second), on the "
        f"{recorded.driver} driver, all tables checked after every {_nth(recorded.check_every)}: all as recorded."
    )
    table = Table("", "as recorded", *(["the other pool"] if "other" in results else []))
    columns = [_lines(result.figures) for result in results.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    if "other" in results:
        console.print(
            "In the other pool, requests and cached prefixes come and go when they did, and no limit of memory holds. "
            "Where its pages are smaller, the length of an answer is known to one recorded page."
        )


def _rate(result: Result) -> float:
    return result.events / result.seconds if result.seconds else 0.0


def _nth(check_every: int) -> str:
    return "event" if check_every == 1 else f"{check_every} events"


def _lines(figures: Figures) -> dict[str, str]:
    """What a person reads, line by line."""
    pages, hits = figures.pages_hit + figures.pages_computed, figures.positions_hit
    positions = hits + figures.positions_mapped
    return {
        "page": f"{figures.page_tokens} tokens, {format_bytes(figures.page_bytes)}",
        "rows": f"{figures.num_rows - 1}",
        "requests": f"{figures.requests:,}",
        "launches": f"{figures.launches:,}",
        "memory at most": f"{format_bytes(figures.peak_bytes)} in {figures.peak_pages_backed:,} pages",
        "in use at most": f"{figures.peak_pages_in_use:,} pages",
        "mappings at most": f"{figures.peak_mappings:,}",
        "pages shared from the cache": f"{figures.pages_hit:,} of {pages:,}{_share(figures.pages_hit, pages)}",
        "positions mapped already": f"{hits:,} of {positions:,}{_share(hits, positions)}",
        "positions mapped ahead": f"{figures.positions_ahead:,}",
        **{f"driver calls: {kind}": f"{count:,}" for kind, count in figures.driver_calls.items()},
    }


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f}%)" if whole else ""
