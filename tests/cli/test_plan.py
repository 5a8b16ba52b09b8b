"""``sgl-vtensor plan``: figures that were worked out by hand, and a clear word for what cannot be planned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sgl_vtensor.cli import plan as command
from sgl_vtensor.cli.main import main
from sgl_vtensor.cli.plan import MAPPING_BYTES
from sgl_vtensor.config import format_bytes

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192}
SCALING = Path(__file__).parents[2] / "docs/scaling.md"
SMOLLM2 = LLAMA_8B | {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "this_gpu", lambda: None)


def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], *flags: str) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    choice: dict[str, Any] = next(one for one in found["choices"] if one["page_tokens"] == found["chosen"])
    return choice


def test_a_model_that_fits_granules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """32 layers x 8 heads x 128 x 2 bytes, K and V: 128 KiB a token, 16 tokens in 2 MiB."""
    found = plan(tmp_path, capsys, LLAMA_8B, "--max-running-requests=256", "--memory=40GiB")
    assert (found["token_stride_bytes"], found["page_tokens"], found["page_bytes"]) == (131072, 128, 16 << 20)
    assert (found["waste"], found["num_pages"], found["num_tokens"]) == (0, 2560, 327680)
    assert (found["num_rows"], found["row_bytes"]) == (513, 16 << 30)
    assert found["maps_per_1k_tokens"] == 15.6


def test_a_model_that_needs_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """23 040 bytes a token: 64 of them fill 1.4 of 2 MiB, 256 of them 5.6 of 6."""
    found = plan(tmp_path, capsys, SMOLLM2)
    assert (found["token_bytes"], found["page_tokens"], found["page_bytes"]) == (23040, 256, 6 << 20)
    assert found["waste"] == 0.0625


@pytest.mark.parametrize(
    ("flags", "stride"), [(["--tp=2"], 65536), (["--kv-dtype=fp8_e4m3"], 65536), (["--tp=16"], 16384)]
)
def test_ranks_and_dtypes_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], stride: int
) -> None:
    assert plan(tmp_path, capsys, LLAMA_8B, *flags)["token_bytes"] == stride


def test_what_a_person_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert main(["plan", str(tmp_path / "config.json"), "--max-running-requests=2000", "--context-length=1000000"]) == 1
    shown = said(capsys)
    assert "= 131,072 B." in shown and "128 tokens *" in shown
    assert "lower --max-running-requests to 837" in shown


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_without_a_gpu_the_default_says_that_it_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path, capsys, LLAMA_8B)["num_pages"] == 40 * 64
    assert main(["plan", str(tmp_path)]) == 0
    assert "No GPU is here, so this assumes 40.00 GiB for KV" in said(capsys)
    assert main(["plan", str(tmp_path), "--memory=1GiB"]) == 0
    shown = said(capsys)
    assert "1GiB for KV, as asked." in shown and "No GPU" not in shown


def test_the_gpu_that_is_here_is_named_and_its_memory_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 GiB: 85% is 68; 16 GiB of weights on two ranks leave 60, which are 3840 pages of 16 MiB of one rank."""
    monkeypatch.setattr(command, "this_gpu", lambda: ("NVIDIA H100", 80 << 30))
    assert plan(tmp_path, capsys, LLAMA_8B)["num_pages"] == 68 * 64
    for part in (1, 2):
        with (tmp_path / f"model-{part}-of-2.safetensors").open("wb") as file:
            file.truncate(8 << 30)
    assert plan(tmp_path, capsys, LLAMA_8B)["num_pages"] == 52 * 64
    found = plan(tmp_path, capsys, LLAMA_8B, "--tp=2")
    assert found["num_pages"] * found["page_bytes"] == 60 << 30
    assert main(["plan", str(tmp_path / "config.json"), "--tp=2"]) == 0
    assert "The GPU here (NVIDIA H100, 80.00 GiB): 85% of it, less 8.00 GiB of weights, is 60.00 GiB for KV." in said(
        capsys
    )
    assert plan(tmp_path, capsys, LLAMA_8B, "--memory=25%")["num_pages"] == 20 * 64
    monkeypatch.setattr(command, "this_gpu", lambda: ("NVIDIA L4", 18 << 30))
    assert main(["plan", str(tmp_path)]) == 1
    assert "16.00 GiB of weights leave nothing for KV on the GPU here (NVIDIA L4, 18.00 GiB)" in capsys.readouterr().err


def test_a_model_that_was_downloaded_is_found_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA_8B))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "some/model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == 128
    assert main(["plan", "some/other"]) == 1
    assert "hf download some/other config.json" in capsys.readouterr().err


def worked_examples() -> list[list[str]]:
    lines = [line for line in SCALING.read_text().splitlines() if re.match(r"\| \d+B `--", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("cells", worked_examples(), ids=lambda cells: cells[0].replace("`", ""))
def test_docs_scaling_has_what_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: list[str]) -> None:
    model, flags = cells[0].split(" ", 1)
    found = plan(tmp_path, capsys, {"8B": LLAMA_8B, "70B": LLAMA_70B}[model], *flags.strip("`").split())
    counts = [found[name] for name in ("token_stride_bytes", "page_tokens", "num_pages", "num_tokens", "num_rows")]
    assert cells[1:] == [
        *(f"{count:,}" for count in counts),
        format_bytes(found["row_bytes"]),
        f"{found['rows_bytes'] / (1 << 40):.2f} TiB",
        format_bytes(found["table_bytes"]),
        f"{found['most_mappings']:,}",
        format_bytes(MAPPING_BYTES * found["most_mappings"]),
    ]


def test_docs_scaling_has_examples() -> None:
    assert len(worked_examples()) >= 5


@pytest.mark.parametrize(
    ("config", "flags", "reason"),
    [
        (None, [], "does not exist"),
        ({}, [], "lacks 'num_hidden_layers'"),
        (LLAMA_8B | {"kv_lora_rank": 512}, [], "multi-head latent attention"),
        (LLAMA_8B, ["--tp=3"], "cannot be divided among --tp 3"),
        (LLAMA_8B, ["--tp=0"], "cannot be divided among --tp 0"),
        (LLAMA_8B, ["--kv-dtype=int3"], "--kv-dtype int3 is not known"),
        (LLAMA_8B, ["--memory=lots"], "24GiB"),
        (LLAMA_8B, ["--memory=50%"], "none is here"),
        (LLAMA_8B, ["--memory=15MiB"], "hold no page, which is 16.00 MiB"),
        (LLAMA_8B, ["--context-length=0"], "give at least 1"),
    ],
)
def test_what_cannot_be_planned(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any] | None,
    flags: list[str],
    reason: str,
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), *flags]) == 1
    assert reason in capsys.readouterr().err
