"""Where do the processes of a server spend their time while a workload is asked of it again?

    python bench/profile_server.py --model DIR [--server stock-fa3 vtensor-auto] [--workload shared-few] -- FLAGS

Servers (names in bench/servers.py) follow one another. Each is asked the workload once, and then --rounds times under
py-spy, which samples the Python stacks of all its processes from outside; all of it is cached then, or nothing with
--state cold, which empties the cache before each round. The table has the time of each function, with
what it calls, in ms a request, the dearest first, and beside it the same function's in the first server. To --out: the
table, and the stacks for a flame graph. Waiting counts, too: look at what differs. The rounds' figures are rows of
profile.csv: each server has the machine to itself here, and is asked the same often enough to tell it from chance.
Needs py-spy (pip install py-spy), or its path in PY_SPY.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import models
import torch
import workloads
from compare import case_of
from load import play, summarize, unit
from results import Results
from servers import Server, check_names, leave_on_sigterm, run_async

from sgl_vtensor.cli.server import free_port
from sgl_vtensor.errors import VTensorError

SAMPLES_A_SECOND = 500
AGAIN = {"warm": "again", "cold": "cold"}
"""What the rows say of the cache."""
SETTLE_SECONDS = 1.0
SHOWN = 60
FIGURES = ("throughput", "ttft_p50", "ttft_p99", "itl_p50", "cached_share")
_LINE = re.compile(r":\d+\)$")
_PROCESS = re.compile(r'^process \d+:"(.*)"$')


def role(command: str) -> str:
    """What a process of SGLang does, by its title; the one that serves HTTP has none."""
    found = re.search(r"sglang::(\w+)", command)
    return found[1] if found else "http"


def functions_of(stacks: Path) -> Counter[str]:
    """Samples of each function, with what it calls, by the process's role; recursion counts once."""
    samples: Counter[str] = Counter()
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        processes = [(at, found[1]) for at, frame in enumerate(frames) if (found := _PROCESS.match(frame))]
        at, title = processes[-1] if processes else (-1, "")  # parents come first
        for frame in {_LINE.sub(")", frame) for frame in frames[at + 1 :]}:
            samples[f"{role(title)}: {frame}"] += int(count)
    return samples


def record(server: Server, out: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Start to sample all processes of the server, for so long at most."""
    command = [os.environ.get("PY_SPY", "py-spy"), "record", "--pid", str(server.pid), "--subprocesses"]
    command += ["--nonblocking", "--rate", str(SAMPLES_A_SECOND), "--duration", str(int(seconds))]
    command += ["--format", "raw", "--output", str(out)]
    with (out.parent / f"py-spy-{server.name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def profile(name: str, options: argparse.Namespace, results: Results) -> Counter[str]:
    """Milliseconds a request, by function; the rounds' figures become rows."""
    port = free_port(options.port, "127.0.0.1")
    server = Server(name, options.model, port, options.out / f"server-{name}.log", options.server_flags)
    try:
        server.wait(options.start_seconds)
        workload = workloads.asked(options.workload, options.seed, scale=options.scale)
        run_async(play(server.url, workload, progress=False))
        stacks = options.out / f"{name}.stacks"
        sampler = record(server, stacks, options.start_seconds)
        requests = 0
        rounds: list[dict[str, float]] = []
        try:
            time.sleep(SETTLE_SECONDS)
            for number in range(options.rounds):
                if options.state == "cold":
                    server.flush()
                run = run_async(play(server.url, workload, progress=False))
                requests += len(run.samples)
                figures = summarize(run)
                rounds.append(figures)
                shown = ", ".join(f"{key} {figures[key]:.4g}" for key in FIGURES if key in figures)
                print(f"{name} round {number + 1}: {shown}", flush=True)
        finally:
            sampler.send_signal(signal.SIGINT)
            sampler.wait(60)
        case = f"{case_of(workload, options)} {AGAIN[options.state]}, under py-spy"
        for key in FIGURES:
            if values := [figures[key] for figures in rounds if key in figures]:
                results.add(case, name, key, unit(key), values)
    finally:
        server.stop()
    scale = 1000 / SAMPLES_A_SECOND / max(requests, 1)
    return Counter({function: count * scale for function, count in functions_of(stacks).items()})  # type: ignore[misc]


def table(name: str, times: Counter[str], first: Counter[str]) -> list[str]:
    """The dearest functions, in ms a request, beside the first server's."""
    lines = [f"{name}: ms a request, and in the first server"]
    lines += [f"{ms:9.3f} {first[function]:9.3f}  {function[:130]}" for function, ms in times.most_common(SHOWN)]
    dearer = Counter({function: ms - first[function] for function, ms in times.items()})
    lines += [f"{name}: what takes longer than in the first server"]
    lines += [f"{ms:+9.3f} {times[function]:9.3f}  {function[:130]}" for function, ms in dearer.most_common(SHOWN)]
    return lines


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--server", nargs="+", default=["stock-fa3" if cuda else "stock-default", "vtensor-auto"])
    parser.add_argument(
        "--workload", type=workloads.asked_name, default="shared-few", metavar="NAME[@USERS|~RATE]", help="%(default)s"
    )
    parser.add_argument("--state", choices=AGAIN, default="warm", help="of the cache (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.05, help="of all lengths (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-seconds", type=float, default=600.0, help="for a server to start (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-out/profile"))
    parser.add_argument("--port", type=int, default=30400)
    parser.add_argument("server_flags", nargs="*", help="flags for every server, after --")
    options = parser.parse_args(argv)
    check_names(parser, options.server)
    if shutil.which(os.environ.get("PY_SPY", "py-spy")) is None:
        parser.error("py-spy is not there: pip install py-spy, or name its file in PY_SPY")
    options.out.mkdir(parents=True, exist_ok=True)
    if not cuda:
        print("no GPU: a tiny model on the host driver. Times say something of the CPU's part only.")
        options.server_flags = [*models.HOST_FLAGS, "--max-total-tokens=32768", *options.server_flags]
    options.model = models.folder_of(options)
    return options


def main(argv: list[str] | None = None) -> int:
    leave_on_sigterm()
    options = arguments(argv)
    results = Results("profile", options.out, keep=torch.cuda.is_available())
    first: Counter[str] | None = None
    well = True
    for name in options.server:
        try:
            times = profile(name, options, results)
        except (VTensorError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            print(f"{name}: {error!r}", flush=True)
            well = False
            continue
        first = first if first is not None else times
        lines = table(name, times, first)
        (options.out / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines[: 1 + SHOWN // 2]), flush=True)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
