"""``sgl-vtensor top`` on figures that are known: what it adds up, what it shows, and how it fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from sgl_vtensor.cli import top
from sgl_vtensor.cli.main import main

MIB = 1 << 20
FIGURES: dict[str, Any] = {
    "page_bytes": 8 * MIB, "num_pages": 1000, "limit_bytes": 500 * 8 * MIB, "backed_bytes": 101 * 8 * MIB,
    "pages_in_use": 90, "pages_cached": 40, "pages_free_backed": 10, "pages_shared": 12, "pages_running": 50,
    "pages_seen": 125, "rows_running": 4, "rows_parked": 7, "mappings": 300, "requests_waiting": 2, "mapping_waits": 20,
    "mapping_wait_seconds": 0.01, "mapping_wait_longest_seconds": 0.0015, "tokens_hit": 750, "tokens_computed": 250,
    "pages_released": 3, "pages_evicted_by_limit": 4, "pages_evicted_by_age": 1,
    "driver_calls": {"create": 100, "map": 400}, "driver_seconds": {"create": 0.01, "map": 0.02},
}  # fmt: skip
SHOWN = """\
limit        3.91 GiB                              of 7.81 GiB
backed       808.00 MiB  ━━━━╸━━━━━━━━━━━━━━━━━━━
in use       720.00 MiB  ━━━━━━━━━━━━━━━━━━━━━━━━  requests and cache
cached       320.00 MiB  ━╸━━━━━━━━━━━━━━━━━━━━━━  prefixes
free backed  80.00 MiB   ━━━━━━━━━━━━━━━━━━━━━━━━  ready
requests  4 running, 2 waiting, 99 tokens/s
sharing   12 pages in several requests; each page is seen 2.50 times
hits      75.0% of 1000 prompt tokens
rows      4 running, 7 parked, 300 mappings
waits     20 for mappings, 0.50 ms each; longest so far 1.50 ms
so far    3 pages given back, 5 cached ones dropped
driver  calls  a second  each
create  100              100 us
map     400              50 us
"""


def state(**more: Any) -> dict[str, Any]:
    return {"last_gen_throughput": 99.0, "vtensor": FIGURES | more}


class Asked:
    """A client that has been told what the server says, look by look."""

    url = "http://server"

    def __init__(self, *looks: list[dict[str, Any]]) -> None:
        self.looks = list(looks)

    def states(self) -> list[dict[str, Any]]:
        return self.looks.pop(0)


def text(now: top.Look, before: top.Look | None) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    with console.file:
        console.print(top.view(now, before))
        return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def words(shown: str) -> list[str]:
    """Without the bars, whose drawing is rich's."""
    return [line.replace("━", "").replace("╸", "").replace("╺", "").split() for line in shown.splitlines()]  # type: ignore[misc]


def test_what_is_shown() -> None:
    assert words(text(top.look(Asked([state()])), None)) == words(SHOWN)


def test_rates_are_between_two_looks_and_replicas_add_up() -> None:
    later = {"driver_calls": {"create": 100, "map": 410}, "driver_seconds": {"create": 0.01, "map": 0.021}}
    client = Asked([state(), state()], [state(**later, tokens_hit=1000), state(**later)])
    before, now = top.look(client), top.look(client)
    shown = text(now, before)
    assert "7.81 GiB" in shown and "of 15.62 GiB" in shown, "two limits, two pools"
    assert "100.0% of 250 prompt tokens" in shown
    assert "8 running, 4 waiting, 198 tokens/s" in shown
    found = json.loads(top.as_json(now, before))
    assert found["map_a_second"] == pytest.approx(20 / (now.at_s - before.at_s))
    assert found["create_a_second"] == 0 and len(found["replicas"]) == 2
    assert top._driver(now, before)["map"][1] == pytest.approx(100e-6), "the new calls took longer"
    assert top._driver(now, before)["create"][1] == pytest.approx(100e-6), "no new ones: all so far"


def test_an_empty_server_divides_by_nothing() -> None:
    nothing = {name: 0 for name, value in FIGURES.items() if isinstance(value, int | float) and name != "page_bytes"}
    empty = {"driver_calls": {"map": 0}, "driver_seconds": {"map": 0.0}, "limit_bytes": 0}
    shown = text(top.look(Asked([state(**nothing | empty)])), None)
    assert "nothing runs" in shown and "no prompts" in shown


class Handler(BaseHTTPRequestHandler):
    """A server, or a router before ``workers``."""

    states: list[dict[str, Any]]
    workers: list[str]
    posted: list[dict[str, Any]]

    def do_GET(self) -> None:
        if self.path == "/workers" and self.workers:
            self._send({"workers": [{"url": url} for url in self.workers]})
        elif self.path == "/server_info" and not self.workers:
            self._send({"internal_states": self.states})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self.posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._send([True])

    def _send(self, answer: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(**more: Any) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("One", (Handler,), {"states": [], "workers": [], "posted": []} | more)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_servers_behind_a_router(capsys: pytest.CaptureFixture[str]) -> None:
    """Looked at in sum, and each has the limit set; the servers of a router may have replicas."""
    figures = state(limit_pages=500, pages_backed=100)
    with ExitStack() as stack:
        servers = [stack.enter_context(served(states=[figures] * replicas)) for replicas in (1, 2)]
        router, asked = stack.enter_context(served(workers=[url for url, _ in servers]))
        assert main(["top", router, "--once", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["replicas"]) == 3 and found["backed_bytes"] == 3 * 101 * 8 * MIB
        assert main(["limit", router, "1GiB"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3
        sent = {"server_args": {"vtensor_memory_limit_bytes": 1 << 30}}
        assert [handler.posted for _, handler in servers] == [[sent], [sent]] and not asked.posted


def test_where_nobody_watches_it_is_one_look(capsys: pytest.CaptureFixture[str]) -> None:
    with served(states=[state()]) as (url, _):
        assert main(["top", url]) == 0
        assert words("\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())) == words(SHOWN)
        assert main(["top", url, "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backed_bytes"] == 101 * 8 * MIB


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:9"], "is the server running?"),
        (["htp://127.0.0.1:30000"], "is not the address of a server; write it like http://127.0.0.1:30000"),
        (["127.0.0.1:port"], "127.0.0.1:port is not the address"),
        (["127.0.0.1:99999"], "is not the address"),
        (["http://[::1"], "is not the address"),
        (["http://"], "is not the address"),
        (["--interval=0", "x"], "give seconds"),
        (["--interval=nan", "x"], "give seconds"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_something_else_that_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """A path too many, another program with HTTP, and one without."""
    with served(states=[state()]) as (url, _):
        assert main(["top", f"{url}/v1"]) == 1
        assert "/v1 is neither an SGLang server nor its router; check the address: host and port" in said(capsys)
    with served(workers=[None]) as (url, _):
        assert main(["top", url]) == 1
        assert "is neither an SGLang server nor its router" in said(capsys)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            other, _ = server.accept()
            with other:
                other.recv(4096)
                other.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert main(["top", f"127.0.0.1:{server.getsockname()[1]}"]) == 1
        thread.join()
        assert "cannot be reached (SSH-2.0" in said(capsys)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_size_in_the_urls_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limit", "16GiB"]) == 1
    assert "sgl-vtensor limit URL 16GiB" in said(capsys)


def test_a_server_without_vtensor_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with served(states=[{}]) as (url, _):
        assert main(["top", url]) == 1
    assert "start it with --enable-vtensor" in capsys.readouterr().err
