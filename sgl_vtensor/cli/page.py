"""``sgl-vtensor page URL``: where a server's picture of its pages is to be seen."""

from __future__ import annotations

import secrets
import urllib.parse
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sgl_vtensor.cli.client import Client
from sgl_vtensor.errors import ConfigError, VTensorError

PATH, DATA_PATH = "/vtensor", "/vtensor/data"
KINDS = {PATH: "text/html; charset=utf-8", DATA_PATH: "application/json"}


def run(client: Client, *, port: int) -> int:
    """Print the address of the page; where the server wants an API key, serve it on this machine until Ctrl-C.

    Raises:
        VTensorError: the server cannot be reached, wants another key, or has no page.
    """
    client.figures()  # says what is wrong with the server, if anything is
    servers = client.servers()
    with suppress(VTensorError):
        for server in servers:
            Client(server.url, api_key="").fetch(DATA_PATH)
        for server in servers:
            print(f"The page is at {server.url}{PATH}")
        return 0
    if len(servers) > 1:
        raise VTensorError(
            f"several servers are behind {client.url}; name one: {', '.join(one.url for one in servers)}"
        )
    [client] = servers
    try:
        client.fetch(DATA_PATH)
    except VTensorError as error:
        raise VTensorError(
            f"the server has vTensor memory but no page ({error}); there is none with --tokenizer-worker-num above 1: "
            "sgl-vtensor top shows the same figures"
        ) from error
    # Whoever knows this address sees what the key guards, so it is for this machine only and cannot be guessed.
    secret = f"/{secrets.token_urlsafe(16)}"
    try:
        local = ThreadingHTTPServer(("127.0.0.1", port), _handler(client, secret))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} cannot be served from ({error}); choose another, or leave it out") from error
    with local:
        print(f"The page is at http://127.0.0.1:{local.server_port}{secret}{PATH} until Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            local.serve_forever()
    return 0


def _handler(client: Client, secret: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urllib.parse.urlsplit(self.path)
            path = asked.path.removeprefix(secret)
            if path == asked.path or path not in KINDS:
                self.send_error(404)
                return
            try:
                content = client.fetch(f"{path}?{asked.query}")
            except VTensorError as error:
                self.send_error(502, str(error))
                return
            self.send_response(200)
            self.send_header("content-type", KINDS[path])
            self.send_header("content-length", str(len(content)))
            self.send_header("cache-control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing: a line a second helps nobody."""

    return Handler
