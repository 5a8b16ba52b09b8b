"""What bench_prefill.py and bench_decode.py share: memory like a server's, timing, plots, and the CSV of results."""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from plots import line_plot
from results import Results
from workloads import SHAREGPT

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
LAYERS = 32
"""Layers that share a token's row, as in an 8B model: 128 KiB a token in bfloat16 with 8 heads of 128."""
ROTATED = 4
"""Calls go round this many layers, as a model's do, so that a call does not find its keys in the L2 cache."""
PAGE_BYTES = 16 << 20
"""128 tokens of 32 layers."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One case: request b brings ``news[b]`` queries behind ``prefixes[b]`` tokens."""

    prefixes: tuple[int, ...]
    news: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    label: str = ""
    """For a case of mixed lengths; equal ones name themselves."""
    shared: int = 0
    """Tokens that ``sharers`` requests begin with, each time; they are not neighbours in the batch."""
    sharers: int = 1

    @property
    def name(self) -> str:
        what = self.label or f"prefix{self.prefixes[0]} new{self.news[0]}"
        return f"b{self.batch} {what} h{self.q_heads}/{self.kv_heads}x{self.head_dim}"

    @property
    def batch(self) -> int:
        return len(self.news)

    @property
    def max_new(self) -> int:
        return max(self.news)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(prefix + new for prefix, new in zip(self.prefixes, self.news, strict=True))

    @property
    def even(self) -> bool:
        return len(set(self.news)) == 1

    @property
    def flops(self) -> float:
        """Of the two products, causal."""
        pairs = sum(new * prefix + new * (new + 1) / 2 for prefix, new in zip(self.prefixes, self.news, strict=True))
        return 4.0 * self.q_heads * self.head_dim * pairs

    @property
    def kv_bytes(self) -> float:
        return 2.0 * 2.0 * sum(self.lengths) * self.kv_heads * self.head_dim


def equal(batch: int, prefix: int, new: int, q_heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Shape:
    """``batch`` requests alike."""
    return Shape((prefix,) * batch, (new,) * batch, q_heads, kv_heads, head_dim)


def chat(batch: int, *, decode: bool, seed: int = 0) -> Shape:
    """Chats with ShareGPT's lengths, each at a turn of its own: a question is new, or an answer is growing."""
    draw = random.Random(seed)
    prefixes, news = [], []
    for _ in range(batch):
        prefix = sum(SHAREGPT.question(draw) + SHAREGPT.answer(draw) for _ in range(SHAREGPT.turns(draw) - 1))
        question = SHAREGPT.question(draw)
        prefixes.append(prefix + question + draw.randrange(SHAREGPT.answer(draw)) if decode else prefix)
        news.append(1 if decode else question)
    return Shape(tuple(prefixes), tuple(news), label="chat")


def uneven(batch: int, least: int, most: int, seed: int = 1) -> Shape:
    """Decode of requests whose lengths lie evenly between: a server's batches are like this, and cut otherwise."""
    draw = random.Random(seed)
    lengths = tuple(draw.randrange(least, most) for _ in range(batch))
    return Shape(lengths, (1,) * batch, label=f"{least} to {most}")


class Memory:
    """Physical pages mapped twice, as the plugin does it: at home in their own order, in a window in a shuffled one.

    Made once for all shapes: the rows of a shape are stretches of the window.
    """

    def __init__(self, num_bytes: int, driver_name: str = "cuda", page_bytes: int = PAGE_BYTES) -> None:
        from sgl_vtensor.vmm import open_driver

        self.driver = open_driver(driver_name)  # type: ignore[arg-type]  # one of the two literals
        self.device = self.driver.device
        self.page_bytes = page_bytes
        self.num_pages = num_bytes // page_bytes
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(0))
        size = self.num_pages * page_bytes
        home, window = self.driver.reserve(size), self.driver.reserve(size)
        for position, page in enumerate(order.tolist()):
            handle = self.driver.create(page_bytes)
            self.driver.map(home + page * page_bytes, handle, page_bytes, writable=True)
            self.driver.map(window + position * page_bytes, handle, page_bytes, writable=True)
        self.home = self.driver.tensor(home, size).view(torch.bfloat16)
        self.window = self.driver.tensor(window, size).view(torch.bfloat16)
        self.page_of = order.to(self.device)
        """Home page of each position of the window."""
        generator = torch.Generator(self.device).manual_seed(0)
        for part in self.home.split(1 << 28):
            part.normal_(generator=generator)

    @classmethod
    def of_gpu(cls) -> Memory:
        """Half of what is free, 44 GiB at most."""
        free, _ = torch.cuda.mem_get_info()
        return cls(min(44 << 30, free // 2))


class Inputs:
    """The same keys three times: rows (views of the window), their pages at home, and stock pools, one a layer.

    Rows and homes are token-major, all layers in a token, and the same memory; a stock pool is dense.
    """

    def __init__(self, shape: Shape, memory: Memory, least_page_tokens: int = 128) -> None:
        device = memory.device
        batch, heads, dim = shape.batch, shape.kv_heads, shape.head_dim
        width = 2 * heads * dim
        layers = LAYERS
        while True:
            token_elements = layers * width
            page_tokens = memory.page_bytes // (2 * token_elements)
            row_pages = -(-max(shape.lengths) // page_tokens)
            if batch * row_pages <= memory.num_pages:
                break
            if layers == ROTATED:
                raise ValueError(
                    f"{shape.name} does not fit into {memory.num_pages} pages of {memory.page_bytes} bytes"
                )
            layers //= 2
        row_tokens = row_pages * page_tokens
        self.page_tokens = page_tokens
        self.layers = layers
        self.views = [
            tuple(
                memory.window.as_strided(
                    (batch, row_tokens, heads, dim),
                    (row_tokens * token_elements, token_elements, dim, 1),
                    layer * width + part * heads * dim,
                )
                for part in (0, 1)
            )
            for layer in range(ROTATED)
        ]
        self.homes = [
            tuple(
                memory.home.as_strided(
                    (memory.num_pages * page_tokens, heads, dim),
                    (token_elements, dim, 1),
                    layer * width + part * heads * dim,
                )
                for part in (0, 1)
            )
            for layer in range(ROTATED)
        ]
        lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        row = torch.repeat_interleave(torch.arange(batch, device=device), lengths)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.kv_indptr = starts.int()
        token = torch.arange(len(row), device=device) - starts[row]
        self.pools = [tuple(part[row, token] for part in view) for view in self.views]
        generator = torch.Generator(device).manual_seed(0)
        self.q = torch.randn(
            sum(shape.news), shape.q_heads, dim, dtype=torch.bfloat16, device=device, generator=generator
        )
        self.rows = torch.arange(batch, dtype=torch.int32, device=device)
        self.news = torch.tensor(shape.news, dtype=torch.int32, device=device)
        self.prefixes = torch.tensor(shape.prefixes, dtype=torch.int32, device=device)
        self.qo_indptr = torch.cat([self.news.new_zeros(1), self.news.cumsum(0)]).int()
        self.kv_lens = lengths
        # Slots of the stock pools as SGLang's req_to_token has them, [batch, longest].
        position = torch.arange(max(shape.lengths), device=device)
        self.slots = (starts[:-1, None] + position).clamp(max=len(row) - 1).int()
        pages = memory.page_of[: batch * row_pages].view(batch, row_pages)
        self._home_slots = (pages[:, position // page_tokens] * page_tokens + position % page_tokens).int()
        self.sm_scale = dim**-0.5
        if shape.shared:
            self._share(shape)

    def _share(self, shape: Shape) -> None:
        """Requests b, b + batch / sharers and so on have the first tokens' pages in common, at home and in the pools.

        Rows have copies of them, so that all answers agree: there the memory is not the same.
        """
        groups = shape.batch // shape.sharers
        first = torch.arange(shape.batch, device=self.q.device) % groups
        for slots in (self.slots, self._home_slots):
            slots[:, : shape.shared] = slots[first, : shape.shared]
        for view in self.views:
            for part in view:
                part[:, : shape.shared] = part[first, : shape.shared]

    def pool_indices(self) -> torch.Tensor:
        """Of the stock pools, request after request: [tokens] int32, cut by ``kv_indptr``."""
        return torch.cat([slots[:length] for slots, length in zip(self.slots, self.kv_lens.tolist(), strict=True)])

    def page_table(self, page_tokens: int) -> torch.Tensor:
        """Of the homes in pages of ``page_tokens``, [batch, pages] int32, as SGLang derives it from its slots."""
        if self.page_tokens % page_tokens:
            raise ValueError(f"pages of {self.page_tokens} tokens do not divide into ones of {page_tokens}")
        return (self._home_slots[:, ::page_tokens] // page_tokens).contiguous()


Call = Callable[[int], torch.Tensor]
"""A call of an implementation on the keys of one of the ROTATED layers."""
Make = Callable[[Inputs, Shape], Call]


def _capture(call: Call) -> tuple[Callable[[], None], int]:
    """A graph of calls that takes half a millisecond or more, and how many they are; eager where capture fails."""
    for layer in range(ROTATED):
        call(layer)
    torch.cuda.synchronize()

    def rounds(count: int) -> None:
        for _ in range(count):
            for layer in range(ROTATED):
                call(layer)

    # Long enough that what a replay itself costs does not count.
    count = min(16, max(1, math.ceil(0.5 / max(_elapsed_ms(lambda: rounds(1)), 1e-3))))
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rounds(count)
        return graph.replay, count * ROTATED
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"no graph: {str(error)[:200]}")
        return lambda: rounds(count), count * ROTATED


def _elapsed_ms(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def microseconds(calls: dict[str, Call], budget_ms: float) -> dict[str, tuple[float, float, float]]:
    """p20, p50 and p80 of one call of each, replayed in turn: on an H100, whoever went first alone lost up to 15%."""
    replays = {name: _capture(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent_ms = dict.fromkeys(calls, 0.0)
    while active := [name for name in calls if len(samples[name]) < 4 or spent_ms[name] < budget_ms]:
        for name in active:
            replay, count = replays[name]
            elapsed = _elapsed_ms(replay)
            spent_ms[name] += elapsed
            samples[name].append(elapsed * 1000 / count)
    result = {}
    for name, values in samples.items():
        tenths = statistics.quantiles(values[len(values) // 4 :], n=10)  # the first quarter warms up
        result[name] = (tenths[1], tenths[4], tenths[7])
    return result


def arguments(description: str) -> argparse.Namespace:
    """Command line of both benches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--grid", action="store_true", help="the grid of shapes beside the standard ones")
    parser.add_argument("--impl", action="append", help="time these implementations only (may be given several times)")
    parser.add_argument("--out", type=Path, help="also write the rows and plots here; default: bench/results only")
    parser.add_argument("--budget-ms", type=float, default=40.0, help="time for each implementation and shape")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further shape after this long")
    return parser.parse_args()


def measure(
    bench: str,
    shapes: Sequence[Shape],
    implementations: dict[str, Make],
    options: argparse.Namespace,
    rate: Callable[[Shape, float], float],
    rate_name: str,
) -> None:
    """Check, time and print every implementation on every shape, append the rows to the CSV, and plot the rates."""
    if not torch.cuda.is_available():
        print(f"{bench}: kernels are timed on an NVIDIA GPU, and there is none here; run it on a machine that has one")
        return
    begin = time.monotonic()
    results = Results(bench, options.out)
    memory = Memory.of_gpu()
    chosen = {name: make for name, make in implementations.items() if not options.impl or name in options.impl}
    rates: dict[str, dict[str, float]] = {name: {} for name in chosen}
    print(f"{rate_name:<44}" + " ".join(f"{name:>18}" for name in chosen))
    for number, shape in enumerate(shapes):
        if time.monotonic() - begin > options.seconds:
            print(f"out of time: {', '.join(left.name for left in shapes[number:])} left out")
            break
        try:
            inputs = Inputs(shape, memory)
        except ValueError as error:
            print(error)
            continue
        calls = checked_calls(chosen, inputs, shape)
        for name, (p20, p50, p80) in microseconds(calls, options.budget_ms).items():
            rates[name][shape.name] = rate(shape, p50)
            results.add_percentiles(shape.name, name, "time", "us", p20, p50, p80)
        del inputs, calls
        torch.cuda.empty_cache()
        line = " ".join(f"{rates[name].get(shape.name, math.nan):>18.0f}" for name in chosen)
        print(f"{shape.name:<44}{line}  {time.monotonic() - begin:.0f} s", flush=True)

    cases = [shape.name for shape in shapes]
    for folder in [options.out] if options.out else [ROOT / "bench" / "results"]:
        lines = {
            name: [(float(cases.index(case) + 1), value) for case, value in found.items()]
            for name, found in rates.items()
        }
        line_plot(folder / f"{bench}.svg", f"{bench} on {torch.cuda.get_device_name()}", "case", rate_name, lines)
    for number, case in enumerate(cases):
        print(f"case {number + 1}: {case}")
    first = next(iter(chosen))
    for name in list(chosen)[1:]:
        both = [rates[first][case] / rates[name][case] for case in rates[name] if case in rates[first]]
        if both:
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in both))
            print(f"{first} against {name}: geometric mean {mean:.3f}, least {min(both):.3f}, {len(both)} cases")


def checked_calls(implementations: dict[str, Make], inputs: Inputs, shape: Shape) -> dict[str, Call]:
    """The implementations that run here and agree with the first one that does."""
    calls: dict[str, Call] = {}
    expected: torch.Tensor | None = None
    for name, make in implementations.items():
        try:
            call = make(inputs, shape)
            result = call(1).clone()
            if expected is None:
                expected = result
            error = ((result - expected).float().norm() / expected.float().norm()).item()
            if not error < 1e-2:
                raise RuntimeError(f"differs from {next(iter(calls))} by {error:.3g}")
            calls[name] = call
        except Exception as error:  # noqa: BLE001  (a compiler's, a launch's, an import's: the others are timed)
            print(f"{shape.name} {name}: {type(error).__name__}: {str(error)[:300]}")
    return calls
