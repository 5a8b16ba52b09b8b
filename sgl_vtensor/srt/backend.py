"""The attention backend ``vtensor``: kernels read each request's keys and values as one strided view of its row.

Writes go through the home range, by SGLang's own writer, in a launch of their own: within one kernel two addresses of
the same memory need not agree (CUDA programming guide, virtual aliasing).
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import add_attention_backend_choices
from vtensor_kernels import (
    MAX_GROUPED,
    DecodeSchedule,
    DecodeWorkspace,
    Pages,
    PrefillSchedule,
    decode_attention,
    max_members,
    prefill_attention,
    prefill_schedule,
    reference_attention,
    warm_up,
)

from sgl_vtensor.errors import ConfigError
from sgl_vtensor.srt.flags import NAME
from sgl_vtensor.srt.runtime import MAX_VIEWS, Runtime, runtime_of

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
"""Of the log, while kernels are compiled."""


@dataclass(frozen=True)
class Metadata:
    """What the layers of one forward pass share. Device tensors keep their address where a graph is captured."""

    rows: torch.Tensor  # [batch] int32, of the views; with pages the rows of their table
    kv_lens: torch.Tensor  # [batch] int32
    qo_indptr: torch.Tensor | None = None  # [batch + 1] int32, extend only
    max_q_len: int = 1
    host_rows: tuple[int, ...] = ()  # extend only
    host_q_starts: tuple[int, ...] = ()  # extend only, [batch + 1]
    host_kv_lens: tuple[int, ...] = ()  # extend only
    reads_homes: bool = False  # stock FlashAttention-3, paged, serves this pass
    pages: Pages | None = None  # our kernels read the homes
    groups: torch.Tensor | None = None  # [4, batch] int32, decode only: requests that begin with the same keys
    schedules: dict[object, Any] = field(default_factory=dict)
    """Of our kernels: made by the first layer of a kind, for all layers like it. A captured graph makes its own."""


class VTensorAttnBackend(AttentionBackend):
    """Attention over rows. SGLang makes one for each model runner.

    Raises:
        ConfigError: the memory under this server is not vTensor memory, or a kernel that was asked for is absent.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        runtime = runtime_of(runner)
        if runtime is None:
            raise ConfigError(
                "the attention backend vtensor needs vTensor memory: start the server with --enable-vtensor, and look "
                "in the log above for a hook that SGLang did not install"
            )
        self.runtime: Runtime = runtime
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.device = runtime.pool.driver.device
        self.forward_metadata: Metadata | None = None
        dtype = self.token_to_kv_pool.dtype
        first = self.token_to_kv_pool.start_layer
        self._views = {
            first + layer: runtime.pool.row_views(layer, dtype) for layer in range(self.token_to_kv_pool.layer_num)
        }
        self._homes = {
            layer: tuple(part.unsqueeze(0) for part in self.token_to_kv_pool.get_kv_buffer(layer))
            for layer in self._views
        }
        num_q_heads: int = runner.model_config.get_num_attention_heads(get_parallel().attn_tp_size)
        self._max_batch = self.req_to_token_pool.size + 1
        self._rows = torch.zeros(self._max_batch, dtype=torch.int32, device=self.device)
        self._kv_lens = torch.zeros(self._max_batch, dtype=torch.int32, device=self.device)
        self.kernel = self._choose_kernel(runtime.config.kernel)
        self._workspace = (
            DecodeWorkspace(
                self._max_batch,
                num_q_heads,
                self.token_to_kv_pool.v_head_dim,
                self.device,
                kv_heads=min(keys.shape[2] for keys, _ in self._views.values()),
            )
            if self.kernel in ("auto", "triton") and self.device.type == "cuda"
            else None
        )
        self._fa3 = _load_fa3() if self.kernel in ("auto", "fa3") and self.device.type == "cuda" else None
        if self.kernel == "fa3" and self._fa3 is None:
            raise ConfigError("--vtensor-kernel fa3 needs FlashAttention-3 on a Hopper GPU; use --vtensor-kernel auto")
        self._paged = self._make_paged(runner)
        # Measured on an H100 and an H200 (bench/results): over the homes stock FlashAttention-3 prefills fastest where
        # it copies pages in bulk, and our own kernel decodes fastest there. Where it is absent rows are read.
        in_bulk = self._fa3 is not None and self.kernel == "auto" and _copies_in_bulk(runtime)
        runtime.decode_reads_homes = self._fa3 is not None
        runtime.extend_reads_homes = in_bulk
        self._decode_pages = self._make_pages() if in_bulk and self._decodes_fastest(runner) else None
        self._max_members = min(max_members(num_q_heads, keys.shape[2]) for keys, _ in self._views.values())
        self._groups: dict[int, tuple[torch.Tensor, np.ndarray[Any, np.dtype[np.int32]]]] = {}
        """By batch size, on the device, where a graph finds them, and what was copied there."""
        runtime.can_read_homes = self._paged is not None
        runtime.attention = self._describe()
        if self._workspace is not None and (runtime.reads_rows or self._decode_pages is not None):
            self._warm_up(runner.model, runner.dtype)

    def _decodes_fastest(self, runner: Any) -> bool:
        """Whether our decode has been measured against FlashAttention-3 on such keys, and does what it does."""
        keys, values = next(iter(self._views.values()))
        return (
            keys.dtype in (torch.bfloat16, torch.float16)
            and keys.shape[3] == values.shape[3]
            and keys.shape[3] in (64, 128)
            and runner.attention_chunk_size is None  # local attention, as in Llama 4
        )

    def _make_pages(self) -> Pages:
        """A page table of a row for each request of a batch, filled in each pass from SGLang's table of slots."""
        page_tokens = self.runtime.pool.layout.page_tokens
        self._first_slots = self.req_to_token_pool.req_to_token[:, ::page_tokens]
        self._positions = torch.arange(self._max_batch, dtype=torch.int32, device=self.device)
        table = torch.zeros(self._max_batch, self._first_slots.shape[1], dtype=torch.int32, device=self.device)
        return Pages(table, page_tokens)

    def _describe(self) -> str:
        read = {"rows": self.runtime.reads_rows, "homes": self.runtime.can_read_homes}
        where = " and ".join(name for name, is_read in read.items() if is_read)
        fa3 = " with FlashAttention-3" if self._fa3 is not None else ""
        return f"kernel {self.kernel}{fa3}{' and our decode' if self._decode_pages is not None else ''} on {where}"

    def _choose_kernel(self, asked: str) -> str:
        if self.device.type == "cpu" and asked in ("triton", "fa3"):
            raise ConfigError(f"--vtensor-kernel {asked} needs a GPU; use --vtensor-kernel auto or torch")
        return asked

    def _make_paged(self, runner: Any) -> AttentionBackend | None:
        """A stock backend, paged through the homes: for what a view does not serve as well, or not yet."""
        if self._fa3 is not None:
            from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

            return FlashAttentionBackend(runner)
        if self.device.type == "cpu" and self.kernel == "auto":
            from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

            return TorchNativeAttnBackend(runner)
        return None

    def _warm_up(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Compile what our own kernels launch for this model's layers, before a request or a graph waits for it."""
        # SGLang hands sinks over with the queries; they are parameters of the layer around.
        sinks = next((value for name, value in model.named_parameters() if name.endswith("sinks")), None)
        kinds: dict[str, tuple[int, dict[str, Any]]] = {}
        for layer in model.modules():
            if isinstance(layer, RadixAttention) and layer.layer_id in self._views:
                options = self._extend_options(layer, sinks)
                if self._decode_pages is not None or not self._takes_fa3(layer, options):
                    kinds.setdefault(str({**options, "sinks": sinks is not None}), (layer.layer_id, options))
        begin = said = time.monotonic()
        for number, (layer_id, options) in enumerate(kinds.values(), start=1):
            views = (self._views if self._decode_pages is None else self._homes)[layer_id]
            for done, launches in warm_up(*views, dtype, self._workspace, pages=self._decode_pages, **options):
                if time.monotonic() - said > SECONDS_BETWEEN_LINES or done == launches:
                    said = time.monotonic()
                    logger.info(
                        "vTensor attention: %d of %d launches compiled for layers of kind %d of %d, %.1f s; "
                        "Triton keeps them for the next start", done, launches, number, len(kinds), said - begin,
                    )  # fmt: skip

    # Metadata.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        if max_bs > self._max_batch:
            raise ConfigError(f"graphs for {max_bs} requests are asked for, but only {self._max_batch} can run")
        if self._paged is not None:
            self._paged.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Without a graph. Stock FlashAttention-3 prepares such a pass in another way than a captured one."""
        if self._prepare(forward_batch):
            assert self._paged is not None
            self._paged.init_forward_metadata(forward_batch)
        else:
            self._copy(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if self._prepare(forward_batch):
            assert self._paged is not None
            self._paged.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if self._metadata().reads_homes:
            assert self._paged is not None
            self._paged.init_forward_metadata_in_graph(forward_batch)
        else:
            self._copy(forward_batch)
            # What a run before the capture made is of its lengths, and no part of the graph.
            self._metadata().schedules.clear()

    def _copy(self, forward_batch: Any) -> None:
        """What changes from pass to pass, to where a graph reads it."""
        metadata = self._metadata()
        metadata.kv_lens.copy_(forward_batch.seq_lens)
        if metadata.pages is not None:
            table = metadata.pages.table[: len(metadata.rows)]
            torch.index_select(self._first_slots, 0, forward_batch.req_pool_indices, out=table)
            table.div_(metadata.pages.page_tokens, rounding_mode="floor")

    def _prepare(self, forward_batch: Any) -> bool:
        """Set the metadata of this pass, up to the lengths on the device; true if it is to read the homes."""
        batch_size, runtime = forward_batch.batch_size, self.runtime
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        rows, kv_lens = self._rows[:batch_size], self._kv_lens[:batch_size]
        if decoding and self._decode_pages is not None:
            self.forward_metadata = Metadata(
                rows=self._positions[:batch_size], kv_lens=kv_lens, pages=self._decode_pages,
                groups=self._copy_groups(batch_size),
            )  # fmt: skip
            return False
        if decoding:
            reads_homes = runtime.decode_reads_homes or runtime.launch_reads_homes
        else:
            reads_homes = runtime.extend_reads_homes or runtime.launch_reads_homes or batch_size > MAX_VIEWS
        if reads_homes and self._paged is not None:
            self.forward_metadata = Metadata(rows=rows, kv_lens=kv_lens, reads_homes=True)
            return True
        host_rows = self._host_rows(batch_size)
        rows.copy_(self._pinned(host_rows), non_blocking=True)
        if decoding:
            self.forward_metadata = Metadata(rows=rows, kv_lens=kv_lens, groups=self._copy_groups(batch_size))
            return False
        q_lens = [int(length) for length in forward_batch.extend_seq_lens_cpu]
        q_starts = (0, *itertools.accumulate(q_lens))
        self.forward_metadata = Metadata(
            rows=rows,
            kv_lens=kv_lens,
            qo_indptr=self._pinned(np.asarray(q_starts, dtype=np.int32)).to(self.device, non_blocking=True),
            max_q_len=max(q_lens, default=0),
            host_rows=tuple(host_rows.tolist()),
            host_q_starts=q_starts,
            host_kv_lens=tuple(int(length) for length in forward_batch.seq_lens_cpu),
        )
        return False

    def _copy_groups(self, batch_size: int) -> torch.Tensor | None:
        """Requests that begin with the same keys, where the kernel takes them."""
        if self._workspace is None or self._max_members < 2 or batch_size > MAX_GROUPED:
            return None
        found = self.runtime.groups_of_launch(batch_size, self._max_members)
        kept = self._groups.get(batch_size)
        if kept is not None and np.array_equal(found, kept[1]):
            return kept[0]
        groups = torch.empty(found.shape, dtype=torch.int32, device=self.device) if kept is None else kept[0]
        groups.copy_(self._pinned(found), non_blocking=True)
        self._groups[batch_size] = groups, found
        return groups

    def _host_rows(self, batch_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Row numbers, padded with row 0. Dummy and capture runs have no rows: all of theirs are padding."""
        rows = np.zeros(batch_size, dtype=np.int32)
        launched = self.runtime.rows_of_launch()
        if launched is not None:
            rows[: len(launched)] = launched
        return rows

    def _pinned(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()

    # Attention.

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        metadata = self._metadata()
        if metadata.reads_homes:
            return self._forward_paged("forward_extend", q, k, v, layer, forward_batch, save_kv_cache, sinks, kwargs)
        self._store(k, v, layer, forward_batch, save_kv_cache, kwargs)
        queries, out = self._shape(q, layer)
        options = self._extend_options(layer, sinks)
        if self._takes_fa3(layer, options):
            self._extend_fa3(queries, out, layer, metadata, options)
        else:
            keys, values = self._views[layer.layer_id]
            assert metadata.qo_indptr is not None
            attend = reference_attention
            if self._workspace is not None:
                attend = prefill_attention
                options["schedule"] = self._prefill_schedule(queries, keys, values, metadata, options)
            attend(
                queries,
                keys,
                values,
                out,
                metadata.rows,
                metadata.qo_indptr,
                metadata.kv_lens,
                metadata.max_q_len,
                **options,
            )
        return out.view(q.shape[0], -1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        metadata = self._metadata()
        if metadata.reads_homes:
            return self._forward_paged("forward_decode", q, k, v, layer, forward_batch, save_kv_cache, sinks, kwargs)
        self._store(k, v, layer, forward_batch, save_kv_cache, kwargs)
        queries, out = self._shape(q, layer)
        options = self._options(layer, sinks)
        keys, values = (self._views if metadata.pages is None else self._homes)[layer.layer_id]
        if self._workspace is not None:
            schedule = self._decode_schedule(keys, metadata, options["sliding_window"])
            decode_attention(
                queries, keys, values, out, metadata.rows, metadata.kv_lens, workspace=self._workspace,
                schedule=schedule, pages=metadata.pages, **options,
            )  # fmt: skip
        else:
            qo_indptr = torch.arange(len(metadata.rows) + 1, dtype=torch.int32)
            reference_attention(queries, keys, values, out, metadata.rows, qo_indptr, metadata.kv_lens, 1, **options)
        return out.view(q.shape[0], -1)

    def _decode_schedule(self, keys: torch.Tensor, metadata: Metadata, window: int) -> DecodeSchedule:
        assert self._workspace is not None
        kind = (keys.shape[2:], window)
        if kind not in metadata.schedules:
            schedule = DecodeSchedule(self._workspace, keys, len(metadata.rows), sliding_window=window)
            groups = metadata.groups if schedule.max_members > 1 else None
            metadata.schedules[kind] = schedule.update(metadata.rows, metadata.kv_lens, groups)
        made: DecodeSchedule = metadata.schedules[kind]
        return made

    def _prefill_schedule(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: Metadata,
        options: dict[str, Any],
    ) -> PrefillSchedule:
        alike = {name: options[name] for name in ("causal", "sliding_window")}
        kind = (queries.shape, keys.shape[2:], values.shape[2:], *alike.values())
        if kind not in metadata.schedules:
            metadata.schedules[kind] = prefill_schedule(
                queries, keys, values, metadata.rows, metadata.qo_indptr, metadata.kv_lens, metadata.max_q_len,
                max_kv_len=max(metadata.host_kv_lens, default=0), **alike,
            )  # fmt: skip
        made: PrefillSchedule = metadata.schedules[kind]
        return made

    def _forward_paged(
        self,
        method: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        sinks: torch.Tensor | None,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        options = extra if sinks is None else {**extra, "sinks": sinks}
        result: torch.Tensor = getattr(self._paged, method)(q, k, v, layer, forward_batch, save_kv_cache, **options)
        return result

    def _metadata(self) -> Metadata:
        assert self.forward_metadata is not None, "SGLang calls init_forward_metadata before the first layer"
        return self.forward_metadata

    def _store(
        self, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any, save: bool, extra: dict[str, Any]
    ) -> None:
        unknown = {name for name, value in extra.items() if value is not None}
        if unknown or layer.is_cross_attention:
            what = ", ".join(sorted(unknown)) or "cross attention"
            raise ConfigError(f"this model's attention needs {what}, which the backend vtensor does not have; drop it")
        if not save or k is None:
            return
        location = KVWriteLoc.for_batch(forward_batch)
        if layer.k_scale is None:
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        else:
            # SGLang's writer divides in place.
            self.token_to_kv_pool.set_kv_buffer(layer, location, k.clone(), v.clone(), layer.k_scale, layer.v_scale)

    def _shape(self, q: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries as [tokens, q_heads, head_dim], and the output to fill, of v_head_dim."""
        queries = q.view(q.shape[0], layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        return queries, out

    def _options(self, layer: Any, sinks: torch.Tensor | None) -> dict[str, Any]:
        window = layer.sliding_window_size
        return {
            "sm_scale": layer.scaling,
            "logit_cap": layer.logit_cap or 0.0,
            "sliding_window": -1 if window is None or window <= 0 else window,
            "k_scale": 1.0 if layer.k_scale is None else layer.k_scale_float,
            "v_scale": 1.0 if layer.v_scale is None else layer.v_scale_float,
            "sinks": sinks,
        }

    def _extend_options(self, layer: Any, sinks: torch.Tensor | None) -> dict[str, Any]:
        return {**self._options(layer, sinks), "causal": layer.attn_type != AttentionType.ENCODER_ONLY}

    def _takes_fa3(self, layer: Any, options: dict[str, Any]) -> bool:
        """FlashAttention-3 on views takes plain attention of half-precision keys."""
        if self._fa3 is None or options["sinks"] is not None or options["logit_cap"]:
            return False
        keys, _ = self._views[layer.layer_id]
        return keys.dtype in (torch.bfloat16, torch.float16) and layer.qk_head_dim == layer.v_head_dim

    def _extend_fa3(
        self, queries: torch.Tensor, out: torch.Tensor, layer: Any, metadata: Metadata, options: dict[str, Any]
    ) -> None:
        """One launch a request over its row cut to its length: the copy engine then reads nothing behind it."""
        assert self._fa3 is not None
        keys, values = self._views[layer.layer_id]
        window = options["sliding_window"]
        for index, (row, kv_len) in enumerate(zip(metadata.host_rows, metadata.host_kv_lens, strict=True)):
            start, stop = metadata.host_q_starts[index : index + 2]
            if start == stop:
                continue
            result = self._fa3(
                q=queries[None, start:stop],
                k_cache=keys[row : row + 1, :kv_len],
                v_cache=values[row : row + 1, :kv_len],
                cache_seqlens=metadata.kv_lens[index : index + 1],
                softmax_scale=options["sm_scale"],
                causal=options["causal"],
                window_size=(window, 0 if options["causal"] else window) if window > 0 else (-1, -1),
            )
            out[start:stop] = result[0]


FA3_BLOCK_TOKENS = 128
"""FlashAttention-3 hands paged keys to the copy engine where a page is a multiple of its tile (hopper/tile_size.h: 128
keys for causal head_dim 64 and 128); otherwise threads gather them, which costs a tenth."""


def _copies_in_bulk(runtime: Runtime) -> bool:
    return runtime.pool.layout.page_tokens % FA3_BLOCK_TOKENS == 0


def _load_fa3() -> Any:
    """SGLang's FlashAttention-3, or None where this GPU or this install has none."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


def register_backend() -> None:
    """Make ``--attention-backend vtensor`` known to SGLang."""
    add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(VTensorAttnBackend)
