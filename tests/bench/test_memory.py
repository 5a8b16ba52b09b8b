"""memory.py on a fake server that obeys its limit at once, late, or never."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import memory
import pytest
import torch
from aiohttp import web
from servers import Remote

from sgl_vtensor.cli.server import group_members

from .fake_sglang import FakeServer
from .test_compare import in_thread

FULL = 6000


@dataclass
class Limited(FakeServer):
    """Has all of its memory backed, and lets go ``obeys_after_s`` after its limit has fallen."""

    obeys_after_s: float = 0.0
    limits: list[tuple[float, int]] = field(default_factory=list)

    async def info(self, request: web.Request) -> web.Response:
        backed = limit = FULL
        for at_s, value in self.limits:
            limit = value
            if time.monotonic() - at_s >= self.obeys_after_s:
                backed = value
        pool = {
            "backed_bytes": backed,
            "limit_bytes": limit,
            "page_bytes": 10,
            "pages_in_use": 3,
            "tokens_live": 5,
            "token_stride_bytes": 4,
        }
        return web.json_response({"internal_states": [{"vtensor": pool}]})

    async def set_limit(self, request: web.Request) -> web.Response:
        body = json.loads(await request.text())
        self.limits.append((time.monotonic(), body["server_args"]["vtensor_memory_limit_bytes"]))
        return web.json_response([{"updated": True}])


@pytest.mark.parametrize(("obeys_after_s", "waits_s"), [(0.0, 30.0), (0.5, 30.0), (3600.0, 1.0)])
def test_how_soon_memory_follows_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obeys_after_s: float, waits_s: float
) -> None:
    """From when it obeys, or as long as is waited for it; a busy machine looks late, but not as late as that."""
    fake = Limited(delay_s=0.06, obeys_after_s=obeys_after_s)

    @contextmanager
    def servers(self: memory.Questions, *names: str) -> Iterator[list[Remote]]:
        with in_thread(fake):
            yield [Remote(names[0], fake.url)]

    monkeypatch.setattr(memory.Questions, "servers", servers)
    monkeypatch.setattr(memory, "MOVES", 3)
    monkeypatch.setattr(memory, "FOLLOW_SECONDS", waits_s)
    monkeypatch.setattr(memory, "BEFORE_SECONDS", 0.2)
    assert memory.main(["--model=none", "--ask", "limit", f"--out={tmp_path}", "--scale=0.1"]) == 0
    with (tmp_path / "memory.csv").open() as file:
        rows = {(row["case"], row["metric"]): float(row["p50"]) for row in csv.DictReader(file)}
    least_s = min(obeys_after_s, waits_s)
    assert 0.9 * least_s <= rows["limit lowered under load", "memory follows after"] < least_s + 20
    assert rows["limit moved under load", "errors"] == 0
    values = [value for _, value in fake.limits]
    assert values[:2] == [FULL // 6, FULL] and len(values) == 2 * rows["limit lowered under load", "times"]
    with (tmp_path / "limit-vtensor-auto.csv").open() as file:
        looks = list(csv.DictReader(file))
    assert {look["limit_bytes"] for look in looks} == {str(FULL), str(FULL // 6)}
    assert {look["in_use_bytes"] for look in looks} == {"30"}
    assert (tmp_path / "limit.svg").read_text().count("<polyline") == 3


@pytest.mark.parametrize(("visible", "mib"), [("1", 200), ("0,1", 300), (None, 300)])
def test_a_neighbours_gpu_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, mib: int
) -> None:
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/bash\ncase "$*" in *memory.free*) echo 7; exit ;; *--id=1*) echo 200 ;; *) echo 100; echo 200 ;; esac\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    used = memory.device_bytes()
    assert used is not None and used() == mib << 20
    free = memory.device_bytes("free")
    assert free is not None and free() == 7 << 20


class Killable(Remote):
    """A server of one process."""

    def __init__(self, url: str) -> None:
        super().__init__("vtensor-auto", url)
        self.process = subprocess.Popen(["sleep", "600"], start_new_session=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize(("leaks", "at_once"), [(0, 1), (1 << 30, 1), (0, 2)])
def test_whoever_is_killed_all_of_it_is_gone_or_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaks: int, at_once: int
) -> None:
    servers: list[Killable] = []

    def device() -> int:
        alive = [server for server in servers if group_members(server.pid)]
        return (len(alive) << 34) + leaks * (len(servers) - len(alive))

    def started(self: memory.Questions, name: str, number: int) -> Killable:
        servers.append(Killable(fake.url))
        return servers[-1]

    monkeypatch.setattr(memory, "device_bytes", lambda what="used": device)
    monkeypatch.setattr(memory.Questions, "started", started)
    monkeypatch.setattr(memory, "GONE_SECONDS", 3.0)
    monkeypatch.setattr(memory, "BEFORE_SECONDS", 0.3)
    with in_thread(Limited()) as fake:
        kills = ["--ask", "killed", "--kills=2", f"--at-once={at_once}"]
        failed = memory.main(["--model=none", *kills, f"--out={tmp_path}", "--scale=0.01"])
    assert failed == bool(leaks) and len(servers) == 2
    with (tmp_path / "memory.csv").open() as file:
        rows = {row["metric"]: float(row["p50"]) for row in csv.DictReader(file)}
    assert rows["times"] == 2 and (rows["all gone after"] >= 3.0) == bool(leaks)
