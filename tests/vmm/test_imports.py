"""Imports point one way (srt -> core -> vmm, kernels alone), and the driver is chosen by name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from sgl_vtensor.errors import ConfigError, DriverError
from sgl_vtensor.vmm import open_driver

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "sgl_vtensor"
KERNELS = REPOSITORY / "kernels" / "vtensor_kernels"

WITHOUT_SGLANG = """
import importlib, pkgutil, sys
sys.modules["sglang"] = None
for name in ("sgl_vtensor.vmm", "sgl_vtensor.core"):
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        if (name, module.name) != ("sgl_vtensor.vmm", "cuda"):
            importlib.import_module(f"{name}.{module.name}")
"""


def imported_names(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it; relative ones made absolute."""
    package: list[str] = []
    for root in (REPOSITORY, REPOSITORY / "kernels"):
        if path.is_relative_to(root):
            package = list(path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (PACKAGE / "vmm", ("sglang", "sgl_vtensor.core", "sgl_vtensor.srt", "sgl_vtensor.cli", "vtensor_kernels")),
        (PACKAGE / "core", ("sglang", "cuda", "sgl_vtensor.srt", "sgl_vtensor.cli", "vtensor_kernels")),
        (KERNELS, ("sglang", "sgl_vtensor", "cuda")),
    ],
    ids=["vmm", "core", "kernels"],
)
def test_imports_point_one_way(folder: Path, forbidden: tuple[str, ...]) -> None:
    files = sorted(folder.rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in files
        for name in imported_names(path)
        if any(f"{name}.".startswith(f"{prefix}.") for prefix in forbidden)
    ]
    assert not wrong


def test_relative_and_inner_imports_are_seen(tmp_path: Path) -> None:
    assert "sgl_vtensor.vmm.host.HostDriver" in set(imported_names(PACKAGE / "vmm" / "__init__.py"))
    source = tmp_path / "module.py"
    source.write_text("def inner():\n    import sglang.srt\n")
    assert list(imported_names(source)) == ["sglang.srt"]


def test_only_the_cuda_driver_imports_cuda_python() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "cuda" for name in imported_names(path))
    }
    assert users == {"vmm/cuda.py"}


def test_vmm_and_core_import_without_sglang() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", WITHOUT_SGLANG]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_driver_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"'metal'.*'cuda' and 'host'"):
        open_driver("metal")  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_the_cuda_driver_without_a_gpu_names_the_way_out() -> None:
    with pytest.raises(DriverError, match="host driver"):
        open_driver("cuda")
