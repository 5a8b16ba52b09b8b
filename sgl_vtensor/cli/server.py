"""A server as a child process that never outlives the one who started it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from sgl_vtensor.errors import VTensorError

GRACE_SECONDS = 10.0


class ServerFailed(VTensorError):
    """The server did not start, or broke off. The message holds the end of its log."""


class Server:
    """A command in a process group of its own, with its output in a file; a context manager that ends the group."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # The guard reads a pipe whose other end only we hold: see guard().
        self._guard = subprocess.Popen(
            [sys.executable, "-m", __name__, str(GRACE_SECONDS)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                )
        except BaseException:
            self._dismiss_guard()
            raise
        self.group = self.process.pid
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{self.group}\n".encode())
        self._guard.stdin.flush()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def running(self) -> bool:
        """Whether the command itself has not ended."""
        return self.process.poll() is None

    def failed(self, what: str) -> ServerFailed:
        """The error to raise when the server fails us."""
        return ServerFailed("\n".join([f"{what}. The end of its log, {self.log}:", *self.last_lines(15)]))

    def last_lines(self, count: int) -> list[str]:
        """The end of the log, without empty lines."""
        with self.log.open("rb") as file:
            start = max(0, self.log.stat().st_size - 400 * count)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()[start > 0 :]  # the first may lack its beginning
        return [line for line in lines if line.strip()][-count:]

    def stop(self) -> None:
        """End the whole group: ask, wait, then kill. A second Ctrl-C kills at once."""
        try:
            end_group(self.group, GRACE_SECONDS)
        finally:
            self.process.wait()
            self._dismiss_guard()

    def _dismiss_guard(self) -> None:
        self._guard.kill()
        self._guard.communicate()


def end_group(group: int, grace_seconds: float) -> None:
    """End a group: ask its leader to end in order, wait, then kill. An exception while waiting kills at once."""
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        try:
            # SGLang's leader ends its children itself; asked directly, they look crashed to it.
            os.kill(group, signal.SIGTERM)
            deadline = time.monotonic() + grace_seconds
            while group_members(group) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            os.killpg(group, signal.SIGKILL)


def guard(grace_seconds: float) -> None:
    """End the group that the first line of stdin names, once stdin ends.

    It runs in a session of its own. Its stdin is a pipe from the process that has started the server, so that it ends
    however that process ends, by SIGKILL too.
    """
    group = sys.stdin.readline()
    sys.stdin.read()
    if group:
        end_group(int(group), grace_seconds)


def group_members(group: int) -> list[int]:
    """The processes of a group that are not zombies (where nobody reaps orphans, these stay for ever)."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (name, which may hold anything) state ppid pgrp ...
            state, _, pgrp = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        if int(pgrp) == group and state not in "ZX":
            members.append(int(entry.name))
    return members


def free_port(wanted: int, host: str) -> int:
    """Return ``wanted`` (0: from 20000 on), or the next port that nobody holds.

    Never one of the system's choice: it gives these to outgoing connections as well, and one of them would hold it by
    the time a server has loaded its model and takes it.
    """
    for port in range(wanted or 20_000, 1 << 16):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                return port
    raise OSError(f"no port from {wanted or 20_000} on is free on {host}")


if __name__ == "__main__":
    guard(float(sys.argv[1]))
