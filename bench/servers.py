"""Named server configurations, how to start and stop them, and what to ask of a server that runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Coroutine, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sgl_vtensor.cli.server import Server as Process

Result = TypeVar("Result")

CORES_A_SERVER = 3
"""Its scheduler, its tokenizer and its detokenizer are busy at the same time."""

CONFIGS: dict[str, list[str]] = {
    "stock-default": [],
    "stock-fa3": ["--attention-backend", "fa3"],
    "stock-triton": ["--attention-backend", "triton"],
    "stock-flashinfer": ["--attention-backend", "flashinfer"],
    "stock-fa3-p16": ["--attention-backend", "fa3", "--page-size", "16"],
    "stock-fa3-p64": ["--attention-backend", "fa3", "--page-size", "64"],
    "vtensor-auto": ["--enable-vtensor"],
    "vtensor-triton": ["--enable-vtensor", "--vtensor-kernel", "triton"],
    "vtensor-fa3": ["--enable-vtensor", "--vtensor-kernel", "fa3"],
    "vtensor-unmapped": ["--enable-vtensor", "--vtensor-kernel", "triton", "--vtensor-unmap-rows"],
    "vtensor-paged-fa3": ["--enable-vtensor", "--attention-backend", "fa3"],
}
"""``name+FLAG=VALUE`` adds a flag to a configuration: ``vtensor-triton+vtensor-page-tokens=64``."""


def flags_of(name: str) -> list[str]:
    """The flags of a configuration, additions included.

    Raises:
        KeyError: no such configuration; the message names those that there are.
    """
    base, *additions = name.split("+")
    if base not in CONFIGS:
        raise KeyError(f"no server configuration {base!r}; there are {', '.join(CONFIGS)}")
    return [*CONFIGS[base], *(part for addition in additions for part in f"--{addition}".split("=", 1))]


def check_names(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """End with a usage error where there is no such configuration."""
    for name in names:
        try:
            flags_of(name)
        except KeyError as error:
            parser.error(str(error.args[0]))


def shares_of_cpus(num_servers: int, cpus: Iterable[int]) -> list[list[int]]:
    """Which of these CPUs the driver gets, and then each server; nothing where there are too few.

    An idle SGLang server polls, on a CPU that the measured one may need. With all CPUs in common a launch of 32 layers
    took 9 ms in one server and 12 in the other, with CPUs of their own 10 to 11 in both (H200, 16 CPUs).
    """
    siblings: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.setdefault(topology.read_text() if topology.exists() else str(cpu), []).append(cpu)
    cores = list(siblings.values())
    each = (len(cores) - 1) // num_servers
    if all(len(core) == 1 for core in cores):
        each -= each % 2  # a virtual machine may not say which of its CPUs share a core; neighbours do
    if each < CORES_A_SERVER:
        return []
    firsts = [0, *range(len(cores) - num_servers * each, len(cores) + 1, each)]
    return [[cpu for core in cores[a:b] for cpu in core] for a, b in itertools.pairwise(firsts)]


def leave_on_sigterm() -> None:
    """End by an exception from now on, so that servers are stopped and what was found is written."""
    signal.signal(signal.SIGTERM, _leave)
    others = sys.unraisablehook

    def again(ignored: Any) -> None:
        # Raised while a destructor or a weak reference's callback ran, where Python lets no exception through. By a
        # thread, since os.kill would call the handler here, where none gets through either.
        if isinstance(ignored.exc_value, SystemExit):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            others(ignored)

    sys.unraisablehook = again


def _leave(number: int, _frame: Any) -> NoReturn:
    print(f"Told to end (signal {number}).", flush=True)
    raise SystemExit(128 + number)


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """``asyncio.run``; after :func:`leave_on_sigterm`, SIGTERM cancels ``main`` and then ends the program.

    An exception raised in the middle of any callback of the loop can be lost there, with a task that then never ends.
    """
    if signal.getsignal(signal.SIGTERM) is not _leave or threading.current_thread() is not threading.main_thread():
        return asyncio.run(main)
    told = False

    async def cancellable() -> Result:
        task = asyncio.current_task()
        assert task is not None

        def tell() -> None:
            nonlocal told
            told = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, tell)
        return await main

    try:
        return asyncio.run(cancellable())
    finally:
        signal.signal(signal.SIGTERM, _leave)  # the loop has taken its own away, and with it ours
        if told:
            _leave(signal.SIGTERM, None)


class Remote:
    """A server that somebody has started."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url.rstrip("/")

    def wait(self, timeout_s: float) -> None:
        """Return when the server answers.

        Raises:
            RuntimeError, ServerFailed: it did not within the time, or it has ended. The message has its log's end.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.running():
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200 and self.is_it():
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.5)
        raise self.failure(f"{self.name} at {self.url} did not answer within {timeout_s:.0f} s")

    def is_it(self) -> bool:
        """Whether who answers at the url is this server."""
        return True

    def running(self) -> bool:
        return True

    def failure(self, what: str) -> Exception:
        return RuntimeError(what)

    def stop(self) -> None:
        """Nothing: it is not ours."""

    def run_on(self, cpus: Collection[int]) -> None:
        """Nothing: its CPUs are not ours to choose."""

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def flush(self) -> None:
        """Empty the cache, once nothing runs."""
        self.post("/flush_cache?timeout=60", {})

    def info(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def replicas(self) -> list[dict[str, Any]]:
        """The vtensor figures of each replica; empty for a stock server."""
        states = self.info().get("internal_states") or []
        return [state["vtensor"] for state in states if state.get("vtensor")]

    def vtensor(self) -> dict[str, Any]:
        """The server's vtensor figures, of its first replica; empty for a stock server."""
        return next(iter(self.replicas()), {})

    def log(self) -> str:
        """What it has logged; nothing where the log is not ours."""
        return ""

    def errors(self) -> list[str]:
        """Lines of the log that report a failure."""
        marks = ("CUDA error", "illegal memory", "leak detected", "hit an exception", "VTensorError", "DriverError")
        return [line for line in self.log().splitlines() if any(mark in line for mark in marks)]


class Server(Remote):
    """A server of a named configuration: a process group that ends with the benchmark, however that ends."""

    def __init__(self, name: str, model: str, port: int, log: Path, extra: list[str]) -> None:
        super().__init__(name, f"http://127.0.0.1:{port}")
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
        # SGLang takes its port late: until then, and if it fails to, somebody else's server may answer there.
        self._served_name = f"{name}-{os.getpid()}-{time.monotonic_ns()}"
        command += ["--served-model-name", self._served_name, "--enable-cache-report"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = Process([*command, *flags_of(name), *extra], log, environment)

    def run_on(self, cpus: Collection[int]) -> None:
        """Move all its threads to these CPUs."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
                if os.getpgid(int(process.name)) == self.pid:
                    for thread in (process / "task").iterdir():
                        os.sched_setaffinity(int(thread.name), cpus)

    def wait(self, timeout_s: float) -> None:
        super().wait(timeout_s)
        # SGLang does it after its own warm-up, which benchmarks skip: without it a collection of the 900 000 objects
        # that there are since the start, some tenths of a second, can hit one server or the other.
        self.post("/freeze_gc", {})

    def is_it(self) -> bool:
        return bool(self.info().get("served_model_name") == self._served_name)

    def running(self) -> bool:
        return self._process.running()

    @property
    def pid(self) -> int:
        """Of the process that has the others."""
        return self._process.group

    def failure(self, what: str) -> Exception:
        return self._process.failed(what)

    def stop(self) -> None:
        self._process.stop()

    def log(self) -> str:
        return self._process.log.read_text(errors="replace")
