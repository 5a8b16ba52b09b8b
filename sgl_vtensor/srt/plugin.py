"""The entry point ``sglang.srt.plugins``: what SGLang calls in each of its processes before anything else."""

from __future__ import annotations


def register() -> None:
    """Add flags, hooks, attention backend and radix cache. All of them wait for ``--enable-vtensor``."""
    from sgl_vtensor.srt import backend, compat, flags, prefix

    flags.register_resolution()
    prefix.register_tree()
    backend.register_backend()
    compat.register_hooks()  # last: if anything fails before, the flags do not exist and the server does not start
