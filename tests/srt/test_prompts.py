"""What no scheduler should see: the check of requests on its own. On a server: ``test_crash.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sgl_vtensor.config import VTensorConfig
from sgl_vtensor.srt import prompts

MANAGER = SimpleNamespace(mm_processor=None, is_generation=True, model_config=SimpleNamespace(vocab_size=100))


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "active_config", VTensorConfig)


@pytest.mark.parametrize("input_ids", [[0], [99], [0, 99, 5], None])
def test_prompts_of_tokens_pass(input_ids: list[int] | None) -> None:
    prompts.check_prompt(MANAGER, None, input_ids)


@pytest.mark.parametrize(
    ("input_ids", "said"),
    [
        ([], "no tokens; give"),
        ([5, -1, 5], "-1 in the prompt"),
        ([5, 100], "100 in the prompt is no token; give numbers from 0 to 99"),
        ([5, 2**32 + 5], "4294967301 in"),
        ([5, 10**30, 100], "1000000000000000000000000000000 in"),
        ([5, 5.0], "5.0 in the prompt"),
        ([5, "5"], "5 in the prompt"),
    ],
)
def test_others_do_not(input_ids: list[int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=said):
        prompts.check_prompt(MANAGER, None, input_ids)
    images: Any = SimpleNamespace(**vars(MANAGER) | {"mm_processor": "its placeholders are no tokens"})
    prompts.check_prompt(images, None, input_ids)
    monkeypatch.setattr(prompts, "active_config", lambda: None)
    prompts.check_prompt(MANAGER, None, input_ids)


def test_a_server_that_embeds_is_not_asked_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    embeds: Any = SimpleNamespace(**vars(MANAGER) | {"is_generation": False})
    with pytest.raises(ValueError, match="ask /encode"):
        prompts.check_prompt(embeds, GenerateReqInput(input_ids=[5]), [5])
    prompts.check_prompt(embeds, EmbeddingReqInput(input_ids=[5]), [5])
    prompts.check_prompt(MANAGER, GenerateReqInput(input_ids=[5]), [5])
    monkeypatch.setattr(prompts, "active_config", lambda: None)
    prompts.check_prompt(embeds, GenerateReqInput(input_ids=[5]), [5])
