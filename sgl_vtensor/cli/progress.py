"""What a command is waiting for, where somebody sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """Show ``text`` on stderr while the block runs, if that is a terminal; what is yielded changes it.

    Nothing may be printed meanwhile: rich would send it to stderr, too.
    """
    with Console(stderr=True).status(text) as status:
        yield status.update
