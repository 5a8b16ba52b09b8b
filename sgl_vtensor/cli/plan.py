"""``sgl-vtensor plan MODEL``: what a model's KV cache looks like in pages and rows, before a server is started."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from sgl_vtensor.config import Size, format_bytes
from sgl_vtensor.core.layout import (
    CUDA_GRANULE_BYTES,
    CUDA_MIN_PAGE_TOKENS,
    PAGE_TOKENS_CHOICES,
    KVLayout,
    plan_layout,
)
from sgl_vtensor.core.rows import WINDOW_BYTES_MAX
from sgl_vtensor.errors import ConfigError

GIB = 1 << 30
DEFAULT_BYTES = 40 * GIB
GPU_SHARE = 0.85
"""Of a GPU, for weights and KV; SGLang chooses ``--mem-fraction-static`` between 0.8 and 0.9, by the GPU's size."""
NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""Of a model of Hugging Face's hub."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
MAPPING_BYTES = 550
"""Host memory that one mapping takes, measured with 126 000 of them."""
MAP_MICROSECONDS = 31
"""One mapping with access on an H100, whatever its size (design notes)."""


@dataclass(frozen=True)
class Geometry:
    """What of a model decides about its KV cache, for one rank."""

    layers: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    context_tokens: int


def config_file(model: str) -> Path:
    """``config.json`` of a folder, the file itself, or the one in Hugging Face's cache. It may be missing."""
    path = Path(model)
    if path.is_dir():
        return path / "config.json"
    if not path.exists() and NAME.fullmatch(model):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        return Path(cached) if isinstance(cached, str) else path
    return path


def read_geometry(model: str, *, tp: int, kv_dtype: str, context_tokens: int | None) -> Geometry:
    """Read a model's ``config.json``.

    Raises:
        ConfigError: it cannot be read, or the model is not of a kind that vTensor memory holds.
    """
    path = config_file(model)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist, and no model of that name was downloaded; give a model folder or its config.json "
            f"(hf download {model} config.json)"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a model's config.json ({error})") from error
    config = config.get("text_config", config)
    if "kv_lora_rank" in config:
        raise ConfigError(f"{path} has multi-head latent attention, which vTensor memory does not hold yet")
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error.args[0]!r}; is it a language model's config.json?") from error
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if tp < 1 or (kv_heads % tp and tp % kv_heads):
        raise ConfigError(
            f"{kv_heads} KV heads cannot be divided among --tp {tp} ranks; choose a divisor or a multiple"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") if kv_dtype == "auto" else kv_dtype
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"--kv-dtype {dtype} is not known; choose one of auto, {', '.join(ITEM_BYTES)}")
    context = context_tokens or int(config.get("max_position_embeddings") or 32768)
    return Geometry(layers, max(1, kv_heads // tp), head_dim, ITEM_BYTES[dtype], context)


@dataclass(frozen=True)
class Budget:
    """Memory for KV on one GPU, and in words where the figure is from."""

    num_bytes: int
    source: str


def this_gpu() -> tuple[str, int] | None:
    """Name and bytes of the GPU that a server would take first; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory


def budget_for(model: str, memory: Size | None, *, tp: int) -> Budget:
    """What there is for KV: as asked, or else on the GPU that is here, less the weights beside the model's config.

    Raises:
        ConfigError: a share is asked for and there is no GPU, or nothing is left beside the weights.
    """
    if memory is not None and not memory.is_share:
        return Budget(int(memory.amount), f"{memory} for KV, as asked.")
    gpu = this_gpu()
    if gpu is None:
        if memory is not None:
            raise ConfigError(f"--memory {memory} is a share of a GPU, and none is here; give an amount, like 40GiB")
        return Budget(
            DEFAULT_BYTES,
            f"No GPU is here, so this assumes {format_bytes(DEFAULT_BYTES)} for KV; --memory says otherwise.",
        )
    name, gpu_bytes = gpu
    here = f"{name}, {format_bytes(gpu_bytes)}"
    if memory is not None:
        num_bytes = memory.bytes_of(gpu_bytes)
        return Budget(num_bytes, f"{memory} of the GPU here ({here}): {format_bytes(num_bytes)} for KV.")
    weights = sum(file.stat().st_size for file in config_file(model).parent.glob("model*.safetensors")) // tp
    num_bytes = int(GPU_SHARE * gpu_bytes) - weights
    if num_bytes <= 0:
        raise ConfigError(
            f"{format_bytes(weights)} of weights leave nothing for KV on the GPU here ({here}); raise --tp, or plan "
            "for another GPU with --memory"
        )
    less = f"less {format_bytes(weights)} of weights" if weights else "weights not counted (none in the folder)"
    return Budget(
        num_bytes,
        f"The GPU here ({here}): {GPU_SHARE:.0%} of it, {less}, is {format_bytes(num_bytes)} for KV. A server takes "
        "what its --mem-fraction-static leaves; --memory plans for another amount.",
    )


def layout_for(geometry: Geometry, page_tokens: int | None) -> KVLayout:
    """The layout on CUDA; without ``page_tokens``, the one that a server would choose."""
    return plan_layout(
        num_layers=geometry.layers,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        v_head_dim=geometry.head_dim,
        itemsize=geometry.item_bytes,
        granule_bytes=CUDA_GRANULE_BYTES,
        page_tokens=page_tokens,
        min_page_tokens=CUDA_MIN_PAGE_TOKENS,
    )


def figures(layout: KVLayout, geometry: Geometry, *, requests: int, memory_bytes: int) -> dict[str, Any]:
    """What one page size means for this model; ``memory_bytes`` is for KV on one GPU."""
    num_pages = memory_bytes // layout.page_bytes
    row_pages = layout.num_pages(geometry.context_tokens)
    row_bytes = row_pages * layout.page_bytes
    num_rows = min(2 * requests + 1, WINDOW_BYTES_MAX // row_bytes)
    return {
        "page_tokens": layout.page_tokens,
        "page_bytes": layout.page_bytes,
        "token_bytes": layout.token_bytes,
        "token_stride_bytes": layout.token_stride_bytes,
        "waste": round(layout.waste, 4),
        "maps_per_1k_tokens": round(2 * 1000 / layout.page_tokens, 1),
        "pages_per_gib": round(GIB / layout.page_bytes, 1),
        "num_pages": num_pages,
        "num_tokens": num_pages * layout.page_tokens,
        "num_rows": num_rows,
        "row_bytes": row_bytes,
        "rows_bytes": num_rows * row_bytes,
        "homes_bytes": (num_pages + 1) * layout.page_bytes,
        "table_bytes": 4 * (num_rows + requests) * row_pages,
        "most_mappings": num_pages + 1 + num_rows * row_pages,
        "fits": num_rows >= requests + 1,
    }


def run(
    model: str,
    *,
    tp: int,
    kv_dtype: str,
    context_tokens: int | None,
    requests: int,
    memory: Size | None,
    as_json: bool,
) -> int:
    """Print the choice of page sizes and what follows from the one that a server would take."""
    geometry = read_geometry(model, tp=tp, kv_dtype=kv_dtype, context_tokens=context_tokens)
    budget = budget_for(model, memory, tp=tp)
    chosen = layout_for(geometry, None)
    choices = [
        figures(layout_for(geometry, tokens), geometry, requests=requests, memory_bytes=budget.num_bytes)
        for tokens in PAGE_TOKENS_CHOICES
    ]
    taken = next(choice for choice in choices if choice["page_tokens"] == chosen.page_tokens)
    if not taken["num_pages"]:
        page = format_bytes(taken["page_bytes"])
        raise ConfigError(f"{format_bytes(budget.num_bytes)} for KV hold no page, which is {page}; give more --memory")
    if as_json:
        print(
            json.dumps({"chosen": chosen.page_tokens, "memory_bytes": budget.num_bytes, "choices": choices}, indent=1)
        )
        return 0
    console = Console(highlight=False)
    console.print(
        f"One token{f', on each of {tp} ranks' if tp > 1 else ''}: K and V of {geometry.layers} layers x "
        f"{geometry.kv_heads} KV heads x {geometry.head_dim} x {geometry.item_bytes} B = {taken['token_bytes']:,} B."
    )
    console.print(budget.source)
    table = Table(
        Column("page", no_wrap=True),
        "size",
        "padding",
        "maps/1k tokens",
        "pages/GiB",
        f"tokens in {format_bytes(budget.num_bytes)}",
    )
    for choice in choices:
        mark = " *" if choice is taken else ""
        table.add_row(
            f"{choice['page_tokens']} tokens{mark}",
            format_bytes(choice["page_bytes"]),
            f"{100 * choice['waste']:.1f}%",
            f"{choice['maps_per_1k_tokens']:g}: {choice['maps_per_1k_tokens'] * MAP_MICROSECONDS / 1000:.1f} ms",
            f"{choice['pages_per_gib']:g}",
            f"{choice['num_tokens']:,}",
        )
    console.print(table)
    console.print(
        f"* what a server takes: the smallest page from {CUDA_MIN_PAGE_TOKENS} tokens that pads by at most a tenth, or "
        "else the one that pads least. "
        "Small pages share finely; 1 000 new tokens cost the maps above, whatever a page's size in bytes. "
        "--vtensor-page-tokens overrides."
    )
    console.print(
        f"{requests} requests of up to {geometry.context_tokens:,} tokens: {taken['num_rows'] - 1} rows of "
        f"{format_bytes(taken['row_bytes'])}, {taken['rows_bytes'] / (1 << 40):.2f} TiB of addresses (free of cost; at "
        f"most {WINDOW_BYTES_MAX >> 40}), {format_bytes(taken['table_bytes'])} of tables. At most "
        f"{taken['most_mappings']:,} mappings, with all pages at home and all rows full: "
        f"{format_bytes(MAPPING_BYTES * taken['most_mappings'])} of host memory."
    )
    if not taken["fits"]:
        console.print(
            f"That is more than the address space holds: lower --max-running-requests to {taken['num_rows'] - 1}, or "
            "--context-length. A server would refuse to start."
        )
        return 1
    return 0
