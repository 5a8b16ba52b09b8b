"""SGLang's schedule, simulated: no kernel ever sees a byte that is not its request's, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.core import simulation
from tests.core.simulation import Kernel, Server, simulate

NUM_SEEDS = 300
NUM_STEPS = 150
CHUNK = 50


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, CHUNK))
def test_every_kernel_reads_what_its_requests_computed(first: int) -> None:
    """Admit, hit, copy, chunk, decode, dedup, retract, abort, finish, evict, flush, shrink, limits, with kernels that
    run as late as they may: all bytes are right, all tables agree after each step, and nothing is left at the end."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        seen += simulate(seed, NUM_STEPS).seen
    events = ("abort", "chunked abort", "copied tokens", "duplicates", "evicted pages", "finish", "flush", "hit pages")
    for event in (*events, "launch at homes", "mapped ahead", "retract"):
        assert seen[event] > 10, f"{event} hardly happens: {seen}"


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, 600, CHUNK))
def test_every_kernel_reads_what_its_requests_computed_deep(first: int) -> None:
    """The same over 240 000 steps of other seeds, in longer runs."""
    for seed in range(100_000 + first, 100_000 + first + CHUNK):
        simulate(seed, 400)


@pytest.mark.parametrize("seed", range(20))
def test_no_decision_depends_on_when_kernels_run(seed: int) -> None:
    """Tensor-parallel ranks see their kernels end at different times, and must choose the same rows and pages."""
    runs = [simulate(seed, 100, timing=timing, checks=False) for timing in range(3)]
    assert len({run.digest for run in runs}) == 1
    assert len({tuple(run.driver.calls.items()) for run in runs}) == 1


def test_a_failure_names_the_step_and_replays_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks in a seed breaks in the same step again."""
    original = Kernel.finish

    def finish(self: Kernel) -> None:
        if self.server.seen["launch"] >= 30:
            view = self.server.home_marks[1]
            view[self.slots[-1]] += 1
        original(self)

    monkeypatch.setattr(Kernel, "finish", finish)
    notes = []
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"^row \d+ shows") as caught:
            simulate(7, 200, timing=2)
        notes.append(caught.value.__notes__)
    assert notes[0] == notes[1]
    assert notes[0][0].startswith("seed 7, timing 2, step ")
    assert notes[0][1] == "replay: python -m tests.core.simulation --seed 7 --timing 2"


def test_kernels_are_still_running_when_their_pages_are_let_go() -> None:
    """The simulator does what it is for: with lazy kernels, requests end and rows change hands under a launch."""
    overtaken = 0
    for seed in range(40):
        server = Server(seed)
        server.eagerness = 0.0
        original = server.pool.close

        def close(slot: int, server: Server = server, original=original) -> None:  # type: ignore[no-untyped-def]
            nonlocal overtaken
            row = int(server.pool.row_of_slot[slot])
            overtaken += any(row == read for kernel in server.stream for read, _ in kernel.reads)
            original(slot)

        server.pool.close = close  # type: ignore[method-assign]
        server.run(60)
    assert overtaken > 100


def test_the_long_run_is_a_command() -> None:
    """``python -m tests.core.simulation`` reports how far it came and what happened."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.core.simulation", "--seeds", "3", "--steps", "40"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert "3 seeds, 120 steps" in result.stdout and "launch" in result.stdout


def test_a_long_run_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts or at once, the same seeds have run and the same has happened; other settings are refused."""
    ran: list[int] = []
    original = simulation.simulate
    monkeypatch.setattr(simulation, "simulate", lambda seed, *a, **k: (ran.append(seed), original(seed, *a, **k))[1])

    def run(*flags: str) -> dict[str, Any]:
        path = tmp_path / flags[-1]
        arguments = ["simulation", "--first", "5", "--steps", "20", *flags[:-1], "--record", str(path)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert simulation.main() == 0
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    run("--seeds", "2", "parts")
    parts = run("--seeds", "5", "parts")
    assert ran == [5, 6, 7, 8, 9] and parts["done"] == 5
    assert run("--seeds", "5", "whole")["seen"] == parts["seen"]
    with pytest.raises(SystemExit, match="other settings"):
        run("--seeds", "9", "--timing", "1", "parts")
