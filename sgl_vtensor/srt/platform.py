"""A platform for machines without a GPU: the unmodified SGLang server on native torch operators and the host driver."""

from __future__ import annotations

import torch


def activate() -> str | None:
    """The entry point ``sglang.srt.platforms``: our platform where there is no accelerator, else None."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "sgl_vtensor.srt.host_platform.HostPlatform"
