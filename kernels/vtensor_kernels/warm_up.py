"""All variants that a server can launch, compiled before it serves: a request would wait seconds for each."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vtensor_kernels import tile
from vtensor_kernels.decode import DecodeSchedule, DecodeWorkspace, decode_attention, first_batches
from vtensor_kernels.prefill import PrefillConfig, prefill_attention, tile_configs

_MAX_THREADS = 8


def warm_up(
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    workspace: DecodeWorkspace,
    *,
    pages: tile.Pages | None = None,
    **options: Any,
) -> Iterator[tuple[int, int]]:
    """Compile what ``prefill_attention`` and ``decode_attention`` launch for one kind of layer, several at a time.

    Decode is compiled as for requests that may share keys. What is compiled depends on shapes, strides, dtypes and
    features, never on lengths. Launches are real, on requests
    of no tokens: no key is read, and memory behind ``k`` and ``v`` need not be mapped.

    Args:
        k: keys of one layer, as ``prefill_attention`` takes them.
        v: values of one layer.
        dtype: of the queries and outputs.
        workspace: of decode; its ``max_batch`` bounds prefill, too.
        pages: of ``decode_attention``; prefill, which is fastest on rows, is left out then.
        options: of all calls: ``sm_scale``, and any of ``causal``, ``logit_cap``, ``sliding_window``, ``k_scale``,
            ``v_scale`` and ``sinks``. Decode is left out where ``causal`` is False.

    Yields:
        (launches done, launches in all), after each.

    Raises:
        ValueError: what the kernels do not take, as they say it.
        triton.runtime.errors.OutOfResources: a configuration that does not fit this device.
    """
    launches = [*_launches(k, v, dtype, workspace, pages, options)]
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(_on_device, k.device, launch) for launch in launches]
        for done, future in enumerate(concurrent.futures.as_completed(running), start=1):
            future.result()
            yield done, len(launches)
    if k.is_cuda:
        torch.cuda.synchronize(k.device)


def _launches(
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    workspace: DecodeWorkspace,
    pages: tile.Pages | None,
    options: dict[str, Any],
) -> Iterator[Callable[[], None]]:
    """One call for each size of batch that is compiled for, and each size of tile; and with keys that are split."""
    decode_options = {name: value for name, value in options.items() if name != "causal"} | {"pages": pages}
    configs = dict.fromkeys(tile_configs(tile.capability(k.device), k.shape[3], v.shape[3], dtype))
    for batch in first_batches(workspace.max_batch) if options.get("causal", True) else ():
        yield functools.partial(_decode, k, v, dtype, workspace, decode_options, batch)
    for batch in tile.batch_blocks(workspace.max_batch):
        for config in configs if pages is None else ():
            for splits in (1, 2):
                fixed = dataclasses.replace(config, splits=splits)
                yield functools.partial(_prefill, k, v, dtype, workspace.q_heads, options, batch, fixed)


def _prefill(
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    q_heads: int,
    options: dict[str, Any],
    batch: int,
    config: PrefillConfig,
) -> None:
    q = torch.empty(1, q_heads, k.shape[3], dtype=dtype, device=k.device)
    out = q.new_empty(1, q_heads, v.shape[3])
    rows, kv_lens, qo_indptr = (torch.zeros(batch + n, dtype=torch.int32, device=k.device) for n in (0, 0, 1))
    prefill_attention(q, k, v, out, rows, qo_indptr, kv_lens, 1, config=config, **options)


def _decode(
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    workspace: DecodeWorkspace,
    options: dict[str, Any],
    batch: int,
) -> None:
    q = torch.empty(batch, workspace.q_heads, k.shape[3], dtype=dtype, device=k.device)
    out = q.new_empty(batch, workspace.q_heads, v.shape[3])
    rows, kv_lens = (torch.zeros(batch, dtype=torch.int32, device=k.device) for _ in range(2))
    schedule = DecodeSchedule(workspace, k, batch, sliding_window=options.get("sliding_window", -1))
    groups = None
    if schedule.max_members > 1:
        alone = torch.arange(batch, dtype=torch.int32, device=k.device)
        groups = torch.stack([alone, alone, torch.ones_like(alone), torch.zeros_like(alone)])
    schedule.update(rows, kv_lens, groups)
    decode_attention(q, k, v, out, rows, kv_lens, workspace=workspace, schedule=schedule, **options)


def _on_device(device: torch.device, launch: Callable[[], None]) -> None:
    """A thread begins on GPU 0."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch()
