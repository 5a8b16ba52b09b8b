"""One server on vTensor memory for all programs that ask one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_vtensor.cli.smollm2 import smollm2
from sgl_vtensor.cli.tiny_model import TinyLlama

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "srt"), str(ROOT / "bench")]
from server import VTENSOR, Imported, SGLangServer  # noqa: E402


@pytest.fixture(scope="package")  # an idle SGLang server polls: it must not go on beside other tests
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    folder = tmp_path_factory.mktemp("examples")
    model = TinyLlama().write(folder / "tiny-llama", tokenizer=smollm2())
    # Of SGLang's grammar backends llguidance is the one that masks logits on a CPU without more to install.
    flags = (*VTENSOR, "--max-total-tokens=8192", "--grammar-backend=llguidance", "--enable-cache-report")
    with SGLangServer(model, Imported(folder / "log"), flags) as server:
        yield server
