"""``sgl-vtensor top URL``: what a running server's memory, rows and driver calls are doing, live."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgl_vtensor.cli.client import Client
from sgl_vtensor.config import format_bytes
from sgl_vtensor.errors import VTensorError

WIDTH = 80
SUMMED = (
    "backed_bytes", "in_use_bytes", "cached_bytes", "free_backed_bytes", "limit_bytes", "capacity_bytes",
    "pages_shared", "pages_running", "pages_seen", "rows_running", "rows_parked", "mappings", "requests_running",
    "requests_waiting", "mapping_waits", "mapping_wait_seconds", "tokens_hit", "tokens_computed", "generated_a_second",
    "pages_released", "pages_evicted",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """All replicas at one moment: figures that add up, and the driver's calls and seconds by kind."""

    at_s: float
    replicas: tuple[dict[str, float], ...]
    calls: dict[str, int]
    seconds: dict[str, float]
    longest_wait_s: float

    def sum(self, name: str) -> float:
        return sum(replica[name] for replica in self.replicas)


def look(client: Client) -> Look:
    """Ask the server.

    Raises:
        VTensorError: it cannot be reached, has no vTensor memory, or wants another key.
    """
    states = client.states()
    figures = [state["vtensor"] for state in states]
    kinds = list(dict.fromkeys(kind for one in figures for kind in one["driver_calls"]))
    return Look(
        time.monotonic(),
        tuple(_replica(state) for state in states),
        {kind: sum(one["driver_calls"].get(kind, 0) for one in figures) for kind in kinds},
        {kind: sum(one["driver_seconds"].get(kind, 0.0) for one in figures) for kind in kinds},
        max(one["mapping_wait_longest_seconds"] for one in figures),
    )


def _replica(state: dict[str, Any]) -> dict[str, float]:
    one = state["vtensor"]
    page_bytes = one["page_bytes"]
    return {
        "in_use_bytes": one["pages_in_use"] * page_bytes,
        "cached_bytes": one["pages_cached"] * page_bytes,
        "free_backed_bytes": one["pages_free_backed"] * page_bytes,
        "limit_bytes": one["limit_bytes"],
        "capacity_bytes": one["num_pages"] * page_bytes,
        "requests_running": one["rows_running"],
        "generated_a_second": state.get("last_gen_throughput") or 0.0,
        "pages_evicted": one["pages_evicted_by_limit"] + one["pages_evicted_by_age"],
    } | {name: one[name] for name in SUMMED if name in one}


def as_json(now: Look, before: Look | None) -> str:
    """One look as one line."""
    sums = {name: now.sum(name) for name in SUMMED}
    rates = {f"{kind}_a_second": rate for kind, (rate, _) in _driver(now, before).items()}
    return json.dumps(sums | {"longest_wait_s": now.longest_wait_s} | rates | {"replicas": now.replicas})


def _driver(now: Look, before: Look | None) -> dict[str, tuple[float, float]]:
    """By kind: calls a second since ``before`` (nothing to compare with: 0), mean seconds of one, then or ever."""
    found = {}
    for kind, calls in now.calls.items():
        new = calls - before.calls.get(kind, 0) if before else 0
        rate = new / (now.at_s - before.at_s) if before else 0.0
        if before and new:
            mean_s = (now.seconds[kind] - before.seconds.get(kind, 0.0)) / new
        else:
            mean_s = now.seconds[kind] / calls if calls else 0.0
        found[kind] = (rate, mean_s)
    return found


def view(now: Look, before: Look | None) -> Group:
    """The picture of one look."""
    parts: list[Any] = [_memory(now)]
    if len(now.replicas) > 1:
        parts.append(_by_replica(now))
    return Group(*parts, _rows(now, before), _calls(now, before))


def _memory(now: Look) -> Table:
    table = Table.grid(padding=(0, 2), expand=False)
    limit = now.sum("limit_bytes")
    table.add_row("limit", format_bytes(int(limit)), "", f"of {format_bytes(int(now.sum('capacity_bytes')))}")
    notes = {"backed": "", "in_use": "requests and cache", "cached": "prefixes", "free_backed": "ready"}
    for name, text in notes.items():
        num_bytes = now.sum(f"{name}_bytes")
        bar = ProgressBar(total=max(limit, 1), completed=num_bytes, width=24)
        table.add_row(name.replace("_", " "), format_bytes(int(num_bytes)), bar, text)
    return table


def _by_replica(now: Look) -> Table:
    table = Table("replica", "backed", "in use", "cached", "limit", "running", "waiting", title=None)
    for number, one in enumerate(now.replicas):
        sizes = [format_bytes(int(one[f"{name}_bytes"])) for name in ("backed", "in_use", "cached", "limit")]
        table.add_row(str(number), *sizes, f"{one['requests_running']:.0f}", f"{one['requests_waiting']:.0f}")
    return table


def _rows(now: Look, before: Look | None) -> Table:
    table = Table.grid(padding=(0, 2))
    running, seen = now.sum("pages_running"), now.sum("pages_seen")
    hit, computed = (now.sum(name) - (before.sum(name) if before else 0) for name in ("tokens_hit", "tokens_computed"))
    waits = now.sum("mapping_waits") - (before.sum("mapping_waits") if before else 0)
    waited_s = now.sum("mapping_wait_seconds") - (before.sum("mapping_wait_seconds") if before else 0)
    table.add_row(
        "requests",
        f"{now.sum('requests_running'):.0f} running, {now.sum('requests_waiting'):.0f} waiting, "
        f"{now.sum('generated_a_second'):.0f} tokens/s",
    )
    table.add_row(
        "sharing",
        f"{now.sum('pages_shared'):.0f} pages in several requests; each page is seen {seen / max(running, 1):.2f} times"
        if running
        else "nothing runs",
    )
    share = f"{hit / (hit + computed):.1%} of {hit + computed:.0f} prompt tokens" if hit + computed else "no prompts"
    table.add_row("hits", share)
    rows, parked, mappings = (now.sum(name) for name in ("rows_running", "rows_parked", "mappings"))
    table.add_row("rows", f"{rows:.0f} running, {parked:.0f} parked, {mappings:.0f} mappings")
    mean = f", {waited_s / waits * 1e3:.2f} ms each" if waits else ""
    table.add_row("waits", f"{waits:.0f} for mappings{mean}; longest so far {now.longest_wait_s * 1e3:.2f} ms")
    given = f"{now.sum('pages_released'):.0f} pages given back, {now.sum('pages_evicted'):.0f} cached ones dropped"
    table.add_row("so far", given)
    return table


def _calls(now: Look, before: Look | None) -> Table:
    table = Table("driver", "calls", "a second", "each", box=None, pad_edge=False)
    for kind, (rate, mean_s) in _driver(now, before).items():
        table.add_row(kind, f"{now.calls[kind]}", f"{rate:.1f}" if before else "", f"{mean_s * 1e6:.0f} us")
    return table


def run(client: Client, *, interval_s: float, once: bool, as_json: bool) -> int:
    """Show looks until Ctrl-C; one only with ``once``, or where nobody watches.

    A server that goes away is waited for: the last look stays, with the reason.

    Raises:
        VTensorError: the first look failed.
    """
    first = look(client)
    if as_json:
        return _stream(client, first, interval_s, once)
    console = Console()
    if once or not console.is_terminal:
        # Where nobody sets a width the picture has the same one everywhere.
        Console(width=None if console.is_terminal else WIDTH).print(view(first, None))
        return 0
    before, now = None, first
    try:
        with Live(_screen(client, now, before, ""), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                reason = ""
                try:
                    before, now = now, look(client)
                except VTensorError as error:
                    reason = str(error)
                live.update(_screen(client, now, before, reason), refresh=True)
    except KeyboardInterrupt:
        return 0


def _screen(client: Client, now: Look, before: Look | None, reason: str) -> Group:
    head = Text(f"{client.url}  {time.strftime('%H:%M:%S')}  Ctrl-C ends", style="dim")
    return Group(head, *([Text(reason, style="red")] if reason else []), view(now, before))


def _stream(client: Client, now: Look, interval_s: float, once: bool) -> int:
    before = None
    try:
        while True:
            print(as_json(now, before), flush=True)
            if once:
                return 0
            time.sleep(interval_s)
            before, now = now, look(client)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        sys.stderr.close()  # head has what it wanted; Python would complain of it at its end
        return 0
