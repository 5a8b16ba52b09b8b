"""Faults of a running server's driver; see ``faults/sitecustomize.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent / "faults"


class FaultPlan:
    """What fails now, in a server that was started with ``environment``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._write({})
        found = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {"PYTHONPATH": found, "SERVER_FAULTS": str(path)}

    @contextmanager
    def failing(self, **shares: float) -> Iterator[None]:
        """``create_OutOfMemory=0.5``: half of these calls fail so; ``rank=1``: on that rank only."""
        self._write({" ".join(name.rsplit("_", 1)): share for name, share in shares.items()})
        try:
            yield
        finally:
            self._write({})

    def _write(self, plan: dict[str, float]) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(plan))
        new.replace(self.path)  # whole, since the server may be reading it
