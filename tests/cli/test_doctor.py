"""``sgl-vtensor doctor`` on this machine, and on machines where something is missing."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console

from sgl_vtensor.cli import doctor, progress
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


class NVML:
    """What ``pynvml`` says on a machine with an NVIDIA driver; it may refuse."""

    class NVMLError(Exception):
        pass

    def __init__(self, refused: str = "") -> None:
        self.refused = refused

    def _called(self, name: str) -> None:
        if name == self.refused:
            raise self.NVMLError("Unknown Error")

    def nvmlInit(self) -> None:
        self._called("init")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        self._called("version")
        return 13010


@pytest.mark.skipif(torch.cuda.is_available(), reason="says other things where there is a GPU")
@pytest.mark.parametrize(
    ("refused", "driver"),
    [("", "580.65.06, for CUDA up to 13.1"), ("version", "of unknown version (Unknown Error)"), ("init", None)],
)
def test_the_nvidia_driver_is_named_even_where_torch_cannot_use_it(
    refused: str, driver: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NVML(refused))
    status, found = findings(capsys)
    assert status == 0
    assert found.get("NVIDIA driver", {}).get("found") == driver
    assert ("update the NVIDIA driver" in found["device"]["remedy"]) == (driver is not None)


def test_progress_is_for_a_terminal_and_never_among_the_findings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["doctor", "--json"])
    assert "Looking" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "Console", partial(Console, force_terminal=True))
    main(["doctor", "--json"])
    out, err = capsys.readouterr()
    assert "Looking at the GPU" in err and json.loads(out)


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
