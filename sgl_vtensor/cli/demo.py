"""``sgl-vtensor demo``: a real SGLang server on our cache, a chat with it, and a look at the cache after each turn."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import openai
import torch
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgl_vtensor.cli.server import Server, free_port
from sgl_vtensor.cli.smollm2 import smollm2
from sgl_vtensor.errors import ConfigError

HOST = "127.0.0.1"
LOGS = Path.home() / ".cache" / "sgl-vtensor" / "logs"
MODEL = "demo"
START_SECONDS = 900.0
TURNS_SHOWN = 4

SYSTEM = "You are a helpful AI assistant named SmolLM. You give short answers."
QUESTIONS = (
    "What is the capital of France?",
    "What is this city famous for?",
    "What is the best time of the year to visit it?",
)


def run(options: argparse.Namespace, command: Sequence[str] | None = None) -> int:
    """Hold the demo and return its exit status. ``command`` stands in for SGLang in tests."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    console = Console(highlight=False)
    try:
        if command is None:
            console.print("Preparing the model ...")
            model = options.model_path or str(smollm2())
            if not (Path(model) / "config.json").exists():
                raise ConfigError(f"{model} has no config.json; give a folder with a Hugging Face model")
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        port = free_port(options.port, HOST)
        if port != options.port:
            console.print(f"Port {options.port} is taken: using {port}.")
        log = LOGS / f"demo-{port}.log"
        flags = [*server_flags(port, cuda=torch.cuda.is_available()), *options.server_flags]
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **os.environ, "PYTHONUNBUFFERED": "1"}
        console.print(f"Starting SGLang on port {port}. Its log: {log}", soft_wrap=True)
        console.print(f"The same by hand: {shlex.join(['python', *command[1:], *flags])}", soft_wrap=True)
        with Server([*command, *flags], log, environment) as server:
            try:
                wait_until_ready(console, server, f"http://{HOST}:{port}")
                _talk(Chat(console, f"http://{HOST}:{port}", options.max_tokens))
            except (openai.APIError, httpx.TransportError, urllib.error.URLError) as error:
                raise server.failed(f"SGLang broke off ({error})") from error
            finally:
                console.print("\nStopping the server ...")
    except KeyboardInterrupt:
        return 130
    return 0


def server_flags(port: int, cuda: bool) -> list[str]:
    """All flags for SGLang but the model's."""
    flags = ["--served-model-name", MODEL, "--host", HOST, "--port", str(port), "--enable-vtensor"]
    flags += ["--enable-cache-report"]
    if not cuda:
        flags += ["--device", "cpu", "--dtype", "float32", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
    return flags


def wait_until_ready(console: Console, server: Server, url: str) -> None:
    """Return when the server answers; meanwhile show the time and the log's last line."""
    begin = time.monotonic()
    said = 0.0
    with console.status("") as status:
        while not _healthy(url):
            elapsed = time.monotonic() - begin
            if not server.running():
                raise server.failed("SGLang did not start")
            if elapsed > START_SECONDS:
                raise server.failed(f"SGLang is not ready after {elapsed:.0f} s")
            line = f"{elapsed:4.0f} s  {_news(server.last_lines(20))}"
            status.update(Text(_cut(line, console.width - 4)))
            if not console.is_terminal and elapsed - said >= 10:
                said = elapsed
                console.print(_cut(line, 150), markup=False, soft_wrap=True)
            time.sleep(0.5)
    console.print(f"Ready after {time.monotonic() - begin:.0f} s.")


@dataclass(frozen=True)
class Turn:
    """What one answer cost. ``cache`` is the server's account of our pool after it, empty where it gives none."""

    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    driver_calls: int
    cache: dict[str, Any]


class Chat:
    """One conversation: prints each answer as it comes, and the figures after it."""

    def __init__(self, console: Console, url: str, max_tokens: int) -> None:
        self._console = console
        self._url = url
        self._max_tokens = max_tokens
        # trust_env: a proxy set for the internet has no business between us and this machine.
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False, timeout=600)
        )
        self._messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": SYSTEM}]
        self._turns: list[Turn] = []
        self._calls_before = driver_calls(self._cache_figures())

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, question: str) -> None:
        """Send one message, print the answer while it comes, then the table."""
        self._messages.append({"role": "user", "content": question})
        begin = time.monotonic()
        answer, first, usage = "", 0.0, None
        with self._client.chat.completions.create(
            model=MODEL,
            messages=self._messages,
            max_tokens=self._max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            for chunk in stream:
                usage = chunk.usage or usage
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    first = first or time.monotonic() - begin
                    answer += piece
                    self._console.out(piece, end="", highlight=False)
        self._console.print()
        self._messages.append({"role": "assistant", "content": answer})

        details = usage.prompt_tokens_details if usage else None
        cache = self._cache_figures()
        calls = driver_calls(cache)
        turn = Turn(
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            first_token_seconds=first,
            driver_calls=calls - self._calls_before,
            cache=cache,
        )
        self._calls_before = calls
        self._turns.append(turn)
        self._console.print(table(self._turns))
        if not cache:
            self._console.print("(The server gives no figures of its cache: the plugin is not active in it.)")

    def _cache_figures(self) -> dict[str, Any]:
        return cache_figures(json.loads(_get(f"{self._url}/server_info")))


def cache_figures(server_info: dict[str, Any]) -> dict[str, Any]:
    """Our part of SGLang's ``/server_info``; empty where there is none."""
    states = server_info.get("internal_states") or [{}]
    figures: dict[str, Any] = states[0].get("vtensor") or {}
    return figures


def driver_calls(cache: dict[str, Any]) -> int:
    """Calls of the driver since the server's start, of all kinds."""
    return sum(cache.get("driver_calls", {}).values())


def table(turns: Sequence[Turn]) -> Table:
    """The figures of the last turns, a column each."""
    first = max(0, len(turns) - TURNS_SHOWN)
    shown = turns[first:]
    result = Table("", *(f"turn {number + 1}" for number in range(first, len(turns))))
    for column in result.columns[1:]:
        column.justify = "right"

    def row(title: str, figure: Callable[[Turn], str]) -> None:
        result.add_row(title, *(figure(turn) for turn in shown))

    def cache_row(title: str, name: str, figure: Callable[[Turn], str]) -> None:
        if any(name in turn.cache for turn in shown):
            row(title, lambda turn: figure(turn) if name in turn.cache else "-")

    row("prompt tokens", lambda turn: f"{turn.prompt_tokens:,}")
    row("  of them cached", lambda turn: f"{turn.cached_tokens:,}")
    row("first token after", lambda turn: f"{turn.first_token_seconds:.1f} s")
    cache_row("pages backed", "pages_backed", lambda turn: f"{turn.cache['pages_backed']:,}")
    cache_row("  of them shared", "pages_shared", lambda turn: f"{turn.cache['pages_shared']:,}")
    cache_row("driver calls", "driver_calls", lambda turn: f"{turn.driver_calls:,}")
    cache_row("physical memory", "backed_bytes", lambda turn: size(turn.cache["backed_bytes"]))
    cache_row("  stock SGLang takes", "stock_bytes", lambda turn: size(turn.cache["stock_bytes"]))
    return result


def size(count: float) -> str:
    """Bytes for people: 23040 is '22.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _talk(chat: Chat) -> None:
    with chat:
        for question in QUESTIONS:
            print(f"\nyou> {question}")
            chat.ask(question)
        if not sys.stdin.isatty():
            return
        print("\nYour turn (an empty line ends the demo).")
        while True:
            try:
                question = input("\nyou> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not question:
                return
            try:
                chat.ask(question)
            except openai.BadRequestError as error:
                print(f"SGLang refused: {error.message}")
                return


def _news(lines: Sequence[str]) -> str:
    """The last line that tells something: not the inside of a warning, nor our own asking."""
    return next((line for line in reversed(lines) if not line.startswith(" ") and "GET /health" not in line), "")


def _healthy(url: str) -> bool:
    try:
        _get(f"{url}/health")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as response:
        content: bytes = response.read()
    return content


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _leave(number: int, _frame: FrameType | None) -> None:
    """End by an exception, so that the server is stopped on the way out."""
    raise SystemExit(128 + number)
