"""What would another page size have cost a server? Its trace again, with pages of each size: driver calls and memory.

    python bench/bench_replay.py [TRACE] [--page-tokens 16 32 ...] [--out DIR]

A trace is what --vtensor-trace writes. It needs no GPU, and says nothing about time: a call takes what it takes on the
GPU (README.md). Rows to replay.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import FOLDER, Results

from sgl_vtensor.core.projection import project
from sgl_vtensor.core.replay import replay
from sgl_vtensor.core.trace import TraceReader
from sgl_vtensor.errors import VTensorError

CHAT = FOLDER / "traces" / "chat-16k-2026-11-27-h200.trace"
"""64 chats of 8 turns, up to 16k tokens, 16 at a time, by ``vtensor-triton`` (compare.py --workload chat-16k)."""
SIZES = (16, 32, 64, 128, 256, 512)
CHECK_EVERY = 5000


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path, default=CHAT, help="of one rank (%(default)s)")
    parser.add_argument("--page-tokens", nargs="+", type=int, default=SIZES, metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="for the rows; default: bench/results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    results = Results("replay", options.out, keep=options.out is None)
    try:
        reader = TraceReader(options.trace)
        for size in options.page_tokens:
            if size == reader.header.layout.page_tokens:
                result = replay(reader, check_every=CHECK_EVERY)
            else:
                result = project(reader, page_tokens=size, check_every=CHECK_EVERY)
            if result.broken is not None:
                print(f"BROKEN at {result.broken}")
                return 1
            figures = result.figures
            calls = sum(figures.driver_calls.values()) - figures.driver_calls["refused"]
            case, impl = options.trace.stem, f"page of {size} tokens"
            for kind in ("create", "release", "map", "unmap"):
                results.add(case, impl, kind, "1", [figures.driver_calls[kind]])
            results.add(case, impl, "driver calls", "1", [calls])
            results.add(case, impl, "memory at most", "B", [figures.peak_bytes])
            shown = f"{calls:7} driver calls, memory at most {figures.peak_bytes / (1 << 30):.1f} GiB"
            print(f"  {size:4} tokens a page: {shown}", flush=True)
    except (VTensorError, OSError) as error:
        print(f"{options.trace}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
