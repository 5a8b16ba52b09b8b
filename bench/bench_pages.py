"""What does the layout cost? Our kernels on dense rows, and on token-major rows of pages that lie in random order.

A page of n tokens is 128 KiB times n of 32 layers, mapped by the driver. Rows to pages.csv; time in us.
"""

from __future__ import annotations

import copy
import math

import torch
from attention_bench import ROTATED, Call, Inputs, Memory, Shape, arguments, checked_calls, equal, microseconds
from bench_decode import vtensor_triton as decode
from bench_prefill import vtensor_triton as prefill
from results import Results

SHAPES = [equal(1, 32767, 1), equal(8, 4095, 1), equal(32, 2047, 1), equal(8, 4096, 512), equal(16, 3968, 64)]
TOKEN_BYTES = 128 << 10
SIZES = (16, 32, 64, 128, 256)


def on_dense_rows(inputs: Inputs, shape: Shape) -> Call:
    """The same kernel on rows that hold one layer only, as a cache without vTensor lays them out."""
    dense = copy.copy(inputs)
    dense.views = [tuple(part.contiguous() for part in view) for view in inputs.views]
    return on_rows(dense, shape)


def on_rows(inputs: Inputs, shape: Shape) -> Call:
    return decode(inputs, shape) if shape.max_new == 1 else prefill(inputs, shape)


def main() -> None:
    options = arguments(__doc__)
    if not torch.cuda.is_available():
        print("pages: kernels are timed on an NVIDIA GPU, and there is none here; run it on a machine that has one")
        return
    results = Results("pages", options.out)
    times: dict[tuple[str, str], float] = {}
    for size in SIZES:
        memory = Memory(10 << 30, page_bytes=size * TOKEN_BYTES)
        for shape in SHAPES:
            # Dense rows are timed beside each size: ratios are of one run.
            implementations = {f"pages of {size}": on_rows, "dense": on_dense_rows}
            calls = checked_calls(implementations, Inputs(shape, memory, least_page_tokens=size), shape)
            for name, percentiles in microseconds(calls, options.budget_ms).items():
                times[shape.name, name if name != "dense" else f"dense beside {size}"] = percentiles[1]
                case = f"{shape.name} beside pages of {size}" if name == "dense" else f"{shape.name} pages of {size}"
                results.add_percentiles(case, "vtensor-triton", "time", "us", *percentiles)
        torch.cuda.synchronize()
        memory.driver.close()
    print(f"time against dense rows, {ROTATED} layers in turn  " + "".join(f"{f'page {size}':>10}" for size in SIZES))
    for shape in SHAPES:
        ratios = [
            times.get((shape.name, f"pages of {size}"), math.nan) / times.get((shape.name, f"dense beside {size}"), 1.0)
            for size in SIZES
        ]
        print(f"{shape.name:<45}" + "".join(f"{ratio:>10.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
