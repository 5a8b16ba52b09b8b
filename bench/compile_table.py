"""Do our kernels compile for every GPU that they have a configuration for, how long does it take, and do they fit?

    python bench/compile_table.py [--capability 80 90 100] [--model llama-8b ...] [--markdown]

Needs no GPU: times are the CPU's. Compiles into an empty cache, unless --cached. Ends with status 1 where a kernel does
not compile or wants more shared memory than there is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from compile_only import PROCESSORS, SHARED_BYTES, Compiled, compile_only
from vtensor_kernels import DecodeWorkspace, decode_attention, prefill_attention

REGISTERS = 65536
"""Of a processor, on all of these."""
SHARED_OF_PROCESSOR = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
RESERVED_BYTES = 1 << 10
"""What CUDA takes of it for each program."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What of a model is compiled for."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of every call."""
    sinks: bool = False
    causal: bool = True

    def all_options(self) -> dict[str, Any]:
        """Of a call of ``prefill_attention``, and of ``decode_attention`` where the model has that."""
        causal = {} if self.causal else {"causal": False}
        sinks = {"sinks": on_meta(self.q_heads, dtype=torch.bfloat16)} if self.sinks else {}
        return {"sm_scale": self.head_dim**-0.5, **causal, **sinks, **self.options}


MODELS = {
    "llama-8b": Model(32, 8, 128),
    "llama-8b fp16": Model(32, 8, 128, torch.float16),
    "llama-8b e4m3": Model(32, 8, 128, kv_dtype=torch.float8_e4m3fn),
    "llama-8b e5m2": Model(32, 8, 128, kv_dtype=torch.float8_e5m2),
    "llama-70b": Model(64, 8, 128),
    "llama-70b, 8 GPUs": Model(8, 1, 128),
    "llama-1b": Model(32, 8, 64),
    "phi-2": Model(32, 32, 80),
    "phi-3": Model(32, 32, 96),
    "gemma-2-9b": Model(16, 8, 256, options={"logit_cap": 50.0, "sliding_window": 4095}),
    "gemma-2-9b e5m2": Model(
        16, 8, 256, kv_dtype=torch.float8_e5m2, options={"logit_cap": 50.0, "sliding_window": 4095}
    ),
    "gemma-7b": Model(16, 16, 256),
    "gpt-oss-20b": Model(64, 8, 64, options={"sliding_window": 127}, sinks=True),
    "encoder": Model(12, 12, 64, causal=False),
    "falcon-7b": Model(71, 1, 64),
    "float32, 64": Model(8, 2, 64, torch.float32),
    "float32, 128": Model(32, 8, 128, torch.float32),
    "float32, 256": Model(16, 8, 256, torch.float32),
}
LAYERS = 32
MAX_TOKENS = 131072


def on_meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def views(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one of the layers, token-major; a row is longer than 2**31 elements, as a server's is."""
    width = model.kv_heads * model.head_dim
    token = LAYERS * 2 * width
    shape, strides = (64, MAX_TOKENS, model.kv_heads, model.head_dim), (MAX_TOKENS * token, token, model.head_dim, 1)
    k, v = (torch.empty_strided(shape, strides, dtype=model.kv_dtype or model.dtype, device="meta") for _ in "kv")
    return k, v


def prefill(model: Model, batch: int, new: int, max_kv_len: int | None = None) -> None:
    """``batch`` requests with ``new`` tokens each. Keys of few tiles are split, and of long rows."""
    q = on_meta(batch * new, model.q_heads, model.head_dim, dtype=model.dtype)
    prefill_attention(
        q, *views(model), torch.empty_like(q), on_meta(batch), on_meta(batch + 1), on_meta(batch), new,
        max_kv_len=max_kv_len, **model.all_options(),
    )  # fmt: skip


def decode(model: Model, batch: int) -> None:
    q = on_meta(batch, model.q_heads, model.head_dim, dtype=model.dtype)
    workspace = DecodeWorkspace(batch, model.q_heads, model.head_dim, "meta", kv_heads=model.kv_heads)
    decode_attention(
        q, *views(model), torch.empty_like(q), on_meta(batch), on_meta(batch), workspace=workspace,
        **model.all_options(),
    )  # fmt: skip


def launches(model: Model, capability: int) -> Iterator[tuple[str, Any]]:
    """A call for each large variant that one server has: many or few queries a kv head, keys split or not."""
    full = PROCESSORS[capability] // model.kv_heads + 1  # requests that fill the device, at a tile a kv head
    if model.causal:
        yield "decode", lambda: decode(model, 8)
    yield "prefill", lambda: prefill(model, full, 512, 1024)
    yield "prefill, split", lambda: prefill(model, 1, 128)
    if model.q_heads // model.kv_heads <= 64:
        yield "prefill, few new", lambda: prefill(model, full, 1, 1024)
        yield "prefill, few new, split", lambda: prefill(model, 1, 1)


def resident(compiled: Compiled, capability: int) -> int:
    """Programs that a processor holds at once; 0 where not even one fits."""
    if compiled.shared_bytes > SHARED_BYTES[capability]:
        return 0
    by_registers = REGISTERS // (-(-compiled.registers // 8) * 8 * 32 * compiled.num_warps)
    return min(by_registers, SHARED_OF_PROCESSOR[capability] // (compiled.shared_bytes + RESERVED_BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_BYTES)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--launch", nargs="+", help="these launches only, as they are called in the table")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--cached", action="store_true", help="take from Triton's cache what is there")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, as the interpreter compiles nothing")

    print(f"Triton {triton.__version__}, {os.cpu_count()} CPU cores\n")
    columns = ("sm", "model", "launch", "kernel", "CPU s", "registers", "stack B", "shared KiB", "programs")
    line = "| " + " | ".join(f"{{:{width}}}" for width in (3, 17, 23, 22, 5, 9, 7, 10, 8)) + " |"
    if not options.markdown:
        line = line.replace("|", "").strip()
    print(line.format(*columns))
    if options.markdown:
        print("|" + " --- |" * len(columns))
    failed = 0
    empty = contextlib.nullcontext() if options.cached else tempfile.TemporaryDirectory()
    with empty as folder:
        if folder is not None:
            triton.knobs.cache.dir = folder
        for capability in options.capability:
            for name in options.model:
                with compile_only(capability) as compiled:
                    seen = 0
                    for launch, call in launches(MODELS[name], capability):
                        if options.launch and launch not in options.launch:
                            continue
                        error = ""
                        try:
                            call()
                        except ValueError as refusal:  # of the kernels: what this GPU cannot do
                            print(line.format(capability, name, launch, f"refused: {refusal}", *[""] * 5))
                        except Exception as failure:  # noqa: BLE001  (the compiler's own have no common type)
                            failed += 1
                            error = f"{type(failure).__name__}: {str(failure)[:200]}"
                        for one in compiled[seen:]:
                            print(
                                line.format(
                                    capability, name, launch, one.kernel.strip("_").removesuffix("_kernel"),
                                    f"{one.cpu_seconds:.1f}", one.registers, one.stack_bytes,
                                    f"{one.shared_bytes / 1024:.0f}", resident(one, capability),
                                ),
                                flush=True,
                            )  # fmt: skip
                        if error:
                            print(line.format(capability, name, launch, error, *[""] * 5), flush=True)
                        seen = len(compiled)
    if failed:
        print(f"\n{failed} launches would fail")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
