"""What does a call to the driver cost: idle, while the GPU computes, and while other processes make calls, too?

    python bench/bench_driver.py [--pages 16] [--neighbours 2] [--calls 200] [--out DIR]

Each call in us; ``behind a kernel`` is one that is made when the GPU has --kernel-ms of work: if it takes as long, it
waits for the GPU. ``launch`` is a small kernel's, alone and just behind a map; ``step`` the GPU's time for a row of
matrix products, and ``stream`` for reading --stream-gib once, as decode reads weights: alone and while calls are made,
which take the GPU's address translations away from what runs. Rows to driver.csv. Without a GPU the host driver's calls
only.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from results import Results

from sgl_vtensor.vmm import open_driver
from sgl_vtensor.vmm.driver import VmmDriver

MIB = 1 << 20
GIB = 1 << 30
STEP_PRODUCTS = 8
BEHIND = 5
"""Calls of each kind behind a kernel."""
Times = defaultdict[str, list[float]]
Timed = Callable[[str, Callable[[], object]], None]
"""Makes a call of some kind, and may time it."""


def come_and_go(driver: VmmDriver, base: int, num_bytes: int, timed: Timed) -> None:
    """One page's life, as the pool has it: created, mapped at its home and in a row, and all of it undone."""
    handles: list[int] = []
    timed("memory_info", driver.memory_info)
    timed("create", lambda: handles.append(driver.create(num_bytes)))
    timed("map", lambda: driver.map(base, handles[0], num_bytes, writable=True))
    timed("map again", lambda: driver.map(base + num_bytes, handles[0], num_bytes, writable=False))
    timed("unmap again", lambda: driver.unmap(base + num_bytes, num_bytes))
    timed("unmap", lambda: driver.unmap(base, num_bytes))
    timed("release", lambda: driver.release(handles[0]))


def untimed(_: str, call: Callable[[], object]) -> None:
    call()


def us_of(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


class Gpu:
    """Work that keeps it busy, and how long a step of it takes."""

    def __init__(self, stream_bytes: int) -> None:
        self._streamed = torch.zeros(stream_bytes // 4, dtype=torch.int32, device="cuda")
        self._matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda") / 64
        self._small = torch.zeros(32, device="cuda")
        self._graph = torch.cuda.CUDAGraph()
        self._step()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._step()

    def _step(self) -> None:
        product = self._matrix
        for _ in range(STEP_PRODUCTS):
            product = self._matrix @ product

    def step_us(self, meanwhile: Callable[[], object]) -> float:
        """One step; ``meanwhile`` is called again and again until it is over."""
        return self._us(self._graph.replay, meanwhile)

    def stream_us(self, meanwhile: Callable[[], object]) -> float:
        """The same for reading much memory once."""
        return self._us(self._streamed.sum, meanwhile)

    def _us(self, work: Callable[[], object], meanwhile: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        while not end.query():
            meanwhile()
        return 1000 * start.elapsed_time(end)

    def launch(self) -> None:
        """A small kernel."""
        self._small.add_(1)

    def queue(self, num_steps: int) -> Callable[[], bool]:
        """So many steps, and what says whether they are done."""
        for _ in range(num_steps):
            self._graph.replay()
        event = torch.cuda.Event()
        event.record()
        return event.query

    def wait(self) -> None:
        torch.cuda.synchronize()


def measure(driver: VmmDriver, gpu: Gpu | None, num_bytes: int, calls: int, kernel_ms: float) -> Times:
    """Microseconds, by what they are called in the rows."""
    times: Times = defaultdict(list)
    base = driver.reserve(2 * num_bytes)
    page = partial(come_and_go, driver, base, num_bytes)

    def alone(kind: str, call: Callable[[], object]) -> None:
        times[kind].append(us_of(call))

    for _ in range(calls):
        page(alone)
    kinds = list(times)
    if gpu is not None:
        times["step"] = [gpu.step_us(lambda: None) for _ in range(calls)]
        num_steps = math.ceil(1000 * kernel_ms / statistics.median(times["step"]))
        _while_it_computes(gpu, page, num_steps, calls, times)
        for kind in kinds:
            _behind_a_kernel(gpu, page, kind, num_steps, times)
        times["launch"] = [us_of(gpu.launch) for _ in range(calls)]

        def then_launch(kind: str, call: Callable[[], object]) -> None:
            call()
            if kind == "map":
                times["launch behind map"].append(us_of(gpu.launch))
                gpu.wait()

        for _ in range(calls):
            page(then_launch)
        times["step beside calls"] = [gpu.step_us(lambda: page(untimed)) for _ in range(calls)]
        times["stream"] = [gpu.stream_us(lambda: None) for _ in range(calls)]
        times["stream beside calls"] = [gpu.stream_us(lambda: page(untimed)) for _ in range(calls)]
        gpu.wait()
    driver.free_reservation(base, 2 * num_bytes)
    return times


def _while_it_computes(gpu: Gpu, page: Callable[[Timed], None], num_steps: int, calls: int, times: Times) -> None:
    """Before each call the GPU has work, whatever the call before did."""
    done = gpu.queue(num_steps)

    def timed(kind: str, call: Callable[[], object]) -> None:
        nonlocal done
        if done():
            done = gpu.queue(num_steps)
        times[f"{kind} while it computes"].append(us_of(call))

    for _ in range(calls):
        page(timed)
    gpu.wait()


def _behind_a_kernel(gpu: Gpu, page: Callable[[Timed], None], asked: str, num_steps: int, times: Times) -> None:
    def timed(kind: str, call: Callable[[], object]) -> None:
        if kind != asked:
            return untimed(kind, call)
        gpu.queue(num_steps)
        times[f"{kind} behind a kernel"].append(us_of(call))
        gpu.wait()

    for _ in range(BEHIND):
        page(timed)


def neighbour(name: Literal["cuda", "host"], num_bytes: int, ready: Event, stop: Event) -> None:
    """Another process, whose pages come and go without a pause."""
    with closing(open_driver(name)) as driver:
        base = driver.reserve(2 * num_bytes)
        ready.set()
        while not stop.is_set():
            come_and_go(driver, base, num_bytes, untimed)
        driver.free_reservation(base, 2 * num_bytes)


@contextmanager
def neighbours(number: int, name: Literal["cuda", "host"], num_bytes: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    stop, ready = context.Event(), [context.Event() for _ in range(number)]
    processes = [context.Process(target=neighbour, args=(name, num_bytes, event, stop)) for event in ready]
    for process in processes:
        process.start()
    try:
        for event in ready:
            if not event.wait(120):
                raise RuntimeError("a neighbour did not start")
        yield
    finally:
        stop.set()
        for process in processes:
            process.join()


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", nargs="+", type=int, default=[2, 16], metavar="MIB", help="default: %(default)s")
    parser.add_argument("--neighbours", nargs="+", type=int, default=[0, 2], help="processes (%(default)s)")
    parser.add_argument("--calls", type=int, default=200 if cuda else 50, help="of each kind (%(default)s)")
    parser.add_argument("--kernel-ms", type=float, default=50.0, help="work in front of a call (%(default)s)")
    parser.add_argument("--stream-gib", type=float, default=8.0, help="memory to read once (%(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the rows")
    options = parser.parse_args(argv)
    name: Literal["cuda", "host"] = "cuda" if cuda else "host"
    if not cuda:
        print("no GPU: what the host driver's calls to Linux cost, which says nothing of a GPU's")
    results = Results("driver", options.out, keep=cuda)
    for size in options.pages:
        for number in options.neighbours:
            with neighbours(number, name, size * MIB), closing(open_driver(name)) as driver:
                gpu = Gpu(int(options.stream_gib * GIB)) if cuda else None
                times = measure(driver, gpu, size * MIB, options.calls, options.kernel_ms)
            case = f"pages of {size} MiB, {number} neighbours"
            print(case)
            for kind, values in times.items():
                results.add(case, name, kind, "us", values)
                middle, late = np.percentile(values, (50, 99))
                print(f"  {kind:<32} {middle:10.1f} us, p99 {late:10.1f}", flush=True)


if __name__ == "__main__":
    main()
