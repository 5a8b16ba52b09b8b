"""The memory limit of a running server, moved over its own port, and SGLang's own calls that give memory back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import Browser
from conftest import Start, StockAnswers
from prometheus_client.parser import text_string_to_metric_families
from server import PAGE_TOKENS, VTENSOR, SGLangServer, generate_body

from sgl_vtensor.cli.client import KEY_VARIABLE
from sgl_vtensor.cli.main import main

pytestmark = pytest.mark.server

KEY = "a-key-of-the-admin"
NUM_PAGES = 2048 // PAGE_TOKENS
IDLE_SECONDS = 2.0


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[SGLangServer]:
    flags = (f"--admin-api-key={KEY}", f"--vtensor-idle-seconds={IDLE_SECONDS}", "--vtensor-cache-seconds=6")
    memory = ("--max-total-tokens=2048", "--vtensor-memory-limit=90%")
    with start(*VTENSOR, *flags, *memory, "--vtensor-reserve=2%", "--vtensor-debug", "--enable-metrics") as server:
        yield server


@pytest.fixture
def server(running: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SGLangServer]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    yield running
    limit(running, "100%")
    running.check_healthy()


def limit(server: SGLangServer, size: str) -> int:
    return main(["limit", f"127.0.0.1:{server.port}", size, "--wait=0"])


def wait_for_pages(server: SGLangServer, most: int) -> dict[str, int]:
    return server.wait_for(lambda figures: figures["pages_backed"] <= most)


def test_the_limit_of_the_start_is_kept(server: SGLangServer, stock: StockAnswers) -> None:
    assert server.vtensor()["limit_pages"] == NUM_PAGES * 9 // 10
    for expected in stock.hungry:
        assert server.generate(expected.prompt, expected.tokens).output_ids == expected.output_ids
        figures = server.vtensor()
        assert figures["pages_backed"] <= NUM_PAGES * 9 // 10 and figures["backed_bytes"] <= figures["limit_bytes"]


def test_a_limit_that_falls_and_rises_under_load_fails_no_request(server: SGLangServer, stock: StockAnswers) -> None:
    """Ten times, and for two rounds, so that requests of every kind meet it."""
    done = threading.Event()
    moves: list[str] = []

    def move() -> None:
        while not done.wait(0.4 if moves else 0):
            moves.append("45%" if len(moves) % 2 == 0 else "100%")
            assert limit(server, moves[-1]) == 0

    with ThreadPoolExecutor(9) as executor:
        moving = executor.submit(move)
        try:
            rounds = 0
            while rounds < 2 or (len(moves) < 10 and not moving.done()):
                rounds += 1
                asked = [*stock.mixed, *stock.hungry[:3]]
                answers = list(executor.map(lambda one: server.generate(one.prompt, one.tokens), asked))
                assert [one.output_ids for one in answers] == [one.output_ids for one in asked]
        finally:
            done.set()
        moving.result()
    assert limit(server, "20%") == 0
    figures = wait_for_pages(server, NUM_PAGES // 5)
    assert figures["pages_evicted_by_limit"] > 0


def test_what_does_not_fit_the_limit_is_refused_when_it_comes(server: SGLangServer, stock: StockAnswers) -> None:
    long, short = stock.mixed[17], stock.mixed[5]
    assert limit(server, "20%") == 0
    refused = server.post("/generate", generate_body(long.prompt, 8))
    assert refused.status_code == 400 and "600" in refused.text, refused.text
    assert server.generate(short.prompt).output_ids == short.output_ids
    assert limit(server, "100%") == 0
    assert server.generate(long.prompt).output_ids == long.output_ids


def test_what_was_accepted_before_the_limit_fell_is_served(server: SGLangServer, stock: StockAnswers) -> None:
    asked = stock.hungry[:4]
    with ThreadPoolExecutor(4) as executor:
        answers = [executor.submit(server.generate, one.prompt, one.tokens) for one in asked]
        figures = server.wait_for(lambda figures: figures["rows_running"] + figures["requests_waiting"] == 4)
        unused = figures["pages_in_use"] * PAGE_TOKENS - figures["tokens_live"]
        assert 0 <= unused <= 2 * PAGE_TOKENS * figures["rows_running"], "more than the ends of last pages"
        assert limit(server, "5%") == 0
        assert [one.result().output_ids for one in answers] == [one.output_ids for one in asked]
    wait_for_pages(server, NUM_PAGES // 20)


def test_an_idle_server_gives_all_back_in_the_end(server: SGLangServer, stock: StockAnswers) -> None:
    expected = stock.mixed[17]
    assert server.generate(expected.prompt).output_ids == expected.output_ids
    figures = server.vtensor()
    assert figures["pages_cached"] > 600 // PAGE_TOKENS
    assert figures["tokens_live"] == figures["pages_cached"] * PAGE_TOKENS
    wait_for_pages(server, 0)
    assert server.vtensor()["pages_evicted_by_age"] > 0
    assert server.generate(expected.prompt).output_ids == expected.output_ids


def test_release_and_resume_memory_occupation(server: SGLangServer, stock: StockAnswers) -> None:
    expected = stock.mixed[16]
    server.generate(expected.prompt)
    server.wait_idle()
    authorized = {"headers": {"authorization": f"Bearer {KEY}"}}
    assert server.post("/release_memory_occupation", {"tags": ["kv_cache"]}, **authorized).ok
    assert server.vtensor()["pages_backed"] == 0
    assert server.post("/resume_memory_occupation", {"tags": ["kv_cache"]}, **authorized).ok
    assert server.generate(expected.prompt).output_ids == expected.output_ids


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1TiB"], "at most what the pool can hold"),
        (["0%"], "at least one page"),
        (["much"], "24GiB"),
        (["50%", "--api-key=wrong"], "wants another API key"),
    ],
)
def test_a_limit_that_is_refused(
    server: SGLangServer, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["limit", f"http://127.0.0.1:{server.port}", *arguments]) == 1
    assert said in capsys.readouterr().err
    assert server.vtensor()["limit_pages"] == NUM_PAGES


def test_a_limit_without_a_key_is_refused(server: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    before = server.vtensor()["limit_pages"]
    body = {"server_args": {"vtensor_memory_limit_bytes": server.vtensor()["page_bytes"]}}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
        assert server.post("/set_internal_state", body, headers=headers).status_code == 401
    assert server.vtensor()["limit_pages"] == before
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def test_without_a_size_it_is_shown(server: SGLangServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limit", f"http://127.0.0.1:{server.port}"]) == 0
    assert "limit 1.00 MiB of 1.00 MiB, backed " in capsys.readouterr().out


def metrics(server: SGLangServer) -> dict[tuple[str, ...], float]:
    """Our figures in ``/metrics``, by name and what they are divided by."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("vtensor_") and not sample.name.endswith(("_created", "_bucket")):
                assert "model_name" in sample.labels, "SGLang's own labels, so that dashboards join them"
                of = (sample.labels[name] for name in ("kind", "reason", "state") if name in sample.labels)
                found[(sample.name, *of)] = sample.value
    return found


def test_top_shows_what_server_info_says_under_load(
    server: SGLangServer, stock: StockAnswers, capsys: pytest.CaptureFixture[str]
) -> None:
    def look() -> dict[str, float]:
        assert main(["top", f"127.0.0.1:{server.port}", "--once", "--json"]) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out)
        return found

    with ThreadPoolExecutor(4) as executor:
        answers = [executor.submit(server.generate, one.prompt, one.tokens) for one in stock.hungry[:4]]
        busy = [look() for _ in range(3)]
        assert [one.result().output_ids for one in answers] == [one.output_ids for one in stock.hungry[:4]]
    assert any(found["requests_running"] > 0 and found["pages_seen"] > 0 for found in busy)
    server.wait_idle()
    found, figures = look(), server.vtensor()
    assert found["in_use_bytes"] == figures["pages_in_use"] * figures["page_bytes"] > 0
    for name in ("limit_bytes", "tokens_hit", "tokens_computed", "rows_parked", "mappings", "mapping_waits"):
        assert found[name] == figures[name]
    asked = sum(len(one.prompt) for one in stock.hungry[:4])
    assert figures["tokens_computed"] + figures["tokens_hit"] >= asked
    assert main(["top", f"127.0.0.1:{server.port}"]) == 0
    assert "parked" in capsys.readouterr().out


def test_the_page_shows_what_server_info_says_under_load(
    server: SGLangServer, stock: StockAnswers, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["page", f"127.0.0.1:{server.port}"]) == 0
    browser.open(capsys.readouterr().out.split()[-1])
    with ThreadPoolExecutor(2) as executor:
        answers = [executor.submit(server.generate, one.prompt, 500) for one in stock.hungry[:2]]
        browser.wait_for("look && look.stats.rows_running === 2")
        browser.click("#rows", 5, 5)
        row, slot, [page, *_] = browser.evaluate("[look.rows[0].row, look.rows[0].slot, look.rows[0].pages]")
        said = browser.evaluate("document.getElementById('who-title').innerText")
        assert said == f"Row {row} runs slot {slot}"
        columns, cell = browser.evaluate("[grid.columns, grid.cell]")
        y, x = ((place + 0.5) * cell for place in divmod(page - 1, columns))
        browser.click("#pages", x, y)
        assert f"slot {slot}, row" in browser.evaluate("document.getElementById('who-text').innerText")
        assert all(len(one.result().output_ids) == 500 for one in answers)
    server.wait_idle()
    busy = browser.evaluate("look.taken_at")
    browser.wait_for(f"look.taken_at > {busy} + 2 && look.stats.rows_running === 0")
    # What is cached grows old and goes: a picture that has the same figures before it and behind it.
    count = "[0, 1, 2, 3].map(state => look.states.filter(one => (one & 3) === state).length)"
    script = f"[look.stats, {count}, look.states.filter(one => one & 4).length]"
    for _ in range(20):
        before, (shown, counted, cached), after = server.vtensor(), browser.evaluate(script), server.vtensor()
        if before == shown == after:
            break
        time.sleep(0.5)
    assert shown == after
    used, free = after["pages_in_use"], after["pages_free_backed"]
    assert counted == [after["num_pages"] - used - free, free, used, 0]
    assert cached == after["pages_cached"]


def test_prometheus_is_told_what_server_info_says(server: SGLangServer, stock: StockAnswers) -> None:
    for expected in stock.hungry[:3]:
        server.generate(expected.prompt, expected.tokens)
    assert limit(server, "5%") == 0
    wait_for_pages(server, NUM_PAGES // 20)
    assert limit(server, "100%") == 0
    server.wait_idle()
    figures = wait_for_pages(server, 0)
    time.sleep(3)  # an idle server looks once a second
    values = metrics(server)
    page_bytes = figures["page_bytes"]
    assert values["vtensor_limit_bytes",] == figures["limit_bytes"]
    assert values["vtensor_capacity_bytes",] == NUM_PAGES * page_bytes
    assert values["vtensor_backed_bytes",] == figures["backed_bytes"] == 0, "the page of padding is not counted"
    assert values["vtensor_used_bytes",] == 0
    assert values["vtensor_pages_released_total",] == figures["pages_released"] > 0
    assert values["vtensor_pages_evicted_total", "limit"] == figures["pages_evicted_by_limit"] > 0
    assert values["vtensor_mapping_wait_seconds_count",] == figures["mapping_waits"] > 0
    assert values["vtensor_mapping_wait_seconds_sum",] == pytest.approx(figures["mapping_wait_seconds"])
    assert values["vtensor_pages_created_total",] == figures["pages_created"] == figures["pages_released"]
    assert values["vtensor_pages_created_ahead_total",] == figures["pages_created_ahead"] > 0
    for kind, calls in figures["driver_calls"].items():
        assert values["vtensor_driver_seconds_count", kind] == calls
        assert values["vtensor_driver_seconds_sum", kind] == pytest.approx(figures["driver_seconds"][kind])
        assert values["vtensor_driver_errors_total", kind] == figures["driver_errors"][kind] == 0
