"""Plays a workload's sessions on a server and measures what its users see. Streaming, seeded, one process.

What is asked and in which order is the workload's alone: every user plays a fixed list of sessions, turn after turn.
Only when a turn is asked depends on the server (closed loop), or not even the session's beginning (open loop).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import aiohttp
import numpy as np
from costs import UNITS as COSTS
from tqdm import tqdm
from workloads import Content, Session, Turn, Workload

PERCENTILES = (50, 90, 99)
LAG_SECONDS = 0.01
"""How often the driver looks at how late it is itself."""

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')

History = Literal["server", "scripted"]
"""Whether a turn's prompt holds what the server said, or an answer of the workload's (the same for any server)."""


@dataclass
class Sample:
    """One request as its user saw it; times in seconds."""

    session: int = 0
    turn: int = 0
    group: int = 0
    delay_s: float = 0.0
    """From when it was due to when it was sent: the driver's own doing."""
    sent_s: float = 0.0
    """On ``time.perf_counter``'s clock."""
    ttft_s: float = 0.0
    latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    """Between tokens; tokens that came together share their gap evenly."""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """None: the server does not say."""
    output_tokens: int = 0
    error: str = ""


@dataclass
class Run:
    """All samples of one workload, and what the driver itself took."""

    samples: list[Sample]
    seconds: float
    driver_cpu_s: float
    """CPU time of this process during the run; one core gives one second a second."""
    driver_lags_s: list[float]
    """How much later than asked the driver's event loop woke up."""

    @classmethod
    def joined(cls, runs: Sequence[Run]) -> Run:
        """Runs that followed one another, as one."""
        return cls(
            [sample for run in runs for sample in run.samples],
            sum(run.seconds for run in runs),
            sum(run.driver_cpu_s for run in runs),
            [lag for run in runs for lag in run.driver_lags_s],
        )


class Endpoint(Protocol):
    """How a server is asked. One is made for each session: it holds the history."""

    path: str

    def body(self, turn: Turn) -> dict[str, Any]:
        """The request for the next turn."""
        ...

    def read(self, event: bytes, sample: Sample) -> int:
        """Take one event of the stream; returns how many tokens have come so far."""
        ...

    def close(self, last: bytes, sample: Sample, turn: Turn) -> None:
        """Take the last event's figures into the sample and the answer into the history."""
        ...


class Native:
    """SGLang's ``/generate``, with token ids or text."""

    path = "/generate"

    def __init__(self, session: Session, model: str, history: History) -> None:
        self._said: Content = session.system
        self._history = history

    def body(self, turn: Turn) -> dict[str, Any]:
        self._said = _joined(self._said, turn.content)
        prompt = {"text": self._said} if isinstance(self._said, str) else {"input_ids": self._said}
        sampling = {"max_new_tokens": turn.answer_tokens, "temperature": 0, "ignore_eos": True}
        return {**prompt, "sampling_params": sampling, "stream": True}

    def read(self, event: bytes, sample: Sample) -> int:
        # Events hold the whole answer so far: parsing each would make the driver's work grow with its square.
        found = _COMPLETION_TOKENS.findall(event, max(0, len(event) - 4000))
        return int(found[-1]) if found else 0

    def close(self, last: bytes, sample: Sample, turn: Turn) -> None:
        answer = json.loads(last)
        if "meta_info" not in answer:
            sample.error = str(answer.get("error", answer))[:200]
            return
        info = answer["meta_info"]
        sample.prompt_tokens, sample.cached_tokens = info["prompt_tokens"], info.get("cached_tokens")
        sample.output_tokens = info["completion_tokens"]
        said: Content = answer["text"] if isinstance(self._said, str) else tuple(answer["output_ids"])
        self._said = _joined(self._said, turn.scripted if self._history == "scripted" else said)


class OpenAI:
    """``/v1/chat/completions`` of any server that speaks it. Text only."""

    path = "/v1/chat/completions"

    def __init__(self, session: Session, model: str, history: History) -> None:
        self._model = model
        self._history = history
        self._messages: list[dict[str, str]] = []
        if session.system:
            self._messages.append({"role": "system", "content": _text(session.system)})
        self._answer = ""
        self._tokens = 0

    def body(self, turn: Turn) -> dict[str, Any]:
        self._messages.append({"role": "user", "content": _text(turn.content)})
        self._answer, self._tokens = "", 0
        return {
            "model": self._model,
            "messages": list(self._messages),
            "max_tokens": turn.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,  # of SGLang and vLLM; others end when they like
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, event: bytes, sample: Sample) -> int:
        chunk = json.loads(event)
        if "error" in chunk:
            sample.error = str(chunk["error"])[:200]
        if usage := chunk.get("usage"):
            sample.prompt_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            sample.cached_tokens = details.get("cached_tokens")
        for choice in chunk.get("choices", []):
            piece = (choice.get("delta") or {}).get("content")
            if piece:
                self._answer += piece
                self._tokens += 1  # a chunk is a token or a few; the usage at the end has the true sum
        return self._tokens

    def close(self, last: bytes, sample: Sample, turn: Turn) -> None:
        answer = _text(turn.scripted) if self._history == "scripted" else self._answer
        self._messages.append({"role": "assistant", "content": answer})


ENDPOINTS: dict[str, type[Native] | type[OpenAI]] = {"sglang": Native, "openai": OpenAI}


async def play(
    url: str,
    workload: Workload,
    *,
    endpoint: str = "sglang",
    model: str = "default",
    history: History = "server",
    timeout_s: float = 600.0,
    progress: bool = True,
    between: Callable[[], None] | None = None,
) -> Run:
    """Play all sessions on the server at ``url``. A session ends at its first failed request; others go on.

    Args:
        model: the name that an OpenAI-compatible server wants.
        timeout_s: of one request.
        between: called once, when all first turns have ended; second turns wait for it. Closed loop, a user a session.
    """
    if between is not None and workload.users != len(workload.sessions):
        raise ValueError(f"{workload.name}: users wait for one another, so each can have one session only")
    if endpoint == "openai" and any(not isinstance(s.turns[0].content, str) for s in workload.sessions):
        raise ValueError("the OpenAI endpoint takes text: build the workload with text=True")
    samples: list[Sample] = []
    lags: list[float] = []
    total = sum(len(session.turns) for session in workload.sessions)
    client = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        # A connection each: uvicorn closes one that has been idle for 5 s, perhaps just as a user who thought asks on.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        read_bufsize=1 << 22,
    )
    first_turns, all_ended = len(workload.sessions), asyncio.Event()
    bar = tqdm(total=total, desc=workload.name, unit="req", disable=None if progress else True, leave=False)
    async with client:

        async def gather_after_first_turn() -> None:
            nonlocal first_turns
            first_turns -= 1
            if not first_turns and between is not None:
                between()
                all_ended.set()
            await all_ended.wait()

        async def one(session: Session, due: float) -> None:
            talk = ENDPOINTS[endpoint](session, model, history)
            for number, turn in enumerate(session.turns):
                due += turn.think_s
                await _until(due)
                sample = Sample(session.number, number, session.group)
                samples.append(sample)
                await ask(client, url, talk, turn, sample, due)
                bar.update()
                if not number and between is not None:
                    await gather_after_first_turn()
                due = time.perf_counter()
                if sample.error:
                    bar.update(len(session.turns) - number - 1)
                    return

        async def user(sessions: Sequence[Session]) -> None:
            for session in sessions:
                await one(session, time.perf_counter())

        begin, cpu = time.perf_counter(), time.process_time()
        watcher = asyncio.create_task(_watch(lags))
        if workload.users:
            users: Iterable[Any] = (user(workload.sessions[n :: workload.users]) for n in range(workload.users))
        else:
            users = (one(session, begin + session.start_s) for session in workload.sessions)
        try:
            await asyncio.gather(*users)
        finally:
            watcher.cancel()
            bar.close()
        return Run(samples, time.perf_counter() - begin, time.process_time() - cpu, lags)


async def ask(
    client: aiohttp.ClientSession, url: str, talk: Native | OpenAI, turn: Turn, sample: Sample, due: float
) -> None:
    """One streamed request; the sample takes what came of it."""
    data = json.dumps(talk.body(turn)).encode()
    begin = last = time.perf_counter()
    sample.delay_s = max(0.0, begin - due)
    sample.sent_s = begin
    event, seen = b"", 0
    try:
        async with client.post(url + talk.path, data=data, headers={"content-type": "application/json"}) as answer:
            if answer.status != 200:
                sample.error = f"{answer.status}: {(await answer.text())[:200]}"
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = line[6:]
                tokens, now = talk.read(event, sample), time.perf_counter()
                if tokens <= seen:
                    continue
                if not seen:
                    sample.ttft_s = now - begin
                    last, seen = now, 1
                if tokens > seen:
                    sample.gaps_s += [(now - last) / (tokens - seen)] * (tokens - seen)
                last, seen = now, tokens
        sample.latency_s = time.perf_counter() - begin
        if event and not sample.error:
            talk.close(event, sample, turn)
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        sample.error = repr(error)[:200]
    sample.latency_s = sample.latency_s or time.perf_counter() - begin
    if not sample.error and sample.output_tokens != turn.answer_tokens and isinstance(talk, Native):
        sample.error = f"{sample.output_tokens} of {turn.answer_tokens} tokens came"
    if not sample.error and not sample.output_tokens:
        sample.error = "nothing came"


async def _until(due: float) -> None:
    wait_s = due - time.perf_counter()
    if wait_s > 0:
        await asyncio.sleep(wait_s)


async def _watch(lags: list[float]) -> None:
    while True:
        asked = time.perf_counter() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        lags.append(max(0.0, time.perf_counter() - asked))


def summarize(run: Run) -> dict[str, float]:
    """The figures of a run; times in ms, of the requests that succeeded. Figures that nobody gave are left out.

    ``cached_share`` is of all prompt tokens; ``driver_cpu`` of one core; ``driver_delay`` is the driver's lateness.
    """
    good = [sample for sample in run.samples if not sample.error]
    figures: dict[str, float] = {
        "throughput": len(good) / run.seconds,
        "output_rate": sum(sample.output_tokens for sample in good) / run.seconds,
        "errors": float(len(run.samples) - len(good)),
    }
    figures |= percentiles(good)
    if good and all(sample.cached_tokens is not None for sample in good):
        cached = sum(sample.cached_tokens or 0 for sample in good)
        figures["cached_share"] = cached / max(1, sum(sample.prompt_tokens for sample in good))
    figures["driver_cpu"] = run.driver_cpu_s / run.seconds
    late = run.driver_lags_s + [sample.delay_s for sample in run.samples]
    figures["driver_delay_p99"] = _percentile([1000 * delay for delay in late], 99)
    return figures


def by_turn(run: Run) -> dict[int, dict[str, float]]:
    """Percentiles of TTFT, ITL and end-to-end latency for each turn of the sessions, from turn 0."""
    good = [sample for sample in run.samples if not sample.error]
    turns = sorted({sample.turn for sample in good})
    result = {}
    for turn in turns:
        chosen = [sample for sample in good if sample.turn == turn]
        result[turn] = {"requests": float(len(chosen))} | percentiles(chosen)
    return result


def percentiles(samples: Sequence[Sample]) -> dict[str, float]:
    """p50, p90 and p99 in ms of time to first token, gap between tokens, and end-to-end latency."""
    values = {
        "ttft": [1000 * sample.ttft_s for sample in samples],
        "itl": [1000 * gap for sample in samples for gap in sample.gaps_s],
        "e2e": [1000 * sample.latency_s for sample in samples],
    }
    return {f"{name}_p{q}": _percentile(found, q) for name, found in values.items() if found for q in PERCENTILES}


UNITS = {"throughput": "req/s", "output_rate": "tok/s", "errors": "1", "cached_share": "1", "driver_cpu": "core"}


def unit(metric: str) -> str:
    """Of a figure of ``summarize`` or ``costs``; of later turns the same."""
    return (UNITS | COSTS).get(metric.removesuffix("_later"), "ms")


def _percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else 0.0


def _joined(said: Content, more: Content) -> Content:
    if isinstance(said, str) or isinstance(more, str):
        return f"{_text(said)}\n{_text(more)}" if said else _text(more)
    return said + more


def _text(content: Content) -> str:
    if not isinstance(content, str):
        if content:
            raise ValueError("token ids where text is wanted")
        return ""
    return content
