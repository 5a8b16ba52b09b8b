"""SGLang without its HTTP server: ``sglang.Engine`` takes no flags of ours, but a backend's name or a variable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Expected, StockAnswers
from server import environment

pytestmark = pytest.mark.server

PROGRAM = """
import json, sys
import sglang

def main():
    options, prompt, tokens = json.loads(sys.argv[1])
    engine = sglang.Engine(
        dtype="float32", device="cpu", sampling_backend="pytorch", grammar_backend="none", skip_server_warmup=True,
        max_total_tokens=2048, max_running_requests=4, log_level="warning", **options,
    )
    reply = engine.generate(
        input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    )
    state = engine.get_server_info()["internal_states"][0]
    engine.shutdown()
    print(json.dumps({"ids": reply["output_ids"], "vtensor": state.get("vtensor")}))

if __name__ == "__main__":
    main()
"""


WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "backend": ({"attention_backend": "vtensor"}, {"SGL_VTENSOR_PAGE_TOKENS": "32"}),
    "variable": ({}, {"SGL_VTENSOR": "1", "SGL_VTENSOR_PAGE_TOKENS": "32"}),
}
Engines = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def expected(stock: StockAnswers) -> Expected:
    return stock.mixed[15]


@pytest.fixture(scope="module")
def engines(tiny_llama: Path, expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Side by side, since each takes one core most of its time."""
    program = tmp_path_factory.mktemp("engine") / "program.py"
    program.write_text(PROGRAM)

    def run(way: str) -> subprocess.CompletedProcess[str]:
        options, env = WAYS[way]
        arguments = json.dumps([options | {"model_path": str(tiny_llama)}, expected.prompt, expected.tokens])
        return subprocess.run(
            [sys.executable, str(program), arguments],
            env=environment(env),
            capture_output=True,
            text=True,
            timeout=500,
        )

    with ThreadPoolExecutor(len(WAYS)) as executor:
        yield {way: executor.submit(run, way) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_engine(engines: Engines, expected: Expected, way: str) -> None:
    done = engines[way].result()
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert tuple(result["ids"]) == expected.output_ids
    assert result["vtensor"]["page_tokens"] == 32
    assert result["vtensor"]["pages_in_use"] > 0
