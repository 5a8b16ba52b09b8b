"""What the command line and the environment accept, and the one sentence for what they do not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from server import environment
from sglang.srt.server_args import ServerArgs

from sgl_vtensor.config import VTensorConfig
from sgl_vtensor.core.layout import PAGE_TOKENS_CHOICES
from sgl_vtensor.errors import ConfigError
from sgl_vtensor.srt import flags
from tests.bad_values import bad_values

pytestmark = pytest.mark.server

OURS = ("--enable-vtensor", "--vtensor-page-tokens", "--vtensor-kernel", "--vtensor-memory-limit", "--vtensor-debug")

Resolve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def resolve(tiny_llama: Path) -> Iterator[Resolve]:
    """Resolve a command line as ``launch_server`` does, without starting anything."""
    program = Path(__file__).with_name("resolve.py")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as process:
        assert process.stdin and process.stdout

        def run(*argv: str, env: dict[str, str] | None = None, model: Path = tiny_llama) -> dict[str, Any]:
            line = json.dumps({"argv": [f"--model-path={model}", "--device=cpu", *argv], "env": env or {}})
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield run
        process.stdin.close()


def check_refused(result: dict[str, Any], *words: str, error: str = "ConfigError") -> None:
    assert result.get("error") == error, result
    message = result["message"]
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.usefixtures("resolve")  # it imports SGLang meanwhile
def test_flags_are_in_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--help"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in OURS)
    assert "{auto,triton,fa3,torch}" in done.stdout


def test_off_changes_nothing(resolve: Resolve) -> None:
    result = resolve()
    assert result["config"] is None
    assert result["page_size"] == 1
    assert result["attention_backend"] == "torch_native"
    assert result["radix_cache_backend"] is None


def test_flags_reach_the_config(resolve: Resolve) -> None:
    result = resolve(
        "--enable-vtensor",
        "--vtensor-page-tokens=16",
        "--vtensor-kernel=torch",
        "--vtensor-num-rows=99",
        "--vtensor-memory-limit=60%",
        "--vtensor-reserve=8MiB",
        "--vtensor-cache-seconds=5",
        "--vtensor-debug",
    )
    assert result["config"] == {
        "page_tokens": 16,
        "kernel": "torch",
        "num_rows": 99,
        "idle_seconds": 10.0,
        "memory_limit": "60%",
        "reserve": "8MiB",
        "cache_seconds": 5.0,
        "cache_keep": "0%",
        "unmap_rows": False,
        "trace": None,
        "debug": True,
    }
    assert (result["page_size"], result["attention_backend"], result["radix_cache_backend"]) == (
        16,
        "vtensor",
        "vtensor",
    )


def test_page_size_is_chosen(resolve: Resolve) -> None:
    # 512 bytes a token and granules of 4096 bytes: the smallest choice is whole granules already.
    assert resolve("--enable-vtensor")["page_size"] == PAGE_TOKENS_CHOICES[0]


@pytest.mark.parametrize(
    "way",
    [
        {"env": {"SGL_VTENSOR": "1"}},
        {"flags": ["--attention-backend=vtensor"]},
        {"flags": ["--prefill-attention-backend=vtensor", "--decode-attention-backend=vtensor"]},
    ],
    ids=["variable", "attention-backend", "phase-backends"],
)
def test_other_ways_to_switch_on(resolve: Resolve, way: dict[str, Any]) -> None:
    result = resolve(*way.get("flags", []), "--vtensor-page-tokens=32", env=way.get("env"))
    assert result.get("page_size") == 32, result
    assert result["config"]["page_tokens"] == 32


def test_another_backend_runs_on_our_pool(resolve: Resolve) -> None:
    result = resolve("--enable-vtensor", "--attention-backend=torch_native")
    assert (result["attention_backend"], result["radix_cache_backend"]) == ("torch_native", "vtensor")


def test_equal_page_size_is_accepted(resolve: Resolve) -> None:
    assert resolve("--enable-vtensor", "--vtensor-page-tokens=16", "--page-size=16")["page_size"] == 16


@pytest.mark.parametrize("flag", ["--vtensor-page-tokens=16", "--vtensor-kernel=torch", "--vtensor-debug"])
def test_flags_without_the_switch(resolve: Resolve, flag: str) -> None:
    check_refused(resolve(flag), flag.split("=")[0], "--enable-vtensor")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--vtensor-page-tokens=0"], ["page_tokens is 0", "between 1 and"]),
        (["--vtensor-page-tokens=-1"], ["page_tokens is -1", "between 1 and"]),
        (["--vtensor-page-tokens=5000"], ["page_tokens is 5000", "between 1 and"]),
        (["--vtensor-memory-limit=12"], ["--vtensor-memory-limit='12'", "24GiB"]),
        (["--vtensor-memory-limit=101%"], ["--vtensor-memory-limit='101%'", "at most 100%"]),
        (["--vtensor-reserve=lots"], ["--vtensor-reserve='lots'", "512MiB"]),
        (["--vtensor-cache-seconds=-1"], ["cache_seconds is -1", "0 for never"]),
        (["--vtensor-num-rows=1"], ["num_rows is 1", "between 2 and 65536"]),
        (["--page-size=8", "--vtensor-page-tokens=16"], ["--page-size 8", "16 tokens", "--vtensor-page-tokens 8"]),
        (["--vtensor-page-tokens=16", "--chunked-prefill-size=40"], ["--chunked-prefill-size 40", "16 tokens"]),
        (["--attention-backend=vtensor", "--decode-attention-backend=torch_native"], ["--attention-backend"]),
        (["--prefill-attention-backend=vtensor", "--decode-attention-backend=torch_native"], ["--attention-backend"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_wrong_values(resolve: Resolve, argv: list[str], words: list[str]) -> None:
    check_refused(resolve("--enable-vtensor", *argv), *words)


@pytest.mark.parametrize(
    ("flag", "word"), [("--vtensor-page-tokens=abc", "invalid int"), ("--vtensor-kernel=foo", "invalid choice: 'foo'")]
)
def test_unreadable_values(resolve: Resolve, flag: str, word: str) -> None:
    check_refused(resolve("--enable-vtensor", flag), flag.split("=")[0], word, error="usage")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SGL_VTENSOR_PAGE_TOKNES": "16"}, ["SGL_VTENSOR_PAGE_TOKNES", "SGL_VTENSOR_PAGE_TOKENS"]),
        ({"SGL_VTENSOR_PAGE_TOKENS": "many"}, ["SGL_VTENSOR_PAGE_TOKENS='many'", "whole number"]),
        ({"SGL_VTENSOR_KERNEL": "foo"}, ["kernel", "'foo'", "torch"]),
        ({"SGL_VTENSOR": "maybe"}, ["SGL_VTENSOR='maybe'", "1 or 0"]),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_wrong_variables(resolve: Resolve, env: dict[str, str], words: list[str]) -> None:
    check_refused(resolve(env={"SGL_VTENSOR": "1"} | env), *words)


@pytest.mark.parametrize("name", bad_values())
def test_no_flag_takes_a_bad_value(resolve: Resolve, name: str) -> None:
    """Missing, unreadable, negative, huge; by argparse or by us, in one line that names the flag or its setting."""
    flag = f"--vtensor-{name.replace('_', '-')}"
    bad = bad_values()[name]
    told = ["--enable-vtensor", f"{flag}s=1"], *(["--enable-vtensor", f"{flag}={text}"] for text in bad)
    is_switch = {field.name: field.type == "bool" for field in dataclasses.fields(VTensorConfig)}[name]
    cases = told if is_switch else [*told, ["--enable-vtensor", flag]]
    for argv in cases:
        result = resolve(*argv)
        assert result.get("error") in ("usage", "ConfigError"), (argv, result)
        said = result["message"]
        assert flag in said or f"{name} is " in said, said
        assert "\n" not in said and "Traceback" not in said


def test_flags_win_over_variables(resolve: Resolve) -> None:
    env = {"SGL_VTENSOR_PAGE_TOKENS": "64", "SGL_VTENSOR_NUM_ROWS": "77"}
    config = resolve("--enable-vtensor", "--vtensor-page-tokens=16", env=env)["config"]
    assert (config["page_tokens"], config["num_rows"]) == (16, 77)


# Refusals. A few through SGLang's whole resolution, all of them on the record alone.


@pytest.mark.parametrize(
    "argv",
    [
        ["--enable-hierarchical-cache"],
        ["--enable-lmcache"],
        ["--enable-memory-saver"],
        ["--disaggregation-mode=prefill"],
        ["--pp-size=2"],
        ["--speculative-algorithm=NGRAM"],
        ["--enable-two-batch-overlap"],
        ["--enable-streaming-session"],
        ["--radix-cache-backend=other"],
    ],
    ids=lambda argv: argv[0],
)
def test_refused_flags(resolve: Resolve, argv: list[str]) -> None:
    check_refused(resolve("--enable-vtensor", *argv), argv[0].split("=")[0])


def _accepted() -> SimpleNamespace:
    return SimpleNamespace(kv_cache_dtype="auto", **{field: fine[0] for field, fine, _, _ in flags._REFUSED})


def test_nothing_is_refused_by_default() -> None:
    flags._refuse_flags(_accepted())


@pytest.mark.parametrize(("field", "flag"), [(field, flag) for field, _, flag, _ in flags._REFUSED])
def test_each_refusal_names_its_flag_and_a_way_out(field: str, flag: str) -> None:
    assert field in ServerArgs.__struct_fields__, "SGLang has no such setting: the refusal would never apply"
    view = _accepted()
    setattr(view, field, "something" if getattr(view, field) in (None, "null") else 2)
    with pytest.raises(ConfigError) as refusal:
        flags._refuse_flags(view)
    assert flag in str(refusal.value)
    assert ";" in str(refusal.value)


@pytest.mark.parametrize("dtype", ["mxfp8", "nvfp4", "fp4_mx_block16"])
def test_refused_kv_dtypes(dtype: str) -> None:
    view = _accepted()
    view.kv_cache_dtype = dtype
    with pytest.raises(ConfigError, match=rf"--kv-cache-dtype {dtype} .*; use auto, "):
        flags._refuse_flags(view)


@pytest.mark.parametrize("variable", ["SGLANG_USE_HND_KVCACHE", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"])
def test_refused_variables(resolve: Resolve, variable: str) -> None:
    check_refused(resolve("--enable-vtensor", env={variable: "1"}), variable, "unset")


_LLAMA_LIKE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "latent": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
        },
        "latent attention",
    ),
    "window": (
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "head_dim": 16,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "sliding-window",
    ),
    "state-space": (
        {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
        },
        "state-space",
    ),
}


@pytest.mark.parametrize("name", _MODELS)
def test_refused_models(resolve: Resolve, name: str, tmp_path: Path) -> None:
    config, word = _MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA_LIKE | config))
    check_refused(resolve("--enable-vtensor", model=tmp_path), str(tmp_path), word)
