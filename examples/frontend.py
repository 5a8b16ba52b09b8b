"""What the frontend_*.py programs share: a connection that counts what the server's cache did for them.

A program of your own needs none of this: ``sgl.set_default_backend(sgl.RuntimeEndpoint(url))`` is enough.
"""

from __future__ import annotations

import argparse
import threading
import urllib.error
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

LOOK_SECONDS = 0.02


class CountingEndpoint(RuntimeEndpoint):
    """SGLang's endpoint as the default backend of a ``with`` block; prints at its end what the cache did.

    Tokens come from the answers' ``meta_info``; shared pages from the section ``vtensor`` of ``/server_info``, at which
    it looks while the program runs. On a server without ``--enable-vtensor`` it prints the tokens only.
    """

    def __init__(self, url: str, chat_template: str) -> None:
        super().__init__(url, chat_template_name=chat_template)
        self.requests = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.pages_reused = 0
        self.most_pages_shared = 0
        self._page_tokens = self._vtensor().get("page_tokens", 0)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CountingEndpoint:
        sgl.set_default_backend(self)
        if self._page_tokens:
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._watcher.ident is not None:
            self._watcher.join()
        if kind is None:
            print(f"\n{self.summary()}")

    def summary(self) -> str:
        share = self.cached_tokens / max(1, self.prompt_tokens)
        text = (
            f"{self.requests} requests: {self.prompt_tokens} prompt tokens, {self.cached_tokens} cached ({share:.0%})"
        )
        if not self._page_tokens:
            return f"{text}\nThe server runs without --enable-vtensor: it has no pages to count."
        return (
            f"{text}\npages of {self._page_tokens} tokens: {self.pages_reused} taken from the cache whole, "
            f"at most {self.most_pages_shared} shared by running requests at one time"
        )

    # The ways in which SGLang's interpreter asks a server for something.

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        text, info = super().generate(s, sampling_params)
        self._count(info)
        return text, info

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        info: dict[str, Any] = {}
        for text, info in super().generate_stream(s, sampling_params):
            yield text, info
        if info:
            self._count(info)

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """Behind ``select``: one prompt, or one for each choice."""
        answer = super()._generate_http_request(s, data)
        for one in answer if isinstance(answer, list) else [answer]:
            self._count(one["meta_info"])
        return answer

    def _count(self, info: dict[str, Any]) -> None:
        with self._lock:
            self.requests += 1
            self.prompt_tokens += info["prompt_tokens"]
            self.cached_tokens += info["cached_tokens"]
            if self._page_tokens:
                self.pages_reused += info["cached_tokens"] // self._page_tokens

    def _vtensor(self) -> dict[str, Any]:
        states = self.get_server_info().get("internal_states") or [{}]
        section: dict[str, Any] = states[0].get("vtensor") or {}
        return section

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self.most_pages_shared = max(self.most_pages_shared, self._vtensor()["pages_shared"])


def connect(description: str | None) -> CountingEndpoint:
    """Parse a program's command line and connect to the server that it names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where the server is (%(default)s)")
    parser.add_argument("--chat-template", default="chatml", help="SGLang's name for the model's (%(default)s)")
    options = parser.parse_args()
    try:
        return CountingEndpoint(options.url.rstrip("/"), options.chat_template)
    except urllib.error.URLError as error:
        raise SystemExit(
            f"No server answers at {options.url} ({error.reason}); start one, or name it with --url"
        ) from None
