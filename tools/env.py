"""Makes the environment that `make` works in: SGLang with its own torch, 11 GB, outside the checkout.

Its name holds a hash of what pyproject.toml asks for, so that checkouts that ask for the same share one, and a changed
dependency makes another. The package itself is not installed in it: `.local/` of each checkout holds the metadata by
which SGLang finds the plugin, and `python` and `sgl-vtensor`, which put the checkout on PYTHONPATH (SGLang's child
processes inherit it).

    python3 tools/env.py [--venv DIR]            make it if need be
    python3 tools/env.py [--venv DIR] --clean    remove it
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
LOCAL = CHECKOUT / ".local"
CACHE = Path.home() / ".cache" / "sgl-vtensor"
NEEDED_GB = 14

# Written into the environment: UNFINISHED while pip runs, READY (the hash) at its end.
UNFINISHED = ".sgl-vtensor-unfinished"
READY = ".sgl-vtensor-ready"

WRAPPER = """\
#!/bin/sh
# Written by tools/env.py: this checkout, run in the environment {venv}
here=$(cd "$(dirname "$0")/.." && pwd)
checkout=$(dirname "$here")
PYTHONPATH="$checkout:$checkout/kernels:$here${{PYTHONPATH:+:$PYTHONPATH}}"
PATH="$here/bin:{venv}/bin:$PATH"
export PYTHONPATH PATH
exec "{venv}/bin/python" {arguments}"$@"
"""


def main() -> None:
    """Make or remove the environment."""
    parser = argparse.ArgumentParser(description="Make (or remove) the environment that make works in.")
    parser.add_argument("--venv", type=Path, help=f"its folder (default: {CACHE}/venv-HASH)")
    parser.add_argument("--clean", action="store_true", help="remove it")
    options = parser.parse_args()
    asked = requirements()
    key = fingerprint(asked)
    # An absolute path, but no resolve(): a link chosen by the user keeps its name.
    venv = Path(os.path.abspath(options.venv or CACHE / f"venv-{key}"))
    if options.clean:
        clean(venv)
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    with locked(venv):
        if is_foreign(venv):
            print(f"Using {venv} as it is: make did not make it.")
        elif not (venv / READY).is_file() or (venv / READY).read_text() != key:
            install(venv, asked)
            (venv / READY).write_text(key)
            (venv / UNFINISHED).unlink()
        write_local(venv)


def requirements() -> dict[str, list[str]]:
    """What pyproject.toml asks for: requirements for pip, and those to install without their own dependencies."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    return {"plain": sorted(set(wanted)), "no-deps": project["tool"]["sgl-vtensor"]["install-without-dependencies"]}


def fingerprint(asked: dict[str, list[str]]) -> str:
    """Equal for two checkouts that can share an environment."""
    python = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    return hashlib.sha256(json.dumps([asked, python]).encode()).hexdigest()[:12]


@contextmanager
def locked(venv: Path) -> Iterator[None]:
    """One make at a time works on ``venv``. The lock ends with its process and with pip, however these end."""
    with open(f"{venv}.lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)  # a pip that survives us still holds it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another make is at work on {venv}: waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_foreign(venv: Path) -> bool:
    """Whether ``venv`` holds something that make has not put there."""
    marked = (venv / READY).is_file() or (venv / UNFINISHED).is_file()
    return not marked and venv.is_dir() and any(venv.iterdir())


def install(venv: Path, asked: dict[str, list[str]]) -> None:
    """Fill ``venv``. What an interrupted run has left there is removed first; pip's cache spares the downloads."""
    free_gb = shutil.disk_usage(venv.parent).free / 1e9
    if free_gb < NEEDED_GB:
        sys.exit(f"{venv.parent} has {free_gb:.0f} GB free, SGLang needs {NEEDED_GB}: free some, or set VENV=DIR")
    print(
        f"Installing SGLang 0.5.23 and its torch into {venv}\n"
        "once for all checkouts: about 5 GB to download, 11 GB on disk, 5 minutes. `make clean-env` removes it.",
        flush=True,
    )
    discard(venv)
    venv.mkdir()
    (venv / UNFINISHED).touch()
    pip = [f"{venv}/bin/python", "-m", "pip", "install", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [*pip, *asked["plain"]],
        [*pip, "--no-deps", *asked["no-deps"]],
    ):
        if subprocess.run(command, close_fds=False).returncode:
            sys.exit(f"\nThe environment is not made: the command above failed. Run make again; {venv} starts afresh.")


def discard(venv: Path) -> None:
    """Remove ``venv``. It loses its name first, so that an interrupted removal does not look like a user's own."""
    trash = Path(f"{venv}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    if venv.is_dir():
        venv.rename(trash)
        shutil.rmtree(trash)


def write_local(venv: Path) -> None:
    """Write this checkout's `.local/`: metadata with the entry points, and the two commands. Cheap: done each time."""
    binaries = LOCAL / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    stamp = LOCAL / "made-for"
    state = hashlib.sha256(b"".join([(CHECKOUT / "pyproject.toml").read_bytes(), bytes(venv), WRAPPER.encode()]))
    if stamp.is_file() and stamp.read_text() == state.hexdigest():
        return
    for old in LOCAL.glob("*-info"):
        shutil.rmtree(old)
    metadata = "from setuptools.build_meta import prepare_metadata_for_build_wheel as make; make('.local')"
    made = subprocess.run(
        [venv / "bin" / "python", "-c", metadata], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if made.returncode:
        sys.exit(f"Cannot make the package's metadata with {venv}/bin/python:\n{made.stderr}")
    shutil.rmtree(LOCAL / "sgl_vtensor.egg-info")  # setuptools' by-product: a second, equal description
    for name, arguments in {"python": "", "sgl-vtensor": "-m sgl_vtensor "}.items():
        # Replaced, not overwritten: a shell reads its script as it goes.
        new = binaries / f"{name}.{os.getpid()}"
        new.write_text(WRAPPER.format(venv=venv, arguments=arguments))
        new.chmod(0o755)
        new.replace(binaries / name)
    stamp.write_text(state.hexdigest())


def clean(venv: Path) -> None:
    """Remove ``venv``, if make has made it, and this checkout's `.local/`."""
    if is_foreign(venv):
        sys.exit(f"{venv} was not made by make: remove it yourself.")
    shutil.rmtree(LOCAL, ignore_errors=True)
    if venv.is_dir():
        with locked(venv):
            discard(venv)
        print(f"Removed {venv}")
    for other in sorted(CACHE.glob("venv-*/")):
        print(f"Left alone: {other}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The next make starts the environment afresh; pip keeps its downloads.")
