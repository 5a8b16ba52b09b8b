"""What the commands ask of a running server, over the port that it serves on."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sgl_vtensor.errors import ConfigError, VTensorError

KEY_VARIABLE = "SGLANG_API_KEY"
TIMEOUT_SECONDS = 30.0
CHECK = "check the address: host and port, and no path"


class NotFound(VTensorError):
    """The server has no such path."""


class Client:
    """One server, or SGLang's router with servers behind it.

    Args:
        url: like ``http://127.0.0.1:30000``; the scheme may be left out.
        api_key: sent as a bearer token; by default what ``SGLANG_API_KEY`` holds.

    Raises:
        ConfigError: ``url`` is no address.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        if not _is_address(self.url):
            raise ConfigError(f"{url} is not the address of a server; write it like http://127.0.0.1:30000")
        self.api_key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        self._servers: list[Client] = []

    def get(self, path: str) -> Any:
        return self._ask(urllib.request.Request(self.url + path))

    def fetch(self, path: str) -> bytes:
        """What a path answers, as it is.

        Raises:
            VTensorError: it cannot be had.
        """
        return self._send(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any) -> Any:
        headers = {"content-type": "application/json"}
        return self._ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def figures(self) -> list[dict[str, Any]]:
        """The vtensor section of ``/server_info``, one for each replica.

        Raises:
            VTensorError: the server runs without vTensor memory, or cannot be asked.
        """
        return [state["vtensor"] for state in self.states()]

    def states(self) -> list[dict[str, Any]]:
        """``/server_info``'s section on each replica that has vTensor memory; its figures are under ``vtensor``.

        Raises:
            VTensorError: as for ``figures``.
        """
        found: list[dict[str, Any]] = []
        for server in self.servers():
            info = server.get("/server_info")
            states = info.get("internal_states", []) if isinstance(info, dict) else []
            # SGLang lists replicas as they answered.
            found += sorted(
                (state for state in states if "vtensor" in state), key=lambda one: int(one["vtensor"].get("replica", 0))
            )
        if not found:
            raise VTensorError(f"the server at {self.url} runs without vTensor memory; start it with --enable-vtensor")
        return found

    def servers(self) -> list[Client]:
        """This server itself, or those behind SGLang's router, which does not pass on what we ask of a server.

        Raises:
            VTensorError: it cannot be asked.
        """
        if not self._servers:
            try:
                self.get("/server_info")
                self._servers = [self]
            except NotFound:
                try:
                    workers = self.get("/workers")["workers"]
                    self._servers = [Client(worker["url"], self.api_key) for worker in workers]
                except (NotFound, LookupError, TypeError) as error:
                    raise VTensorError(f"{self.url} is neither an SGLang server nor its router; {CHECK}") from error
        return self._servers

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            return json.loads(self._send(request))
        except ValueError as error:
            raise VTensorError(f"{self.url} does not answer like an SGLang server; {CHECK}") from error

    def _send(self, request: urllib.request.Request) -> bytes:
        if self.api_key:
            request.add_header("authorization", f"Bearer {self.api_key}")
        request.add_header("accept-encoding", "gzip")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                content: bytes = answer.read()
                return gzip.decompress(content) if answer.headers["content-encoding"] == "gzip" else content
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise VTensorError(
                    f"{self.url} wants another API key; pass the server's --admin-api-key or --api-key with --api-key, "
                    f"or in {KEY_VARIABLE}"
                ) from error
            kind = NotFound if error.code == 404 else VTensorError
            raise kind(f"{request.full_url} answered {error.code} {error.reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise VTensorError(f"{self.url} cannot be reached ({reason}); is the server running?") from error


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is no number or too large
        return False
