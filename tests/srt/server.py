"""A real SGLang server for tests, and what to ask of it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from sgl_vtensor.cli.server import Server, free_port
from sgl_vtensor.core.replay import replay
from sgl_vtensor.core.trace import TraceReader

FORKING = Path(__file__).with_name("forking_launch.py")
READY = "The server is fired up and ready to roll!"
# Against hanging only: a machine that also does other things is several times slower.
START_SECONDS = 500.0
ANSWER_SECONDS = 300.0
WAIT_SECONDS = 120.0
PAGE_TOKENS = 16

# SGLang's own checks of its books, in every step and when idle; a failed one ends the scheduler.
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
    "SGLANG_DEBUG_MEMORY_POOL": "1",
}
# A server whose detokenizer died would wait a minute for core dumps of a GPU that is not there.
_NO_DUMPS = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
_COMMON = (
    "--dtype=float32",
    "--device=cpu",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--skip-server-warmup",
    "--mem-fraction-static=0.3",
    "--max-running-requests=12",
    "--random-seed=1",
)
VTENSOR = ("--enable-vtensor", f"--vtensor-page-tokens={PAGE_TOKENS}")

_BAD = re.compile(r"Traceback|\bleak|[A-Za-z]*Error\b|\berror:|Exception|use-after-free|double free", re.IGNORECASE)
_HARMLESS = re.compile(
    r"ServerArgs\(|server_args=|Ignore import error|ImportError|ModuleNotFoundError|exceeds the maximum allowed"
)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables without our own, no model hub, and SGLang's checks on."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("SGL_VTENSOR")}
    ours = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return mine | ours | CHECKS | _NO_DUMPS | dict(extra or {})


def launch_command(model: Path, flags: Sequence[str]) -> list[str]:
    """As users start it."""
    return [sys.executable, "-m", "sglang.launch_server", *_flags(model, flags)]


def _flags(model: Path, flags: Sequence[str]) -> list[str]:
    return ["--model-path", str(model), *_COMMON, *flags]


class Imported:
    """A server that has imported SGLang, or does so now, and waits for its flags: see ``forking_launch.py``."""

    def __init__(self, log: Path, extra_env: Mapping[str, str] | None = None) -> None:
        self.env = dict(extra_env or {})
        self._flags = log.with_name("flags")
        self.server = Server([sys.executable, str(FORKING), str(self._flags)], log, environment(extra_env))

    def launch(self, flags: Sequence[str]) -> Server:
        new = self._flags.with_suffix(".new")
        new.write_text("\n".join(flags))
        new.rename(self._flags)  # whole, since it is looked for
        return self.server


def end_at_once(server: Server) -> None:
    """SGLang takes some ten seconds over SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.group, signal.SIGKILL)
    server.stop()


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    output_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish: str
    logprobs: tuple[float, ...] = ()
    prompt_logprobs: tuple[float | None, ...] = ()
    least_gap: float = float("inf")
    """How far the chosen token was ahead of the second at its closest."""


class SGLangServer:
    """A running server. A context manager that ends it with all its children.

    Started as users do it, with its output in ``log``, or from one that has imported SGLang.
    """

    def __init__(
        self,
        model: Path,
        log: Path | Imported,
        flags: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        # Below those that the system gives to clients: one of theirs would take it while the server starts.
        self.port = free_port(random.randrange(20_000, 30_000), "127.0.0.1")
        self._read_to = 0
        self.flags = tuple(flags)
        flags = (*flags, "--host=127.0.0.1", f"--port={self.port}")
        if isinstance(log, Imported):
            self.server = log.launch(_flags(model, flags))
        else:
            self.server = Server(launch_command(model, flags), log, environment(extra_env))
        self.log = self.server.log
        try:
            self._wait_until_ready()
        except BaseException:
            self.server.stop()
            raise

    def __enter__(self) -> SGLangServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        end_at_once(self.server)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.server.running(), f"the server ended at start:\n{self.tail()}"
            if READY in self.log.read_text(errors="replace") and self._listens():
                self._read_to = self.log.stat().st_size
                return
            time.sleep(0.2)
        raise AssertionError(f"the server was not ready within {START_SECONDS:.0f} s:\n{self.tail()}")

    def _listens(self) -> bool:
        """SGLang says that it is ready from a thread of its own, which may be ahead of the one that opens the port."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def start_line(self) -> str:
        """The only line of ours in the log of one rank's start."""
        [line] = [line for line in self.log.read_text(errors="replace").splitlines() if "vTensor" in line]
        return line.partition("vTensor memory: ")[2]

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.server.last_lines(lines))

    def get(self, path: str, timeout: float = WAIT_SECONDS) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=timeout)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        options.setdefault("timeout", ANSWER_SECONDS)
        return requests.post(f"http://127.0.0.1:{self.port}{path}", json=body, **options)

    def generate(self, prompt: Sequence[int], tokens: int = 48, *, logprobs: bool = False, **more: Any) -> Answer:
        """Answer greedily, past any end-of-text token."""
        body = generate_body(prompt, tokens) | more
        if logprobs:
            body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        response = self.post("/generate", body)
        assert response.ok, f"{response.status_code}: {response.text}\n{self.tail()}"
        return _answer(response.json())

    def flush_cache(self) -> None:
        """Wait until nothing runs, then flush."""
        response = self.post(f"/flush_cache?timeout={WAIT_SECONDS:.0f}")
        assert response.ok, f"{response.status_code}: {response.text}"

    def vtensor(self) -> dict[str, Any]:
        """Our section of ``/server_info``."""
        states = self.get("/server_info").json()["internal_states"]
        section: dict[str, Any] = states[0]["vtensor"]
        return section

    def wait_for(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Until our figures are as wanted."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not holds(figures := self.vtensor()):
            assert time.monotonic() < deadline, figures
            time.sleep(0.05)
        return figures

    def wait_for_log(self, text: str) -> None:
        """Until the log says so."""
        deadline = time.monotonic() + WAIT_SECONDS
        while text not in self.log.read_text(errors="replace"):
            assert time.monotonic() < deadline, f"the log does not say {text!r}:\n{self.tail()}"
            time.sleep(0.1)

    def wait_idle(self) -> None:
        """Until nothing runs or waits, and SGLang has had its idle checks."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            loads = self.get("/v1/loads").json()["loads"]
            if all(load["num_running_reqs"] == 0 and load["num_waiting_reqs"] == 0 for load in loads):
                time.sleep(0.1)
                return
            time.sleep(0.05)
        raise AssertionError(f"requests are still running:\n{self.tail()}")

    def check_healthy(self) -> None:
        """The server is idle and alive, and its log holds nothing bad since the last call."""
        assert self.server.running(), f"the server has ended:\n{self.tail()}"
        self.wait_idle()
        if "--enable-vtensor" in self.flags:
            figures = self.vtensor()
            assert figures["pages_in_use"] == figures["pages_cached"], figures
            assert figures["rows_running"] == figures["pages_fenced"] == figures["pages_shared"] == 0, figures
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            text = file.read().decode(errors="replace")
            self._read_to = file.tell()
        bad = [line for line in text.splitlines() if _BAD.search(line) and not _HARMLESS.search(line)]
        assert not bad, "the log says:\n" + "\n".join(bad[:20]) + f"\n...\n{self.tail()}"


def check_replay(path: Path) -> None:
    """What a server has recorded comes out the same again, and nothing in it is broken."""
    result = replay(TraceReader(path))
    assert result.broken is None, result.broken
    assert result.figures.requests > 0 and result.figures.launches > 0


def generate_body(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}


def _answer(reply: dict[str, Any]) -> Answer:
    meta = reply["meta_info"]
    if meta["finish_reason"]["type"] == "abort":  # before its first batch SGLang counts none of a request
        meta = {"prompt_tokens": 0, "cached_tokens": 0} | meta
    tops = meta.get("output_top_logprobs") or ()
    return Answer(
        output_ids=tuple(reply["output_ids"]),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        finish=meta["finish_reason"]["type"],
        logprobs=tuple(entry[0] for entry in meta.get("output_token_logprobs") or ()),
        prompt_logprobs=tuple(entry[0] for entry in meta.get("input_token_logprobs") or ()),
        least_gap=min((first[0] - second[0] for first, second in tops), default=float("inf")),
    )
