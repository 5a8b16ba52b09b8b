"""What memory a server takes over time, and whether it lets go: one table, and for each question a CSV and a plot.

    python bench/memory.py --model DIR [--ask limit pair ...] [--budget-seconds 560] [--out DIR] -- FLAGS

curve       users come (1, 8, 32), stay a while, and leave: the whole GPU's memory, on vTensor memory and on stock
grow        requests that fill the pool, which grows under them, and again with most of it backed: speed, late tokens
limit       under load the limit falls to a sixth and rises again, ten times: how soon memory follows, what fails
neighbour   under load another process takes 30 GB of the GPU, twice: what fails, what it costs
pair        two servers on one GPU have their bursts in turn, of 70% of the memory that is free: with limits of a half
            each, and sharing all of it. Chats begin one after another and pause between turns: were all to come at
            once, most of the wait would be for their histories' first computation, whoever has the memory
replicas    --dp-size 2, a GPU each: one load, the limit lowered under it; what top and limit say of each replica
killed      under load SIGKILL ends a process of the server, whichever chance names, --kills times: how soon all of them
            and their memory are gone, and whether the next start works

Memory is NVML's, whole, of the GPUs that CUDA_VISIBLE_DEVICES names (all); without a GPU it is what the host driver has
taken, and neighbour is left out.
Rows go to bench/results/memory.csv where there is a GPU, and to --out in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import models
import numpy as np
import torch
import workloads
from load import Run, Sample, percentiles, play, summarize, unit
from plots import line_plot
from results import Results
from servers import Remote, Server, leave_on_sigterm, run_async

from sgl_vtensor.cli.main import main as sgl_vtensor
from sgl_vtensor.cli.server import free_port, group_members
from sgl_vtensor.errors import VTensorError

GIB = 1 << 30
RISING = workloads.Kind("questions with longer answers", 1, 1, 1, 0, question=2000, answer=500)
HEAVY = workloads.Kind("questions that need much memory", 1, 1, 1, 0, question=4000, answer=600)
GROWING = workloads.Kind("long answers: the pool grows as they do", 1, 1, 1, 0, question=4000, answer=1000)
MOST_USERS = 64
BURST = workloads.Kind("chats with a history", 1, 1, 1, 0, turns=6, question=64, answer=64, history=4000)
ARRIVAL_SECONDS = 0.15
"""From one chat of a burst to the next: a GPU computes the history of an 8B model in two thirds of it."""
PAUSE_SECONDS = 1.0
QUESTIONS = ("curve", "grow", "limit", "neighbour", "pair", "replicas", "killed")
WATCH_SECONDS = 0.25
BEFORE_SECONDS = 3.0
"""From when a load begins to what is done to it."""
MOVES = 10
"""How often the limit falls, and rises again."""
FOLLOW_SECONDS = 10.0
GONE_SECONDS = 180.0
"""SGLang's processes look for one another now and then only."""
GONE_BYTES = 64 << 20
"""So much may others of the device have taken meanwhile."""
CACHE_SECONDS = 15.0
"""How long the server whose curve is drawn keeps a prefix that nobody asks for."""
NEIGHBOURS = 21
"""Gaps between tokens that one of them is compared with."""
LOW_SHARE = 1 / 6
TAKEN_BYTES = 30 * 10**9
TAKER = """
import sys, time, torch
size, seconds = int(sys.argv[1]), float(sys.argv[2])
taken = []
while size > 0:  # in pieces, as a model is loaded; what is not to be had is left
    try:
        taken.append(torch.empty(min(size, 1 << 30), dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError:
        break
    size -= taken[-1].numel()
print(sum(piece.numel() for piece in taken), flush=True)
time.sleep(seconds)
"""


@dataclass(frozen=True)
class Look:
    """The memory at one moment, in bytes; of all servers together."""

    at_s: float
    device: int
    backed: int
    in_use: int
    live: int
    """What the tokens of requests and of the cache fill of it."""
    limit: int
    each: tuple[int, ...]
    """What is backed of each server or replica."""


class Watch(threading.Thread):
    """Looks at the memory of the GPU and of the servers until it is stopped."""

    def __init__(self, servers: list[Remote], *, every_s: float = WATCH_SECONDS) -> None:
        super().__init__(daemon=True)
        self.servers = servers
        self.looks: list[Look] = []
        self._every_s = every_s
        self._begin = time.monotonic()
        self._done = threading.Event()
        self._device = device_bytes()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._begin

    def look(self) -> Look:
        figures = [one for server in self.servers for one in server.replicas()]
        each = tuple(one["backed_bytes"] for one in figures)
        return Look(
            self.now_s,
            self._device() if self._device else sum(each),
            sum(each),
            sum(one["pages_in_use"] * one["page_bytes"] for one in figures),
            sum(one["tokens_live"] * one["token_stride_bytes"] for one in figures),
            sum(one["limit_bytes"] for one in figures),
            each,
        )

    def run(self) -> None:
        while not self._done.wait(self._every_s):
            try:
                self.looks.append(self.look())
            except (urllib.error.URLError, OSError, ValueError):
                continue  # a server that does not answer is noticed by its load

    def stop(self) -> None:
        self._done.set()
        self.join()

    def between(self, start_s: float, stop_s: float) -> list[Look]:
        return [one for one in self.looks if start_s <= one.at_s < stop_s]


def device_bytes(what: Literal["used", "free"] = "used") -> Callable[[], int] | None:
    """NVML's figure of what is used, by whomever, or free, on the GPUs that we may see: it itself knows no such bounds.

    CUDA would say it, too, but take half a GiB for a context of ours.
    """
    if not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        import pynvml
    except ImportError:
        ask = ["nvidia-smi", f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"]
        ask += [f"--id={visible}"] if visible else []
        said = lambda: subprocess.run(ask, capture_output=True, text=True, check=True).stdout  # noqa: E731
        return lambda: sum(int(line) << 20 for line in said().splitlines())
    pynvml.nvmlInit()
    numbers = map(int, visible.split(",")) if visible else range(pynvml.nvmlDeviceGetCount())
    handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
    return lambda: sum(int(getattr(pynvml.nvmlDeviceGetMemoryInfo(handle), what)) for handle in handles)


class Questions:
    """Each method asks one question and leaves rows, a CSV of looks and a plot."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.results = Results("memory", options.out, keep=torch.cuda.is_available())
        self.failed = False

    @property
    def left_s(self) -> float:
        left_s: float = self.options.budget_seconds - (time.monotonic() - self.begin)
        return left_s

    # The questions.

    def curve(self) -> None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for name in (f"vtensor-auto+vtensor-cache-seconds={CACHE_SECONDS:g}", self.options.stock):
            with self.servers(name) as (server,), self.watched("curve", name, [server]) as watch:
                self.phase(watch, name, "started", 3.0)
                for users in (1, 8, 32):
                    start_s = watch.now_s
                    load = self.questions(RISING, max(8, 2 * users), seed=users)
                    run = self.load(server, replace(load, users=users))
                    self.note(run, f"curve batch {users}", name)
                    self.row_of(watch.between(start_s, watch.now_s), f"curve batch {users}", name)
                self.phase(watch, name, "after load", 2.0)
                time.sleep(self.options.idle_seconds + 2)
                self.phase(watch, name, "idle, cache kept", 3.0)
                time.sleep(CACHE_SECONDS)
                self.phase(watch, name, "idle, cache expired", 3.0)
                server.flush()
                time.sleep(1)
                self.phase(watch, name, "idle, flushed", 3.0)
            lines[name] = [(one.at_s, one.device / GIB) for one in watch.looks]
            if watch.looks and watch.looks[0].limit:
                lines[f"{name}: KV in use"] = [(one.at_s, one.in_use / GIB) for one in watch.looks]
        line_plot(self.options.out / "curve.svg", "1, 8 and 32 users, then idle", "s", "GiB", lines)

    def limit(self) -> None:
        name = "vtensor-auto"
        with self.servers(name) as (server,), self.watched("limit", name, [server]) as watch:
            full = server.vtensor()["limit_bytes"]
            low = int(full * LOW_SHARE)
            follows_s: list[float] = []
            with self.loaded(server, lambda seed: self.workload(32, sessions=96, seed=seed)) as loading:
                time.sleep(BEFORE_SECONDS)
                while len(follows_s) < MOVES and not loading.done():
                    self.set_limit(server, low)
                    follows_s.append(self._follow(watch, low))
                    time.sleep(0.5)
                    self.set_limit(server, full)
                    time.sleep(1)
            self.note(loading.result(), "limit moved under load", name)
            page = server.vtensor()["page_bytes"]
            self.results.add("limit lowered under load", name, "times", "1", [len(follows_s)])
            self.results.add("limit lowered under load", name, "memory follows after", "s", follows_s or [float("nan")])
            print(f"  {len(follows_s)} times; memory followed after {', '.join(f'{s:.2f}' for s in follows_s)} s")
            self.failed |= len(follows_s) < MOVES
            looks = [one for one in watch.looks if one.backed > one.limit + page]
            print(f"  {len(looks)} of {len(watch.looks)} looks found more memory than the limit")
        lines = {
            what: [(one.at_s, getattr(one, what) / GIB) for one in watch.looks]
            for what in ("limit", "backed", "in_use")
        }
        line_plot(self.options.out / "limit.svg", "a limit that moves under load", "s", "GiB", lines)

    def neighbour(self) -> None:
        if not torch.cuda.is_available():
            print("neighbour: left out, it needs a GPU")
            return
        name = "vtensor-auto"
        with self.servers(name) as (server,), self.watched("neighbour", name, [server]) as watch:
            # More than the neighbour leaves: requests that run wait for memory, or are retracted.
            make = partial(self.questions, HEAVY, self._users(server, 0.9, HEAVY))
            before = self.load(server, make(1))
            with self.loaded(server, make) as loading:
                for _ in range(2):
                    time.sleep(BEFORE_SECONDS)
                    command = [sys.executable, "-c", TAKER, str(TAKEN_BYTES), "8"]
                    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
                    taken = int(done.stdout or 0)
                    print(f"  the neighbour took {taken / 1e9:.1f} GB {done.stderr[-200:]}")
                    self.results.add("neighbour", name, "taken by it", "B", [taken])
            self.note(before, "neighbour: before", name)
            self.note(loading.result(), "neighbour: while it takes and gives back", name)
        lines = {"GPU": [(one.at_s, one.device / GIB) for one in watch.looks],
                 "KV backed": [(one.at_s, one.backed / GIB) for one in watch.looks]}  # fmt: skip
        line_plot(self.options.out / "neighbour.svg", "another process takes 30 GB twice", "s", "GiB", lines)

    def pair(self) -> None:
        """The same traffic in both cases; a burst is one server's, the other one has served and waits."""
        for impl, share in (("a half each", 0.5), ("elastic", 1.0)):
            with self.servers("vtensor-auto", "vtensor-auto") as servers, self.watched("pair", impl, servers) as watch:
                free = self._free_bytes(servers)
                for server in servers:
                    self.set_limit(server, int(min(share * free, server.vtensor()["limit_bytes"])))
                stride_bytes = servers[0].vtensor()["token_stride_bytes"]
                users = max(2, int(0.7 * free / stride_bytes / self.chats(1).longest))
                print(f"  {impl}: {free / GIB:.1f} GiB are free, {users} users in a burst", flush=True)
                for part in ("first", "second"):  # A, B, A, B: the second time with the histories of the first
                    runs: list[Run] = []
                    for number, server in enumerate(servers):
                        runs.append(self.load(server, self.chats(users, seed=10 + number)))
                        print(f"  {impl}, {part} burst of server {number + 1}: {_shown(runs[-1])}", flush=True)
                    self.note(Run.joined(runs), f"pair with pauses of {PAUSE_SECONDS:g} s, {part} bursts", impl)
                self.row_of(watch.looks, f"pair with pauses of {PAUSE_SECONDS:g} s", impl)
            lines = {
                f"server {number + 1}": [(one.at_s, one.each[number] / GIB) for one in watch.looks] for number in (0, 1)
            }
            path = self.options.out / f"pair-{impl.replace(' ', '-')}.svg"
            line_plot(path, f"two servers, {impl}: KV memory", "s", "GiB", lines)

    def grow(self) -> None:
        """One server, twice: first its pool grows under the load; then most of what is needed is backed."""
        name = "vtensor-auto+vtensor-idle-seconds=0"
        with self.servers(name) as (server,), self.watched("grow", name, [server]) as watch:
            users = self._users(server, 0.95, GROWING)
            for number, impl in enumerate(("growing", "backed before", "growing", "backed before")):
                created = server.vtensor()["pages_created"]
                start_s = watch.now_s
                run = self.load(server, self.questions(GROWING, users, seed=number))
                created = server.vtensor()["pages_created"] - created
                self.note(run, "grow", impl)
                late_ms = sorted(late for sample in run.samples for late in _late_ms(sample))
                self.results.add("grow", impl, "pages created", "1", [created])
                self.results.add(
                    "grow", impl, "latest token beyond its neighbours", "ms", late_ms[-1:] or [float("nan")]
                )
                self.results.add("grow", impl, "tokens later than 5 ms", "1", [sum(late > 5 for late in late_ms)])
                shown = ", ".join(f"{late:.2f}" for late in late_ms[-5:])
                print(f"  {impl}: {created} pages created; {len(late_ms)} gaps, most beyond the median: {shown} ms")
                self.row_of(watch.between(start_s, watch.now_s), "grow", impl)
                if number % 2:
                    server.flush()  # gives the memory back
                    time.sleep(1)

    def replicas(self) -> None:
        if torch.cuda.is_available() and torch.cuda.device_count() < 2:
            print("replicas: left out, it needs two GPUs")
            return
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
        name = "vtensor-auto+dp-size=2"
        with self.servers(name) as (server,), self.watched("replicas", name, [server]) as watch:
            with ThreadPoolExecutor(1) as executor:
                loading = executor.submit(self.load, server, self.workload(32, sessions=96))
                time.sleep(BEFORE_SECONDS)
                for command in ("top --once --json", "limit 25%", "top --once", "limit 100%"):
                    self.command(server, *command.split())
                run = loading.result()
            self.note(run, "two replicas", name)
            self.row_of(watch.looks, "two replicas", name)
            if idle := [number for number, one in enumerate(server.replicas()) if not one["tokens_computed"]]:
                print(f"  replicas {idle} had nothing to do")
                self.failed = True
            server.flush()
            self.command(server, "limit")

    def killed(self) -> None:
        name = "vtensor-auto"
        device = device_bytes()
        gone_s: list[float] = []
        longest_s = 0.0
        try:
            while len(gone_s) < self.options.kills and self.left_s > 1.5 * longest_s:
                begin = time.monotonic()
                gone_s += self._kill_under_load(name, len(gone_s), device)
                longest_s = max(longest_s, time.monotonic() - begin)
        finally:  # a start that fails is told by whoever asked; the kills before it count
            self.results.add("killed under load", name, "times", "1", [len(gone_s)])
            self.results.add("killed under load", name, "all gone after", "s", gone_s or [float("nan")])
        self.failed |= not gone_s or max(gone_s) >= GONE_SECONDS

    def _kill_under_load(self, name: str, first: int, device: Callable[[], int] | None) -> list[float]:
        """Of each of the servers side by side the seconds from its kill until nothing of it, and no memory, is left."""
        before = device() if device else 0
        with ThreadPoolExecutor() as executor:
            starts = [executor.submit(self.started, name, first + number) for number in range(self.options.at_once)]
        servers = [start.result() for start in starts if start.exception() is None]
        try:
            for start in starts:
                start.result()
            with ThreadPoolExecutor() as executor:
                kills = [executor.submit(self._kill_one_of, server, device, before) for server in servers]
            return [kill.result() for kill in kills]
        finally:
            for server in servers:
                server.stop()

    def _kill_one_of(self, server: Server, device: Callable[[], int] | None, before: int) -> float:
        load = replace(self.workload(8, sessions=64, seed=server.pid), name="to be cut off")
        with ThreadPoolExecutor(1) as executor:
            loading = executor.submit(self.load, server, load)
            time.sleep(random.uniform(0.2, BEFORE_SECONDS))
            backed = sum(one["backed_bytes"] for one in server.replicas())
            victim = kill_one(server.pid)
            gone_s = self._gone(server.pid, device, before)
            loading.result()
        left = f", {(device() - before) / GIB:+.3f} GiB" if device else ""
        print(f"  {victim} killed, {backed / GIB:.2f} GiB backed: gone after {gone_s:.1f} s{left}", flush=True)
        return gone_s

    # How they are asked.

    def command(self, server: Remote, name: str, *words: str) -> None:
        """Run ``sgl-vtensor`` on the server; what it says is in the log."""
        print(f"  $ sgl-vtensor {' '.join((name, *words))}", flush=True)
        try:
            self.failed |= bool(sgl_vtensor([name, server.url, *words]))
        except ImportError as error:
            print(f"  left out, this machine lacks what it draws with: {error}", flush=True)

    def started(self, name: str, number: int) -> Server:
        options = self.options
        port = free_port(options.port + 10 * number, "127.0.0.1")
        idle = [f"--vtensor-idle-seconds={options.idle_seconds}"] if name.startswith("vtensor") else []
        log = options.out / f"server-{name}-{number}.log"
        server = Server(name, options.model, port, log, [*idle, *options.server_flags])
        try:
            server.wait(max(1.0, self.left_s))
        except BaseException:
            server.stop()
            raise
        return server

    @contextmanager
    def servers(self, *names: str) -> Iterator[list[Server]]:
        servers: list[Server] = []
        begin = time.monotonic()
        try:
            for number, name in enumerate(names):  # one after the other: SGLang looks at free memory
                servers.append(self.started(name, number))
            print(f"{' and '.join(names)}: up after {time.monotonic() - begin:.0f} s", flush=True)
            warm_up = self.workload(2, sessions=2, seed=99)
            for server in servers:
                self.load(server, replace(warm_up, name="warm-up"))
                server.flush()
            yield servers
            for server in servers:
                if errors := server.errors():
                    print(f"  errors in the log of {server.name}: {errors[:3]}", flush=True)
                    self.failed = True
        finally:
            with ThreadPoolExecutor() as executor:
                list(executor.map(lambda server: server.stop(), servers))

    @contextmanager
    def watched(self, question: str, impl: str, servers: list[Any]) -> Iterator[Watch]:
        watch = Watch(servers)
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()
            path = self.options.out / f"{question}-{impl.replace(' ', '-')}.csv"
            with path.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                head = ("seconds", "device_bytes", "backed_bytes", "in_use_bytes", "live_bytes", "limit_bytes", "each")
                writer.writerow(head)
                for one in watch.looks:
                    each = " ".join(map(str, one.each))
                    writer.writerow((f"{one.at_s:.2f}", one.device, one.backed, one.in_use, one.live, one.limit, each))

    def workload(self, users: int, *, sessions: int, seed: int = 1) -> workloads.Workload:
        """Questions that share nothing."""
        built = workloads.build("single", seed, scale=self.options.scale, users=sessions)
        return replace(built, sessions=built.sessions[:sessions], users=users)

    def questions(self, kind: workloads.Kind, users: int, seed: int = 1, *, think_s: float = 0.0) -> workloads.Workload:
        """``users`` who all come at once, one session each."""
        built = workloads.build(kind, seed, scale=self.options.scale, users=users, think_s=think_s)
        return replace(built, sessions=built.sessions[:users], users=users)

    def chats(self, users: int, seed: int = 1) -> workloads.Workload:
        """``users`` who begin one after another and pause before each further turn."""
        scale = self.options.scale
        at_once = self.questions(BURST, users, seed, think_s=scale * PAUSE_SECONDS)
        every_s = scale * ARRIVAL_SECONDS
        sessions = (replace(session, start_s=number * every_s) for number, session in enumerate(at_once.sessions))
        return replace(at_once, sessions=tuple(sessions), users=0)

    def _users(self, server: Remote, share: float, kind: workloads.Kind) -> int:
        """So many that their tokens fill this share of the server's limit; no batch beyond those with a graph."""
        figures = server.vtensor()
        tokens = share * figures["limit_bytes"] / figures["token_stride_bytes"]
        return max(2, min(MOST_USERS, int(tokens / self.questions(kind, 1).longest)))

    @staticmethod
    def _free_bytes(servers: list[Server]) -> int:
        """What servers that have just started could take between them."""
        limits = [server.vtensor()["limit_bytes"] for server in servers]
        free_bytes = device_bytes("free")
        if free_bytes is None:
            return int(min(limits))
        backed = sum(server.vtensor()["backed_bytes"] for server in servers)
        return int(min(free_bytes() + backed - GIB, sum(limits)))

    def load(self, server: Remote, workload: workloads.Workload) -> Run:
        async def timed() -> Run:
            return await asyncio.wait_for(play(server.url, workload, progress=False), max(1.0, self.left_s))

        return run_async(timed())

    @contextmanager
    def loaded(self, server: Remote, make: Callable[[int], workloads.Workload]) -> Iterator[Future[Run]]:
        """Meanwhile one load after another, each with a seed of its own: prompts that are cached would cost nothing."""
        enough = threading.Event()

        def play_all() -> Run:
            runs: list[Run] = []
            while not runs or not enough.is_set():
                runs.append(self.load(server, make(1 + len(runs))))
            return Run.joined(runs)

        with ThreadPoolExecutor(1) as executor:
            loading = executor.submit(play_all)
            try:
                yield loading
            finally:
                enough.set()

    def set_limit(self, server: Remote, num_bytes: int) -> None:
        body = {"server_args": {"vtensor_memory_limit_bytes": num_bytes}}
        server.post("/set_internal_state", body, timeout_s=60)

    def _follow(self, watch: Watch, low: int) -> float:
        begin = time.monotonic()
        while time.monotonic() - begin < FOLLOW_SECONDS:
            look = watch.look()
            if look.backed <= max(low, look.in_use) + look.backed // 100:
                break
            time.sleep(0.05)
        return time.monotonic() - begin

    @staticmethod
    def _gone(group: int, device: Callable[[], int] | None, before: int) -> float:
        """How long until nothing is left of a server, neither a process nor memory of the device."""
        begin = time.monotonic()
        while time.monotonic() - begin < GONE_SECONDS:
            if not group_members(group) and (device is None or device() <= before + GONE_BYTES):
                break
            time.sleep(0.1)
        return time.monotonic() - begin

    def phase(self, watch: Watch, impl: str, what: str, seconds: float) -> None:
        start_s = watch.now_s
        time.sleep(seconds)
        self.row_of(watch.between(start_s, watch.now_s), f"curve {what}", impl)

    def row_of(self, looks: list[Look], case: str, impl: str) -> None:
        if not looks:
            return
        self.results.add(case, impl, "GPU memory used", "B", [one.device for one in looks])
        shown = f"  {impl} {case}: {np.median([one.device for one in looks]) / GIB:.2f} GiB used"
        if looks[0].limit:
            self.results.add(case, impl, "KV memory backed", "B", [one.backed for one in looks])
            self.results.add(case, impl, "KV memory in use", "B", [one.in_use for one in looks])
            self.results.add(case, impl, "KV memory of live tokens", "B", [one.live for one in looks])
            idle = [one.backed - one.live for one in looks]
            self.results.add(case, impl, "KV memory backed beyond live tokens", "B", idle)
            shown += f", of it {np.median([one.backed for one in looks]) / GIB:.3f} backed for KV"
            shown += f", {np.median([one.in_use for one in looks]) / GIB:.3f} in use"
        print(shown, flush=True)

    def note(self, run: Run, case: str, impl: str) -> None:
        figures = summarize(run)
        for metric, value in figures.items():
            self.results.add(case, impl, metric, unit(metric), [value])
        print(f"  {impl} {case}: {_shown(run)}", flush=True)
        for error in sorted({sample.error for sample in run.samples if sample.error})[:3]:
            print(f"    error: {error}", flush=True)
        self.failed |= bool(figures["errors"])


def kill_one(group: int) -> str:
    """Kill one of a server's processes and return its name; not Python's resource tracker, missed at the end only."""
    named = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() for pid in group_members(group)}
    victim = random.choice([pid for pid, name in named.items() if "resource_tracker" not in name])
    os.kill(victim, signal.SIGKILL)
    return named[victim][:60]


def _shown(run: Run) -> str:
    figures = summarize(run) | percentiles([sample for sample in run.samples if not sample.error])
    names = ("throughput", "ttft_p50", "ttft_p99", "itl_p99", "cached_share", "errors")
    return ", ".join(f"{name} {figures[name]:.4g}" for name in names if name in figures)


def _late_ms(sample: Sample) -> list[float]:
    """How much later than its neighbours each token came; of the part where no prompt is computed between answers."""
    gaps = 1000 * np.array(sample.gaps_s[len(sample.gaps_s) // 4 :])
    if len(gaps) < 2 * NEIGHBOURS:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(gaps, NEIGHBOURS)
    return list(map(float, gaps[NEIGHBOURS // 2 :][: len(windows)] - np.median(windows, axis=1)))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--ask", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument(
        "--stock", default="stock-fa3" if cuda else "stock-default", help="to compare with (%(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0 if cuda else 0.05, help="of prompts and answers (%(default)s)"
    )
    parser.add_argument("--idle-seconds", type=float, default=5.0, help="the servers' (%(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="in killed (%(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="servers side by side in killed (%(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=3600.0, help="for all of it (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out/memory"), help="logs, looks, plots, a copy of the rows"
    )
    parser.add_argument("--port", type=int, default=30100)
    parser.add_argument("server_flags", nargs="*", help="flags for every server, after --")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if not cuda:
        print("no GPU: a small load on a tiny model, on the host driver. Its figures say nothing about a GPU.")
        options.server_flags = [*models.HOST_FLAGS, "--max-total-tokens=8192", *options.server_flags]
    options.model = models.folder_of(options)
    return options


def main(argv: list[str] | None = None) -> int:
    leave_on_sigterm()
    questions = Questions(arguments(argv))
    for name in questions.options.ask:
        print(f"== {name}", flush=True)
        try:
            getattr(questions, name)()
        except (VTensorError, RuntimeError, OSError, TimeoutError) as error:
            print(f"{name}: {error!r}", flush=True)  # the questions after it may do
            questions.failed = True
    return int(questions.failed)


if __name__ == "__main__":
    sys.exit(main())
