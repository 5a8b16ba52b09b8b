"""Which configuration of our kernels is best, shape by shape, against FlashAttention-3 in the same run?

    python bench/sweep.py decode|prefill --out DIR     # prints a table; DIR/sweep-decode.json has every time

Compiles first, in several processes, which fill Triton's cache. Ends after --seconds, with what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from attention_bench import Call, Inputs, Make, Memory, Shape, chat, checked_calls, equal, microseconds, uneven
from bench_prefill import fa3_paged, fa3_view
from vtensor_kernels import DecodeSchedule, DecodeWorkspace, decode_attention, prefill_attention, prefill_schedule
from vtensor_kernels import decode as decode_module
from vtensor_kernels.decode import DecodeConfig
from vtensor_kernels.prefill import PrefillConfig

DECODE_SHAPES = [
    equal(1, 8191, 1),
    equal(32, 8191, 1),
    chat(32, decode=True),
    uneven(16, 1500, 16000),
    uneven(4, 2000, 6000),
    uneven(8, 600, 2000),
    equal(8, 4095, 1),
    equal(64, 2047, 1),
    equal(1, 131071, 1),
    equal(256, 127, 1),
    equal(128, 1023, 1),
    equal(1, 1023, 1),
    equal(16, 4095, 1, 8, 1),
    equal(16, 4095, 1, 32, 8, 64),
    equal(1, 8191, 1, 8, 1),
    equal(16, 4095, 1, 32, 4),
    equal(8, 16383, 1),
    Shape((29999, *(511,) * 31), (1,) * 32, label="one30k+31x512"),
]
PREFILL_SHAPES = [
    equal(1, 0, 256),
    equal(1, 4096, 16),
    equal(64, 1024, 16),
    equal(8, 0, 256),
    equal(8, 4096, 16),
    equal(1, 32768, 16),
    chat(8, decode=False),
    equal(8, 0, 2048),
    equal(1, 4096, 256),
    equal(1, 32768, 256),
    equal(16, 3968, 64),
    equal(8, 4096, 64),
    equal(2, 8192, 128),
    equal(1, 0, 2048),
    equal(4, 4096, 512, 32, 32),
    equal(1, 4096, 256, 8, 2),
    equal(8, 4096, 512),
]


def decode_configs() -> dict[str, DecodeConfig]:
    """By name: block_n, warps, stages, fewest tokens, and programs a processor."""
    found = [
        DecodeConfig(64, 4, 3, 256, 2),
        DecodeConfig(64, 4, 3, 128, 2),
        DecodeConfig(64, 4, 3, 512, 2),
        DecodeConfig(64, 4, 3, 256, 1),
        DecodeConfig(64, 4, 3, 256, 4),
        DecodeConfig(64, 4, 3, 256, 6),
        DecodeConfig(64, 4, 4, 256, 2),
        DecodeConfig(64, 4, 2, 128, 3),
        DecodeConfig(64, 8, 3, 256, 2),
        DecodeConfig(64, 2, 3, 256, 3),
        DecodeConfig(128, 4, 2, 256, 2),
        DecodeConfig(128, 8, 2, 256, 2),
        DecodeConfig(128, 8, 3, 256, 1),
        DecodeConfig(32, 4, 4, 128, 3),
        DecodeConfig(32, 2, 5, 128, 4),
        DecodeConfig(32, 2, 4, 128, 6),
        # For one long request, where a launch's ends count: fewer parts to combine, and more bytes on their way.
        DecodeConfig(64, 4, 3, 128, 1),
        DecodeConfig(64, 4, 4, 128, 1),
        DecodeConfig(64, 8, 4, 128, 1),
        DecodeConfig(128, 4, 2, 128, 1),
        DecodeConfig(128, 4, 3, 128, 1),
        DecodeConfig(128, 8, 3, 128, 1),
        # For heads of 64, of which a block of 64 tokens is half as many bytes; and for an H200, which reads faster.
        DecodeConfig(128, 4, 3, 128, 2),
        DecodeConfig(128, 4, 4, 128, 2),
        DecodeConfig(64, 4, 4, 128, 2),
        DecodeConfig(64, 4, 5, 128, 1),
    ]
    return {f"n{c.block_n} w{c.num_warps} s{c.num_stages} m{c.min_tokens} p{c.programs}": c for c in found}


def prefill_configs() -> dict[str, PrefillConfig | None]:
    """By name: h for the Hopper kernel or block_m for the loop, block_n, warps, stages; splits last, if set."""
    tiles = {
        "h": PrefillConfig(128, 128, 8, 3, hopper=True),
        "m128n128w8s3": PrefillConfig(128, 128, 8, 3),
        "m64n128w4s3": PrefillConfig(64, 128, 4, 3),
        "m64n64w4s4": PrefillConfig(64, 64, 4, 4),
        "m64n64w4s3": PrefillConfig(64, 64, 4, 3),
        "m64n32w4s4": PrefillConfig(64, 32, 4, 4),
    }
    found: dict[str, PrefillConfig | None] = {"chosen": None}
    for name, config in tiles.items():
        for splits in (1, 2, 3, 4, 6, 12) if config.block_n == 128 else (1, 2, 4, 8, 16, 32):
            found[f"{name} x{splits}"] = dataclasses.replace(config, splits=splits, min_split_tokens=256)
    return found


@contextmanager
def combined(values: int, stages: int, blocks: float) -> Iterator[None]:
    """Decode's COMBINED_VALUES, COMBINE_STAGES and COMBINE_BLOCKS for a while, however many parts there are."""
    names = ("COMBINED_VALUES", "COMBINE_STAGES", "COMBINE_BLOCKS", "VALUES_AT_ONCE")
    usual = [getattr(decode_module, name) for name in names]
    for name, value in zip(names, (values, stages, blocks, 0), strict=True):
        setattr(decode_module, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, usual, strict=True):
            setattr(decode_module, name, value)


def decode(
    config: DecodeConfig | None,
    loads: str = "auto",
    *,
    scheduled: bool = True,
    combine: tuple[int, int, float] | None = None,
) -> Make:
    """Our decode, its schedule made before, as for all layers of a pass but the first.

    ``combine``: as ``combined`` takes them, instead of the kernel's own.
    """
    other = partial(combined, *combine) if combine else nullcontext

    def make(inputs: Inputs, shape: Shape) -> Call:
        out = torch.empty_like(inputs.q)
        workspace = DecodeWorkspace(
            shape.batch, shape.q_heads, shape.head_dim, inputs.q.device, kv_heads=shape.kv_heads
        )
        schedule = None
        if scheduled:
            with other():
                schedule = DecodeSchedule(workspace, inputs.views[0][0], shape.batch, config=config)
                schedule.update(inputs.rows, inputs.kv_lens)

        def call(layer: int) -> torch.Tensor:
            k, v = inputs.views[layer]
            with other():
                decode_attention(
                    inputs.q, k, v, out, inputs.rows, inputs.kv_lens, workspace=workspace, sm_scale=inputs.sm_scale,
                    loads=loads, schedule=schedule, config=config,
                )  # fmt: skip
            return out

        return call

    return make


def prefill(config: PrefillConfig | None, loads: str = "auto") -> Make:
    """Our prefill, its schedule made before, as for all layers of a pass but the first."""

    def make(inputs: Inputs, shape: Shape) -> Call:
        out = torch.empty_like(inputs.q)
        pairs = shape.max_new * shape.q_heads // shape.kv_heads
        if config is not None and config.splits is not None:
            tiles = sum(-(-new * shape.q_heads // shape.kv_heads // config.block_m) for new in shape.news)
            programs = tiles * shape.kv_heads * config.splits
            if config.splits > 1 and (programs > 600 or config.splits * 256 > max(shape.lengths)):
                raise ValueError("more splits than could help")
            if config.block_m == 64 and pairs > 256 and programs > 264:
                raise ValueError("larger tiles are for this")
        schedule = prefill_schedule(
            inputs.q, *inputs.views[0], inputs.rows, inputs.qo_indptr, inputs.kv_lens, shape.max_new,
            max_kv_len=max(shape.lengths), config=config,
        )  # fmt: skip

        def call(layer: int) -> torch.Tensor:
            k, v = inputs.views[layer]
            prefill_attention(
                inputs.q, k, v, out, inputs.rows, inputs.qo_indptr, inputs.kv_lens, shape.max_new,
                sm_scale=inputs.sm_scale, loads=loads, schedule=schedule,
            )  # fmt: skip
            return out

        return call

    return make


BASELINES: dict[str, Make] = {
    "fa3-paged-p1": fa3_paged(1, stock=True),
    "fa3-paged-p64": fa3_paged(64),
    "fa3-view": fa3_view,
}


def ours(bench: str) -> dict[str, Make]:
    if bench == "prefill":
        configs = prefill_configs()
        few = {name: config for name, config in configs.items() if config is not None and config.block_m == 64}
        return {
            **{name: prefill(config) for name, config in configs.items()},
            **{f"{name} pointer": prefill(config, "pointer") for name, config in few.items()},
        }
    found = {name: decode(config) for name, config in decode_configs().items()}
    first = next(iter(decode_configs().values()))
    alone = DecodeConfig(64, 4, 3, 128, 1)
    return {
        **found,
        "first, own schedule": decode(first, scheduled=False),
        "first, tma": decode(first, "tma"),
        "alone, tma": decode(alone, "tma"),
        "chosen": decode(None),
        # Cut so that one request of 8192 tokens with one kv head of 8 query heads has ``share`` blocks in each part.
        **{
            f"alone, combine {values} s{stages} share {share}": decode(
                alone, combine=(values, stages, values / 1024 * share * share / 128 * 1.01)
            )
            for values, stages in ((8192, 1), (2048, 6), (1024, 8), (1024, 12))
            for share in (3, 4, 5)
        },
    }


def compile_part(bench: str, part: int, parts: int) -> float:
    """Call every parts-th implementation once on a small shape of each kind of heads. Returns the seconds it took."""
    begin = time.monotonic()
    memory = Memory(1 << 30)
    shapes = DECODE_SHAPES if bench == "decode" else PREFILL_SHAPES
    kinds = sorted({(shape.q_heads, shape.kv_heads, shape.head_dim) for shape in shapes}, reverse=True)
    work = [(make, kind) for kind in kinds for make in ours(bench).values()]
    for make, kind in work[part::parts]:
        for batch, prefix in ((1, 4095), (33, 127)) if kind == (32, 8, 128) else ((1, 4095),):
            shape = equal(batch, prefix, 1 if bench == "decode" else 129, *kind)
            try:
                make(Inputs(shape, memory), shape)(0)
            except Exception as error:  # noqa: BLE001  (the sweep itself will say)
                print(f"compile {kind}: {type(error).__name__}: {str(error)[:150]}")
    torch.cuda.synchronize()
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=("decode", "prefill"))
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--budget-ms", type=float, default=12.0, help="time for each configuration and shape")
    parser.add_argument("--shapes", type=int, help="the first so many shapes only: 1 is one request of 8192 tokens")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("sweep: kernels are timed on an NVIDIA GPU, and there is none here; run it on a machine that has one")
        return
    begin = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        parts = [(options.bench, part, options.processes) for part in range(options.processes)]
        slowest = max(pool.starmap(compile_part, parts))
    print(f"compiled in {time.monotonic() - begin:.0f} s, the slowest process {slowest:.0f} s", flush=True)

    memory = Memory.of_gpu()
    implementations = {**BASELINES, **ours(options.bench)}
    times: dict[str, dict[str, tuple[float, float, float]]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    shapes = DECODE_SHAPES if options.bench == "decode" else PREFILL_SHAPES
    for shape in shapes[: options.shapes]:
        if time.monotonic() - begin > options.seconds:
            print(f"out of time before {shape.name}")
            break
        inputs = Inputs(shape, memory)
        calls = checked_calls(implementations, inputs, shape)
        times[shape.name] = found = microseconds(calls, options.budget_ms)
        (options.out / f"sweep-{options.bench}.json").write_text(json.dumps(times, indent=1))
        del inputs, calls
        torch.cuda.empty_cache()
        fa3 = min((found[name][1] for name in BASELINES if name in found), default=math.nan)
        paged = found.get("fa3-paged-p1", (math.nan,) * 3)[1]
        print(f"\n{shape.name}   [{time.monotonic() - begin:.0f} s]")
        for name, (_, p50, p80) in sorted(found.items(), key=lambda item: item[1][1]):
            print(
                f"  {name:<22} {p50:8.1f} us (p80 {p80:8.1f})  {shape.kv_bytes / p50 / 1e3:6.0f} GB/s "
                f"{shape.flops / p50 / 1e6:6.0f} TFLOP/s  {paged / p50:5.2f} x FA3 page 1  {fa3 / p50:5.2f} x best FA3",
                flush=True,
            )
    if not times:
        return
    print("\ngeometric mean against FA3 page 1, over the shapes that a configuration has")
    names = {name for found in times.values() for name in found}
    means = {}
    for name in names:
        ratios = [f["fa3-paged-p1"][1] / f[name][1] for f in times.values() if name in f and "fa3-paged-p1" in f]
        if ratios:
            means[name] = (math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios), len(ratios))
    for name, (mean, least, count) in sorted(means.items(), key=lambda item: -item[1][0]):
        print(f"  {name:<22} {mean:.3f}, least {least:.3f}, {count} shapes")


if __name__ == "__main__":
    main()
