"""The page ``/vtensor``: what it is told, how often the scheduler is asked, who may look, and what a browser shows."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.radix_cache import TreeNode
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.applications import Starlette
from starlette.testclient import TestClient
from test_runtime import World

from sgl_vtensor.config import VTensorConfig
from sgl_vtensor.srt import page, runtime
from sgl_vtensor.srt.page import DATA_PATH, LOOK_SECONDS, MAX_SHARE, PATH, Looks, add_routes, picture, prefixes_picture
from sgl_vtensor.srt.prefix import PageRun
from sgl_vtensor.vmm.faults import FaultyDriver
from sgl_vtensor.vmm.host import HostDriver

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Tree:
    """What ``prefixes_picture`` reads of SGLang's tree, with its own nodes."""

    def __init__(self) -> None:
        self.root_node = TreeNode()
        self.nodes: list[TreeNode] = []
        self.is_cached = np.zeros(601, dtype=bool)

    def add(self, parent: TreeNode | None, pages: list[int], *, age: float = 0.0) -> TreeNode:
        node = TreeNode()
        node.parent, node.value, node.last_access_time = parent or self.root_node, PageRun(pages, 16), 100.0 - age
        node.parent.children[len(node.parent.children)] = node
        self.nodes.append(node)
        self.is_cached[pages] = True
        return node

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    def lock(self, node: TreeNode) -> None:
        while node is not self.root_node:
            node.lock_ref += 1
            node = node.parent

    def evictable_size(self) -> int:
        return sum(len(node.value) for node in self.nodes if not node.lock_ref)

    def protected_size(self) -> int:
        return sum(len(node.value) for node in self.nodes if node.lock_ref)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 5), st.booleans()), max_size=120))
def test_prefixes_are_a_tree_whose_most_held_and_largest_come_first(grown: list[tuple[int, int, bool]]) -> None:
    tree, next_page = Tree(), 1
    for parent, num_pages, locked in grown:
        at = parent % (len(tree.nodes) + 1)
        node = tree.add(tree.nodes[at - 1] if at else None, list(range(next_page, next_page + num_pages)))
        next_page += num_pages
        if locked:
            tree.lock(node)
    found = prefixes_picture(tree, 100.0)
    table, by_id = found["table"], {node.id: node for node in tree.nodes}
    assert len(table) == min(page.MAX_PREFIXES, len(tree.nodes)) == len(found["num_runs"])
    assert found["left_out"] == len(tree.nodes) - len(table)
    for place, (number, parent, depth, num_pages, locks, _) in enumerate(table):
        node = by_id.pop(number)
        assert parent < place, "a parent stands before its children"
        above = table[parent] if parent >= 0 else (tree.root_node.id, -1, 0, 0, 0, 0.0)
        assert node.parent.id == above[0] and depth == above[2] + above[3]
        assert (num_pages, locks) == (len(node.value.pages), node.lock_ref)
    least = min((entry[4] for entry in table), default=0)
    assert all(node.lock_ref <= least for node in by_id.values()), "those left out are held no more"


def test_what_requests_hold_is_shown_before_what_is_large() -> None:
    tree = Tree()
    small = tree.add(None, [1])
    for place in range(page.MAX_PREFIXES + 5):
        tree.add(None, list(range(2 + 5 * place, 7 + 5 * place)))
    tree.lock(small)
    found = prefixes_picture(tree, 100.0)
    assert small.id in [entry[0] for entry in found["table"]] and found["left_out"] == 6


def test_of_a_tree_too_large_to_walk_what_requests_hold_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What requests hold is a chain behind the oldest of many children, among many that have children, too."""
    monkeypatch.setattr(page, "MAX_WALKED", 15)
    monkeypatch.setattr(page, "MAX_CHILDREN", 3)
    tree, node, held, number = Tree(), None, [], 1
    for _ in range(5):
        node = tree.add(node, [number])
        held.append(node.id)
        number += 1
        for _ in range(40):
            tree.add(tree.add(node.parent, [number]), [number + 1])
            number += 2
    tree.lock(node)
    found = prefixes_picture(tree, 100.0)
    table = found["table"]
    assert [entry[0] for entry in table if entry[4]] == held
    assert len(table) == 15 and found["left_out"] == len(tree.nodes) - len(table)
    depths = {entry[0]: entry[2] for entry in table}
    assert [depths[number] for number in held] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(page, "MAX_WALKED", 7)
    assert len(prefixes_picture(tree, 100.0)["table"]) == 7


class Scheduler:
    """Answers like SGLang's internal-state route, from as many replicas as wanted, in any order."""

    def __init__(self, *pictures: dict[str, Any]) -> None:
        self.pictures = list(pictures)
        self.asked = 0

    async def __call__(self) -> list[dict[str, Any]]:
        self.asked += 1
        await asyncio.sleep(0.01)
        return self.pictures


def decoded(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(answer))
    return found


@pytest.mark.parametrize(("took", "pause"), [(0.0, LOOK_SECONDS), (0.05, 0.05 / MAX_SHARE)])
def test_many_viewers_cost_one_look_a_second_or_fewer(took: float, pause: float) -> None:
    scheduler, now = Scheduler({"stats": {"replica": 0}, "scheduler_seconds": took, "states": b"\x01\x02"}), 50.0
    looks = Looks(scheduler, clock=lambda: now)

    async def everybody() -> set[bytes]:
        return set(await asyncio.gather(*(looks.answer(0) for _ in range(20))))

    async def watch() -> None:
        nonlocal now
        assert len(await everybody()) == 1 and scheduler.asked == 1
        now += 0.99 * pause
        await everybody()
        assert scheduler.asked == 1
        now += 0.02 * pause
        [answer] = await everybody()
        assert scheduler.asked == 2
        assert decoded(answer)["taken_at"] == pytest.approx(now)
        assert base64.b64decode(decoded(answer)["states"]) == b"\x01\x02"

    asyncio.run(watch())


def test_replicas_are_told_apart_whoever_answers_first() -> None:
    scheduler = Scheduler(*({"stats": {"replica": number}, "scheduler_seconds": 0.0} for number in (2, 0, 1)))

    async def ask() -> list[dict[str, Any]]:
        looks = Looks(scheduler)
        return [decoded(await looks.answer(replica)) for replica in (0, 1, 2, 3)]

    assert [(one["stats"]["replica"], one["num_replicas"]) for one in asyncio.run(ask())] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (0, 3),
    ]
    assert scheduler.asked == 1


def test_a_look_that_fails_is_not_kept() -> None:
    scheduler = Scheduler()

    async def ask() -> None:
        looks = Looks(scheduler)
        with pytest.raises(ValueError):
            await looks.answer(0)
        scheduler.pictures = [{"stats": {"replica": 0}, "scheduler_seconds": 0.0}]
        assert decoded(await looks.answer(0))["num_replicas"] == 1

    asyncio.run(ask())


@pytest.mark.parametrize("path", [PATH, DATA_PATH])
def test_the_api_key_guards_the_page_and_its_data(path: str) -> None:
    app, scheduler = Starlette(), Scheduler({"stats": {"replica": 0}, "scheduler_seconds": 0.0})
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    add_routes(app, Looks(scheduler))
    with TestClient(app) as client:
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer other"}).status_code == 401
        assert scheduler.asked == 0, "nobody who may not look costs anything"
        answer = client.get(path, headers={"authorization": "Bearer secret"})
        assert client.post(path, headers={"authorization": "Bearer secret"}).status_code == 405, "to be looked at only"
        assert answer.status_code == 200
        if path == PATH:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert scheduler.asked == 0
        else:
            assert answer.json()["num_replicas"] == 1 and answer.headers["cache-control"] == "no-store"


def test_data_without_compression_and_with_a_replica_that_is_no_number() -> None:
    app = Starlette()
    add_routes(app, Looks(Scheduler({"stats": {"replica": 0}, "scheduler_seconds": 0.0})))
    with TestClient(app, headers={"accept-encoding": "identity"}) as client:
        answer = client.get(f"{DATA_PATH}?replica=x")
        assert "content-encoding" not in answer.headers and answer.json()["replica"] == 0


def test_without_vtensor_memory_there_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "active_config", lambda: None)
    monkeypatch.setattr(page, "add_routes", lambda *_: pytest.fail("routes were added"))
    seen: list[Any] = []
    page.serve_page(seen.append, "arguments")
    assert seen == ["arguments"]


# In a browser.


class Shown(World):
    """Two requests with a cached prefix in common, one parked row, and a server of the page over them."""

    def __init__(self, driver: FaultyDriver) -> None:
        super().__init__(driver, VTensorConfig())
        self.allocator.tokens_hit = self.allocator.tokens_computed = 0
        self.tree = Tree()
        self.prefill([1], 40)
        pages = self.pool.pages_of(1, 0, 40)
        self.shared = pages[:24]
        node = self.tree.add(None, self.shared, age=90.0)
        self.tree.add(node, pages[24:], age=200.0)
        self.pool.close(1)
        self.pool.open(2, [], 5 * 16)
        self.prefill([2], 5)
        self.pool.free(self.pool.pages_of(2, 0, 5))
        self.pool.close(2)
        for slot, num_pages in ((3, 30), (4, 28)):
            self.pool.open(slot, self.shared, num_pages * 16)
            self.prefill([slot], num_pages)
            self.tree.lock(node)

    async def ask(self) -> list[dict[str, Any]]:
        batch = SimpleNamespace(reqs=[])
        scheduler = SimpleNamespace(
            tree_cache=self.tree, waiting_queue=[1, 2, 3], running_batch=batch, last_batch=None, chunked_req=None
        )
        return [picture(self.runtime, scheduler, 100.0)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    monkeypatch.setattr(runtime, "get_parallel", lambda: SimpleNamespace(dp_rank=None))
    with HostDriver(capacity_bytes=64 << 20) as driver:
        built = Shown(FaultyDriver(driver, []))
        yield built
        built.pool.shutdown()


@pytest.fixture
def url(shown: Shown) -> Iterator[str]:
    app = Starlette()
    add_routes(app, Looks(shown.ask))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    [port] = {one.getsockname()[1] for one in server.servers[0].sockets}
    yield f"http://127.0.0.1:{port}{PATH}"
    server.should_exit = True
    thread.join()


def text(browser: Browser, element: str) -> str:
    found: str = browser.evaluate(f"document.getElementById({element!r}).innerText")
    return found.replace("\u202f", "")


def legend(browser: Browser) -> dict[str, int]:
    script = "[...document.querySelectorAll('#legend li')].map(li => [li.dataset.kind, li.lastChild.innerText])"
    return {kind: int(number.replace("\u202f", "")) for kind, number in browser.evaluate(script)}


def test_a_browser_shows_it(browser: Browser, shown: Shown, url: str) -> None:
    shown.prefill([5], 1)
    shown.pool.adopt(5, 0, shown.shared[:1])
    browser.open(url)
    browser.wait_for("look !== null")
    figures = shown.runtime.stats(shown.tree)
    assert text(browser, "backed") == "204.00 KiB" and figures["backed_bytes"] == 51 * 4096
    assert text(browser, "running") == "3 running" and text(browser, "waiting") == "3 waiting"
    assert text(browser, "sharing").startswith(f"{(30 + 28 + 1) / (24 + 6 + 4):.2f} ")
    numbers = legend(browser)
    assert (numbers["use2"], numbers["use3"], figures["pages_shared"]) == (23, 1, 24)
    assert numbers["fenced"] == figures["pages_fenced"] == 1
    assert numbers["use1"] == 6 + 4 and numbers["cached"] == 16
    assert numbers["unbacked"] == 600 - figures["pages_backed"] and sum(numbers.values()) == 600


def test_it_lives(browser: Browser, shown: Shown, url: str) -> None:
    browser.open(url)
    browser.wait_for("look !== null")
    before = browser.evaluate("document.getElementById('pages').toDataURL()")
    shown.prefill([5], 10)
    browser.wait_for("document.getElementById('running').innerText === '3 running'")
    assert legend(browser)["use1"] == 20
    assert browser.evaluate("document.getElementById('pages').toDataURL()") != before
    assert browser.evaluate("samples.length") >= 2


def test_a_click_says_who_uses_a_page_a_row_or_a_prefix(browser: Browser, shown: Shown, url: str) -> None:
    browser.open(url)
    browser.wait_for("look !== null")
    number = shown.shared[7]
    columns, cell = browser.evaluate("[grid.columns, grid.cell]")
    y, x = ((place + 0.5) * cell for place in divmod(number - 1, columns))
    browser.click("#pages", x, y)
    assert text(browser, "who-title") == f"Page {number} is in 2 requests, cached"
    said = text(browser, "who-text")
    for slot in (3, 4):
        assert f"slot {slot}, row {shown.pool.row_of_slot[slot]}: position 7, tokens 112 to 127" in said
    assert "cached prefix: 24 pages from position 0, held by 2 requests, asked for 2 min ago" in said
    browser.click("#rows", 5, 5)
    assert text(browser, "who-title") == f"Row {shown.pool.row_of_slot[3]} runs slot 3"
    assert "30 pages: room for 480 tokens" in text(browser, "who-text")
    assert "24 of them in other requests too, 24 cached" in text(browser, "who-text")
    browser.click("#prefixes", 5, 5)
    assert text(browser, "who-text") in said, "the same prefix, in the same words"
    browser.evaluate("document.getElementById('pages').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert text(browser, "who-title").startswith("Page 1 ")


def test_it_says_when_the_server_is_gone(browser: Browser, shown: Shown, url: str) -> None:
    browser.open(url)
    browser.wait_for("look !== null")
    browser.evaluate("fetch = () => Promise.reject(new TypeError('refused'))")
    browser.wait_for("document.getElementById('state').innerText === 'stopped: the server cannot be reached'")


def test_nobody_is_asked_while_the_page_is_hidden(browser: Browser, shown: Shown, url: str) -> None:
    browser.open(url)
    browser.wait_for("look !== null")
    browser.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
    time.sleep(1.2)  # a look that is under way ends
    browser.evaluate("fetch = () => { window.asked = true; return Promise.reject(new TypeError('')); }")
    time.sleep(1.5)
    assert not browser.evaluate("window.asked === true")


def test_nothing_of_what_is_said_is_in_it(shown: Shown) -> None:
    """Numbers of pages, rows and slots only: the texts in it are names of figures, and the driver's and kernel's."""
    [found] = asyncio.run(shown.ask())

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for more in value.values():
                yield from strings(more)
        elif isinstance(value, list | tuple):
            for more in value:
                yield from strings(more)

    assert set(strings(found)) == {"host", "auto"}
    assert np.frombuffer(found["states"], np.uint8).shape == (600,)
