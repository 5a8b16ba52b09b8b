"""Requests that would end SGLang's scheduler are refused while they are one client's affair."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from sglang.srt.managers.io_struct import GenerateReqInput

from sgl_vtensor.srt.flags import active_config


def check_prompt(manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """Hook, in the tokenizer's process, before SGLang looks at a request's lengths.

    Raises:
        ValueError: an embedding server is asked to generate, or the prompt is empty or has a number that is no token.
            SGLang answers the client with 400.
    """
    if active_config() is None:
        return
    if isinstance(obj, GenerateReqInput) and not manager.is_generation:
        raise ValueError("This server embeds and does not generate; ask /encode, or start it without --is-embedding.")
    if input_ids is None or manager.mm_processor is not None:
        return
    if not input_ids:
        raise ValueError("The prompt has no tokens; give at least one.")
    vocab_size = manager.model_config.vocab_size
    if _all_below(vocab_size, input_ids):
        return
    wrong = next(token for token in input_ids if not (isinstance(token, int) and 0 <= token < vocab_size))
    raise ValueError(f"{wrong} in the prompt is no token; give numbers from 0 to {vocab_size - 1}.")


def _all_below(bound: int, numbers: Sequence[int]) -> bool:
    """Whether all are from 0 to below ``bound``: of 64k numbers in half a millisecond, a fifth of min and max.

    One thread does it for all requests, and all of them wait for it.
    """
    try:
        return int(np.frombuffer(array("I", numbers), dtype=np.uint32).max()) < bound
    except (OverflowError, TypeError):  # negative or beyond 32 bits; no whole number
        return False
