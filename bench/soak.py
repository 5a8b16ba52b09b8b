"""Does a server keep its promises while it has more to do than it can hold, for minutes, and is it as before after it?

    python bench/soak.py --model DIR --seconds 480 [--debug] [--stock stock-fa3] [--out DIR] -- FLAGS
    python bench/soak.py --url http://127.0.0.1:30000 --seconds 60

Users whose requests together need 1.5 times the pool ask short and long questions, chat behind shared prompts, want
long answers (so that requests are retracted), go away in the middle, or abort. The memory limit moves, and in quiet
moments the cache is flushed. Told at the end:

errors      by kind; what users did not get who went away is none
answers     to fixed greedy prompts, asked again and again, that differ from the idle server's. In bf16 the shape of a
            batch decides near ties, so they are also counted on the idle server, asked alone again and all at once,
            and, with --stock, on a stock server under the same load. How far rounding moves logprobs is told, too, up
            to the first token that differs: beyond a nat it was not rounding, and something is wrong
latency     TTFT p50 and p99 of each minute, the first and the last of them as rows
leaks       pages, rows, handles, mappings, addresses, the GPU's memory: idle and flushed, before and after

Rows go to bench/results/soak.csv where there is a GPU. To --out: soak.json, requests, memory, plots, logs. Ended by
SIGTERM, it tells what it has. The exit status is 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import models
import numpy as np
import torch
from load import Native, Sample, ask
from memory import GIB, Watch, device_bytes
from plots import line_plot
from results import Results
from servers import Remote, Server, check_names, leave_on_sigterm, run_async
from workloads import VOCABULARY, Session, Turn

from sgl_vtensor.cli.server import free_port
from sgl_vtensor.errors import VTensorError

OVERLOAD = 1.5
MOST_USERS = 400
GROUPS = 4
SYSTEM_TOKENS = 1024
WINDOW_SECONDS = 60.0
LIMITS = (0.5, 1.0, 0.7, 1.0, 0.85, 1.0)
"""Shares of the pool that the limit goes through in every window, so that windows can be compared."""
FLUSH_EVERY = 3
"""Windows from one flush to the next; the first is in the second window."""
QUIET_SECONDS = 30.0
DRAIN_SECONDS = 60.0
SETTLE_SECONDS = 45.0
END_SECONDS = 75.0
"""Kept of the budget for checks, writing, and stopping the server."""
LEAST_LOAD_SECONDS = 2.0
REQUEST_SECONDS = 300.0
WATCH_SECONDS = 1.0
CANARY_LENS = (5, 64, 65, 200, 333, 512, 700, 1000)
CANARY_TOKENS = 32
CANARY_PAUSE_SECONDS = 0.5
TOP_TOKENS = 8
WRONG_NAT = 1.0
"""Stock kernels differ from each other by up to 0.33 nat on such a model; another prompt moves logprobs by several."""
DEVICE_SLACK_BYTES = 256 << 20
"""PyTorch keeps what kernels needed at the worst moment: the warm-up may not have met it."""
RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


@dataclass(frozen=True)
class Sort:
    """What a user does; tokens at scale 1, from least to most."""

    weight: int
    question: tuple[int, int]
    answer: tuple[int, int]
    turns: int = 1
    shares: bool = False


SORTS = {
    "short": Sort(4, (16, 256), (16, 128)),
    "long": Sort(2, (2000, 8000), (8, 64)),
    "talkative": Sort(3, (64, 512), (600, 1500)),
    "chat": Sort(3, (64, 512), (32, 256), turns=4, shares=True),
}
FATES = {"stays": 85, "goes away": 8, "aborts": 7}


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass
class Asked(Sample):
    """One request of the load."""

    at_s: float = 0.0
    sort: str = ""
    fate: str = "stays"


@dataclass(frozen=True)
class Answer:
    """Its tokens, and at the place of each the likeliest ones with their logprobs."""

    ids: tuple[int, ...] = ()
    likeliest: tuple[dict[int, float], ...] = ()

    def apart(self, other: Answer) -> float:
        """How far logprobs are apart at most, in nat, up to the first token that differs: later ones see other text.

        Infinite where one's token is not among the other's likeliest, or a logprob is no number.
        """
        most = 0.0
        for mine, theirs, here, there in zip(self.ids, other.ids, self.likeliest, other.likeliest, strict=False):
            for token in (mine, theirs):
                apart = abs(here.get(token, math.nan) - there.get(token, math.nan))
                most = math.inf if math.isnan(apart) else max(most, apart)
            if mine != theirs:
                break
        return most


@dataclass
class Canary:
    """A fixed prompt, what the idle server answers, and what came of asking again, by occasion."""

    prompt: tuple[int, ...]
    expected: Answer | None = None
    differed: Counter[str] = field(default_factory=Counter)
    apart: dict[str, list[float]] = field(default_factory=dict)
    """Of each answer, how far its logprobs are from the expected one's."""
    first_differences: list[int] = field(default_factory=list)


class Named(Native):
    """``/generate`` by a request id."""

    rid = ""

    def body(self, turn: Turn) -> dict[str, Any]:
        return super().body(turn) | ({"rid": self.rid} if self.rid else {})


class Probing(Native):
    """``/generate`` with what the last answer's logprobs were."""

    answer = Answer()

    def body(self, turn: Turn) -> dict[str, Any]:
        return super().body(turn) | {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": TOP_TOKENS}

    def close(self, last: bytes, sample: Sample, turn: Turn) -> None:
        super().close(last, sample, turn)
        if not sample.error:
            said = json.loads(last)
            tops = said["meta_info"]["output_top_logprobs"]
            self.answer = Answer(
                tuple(said["output_ids"]),
                # JSON has no NaN: SGLang writes null.
                tuple({token: math.nan if value is None else value for value, token, *_ in place} for place in tops),
            )


class Traffic:
    """Sessions without end. The same seed and user ask the same, however fast the server is."""

    def __init__(self, seed: int, scale: float) -> None:
        self.seed = seed
        self.scale = scale
        dice = random.Random(f"systems {seed}")
        self.systems = [_tokens(dice, self._size(SYSTEM_TOKENS)) for _ in range(GROUPS)]
        dice = random.Random(f"canaries {seed}")
        beginning = _tokens(dice, max(CANARY_LENS))
        # Every other one begins like the next, so that they hit each other's pages and end inside them.
        self.canaries = [
            beginning[:length] if number % 2 else _tokens(dice, length)
            for number, length in enumerate(self._size(length) for length in CANARY_LENS)
        ]

    def sessions(self, user: int) -> Iterator[tuple[str, Session]]:
        dice = random.Random(f"user {self.seed} {user}")
        names, weights = list(SORTS), [sort.weight for sort in SORTS.values()]
        while True:
            name = dice.choices(names, weights)[0]
            sort = SORTS[name]
            turns = tuple(
                Turn(
                    content=_tokens(dice, self._size(dice.randint(*sort.question))),
                    answer_tokens=max(2, self._size(dice.randint(*sort.answer))),
                )
                for _ in range(dice.randint(1, sort.turns))
            )
            group = dice.randrange(GROUPS)
            yield name, Session(user, group, self.systems[group] if sort.shares else (), turns)

    def mean_tokens(self) -> float:
        """Of a session at its longest."""
        sessions = self.sessions(-1)
        sizes = []
        for _ in range(300):
            _, session = next(sessions)
            sizes.append(len(session.system) + sum(len(turn.content) + turn.answer_tokens for turn in session.turns))
        return float(np.mean(sizes))

    def _size(self, tokens: int) -> int:
        return max(1, round(tokens * self.scale))


class Load:
    """Overload of one server, for some time; everything it has seen stays in ``samples``, however it ends."""

    def __init__(self, server: Remote, traffic: Traffic, *, users: int, capacity_bytes: int) -> None:
        self.server = server
        self.traffic = traffic
        self.users = users
        self.capacity_bytes = capacity_bytes
        """Of a pool on vTensor memory, whose limit is moved; 0: leave it alone."""
        self.samples: list[Asked] = []
        self.canaries = [Canary(prompt) for prompt in traffic.canaries]
        self.done: Counter[str] = Counter()
        self.window_s = WINDOW_SECONDS
        self.begin = time.monotonic()
        self.seconds = 0.0
        self._end = 0.0
        self._active = 0
        self._latency_s = 1.0
        self._go = asyncio.Event()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.begin

    # The idle server.

    async def learn(self) -> None:
        """What the idle server answers: alone, alone again, and all at once."""
        async with _client() as client:
            for canary in self.canaries:
                sample, canary.expected = await self._answer(client, canary)
                if sample.error:
                    raise RuntimeError(f"the idle server does not answer: {sample.error}")
            for canary in self.canaries:
                await self._compare(client, canary, "alone again")
            await asyncio.gather(*(self._compare(client, canary, "all at once") for canary in self.canaries))

    async def _answer(self, client: aiohttp.ClientSession, canary: Canary) -> tuple[Asked, Answer]:
        sample = Asked(at_s=self.now_s, sort="canary")
        talk = Probing(Session(0, 0, (), ()), "", "server")
        await ask(client, self.server.url, talk, Turn(canary.prompt, CANARY_TOKENS), sample, time.perf_counter())
        return sample, talk.answer

    async def _compare(self, client: aiohttp.ClientSession, canary: Canary, occasion: str) -> None:
        sample, answer = await self._answer(client, canary)
        self.samples.append(sample)
        if sample.error or canary.expected is None:
            return
        canary.apart.setdefault(occasion, []).append(answer.apart(canary.expected))
        if answer.ids != canary.expected.ids:
            canary.differed[occasion] += 1
            pairs = zip(answer.ids, canary.expected.ids, strict=True)
            canary.first_differences.append(next(at for at, (a, b) in enumerate(pairs) if a != b))

    # The load.

    async def run(self, seconds: float, *, moves: bool = True) -> None:
        """All users for so long, and then until the last has its answer or ``DRAIN_SECONDS`` are over."""
        self.begin = time.monotonic()
        self.seconds = seconds
        self._end = self.begin + seconds
        self.window_s = min(WINDOW_SECONDS, seconds / 4)
        self._go.set()
        async with _client() as client:
            tasks = [asyncio.create_task(self._user(client, number)) for number in range(self.users)]
            tasks += [asyncio.create_task(self._ask_on(client, canary)) for canary in self.canaries]
            mover = asyncio.create_task(self._move(client)) if moves else None
            try:
                done, late = await asyncio.wait(tasks, timeout=seconds + DRAIN_SECONDS)
            finally:
                self._end = min(self._end, time.monotonic())  # a cancellation may be lost just as an answer comes
                for task in [*tasks, *([mover] if mover else [])]:
                    task.cancel()
            self.done["unfinished"] += len(late)
            for result in await asyncio.gather(*done, *([mover] if mover else []), return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
            await asyncio.gather(*late, return_exceptions=True)

    def _over(self) -> bool:
        return time.monotonic() >= self._end

    async def _user(self, client: aiohttp.ClientSession, number: int) -> None:
        dice = random.Random(f"fates {self.traffic.seed} {number}")
        for sort, session in self.traffic.sessions(number):
            if self._over():
                return
            await self._play(client, session, sort, dice)

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Waits while a flush holds the users back; within it, flushes wait."""
        await self._go.wait()
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def _play(self, client: aiohttp.ClientSession, session: Session, sort: str, dice: random.Random) -> None:
        talk = Named(session, "", "server")
        fate = dice.choices(list(FATES), list(FATES.values()))[0]
        last = dice.randrange(len(session.turns)) if fate != "stays" else len(session.turns)
        for number, turn in enumerate(session.turns):
            async with self._asking():
                if self._over():
                    return
                sample = Asked(at_s=self.now_s, sort=sort, turn=number, fate=fate if number == last else "stays")
                self.samples.append(sample)
                await self._ask_turn(client, talk, turn, sample, dice.random() * self._latency_s)
            if sample.error or number == last:
                return

    async def _ask_turn(
        self, client: aiohttp.ClientSession, talk: Named, turn: Turn, sample: Asked, delay_s: float
    ) -> None:
        """As the sample's fate wants it; who leaves does so after ``delay_s``."""
        asked = ask(client, self.server.url, talk, turn, sample, time.perf_counter())
        if sample.fate == "goes away":
            try:
                await asyncio.wait_for(asked, delay_s)
            except TimeoutError:
                sample.error = "went away"
        elif sample.fate == "aborts":
            talk.rid = f"soak-{time.monotonic_ns()}"
            aborting = asyncio.create_task(self._abort(client, talk.rid, delay_s))
            try:
                await asked
            finally:
                await aborting
        else:
            await asked
            if not sample.error:
                self._latency_s += 0.1 * (sample.latency_s - self._latency_s)

    async def _abort(self, client: aiohttp.ClientSession, rid: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self._post(client, "/abort_request", {"rid": rid}, "aborts")

    async def _ask_on(self, client: aiohttp.ClientSession, canary: Canary) -> None:
        while not self._over():
            async with self._asking():
                await self._compare(client, canary, "under load")
            await asyncio.sleep(CANARY_PAUSE_SECONDS)

    async def _move(self, client: aiohttp.ClientSession) -> None:
        """The limit, through ``LIMITS`` in each window; and flushes in between."""
        step_s, number = self.window_s / len(LIMITS), 0
        while not self._over():
            await asyncio.sleep(step_s)
            window, step = divmod(number, len(LIMITS))
            if self.capacity_bytes:
                await self.set_limit(client, LIMITS[step])
            if window % FLUSH_EVERY == 1 and step == len(LIMITS) // 2:
                await self._flush(client)
            number += 1

    async def set_limit(self, client: aiohttp.ClientSession, share: float) -> None:
        body = {"server_args": {"vtensor_memory_limit_bytes": int(share * self.capacity_bytes)}}
        await self._post(client, "/set_internal_state", body, "limit moves")

    async def _flush(self, client: aiohttp.ClientSession) -> None:
        """Hold the users back until all have their answers, or, for as long, have not."""
        self._go.clear()
        try:
            deadline = time.monotonic() + QUIET_SECONDS
            while self._active and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            if self._active:
                self.done["flushes left out"] += 1
            else:
                await self._post(client, "/flush_cache?timeout=10", {}, "flushes")
        finally:
            self._go.set()

    async def _post(self, client: aiohttp.ClientSession, path: str, body: dict[str, Any], what: str) -> None:
        try:
            async with client.post(self.server.url + path, json=body) as answer:
                self.done[what if answer.status == 200 else f"{what} refused"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.done[f"{what} failed: {type(error).__name__}"] += 1

    # What came of it.

    def windows(self) -> list[dict[str, float]]:
        """For each whole window of time: how many answers began, and percentiles of TTFT in ms."""
        found: list[dict[str, float]] = []
        for number in range(max(1, int(min(self.now_s, self.seconds) / self.window_s))):
            start_s, stop_s = number * self.window_s, (number + 1) * self.window_s
            ttfts = [
                1000 * one.ttft_s
                for one in self.samples
                if one.ttft_s and one.sort != "canary" and start_s <= one.at_s < stop_s
            ]
            if ttfts:
                p50, p99 = np.percentile(ttfts, (50, 99))
                found.append({"at_s": start_s, "answers": len(ttfts), "ttft_p50": float(p50), "ttft_p99": float(p99)})
        return found

    def errors(self) -> Counter[str]:
        """By kind: numbers are left out of the texts. Of users who left it is none that they got no answer."""
        texts = (sample.error for sample in self.samples if sample.error and sample.fate == "stays")
        found = Counter(re.sub(r"\d+", "N", text)[:120] for text in texts)
        return found + Counter({what: count for what, count in self.done.items() if re.search("refused|failed", what)})

    def answers(self) -> dict[str, list[int]]:
        """For each occasion: how often fixed prompts were answered, and how often otherwise than by the idle server."""
        return {
            occasion: [len(apart), sum(canary.differed[occasion] for canary in self.canaries)]
            for occasion, apart in self.apart().items()
        }

    def apart(self) -> dict[str, list[float]]:
        """For each occasion and answer: how far its logprobs are from the idle server's, in nat."""
        found: dict[str, list[float]] = {}
        for canary in self.canaries:
            for occasion, apart in canary.apart.items():
                found.setdefault(occasion, []).extend(apart)
        return found


class Soak:
    """Runs what the command line asks for and keeps what it has found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.results = Results("soak", options.out, keep=torch.cuda.is_available())
        self.report: dict[str, Any] = {}
        self.wrong: list[str] = []
        self._device = device_bytes()

    @property
    def left_s(self) -> float:
        left_s: float = self.options.budget_seconds - (time.monotonic() - self.begin)
        return left_s

    def server(self, name: str, seconds: float, *, ours: bool) -> None:
        """Start one, soak it, look at what is left, write."""
        options = self.options
        flags = [f"--vtensor-idle-seconds={options.idle_seconds}"] if name.startswith("vtensor") else []
        flags += ["--vtensor-debug"] if flags and options.debug else []
        begin = time.monotonic()
        if options.url and ours:
            server = Remote(name, options.url)
        else:
            port = free_port(options.port, "127.0.0.1")
            server = Server(name, options.model, port, options.out / f"server-{name}.log", [*flags, *options.flags])
        try:
            server.wait(max(1.0, self.left_s))
            print(f"{name}: up after {time.monotonic() - begin:.0f} s", flush=True)
            self._soak(server, seconds)
        finally:
            server.stop()

    def _soak(self, server: Remote, seconds: float) -> None:
        info, figures = server.info(), server.vtensor()
        pool_tokens = int(info.get("max_total_num_tokens") or 0) or 100_000
        traffic = Traffic(self.options.seed, self.options.scale)
        users = min(MOST_USERS, max(4, round(OVERLOAD * pool_tokens / traffic.mean_tokens())))
        capacity = figures["num_pages"] * figures["page_bytes"] if figures else 0
        load = Load(server, traffic, users=users, capacity_bytes=capacity)
        warm_up = Load(server, traffic, users=users, capacity_bytes=0)
        found: dict[str, Any] = {"users": users, "pool_tokens": pool_tokens, "debug": self.options.debug}
        self.report[server.name] = found
        print(f"  {users} users of {traffic.mean_tokens():.0f} tokens each on a pool of {pool_tokens}", flush=True)
        try:
            run_async(asyncio.wait_for(load.learn(), max(1.0, self.left_s)))
        except TimeoutError:
            raise OutOfTime(f"it is spent before {server.name} has answered the fixed prompts") from None
        run_async(warm_up.run(min(15.0, seconds / 8), moves=False))
        before = self._settled(server, capacity)
        seconds = min(seconds, self.left_s - END_SECONDS)
        if seconds < LEAST_LOAD_SECONDS:
            raise OutOfTime(f"{self.left_s:.0f} s are left for the load of {server.name}")
        retracted = _retracted(server)
        watch = Watch([server], every_s=WATCH_SECONDS)
        watch.start()
        try:
            run_async(load.run(seconds))
        finally:
            watch.stop()
            found |= {"seconds": min(load.now_s, load.seconds), "retracted": _retracted(server) - retracted}
            self._write(server, load, watch, found)
        after = self._settled(server, capacity)
        found |= {"before": before, "after": after}
        self._wrong(server, leaks(before, after))

    def _settled(self, server: Remote, capacity: int) -> dict[str, Any]:
        """Idle, flushed, and given back: the server's figures, and the GPU's memory."""
        if capacity:
            server.post("/set_internal_state", {"server_args": {"vtensor_memory_limit_bytes": capacity}}, 20)
        deadline = time.monotonic() + min(SETTLE_SECONDS, max(1.0, self.left_s))
        server.post("/flush_cache?timeout=30", {}, 40)
        figures = server.vtensor()
        while figures and _busy(figures) and time.monotonic() < deadline:
            time.sleep(0.2)
            figures = server.vtensor()
        return figures | ({"device_bytes": self._device()} if self._device else {})

    def _write(self, server: Remote, load: Load, watch: Watch, found: dict[str, Any]) -> None:
        out, name = self.options.out, server.name
        windows, errors, answers, apart = load.windows(), load.errors(), load.answers(), load.apart()
        good = [one for one in load.samples if not one.error]
        sorts = Counter(sample.sort for sample in good)
        gone = Counter(sample.fate for sample in load.samples if sample.error and sample.fate != "stays")
        found |= {"finished": dict(sorts), "gone": dict(gone), "done": dict(load.done), "errors": dict(errors)}
        found |= {"windows": windows, "answers": answers}
        found["apart_nat"] = {  # null, since JSON has no infinity
            occasion: [nat if math.isfinite(nat) else None for nat in (statistics.median(nats), max(nats))]
            for occasion, nats in apart.items()
        }
        found["first_difference"] = min((at for one in load.canaries for at in one.first_differences), default=None)
        print(f"  {name}: {found['seconds']:.0f} s; finished {dict(sorts)}; gone {dict(gone)}; {dict(load.done)}")
        print(f"  {found['retracted']} requests retracted, as far as the log tells; errors: {dict(errors) or 'none'}")
        for occasion, (asked, differed) in answers.items():
            print(
                f"  fixed prompts {occasion}: {differed} of {asked} answers differ from the idle server's; up to there "
                f"logprobs are {statistics.median(apart[occasion]):.3f} nat apart, at most {max(apart[occasion]):.3f}"
            )
        case = f"{found['seconds']:.0f} s, {OVERLOAD} x {found['pool_tokens']} tokens"
        case += ", debug" if found["debug"] and watch.looks and watch.looks[0].limit else ""
        rows: list[tuple[str, str, float]] = [
            ("requests", "1", len(good)),
            ("errors", "1", errors.total()),
            ("retracted", "1", found["retracted"]),
            *((f"fixed prompts {occasion}", "1", asked) for occasion, (asked, _) in answers.items()),
            *((f"differ {occasion}", "1", differed) for occasion, (_, differed) in answers.items()),
        ]
        for which, window in (("first", windows[:1]), ("last", windows[-1:])):
            for one in window:
                print(f"  {which} window: TTFT p50 {one['ttft_p50']:.0f} ms, p99 {one['ttft_p99']:.0f} ms", flush=True)
                rows += [(f"{q} {which} window", "ms", one[q]) for q in ("ttft_p50", "ttft_p99")]
        for metric, unit, value in rows:
            self.results.add(case, name, metric, unit, [value])
        for occasion, nats in apart.items():
            within = [nat for nat in nats if nat <= WRONG_NAT]
            self.results.add(case, name, f"logprobs apart {occasion}", "nat", within or [float("nan")])
            most = max(within, default=float("nan"))
            self.results.add(case, name, f"logprobs apart {occasion}, at most", "nat", [most])
            if beyond := len(nats) - len(within):
                far = "further from the idle server's than rounding goes"
                self._wrong(server, [f"{beyond} of {len(nats)} answers {occasion} are {far}"])
        self._wrong(server, [f"{count} times {text}" for text, count in errors.items()])
        self._wrong(server, [f"in the log: {line[:200]}" for line in server.errors()[:3]])
        lines = {f"TTFT p{q}": [(one["at_s"] / 60, one[f"ttft_p{q}"]) for one in windows] for q in (50, 99)}
        line_plot(out / f"{name}-ttft.svg", f"{name} under {OVERLOAD} times what it holds", "minute", "ms", lines)
        memory = {
            what: [(look.at_s, getattr(look, what) / GIB) for look in watch.looks]
            for what in ("limit", "backed", "in_use", "device")
        }
        line_plot(out / f"{name}-memory.svg", f"{name}: memory", "s", "GiB", memory)
        looks = [asdict(look) | {"each": " ".join(map(str, look.each))} for look in watch.looks]
        _write_csv(out / f"{name}-memory.csv", looks)
        self.save()
        _write_csv(
            out / f"{name}-requests.csv",
            [asdict(one) | {"gaps_s": max(one.gaps_s, default=0.0)} for one in load.samples],
        )

    def _wrong(self, server: Remote, texts: list[str]) -> None:
        for text in texts:
            print(f"  WRONG with {server.name}: {text}", flush=True)
        self.wrong += [f"{server.name}: {text}" for text in texts]

    def save(self) -> None:
        settings = {name: str(value) for name, value in vars(self.options).items()}
        text = json.dumps({"settings": settings, "wrong": self.wrong} | self.report, indent=1)
        (self.options.out / "soak.json").write_text(text + "\n")


def leaks(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it should be after everything has ended; nothing for a server without vTensor memory.

    Driver calls that were refused count as calls: after one, handles and mappings are not explained.
    """
    found = []
    for name in ("pages_in_use", "rows_running", "pages_fenced", "requests_waiting"):
        if after.get(name):
            found.append(f"{name} is {after[name]} when idle and flushed")
    for name in ("backed_bytes", "mappings", "pages_free_backed"):
        if name in after and after[name] > before[name]:
            found.append(f"{name} was {before[name]} before and is {after[name]}")
    if calls := after.get("driver_calls"):
        pages = after["pages_backed"] + 1  # and the padding page
        for what, made, ended, expected in (
            ("handles", "create", "release", pages),
            ("mappings", "map", "unmap", after["mappings"] + pages),
        ):
            if calls[made] - calls[ended] != expected:
                found.append(f"{calls[made]} {made} less {calls[ended]} {ended} are not {expected} {what}")
        if (now := _reserved(after)) != (then := _reserved(before)):
            found.append(f"{then} address ranges were reserved before, {now} are now")
    if "device_bytes" in after and (grown := after["device_bytes"] - before["device_bytes"]) > DEVICE_SLACK_BYTES:
        found.append(f"the GPU has {grown / GIB:.2f} GiB less than before")
    return found


def _reserved(figures: dict[str, Any]) -> int:
    calls = figures["driver_calls"]
    return int(calls["reserve"] - calls["free_reservation"])


def _busy(figures: dict[str, Any]) -> bool:
    names = ("pages_in_use", "pages_free_backed", "rows_running", "requests_waiting")
    return any(figures.get(name) for name in names)


def _retracted(server: Remote) -> int:
    return sum(int(count) for count in RETRACTED.findall(server.log()))


def _tokens(dice: random.Random, count: int) -> tuple[int, ...]:
    return tuple(dice.choices(VOCABULARY, k=count))


def _client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        read_bufsize=1 << 22,
    )


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--server", default="vtensor-auto", help="of bench/servers.py (%(default)s)")
    parser.add_argument("--url", help="a server that runs already, in place of --server")
    parser.add_argument("--stock", help="a stock server for the same load afterwards, like stock-fa3")
    parser.add_argument("--seconds", type=float, default=480.0 if cuda else 30.0, help="of load (%(default)s)")
    parser.add_argument("--stock-seconds", type=float, help="of load of the stock server; default: a quarter of it")
    parser.add_argument("--debug", action="store_true", help="the server checks every invariant before each launch")
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.05, help="of all lengths (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--idle-seconds", type=float, default=2.0, help="the server's (%(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=3600.0, help="for all of it (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out/soak"), help="report, plots, logs, a copy of the rows"
    )
    parser.add_argument("--port", type=int, default=30200)
    parser.add_argument("flags", nargs="*", help="flags for every server, after --")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    check_names(parser, filter(None, (options.server, options.stock)))
    if not cuda and not options.url:
        print("no GPU: a small load on a tiny model, on the host driver. Its times say nothing about a GPU.")
        host = [*models.HOST_FLAGS, "--max-total-tokens=2048", "--max-running-requests=24"]
        options.flags = [*host, *options.flags]
    if not options.url:
        options.model = models.folder_of(options)
    return options


def main(argv: list[str] | None = None) -> int:
    leave_on_sigterm()
    options = arguments(argv)
    soak = Soak(options)
    servers = [(options.server, options.seconds, True)]
    if options.stock:
        servers.append((options.stock, options.stock_seconds or options.seconds / 4, False))
    for name, seconds, ours in servers:
        try:
            soak.server(name, seconds, ours=ours)
        except OutOfTime as error:
            soak.wrong.append(f"the budget of {options.budget_seconds:.0f} s: {error}")
        except (VTensorError, RuntimeError, OSError, TimeoutError, ValueError) as error:
            soak.wrong.append(f"{name}: {error!r}")
        finally:
            soak.save()
    print("\n".join([f"{len(soak.wrong)} things are wrong:", *soak.wrong] if soak.wrong else ["Nothing is wrong."]))
    return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main())
