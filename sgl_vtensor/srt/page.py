"""``/vtensor``: the page table as a picture, on the server's own port, behind its API keys.

The HTTP process asks the scheduler on the way of ``/server_info``, once a second at most and only while somebody looks;
every viewer is given the same answer. The scheduler says numbers of pages, rows and slots, never text or token ids.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import time
from collections.abc import Awaitable, Callable
from heapq import heappop, heappush, nsmallest
from importlib.resources import files
from itertools import chain, islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from sgl_vtensor.core.picture import MAX_REQUESTS, Runs, page_states, rows_picture, runs_of
from sgl_vtensor.srt.flags import active_config

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from sgl_vtensor.srt.runtime import Runtime

PATH = "/vtensor"
DATA_PATH = f"{PATH}/data"
ASKS = "vtensor-page"
"""The id of our requests for SGLang's internal state; what comes back is the picture alone."""
LOOK_SECONDS = 1.0
MAX_SHARE = 0.003
"""Of the scheduler's time that looking may cost: a picture that takes long is taken less often."""
MAX_PREFIXES = 64
MAX_WALKED = 2048
"""Nodes of the tree that are looked at for one picture; of one node, so many children."""
MAX_CHILDREN = 256
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"


# In the scheduler.


def picture(runtime: Runtime, scheduler: Any, now: float) -> dict[str, Any]:
    """What the page draws, as msgpack takes it. ``now``: seconds of ``time.monotonic``, the clock of SGLang's tree."""
    began = time.perf_counter()
    tree_cache, rows = scheduler.tree_cache, rows_picture(runtime.pool)
    return {
        "stats": runtime.figures(scheduler),
        "states": page_states(runtime.pool, tree_cache.is_cached).tobytes(),
        "max_requests": MAX_REQUESTS,
        "rows": {"table": rows.table, "left_out": rows.num_left_out, "fenced": rows.fenced, **_packed(rows.shows)},
        "prefixes": prefixes_picture(tree_cache, now),
        "scheduler_seconds": time.perf_counter() - began,
    }


def prefixes_picture(tree_cache: Any, now: float) -> dict[str, Any]:
    """The nodes of the radix tree that most requests hold, then those with most pages behind them.

    Each of the table is (the node's id, its parent's place in the table or -1, depth in pages, pages, requests that
    hold it, seconds since it was asked for). A parent stands before its children.
    """
    nodes = _walked(tree_cache.root_node)
    below = [len(node.value.pages) for node, _, _ in nodes]
    for place in range(len(nodes) - 1, -1, -1):
        if (parent := nodes[place][1]) >= 0:
            below[parent] += below[place]
    # A parent is held by whoever holds a child, and has more pages behind it: so it never ranks behind.
    rank = lambda place: (-nodes[place][0].lock_ref, -below[place], place)  # noqa: E731
    chosen = sorted(nsmallest(MAX_PREFIXES, range(len(nodes)), key=rank))
    runs = runs_of([np.asarray(nodes[place][0].value.pages, dtype=np.int32) for place in chosen])
    chosen = chosen[: len(runs.num_runs)]
    new_place = {place: number for number, place in enumerate(chosen)}
    table = [
        (
            node.id,
            new_place.get(parent, -1),
            depth,
            len(node.value.pages),
            node.lock_ref,
            round(max(0.0, now - node.last_access_time), 1),
        )
        for node, parent, depth in (nodes[place] for place in chosen)
    ]
    return {"table": table, "left_out": tree_cache.num_nodes - len(table), **_packed(runs)}


def _walked(root: Any) -> list[tuple[Any, int, int]]:
    """(node, place of its parent, depth in pages): all nodes of a small tree, and of a large one ``MAX_WALKED``.

    A walk over 40 000 nodes would keep the scheduler from a launch for a tenth of a second. Those that most requests
    hold come first.
    """
    nodes: list[tuple[Any, int, int]] = []
    ahead = [(0, -1, root, 0)]  # (requests that hold it, negated; its place, so that no two are equal; itself; depth)
    while ahead and len(nodes) < MAX_WALKED:
        _, place, node, depth = heappop(ahead)
        for child in _children(node)[: MAX_WALKED - len(nodes)]:
            heappush(ahead, (-child.lock_ref, len(nodes), child, depth + len(child.value.pages)))
            nodes.append((child, place, depth))
    return nodes


def _children(node: Any) -> list[Any]:
    """Of very many, those that most requests hold, then the newest."""
    children = node.children.values()
    if len(children) <= MAX_CHILDREN:
        return list(children)
    held = sorted((child for child in children if child.lock_ref), key=lambda child: -child.lock_ref)
    newest = (child for child in reversed(children) if not child.lock_ref)
    return list(islice(chain(held, newest), MAX_CHILDREN))


def _packed(runs: Runs) -> dict[str, Any]:
    return {"num_runs": runs.num_runs, "firsts": runs.firsts.tobytes(), "lens": runs.lens.tobytes()}


# In the HTTP process.


class Looks:
    """The newest pictures of all replicas, for all viewers.

    Args:
        ask: brings one picture of each replica, with its number in its figures.
        clock: seconds.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[list[dict[str, Any]]]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._asking = asyncio.Lock()
        self._taken_at = self._next_look = float("-inf")
        self._pictures: list[dict[str, Any]] = []
        self._answers: dict[int, bytes] = {}

    async def answer(self, replica: int) -> bytes:
        """The picture of one replica (of the first, where there is no such) as JSON, compressed with gzip."""
        async with self._asking:
            if self._clock() >= self._next_look:
                self._taken_at = self._clock()
                self._pictures = sorted(await self._ask(), key=lambda one: one["stats"]["replica"])
                slowest = max(one["scheduler_seconds"] for one in self._pictures)
                self._next_look = self._taken_at + max(LOOK_SECONDS, slowest / MAX_SHARE)
                self._answers = {}
            place = replica if 0 <= replica < len(self._pictures) else 0
            if place not in self._answers:
                shown = self._pictures[place] | {"replica": place, "num_replicas": len(self._pictures)}
                shown["taken_at"] = self._taken_at
                self._answers[place] = await asyncio.to_thread(_encoded, shown)
            return self._answers[place]


def _encoded(shown: dict[str, Any]) -> bytes:
    text = json.dumps(shown, separators=(",", ":"), default=lambda value: base64.b64encode(value).decode())
    return gzip.compress(text.encode(), compresslevel=1)


def add_routes(app: Starlette, looks: Looks) -> None:
    """The page and its data; what SGLang's middleware asks of ``/server_info``, it asks of these."""
    from starlette.responses import Response

    page = files("sgl_vtensor.srt").joinpath("page.html").read_text(encoding="utf-8")

    async def show(request: Request) -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": POLICY})

    async def data(request: Request) -> Response:
        asked = request.query_params.get("replica", "")
        content = await looks.answer(int(asked) if asked.isdecimal() else 0)
        headers = {"cache-control": "no-store"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
        else:
            content = gzip.decompress(content)
        return Response(content, media_type="application/json", headers=headers)

    app.add_route(PATH, show, include_in_schema=False)
    app.add_route(DATA_PATH, data, include_in_schema=False)


def serve_page(original: Callable[..., None], server_args: Any = None) -> None:
    """Hook around the last step before SGLang listens: add the page, and keep its looks out of the access log."""
    if active_config() is None:
        original(server_args)
        return
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import GetInternalStateReq

    async def ask() -> list[dict[str, Any]]:
        manager = http_server.get_global_state().tokenizer_manager
        manager.auto_create_handle_loop()
        answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=ASKS))
        return [answer.internal_state for answer in answers]

    add_routes(http_server.app, Looks(ask))
    quiet = getattr(server_args, "uvicorn_access_log_exclude_prefixes", None) or []
    quiet = [quiet] if isinstance(quiet, str) else [*quiet]
    original(SimpleNamespace(uvicorn_access_log_exclude_prefixes=[*quiet, DATA_PATH]))
