"""How fast does a server answer N users who chat? Time to first token, gaps and end-to-end latency, turn by turn.

    python bench/multi_turn_chat.py --url http://127.0.0.1:30000 --users 16 --sessions 64 --think 2
    python bench/multi_turn_chat.py --url http://127.0.0.1:8000 --endpoint openai --model NAME --rate 4
    python bench/multi_turn_chat.py --dataset ShareGPT_V3_unfiltered_cleaned_split.json
    python bench/multi_turn_chat.py --dataset bfcl_eval/data/BFCL_v4_multi_turn_base.json   # pip download bfcl-eval

Works with any SGLang or OpenAI-compatible server. By default a closed loop: each user asks, reads, thinks, asks on.
With --rate, new chats begin at random times (Poisson), however long the server takes. The same seed gives the same
traffic. Written to --out: run.json, requests.csv (a row each) and by_turn.svg. workloads:

"""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import workloads
from load import ENDPOINTS, Run, by_turn, play, summarize, unit
from plots import line_plot
from workloads import Workload


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{workloads.describe()}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--endpoint", choices=sorted(ENDPOINTS), default="sglang", help="how to ask (%(default)s)")
    parser.add_argument("--model", help="name for an OpenAI-compatible server; default: its first")
    parser.add_argument("--workload", choices=sorted(workloads.TABLE), default="chat")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="lengths, and numbers by its square root (%(default)s)"
    )
    parser.add_argument("--dataset", type=Path, help="ShareGPT's or bfcl-eval's, in place of --workload")
    parser.add_argument("--sessions", type=int, default=64, help="conversations to take from the dataset (%(default)s)")
    parser.add_argument("--groups", type=int, default=4, help="system prompts, with ShareGPT's (%(default)s)")
    parser.add_argument("--system", type=int, default=512, help="words in each, with ShareGPT's (%(default)s)")
    parser.add_argument("--users", type=int, default=0, help="at a time; default: as in the table, 32 with the dataset")
    parser.add_argument("--think", type=float, default=0.0, help="mean seconds from an answer to the next question")
    parser.add_argument("--rate", type=float, default=0.0, help="new chats a second (Poisson); default: closed loop")
    parser.add_argument(
        "--history", choices=("server", "scripted"), default="server",
        help="what later turns hold: the server's answers, or given ones, the same for every server (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flush", action="store_true", help="empty the cache of an SGLang server first")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-out/chat"))
    return parser.parse_args()


def workload_of(options: argparse.Namespace) -> Workload:
    """From the command line."""
    if options.dataset:
        return workloads.from_file(
            options.dataset, options.seed, sessions=options.sessions, users=options.users or 32, groups=options.groups,
            system=options.system, think_s=options.think, rate=options.rate,
        )  # fmt: skip
    return workloads.build(
        options.workload, options.seed, scale=options.scale, text=options.endpoint == "openai", think_s=options.think,
        rate=options.rate, users=options.users,
    )  # fmt: skip


def main() -> int:
    options = arguments()
    try:
        workload = workload_of(options)
    except (OSError, ValueError) as error:
        print(f"--dataset {options.dataset} cannot be read: {error}", file=sys.stderr)
        return 2
    print(f"{workload.case} tokens, seed {options.seed}, {options.endpoint} at {options.url}", flush=True)
    try:
        if options.flush:
            urllib.request.urlopen(urllib.request.Request(f"{options.url}/flush_cache", b"{}"), timeout=60).close()
        model = options.model or (_first_model(options.url) if options.endpoint == "openai" else "")
    except urllib.error.URLError as error:
        print(f"No server answers at {options.url} ({error}); start one, or name it with --url", file=sys.stderr)
        return 1
    run = asyncio.run(
        play(
            options.url, workload, endpoint=options.endpoint, model=model, history=options.history,
            timeout_s=options.timeout,
        )
    )  # fmt: skip
    report(run)
    settings = {name: str(value) for name, value in vars(options).items()}
    save(run, options.out, {"case": workload.case, **settings})
    errors = sorted({sample.error for sample in run.samples if sample.error})
    for text in errors[:5]:
        print(f"error: {text}", file=sys.stderr)
    return 1 if errors else 0


def report(run: Run) -> None:
    """Print the summary and the table by turn."""
    figures = summarize(run)
    print(f"{len(run.samples)} requests in {run.seconds:.1f} s")
    for name in ("throughput", "output_rate", "cached_share", "errors", "driver_cpu", "driver_delay_p99"):
        if name in figures:
            print(f"  {name:18}{figures[name]:10.4g} {unit(name)}")
    if "cached_share" not in figures:
        print("  cached_share      not told; SGLang's OpenAI endpoint tells it with --enable-cache-report")
    if figures["driver_cpu"] > 0.8:
        print("  The driver itself was busy: its figures are of the driver, not of the server. Use fewer users.")
    columns = [f"{name}_p{q}" for name in ("ttft", "itl", "e2e") for q in (50, 90, 99)]
    print(f"\n{'turn':>5}{'requests':>9}" + "".join(f"{name:>10}" for name in columns) + "   ms")
    for turn, values in by_turn(run).items():
        cells = "".join(f"{values.get(name, float('nan')):10.1f}" for name in columns)
        print(f"{turn + 1:5}{values['requests']:9.0f}{cells}")
    print(f"{'all':>5}{len(run.samples):9}" + "".join(f"{figures.get(name, float('nan')):10.1f}" for name in columns))


def save(run: Run, folder: Path, settings: dict[str, str]) -> None:
    """run.json, requests.csv and by_turn.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = by_turn(run)
    summary = {
        "settings": settings,
        "seconds": run.seconds,
        "summary": summarize(run),
        "by_turn": {str(turn + 1): values for turn, values in turns.items()},
    }
    (folder / "run.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (folder / "requests.csv").open("w", newline="") as file:
        names = [one.name for one in dataclasses.fields(run.samples[0]) if one.name != "gaps_s"]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(sample, name) for name in names] for sample in run.samples)
    lines = {f"TTFT p{q}": [(turn + 1.0, values[f"ttft_p{q}"]) for turn, values in turns.items()] for q in (50, 90, 99)}
    line_plot(folder / "by_turn.svg", settings["case"], "turn", "ms", lines)
    print(f"\nrun.json, requests.csv and by_turn.svg are in {folder}")


def _first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return str(found["data"][0]["id"])


if __name__ == "__main__":
    sys.exit(main())
