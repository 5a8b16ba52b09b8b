"""SGLang without its HTTP server: ``sglang.Engine`` takes no flags of ours, but a backend's name or a variable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import StockAnswers
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


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({"attention_backend": "vtensor"}, {"SGL_VTENSOR_PAGE_TOKENS": "32"}),
        ({}, {"SGL_VTENSOR": "1", "SGL_VTENSOR_PAGE_TOKENS": "32"}),
    ],
    ids=["backend", "variable"],
)
def test_engine(
    tiny_llama: Path, stock: StockAnswers, tmp_path: Path, options: dict[str, Any], env: dict[str, str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    expected = stock.mixed[15]
    arguments = json.dumps([options | {"model_path": str(tiny_llama)}, expected.prompt, expected.tokens])
    done = subprocess.run(
        [sys.executable, str(program), arguments],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert tuple(result["ids"]) == expected.output_ids
    assert result["vtensor"]["page_tokens"] == 32
    assert result["vtensor"]["pages_in_use"] > 0
