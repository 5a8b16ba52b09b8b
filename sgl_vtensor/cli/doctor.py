"""``sgl-vtensor doctor``: can this machine serve on vTensor memory? One line a check, each with its remedy."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from sgl_vtensor.config import format_bytes
from sgl_vtensor.errors import VTensorError
from sgl_vtensor.vmm import open_driver
from sgl_vtensor.vmm.driver import VmmDriver

Status = Literal["ok", "warning", "failure"]
PYTHONS = ((3, 11), (3, 12))
LOW_MEMORY_BYTES = 4 << 30
MARKS: dict[Status, str] = {"ok": "ok     ", "warning": "WARNING", "failure": "FAILURE"}


@dataclass(frozen=True)
class Finding:
    """What one check found. ``remedy`` is empty where all is well."""

    check: str
    status: Status
    found: str
    remedy: str = ""


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print what every check found; 1 if any failed, else 0."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            print(f"{MARKS[finding.status]}  {finding.check:{width}}  {finding.found}{remedy}")
    return int(any(finding.status == "failure" for finding in findings))


def examine(say: Callable[[str], None]) -> Iterator[Finding]:
    """Every check, in the order in which a user would mend things. ``say`` is told of those that take seconds."""
    yield _python()
    say("Importing SGLang")
    yield _sglang()
    yield _hooks()
    say("Looking at the GPU")
    on_cuda = torch.cuda.is_available()
    nvidia = _nvidia_driver()
    yield _device(on_cuda, nvidia)
    if nvidia is not None:
        yield Finding("NVIDIA driver", "ok", nvidia)
    if on_cuda:
        yield _package("cuda-python", "cuda.bindings", "pip install cuda-python", "failure")
        yield _package("FlashAttention-3", "sgl_kernel", "reinstall SGLang; Triton kernels serve without it", "warning")
    try:
        with closing(open_driver("cuda" if on_cuda else "host")) as driver:
            yield _memory(driver)
            yield _round_trip(driver)
    except VTensorError as error:
        remedy = "update the NVIDIA driver" if on_cuda else "see the message"
        yield Finding("virtual memory", "failure", str(error), remedy)


def _python() -> Finding:
    found = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("Python", "ok", found)
    return Finding("Python", "failure", found, "use Python 3.11 or 3.12")


def _sglang() -> Finding:
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return Finding("SGLang", "failure", "not installed", "pip install 'sgl-vtensor[sglang]'")
    try:
        with warnings.catch_warnings(action="ignore"):  # SGLang warns of devices that are not here
            from sgl_vtensor.srt.compat import SUPPORTED
    except ImportError as error:
        return Finding("SGLang", "failure", f"{found} cannot be imported ({error})", "reinstall it")
    if found in SUPPORTED:
        return Finding("SGLang", "ok", found)
    return Finding("SGLang", "failure", f"{found} is not supported", f"pip install sglang=={SUPPORTED[-1]}")


def _hooks() -> Finding:
    try:
        with warnings.catch_warnings(action="ignore"):
            from sgl_vtensor.srt.compat import HOOKS, check_targets

            check_targets()
    except (ImportError, VTensorError) as error:
        return Finding("hooks into SGLang", "failure", str(error), "install the supported version")
    return Finding("hooks into SGLang", "ok", f"all {len(HOOKS)} targets are there")


def _nvidia_driver() -> str | None:
    """Version of the NVIDIA driver and of the CUDA that it brings; None where there is none, or no NVML to ask."""
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return f"{pynvml.nvmlSystemGetDriverVersion()}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    except pynvml.NVMLError as error:
        return f"of unknown version ({error})"
    finally:
        pynvml.nvmlShutdown()


def _device(on_cuda: bool, driver: str | None) -> Finding:
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    if on_cuda:
        major, minor = torch.cuda.get_device_capability()
        return Finding("device", "ok", f"{torch.cuda.get_device_name()}, sm_{major}{minor}; {built}")
    remedy = "fine for a trial; on a machine with a GPU, check nvidia-smi"
    if driver is not None:
        remedy = f"this is {built}: update the NVIDIA driver, install a torch for it, or look at CUDA_VISIBLE_DEVICES"
    return Finding("device", "warning", "no GPU that torch can use: the host driver serves, slowly", remedy)


def _package(check: str, module: str, remedy: str, missing: Status) -> Finding:
    if importlib.util.find_spec(module.split(".")[0]) is not None:
        return Finding(check, "ok", f"{module} is there")
    return Finding(check, missing, f"{module} is missing", remedy)


def _memory(driver: VmmDriver) -> Finding:
    free_bytes, total_bytes = driver.memory_info()
    found = f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} free on {driver.device}"
    if free_bytes < LOW_MEMORY_BYTES:
        return Finding("memory", "warning", found, "end what else uses it, or lower --mem-fraction-static")
    return Finding("memory", "ok", found)


def _round_trip(driver: VmmDriver) -> Finding:
    """Two addresses of one granule, as a page has a home and a row: what is written at one is read at the other."""
    size = driver.granularity
    steps: list[Callable[[], None]] = []  # undone in reverse
    try:
        base = driver.reserve(2 * size)
        steps.append(lambda: driver.free_reservation(base, 2 * size))
        handle = driver.create(size)
        steps.append(lambda: driver.release(handle))
        for address, writable in ((base, True), (base + size, False)):
            driver.map(address, handle, size, writable=writable)
            steps.append(lambda address=address: driver.unmap(address, size))  # type: ignore[misc]
        driver.tensor(base, size).fill_(0x5A)
        alias = driver.tensor(base + size, size)
        if not bool((alias == 0x5A).all()):
            return Finding("virtual memory", "failure", "an alias shows other bytes", "please report this")
    finally:
        _undo(steps)
    read_only = "read-only aliases" if driver.read_only_supported else "aliases (writable: no read-only mappings here)"
    return Finding(
        "virtual memory", "ok", f"{driver.name} driver, granules of {format_bytes(size)}, {read_only}: mapped and read"
    )


def _undo(steps: Iterable[Callable[[], None]]) -> None:
    for step in reversed(list(steps)):
        step()
