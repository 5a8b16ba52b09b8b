"""compare.py on fake servers: in turn, within its budget, and with the right ratios."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import re
import statistics
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import pytest
import workloads
from plots import line_plot
from servers import flags_of

from .fake_sglang import FakeServer, running

NEVER_S = 3600.0
"""An answer that nobody waits for: longer than a test may take."""


@contextmanager
def in_thread(server: FakeServer) -> Iterator[FakeServer]:
    """compare has an event loop of its own."""
    up, over = threading.Event(), threading.Event()

    async def run() -> None:
        async with running(server):
            up.set()
            while not over.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert up.wait(10)
        yield server
    finally:
        over.set()
        thread.join()


def compared(folder: Path, servers: dict[str, FakeServer], *options: str) -> int:
    with ExitStack() as stack:
        urls = [f"--url={name}={stack.enter_context(in_thread(server)).url}" for name, server in servers.items()]
        return compare.main([*urls, f"--out={folder}", "--scale=0.01", "--longest-probe=0", *options])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "serving.csv").open() as file:
        return list(csv.DictReader(file))


def runs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_servers_are_measured_in_turn_with_the_same_traffic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers = {"a": FakeServer(0.004, "x"), "b": FakeServer(0.012, "y")}
    assert compared(tmp_path, servers, "--workload", "single@2", "--rounds=2") == 0
    order = [(run["server"], run["seed"], run["state"]) for run in runs(tmp_path)]
    assert order == [
        (name, seed, state) for seed, names in ((1, "ab"), (2, "ba")) for state in ("cold", "warm") for name in names
    ]
    for run in runs(tmp_path):
        sent_ms, ttft_ms = zip(*run["sent_ttft_ms"], strict=True)
        assert min(sent_ms) == 0 and statistics.median(ttft_ms) == pytest.approx(run["figures"]["ttft_p50"], abs=0.1)
    asked = [sorted(str(body) for body in server.bodies) for server in servers.values()]
    assert asked[0] == asked[1]
    # Never at once: flushes are between rounds, and users are two.
    assert [server.flushes for server in servers.values()] == [2, 2]
    assert max(server.most_at_once for server in servers.values()) == 2
    text = capsys.readouterr().out
    by_metric = {(row["impl"], row["metric"]): row for row in rows(tmp_path) if row["case"].endswith("cold")}
    cold = {
        (run["server"], run["seed"]): run["figures"]["throughput"] for run in runs(tmp_path) if run["state"] == "cold"
    }
    for name in servers:
        median = statistics.median(cold[name, seed] for seed in (1, 2))
        assert float(by_metric[name, "throughput"]["p50"]) == pytest.approx(median, rel=1e-3)
    assert by_metric["b", "ttft_p50"]["unit"] == "ms"
    # However fast they were, b's rounds are compared with a's of the same seed.
    ratios = [cold["b", seed] / cold["a", seed] for seed in (1, 2)]
    assert len(set(ratios)) == 2 and 1.0 not in ratios
    shown = re.findall(r"^(a|b) .*?(\d+\.\d{3}) \(", text, re.MULTILINE)  # throughput is the first ratio
    assert shown[:2] == [("a", "1.000"), ("b", f"{statistics.median(ratios):.3f}")]
    assert (tmp_path / "single-cold-ttft.svg").read_text().startswith("<svg")


def test_what_memory_cost_is_told_and_later_turns_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer(delay_s=0.001, pool={"pages": 1})
    assert compared(tmp_path, {"a": server}, "--workload=chat-16k", "--rounds=1", "--states=cold") == 0
    built = workloads.build("chat-16k", 1, scale=0.01)
    sessions, turns = len(built.sessions), len(built.sessions[0].turns)
    assert sessions > built.users > 1, "there are no waves"
    assert len(server.bodies) == 4 * turns + sessions * turns, "the warm-up, and the run"
    lens = [len(body["input_ids"]) for body in server.bodies[4 * turns :]]
    # In waves: nobody asks a second question before all have an answer to their first.
    size = built.users * turns
    waves = [lens[start : start + size] for start in range(0, len(lens), size)]
    users = [len(wave) // turns for wave in waves]
    assert all(max(wave[:n]) < min(wave[n:]) for wave, n in zip(waves, users, strict=True))
    later = sum(sum(wave[n:]) for wave, n in zip(waves, users, strict=True))
    figures = runs(tmp_path)[0]["figures"]
    answer = built.sessions[0].turns[0].answer_tokens
    for name, calls, requests in (("", sum(lens), sessions * turns), ("_later", later, sessions * (turns - 1))):
        assert figures[f"driver_calls_per_token{name}"] == pytest.approx(calls / (requests * answer))
        waited_a_call = 3 * requests / calls
        assert figures[f"mapping_wait_share{name}"] == pytest.approx(waited_a_call * figures[f"driver_share{name}"])
        assert figures[f"mapping_wait_p99{name}"] == 3.5
        assert figures[f"memory_look_share{name}"] == pytest.approx(0.5 * figures[f"driver_share{name}"])
        assert figures[f"memory_look_mean{name}"] == pytest.approx(0.25)
    units = {row["metric"]: row["unit"] for row in rows(tmp_path)}
    assert units["driver_calls_per_token_later"] == "1/tok" and units["mapping_wait_p99"] == "ms"
    assert "mapping_wait_share_later" in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_the_budget_holds_and_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(compare, "LEAST_RUN_SECONDS", 0.2)
    options = ("--workload=single", "--rounds=2")
    # b's warm-up never ends.
    assert compared(tmp_path, {"a": FakeServer(), "b": FakeServer(NEVER_S)}, *options, "--budget-seconds=2") == 1
    assert not (tmp_path / "runs.jsonl").exists()
    # Here b stops in the second round; the first has time enough on a busy machine, too.
    stops = {"a": FakeServer(), "b": FakeServer(delay_after=40, later_delay_s=NEVER_S)}
    assert compared(tmp_path, stops, *options, "--budget-seconds=10") == 1
    assert {run["server"] for run in runs(tmp_path)} == {row["impl"] for row in rows(tmp_path)} == {"a", "b"}


def test_what_cannot_end_in_time_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("STOP_SECONDS", 0.5), ("LEAST_SHARE", 1e9)):
        monkeypatch.setattr(compare, name, value)
    servers = {"a": FakeServer(delay_s=0.01), "b": FakeServer()}
    assert compared(tmp_path, servers, "--workload=single", "--rounds=1", "--budget-seconds=60") == 1
    said = capsys.readouterr().out
    assert re.search(r"\d+ s are left for single on b; it took \d+ s before", said)
    assert {run["server"] for run in runs(tmp_path)} == {"a"}


def test_a_server_that_fails_is_told_and_spoils_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, {"a": FakeServer(), "b": FakeServer(fail_at=12)}, "--workload=single") == 1
    assert "error: 500" in capsys.readouterr().out
    found = {(run["server"], run["figures"]["errors"]) for run in runs(tmp_path)}
    assert ("a", 0.0) in found and ("b", 1.0) in found


def test_what_does_not_fit_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers = {"a": FakeServer(max_total_num_tokens=100)}
    assert compared(tmp_path, servers, "--workload", "document", "single", "--rounds=1") == 0
    assert "document: left out, its longest request takes" in capsys.readouterr().out
    assert {run["workload"] for run in runs(tmp_path)} == {"single"}


def test_configurations_by_name() -> None:
    assert flags_of("vtensor-auto+vtensor-page-tokens=64+enable-mixed-chunk") == [
        "--enable-vtensor", "--vtensor-page-tokens", "64", "--enable-mixed-chunk",
    ]  # fmt: skip
    with pytest.raises(KeyError, match="there are stock-default, "):
        flags_of("vtensor")


def test_users_who_come_at_random_wait_for_nobody(tmp_path: Path) -> None:
    """In a closed loop all ask at once, again and again, and who asks when is the servers' doing."""
    servers = {"a": FakeServer(0.3), "b": FakeServer(0.3)}
    # Of seed 1 two come within 0.02 ms, which either of them may win on its way; of seed 8 none within 4.8 ms.
    assert compared(tmp_path, servers, "--workload", "single~40", "--states", "cold", "--seed", "8") == 0
    assert {row["case"] for row in rows(tmp_path)} == {"single~40 scale 0.01 cold"}
    assert all(server.most_at_once > 2 for server in servers.values())
    asked = [[str(body) for body in server.bodies] for server in servers.values()]
    assert asked[0] == asked[1], "in the same order"


def test_a_case_names_the_size_that_servers_have(tmp_path: Path) -> None:
    """Without a GPU a size is given before the user's flags; the last one counts."""
    flags = ["--max-total-tokens=32768", "--tp-size", "2", "--max-total-tokens=99"]
    options = compare.arguments([f"--out={tmp_path}", "--scale=0.5", "--", *flags])
    case = compare.case_of(workloads.build("single", 1, scale=0.5), options)
    assert case.endswith("tp-size 2 max-total-tokens 99") and "32768" not in case


def test_plots_hold_every_point_inside(tmp_path: Path) -> None:
    line_plot(tmp_path / "a.svg", "t < u", "x", "y", {"one": [(1, 3.0), (2, 170.0)], "two": [(1, 0.0)]})
    text = (tmp_path / "a.svg").read_text()
    points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)
    assert len(points) == 3 and all(70 <= float(x) <= 490 and 40 <= float(y) <= 315 for x, y in points)
    assert "t &lt; u" in text and ">200</text>" in text
    line_plot(tmp_path / "none.svg", "t", "x", "y", {})
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.parametrize("rest", ["@", "@0", "@two", "~", "~0", "~-1", "~x", "@2~3", ":", ":0", ":x", "@2:3"])
@pytest.mark.parametrize("name", ["single", "sprint"])
def test_a_workload_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, rest: str
) -> None:
    name += rest
    with pytest.raises(SystemExit):
        compare.main(["--workload", name, f"--out={tmp_path}"])
    assert f"{name!r} is no workload; say NAME, NAME:SESSIONS, NAME@USERS or NAME~RATE" in capsys.readouterr().err


def test_a_workload_may_have_other_numbers() -> None:
    def asked(name: str) -> tuple[str, int, int]:
        workload = workloads.asked(name, 1, scale=0.1)
        return workload.name, len(workload.sessions), workload.users

    assert asked("agent:3") == ("agent:3", 3, 3) and asked("agent:9@2") == ("agent:9", 9, 2)
    assert asked("agent:3~2.5") == ("agent:3~2.5", 3, 0) and asked("agent@7") == ("agent", 7, 7)
    assert workloads.asked("gsp:9", 1, scale=0.1).in_waves == workloads.asked("gsp", 1, scale=0.1).in_waves


def test_a_server_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--group", "stock-fa3", "vtensor-best", f"--out={tmp_path}"])
    assert "no server configuration 'vtensor-best'" in capsys.readouterr().err


def test_cpus_change_hands_each_round_and_the_driver_gets_its_own_back(monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.sched_getaffinity(0)
    monkeypatch.setattr(compare, "shares_of_cpus", lambda num_servers, cpus: [[cpus[0]], [cpus[0]], [cpus[-1]]])
    had: dict[str, list[list[int]]] = {"a": [], "b": []}
    stubs: Any = [SimpleNamespace(run_on=shares.append) for shares in had.values()]
    one = object.__new__(compare.Comparison)
    one.options = argparse.Namespace(workload=[], states=[], rounds=3, seed=1, url=None)
    driver: list[set[int]] = []
    monkeypatch.setattr(one, "_measure_round", lambda servers, number: driver.append(os.sched_getaffinity(0)))
    one._measure(stubs)
    first, last = [min(own)], [max(own)]
    assert had == {"a": [first, last, first], "b": [last, first, last]}
    assert driver == [set(first)] * 3
    assert os.sched_getaffinity(0) == own
