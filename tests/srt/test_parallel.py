"""Several ranks and several replicas: the tokens of one process, and ranks that decide alike (debug mode compares)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Expected, Start, StockAnswers
from fault_plan import FaultPlan
from server import PAGE_TOKENS, VTENSOR, SGLangServer, check_replay, generate_body

from sgl_vtensor.cli.main import main

pytestmark = pytest.mark.server

CORES = {"SGLANG_CPU_OMP_THREADS_BIND": f"0|{min(1, (os.cpu_count() or 1) - 1)}"}


@pytest.fixture(scope="module")
def two_ranks(start: Start, plan: FaultPlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    # It sleeps when idle: two ranks that poll would leave the replicas that start after it half of two cores.
    flags = (
        "--tp-size=2",
        "--sleep-on-idle",
        "--max-total-tokens=2048",
        f"--chunked-prefill-size={2 * PAGE_TOKENS}",
        "--vtensor-debug",
    )
    before = boards()
    ages = ("--vtensor-cache-seconds=3", "--vtensor-idle-seconds=1")
    path = tmp_path_factory.mktemp("trace") / "trace"
    trace = f"--vtensor-trace={path}"
    with start(*VTENSOR, *flags, *ages, trace, env=CORES | plan.environment, then=CORES) as server:
        assert boards() == before, "the board's name is gone once all ranks have it"
        yield server
        server.check_healthy()
        figures = server.vtensor()
        assert figures["launches_compared"] > figures["launches"] - 16, "the ranks have compared what they decided"
    for rank in (0, 1):
        check_replay(path.with_name(f"trace.{rank}"))


@pytest.fixture(scope="module")
def two_replicas(start: Start) -> Iterator[SGLangServer]:
    with start(*VTENSOR, "--dp-size=2", "--max-total-tokens=2048", env=CORES) as server:
        yield server
        server.check_healthy()


def boards() -> list[Path]:
    return sorted(Path("/dev/shm").glob("sgl-vtensor-*"))


def check(server: SGLangServer, asked: Sequence[Expected], *, concurrency: int) -> list[int]:
    with ThreadPoolExecutor(concurrency) as executor:
        answers = list(executor.map(lambda one: server.generate(one.prompt, one.tokens), asked))
    for number, (answer, expected) in enumerate(zip(answers, asked, strict=True)):
        assert answer.output_ids == expected.output_ids, f"prompt {number}, of {len(expected.prompt)} tokens"
    return [answer.cached_tokens for answer in answers]


def test_two_ranks_answer_like_one_process(two_ranks: SGLangServer, stock: StockAnswers) -> None:
    """Hits, chunks, eviction, and twins whose pages the tree joins."""
    for _ in range(2):
        check(two_ranks, stock.mixed, concurrency=8)
    twin = stock.twin
    body = generate_body(twin.prompt, twin.tokens) | {"input_ids": [list(twin.prompt)] * 2}
    replies = two_ranks.post("/generate", body).json()
    assert [tuple(reply["output_ids"]) for reply in replies] == [twin.output_ids] * 2
    check(two_ranks, stock.hungry, concurrency=8)
    assert check(two_ranks, [twin], concurrency=1)[0] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_on_one_rank_only(
    two_ranks: SGLangServer, stock: StockAnswers, plan: FaultPlan, rank: int
) -> None:
    """It waits for its memory, the other one for it: both decide alike, and no request is lost."""
    with plan.failing(create_OutOfMemory=0.5, rank=rank):
        check(two_ranks, [*stock.mixed, *stock.hungry[:3]], concurrency=8)
    check(two_ranks, stock.mixed[:6], concurrency=4)


def test_two_ranks_under_a_limit_that_moves(two_ranks: SGLangServer, stock: StockAnswers) -> None:
    done = threading.Event()

    def move() -> None:
        moves = 0
        while not done.wait(0.3):
            assert main(["limit", f"127.0.0.1:{two_ranks.port}", "45%" if moves % 2 == 0 else "100%", "--wait=0"]) == 0
            moves += 1

    with ThreadPoolExecutor(1) as executor:
        moving = executor.submit(move)
        try:
            check(two_ranks, [*stock.mixed, *stock.hungry[:3]], concurrency=8)
        finally:
            done.set()
        moving.result()
    assert main(["limit", f"127.0.0.1:{two_ranks.port}", "100%"]) == 0


def test_rank_0_tells_all_when_old_prefixes_go(two_ranks: SGLangServer, stock: StockAnswers) -> None:
    check(two_ranks, [stock.mixed[17]], concurrency=1)
    two_ranks.wait_for(lambda figures: figures["pages_backed"] == 0)
    assert two_ranks.vtensor()["pages_evicted_by_age"] > 0
    check(two_ranks, stock.mixed[::4], concurrency=2)


def test_two_replicas_answer_like_one_process(
    two_replicas: SGLangServer, stock: StockAnswers, capsys: pytest.CaptureFixture[str]
) -> None:
    check(two_replicas, stock.mixed, concurrency=8)
    assert main(["limit", f"127.0.0.1:{two_replicas.port}", "50%"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:2]] == ["replica 0", "replica 1"]
    assert all("limit 1.00 MiB of 2.00 MiB" in line or "limit 512.00 KiB of 1.00 MiB" in line for line in said[:2])
    check(two_replicas, stock.mixed[::2], concurrency=8)
    assert main(["top", f"127.0.0.1:{two_replicas.port}", "--once", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    hits = [replica["tokens_hit"] for replica in shown["replicas"]]
    assert len(hits) == 2 and min(hits) > 0 and shown["tokens_hit"] == sum(hits)


def test_the_page_tells_replicas_apart(two_replicas: SGLangServer) -> None:
    pictures = [two_replicas.get(f"/vtensor/data?replica={number}").json() for number in (0, 1)]
    assert [(one["stats"]["replica"], one["num_replicas"]) for one in pictures] == [(0, 2), (1, 2)]
    sections = [state["vtensor"] for state in two_replicas.get("/server_info").json()["internal_states"]]
    created = {section["replica"]: section["pages_created"] for section in sections}
    assert {number: one["stats"]["pages_created"] for number, one in enumerate(pictures)} == created
    assert all(created.values()), "both have worked"
