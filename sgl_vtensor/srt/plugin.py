"""The entry point ``sglang.srt.plugins``: what SGLang calls in each of its processes before anything else."""

from __future__ import annotations


def register() -> None:
    """Add the flags, the hooks, the attention backend and the radix cache. All of them wait for ``--enable-vtensor``."""
    from sgl_vtensor.srt import backend, compat, flags, prefix

    compat.register_hooks()
    flags.register_resolution()
    prefix.register_tree()
    backend.register_backend()
