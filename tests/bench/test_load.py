"""The driver: the same traffic for every server, and figures that are the server's."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import workloads
from load import Run, by_turn, play, summarize
from workloads import SHAREGPT, TABLE, Workload, build, from_file

from .fake_sglang import FakeServer, running


def played(workload: Workload, server: FakeServer, **options: Any) -> Run:
    async def run() -> Run:
        async with running(server):
            return await play(server.url, workload, progress=False, **options)

    return asyncio.run(run())


def by_session(bodies: list[dict[str, Any]], workload: Workload) -> dict[int, list[dict[str, Any]]]:
    """The bodies of each session in the order in which they came; a first question tells whose a body is."""
    result = defaultdict(list)
    for body in bodies:
        for session in workload.sessions:
            beginning = [*session.system, *session.turns[0].content]
            if body["input_ids"][: len(beginning)] == beginning:
                result[session.number].append(body)
    return result


@pytest.mark.parametrize("name", TABLE)
def test_the_same_seed_gives_the_same_workload_and_another_seed_another(name: str) -> None:
    assert build(name, 3, scale=0.01) == build(name, 3, scale=0.01)
    assert build(name, 3, scale=0.01) != build(name, 4, scale=0.01)


@pytest.mark.parametrize(("history", "flavours"), [("server", ("", "")), ("scripted", ("a", "b"))])
def test_servers_of_different_speed_are_asked_the_same_in_the_same_order(
    history: Any, flavours: tuple[str, str]
) -> None:
    """With scripted answers even where the servers say different things."""
    workload = build("chat", 5, scale=0.02, users=3)
    assert len(workload.sessions) > 2 * workload.users and workload.users == 3
    fast, slow = FakeServer(0.0, flavours[0]), FakeServer(0.003, flavours[1])
    for server in (fast, slow):
        assert summarize(played(workload, server, history=history))["errors"] == 0
    one, two = by_session(fast.bodies, workload), by_session(slow.bodies, workload)
    assert one == two and len(one) == len(workload.sessions)
    assert [len(one[session.number]) for session in workload.sessions] == [len(s.turns) for s in workload.sessions]
    # A user's sessions come one after another, whatever the others do.
    for server in (fast, slow):
        for user in range(3):
            mine = [s.number for s in workload.sessions[user::3]]
            came = [number for body in server.bodies for number in by_session([body], workload) if number in mine]
            assert came == sorted(came, key=mine.index)


def test_a_turn_holds_all_that_was_said_before() -> None:
    workload = build("agent", 1, scale=0.01, users=2)
    server = FakeServer(flavour="x")
    played(workload, server)
    for session in workload.sessions:
        bodies = by_session(server.bodies, workload)[session.number]
        said = list(session.system)
        for turn, body in zip(session.turns, bodies, strict=True):
            said += turn.content
            assert body["input_ids"] == said
            assert body["sampling_params"]["max_new_tokens"] == turn.answer_tokens
            said += server._answer(str(said), turn.answer_tokens)


def test_closed_loop_keeps_its_users_and_open_loop_its_times() -> None:
    closed = FakeServer(0.002)
    played(build("single", 1, scale=0.01, users=4), closed)
    assert closed.most_at_once == 4
    workload = build("single", 1, scale=0.01, rate=50.0)
    starts = sorted(session.start_s for session in workload.sessions)
    assert workload.users == 0 and starts[0] > 0
    # Whoever comes does not wait for the ones before: none is answered until all have come.
    figures = summarize(run := played(workload, FakeServer(crowd=len(starts))))
    assert figures["errors"] == 0
    assert run.seconds >= starts[-1]
    assert 0 < figures["driver_delay_p99"] <= 1000 * run.seconds


def test_the_users_think() -> None:
    workload = build("agent", 1, scale=0.001, users=2, think_s=0.01)
    thought = [sum(turn.think_s for turn in session.turns) for session in workload.sessions]
    assert min(thought) > 0
    assert played(workload, FakeServer()).seconds > max(thought)


def test_figures_are_those_of_the_server() -> None:
    run = played(build("single", 1, scale=0.05, users=1), FakeServer(0.01))
    figures = summarize(run)
    tokens = round(0.05 * 128)
    # In ms, and each by its own count; how near it comes is the machine's affair.
    assert 10 <= figures["ttft_p50"] < 1000
    assert 10 <= figures["itl_p50"] < 1000
    assert tokens * 10 <= figures["e2e_p50"] < 1000 * tokens
    assert figures["throughput"] == pytest.approx(len(run.samples) / run.seconds, rel=0.01)
    assert run.seconds >= len(run.samples) * tokens * 0.01
    assert figures["cached_share"] == pytest.approx(0.5, abs=0.01)
    assert 0 < figures["driver_cpu"] < 1


def test_openai_servers_are_asked_in_text_and_need_not_tell_cached_tokens() -> None:
    workload = build("agent", 2, scale=0.01, users=2, text=True)
    server = FakeServer()
    run = played(workload, server, endpoint="openai", model="m")
    figures = summarize(run)
    assert figures["errors"] == 0 and "cached_share" not in figures and figures["ttft_p50"] > 0
    longest = max(server.bodies, key=lambda body: len(body["messages"]))
    assert [m["role"] for m in longest["messages"]] == ["system", "user"] + ["assistant", "user"] * 11
    assert all(body["stream_options"] == {"include_usage": True} and body["model"] == "m" for body in server.bodies)
    with pytest.raises(ValueError, match="takes text"):
        played(build("agent", 2, scale=0.01), FakeServer(), endpoint="openai")


def test_a_failed_request_ends_its_session_only() -> None:
    workload = build("agent", 1, scale=0.01, users=2)
    run = played(workload, FakeServer(fail_at=0))
    assert summarize(run)["errors"] == 1
    whole = sum(len(session.turns) for session in workload.sessions)
    assert len(run.samples) == whole - len(workload.sessions[0].turns) + 1
    assert [sample.error[:4] for sample in run.samples if sample.error] == ["500:"]


def test_tables_by_turn() -> None:
    turns = by_turn(played(build("agent", 1, scale=0.01, users=2), FakeServer()))
    assert list(turns) == list(range(12))
    assert all(values["requests"] == 2 and values["ttft_p99"] >= values["ttft_p50"] for values in turns.values())


def test_lengths_have_the_published_means() -> None:
    """Before cuts: 20 turns and 2048 tokens lower them a little."""
    import random

    draw = random.Random(1)
    drawn = [SHAREGPT.turns(draw) for _ in range(20000)]
    assert 5.2 < sum(drawn) / len(drawn) < 5.8 and max(drawn) == 20
    assert drawn.count(1) / len(drawn) == pytest.approx(SHAREGPT.single_turn, abs=0.02)
    for length, mean in ((SHAREGPT.question, 161), (SHAREGPT.answer, 338)):
        found = [length(draw) for _ in range(20000)]
        assert 0.9 * mean < sum(found) / len(found) < 1.05 * mean


@pytest.mark.parametrize(("name", "least"), [("chat-32k", 32_000), ("chat-100k", 100_000), ("document", 64_000)])
def test_long_workloads_are_long(name: str, least: int) -> None:
    assert least < build(name, 1).longest < 1.05 * least + 4000


def test_shared_system_prompts_are_shared() -> None:
    for name, groups in (("shared-few", 4), ("shared-many", 64), ("gsp", 8)):
        systems = [session.system for session in build(name, 1, scale=1.0).sessions]
        assert len(set(systems)) == groups and len(systems) == 2 ** round(len(systems).bit_length() - 1)
    assert {session.system for session in build("single", 1, scale=0.05).sessions} == {()}


def test_sharegpt_file(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    talk = [("system", "x"), ("human", "Hello"), ("gpt", "Good day to you."), ("human", "Why?"), ("gpt", "So.")]
    entries = [{"conversations": [{"from": who, "value": what} for who, what in talk]}] * 3
    path.write_text(json.dumps([*entries, {"conversations": [{"from": "gpt", "value": "alone"}]}, {}]))
    workload = from_file(path, 1, sessions=2, users=8, groups=2, system=5)
    assert len(workload.sessions) == workload.users == 2
    first = workload.sessions[0]
    assert [turn.content for turn in first.turns] == ["Hello", "Why?"]
    assert [turn.answer_tokens for turn in first.turns] == [4, 2] and len(str(first.system).split()) == 5
    server = FakeServer()
    assert summarize(played(workload, server, endpoint="openai"))["errors"] == 0
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no conversation"):
        from_file(path, 1, sessions=2, users=8)


def test_bfcl_file(tmp_path: Path) -> None:
    """Agents with the same tools share their description; a turn without a question is none."""
    sessions, answers = [], []
    for number, tools in enumerate((["MathAPI"], ["MathAPI"], ["MathAPI", "TicketAPI"])):
        asked = [[{"role": "user", "content": "Add."}], [], [{"role": "user", "content": "Once more."}]]
        sessions.append({"id": f"s{number}", "question": asked, "involved_classes": tools})
        answers.append(
            {"id": f"s{number}", "ground_truth": [["add(a=1, b=2)"], [], ["add(a=3, b=4)", "add(a=7, b=1)"]]}
        )
    path = tmp_path / "BFCL_v4_multi_turn_base.json"
    for folder in ("possible_answer", "multi_turn_func_doc"):
        (tmp_path / folder).mkdir()
    path.write_text("\n".join(map(json.dumps, sessions)))
    (tmp_path / "possible_answer" / path.name).write_text("\n".join(map(json.dumps, answers)))
    (tmp_path / "multi_turn_func_doc/math_api.json").write_text('{"name": "add"}\n')
    (tmp_path / "multi_turn_func_doc/ticket_api.json").write_text('{"name": "open"}\n')
    workload = from_file(path, 1, sessions=8, users=2)
    assert sorted(session.group for session in workload.sessions) in ([0, 0, 1], [0, 1, 1])
    assert len({session.system for session in workload.sessions}) == 2
    assert all('{"name": "add"}' in str(session.system) for session in workload.sessions)
    for session in workload.sessions:
        assert [turn.content for turn in session.turns] == ["Add.", "Once more."]
        assert [turn.scripted for turn in session.turns] == ["[add(a=1, b=2)]", "[add(a=3, b=4), add(a=7, b=1)]"]
    assert summarize(played(workload, FakeServer(), endpoint="openai"))["errors"] == 0
    path.write_text(json.dumps(sessions[0] | {"involved_classes": ["Unheard"]}))
    with pytest.raises(ValueError, match="Unheard"):
        from_file(path, 1, sessions=8, users=2)


def test_the_table_is_described() -> None:
    assert all(name in workloads.describe() for name in TABLE)
