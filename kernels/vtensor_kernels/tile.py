"""What the kernels share: reading tokens of a row, one pass of online softmax over them, and launch checks."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

INTERPRETING: bool = triton.knobs.runtime.interpret
"""True when Triton was loaded with TRITON_INTERPRET=1: kernels then run on the CPU, program after program."""

LOG2E = 1.4426950408889634
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Pages:
    """Where the tokens of a row are whose K and V are no contiguous view: in pages, anywhere in ``k`` and ``v``.

    ``k`` and ``v`` are then [1, num_slots, kv_heads, dim], and ``rows`` number the rows of ``table``.
    """

    table: torch.Tensor
    """[num_rows, max_pages] int32: tokens [i * page_tokens, (i + 1) * page_tokens) of row r are in page table[r, i],
    which is k[0, page * page_tokens : (page + 1) * page_tokens]. Entries behind a row's last page are not read."""
    page_tokens: int
    """A power of 2, and a multiple of the kernel's block of keys: 128 serves all of them."""


_DESCRIPTOR_ALIGNMENT = 16  # bytes; what the copy engine asks of base addresses and strides


@triton.jit
def open_row(
    base,
    stride_token,
    length,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """A source for ``load_tokens``: a descriptor that ends at ``length`` exactly, or the bare pointer.

    What lies behind ``length`` may be unmapped: the copy engine fills with zeros there and reads nothing.
    """
    if USE_TMA:
        # A descriptor of no tokens cannot be encoded; with length 0 nothing is loaded through it.
        return tl.make_tensor_descriptor(
            base, shape=[tl.maximum(length, 1), DIM], strides=[stride_token, 1], block_shape=[BLOCK_N, BLOCK_D]
        )
    else:
        return base


@triton.jit
def load_tokens(
    source,
    at,
    start,
    stride_token,
    length,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tokens [start, start + BLOCK_N) as [BLOCK_N, BLOCK_D], zero behind ``length`` and behind DIM.

    The first of them lies ``at`` tokens behind ``source``: at ``start`` in a row, anywhere in a page.
    """
    if USE_TMA:
        return source.load([at, 0])
    else:
        # 64-bit on purpose: a token stride of 64 Ki elements passes 2**31 at token 32 768. The offsets in the block are
        # the same in every turn of a loop.
        in_block = tl.arange(0, BLOCK_N)
        token = start + in_block
        dim = tl.arange(0, BLOCK_D)
        offsets = (in_block.to(tl.int64) * stride_token)[:, None] + dim[None, :]
        pointers = source + tl.cast(at, tl.int64) * stride_token + offsets
        if MASKED and BLOCK_D != DIM:
            return tl.load(pointers, mask=(token < length)[:, None] & (dim < DIM)[None, :], other=0.0)
        elif MASKED:
            return tl.load(pointers, mask=(token < length)[:, None], other=0.0)
        elif BLOCK_D != DIM:
            return tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def attend(
    acc,
    row_max,
    row_sum,
    q,
    k_row,
    v_row,
    pages,
    stride_k_token,
    stride_v_token,
    first,
    last,
    kv_len,
    position,
    scale,
    cap,
    window,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Online softmax over the keys in [first, last), in steps of BLOCK_N.

    row_max and row_sum are in base 2: s = q k^T * scale, scale = sm_scale * k_scale * log2(e).
    With a cap, ``scale`` is sm_scale * k_scale * 2 log2(e) / cap and ``cap`` is cap * log2(e).
    MASKED=False promises that every query sees every key of the range, and that the range ends inside the row.
    ``pages`` is None where the row is contiguous, or points to the row's pages of PAGE tokens.
    """
    # A block's page is looked up a turn before: Triton would count a load that another waits for as a stage of its own,
    # and have one block under way instead of three.
    next_page = 0
    if pages is not None:
        next_page = tl.load(pages + first // PAGE, mask=first < last, other=0)
    for start in range(first, last, BLOCK_N):
        at = start
        if pages is not None:
            at = next_page * PAGE + start % PAGE
            next_start = start + BLOCK_N
            next_page = tl.load(pages + next_start // PAGE, mask=next_start < last, other=0)
        k = load_tokens(k_row, at, start, stride_k_token, kv_len, DIM, BLOCK_N, BLOCK_D, USE_TMA, MASKED)
        s = tl.dot(q, k.to(DOT_DTYPE).T, input_precision="ieee")
        if HAS_CAP:
            # cap * tanh(x / cap), through exp2: tanh(y) = 1 - 2 / (exp(2 y) + 1)
            s = cap - cap * (2.0 / (tl.exp2(s * scale) + 1.0))
            factor = 1.0
        else:
            factor = scale
        if MASKED:
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            visible = key < kv_len
            if CAUSAL:
                visible = key <= position[:, None]
            if HAS_WINDOW:
                visible &= position[:, None] - key <= window
                if not CAUSAL:
                    visible &= key - position[:, None] <= window
            s = tl.where(visible, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
            # Nothing seen yet: a maximum of 0 turns exp2(-inf - max) into 0 where -inf would give NaN.
            new_max_or_0 = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
            new_max_or_0 = new_max
        p = tl.exp2(s * factor - new_max_or_0[:, None])
        rescale = tl.exp2(row_max - new_max_or_0)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        v = load_tokens(v_row, at, start, stride_v_token, kv_len, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA, MASKED)
        acc = tl.dot(p.to(DOT_DTYPE), v.to(DOT_DTYPE), acc * rescale[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def has_gluon() -> bool:
    """Whether this Triton has the Gluon that ``prefill_hopper`` is written in: warp_specialize([(f, args)], ...)."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


@functools.cache
def capability(device: torch.device) -> int:
    """90 for sm_90; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def has_little_shared(capability: int) -> bool:
    """Whether programs must do with 99 KiB of shared memory, as on sm_86, sm_89 and sm_120; sm_80 and its 163 too."""
    return capability < 90 or capability >= 120


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type in which tiles are multiplied: the queries' own, float32 under the interpreter.

    The interpreter multiplies bfloat16 bit patterns as if they were integers.
    """
    if INTERPRETING:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def scales(sm_scale: float, k_scale: float, logit_cap: float) -> tuple[float, float]:
    """``scale`` and ``cap`` as ``attend`` wants them."""
    if logit_cap > 0:
        return sm_scale * k_scale * 2 * LOG2E / logit_cap, logit_cap * LOG2E
    return sm_scale * k_scale * LOG2E, 0.0


def check_layout(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None, sm_scale: float
) -> None:
    """Raise ValueError, with the fix, for what the kernels cannot read."""
    if not capability(q.device) and not INTERPRETING:
        raise ValueError(f"q is on {q.device}: use reference_attention there, or set TRITON_INTERPRET=1 before Triton")
    if q.dim() != 3 or out.dim() != 3 or k.dim() != 4 or v.dim() != 4:
        raise ValueError("q and out must be [tokens, q_heads, dim], k and v [rows, max_tokens, kv_heads, dim]")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {tensor.stride(-1)}: make it contiguous")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move one of them")
    if q.shape[:2] != out.shape[:2] or q.shape[2] != k.shape[3] or out.shape[2] != v.shape[3]:
        raise ValueError(
            f"shapes disagree: q {tuple(q.shape)} and k {tuple(k.shape)} share head_dim, out {tuple(out.shape)} and "
            f"v {tuple(v.shape)} share v_head_dim, q and out share tokens and heads"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have the same rows, tokens and kv_heads")
    if q.shape[1] % k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into groups over {k.shape[2]} kv heads")
    if k.dtype != v.dtype or (k.dtype != q.dtype and k.dtype not in FP8_DTYPES):
        raise ValueError(f"k is {k.dtype}, v {v.dtype}, q {q.dtype}: k and v must have q's dtype or both the same fp8")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype}: convert it to bfloat16, float16 or float32")
    if k.dtype == torch.float8_e4m3fn and 0 < capability(q.device) < 89:
        raise ValueError("this GPU cannot read float8_e4m3fn: store the cache in float8_e5m2 or bfloat16")
    if sm_scale <= 0:
        raise ValueError(f"sm_scale is {sm_scale}: it must be positive")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}: give one logit for each of {q.shape[1]} query heads")


def check_pages(pages: Pages | None, k: torch.Tensor, block_n: int, loads: str) -> None:
    """Raise ValueError, with the fix, for pages that blocks of ``block_n`` keys cannot be read from."""
    if pages is None:
        return
    table, page_tokens = pages.table, pages.page_tokens
    if table.dim() != 2 or table.dtype != torch.int32 or table.stride(1) != 1 or table.device != k.device:
        raise ValueError(
            f"the page table is {table.dtype} {tuple(table.shape)} with strides {table.stride()} on {table.device}: it "
            f"must be [rows, max_pages] int32 on {k.device}, the last dimension contiguous"
        )
    if k.shape[0] != 1:
        raise ValueError(f"k has {k.shape[0]} rows beside pages: give all slots as [1, num_slots, kv_heads, dim]")
    if page_tokens < block_n or page_tokens & (page_tokens - 1):
        raise ValueError(
            f"pages of {page_tokens} tokens do not hold whole blocks of {block_n} keys: use a power of 2, {block_n} or "
            "more"
        )
    if loads == "tma":
        raise ValueError("the copy engine cannot end within a page: use loads='auto'")


def fits_descriptor(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine takes every [row, :, head] of these views: 16-byte base and strides."""
    return all(
        tensor.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0
        and all(stride * tensor.element_size() % _DESCRIPTOR_ALIGNMENT == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


def use_descriptors(loads: str, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Resolve ``loads`` ("auto", "tma" or "pointer") for this device and layout."""
    if loads == "pointer":
        return False
    possible = (INTERPRETING or capability(k.device) >= 90) and fits_descriptor(k, v)
    if loads == "auto":
        return possible and not INTERPRETING
    if loads != "tma":
        raise ValueError(f"loads is {loads!r}: use 'auto', 'tma' or 'pointer'")
    if not possible:
        raise ValueError("loads='tma' needs sm_90 or newer and strides of whole 16 bytes: use loads='auto'")
    return True


def block_dim(head_dim: int) -> int:
    """The head dimension padded to a tile's width."""
    return max(16, triton.next_power_of_2(head_dim))


def block_batch(batch: int) -> int:
    """Few distinct values, as each one is a compiled variant."""
    return 16 if batch <= 16 else 128 if batch <= 128 else max(1024, triton.next_power_of_2(batch))


def batch_blocks(max_batch: int) -> list[int]:
    """The fewest requests for each value of ``block_batch``, up to ``max_batch``."""
    found = []
    least = 1
    while least <= max_batch:
        found.append(least)
        least = block_batch(least) + 1
    return found


def allocate_scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Triton's device-made descriptors live here; torch keeps the memory until the launch has used it."""
    del alignment, stream  # torch aligns to 512 bytes and allocates on the current stream
    return torch.empty(size, dtype=torch.int8, device="cuda")
