"""Is a server on vTensor memory as fast, and as right, as stock SGLang under one shared-prefix load?

Servers are started in groups and measured in turn (A, B, A, B), each under the generated-shared-prefix load of
``sglang.bench_serving``, with the same seeds. Before that, first-token logprobs of the same prompts are compared.

    python bench/bench_serving.py --model DIR --group stock-fa3 vtensor-triton --group stock-triton vtensor-auto
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import Results
from servers import Server

METRICS = {
    "throughput": ("request_throughput", "req/s"),
    "ttft_mean": ("mean_ttft_ms", "ms"),
    "ttft_p50": ("median_ttft_ms", "ms"),
    "ttft_p99": ("p99_ttft_ms", "ms"),
    "tpot_mean": ("mean_tpot_ms", "ms"),
    "itl_p99": ("p99_itl_ms", "ms"),
}
PROBE_TOKENS = list(range(100, 1700, 100))


def run_load(server: Server, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One load on one server; returns what sglang.bench_serving reports."""
    output = folder / f"{server.name}-{seed}-{time.monotonic_ns()}.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--port", str(server.port)),
        *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(args.groups)),
        *("--gsp-prompts-per-group", str(args.prompts), "--gsp-system-prompt-len", str(args.prefix)),
        *("--gsp-question-len", str(args.question), "--gsp-output-len", str(args.output)),
        *("--tokenizer", args.model, "--max-concurrency", str(args.concurrency), "--seed", str(seed)),
        *("--output-file", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode or not output.exists():
        raise RuntimeError(f"the load on {server.name} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    report: dict[str, Any] = json.loads(output.read_text().splitlines()[-1])
    output.unlink()
    wanted = args.groups * args.prompts
    if report["completed"] != wanted:
        raise RuntimeError(f"{server.name} completed {report['completed']} of {wanted} requests")
    return report


def probe_prompts() -> list[list[int]]:
    """32 prompts of 1 to 8 192 tokens: alone, sharing prefixes, and long enough to be chunked."""
    draw = random.Random(7)
    tokens = lambda count: [draw.randrange(1000, 40000) for _ in range(count)]  # noqa: E731
    shared = [tokens(4096), tokens(1000), tokens(127)]
    prompts = [tokens(count) for count in (1, 15, 16, 17, 63, 64, 65, 500, 1023, 2049, 4097, 8192, 8192, 8000)]
    prompts += [base + tokens(extra) for base in shared for extra in (1, 16, 200, 777, 4000)]
    prompts += [prompts[11], prompts[14], shared[0]]
    return prompts


def probe(server: Server) -> list[list[float]]:
    """First-token logprobs of a fixed set of tokens, for each probe prompt."""
    answers = []
    for prompt in probe_prompts():
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


def compare_probes(probes: dict[str, list[list[float]]], baseline: str) -> dict[str, float]:
    """Largest difference of any logprob from the baseline's, for each server."""
    base = probes[baseline]
    return {
        name: max(abs(x - y) for mine, theirs in zip(own, base, strict=True) for x, y in zip(mine, theirs, strict=True))
        for name, own in probes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the model's config and tokenizer")
    parser.add_argument("--group", nargs="+", action="append", required=True, help="servers that run side by side")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1, help="repeats of each seed, without a flush")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--question", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="logs and a copy of the results")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("server_flags", nargs="*", help="flags for every server, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results("serving", args.out)
    case = f"gsp {args.groups}x{args.prompts} prefix {args.prefix} new {args.question} out {args.output}"
    case += f" c{args.concurrency}"
    probes: dict[str, list[list[float]]] = {}
    table: dict[str, dict[str, list[float]]] = {}
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
                probes[server.name] = probe(server)
            for server in servers:
                server.post("/flush_cache", {})
            for seed in args.seeds:
                for round_number in range(args.rounds):
                    for server in servers:
                        report = run_load(server, args, seed, args.out)
                        figures = table.setdefault(server.name, {})
                        for metric, (key, _) in METRICS.items():
                            figures.setdefault(metric, []).append(report[key])
                        print(
                            f"  {server.name:28s} seed {seed} round {round_number}: "
                            + ", ".join(f"{name} {report[key]:.1f}" for name, (key, _) in METRICS.items()),
                            flush=True,
                        )
            for server in servers:
                print(f"  {server.name}: errors {server.errors()[:3]}, {json.dumps(server.vtensor())}", flush=True)
        finally:
            for server in servers:
                server.stop()
    baseline = next(iter(table))
    for name, figures in table.items():
        for metric, (_, unit) in METRICS.items():
            results.add(case, name, metric, unit, figures[metric])
    for name, difference in compare_probes(probes, baseline).items():
        results.add("first-token logprob, 32 prompts", name, f"max_abs_diff_from_{baseline}", "nat", [difference])
        print(f"{name:28s} max |logprob - {baseline}'s| = {difference:.4f}")
    print(f"{'median':28s} " + " ".join(f"{metric:>11s}" for metric in METRICS) + "   throughput ratio")
    for name, figures in table.items():
        middle = {metric: sorted(values)[len(values) // 2] for metric, values in figures.items()}
        ratio = middle["throughput"] / sorted(table[baseline]["throughput"])[len(table[baseline]["throughput"]) // 2]
        print(f"{name:28s} " + " ".join(f"{middle[metric]:11.1f}" for metric in METRICS) + f"   {ratio:.3f}")


if __name__ == "__main__":
    main()
