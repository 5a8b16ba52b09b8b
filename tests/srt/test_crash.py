"""A real server whose driver fails, whose clients vanish, and which is killed: nothing is lost, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import Start, StockAnswers
from fault_plan import FaultPlan
from server import VTENSOR, WAIT_SECONDS, SGLangServer, generate_body

from sgl_vtensor.cli.server import group_members

pytestmark = pytest.mark.server

END_SECONDS = 180.0
FLAGS = (*VTENSOR, "--max-total-tokens=2048", "--vtensor-idle-seconds=1", "--vtensor-cache-seconds=2")


@pytest.fixture(scope="module")
def server(start: Start, plan: FaultPlan) -> Iterator[SGLangServer]:
    with start(*FLAGS, env=plan.environment) as server:
        yield server


def answers_are_right(server: SGLangServer, stock: StockAnswers) -> None:
    asked = [*stock.mixed[::2], *stock.hungry[:3]]
    with ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(lambda one: server.generate(one.prompt, one.tokens), asked))
    assert [one.output_ids for one in answers] == [one.output_ids for one in asked]


@pytest.mark.parametrize(
    "fault", ["create_OutOfMemory", "create_DriverError", "release_DriverError", "memory_info_DriverError"]
)
def test_a_driver_that_fails_costs_no_request(
    server: SGLangServer, stock: StockAnswers, plan: FaultPlan, fault: str
) -> None:
    """Memory is asked for before SGLang commits itself, and giving it back is no duty."""
    with plan.failing(**{fault: 0.4}):
        answers_are_right(server, stock)
        server.flush_cache()
        if fault == "release_DriverError":
            server.wait_for_log("could not be given back")
    answers_are_right(server, stock)
    server.wait_for(lambda figures: figures["pages_backed"] == 0)
    assert server.server.running()


def test_clients_that_vanish_leave_nothing_behind(server: SGLangServer, stock: StockAnswers) -> None:
    """Before, in and after the first token; with the connection half closed or torn."""
    body = generate_body(stock.mixed[16].prompt, 400) | {"stream": True}
    request = requests.Request("POST", f"http://127.0.0.1:{server.port}/generate", json=body).prepare()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    assert isinstance(request.body, bytes)
    raw = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\n".encode() + request.body
    for number in range(24):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(raw[: len(raw) // 2] if number % 4 == 0 else raw)
            if number % 4 == 1:
                client.shutdown(socket.SHUT_WR)
            if number % 4 == 2:
                client.recv(1)
            time.sleep(0.05)
            # Torn rather than closed: the server is told at once, and by an error.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    pages_add_up(server)
    answers_are_right(server, stock)


def pages_add_up(server: SGLangServer) -> None:
    """Nothing runs, and every page is free or cached."""
    server.wait_idle()
    figures = server.wait_for(lambda figures: figures["rows_running"] == 0)
    assert figures["pages_in_use"] == figures["pages_cached"] and figures["pages_fenced"] == 0, figures


SAMPLING = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
BAD_REQUESTS: dict[str, Any] = {
    "nothing": {"input_ids": []},
    "no text": {"text": ""},
    "longer than the pool": {"input_ids": [5] * 2048},
    "as long as the pool": {"input_ids": [5] * 2040},
    "longer than the context": {"input_ids": [5] * 9000},
    "negative token": {"input_ids": [5, -1, 6]},
    "no such token": {"input_ids": [5, 60_000, 6]},
    "huge token": {"input_ids": [1 << 70]},
    "token of text": {"input_ids": ["a"]},
    "half a token": {"input_ids": [1.5]},
    "negative answer": {"input_ids": [5], "sampling_params": SAMPLING | {"max_new_tokens": -1}},
    "endless answer": {"input_ids": [5] * 1900, "sampling_params": SAMPLING | {"max_new_tokens": 10**9}},
    "one bad of two": {"input_ids": [[5, 6], [5, -1]]},
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_leaves_no_trace(server: SGLangServer, bad: str) -> None:
    asked = {"sampling_params": SAMPLING} | BAD_REQUESTS[bad]
    refused = server.post("/generate", asked)
    assert refused.status_code == 400, f"{refused.status_code} {refused.text}"
    assert refused.text and "Traceback" not in refused.text
    assert server.generate([5, 6, 7], 4).prompt_tokens == 3
    pages_add_up(server)


@pytest.mark.parametrize("tokens", [0, 1])
def test_the_least_requests_are_served(server: SGLangServer, tokens: int) -> None:
    """One token asks, for one or none."""
    answer = server.generate([5], tokens)
    assert (answer.prompt_tokens, len(answer.output_ids)) == (1, tokens)
    pages_add_up(server)


def test_the_longest_requests_that_are_accepted_are_served(server: SGLangServer) -> None:
    """Two pages less than the pool holds: longer ones would wait for ever. Each hits in a page of the one before."""
    served = [
        server.post("/generate", generate_body([7] * tokens, 1), timeout=WAIT_SECONDS).ok
        for tokens in range(2004, 2018)
    ]
    assert served == sorted(served, reverse=True) and True in served and False in served
    pages_add_up(server)


@pytest.mark.parametrize("value", ["-1", "0", "1e300", "NaN", "Infinity", '"1GiB"', "null", "1" * 40, "true", "[]"])
def test_a_bad_limit_changes_nothing(server: SGLangServer, value: str) -> None:
    before = server.vtensor()["limit_pages"]
    body = f'{{"server_args": {{"vtensor_memory_limit_bytes": {value}}}}}'
    url = f"http://127.0.0.1:{server.port}/set_internal_state"
    answer = requests.post(url, data=body, headers={"content-type": "application/json"}, timeout=WAIT_SECONDS)
    assert answer.status_code == 400 or answer.json() == [False], answer.text
    assert server.vtensor()["limit_pages"] == before


def test_a_flush_while_retracted_requests_wait(server: SGLangServer, stock: StockAnswers) -> None:
    """Paused, they lose their pages and the cache goes under them; they answer as if nothing had been."""
    asked = stock.hungry[:3]
    with ThreadPoolExecutor(3) as executor:
        answers = [executor.submit(server.generate, one.prompt, one.tokens) for one in asked]
        server.wait_for(lambda figures: figures["rows_running"] == 3)
        assert server.post("/pause_generation", {"mode": "retract"}).ok
        try:
            assert server.post("/flush_cache").ok
            assert server.vtensor()["pages_in_use"] == 0
        finally:
            assert server.post("/continue_generation", {}).ok
        assert [one.result().output_ids for one in answers] == [one.output_ids for one in asked]
    pages_add_up(server)


def test_all_requests_can_be_aborted_at_once(server: SGLangServer, stock: StockAnswers) -> None:
    asked = stock.hungry[:6]
    with ThreadPoolExecutor(6) as executor:
        answers = [executor.submit(server.generate, one.prompt, 250) for one in asked]
        server.wait_for(lambda figures: figures["rows_running"] > 0)
        assert server.post("/abort_request", {"rid": "", "abort_all": True}).ok
        assert "abort" in {one.result().finish for one in answers}
    pages_add_up(server)
    answers_are_right(server, stock)


def test_two_answers_to_one_prompt(server: SGLangServer, stock: StockAnswers) -> None:
    one = stock.mixed[16]
    body = generate_body(one.prompt, one.tokens)
    body["sampling_params"]["n"] = 2
    answers = server.post("/generate", body).json()
    assert [tuple(answer["output_ids"]) for answer in answers] == 2 * [one.output_ids]
    pages_add_up(server)


def test_a_session_goes_on_where_it_was(server: SGLangServer, stock: StockAnswers) -> None:
    """Each turn is given alone, and answered like all turns in one prompt."""
    session = server.post("/open_session", {"capacity_of_str_len": 2048}).json()
    said: tuple[int, ...] = ()
    last = None
    for number in range(3):
        turn = stock.mixed[8 + number].prompt
        params = {"id": session, "rid": last, "offset": 0, "replace": last is not None}
        answer = server.post("/generate", generate_body(turn, 9) | {"session_params": params}).json()
        said += turn
        assert tuple(answer["output_ids"]) == server.generate(said, 9).output_ids
        last = answer["meta_info"]["id"]
        said += tuple(answer["output_ids"])
    assert server.post("/close_session", {"session_id": session}).ok
    pages_add_up(server)


def test_a_thousand_connections(server: SGLangServer, stock: StockAnswers) -> None:
    """Half of them silent, half in the middle of a request, and the server answers in between and after."""
    half = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_SECONDS))
            if number % 2:
                client.sendall(half)
        answers_are_right(server, stock)
    answers_are_right(server, stock)
    pages_add_up(server)


def test_a_driver_that_cannot_unmap_ends_the_server_with_its_reason(
    server: SGLangServer, stock: StockAnswers, plan: FaultPlan
) -> None:
    """The last of this file's tests on this server: what a row shows can no longer be known.

    Those that start servers of their own come after it: this one takes a core, idle or not.
    """
    dice = random.Random(9)
    deadline = time.monotonic() + END_SECONDS
    with plan.failing(unmap_DriverError=1.0), ThreadPoolExecutor(8) as executor:
        while server.server.running():  # until rows that show other requests' pages have to show new ones
            assert time.monotonic() < deadline, "the server goes on although nothing can be unmapped"
            prompts = [tuple(dice.choices(stock.twin.prompt, k=100)) for _ in range(16)]
            list(executor.map(lambda prompt: _asked(server, prompt), prompts))
    assert "unmap failed with INJECTED" in server.log.read_text()


def _asked(server: SGLangServer, prompt: tuple[int, ...]) -> None:
    with contextlib.suppress(requests.RequestException):
        server.post("/generate", generate_body(prompt, 40), timeout=WAIT_SECONDS)


def group_of(server: SGLangServer) -> list[int]:
    """The server's processes; one that has ended and that we have not waited for is none."""
    return group_members(server.server.group)


def scheduler_of(server: SGLangServer) -> int:
    for pid in group_of(server):
        if "scheduler" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise AssertionError("the server has no scheduler")


def bearers_of(server: SGLangServer) -> list[int]:
    """The processes without which it cannot go on: all but Python's resource tracker, missed at the end only."""
    return [pid for pid in group_of(server) if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def shared_memory_of(server: SGLangServer) -> set[Path]:
    """The files in shared memory that its processes map; others of this machine have theirs, too."""
    found = set()
    for pid in group_of(server):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {Path(name) for name in re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE)}
    return found


def kill_under_load(server: SGLangServer, stock: StockAnswers, victim: int, after_s: float) -> None:
    """Everything of the server ends, its clients are told, and nothing of it is left."""

    def ask(prompt: tuple[int, ...]) -> bool:
        try:
            return server.post("/generate", generate_body(prompt, 200)).ok
        except requests.RequestException:
            return False

    shared = shared_memory_of(server)
    with ThreadPoolExecutor(8) as executor:
        asked = [executor.submit(ask, one.prompt) for one in stock.mixed[-8:]]
        time.sleep(after_s)
        killed = Path(f"/proc/{victim}/cmdline").read_text().replace("\0", " ")
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        while group_of(server) or not all(one.done() for one in asked):
            assert time.monotonic() < deadline, f"{killed} was killed, still there: {group_of(server)}\n{server.tail()}"
            time.sleep(0.1)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", server.port))
    assert shared, "a server maps semaphores at least"
    left = {path.name for path in shared if path.exists()}
    # Python's semaphores (32 bytes) and SGLang's own board outlive whoever was to remove them.
    assert all(name.startswith(("sem.mp-", "sglang_")) for name in left), f"left in shared memory: {left}"


def test_killed_under_load_nothing_is_left_and_the_next_start_works(start: Start, stock: StockAnswers) -> None:
    """Once the scheduler, and once the launching process."""
    for victim in (scheduler_of, lambda server: server.server.group):
        with start(*FLAGS, fresh=True) as server:
            assert server.generate(stock.twin.prompt, stock.twin.tokens).output_ids == stock.twin.output_ids
            kill_under_load(server, stock, victim(server), 0.5)


@pytest.mark.deep
@pytest.mark.timeout(7200)
def test_killed_fifty_times(start: Start, stock: StockAnswers) -> None:
    seed, rounds = (int(os.environ.get(name, least)) for name, least in (("SEED", 8), ("ROUNDS", 50)))
    dice = random.Random(seed)
    for _ in range(rounds):
        with start(*FLAGS, fresh=True) as server:
            answers_are_right(server, stock)
            victim = dice.choice(bearers_of(server))
            kill_under_load(server, stock, victim, dice.uniform(0, 2))
