"""The frontend programs of examples/ on real servers: does each do its work, and how much of it was cached or shared?

    python bench/programs.py --model DIR [--server vtensor-auto stock-fa3] [--out DIR] -- FLAGS

Servers (names in bench/servers.py) follow one another; each program runs twice from an empty cache, and the second run
is told. The server needs a grammar backend for frontend_json.py. Rows go to bench/results/programs.csv where there is a
GPU; what the programs print to --out. The exit status is 1 where a program or a server failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import models
import torch
from results import Results
from servers import Server, check_names, leave_on_sigterm

from sgl_vtensor.cli.server import free_port
from sgl_vtensor.errors import VTensorError

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN_SECONDS = 120.0
TOKENS = re.compile(r"(?P<requests>\d+) requests: (?P<prompt_tokens>\d+) prompt tokens, (?P<cached_tokens>\d+) cached")
PAGES = re.compile(r"(?P<pages_reused>\d+) taken from the cache whole, at most (?P<pages_shared>\d+) shared")


def run_all(server: Server, results: Results, out: Path) -> bool:
    """Run each program, twice; returns whether all went well."""
    well = True
    for program in sorted(EXAMPLES.glob("frontend_*.py")):
        for _ in range(2):  # what the first compiles would be in the second's time
            server.flush()
            begin = time.monotonic()
            done = subprocess.run(
                [sys.executable, program, "--url", server.url], capture_output=True, text=True, timeout=RUN_SECONDS
            )
            seconds = time.monotonic() - begin
        said = done.stdout + done.stderr
        (out / f"{program.stem}-{server.name}.txt").write_text(said)
        figures = {key: int(value) for form in (TOKENS, PAGES) if (found := form.search(said))
                   for key, value in found.groupdict().items()}  # fmt: skip
        if done.returncode or "requests" not in figures:
            print(f"  {program.name}: exit status {done.returncode}: {said[-300:]}", flush=True)
            well = False
            continue
        for name, value in figures.items():
            results.add(program.stem, server.name, name, "1", [value])
        results.add(program.stem, server.name, "time with Python's start", "s", [seconds])
        shown = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in figures.items())
        print(f"  {program.name:28} {shown}, {seconds:.1f} s with Python's start", flush=True)
    return well


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--server", nargs="+", default=["vtensor-auto", "stock-fa3" if cuda else "stock-default"])
    parser.add_argument("--start-seconds", type=float, default=600.0, help="for a server to start (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-out/programs"), help="what was printed, logs, rows")
    parser.add_argument("--port", type=int, default=30300)
    parser.add_argument("server_flags", nargs="*", help="flags for every server, after --")
    options = parser.parse_args(argv)
    check_names(parser, options.server)
    options.out.mkdir(parents=True, exist_ok=True)
    if not cuda:
        print("no GPU: a tiny model on the host driver. Tokens are counted rightly; times say nothing about a GPU.")
        # xgrammar has no kernel for the CPU in SGLang 0.5.23.
        host = [*models.HOST_FLAGS, "--max-total-tokens=8192", "--grammar-backend=llguidance"]
        options.server_flags = [*host, *options.server_flags]
    options.model = models.folder_of(options)
    return options


def main(argv: list[str] | None = None) -> int:
    leave_on_sigterm()
    options = arguments(argv)
    results = Results("programs", options.out, keep=torch.cuda.is_available())
    well = True
    for name in options.server:
        port = free_port(options.port, "127.0.0.1")
        server = Server(name, options.model, port, options.out / f"server-{name}.log", options.server_flags)
        try:
            server.wait(options.start_seconds)
            print(f"== {name}", flush=True)
            well &= run_all(server, results, options.out)
            if errors := server.errors():
                print(f"  errors in its log: {errors[:3]}", flush=True)
                well = False
        except (VTensorError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            print(f"{name}: {error!r}", flush=True)  # the servers after it may do
            well = False
        finally:
            server.stop()
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
