"""Is a server on vTensor memory as fast, and as right, as stock SGLang under one shared-prefix load?

Servers are started in groups and measured in turn (A, B, A, B), each under a load shaped like generated-shared-prefix
of ``sglang.bench_serving``, with the same seeds. Before that, first-token logprobs of the same prompts are compared.
A load is run twice by default: cold, and warm with its prefixes cached.

    python bench/bench_serving.py --model DIR --group stock-fa3 vtensor-triton --group stock-triton vtensor-auto
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path

import torch
from load import closed_loop, shared_prefix, summarize
from results import Results
from servers import Server

from sgl_vtensor.cli.smollm2 import smollm2

UNITS = {
    "throughput": "req/s",
    "ttft_p50": "ms",
    "ttft_p99": "ms",
    "itl_p50": "ms",
    "itl_p99": "ms",
    "cached_share": "1",
}
PROBE_TOKENS = list(range(100, 1700, 100))


def run_load(server: Server, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One load on one server."""
    prompts = shared_prefix(args.groups, args.prompts, args.prefix, args.question, seed)
    return summarize(*asyncio.run(closed_loop(server.url, prompts, args.output, args.concurrency)))


def probe_prompts() -> list[list[int]]:
    """32 prompts of 1 to 8 100 tokens: alone, sharing prefixes, and long enough to be chunked."""
    draw = random.Random(7)
    tokens = lambda count: [draw.randrange(1000, 40000) for _ in range(count)]  # noqa: E731
    shared = [tokens(4096), tokens(1000), tokens(127)]
    prompts = [tokens(count) for count in (1, 15, 16, 17, 63, 64, 65, 500, 1023, 2049, 4097, 8000, 8100, 8100)]
    prompts += [base + tokens(extra) for base in shared for extra in (1, 16, 200, 777, 3900)]
    prompts += [prompts[11], prompts[14], shared[0]]
    return prompts


def probe(server: Server, count: int) -> list[list[float]]:
    """First-token logprobs of a fixed set of tokens, for the first ``count`` probe prompts."""
    answers = []
    for prompt in probe_prompts()[:count]:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": -1,
            "token_ids_logprob": PROBE_TOKENS,
        }
        info = server.post("/generate", body)["meta_info"]
        answers.append([value for value, *_ in info["output_token_ids_logprobs"][0]])
    return answers


def largest_difference(mine: list[list[float]], theirs: list[list[float]]) -> float:
    """Of any logprob of two servers' probes."""
    pairs = zip(mine, theirs, strict=True)
    return max(abs(x - y) for own, other in pairs for x, y in zip(own, other, strict=True))


def run_small(args: argparse.Namespace) -> None:
    """Without a GPU: as much as two cores do in a few minutes, and it says what that is worth."""
    print("no GPU: a small load on the host driver. It shows that everything works; the times mean nothing for a GPU.")
    args.groups, args.prompts, args.prefix, args.question, args.output, args.concurrency = 2, 3, 200, 20, 8, 4
    args.probes = 4
    args.server_flags += ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "20000"]
    args.server_flags += ["--sampling-backend", "pytorch", "--grammar-backend", "none", "--skip-server-warmup"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with the model's config and tokenizer; default: SmolLM2-135M-Instruct")
    parser.add_argument("--group", nargs="+", action="append", help="servers that run side by side")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--question", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="logs and a copy of the results")
    parser.add_argument("--probes", type=int, default=32, help="prompts whose first-token logprobs are compared")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("server_flags", nargs="*", help="flags for every server, after --")
    args = parser.parse_args()
    if args.model is None:
        args.model = str(smollm2())
    if args.group is None:
        args.group = (
            [["stock-fa3", "vtensor-auto"]] if torch.cuda.is_available() else [["stock-default", "vtensor-auto"]]
        )
    if not torch.cuda.is_available():
        run_small(args)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results("serving", args.out)
    case = f"gsp {args.groups}x{args.prompts} prefix {args.prefix} new {args.question} out {args.output}"
    case += f" c{args.concurrency}"
    probes: dict[str, list[list[float]]] = {}
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for group in args.group:
        begin = time.monotonic()
        servers = [
            Server(name, args.model, args.port + 10 * index, args.out / f"server-{name}.log", args.server_flags)
            for index, name in enumerate(group)
        ]
        try:
            for server in servers:
                server.wait()
            print(f"{', '.join(group)}: up after {time.monotonic() - begin:.0f} s", flush=True)
            for server in servers:
                probes[server.name] = probe(server, args.probes)
                baseline = next(iter(probes))
                difference = largest_difference(probes[server.name], probes[baseline])
                case_name, metric = f"first-token logprob, {args.probes} prompts", f"max_abs_diff_from_{baseline}"
                results.add(case_name, server.name, metric, "nat", [difference])
                print(f"  {server.name:24s} max |logprob - {baseline}'s| = {difference:.4f}", flush=True)
            for server in servers:
                server.post("/flush_cache", {})
            for seed in args.seeds:
                for state in ("cold", "warm"):
                    for server in servers:
                        report = run_load(server, args, seed)
                        figures = table.setdefault((server.name, state), {})
                        for metric, value in report.items():
                            figures.setdefault(metric, []).append(value)
                        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in report.items())
                        print(f"  {server.name:24s} seed {seed} {state}: {shown}", flush=True)
            for server in servers:
                print(f"  {server.name}: errors {server.errors()[:3]}, {json.dumps(server.vtensor())}", flush=True)
        finally:
            for server in servers:
                server.stop()
        # Recorded group by group: a run that is cut off keeps what it has measured.
        for (name, state), figures in table.items():
            if name in group:
                for metric, values in figures.items():
                    results.add(f"{case} {state}", name, metric, UNITS[metric], values)
    baseline = next(iter(probes))
    print(f"{'medians':31s} " + " ".join(f"{metric:>12s}" for metric in UNITS) + "   throughput ratio")
    for (name, state), figures in table.items():
        middle = {metric: statistics.median(values) for metric, values in figures.items()}
        ratio = middle["throughput"] / statistics.median(table[baseline, state]["throughput"])
        print(f"{name:24s} {state:6s} " + " ".join(f"{middle[metric]:12.4g}" for metric in UNITS) + f"   {ratio:.3f}")


if __name__ == "__main__":
    main()
