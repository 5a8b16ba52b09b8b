"""``python -m sglang.launch_server`` whose processes are forks of the first, so that SGLang is imported once a start.

In place of three times, which takes most of a start here. Not for a test of how processes end, or fail to start.
Its one argument names a file of flags, one a line. It imports SGLang, most of what is left, before the file is there.
"""

import multiprocessing
import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]  # SGLang wants "spawn"
    flags = Path(sys.argv[1])

    # In SGLang's order: plugins come first in each of its processes.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.entrypoints.http_server  # noqa: F401

    while not flags.exists():
        time.sleep(0.02)
    sys.argv[1:] = flags.read_text().splitlines()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
