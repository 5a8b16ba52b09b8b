"""Servers with vTensor memory answer token for token what stock SGLang answers, whatever happens to the cache; and the
traces that they record meanwhile replay."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Expected, Start, StockAnswers
from server import PAGE_TOKENS, VTENSOR, SGLangServer, check_replay, generate_body

from sgl_vtensor.core.trace import FLUSH_SECONDS

pytestmark = pytest.mark.server

# Pools are small, so that prompts evict each other all the time: the mixed prompts need more than 4000 tokens in all.
KINDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "overlap": (("--max-total-tokens=2048", "--vtensor-kernel=torch"), {}),  # which reads nothing but rows
    "mixed-chunks": (
        (
            "--max-total-tokens=1024",
            f"--chunked-prefill-size={2 * PAGE_TOKENS}",
            "--enable-mixed-chunk",
            "--vtensor-debug",
        ),
        {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},  # admits more than the pool can hold to the end
    ),
    "no-overlap": (
        (
            "--max-total-tokens=2048",
            f"--chunked-prefill-size={2 * PAGE_TOKENS}",
            "--disable-overlap-schedule",
        ),
        {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "9"},
    ),
    "no-tree": (
        (
            "--max-total-tokens=2048",
            f"--chunked-prefill-size={2 * PAGE_TOKENS}",
            "--disable-radix-cache",
        ),
        {},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def running(
    request: pytest.FixtureRequest, start: Start, stock: StockAnswers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SGLangServer]:
    flags, env = KINDS[request.param]
    following = dict(itertools.pairwise(KINDS)).get(request.param)
    then = KINDS[following][1] if following else None
    path = tmp_path_factory.mktemp("trace") / "trace"
    with start(*VTENSOR, *flags, f"--vtensor-trace={path}", env=env, then=then) as server:
        reads = "torch on rows" if "--vtensor-kernel=torch" in flags else "auto on rows and homes"
        assert f"; kernel {reads}; " in server.start_line()
        yield server
        time.sleep(2 * FLUSH_SECONDS)  # the server is killed: what it has not written yet is lost
    check_replay(path.with_name("trace.0"))


@pytest.fixture
def server(running: SGLangServer) -> Iterator[SGLangServer]:
    """The running server with an empty cache; SGLang's idle checks have passed afterwards."""
    running.flush_cache()
    yield running
    running.check_healthy()


def only(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("running", kinds, indirect=True)


with_tree = only("overlap", "mixed-chunks", "no-overlap")


def check(server: SGLangServer, asked: Sequence[Expected], *, concurrency: int) -> None:
    with ThreadPoolExecutor(concurrency) as executor:
        answers = list(executor.map(lambda one: server.generate(one.prompt, one.tokens), asked))
    for number, (answer, expected) in enumerate(zip(answers, asked, strict=True)):
        assert answer.output_ids == expected.output_ids, f"prompt {number}, of {len(expected.prompt)} tokens"


def test_alone_and_again(server: SGLangServer, stock: StockAnswers) -> None:
    """The first time with logprobs, of the prompt too, which takes no prefix hit; then again."""
    cached = 0
    for number, expected in enumerate(stock.mixed[::2]):
        answer = server.generate(expected.prompt, logprobs=True)
        assert answer.output_ids == expected.output_ids, f"prompt {number}, of {answer.prompt_tokens} tokens"
        assert answer.logprobs == pytest.approx(expected.answer.logprobs, abs=1e-4)
        assert answer.prompt_logprobs[0] is None
        assert answer.prompt_logprobs[1:] == pytest.approx(expected.answer.prompt_logprobs[1:], abs=1e-4)
        answer = server.generate(expected.prompt)
        assert answer.output_ids == expected.output_ids, f"again prompt {number}, of {answer.prompt_tokens} tokens"
        cached += answer.cached_tokens
    assert (cached > 0) == ("--disable-radix-cache" not in server.flags)


def test_concurrency_8_and_again(server: SGLangServer, stock: StockAnswers) -> None:
    for _ in range(3):
        check(server, stock.mixed, concurrency=8)


def test_after_flush(server: SGLangServer, stock: StockAnswers) -> None:
    for _ in range(2):
        check(server, stock.mixed[::3], concurrency=4)
        server.flush_cache()
        figures = server.vtensor()
        assert figures["pages_in_use"] == figures["pages_cached"] == 0


@only("no-overlap", "no-tree")
def test_chunks_are_filled_to_the_token(server: SGLangServer, stock: StockAnswers) -> None:
    """As with page 1: rounded up to pages, as SGLang does it, no two of these fill a chunk of two pages."""
    asked = [one for one in stock.mixed if len(one.prompt) in (17, 31, 33, 47)]
    begin = len(server.log.read_text())
    body = generate_body(asked[0].prompt, asked[0].tokens) | {"input_ids": [list(one.prompt) for one in asked]}
    replies = server.post("/generate", body).json()
    assert [tuple(reply["output_ids"]) for reply in replies] == [one.output_ids for one in asked]
    batches = re.findall(r"Prefill batch, #new-seq: (\d+), #new-token: (\d+)", server.log.read_text()[begin:])
    assert any(int(seqs) > 1 and int(tokens) == 2 * PAGE_TOKENS for seqs, tokens in batches), batches


@with_tree
def test_second_time_is_a_prefix_hit(server: SGLangServer, stock: StockAnswers) -> None:
    expected = stock.mixed[16]
    assert server.generate(expected.prompt).cached_tokens == 0
    answer = server.generate(expected.prompt)
    assert answer.cached_tokens == len(expected.prompt) - 1, "hits are counted in tokens, as stock's at page size 1"
    assert answer.output_ids == expected.output_ids


@with_tree
def test_an_answer_is_the_next_prompt(server: SGLangServer, stock: StockAnswers) -> None:
    """A chat: each turn's prompt is all that was said before, and a hit up to the last token that has been computed."""
    expected = stock.hungry[3]
    said = list(expected.prompt)
    for turn in range(3):
        answer = server.generate(said, 50)
        assert answer.output_ids == expected.output_ids[50 * turn : 50 * turn + 50]
        if turn:
            assert answer.cached_tokens == len(said) - 1
        said += answer.output_ids


@only("overlap")
def test_twins_then_eviction_then_again(server: SGLangServer, stock: StockAnswers) -> None:
    """Two equal prompts in one batch: the tree keeps one's pages, the other goes on with these, and its own, of equal
    content, are handed out to others."""
    twin = stock.twin
    body = generate_body(twin.prompt, twin.tokens) | {"input_ids": [list(twin.prompt)] * 2}
    seen = []
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.post, "/generate", body)
        while not asked.done():
            figures = server.vtensor()
            seen.append((figures["pages_shared"], figures["pages_fenced"]))
        replies = asked.result().json()
    assert [tuple(reply["output_ids"]) for reply in replies] == [twin.output_ids] * 2
    assert [reply["meta_info"]["cached_tokens"] for reply in replies] == [0, 0], "the twins were not in one batch"
    full = len(twin.prompt) // PAGE_TOKENS
    assert (full, full) in seen, seen
    # Twins, and at once others that need every page.
    with ThreadPoolExecutor(8) as executor:
        for _ in range(2):
            server.flush_cache()
            twins = executor.submit(server.post, "/generate", body)
            check(server, stock.hungry, concurrency=6)
            assert [tuple(reply["output_ids"]) for reply in twins.result().json()] == [twin.output_ids] * 2
            check(server, stock.mixed, concurrency=2)  # evicts them
            check(server, [twin, twin], concurrency=2)


@only("overlap")
def test_launches_map_no_prefix_of_requests_that_have_waited(server: SGLangServer, stock: StockAnswers) -> None:
    """As many requests run as may; behind them wait three with one long cached prefix, of which one row is parked.

    Launches map the pages that requests add, and no more: the other two rows are mapped while those requests wait.
    """
    again, others, tokens = stock.mixed[17], stock.mixed[:12], 24
    assert server.generate(again.prompt, tokens).output_ids == again.output_ids[:tokens]
    asked = [*others, again, again, again]
    before = server.vtensor()
    body = generate_body([], tokens) | {"input_ids": [list(one.prompt) for one in asked]}
    replies = server.post("/generate", body).json()
    after = server.vtensor()
    for reply, expected in zip(replies, asked, strict=True):
        assert tuple(reply["output_ids"]) == expected.output_ids[:tokens]
    assert [reply["meta_info"]["cached_tokens"] for reply in replies[-3:]] == [len(again.prompt) - 1] * 3
    prefix_pages = (len(again.prompt) - 1) // PAGE_TOKENS

    def grown(name: str) -> int:
        return int(after[name] - before[name])

    assert grown("mappings_ahead") >= 2 * prefix_pages
    own_pages = sum(-(-(len(one.prompt) + tokens) // PAGE_TOKENS) for one in asked) - 3 * prefix_pages
    mapped = after["driver_calls"]["map"] - before["driver_calls"]["map"]
    assert mapped - grown("pages_created") - grown("mappings_ahead") <= own_pages


@only("mixed-chunks", "no-overlap")
def test_retraction(server: SGLangServer, stock: StockAnswers) -> None:
    """More is running than the pool holds (or SGLang is told to retract): requests are thrown back and start again."""
    before = server.log.stat().st_size
    check(server, stock.hungry, concurrency=8)
    check(server, stock.hungry + stock.mixed, concurrency=8)
    with server.log.open("rb") as log:
        log.seek(before)
        assert b"retract" in log.read().lower()


def test_client_goes_away(server: SGLangServer, stock: StockAnswers) -> None:
    """Streams that the client drops, in prefill and in decode, among requests that go on."""
    body = generate_body(stock.mixed[17].prompt, 300) | {"stream": True}
    with ThreadPoolExecutor(1) as executor:
        others = executor.submit(check, server, stock.mixed[:12], concurrency=4)
        for num_events in (0, 1, 20):
            with server.post("/generate", body, stream=True) as response:
                events = response.iter_lines()
                for _ in range(2 * num_events):  # an empty line follows each event
                    next(events)
        others.result()
    check(server, stock.mixed[12:], concurrency=4)


def test_abort_request(server: SGLangServer, stock: StockAnswers) -> None:
    body = generate_body(stock.mixed[16].prompt, 500) | {"stream": True}
    with ThreadPoolExecutor(1) as executor:
        others = executor.submit(check, server, stock.mixed[:12], concurrency=4)
        for number in range(4):
            with server.post("/generate", body | {"rid": f"doomed-{number}"}, stream=True) as response:
                events = response.iter_lines()
                for _ in range(2 * number):
                    next(events)
                assert server.post("/abort_request", {"rid": f"doomed-{number}"}).ok
                last = [event for event in events if event.startswith(b"data: {")][-1]
            assert json.loads(last.removeprefix(b"data: "))["meta_info"]["finish_reason"]["type"] == "abort"
        others.result()
    check(server, stock.mixed[12:], concurrency=4)
