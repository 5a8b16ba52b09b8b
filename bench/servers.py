"""Named server configurations for side-by-side runs, and how to start and stop them."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sgl_vtensor.cli.server import Server as Process

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


class Server(Process):
    """One SGLang server: a process group that ends with the benchmark, however that ends."""

    def __init__(self, name: str, model: str, port: int, log: Path, extra: list[str]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        base, *additions = name.split("+")
        flags = [part for addition in additions for part in f"--{addition}".split("=", 1)]
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
        super().__init__(
            [*command, *CONFIGS[base], *extra, *flags], log, environment={**os.environ, "PYTHONUNBUFFERED": "1"}
        )

    def wait(self, timeout_s: float = 400) -> None:
        """Return when the server answers; raise with the log's end when it does not come up."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.running():
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        failure = self.failed(f"{self.name} did not start")
        self.stop()
        raise failure

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
