"""Named server configurations for side-by-side runs, and how to start and stop them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CONFIGS: dict[str, list[str]] = {
    "stock-default": [],
    "stock-fa3": ["--attention-backend", "fa3"],
    "stock-triton": ["--attention-backend", "triton"],
    "stock-flashinfer": ["--attention-backend", "flashinfer"],
    "stock-fa3-p16": ["--attention-backend", "fa3", "--page-size", "16"],
    "stock-fa3-p64": ["--attention-backend", "fa3", "--page-size", "64"],
    "vtensor-auto": ["--enable-vtensor"],
    "vtensor-triton": ["--enable-vtensor", "--vtensor-kernel", "triton"],
    "vtensor-fa3": ["--enable-vtensor", "--vtensor-kernel", "fa3"],
    "vtensor-paged-fa3": ["--enable-vtensor", "--attention-backend", "fa3"],
}
"""``name+FLAG=VALUE`` adds a flag to a configuration: ``vtensor-triton+vtensor-page-tokens=64``."""


class Server:
    """One SGLang server in a process group of its own, so that its scheduler goes with it."""

    def __init__(self, name: str, model: str, port: int, log: Path, extra: list[str]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = log
        base, *additions = name.split("+")
        flags = [part for addition in additions for part in f"--{addition}".split("=", 1)]
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command, *CONFIGS[base], *extra, *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def wait(self, timeout_s: float = 400) -> None:
        """Return when the server answers; raise with the log's end when it does not come up."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-3000:]
        self.stop()
        raise RuntimeError(f"{self.name} did not start; the end of {self.log}:\n{tail}")

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def vtensor(self) -> dict[str, Any]:
        """The server's vtensor figures; empty for a stock server."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)["internal_states"][0]
        return state.get("vtensor", {})

    def errors(self) -> list[str]:
        """Lines of the log that report a failure."""
        marks = ("CUDA error", "illegal memory", "leak detected", "hit an exception", "VTensorError", "DriverError")
        text = self.log.read_text(errors="replace").splitlines()
        return [line for line in text if any(mark in line for mark in marks)]

    def stop(self) -> None:
        """Ask the whole group to end, then make it."""
        for sent, wait_s in ((signal.SIGINT, 8.0), (signal.SIGKILL, 8.0)):
            try:
                os.killpg(self._process.pid, sent)
            except ProcessLookupError:
                return
            end = time.monotonic() + wait_s
            while time.monotonic() < end and self._process.poll() is None:
                time.sleep(0.1)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
