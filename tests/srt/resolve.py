"""Resolves SGLang command lines, one JSON line each from stdin: {"argv": [...], "env": {...}}. Run as a program.

SGLang and its plugins are loaded once; each command line gets a fork of its own, since resolving leaves traces.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any

FIELDS = ("page_size", "attention_backend", "radix_cache_backend", "chunked_prefill_size", "disable_radix_cache")


def resolve(argv: list[str]) -> dict[str, Any]:
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            server_args = prepare_server_args(argv)
            server_args.resolve_once()
            server_args.check_server_args()
    except SystemExit:
        return {"error": "usage", "message": stderr.getvalue().strip().splitlines()[-1]}
    except Exception as error:  # noqa: BLE001
        return {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    view = resolved_view(server_args)
    config = getattr(server_args, "_vtensor_config", None)
    return {name: getattr(view, name) for name in FIELDS} | {
        "config": config and {name: _plain(value) for name, value in vars(config).items()}
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    results, sys.stdout = os.dup(1), sys.stderr
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.update(case["env"])
            os.write(results, json.dumps(resolve(case["argv"])).encode() + b"\n")
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
