"""How one token's keys and values lie in memory, and how tokens fill pages.

Token-major: token t of a page starts at ``t * token_stride_bytes``; inside it stand, layer after layer, K then V, each
``[kv_heads, head_dim]``. ``page_tokens * token_stride_bytes == page_bytes`` is a whole number of granules, so that the
distance between two tokens is the same inside a page and across the border of two pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sgl_vtensor.errors import ConfigError

ALIGNMENT_BYTES = 16
"""What Hopper's copy engine asks of every stride (CUDA programming guide, tensor maps)."""

DEFAULT_MAX_WASTE = 0.10
CUDA_GRANULE_BYTES = 2 << 20
CUDA_MIN_PAGE_TOKENS = 128
"""A multiple of FlashAttention-3's tile, which it then copies in bulk: prefill over homes is a tenth faster than at 64
tokens. A mapping costs CUDA about 31 us whatever its size, too. Hits are token-granular in any case."""
PAGE_TOKENS_CHOICES = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class KVLayout:
    """Geometry of the KV cache of one rank. Make it with :func:`plan_layout`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    itemsize: int
    granule_bytes: int
    page_tokens: int
    token_stride_bytes: int

    @property
    def k_bytes(self) -> int:
        """Bytes of one token's K in one layer."""
        return self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def v_bytes(self) -> int:
        """Bytes of one token's V in one layer."""
        return self.num_kv_heads * self.v_head_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token that carry data: the stride without its padding."""
        return self.num_layers * (self.k_bytes + self.v_bytes)

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_stride_bytes

    @property
    def waste(self) -> float:
        """Share of the memory that is padding, 0 to 1."""
        return 1 - self.token_bytes / self.token_stride_bytes

    def k_offset_bytes(self, layer: int) -> int:
        return layer * (self.k_bytes + self.v_bytes)

    def v_offset_bytes(self, layer: int) -> int:
        return self.k_offset_bytes(layer) + self.k_bytes

    def num_pages(self, len_tokens: int) -> int:
        """Pages that ``len_tokens`` tokens fill, the last one perhaps partly."""
        return -(-len_tokens // self.page_tokens)


def padded_stride_bytes(token_bytes: int, page_tokens: int, granule_bytes: int) -> int:
    """The smallest token stride that makes a page of ``page_tokens`` tokens a whole number of granules."""
    step = math.lcm(granule_bytes // math.gcd(granule_bytes, page_tokens), ALIGNMENT_BYTES)
    return -(-token_bytes // step) * step


def plan_layout(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    itemsize: int,
    granule_bytes: int,
    page_tokens: int | None = None,
    min_page_tokens: int = PAGE_TOKENS_CHOICES[0],
    max_waste: float = DEFAULT_MAX_WASTE,
) -> KVLayout:
    """Choose the page size and the padding of a token.

    Without ``page_tokens`` the smallest of ``PAGE_TOKENS_CHOICES``, from ``min_page_tokens``, whose padding wastes at
    most ``max_waste`` of the memory is taken, or, where none does, the one that wastes least. Small pages share finely
    and leave less of a request's last page empty; each mapping costs the driver the same, whatever its size.

    Raises:
        ConfigError: a size is not positive, or a layer's K or V cannot be aligned to 16 bytes.
    """
    sizes = {
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "itemsize": itemsize,
        "granule_bytes": granule_bytes,
    }
    for name, value in sizes.items():
        if value <= 0:
            raise ConfigError(f"{name} must be positive, not {value}")
    if page_tokens is not None and not 1 <= page_tokens <= 1 << 20:
        raise ConfigError(f"page_tokens must be between 1 and {1 << 20}, not {page_tokens}")

    def layout(tokens: int) -> KVLayout:
        token_bytes = num_layers * num_kv_heads * (head_dim + v_head_dim) * itemsize
        return KVLayout(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            itemsize=itemsize,
            granule_bytes=granule_bytes,
            page_tokens=tokens,
            token_stride_bytes=padded_stride_bytes(token_bytes, tokens, granule_bytes),
        )

    if page_tokens is not None:
        return layout(page_tokens)
    candidates = [layout(tokens) for tokens in PAGE_TOKENS_CHOICES if tokens >= min_page_tokens]
    frugal = [candidate for candidate in candidates if candidate.waste <= max_waste]
    return frugal[0] if frugal else min(candidates, key=lambda candidate: candidate.waste)


def kv_views(
    flat: torch.Tensor,
    layout: KVLayout,
    layer: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides_bytes: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer over a flat byte range: ``[*shape, kv_heads, head_dim]`` with the given outer strides."""
    if dtype.itemsize != layout.itemsize:
        raise ConfigError(f"{dtype} has {dtype.itemsize} bytes an element, the layout was made for {layout.itemsize}")
    elements = flat.view(dtype)
    strides = tuple(stride // layout.itemsize for stride in strides_bytes)

    def view(offset_bytes: int, head_dim: int) -> torch.Tensor:
        return elements.as_strided(
            (*shape, layout.num_kv_heads, head_dim), (*strides, head_dim, 1), offset_bytes // layout.itemsize
        )

    k = view(layout.k_offset_bytes(layer), layout.head_dim)
    v = view(layout.v_offset_bytes(layer), layout.v_head_dim)
    return k, v
