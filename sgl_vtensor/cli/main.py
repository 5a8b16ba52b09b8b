"""The command ``sgl-vtensor``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sgl_vtensor.errors import ConfigError, VTensorError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(argv)
    return reported(lambda: options.run(options))


def reported(command: Callable[[], int]) -> int:
    """Run ``command``; say the package's own errors in words, without a traceback."""
    try:
        return command()
    except VTensorError as error:
        print(f"sgl-vtensor: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="sgl-vtensor",
        description="SGLang with a KV cache made of virtual memory. To serve a model, start SGLang as usual and add "
        "--enable-vtensor; the commands here are for looking around.",
    )
    commands = result.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="start a server with a small model, chat with it and watch the cache",
        description="Start SGLang with SmolLM2-135M and --enable-vtensor, hold a chat of three turns, show after each "
        "turn what the cache holds, then let you chat on. Works with and without a GPU. Ctrl-C stops everything.",
    )
    demo.add_argument("--port", type=int, default=30000, help="port of the server; if taken, another (%(default)s)")
    demo.add_argument("--max-tokens", type=int, default=40, help="longest answer, in tokens (%(default)s)")
    demo.add_argument("--model-path", help="a Hugging Face folder with a chat template, in place of SmolLM2")
    demo.add_argument(
        "server_flags", nargs="*", metavar="-- FLAG", help="flags passed on to SGLang, for example -- --page-size 32"
    )
    demo.set_defaults(run=_demo)

    limit = commands.add_parser(
        "limit",
        help="look at the memory limit of a running server, or move it",
        description="Without SIZE: print the limit and what is backed. With SIZE: let the KV cache have so much from "
        "now on. Cached prefixes go first, then new requests wait; requests that run are not stopped.",
    )
    _add_server(limit)
    limit.add_argument("size", nargs="?", metavar="SIZE", help="like 16GiB, or 50%% of what the pool can hold")
    limit.add_argument(
        "--wait", type=float, default=5.0, metavar="S", help="seconds to wait for memory to follow (%(default)g)"
    )
    limit.set_defaults(run=_limit)

    top = commands.add_parser(
        "top",
        help="watch memory, sharing and rows of a running server",
        description="A live view, once a second; Ctrl-C ends it. Where the output is no terminal, one look.",
    )
    _add_server(top)
    top.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (%(default)g)")
    top.add_argument("--once", action="store_true", help="look once; rates are since the server's start")
    top.add_argument("--json", action="store_true", help="print a line of JSON a look, for programs")
    top.set_defaults(run=_top)

    page = commands.add_parser(
        "page",
        help="see the pages of a running server as a picture, in a browser",
        description="A server shows the page itself, at /vtensor: this looks whether it does and prints the address. "
        "A browser sends no API key, so where the server wants one, the page is served from here until Ctrl-C.",
    )
    _add_server(page)
    page.add_argument("--port", type=int, default=0, metavar="N", help="where to serve it from here (any free one)")
    page.set_defaults(run=_page)

    doctor = commands.add_parser(
        "doctor",
        help="check whether this machine can serve on vTensor memory",
        description="One line a check: ok, WARNING or FAILURE with what to do. Exit status 1 if any failed.",
    )
    doctor.add_argument("--json", action="store_true", help="print a list of findings for programs")
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser(
        "plan",
        help="what a model's KV cache looks like in pages and rows",
        description="Reads a model's config.json and prints page sizes, what they waste and cost, and which one a "
        "server on CUDA would take, and how much fits on the GPU that is here. Starts nothing and needs no GPU.",
    )
    plan.add_argument(
        "model", metavar="MODEL", help="a model folder, its config.json, or the name of a model that was downloaded"
    )
    plan.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (%(default)s)")
    plan.add_argument("--kv-dtype", default="auto", help="auto, bfloat16, fp8_e4m3, ... (%(default)s)")
    plan.add_argument("--context-length", type=int, metavar="N", help="longest request; default: the model's")
    plan.add_argument("--max-running-requests", type=int, default=256, metavar="N", help="at once (%(default)s)")
    plan.add_argument(
        "--memory",
        metavar="SIZE",
        help="for KV on one GPU, like 40GiB, or 50%% of the GPU that is here; default: what SGLang would leave for KV "
        "on the GPU that is here, or, where there is none, 40GiB",
    )
    plan.add_argument("--json", action="store_true", help="print the figures for programs")
    plan.set_defaults(run=_plan)

    replay = commands.add_parser(
        "replay",
        help="run the trace of a server again, look for what broke, and for what other pages would take",
        description="Reads a file that --vtensor-trace wrote, makes the same calls on a pool as large, compares what "
        "comes of them and checks all tables. Needs no GPU and little memory. Exit status 1 if something broke, "
        "with the event. --page-tokens and --num-rows add what another pool would have taken.",
    )
    replay.add_argument("file", type=Path, metavar="FILE", help="the trace of one rank, like trace.0")
    replay.add_argument("--page-tokens", type=int, metavar="N", help="tokens in one page of the other pool")
    replay.add_argument("--num-rows", type=int, metavar="N", help="rows of the other pool")
    replay.add_argument(
        "--check-every",
        type=int,
        metavar="N",
        help="look at all tables after every N events; where that finds something, the trace is run once more to find "
        "the first event. Default: 1 up to 511 pages, more for larger pools",
    )
    replay.add_argument("--json", action="store_true", help="print the figures for programs")
    replay.set_defaults(run=_replay)
    return result


def _check_counts(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is too few; give at least 1")


def _replay(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli import replay

    _check_counts(options, "page_tokens", "num_rows", "check_every")
    return replay.run(
        options.file,
        page_tokens=options.page_tokens,
        num_rows=options.num_rows,
        check_every=options.check_every,
        as_json=options.json,
    )


def _doctor(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli.progress import waiting

    with waiting("Importing torch") as say:
        from sgl_vtensor.cli import doctor

        findings = list(doctor.examine(say))
    return doctor.report(findings, as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli.progress import waiting
    from sgl_vtensor.config import parse_size

    memory = None if options.memory is None else parse_size("--memory", options.memory)
    _check_counts(options, "context_length", "max_running_requests")
    with waiting("Importing torch"):
        from sgl_vtensor.cli import plan
    return plan.run(
        options.model,
        tp=options.tp,
        kv_dtype=options.kv_dtype,
        context_tokens=options.context_length,
        requests=options.max_running_requests,
        memory=memory,
        as_json=options.json,
    )


def _add_server(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="URL", help="the server, like http://127.0.0.1:30000")
    command.add_argument("--api-key", help="the server's admin key, or its API key; default: $SGLANG_API_KEY")


def _limit(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli import limit
    from sgl_vtensor.cli.client import Client
    from sgl_vtensor.config import is_size

    if options.size is None and is_size(options.url):
        raise ConfigError(f"{options.url} is a size; the server's URL comes first: sgl-vtensor limit URL {options.url}")
    return limit.run(Client(options.url, options.api_key), options.size, wait_seconds=options.wait)


def _top(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli import top
    from sgl_vtensor.cli.client import Client

    if not options.interval > 0:
        raise ConfigError(f"--interval {options.interval:g} is too short; give seconds, like 1 or 0.5")
    client = Client(options.url, options.api_key)
    return top.run(client, interval_s=options.interval, once=options.once, as_json=options.json)


def _page(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli import page
    from sgl_vtensor.cli.client import Client

    return page.run(Client(options.url, options.api_key), port=options.port)


def _demo(options: argparse.Namespace) -> int:
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port} is no port; give a number up to 65535, or 0 for any free one")
    # Imported here: it brings torch, and --help should not wait for that.
    from sgl_vtensor.cli import demo

    return demo.run(options)
