"""``sgl-vtensor doctor`` on this machine, and on machines where something is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sgl_vtensor.cli import doctor
from sgl_vtensor.cli.main import main
from sgl_vtensor.errors import OutOfMemory
from sgl_vtensor.vmm.base import CALL_KINDS
from sgl_vtensor.vmm.faults import Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver

ON_THE_HOST = [
    ("Python", "ok"),
    ("SGLang", "ok"),
    ("hooks into SGLang", "ok"),
    ("device", "warning"),
    ("memory", "ok"),
    ("virtual memory", "ok"),
]


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["doctor", "--json"])
    return status, {one["check"]: one for one in json.loads(capsys.readouterr().out)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says other things where there is a GPU")
def test_all_is_well_on_the_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_MEMORY_BYTES", 0)
    status, found = findings(capsys)
    assert status == 0
    assert [(one["check"], one["status"]) for one in found.values()] == ON_THE_HOST
    assert "host driver, granules of 4.00 KiB, read-only aliases" in found["virtual memory"]["found"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok       Python             Python 3.1")
    assert lines[3].startswith("WARNING  device             no GPU")


def test_another_sglang_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.4.1")
    status, found = findings(capsys)
    assert status == 1
    assert found["SGLang"]["status"] == "failure"
    assert found["SGLang"]["remedy"] == "pip install sglang==0.5.23"


@pytest.mark.parametrize("call", CALL_KINDS)
def test_a_driver_that_refuses_is_a_failure_and_nothing_is_left(
    call: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = HostDriver()
    if call in ("reserve", "create", "map"):
        monkeypatch.setattr(inner, "close", lambda: None)  # what was taken is given back one by one
    faulty = FaultyDriver(inner, [Fault(call, when=1, error=OutOfMemory)])
    monkeypatch.setattr(doctor, "open_driver", lambda name: faulty)
    status, found = findings(capsys)
    assert status == 1 and found["virtual memory"]["status"] == "failure"
    assert (inner.num_reservations, inner.num_handles, inner.num_mappings) == (0, 0, 0)
    HostDriver.close(inner)


def test_an_alias_that_shows_other_bytes_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HostDriver.map

    def map_other_memory(self: HostDriver, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        original(self, address, handle if writable else self.create(num_bytes), num_bytes, writable=writable)

    monkeypatch.setattr(HostDriver, "map", map_other_memory)
    status, found = findings(capsys)
    assert status == 1 and found["virtual memory"]["found"] == "an alias shows other bytes"
