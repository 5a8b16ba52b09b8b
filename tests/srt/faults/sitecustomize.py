"""Python runs this at its start where this folder is on the path: a server's driver then fails as a file says.

The file that ``SERVER_FAULTS`` names holds JSON like ``{"create OutOfMemory": 0.5, "rank": 1}``: the share of calls of
a kind that fail, and how, on this rank only where one is named. It is read at every call: a test can rewrite it.
"""

import json
import os
import random
from typing import Any

PLAN = os.environ.get("SERVER_FAULTS")


def install(path: str) -> None:
    """Let every driver that is opened from now on fail as the file says."""
    import torch

    from sgl_vtensor import vmm
    from sgl_vtensor.errors import DriverError, OutOfMemory
    from sgl_vtensor.vmm.faults import FAULT_KINDS, Call, Fault, FaultyDriver

    dice, original = random.Random(1), vmm.open_driver

    def rank() -> int:
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def fault(kind: str, error: type[DriverError]) -> Fault:
        def when(call: Call) -> bool:
            with open(path) as file:
                plan = json.load(file)
            share = plan.get(f"{kind} {error.__name__}", 0.0)
            return plan.get("rank", rank()) == rank() and dice.random() < share

        return Fault(kind, when, error)

    def open_driver(*args: Any, **kwargs: Any) -> Any:
        plan = [fault(kind, error) for kind in FAULT_KINDS for error in (OutOfMemory, DriverError)]
        return FaultyDriver(original(*args, **kwargs), plan)

    vmm.open_driver = open_driver


if PLAN:
    install(PLAN)
