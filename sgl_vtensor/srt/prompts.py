"""Prompts that would end SGLang's scheduler are refused while they are one client's affair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgl_vtensor.srt.flags import active_config


def check_prompt(manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """Hook, in the tokenizer's process, before SGLang looks at a request's lengths.

    Raises:
        ValueError: the prompt is empty, or has a number that is no token. SGLang answers the client with 400.
    """
    if active_config() is None or input_ids is None or manager.mm_processor is not None:
        return
    if not input_ids:
        raise ValueError("The prompt has no tokens; give at least one.")
    vocab_size = manager.model_config.vocab_size
    for token in (min(input_ids), max(input_ids)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{token} in the prompt is no token; give numbers from 0 to {vocab_size - 1}.")
