"""``sgl-vtensor limit URL [SIZE]``: look at, or move, the memory limit of a running server."""

from __future__ import annotations

import time

from sgl_vtensor.cli.client import Client
from sgl_vtensor.config import format_bytes, parse_size
from sgl_vtensor.errors import ConfigError, VTensorError

POLL_SECONDS = 0.1


def run(client: Client, size: str | None, *, wait_seconds: float) -> int:
    """Print the limit of every replica behind the URL; with ``size``, set it first and wait for memory to follow.

    Raises:
        VTensorError: the server cannot be reached, has no vTensor memory, or refuses the limit.
    """
    if size is not None:
        _set(client, size)
        deadline = time.monotonic() + wait_seconds
        while _beyond(client) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    for replica, figures in enumerate(client.figures()):
        print(f"replica {replica}: {describe(figures)}")
    if size is not None and _beyond(client):
        print("Memory in use is above the limit: it goes back when requests that run now have ended.")
    return 0


def describe(figures: dict[str, int]) -> str:
    """One replica's memory in one line."""
    page_bytes = figures["page_bytes"]
    limit, capacity, backed, in_use, cached = (
        format_bytes(figures[name] * page_bytes)
        for name in ("limit_pages", "num_pages", "pages_backed", "pages_in_use", "pages_cached")
    )
    return f"limit {limit} of {capacity}, backed {backed}, in use {in_use} (cached prefixes {cached})"


def _set(client: Client, size: str) -> None:
    wanted = parse_size("limit", size)
    figures = client.figures()
    page_bytes = max(one["page_bytes"] for one in figures)
    capacity = min(one["num_pages"] * one["page_bytes"] for one in figures)
    num_bytes = wanted.bytes_of(capacity)
    if not page_bytes <= num_bytes <= capacity:
        raise ConfigError(
            f"a limit of {wanted} cannot be set: give at least one page ({format_bytes(page_bytes)}) and at most "
            f"what the pool can hold ({format_bytes(capacity)}; the server's --mem-fraction-static decides)"
        )
    for server in client.servers():
        updated = server.post("/set_internal_state", {"server_args": {"vtensor_memory_limit_bytes": num_bytes}})
        if not updated or not all(updated):
            raise VTensorError(f"the server at {server.url} refused the limit {size}; its log says why")


def _beyond(client: Client) -> bool:
    return any(figures["pages_backed"] > figures["limit_pages"] for figures in client.figures())
