"""soak.py on a fake server that keeps its promises, and on ones that do not."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import soak
from aiohttp import web
from workloads import Session, Turn

from .fake_sglang import FakeServer
from .test_compare import in_thread

PAGES = 40


@dataclass
class Pool(FakeServer):
    """Has a pool. Once its limit has moved a few times it may have lost something, and may be wrong under load."""

    delay_s: float = 0.002
    max_total_num_tokens: int = 1000
    loses: str = ""
    """The figure that is then one more; of driver calls with the call's name behind it."""
    confused: bool = False
    """Whether it answers otherwise with more than eight requests at once, and fails for a while."""
    limits: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        figures = {
            "num_pages": PAGES, "page_bytes": 10, "limit_bytes": self.limits[-1] if self.limits else 10 * PAGES,
            "backed_bytes": 10, "pages_backed": 0, "pages_in_use": 0, "pages_free_backed": 0, "pages_fenced": 0,
            "tokens_live": 0, "token_stride_bytes": 1, "rows_running": 0, "requests_waiting": 0, "mappings": 7,
            "driver_calls": {"reserve": 3, "free_reservation": 1, "create": 9, "release": 8, "map": 20, "unmap": 12},
        }  # fmt: skip
        if len(self.limits) > 2 and self.loses:
            name, _, call = self.loses.partition(" ")
            (figures[name] if call else figures)[call or name] += 1  # type: ignore[index, operator, call-overload]
        return figures

    async def info(self, request: web.Request) -> web.Response:
        state = {"vtensor": self.figures()}
        return web.json_response({"max_total_num_tokens": self.max_total_num_tokens, "internal_states": [state]})

    async def set_limit(self, request: web.Request) -> web.Response:
        body = json.loads(await request.text())
        self.limits.append(body["server_args"]["vtensor_memory_limit_bytes"])
        return web.json_response([{"updated": True}])

    def _answer(self, prompt: str, count: int) -> list[int]:
        if self.confused and self.at_once > 9:
            return [1] * count
        return super()._answer(prompt, count)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if self.confused and len(self.limits) == 2:
            return web.json_response({"error": "no"}, status=500)
        return await super().generate(request)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SETTLE_SECONDS", 0.5), ("END_SECONDS", 0.0), ("QUIET_SECONDS", 60.0)):
        monkeypatch.setattr(soak, name, seconds)
    for name in ("WATCH_SECONDS", "CANARY_PAUSE_SECONDS"):
        monkeypatch.setattr(soak, name, 0.1)


def soaked(folder: Path, server: FakeServer, *options: str) -> tuple[int, dict[str, Any]]:
    with in_thread(server):
        status = soak.main([f"--url={server.url}", f"--out={folder}", "--scale=0.02", "--seconds=4", *options])
    report: dict[str, Any] = json.loads((folder / "soak.json").read_text())
    return status, report


def test_everybody_comes_and_goes_and_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Pool()
    status, report = soaked(tmp_path, server)
    assert (status, report["wrong"]) == (0, []) and "Nothing is wrong." in capsys.readouterr().out
    found = report["vtensor-auto"]
    assert set(found["finished"]) == {*soak.SORTS, "canary"}
    assert server.most_at_once > found["users"] / 2
    # A few went away or aborted, as the server saw, too.
    assert found["gone"].keys() == {"goes away", "aborts"} and server.aborted and server.vanished
    assert found["done"]["limit moves"] >= len(soak.LIMITS) and found["done"]["flushes"] == 1
    assert min(server.limits) == 10 * PAGES // 2 and server.limits[-1] == 10 * PAGES, "the limit is not given back"
    assert found["answers"]["under load"][0] > 4
    assert [differed for _, differed in found["answers"].values()] == [0, 0, 0]
    # On a slow machine a flush takes a window, or two.
    begins = [window["at_s"] for window in found["windows"]]
    assert begins == sorted({0, 1, 2, 3} & {*begins}) and len(begins) >= 2
    with (tmp_path / "soak.csv").open() as file:
        rows = {row["metric"]: float(row["p50"]) for row in csv.DictReader(file)}
    assert rows["ttft_p99 last window"] == pytest.approx(found["windows"][-1]["ttft_p99"], rel=1e-4)
    assert rows["errors"] == 0 and rows["requests"] > 20
    with (tmp_path / "vtensor-auto-requests.csv").open() as file:
        assert {row["fate"] for row in csv.DictReader(file)} == set(soak.FATES)
    assert (tmp_path / "vtensor-auto-memory.svg").exists() and (tmp_path / "vtensor-auto-ttft.svg").exists()


@pytest.mark.parametrize(
    ("loses", "told"),
    [
        ("pages_in_use", "pages_in_use is 1 when idle"),
        ("rows_running", "rows_running is 1 when idle"),
        ("pages_fenced", "pages_fenced is 1 when idle"),
        ("backed_bytes", "backed_bytes was 10 before and is 11"),
        ("mappings", "mappings was 7 before and is 8"),
        ("driver_calls create", "10 create less 8 release are not 1 handles"),
        ("driver_calls unmap", "20 map less 13 unmap are not 8 mappings"),
        ("driver_calls reserve", "2 address ranges were reserved before, 3 are now"),
    ],
)
def test_what_is_lost_is_told(loses: str, told: str) -> None:
    before, after = Pool().figures(), Pool(limits=[0, 0, 0], loses=loses).figures()
    assert soak.leaks(before, before) == [] == soak.leaks({}, {})
    assert any(told in text for text in soak.leaks(before, after))
    device = soak.DEVICE_SLACK_BYTES
    assert soak.leaks(before | {"device_bytes": 0}, before | {"device_bytes": device}) == []
    assert len(soak.leaks(before | {"device_bytes": 0}, before | {"device_bytes": device + 1})) == 1


def test_other_answers_errors_and_leaks_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = soaked(tmp_path, Pool(loses="pages_in_use", confused=True))
    answers = report["vtensor-auto"]["answers"]
    assert answers["alone again"] == answers["all at once"] == [8, 0]
    assert 0 < answers["under load"][1] <= answers["under load"][0] and report["vtensor-auto"]["first_difference"] == 0
    others, errors, leak = report["wrong"]
    assert re.fullmatch(r"vtensor-auto: (\d+) of \d+ answers under load are further .* than rounding goes", others)
    assert re.fullmatch(r'vtensor-auto: \d+ times N: {"error": "no"}', errors) and "pages_in_use is 1" in leak
    assert status == 1 and "WRONG with vtensor-auto: pages_in_use" in capsys.readouterr().out


def test_windows_follow_one_another_from_the_first() -> None:
    """Each whole one in which somebody was answered, and a fixed prompt is nobody."""
    load = soak.Load(soak.Remote("ours", ""), soak.Traffic(1, 0.02), users=1, capacity_bytes=0)
    load.begin, load.seconds, load.window_s = time.monotonic() - 60, 4.0, 1.0
    asked = [(0.0, "short"), (0.9, "long"), (1.0, "chat"), (2.5, "canary"), (3.2, "short"), (4.1, "short")]
    load.samples = [soak.Asked(at_s=at_s, sort=sort, sent_s=0.0, ttft_s=0.5) for at_s, sort in asked]
    assert [(window["at_s"], window["answers"]) for window in load.windows()] == [(0, 2), (1, 1), (3, 1)]


def test_near_ties_are_told_but_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the shape of a batch decides them, in stock SGLang, too."""

    def tied(server: Pool, prompt: str, count: int) -> list[int]:
        return [1001 if server.at_once > 9 else 1000] * count

    def tops(_: Pool, token: int, count: int) -> list[list[Any]]:
        rounded = 0.01 * (token - 1000)
        return [[-0.7 - rounded, 1000, None], [-0.71 + rounded, 1001, None]]

    monkeypatch.setattr(Pool, "_answer", tied)
    monkeypatch.setattr(Pool, "_tops", tops)
    status, report = soaked(tmp_path, Pool())
    found = report["vtensor-auto"]
    assert (status, report["wrong"]) == (0, [])
    assert found["answers"]["under load"][1] > 0 and found["apart_nat"]["under load"][1] == pytest.approx(0.01)
    assert found["apart_nat"]["alone again"] == [0, 0]


def test_how_far_answers_are_apart() -> None:
    likeliest: tuple[dict[int, float], ...] = ({5: -0.1, 6: -2.0}, {7: -0.5, 8: -0.6}, {9: -0.1, 1: -4.0})
    idle = soak.Answer((5, 7, 9), likeliest)
    rounded = soak.Answer((5, 8, 1), ({5: -0.15, 6: -3.0}, {8: -0.54, 7: -0.56}, {1: -0.1, 2: -9.0}))
    # The third token follows another text, and 6 was said by nobody: neither counts.
    assert idle.apart(rounded) == rounded.apart(idle) == pytest.approx(0.06)
    assert idle.apart(idle) == 0
    assert idle.apart(soak.Answer((5, 1, 1), ({5: -0.1}, {1: -0.1, 2: -3.0}, {1: -0.1}))) == float("inf")


def test_a_logprob_that_is_no_number_is_wrong() -> None:
    """SGLang writes NaN as null."""
    tops = [[[-0.1, 5, None]], [[None, 7, None]]]
    meta = {"prompt_tokens": 1, "completion_tokens": 2, "output_top_logprobs": tops}
    said = {"output_ids": [5, 7], "meta_info": meta}
    talk = soak.Probing(Session(0, 0, (), ()), "", "server")
    talk.close(json.dumps(said).encode(), soak.Asked(), Turn((1,), 2))
    good = soak.Answer((5, 7), ({5: -0.1}, {7: -0.2}))
    assert talk.answer.ids == good.ids
    assert talk.answer.apart(good) == good.apart(talk.answer) == talk.answer.apart(talk.answer) == float("inf")


def test_the_budget_and_sigterm_end_it_with_what_there_is(tmp_path: Path) -> None:
    status, report = soaked(tmp_path / "budget", Pool(), "--budget-seconds=1")
    assert status == 1 and "budget" in report["wrong"][0]
    server = Pool()
    with in_thread(server):
        command = [sys.executable, soak.__file__, f"--url={server.url}", f"--out={tmp_path}", "--scale=0.02"]
        process = subprocess.Popen([*command, "--seconds=20"], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(server.limits) < 2 and time.monotonic() < deadline:  # 1 is of the look before the load
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "fixed prompts all at once" in output
    assert json.loads((tmp_path / "soak.json").read_text())["vtensor-auto"]["finished"]["short"] > 0
