"""The program of docs/core.md is the one in ``examples/``, and it does what it says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "two_vtensors.py"


def test_two_vtensors_read_one_prefix() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert "equal: True" in done.stdout
    assert "4 pages in use, 3 of them shared" in done.stdout


def test_its_page_shows_the_program() -> None:
    program = EXAMPLE.read_text().split("\n", 2)[2].strip()
    assert program in (ROOT / "docs" / "core.md").read_text()
