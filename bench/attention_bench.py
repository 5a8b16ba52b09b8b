"""What bench_prefill.py and bench_decode.py share: rows like a real cache's, timing, and the CSV of results."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import Results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
LAYERS = 32
"""Layers that share a token's row, as in an 8B model: 128 KiB a token in bfloat16 with 8 heads of 128."""
ROTATED = 4
"""Calls go round this many layers, as a model's do, so that a call does not find its keys in the L2 cache."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One case: ``new`` queries for each request behind ``prefix`` tokens."""

    batch: int
    prefix: int
    new: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        heads = f"h{self.q_heads}/{self.kv_heads}x{self.head_dim}"
        return f"b{self.batch} prefix{self.prefix} new{self.new} {heads}"

    @property
    def length(self) -> int:
        return self.prefix + self.new

    @property
    def flops(self) -> float:
        """Of the two products, causal."""
        pairs = self.new * self.prefix + self.new * (self.new + 1) / 2
        return 4.0 * self.batch * self.q_heads * self.head_dim * pairs

    @property
    def kv_bytes(self) -> float:
        return 2.0 * 2.0 * self.batch * self.length * self.kv_heads * self.head_dim


class Inputs:
    """The same keys twice: token-major rows with all layers in a token, and stock pools, one dense buffer a layer."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        batch, length, heads, dim = shape.batch, shape.length, shape.kv_heads, shape.head_dim
        storage = torch.empty(batch, length, LAYERS, 2, heads, dim, dtype=torch.bfloat16, device="cuda")
        storage[:, :, :ROTATED].normal_(generator=generator)
        self.views = [(storage[:, :, layer, 0], storage[:, :, layer, 1]) for layer in range(ROTATED)]
        self.pools = [
            (k.reshape(batch * length, heads, dim).contiguous(), v.reshape(batch * length, heads, dim).contiguous())
            for k, v in self.views
        ]
        self.q = torch.randn(
            batch * shape.new, shape.q_heads, dim, dtype=torch.bfloat16, device="cuda", generator=generator
        )
        self.rows = torch.arange(batch, dtype=torch.int32, device="cuda")
        self.qo_indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * shape.new
        self.kv_lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(batch * length, dtype=torch.int32, device="cuda").view(batch, length)
        self.sm_scale = dim**-0.5


Call = Callable[[int], torch.Tensor]
"""A call of an implementation on the keys of one of the ROTATED layers."""


def microseconds(call: Call, budget_ms: float) -> tuple[float, float, float]:
    """p20, p50 and p80 of one call, from replays of a CUDA graph of ROTATED calls; eager where capture fails."""
    for layer in range(ROTATED):
        call(layer)
    torch.cuda.synchronize()

    def eager() -> None:
        for layer in range(ROTATED):
            call(layer)

    replay: Callable[[], None]
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        replay = eager
    first = _elapsed_ms(replay)
    replays = max(10, min(200, int(budget_ms / max(first, 1e-3))))
    for _ in range(max(2, replays // 5)):
        replay()
    samples = sorted(_elapsed_ms(replay) * 1000 / ROTATED for _ in range(replays))
    return tuple(statistics.quantiles(samples, n=10)[i] for i in (1, 4, 7))  # type: ignore[return-value]


def _warm_up(calls: dict[str, Call], seconds: float = 0.5) -> None:
    """All of them in turn: on an H100, whoever was timed first after the inputs were made lost up to 15%."""
    end = time.monotonic() + seconds
    while calls and time.monotonic() < end:
        for call in calls.values():
            for layer in range(ROTATED):
                call(layer)
        torch.cuda.synchronize()


def _elapsed_ms(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def arguments(description: str) -> argparse.Namespace:
    """Command line of both benches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--grid", action="store_true", help="a small grid of shapes beside the standard ones")
    parser.add_argument("--impl", action="append", help="time these implementations only (may be given several times)")
    parser.add_argument("--out", type=Path, help="also write the rows here; default: bench/results only")
    parser.add_argument("--budget-ms", type=float, default=60.0, help="time for each implementation and shape")
    return parser.parse_args()


def measure(
    bench: str,
    shapes: list[Shape],
    implementations: dict[str, Callable[[Inputs, Shape], Call]],
    options: argparse.Namespace,
    rate: Callable[[Shape, float], float],
    rate_name: str,
) -> None:
    """Check, time and print every implementation on every shape, and append the rows to the CSV."""
    if not torch.cuda.is_available():
        print(f"{bench}: kernels are timed on an NVIDIA GPU, and there is none here; run it on a machine that has one")
        return
    results = Results(bench, options.out)
    chosen = {name: make for name, make in implementations.items() if not options.impl or name in options.impl}
    rates: dict[str, dict[str, float]] = {name: {} for name in chosen}
    for shape in shapes:
        inputs = Inputs(shape)
        calls: dict[str, Call] = {}
        expected: torch.Tensor | None = None
        for name, make in chosen.items():
            try:
                call = make(inputs, shape)
                result = call(1).clone()
                if expected is None:
                    expected = result
                error = ((result - expected).float().norm() / expected.float().norm()).item()
                if not error < 1e-2:
                    raise RuntimeError(f"differs from {next(iter(chosen))} by {error:.3g}")
                calls[name] = call
            except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
                print(f"{shape.name} {name}: {type(error).__name__}: {str(error)[:300]}")
        _warm_up(calls)
        for name, call in calls.items():
            p20, p50, p80 = microseconds(call, options.budget_ms)
            rates[name][shape.name] = rate(shape, p50)
            results.add_percentiles(shape.name, name, "time", "us", p20, p50, p80)
        calls.clear()
        del inputs
        torch.cuda.empty_cache()
        line = " ".join(f"{rates[name].get(shape.name, math.nan):>18.0f}" for name in chosen)
        if shape is shapes[0]:
            print(f"{rate_name:<44}" + " ".join(f"{name:>18}" for name in chosen))
        print(f"{shape.name:<44}{line}", flush=True)

    first = next(iter(chosen))
    for name in list(chosen)[1:]:
        both = [rates[first][case] / rates[name][case] for case in rates[name] if case in rates[first]]
        if both:
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in both))
            print(f"{first} against {name}: geometric mean {mean:.3f}, least {min(both):.3f}, {len(both)} cases")
