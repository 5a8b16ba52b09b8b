"""Stands in for a server: notes what it is asked, answers deterministically, as fast as it is told to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientConnectionResetError, web

CROWD_SECONDS = 30.0


@dataclass
class FakeServer:
    """Speaks SGLang's ``/generate`` and OpenAI's chat completions, streaming."""

    delay_s: float = 0.0
    """Before each token."""
    flavour: str = ""
    """Servers of different flavours give different answers."""
    delay_after: int = 0
    later_delay_s: float | None = None
    """In place of ``delay_s`` from request ``delay_after`` on."""
    crowd: int = 0
    """Nobody is answered before so many have come; after ``CROWD_SECONDS`` in vain they get an error."""
    max_total_num_tokens: int = 100_000
    fail_at: int = -1
    """The request (by order of coming) that gets an error."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    flushes: int = 0
    aborted: set[str] = field(default_factory=set)
    vanished: int = 0
    """Clients that were gone before their last token."""
    pool: dict[str, Any] = field(default_factory=dict)
    """The vtensor section of ``/server_info``; for each token asked a driver call of 1 ms and two
    looks at free memory of 0.25 ms, for each request a wait."""
    url: str = ""

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def flush(self, request: web.Request) -> web.Response:
        self.flushes += 1
        return web.Response(text="flushed")

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.add((await request.json())["rid"])
        return web.Response()

    async def info(self, request: web.Request) -> web.Response:
        state = {"vtensor": self.figures()} if self.pool else {}
        return web.json_response({"max_total_num_tokens": self.max_total_num_tokens, "internal_states": [state]})

    def figures(self) -> dict[str, Any]:
        count, tokens = len(self.bodies), sum(len(body["input_ids"]) for body in self.bodies)
        return self.pool | {
            "driver_calls": {"map": tokens},
            "driver_seconds": {"map": 0.001 * tokens},
            "memory_looks": 2 * tokens,
            "memory_look_seconds": 0.0005 * tokens,
            "mapping_wait_seconds": 0.003 * count,
            "mapping_wait_longest_seconds": 0.004,
            "mapping_wait_buckets_seconds": [0.001, 0.0035],
            "mapping_wait_counts": [0, count, 0],
        }

    async def set_limit(self, request: web.Request) -> web.Response:
        return web.json_response([{"updated": False}])

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        wanted = body["sampling_params"]["max_new_tokens"]
        prompt = body.get("input_ids", body.get("text"))

        async def events() -> AsyncIterator[dict[str, Any]]:
            ids = self._answer(str(prompt), wanted)
            for count in range(1, wanted + 1):
                info = {"prompt_tokens": len(prompt), "cached_tokens": len(prompt) // 2, "completion_tokens": count}
                said = ids[:count]
                if tops := body.get("top_logprobs_num"):
                    info |= {"output_top_logprobs": [self._tops(token, tops) for token in said]}
                yield {"text": " ".join(map(str, said)), "output_ids": said, "meta_info": info}

        return await self._stream(request, body, events())

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        wanted = body["max_tokens"]

        async def events() -> AsyncIterator[dict[str, Any]]:
            yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
            for one in self._answer(str(body["messages"]), wanted):
                yield {"choices": [{"delta": {"content": f"{one} "}}]}
            yield {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": wanted}}

        return await self._stream(request, body, events())

    async def _stream(
        self, request: web.Request, body: dict[str, Any], events: AsyncIterator[dict[str, Any]]
    ) -> web.StreamResponse:
        number = len(self.bodies)
        self.bodies.append(body)
        if number == self.fail_at:
            return web.json_response({"error": "no"}, status=500)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        deadline = time.monotonic() + CROWD_SECONDS
        while len(self.bodies) < self.crowd:
            if time.monotonic() > deadline:
                return web.json_response({"error": f"only {len(self.bodies)} came"}, status=500)
            await asyncio.sleep(0.001)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            await self._send(response, body, number, events)
        except ClientConnectionResetError:
            self.vanished += 1
        self.at_once -= 1
        return response

    async def _send(
        self, response: web.StreamResponse, body: dict[str, Any], number: int, events: AsyncIterator[dict[str, Any]]
    ) -> None:
        async for event in events:
            late = self.later_delay_s is not None and number >= self.delay_after
            await asyncio.sleep(self.later_delay_s if late and self.later_delay_s is not None else self.delay_s)
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if body.get("rid") in self.aborted:
                return
        await response.write(b"data: [DONE]\n\n")

    def _tops(self, token: int, count: int) -> list[list[Any]]:
        """The likeliest tokens and their logprobs: each half as likely as the one before."""
        return [[-0.7 * (number + 1), token + number, None] for number in range(count)]

    def _answer(self, prompt: str, count: int) -> list[int]:
        digest = hashlib.sha256((self.flavour + prompt).encode()).digest()
        return [1000 + digest[n % 32] for n in range(count)]


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[FakeServer]:
    """The server, on a port of its own."""
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/health", server.health)
    app.router.add_get("/server_info", server.info)
    app.router.add_post("/flush_cache", server.flush)
    app.router.add_post("/set_internal_state", server.set_limit)
    app.router.add_post("/abort_request", server.abort)
    app.router.add_post("/generate", server.generate)
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = site.name
    try:
        yield server
    finally:
        await runner.cleanup()
