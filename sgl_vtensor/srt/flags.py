"""Command line, environment, and what follows for SGLang's own arguments. Decided once, in the launching process."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_context

from sgl_vtensor.config import KERNELS, VTensorConfig, load_config, switched_on
from sgl_vtensor.core.layout import (
    CUDA_GRANULE_BYTES,
    CUDA_MIN_PAGE_TOKENS,
    PAGE_TOKENS_CHOICES,
    KVLayout,
    plan_layout,
)
from sgl_vtensor.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "vtensor"
"""Of our attention backend, our radix cache backend, and our source in SGLang's resolution."""

HOST_GRANULE_BYTES = 4096

_FLAGS_ATTRIBUTE = "_vtensor_flags"
_CONFIG_ATTRIBUTE = "_vtensor_config"

# What cannot work with vTensor memory yet: field -> (value that is fine, flag, way out).
_REFUSED: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    ("speculative_algorithm", (None,), "--speculative-algorithm", "drop it"),
    ("enable_hierarchical_cache", (False,), "--enable-hierarchical-cache", "drop it"),
    ("enable_lmcache", (False,), "--enable-lmcache", "drop it"),
    ("enable_flexkv", (False,), "--enable-flexkv", "drop it"),
    ("enable_unified_cache_external_linker", (False,), "--enable-unified-cache-external-linker", "drop it"),
    ("enable_hisparse", (False,), "--enable-hisparse", "drop it"),
    ("disaggregation_mode", ("null", None), "--disaggregation-mode", "serve prefill and decode in one server"),
    ("pp_size", (1,), "--pp-size", "use --tp-size"),
    ("nnodes", (1,), "--nnodes", "serve on one machine: ranks agree through its shared memory"),
    ("dcp_size", (1, None), "--dcp-size", "drop it"),
    ("attn_cp_size", (1, None), "--attn-cp-size", "drop it"),
    ("attn_dp_size", (1, None), "--attn-dp-size / --enable-dp-attention", "use --dp-size without it"),
    ("enable_memory_saver", (False,), "--enable-memory-saver", "drop it; vTensor memory is elastic by itself"),
    ("enable_streaming_session", (False,), "--enable-streaming-session", "drop it"),
    ("enable_session_radix_cache", (False,), "--enable-session-radix-cache", "drop it"),
    ("enable_page_major_kv_layout", (False,), "--enable-page-major-kv-layout", "drop it"),
    ("enable_unified_memory", (False,), "--enable-unified-memory", "drop it"),
    ("enable_kv_cache_sharding", (False, None), "--enable-kv-cache-sharding", "drop it"),
    ("enable_two_batch_overlap", (False,), "--enable-two-batch-overlap", "drop it"),
    ("enable_single_batch_overlap", (False,), "--enable-single-batch-overlap", "drop it"),
    ("enable_pdmux", (False,), "--enable-pdmux", "drop it"),
    ("dllm_algorithm", (None,), "--dllm-algorithm", "drop it"),
    ("prefill_only_disable_kv_cache", (False,), "--prefill-only-disable-kv-cache", "drop it or drop --enable-vtensor"),
    ("enable_deterministic_inference", (False,), "--enable-deterministic-inference", "drop it"),
)
_KV_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")


class _Enable(argparse._StoreTrueAction):
    """``--enable-vtensor``. A lost hook is noticed here, since without ``from_cli_args`` the flag would do nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        from sgl_vtensor.srt import compat

        compat.check_installed()
        super().__call__(*args, **kwargs)


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """Hook: add our flags to SGLang's parser."""
    group = parser.add_argument_group("vTensor (sgl_vtensor)", "A KV cache made of CUDA virtual memory.")
    group.add_argument(
        "--enable-vtensor",
        action=_Enable,
        help="Keep keys and values in vTensor memory: elastic, and contiguous for every request.",
    )
    group.add_argument(
        "--vtensor-page-tokens",
        type=int,
        metavar="N",
        help="Tokens in one physical page. Default: the smallest page that wastes at most a tenth of the memory.",
    )
    group.add_argument(
        "--vtensor-kernel",
        choices=KERNELS,
        help="Attention kernels that read the rows. Default: auto, which chooses by the shape of the call.",
    )
    group.add_argument(
        "--vtensor-num-rows",
        type=int,
        metavar="N",
        help="Rows to keep as a cache of mappings. Default: twice the requests that may run at once.",
    )
    group.add_argument(
        "--vtensor-unmap-rows",
        action="store_true",
        default=None,
        help="Unmap a request's row when it has ended, as the vTensor paper does. For comparison: it is slower.",
    )
    group.add_argument(
        "--vtensor-idle-seconds",
        type=float,
        metavar="S",
        help="After so long without work, give the memory of free pages back to the device. Default: 10; 0: never.",
    )
    group.add_argument(
        "--vtensor-memory-limit",
        metavar="SIZE",
        help="KV memory that may be taken, like 24GiB, or 60%% of what the pool can hold; 'sgl-vtensor limit' moves it "
        "while the server runs. Default: 100%%.",
    )
    group.add_argument(
        "--vtensor-reserve",
        metavar="SIZE",
        help="Free pages to keep ready ahead of need, like 256MiB or 1%%. Default: 1%% on CUDA, nothing on the host.",
    )
    group.add_argument(
        "--vtensor-cache-seconds",
        type=float,
        metavar="S",
        help="Drop cached prefixes that nobody has asked for in so long. Default: 600; 0: never.",
    )
    group.add_argument(
        "--vtensor-cache-keep",
        metavar="SIZE",
        help="Keep so much of the cache however old it is, like 2GiB or 10%%. Default: 0%%.",
    )
    group.add_argument(
        "--vtensor-trace",
        metavar="FILE",
        help="Record what the pool does, for 'sgl-vtensor replay'; no text and no tokens. Each rank writes a file of "
        "its own: FILE.0, FILE.1 and so on, replica after replica. A file that is there already is kept.",
    )
    group.add_argument(
        "--vtensor-debug",
        action="store_true",
        default=None,
        help="Check every invariant before each launch. Slow.",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Hook: keep our flags on SGLang's record; underscore attributes travel to its processes."""
    record = original(cls, args)
    given = {name.removeprefix("vtensor_"): value for name, value in vars(args).items() if name.startswith("vtensor_")}
    backends = [getattr(args, f"{phase}attention_backend", None) for phase in ("", "prefill_", "decode_")]
    enabled = getattr(args, "enable_vtensor", False) or NAME in backends or switched_on(os.environ)
    if not enabled and any(value is not None for value in given.values()):
        names = ", ".join(f"--vtensor-{name.replace('_', '-')}" for name, value in given.items() if value is not None)
        raise ConfigError(f"{names} does nothing without --enable-vtensor; add it")
    setattr(record, _FLAGS_ATTRIBUTE, given if enabled else None)
    return record


def active_config() -> VTensorConfig | None:
    """The settings of this process's server, or None where it runs without vTensor memory."""
    try:
        record = get_context().server_args
    except ValueError:
        return None
    return getattr(record, _CONFIG_ATTRIBUTE, None)


def register_resolution() -> None:
    """Wrap the steps of SGLang's argument resolution that we have a say in."""
    register_resolution_hook("handle_attention_backend_compatibility")(_choose)
    register_resolution_hook("handle_other_validations")(_validate)


def _choose(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Switch vTensor memory on, and choose page size, tree and attention backend."""
    view = resolved_view(server_args)
    flags = getattr(server_args, _FLAGS_ATTRIBUTE, None)
    # What the user named; the view already holds SGLang's own choice for the device.
    named = (server_args.attention_backend, server_args.prefill_attention_backend, server_args.decode_attention_backend)
    if flags is None and NAME not in named and not switched_on(os.environ):
        previous(server_args)
        return
    from sgl_vtensor.srt import compat

    compat.check_targets()
    compat.check_installed()
    config = load_config(flags or {}, os.environ)
    _refuse_flags(view)
    _refuse_model(server_args, view)
    if NAME in named and set(named) - {NAME, None}:
        raise ConfigError(
            "vtensor attends both prefill and decode; name no other attention backend beside it, or name another "
            "with --attention-backend for both, which then runs paged on vTensor memory"
        )
    if not any(named) or NAME in named:
        declare_resolution(server_args, NAME, attention_backend=NAME)
    previous(server_args)
    layout = layout_of(server_args, config, granule_bytes=granule_bytes(view.device))
    page_tokens = layout.page_tokens
    if view.page_size not in (None, page_tokens):
        raise ConfigError(
            f"--page-size {view.page_size} is not the page of vTensor memory, {page_tokens} tokens; "
            f"drop it, or say --vtensor-page-tokens {view.page_size}"
        )
    if view.radix_cache_backend not in (None, NAME):
        raise ConfigError(f"--radix-cache-backend {view.radix_cache_backend} cannot be used; drop it")
    declare_resolution(server_args, NAME, page_size=page_tokens, radix_cache_backend=NAME)
    if view.device == "cpu":
        _disable_graphs(server_args)
    setattr(server_args, _CONFIG_ATTRIBUTE, config)


def _validate(server_args: Any, previous: Callable[[Any], None]) -> None:
    """After every other step: nothing may have changed what vTensor memory stands on."""
    previous(server_args)
    config: VTensorConfig | None = getattr(server_args, _CONFIG_ATTRIBUTE, None)
    if config is None:
        return
    view = resolved_view(server_args)
    _refuse_flags(view)
    layout = layout_of(server_args, config, granule_bytes=granule_bytes(view.device))
    if view.page_size != layout.page_tokens:
        raise ConfigError(
            f"SGLang set the page size to {view.page_size} tokens, but vTensor pages have {layout.page_tokens}; "
            "please report the flags that you used"
        )
    chunk = view.chunked_prefill_size
    if chunk is not None and chunk > 0 and chunk % layout.page_tokens:
        raise ConfigError(
            f"--chunked-prefill-size {chunk} is not a multiple of the page, {layout.page_tokens} tokens; choose one"
        )


def _refuse_flags(view: Any) -> None:
    for field, fine, flag, remedy in _REFUSED:
        value = getattr(view, field, fine[0])
        if value not in fine:
            raise ConfigError(f"{flag} does not work with --enable-vtensor yet; {remedy}")
    if view.kv_cache_dtype not in _KV_DTYPES:
        raise ConfigError(
            f"--kv-cache-dtype {view.kv_cache_dtype} does not work with --enable-vtensor; use {', '.join(_KV_DTYPES)}"
        )
    for variable in ("SGLANG_USE_HND_KVCACHE", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        if getattr(envs, variable).get():
            raise ConfigError(f"{variable} does not work with --enable-vtensor; unset it")


def _refuse_model(server_args: Any, view: Any) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    model = model_config_of(server_args)
    reasons = {
        "multi-head latent attention": model.attention_arch == AttentionArch.MLA,
        "state-space layers": model.attention_arch == AttentionArch.SSM,
        "a sliding-window KV pool": bool(model.is_hybrid_swa),
        "an encoder and a decoder": bool(model.is_encoder_decoder),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(f"{view.model_path} has {reason}, which vTensor memory does not hold yet; drop the flag")


def _disable_graphs(server_args: Any) -> None:
    """There are no graphs to capture on a CPU."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    for phase in (Phase.DECODE, Phase.PREFILL):
        config = resolved_view(server_args).cuda_graph_config
        declare_resolution(server_args, NAME, cuda_graph_config=with_phase(config, phase, backend=Backend.DISABLED))


def granule_bytes(device: str) -> int:
    """What the driver of this device maps at least; the pool checks it against the driver itself."""
    return CUDA_GRANULE_BYTES if str(device).startswith("cuda") else HOST_GRANULE_BYTES


def kv_dtype_of(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which keys and values are kept."""
    named = {
        "auto": model_dtype,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
    return named[kv_cache_dtype]


def layout_of(server_args: Any, config: VTensorConfig, *, granule_bytes: int) -> KVLayout:
    """The layout of one rank for this server's model."""
    view = resolved_view(server_args)
    model = model_config_of(server_args)
    dtype = kv_dtype_of(view.kv_cache_dtype, model.dtype)
    return plan_layout(
        num_layers=model.num_hidden_layers,
        num_kv_heads=model.get_num_kv_heads(view.tp_size),
        head_dim=model.head_dim,
        v_head_dim=model.v_head_dim,
        itemsize=dtype.itemsize,
        granule_bytes=granule_bytes,
        page_tokens=config.page_tokens,
        min_page_tokens=CUDA_MIN_PAGE_TOKENS if granule_bytes == CUDA_GRANULE_BYTES else PAGE_TOKENS_CHOICES[0],
    )
