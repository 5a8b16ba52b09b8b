"""Rows of bench/results/<bench>.csv: one a case, implementation and metric. Rows are added, never edited."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "results"
COLUMNS = ("date", "commit", "gpu", "versions", "bench", "case", "impl", "metric", "unit", "p20", "p50", "p80")


def _commit() -> str:
    """BENCH_COMMIT where the checkout travelled without its history, else what git says."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=9"],
            cwd=FOLDER.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _versions() -> str:
    found = []
    for package in ("sglang", "sglang-kernel", "torch", "triton"):
        try:
            found.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none (host driver)"


class Results:
    """Appends to ``bench/results/<bench>.csv``, and to a copy in ``folder`` where one is given.

    ``keep=False``: to the copy only, for figures that are not worth a row that stays.
    """

    def __init__(self, bench: str, folder: Path | None = None, *, keep: bool = True) -> None:
        self.bench = bench
        kept = [FOLDER / f"{bench}.csv"] if keep else []
        self._files = kept + ([folder / f"{bench}.csv"] if folder else [])
        self._head = (datetime.date.today().isoformat(), _commit(), _gpu(), _versions(), bench)

    def add(self, case: str, impl: str, metric: str, unit: str, values: Sequence[float]) -> None:
        """One row from repeated measurements of one case and implementation."""
        self.add_percentiles(case, impl, metric, unit, *(float(np.percentile(values, q)) for q in (20, 50, 80)))

    def add_percentiles(self, case: str, impl: str, metric: str, unit: str, p20: float, p50: float, p80: float) -> None:
        """One row from percentiles that were taken elsewhere."""
        row = (*self._head, case, impl, metric, unit, *(f"{value:.6g}" for value in (p20, p50, p80)))
        for path in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(COLUMNS)
                writer.writerow(row)
