"""The seam: every place of SGLang that this plugin touches, and the only module that depends on its version.

SGLang logs a plugin's errors and then runs without it. So nothing here may fail quietly: ``check_targets`` resolves
every target before the server resolves its arguments, and ``check_installed`` is called by the parts that SGLang
builds from us (tree, attention backend), which raise where a hook is missing.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib.metadata import version

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sgl_vtensor.errors import ConfigError
from sgl_vtensor.srt import allocator, flags, page, pool, prompts, runtime

SUPPORTED = ("0.5.23",)

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
ALLOCATION = "sglang.srt.mem_cache.allocation"


@dataclass(frozen=True)
class Hook:
    """One seam: the dotted path in SGLang, how we attach to it, with what, and why it is needed."""

    target: str
    kind: HookType
    hook: object
    why: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        HookType.AFTER,
        flags.add_cli_args,
        "our flags; SGLang has no call for a plugin's flags",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        HookType.AROUND,
        flags.from_cli_args,
        "keeps our flags on the record, which drops names that it does not know",
    ),
    Hook(
        "sglang.srt.platforms.cuda.CudaSRTPlatform.get_kv_pool_cls",
        HookType.AROUND,
        pool.kv_pool_class,
        "our pool on CUDA; the host platform overrides the method itself",
    ),
    Hook(
        "sglang.srt.platforms.cuda.CudaSRTPlatform.get_paged_allocator_cls",
        HookType.AROUND,
        allocator.paged_allocator_class,
        "our allocator on CUDA",
    ),
    Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        HookType.AFTER,
        pool.padded_cell_size,
        "the padding of the token stride counts in SGLang's memory budget",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        HookType.AROUND,
        pool.pool_budget,
        "SGLang counts a neighbour's memory as gone; a pool of addresses can grow into what is given back",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool",
        HookType.AFTER,
        runtime.attach,
        "makes the rows once the request slots are known, before graphs are captured",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy._use_exact_chunk_fill",
        HookType.AROUND,
        allocator.fill_chunks_exactly,
        "a prefill's chunk counts tokens; SGLang rounds each request up to whole pages, so that fewer fit",
    ),
    Hook(
        f"{ALLOCATION}.alloc_for_extend",
        HookType.AROUND,
        runtime.alloc_for_extend,
        "the batch behind an allocation: who gets which page, known on the host",
    ),
    Hook(
        f"{ALLOCATION}.alloc_for_decode",
        HookType.AROUND,
        runtime.alloc_for_decode,
        "as for extend",
    ),
    Hook(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        HookType.AROUND,
        runtime.forward_batch,
        "queued device work before a launch, its fence behind it, on the forward stream",
    ),
    Hook(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_embedding",
        HookType.AROUND,
        runtime.forward_batch,
        "the same for embedding models",
    ),
    Hook(
        f"{SCHEDULER}.run_batch",
        HookType.AFTER,
        runtime.map_waiting,
        "behind a launch, with the queue at hand: prefixes of requests that wait are mapped ahead",
    ),
    Hook(
        f"{SCHEDULER}.on_idle",
        HookType.BEFORE,
        runtime.on_idle,
        "nothing is in flight: everything that was let go may be unmapped",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
        HookType.AROUND,
        runtime.add_internal_state,
        "the vtensor section of /server_info, and the picture for /vtensor",
    ),
    Hook(
        "sglang.srt.utils.common.set_uvicorn_logging_configs",
        HookType.AROUND,
        page.serve_page,
        "the page /vtensor: called once the HTTP process has its API keys and before it listens",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._update_handlers",
        HookType.AFTER,
        runtime.add_update_handlers,
        "POST /set_internal_state moves the memory limit, on all ranks in the same step",
    ),
    Hook(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
        HookType.AFTER,
        runtime.bound_requests,
        "a request that does not fit the memory limit is refused when it comes; the log's line at start",
    ),
    Hook(
        f"{SCHEDULER}._poll_timeout_aborts",
        HookType.AFTER,
        runtime.add_decision,
        "rank 0's decisions about memory travel with the requests that SGLang broadcasts",
    ),
    Hook(
        f"{SCHEDULER}.process_input_requests",
        HookType.AROUND,
        runtime.follow_decisions,
        "all ranks follow them in the same step; figures for /metrics, once a second",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        HookType.BEFORE,
        prompts.check_prompt,
        "an empty prompt, a number that is no token, or generation by a model that embeds would end the scheduler",
    ),
)


def register_hooks() -> None:
    """Register every hook with SGLang, which applies them when all plugins are loaded."""
    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.hook, hook.kind)  # type: ignore[arg-type]


def check_targets() -> None:
    """Resolve every target.

    Raises:
        ConfigError: the installed SGLang is not supported, or lacks a target.
    """
    installed = version("sglang")
    missing = []
    for hook in HOOKS:
        owner, _, name = hook.target.rpartition(".")
        try:
            found = hasattr(pkgutil.resolve_name(owner), name)
        except (ImportError, AttributeError):
            found = False
        if not found:
            missing.append(hook.target)
    if missing:
        raise ConfigError(
            f"SGLang {installed} lacks what sgl_vtensor hooks into: {', '.join(missing)}; "
            f"install sglang=={SUPPORTED[-1]}"
        )
    if installed not in SUPPORTED:
        raise ConfigError(f"SGLang {installed} is not supported by this sgl_vtensor; install sglang=={SUPPORTED[-1]}")


def check_installed() -> None:
    """Make sure that SGLang applied every hook in this process.

    Raises:
        ConfigError: it did not; SGLang's log names the exception that it swallowed.
    """
    missing = [hook.target for hook in HOOKS if hook.target not in HookRegistry._patched]
    if missing:
        raise ConfigError(
            f"SGLang did not install these hooks of sgl_vtensor: {', '.join(missing)}; "
            "its log above says why. The server stops rather than run without vTensor memory"
        )
