"""Which server answers faster, and does it answer the same? One table of ratios, with their spread.

    python bench/compare.py --model DIR --group stock-fa3 vtensor-auto --group vtensor-triton --workload gsp -- FLAGS
    python bench/compare.py --url stock=http://127.0.0.1:30000 --url ours=http://127.0.0.1:30010 --workload chat

Servers of one --group run side by side, each with its share of the GPU's memory (FLAGS: --max-total-tokens) and, where
there are enough, with CPUs of its own, which change hands each round. They are measured in turn, never at once: A, B,
then B, A, each round with a new seed. Groups follow one another. A round is run cold, from an empty cache, and again
warm. First-token logprobs of the same prompts are compared before. With --budget-seconds it ends in time, whatever
happens, with what it has. What vTensor memory cost is told beside: driver calls per generated token, and waits for
mappings; of chat-16k also for the turns after the first ("later"). Rows go to bench/results/serving.csv, and with
plots, logs and every run's figures and requests (runs.jsonl) to --out. workloads:

"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import logprobs
import models
import torch
import workloads
from costs import UNITS as COSTS
from costs import Look, costs
from load import Run, by_turn, play, summarize, unit
from plots import line_plot
from results import Results
from servers import Remote, Server, check_names, leave_on_sigterm, run_async, shares_of_cpus
from workloads import Session, Workload

from sgl_vtensor.cli.server import free_port
from sgl_vtensor.errors import VTensorError

SHOWN = ("throughput", "output_rate", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "e2e_p50", "cached_share", "errors")
RATIOS = ("throughput", "ttft_p50", "ttft_p99", "itl_p50")
STATES = ("cold", "warm")
SIZES = ("tp-size", "dp-size", "max-total-tokens")
STOP_SECONDS = 15.0
"""Kept of the budget for stopping servers and writing."""
LEAST_RUN_SECONDS = 5.0
LEAST_SHARE = 0.7
"""Of the time that a workload took before: with less left it is not begun on another server, which may be faster."""
WARM_UP_SESSIONS = 4


class OutOfTime(Exception):
    """The budget is spent."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run's figures."""

    server: str
    workload: str
    case: str
    state: str
    seed: int
    figures: dict[str, float]
    turns: dict[int, dict[str, float]]


class Comparison:
    """Runs what the command line asks for, group by group, and keeps what it has measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.results = Results("serving", options.out, keep=torch.cuda.is_available())
        self.measured: list[Measured] = []
        self.decoded: dict[str, dict[int, logprobs.Decoded]] = {}
        self.answers: dict[str, dict[int, logprobs.Answer]] = {}
        self.failed = False
        """Something that was to be measured was not."""
        self._start_s = 0.0
        self._took_s: dict[tuple[str, int, str], float] = {}
        """Of each workload, number of users and state, the shortest run so far."""

    @property
    def left_s(self) -> float:
        budget_s: float = self.options.budget_seconds
        return budget_s - (time.monotonic() - self.begin) - STOP_SECONDS

    def group(self, names: list[str]) -> None:
        """One group: start, compare logprobs, warm up, measure in turn, stop."""
        run_s = min(self._took_s.values(), default=0.0)
        if self.left_s < self._start_s + max(LEAST_RUN_SECONDS, LEAST_SHARE * run_s):
            took = f"servers took {self._start_s:.0f} s to start" + (f", and a run {run_s:.0f} s" if run_s else "")
            raise OutOfTime(f"{self.left_s:.0f} s are left; {took}")
        begin = time.monotonic()
        servers: list[Remote] = []
        first = len(self.measured)
        try:
            servers = self._started(names)
            for server in list(servers):
                try:
                    server.wait(max(1.0, min(self.left_s, self.options.start_seconds)))
                except (VTensorError, RuntimeError) as error:
                    print(f"  {server.name} is left out: {error}", flush=True)
                    self.failed = True
                    servers.remove(server)
                    server.stop()
            self._start_s = time.monotonic() - begin
            print(f"{', '.join(one.name for one in servers)}: up after {self._start_s:.0f} s", flush=True)
            self._compare_logprobs(servers)
            self._measure(servers)
        finally:
            for server in servers:
                self._last_words(server)
            self._write(self.measured[first:])
            with ThreadPoolExecutor() as executor:  # SGLang takes some ten seconds to end
                list(executor.map(lambda server: server.stop(), servers))

    def _started(self, names: list[str]) -> list[Remote]:
        options = self.options
        if options.url:
            return [Remote(name, url) for name, url in (one.split("=", 1) for one in options.url)]
        servers: list[Remote] = []
        try:
            for index, name in enumerate(names):
                log = options.out / f"server-{name}.log"
                port = free_port(options.port + 10 * index, "127.0.0.1")
                servers.append(Server(name, options.model, port, log, options.server_flags))
        except BaseException:
            for server in servers:
                server.stop()
            raise
        return servers

    def _compare_logprobs(self, servers: list[Remote]) -> None:
        if not self.options.longest_probe:
            return
        for server in servers:
            if self.left_s < LEAST_RUN_SECONDS:
                raise OutOfTime("none is left for logprobs")
            self.answers[server.name] = logprobs.ask(server, self.options.longest_probe)
            baseline = next(iter(self.answers))
            if (spread := logprobs.spread(self.answers[server.name])) < logprobs.LEAST_SPREAD:
                print(
                    f"  {server.name:24s} logprobs: left out, the prompt hardly matters here ({spread:.5f} nat): "
                    "take real weights, or --model random"
                )
                continue
            found = logprobs.difference(self.answers[server.name], self.answers[baseline])
            count = int(found.pop("prompts"))
            self._add_differences(f"first-token logprob, {count} prompts", server, baseline, found)
            print(
                f"  {server.name:24s} logprobs: differ from {baseline}'s by {found['max_abs_diff']:.4f} at most, "
                f"{found['mean_abs_diff']:.5f} on average; {found['first_tokens_differ']:.0f} of {count} first tokens; "
                f"prompts differ by {spread:.3f}",
                flush=True,
            )
            self._compare_decoded(server)

    def _compare_decoded(self, server: Remote) -> None:
        """What a batch says whose requests begin alike; the first server twice, for what batching itself changes."""
        longest = self.options.longest_probe
        decoded = logprobs.ask_together(server, longest)
        baseline = next(iter(self.decoded), server.name)
        if not self.decoded:
            self.decoded[baseline] = decoded
            decoded = logprobs.ask_together(server, longest)
        self.decoded.setdefault(server.name, decoded)
        found = logprobs.decoded_difference(decoded, self.decoded[baseline])
        self._add_differences(f"decoded logprob, {len(decoded)} prompts together", server, baseline, found)
        print(
            f"  {server.name:24s} decoded together: {found['decoded_max_abs_diff']:.4f} at most, "
            f"{found['decoded_mean_abs_diff']:.5f} on average from {baseline}'s; the first "
            f"{found['decoded_tokens_alike']:.1f} of {logprobs.DECODED_TOKENS} tokens are alike",
            flush=True,
        )

    def _add_differences(self, case: str, server: Remote, baseline: str, found: dict[str, float]) -> None:
        for metric, value in found.items():
            unit = "nat" if metric.endswith("_diff") else "1"
            self.results.add(case, server.name, f"{metric}_from_{baseline}", unit, [value])

    def _measure(self, servers: list[Remote]) -> None:
        for name in self.options.workload:
            if (why := self._too_long(self._workload(name, self.options.seed), servers)) is not None:
                print(f"  {name}: left out, {why}", flush=True)
                continue
            warm_up = self._workload(name, 0)
            sessions = tuple(map(_shortened, warm_up.sessions[:WARM_UP_SESSIONS]))
            for server in servers:
                self._play(server, dataclasses.replace(warm_up, sessions=sessions))
        cpus = sorted(os.sched_getaffinity(0))
        own, *shares = (shares_of_cpus(len(servers), cpus) if servers and not self.options.url else []) or [cpus]
        if shares:
            print(f"{len(shares[0])} CPUs for each server, {len(own)} for the driver", flush=True)
        os.sched_setaffinity(0, own)
        try:
            for number in range(self.options.rounds):
                # The CPUs change hands each time: other tenants of the machine may slow some of them down.
                for place, share in enumerate(shares):
                    servers[(place + number) % len(servers)].run_on(share)
                self._measure_round(servers, number)
        finally:
            os.sched_setaffinity(0, cpus)

    def _measure_round(self, servers: list[Remote], number: int) -> None:
        seed = self.options.seed + number
        # The other way round each time: whoever is second has waited, and so gone cold, while the first one ran.
        in_turn = servers[:: -1 if number % 2 else 1]
        for name in self.options.workload:
            workload = self._workload(name, seed)
            if self._too_long(workload, servers) is not None:
                continue
            for server in servers:
                server.flush()
            for state in self.options.states:
                for server in in_turn:
                    self._measure_one(server, workload, seed, state)

    def _measure_one(self, server: Remote, workload: Workload, seed: int, state: str) -> None:
        kind = workload.name, workload.users, state
        took_s = self._took_s.get(kind, 0.0)
        if self.left_s < LEAST_SHARE * took_s:
            left = f"{self.left_s:.0f} s are left for {workload.name} on {server.name}"
            raise OutOfTime(f"{left}; it took {took_s:.0f} s before")
        run, spent = self._play(server, workload)
        self._took_s[kind] = min(took_s or run.seconds, run.seconds)
        self._record(server, workload, seed, state, run, spent)

    def _workload(self, text: str, seed: int) -> Workload:
        return workloads.asked(text, seed, scale=self.options.scale)

    def _too_long(self, workload: Workload, servers: list[Remote]) -> str | None:
        for server in servers:
            try:
                info = server.info()
            except (urllib.error.URLError, OSError, ValueError):
                continue  # not an SGLang server: try
            limits = (info.get("max_total_num_tokens"), info.get("max_req_input_len"), info.get("context_length"))
            most = min((limit for limit in limits if limit), default=workload.longest)
            if workload.longest > most:
                return f"its longest request takes {workload.longest} tokens and {server.name} has room for {most}"
        return None

    def _play(self, server: Remote, workload: Workload) -> tuple[Run, dict[str, float]]:
        """Play it; returns the run, and what vTensor memory cost meanwhile."""
        looks = [Look.at(server)]
        if not workload.in_waves:
            run = self._timed(server, workload)
            return run, costs([(looks[0], Look.at(server))], _tokens(run, 0))
        runs: list[Run] = []
        for start in range(0, len(workload.sessions), workload.users):
            sessions = workload.sessions[start : start + workload.users]
            wave = dataclasses.replace(workload, sessions=sessions, users=len(sessions))
            runs.append(self._timed(server, wave, lambda: looks.append(Look.at(server))))
            looks.append(Look.at(server))
        run = Run.joined(runs)
        later = costs(list(zip(looks[1::2], looks[2::2], strict=True)), _tokens(run, 1))
        return run, costs([(looks[0], looks[-1])], _tokens(run, 0)) | {f"{k}_later": v for k, v in later.items()}

    def _timed(self, server: Remote, workload: Workload, between: Callable[[], None] | None = None) -> Run:
        if self.left_s < LEAST_RUN_SECONDS:
            raise OutOfTime(f"it is spent before {workload.name} on {server.name}")

        async def timed() -> Run:
            return await asyncio.wait_for(play(server.url, workload, between=between), self.left_s)

        try:
            return run_async(timed())
        except TimeoutError:
            raise OutOfTime(f"it is spent during {workload.name} on {server.name}") from None

    def _record(
        self, server: Remote, workload: Workload, seed: int, state: str, run: Run, spent: dict[str, float]
    ) -> None:
        figures = summarize(run) | spent
        if workload.in_waves:
            later = summarize(dataclasses.replace(run, samples=[sample for sample in run.samples if sample.turn]))
            figures |= {f"{name}_later": later[name] for name in ("ttft_p50", "cached_share") if name in later}
        case = case_of(workload, self.options, started=not self.options.url)
        one = Measured(server.name, workload.name, case, state, seed, figures, by_turn(run))
        self.measured.append(one)
        began = min((sample.sent_s for sample in run.samples), default=0.0)
        # Users of a closed loop ask all at once, again and again: which of the bursts was late?
        asked = [(round(1000 * (each.sent_s - began)), round(1000 * each.ttft_s, 1)) for each in run.samples]
        with (self.options.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(one) | {"sizes": workload.case, "sent_ttft_ms": asked}) + "\n")
        names = (*SHOWN, *(name for name in figures if name.removesuffix("_later") in COSTS))
        shown = ", ".join(f"{name} {figures[name]:.4g}" for name in names if name in figures)
        print(f"  {server.name:24s} {workload.name} seed {seed} {state}: {shown}", flush=True)
        for error in sorted({sample.error for sample in run.samples if sample.error})[:3]:
            print(f"    error: {error}", flush=True)
        if figures["driver_cpu"] > 0.8:
            print(f"    the driver took {figures['driver_cpu']:.2f} of a core: these figures are not the server's")

    def _last_words(self, server: Remote) -> None:
        try:
            print(f"  {server.name}: errors {server.errors()[:3]}, {json.dumps(server.vtensor())}", flush=True)
        except (urllib.error.URLError, OSError, ValueError) as error:
            print(f"  {server.name}: errors {server.errors()[:3]}, gives no figures ({error})", flush=True)

    def _write(self, measured: list[Measured]) -> None:
        """Rows of what a group has measured: over its rounds, for each server, workload and state."""
        for key in dict.fromkeys((one.case, one.state, one.server) for one in measured):
            chosen = [one.figures for one in measured if (one.case, one.state, one.server) == key]
            for metric in chosen[0]:
                values = [figures[metric] for figures in chosen if metric in figures]
                self.results.add(f"{key[0]} {key[1]}", key[2], metric, unit(metric), values)

    def table(self) -> str:
        """Medians over the rounds, and ratios to the first server, seed by seed: median (least to most)."""
        if not self.measured:
            return "Nothing was measured."
        baseline = self.options.baseline or self.measured[0].server
        lines = [f"medians; ratios are to {baseline}, seed by seed: median (least to most), above 1 is more"]
        head = f"{'server':26}" + "".join(f"{name:>13}" for name in SHOWN)
        for case, state in dict.fromkeys((one.case, one.state) for one in self.measured):
            lines += ["", f"{case} {state}", head + "".join(f"{name + ' ratio':>26}" for name in RATIOS)]
            here = [one for one in self.measured if (one.case, one.state) == (case, state)]
            for name in dict.fromkeys(one.server for one in here):
                cells = "".join(f"{_median(here, name, metric):13.4g}" for metric in SHOWN)
                ratios = "".join(f"{_ratio(here, name, baseline, metric):>26}" for metric in RATIOS)
                lines.append(f"{name:26}{cells}{ratios}")
        return "\n".join(lines)

    def plots(self) -> None:
        """For each workload TTFT's percentiles, and TTFT by turn where sessions have several."""
        for case, state in dict.fromkeys((one.case, one.state) for one in self.measured):
            here = [one for one in self.measured if (one.case, one.state) == (case, state)]
            names = list(dict.fromkeys(one.server for one in here))
            stem, title = f"{here[0].workload}-{state}", f"{case} {state}"
            line_plot(
                self.options.out / f"{stem}-ttft.svg", title, "percentile", "TTFT, ms",
                {n: [(float(q), _median(here, n, f"ttft_p{q}")) for q in (50, 90, 99)] for n in names},
            )  # fmt: skip
            if max(len(one.turns) for one in here) > 1:
                lines = {}
                for name in names:
                    first = next(one for one in here if one.server == name)
                    lines[name] = [(turn + 1.0, values["ttft_p50"]) for turn, values in first.turns.items()]
                line_plot(self.options.out / f"{stem}-by-turn.svg", title, "turn", "TTFT p50, ms", lines)


def _median(measured: list[Measured], server: str, metric: str) -> float:
    values = [one.figures[metric] for one in measured if one.server == server and metric in one.figures]
    return statistics.median(values) if values else float("nan")


def _ratio(measured: list[Measured], server: str, baseline: str, metric: str) -> str:
    theirs = {one.seed: one.figures.get(metric, 0.0) for one in measured if one.server == baseline}
    found = [
        one.figures[metric] / theirs[one.seed]
        for one in measured
        if one.server == server and metric in one.figures and theirs.get(one.seed)
    ]
    if not found:
        return "-"
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def _tokens(run: Run, first_turn: int) -> int:
    """Tokens that were generated from that turn on."""
    return sum(sample.output_tokens for sample in run.samples if sample.turn >= first_turn)


def _shortened(session: Session) -> Session:
    """The same questions with short answers: a warm-up is for what is compiled and captured."""
    turns = (dataclasses.replace(turn, answer_tokens=min(turn.answer_tokens, 16)) for turn in session.turns)
    return dataclasses.replace(session, turns=tuple(turns))


def case_of(workload: Workload, options: argparse.Namespace, *, started: bool = True) -> str:
    """The load, and of servers that we have started their size: figures of small pools are of evictions too."""
    parts = [workload.name, f"scale {options.scale:g}", *([f"c{workload.users}"] if workload.users else [])]
    if not started:
        return " ".join(parts)
    flags = [part for flag in options.server_flags for part in flag.split("=", 1)]
    given = dict(itertools.pairwise(flags))  # of a flag that is given twice, the last
    named = [f"{name} {given[f'--{name}']}" for name in SIZES if f"--{name}" in given]
    return " ".join([*parts, Path(options.model).name, *named])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{workloads.describe()}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_arguments(parser)
    parser.add_argument("--group", nargs="+", action="append", help="servers that run side by side (bench/servers.py)")
    parser.add_argument(
        "--url", action="append", metavar="NAME=URL", help="servers that run already, in place of --group"
    )
    parser.add_argument(
        "--workload", nargs="+", type=workloads.asked_name, default=list(workloads.TABLE), metavar="NAME[@USERS|~RATE]",
        help="and how many users at a time, if not as in the table; or how many come a second, at random (all)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float, default=1.0 if cuda else 0.02, help="of the workloads' sizes (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=2 if cuda else 1, help="each with a seed of its own (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first round (%(default)s)")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--baseline", help="the server that ratios are to; default: the first")
    parser.add_argument(
        "--longest-probe", type=int, default=9000 if cuda else 600,
        help="longest prompt, in tokens, whose first-token logprobs are compared; 0: none (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--budget-seconds", type=float, default=3600.0, help="for all of it (%(default)s)")
    parser.add_argument("--start-seconds", type=float, default=600.0, help="for a group to start (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-out/compare"), help="logs, plots, a copy of the rows")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("server_flags", nargs="*", help="flags for every server, after --")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.url:
        if any("=" not in one for one in options.url):
            parser.error("--url takes NAME=URL")
        options.group = [[one.split("=", 1)[0] for one in options.url]]
    elif options.group is None:
        options.group = [["stock-fa3", "vtensor-auto"]] if cuda else [["stock-default", "vtensor-auto"]]
    if not cuda and not options.url:
        print(
            "no GPU: a small load on a tiny model, on the host driver. It shows that everything works, and counts "
            "cached tokens rightly; its times say nothing about a GPU."
        )
        options.server_flags = [*models.HOST_FLAGS, "--max-total-tokens=32768", *options.server_flags]
    if not options.url:
        check_names(parser, {name for group in options.group for name in group})
        options.model = models.folder_of(options)
    return options


def main(argv: list[str] | None = None) -> int:
    leave_on_sigterm()
    comparison = Comparison(arguments(argv))
    try:
        for group in comparison.options.group:
            try:
                comparison.group(group)
            except OutOfTime as error:
                print(f"The budget of {comparison.options.budget_seconds:.0f} s: {error}.", flush=True)
                comparison.failed = True
                break
            except (VTensorError, RuntimeError, OSError) as error:
                print(f"{', '.join(group)}: {error!r}", flush=True)  # the groups after it may do
                comparison.failed = True
    finally:
        print(f"\n{comparison.table()}", flush=True)
        comparison.plots()
    return int(comparison.failed or any(one.figures["errors"] for one in comparison.measured))


if __name__ == "__main__":
    sys.exit(main())
