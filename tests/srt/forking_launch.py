"""``python -m sglang.launch_server`` whose processes are forks of the first, so that SGLang is imported once a start.

In place of three times, which takes most of a start here. Not for a test of how processes end, or fail to start.
"""

import multiprocessing
import runpy

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[assignment]  # SGLang wants "spawn"
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
