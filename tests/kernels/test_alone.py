"""The kernels are a distribution of their own: torch and triton, nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "kernels_alone.py"


def test_wheel_holds_the_kernels_and_asks_for_torch_and_triton(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    source = tmp_path / "source"  # setuptools leaves a build folder beside what it builds
    subprocess.run(["cp", "-r", ROOT / "kernels", source], check=True)
    subprocess.run(command, cwd=source, check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if name.endswith(".py")}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert names == {f"vtensor_kernels/{path.name}" for path in (ROOT / "kernels/vtensor_kernels").glob("*.py")}
    needs = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert needs == ["torch", "triton"]


def test_the_program_of_their_page_runs_and_agrees() -> None:
    """On Triton's interpreter, with no path to sgl_vtensor."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "kernels"),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    errors = [float(line.split(":")[1].split()[0]) for line in done.stdout.splitlines()]
    # float32 sums of 64 products and 207 weights, in another order: a few units in the last place of values near 1.
    assert len(errors) == 2 and max(errors) < 64 * 2**-23


def test_their_page_shows_the_program() -> None:
    program = EXAMPLE.read_text().split('"""\n', 1)[1].strip()
    assert program in (ROOT / "kernels" / "README.md").read_text()
