"""``sgl-vtensor page``: the address of the page, and the page itself where the server wants a key."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sgl_vtensor.cli import page
from sgl_vtensor.cli.client import KEY_VARIABLE
from sgl_vtensor.cli.main import main


class Handler(BaseHTTPRequestHandler):
    """A server whose keys and paths a test chooses."""

    key: str | None
    answers: dict[str, str]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        allowed = self.key is None or self.headers["authorization"] == f"Bearer {self.key}"
        content = self.answers.get(self.path.split("?")[0], "").encode()
        self.send_response((200 if content else 404) if allowed else 401)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


INFO = json.dumps({"internal_states": [{"vtensor": {}}]})


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    Handler.key, Handler.asked = None, []
    Handler.answers = {"/server_info": INFO, "/vtensor": "<html>", "/vtensor/data": "{}"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("flags", [[], ["--api-key=not-needed"]])
def test_without_a_key_it_is_the_servers_own(url: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", url.removeprefix("http://"), *flags]) == 0
    assert capsys.readouterr().out == f"The page is at {url}/vtensor\n"


def test_a_server_that_has_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    del Handler.answers["/vtensor/data"]
    assert main(["page", url]) == 1
    assert "--tokenizer-worker-num above 1" in capsys.readouterr().err
    Handler.answers["/server_info"] = json.dumps({"internal_states": [{}]})
    assert main(["page", url]) == 1
    assert "start it with --enable-vtensor" in capsys.readouterr().err


def test_another_key(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Handler.key = "right"
    assert main(["page", url, "--api-key=wrong"]) == 1
    assert "wants another API key" in capsys.readouterr().err


def test_a_port_that_is_taken(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Handler.key = "right"
    assert main(["page", url, "--api-key=right", f"--port={url.split(':')[-1]}"]) == 1
    assert "choose another" in capsys.readouterr().err


def refused(address: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(address)
    found.value.close()
    return found.value.code


def test_with_a_key_it_is_served_here_behind_a_secret(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.key = "right"
    served: list[ThreadingHTTPServer] = []

    class Server(ThreadingHTTPServer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            served.append(self)

    monkeypatch.setattr(page, "ThreadingHTTPServer", Server)
    thread = threading.Thread(target=main, args=(["page", url, "--api-key=right"],), daemon=True)
    thread.start()
    said = ""
    while "until Ctrl-C" not in said:
        said += capsys.readouterr().out
        time.sleep(0.01)
    found = re.search(r"http://127\.0\.0\.1:\d+", said)
    address = re.search(r"http://\S+", said)
    assert found and address
    with urllib.request.urlopen(address[0]) as answer:
        assert answer.read() == b"<html>" and answer.headers["content-type"].startswith("text/html")
    with urllib.request.urlopen(f"{address[0]}/data?replica=1") as answer:
        assert answer.read() == b"{}"
    assert Handler.asked[-1] == "/vtensor/data?replica=1"
    before = len(Handler.asked)
    for path in ("/vtensor", "/vtensor/data", "/server_info", f"/{address[0].split('/')[3]}/server_info"):
        assert refused(found[0] + path) == 404
    assert len(Handler.asked) == before, "nobody without the secret reaches the server"
    Handler.key = "changed"
    assert refused(address[0]) == 502
    served[0].shutdown()
    thread.join()
