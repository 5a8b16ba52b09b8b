"""The command ``sgl-vtensor``."""

import argparse
import sys
from collections.abc import Callable, Sequence

from sgl_vtensor.errors import VTensorError


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
    return result


def _add_server(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="URL", help="the server, like http://127.0.0.1:30000")
    command.add_argument("--api-key", help="the server's admin key, or its API key; default: $SGLANG_API_KEY")


def _limit(options: argparse.Namespace) -> int:
    from sgl_vtensor.cli import limit
    from sgl_vtensor.cli.client import Client

    return limit.run(Client(options.url, options.api_key), options.size, wait_seconds=options.wait)


def _demo(options: argparse.Namespace) -> int:
    # Imported here: it brings torch, and --help should not wait for that.
    from sgl_vtensor.cli import demo

    return demo.run(options)
