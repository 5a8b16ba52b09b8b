"""The seam: SGLang has every place that we hook into, as we use it, and a server without a hook does not run."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pkgutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from server import VTENSOR, environment, launch_command
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sgl_vtensor.errors import ConfigError
from sgl_vtensor.srt import compat

# Importing SGLang's modules brings a page of other packages' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

# What our hooks rely on: the parameters by which SGLang calls each target, and which of them they use.
PARAMETERS = {
    "ServerArgs.add_cli_args": ["parser"],
    "ServerArgs.from_cli_args": ["args"],
    "CudaSRTPlatform.get_kv_pool_cls": ["self", "kind"],
    "CudaSRTPlatform.get_paged_allocator_cls": ["self"],
    "DefaultPoolConfigurator._compute_cell_size": ["self", "kvc", "num_layers"],
    "KVCacheConfigurator._profile_available_bytes": ["self", "pre_model_load_memory"],
    "ModelRunner.alloc_memory_pool": ["self"],
    "schedule_policy._use_exact_chunk_fill": [],
    "allocation.alloc_for_extend": ["batch"],
    "allocation.alloc_for_decode": ["batch"],
    "TpModelWorker.forward_batch_generation": ["self", "batch"],
    "TpModelWorker.forward_batch_embedding": ["self", "batch"],
    "Scheduler.run_batch": ["self", "batch"],
    "Scheduler.on_idle": ["self"],
    "Scheduler._poll_timeout_aborts": ["self"],
    "Scheduler.process_input_requests": ["self", "recv_reqs"],
    "SchedulerInternalStateController._update_handlers": ["self"],
    "SchedulerInternalStateController.get_internal_state": ["self", "recv_req"],
    "common.set_uvicorn_logging_configs": ["server_args"],
    "TpModelWorker.get_worker_info": ["self"],
    "TokenizerManager._validate_one_request": ["self", "obj", "input_ids"],
}


def short(target: str) -> str:
    return ".".join(target.split(".")[-2:])


def test_every_hook_is_looked_at_here() -> None:
    assert sorted(short(hook.target) for hook in compat.HOOKS) == sorted(PARAMETERS)
    assert all(hook.why for hook in compat.HOOKS)


@pytest.mark.parametrize("hook", compat.HOOKS, ids=lambda hook: short(hook.target))
def test_target_takes_what_we_use(hook: compat.Hook) -> None:
    found = inspect.unwrap(pkgutil.resolve_name(hook.target))
    parameters = list(inspect.signature(found).parameters)
    wanted = PARAMETERS[short(hook.target)]
    if inspect.ismethod(found):
        parameters.insert(0, "cls")
        wanted = ["cls", *wanted]
    assert parameters[: len(wanted)] == wanted


def test_installed_sglang_is_accepted() -> None:
    compat.check_targets()


@pytest.mark.parametrize(
    "target", ["sglang.srt.managers.scheduler.Scheduler.gone", "sglang.srt.nowhere.Thing.method", "nothing.at.all"]
)
def test_missing_target_is_named(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    lost = dataclasses.replace(compat.HOOKS[0], target=target)
    monkeypatch.setattr(compat, "HOOKS", (*compat.HOOKS, lost))
    with pytest.raises(ConfigError, match=rf"lacks .*{target}; install sglang=="):
        compat.check_targets()


def test_other_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "SUPPORTED", ("0.0.1",))
    with pytest.raises(ConfigError, match=r"not supported.*install sglang==0\.0\.1"):
        compat.check_targets()


def test_hook_that_was_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {hook.target for hook in compat.HOOKS}
    monkeypatch.setattr(HookRegistry, "_patched", targets)
    compat.check_installed()
    lost = compat.HOOKS[7].target
    monkeypatch.setattr(HookRegistry, "_patched", targets - {lost})
    with pytest.raises(ConfigError, match=lost):
        compat.check_installed()


def test_hooks_register_with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: seen.update({target: (hook, kind)}))
    compat.register_hooks()
    assert seen == {hook.target: (hook.hook, hook.kind) for hook in compat.HOOKS}
    assert all(isinstance(kind, HookType) for _, kind in seen.values())


def test_half_a_plugin_has_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang swallows what a plugin raises; then ``--enable-vtensor`` must be unknown, not without effect."""
    from sgl_vtensor.srt import backend, flags, plugin, prefix

    def fail() -> None:
        raise RuntimeError("on purpose")

    for part, name in ((flags, "register_resolution"), (prefix, "register_tree"), (backend, "register_backend")):
        with monkeypatch.context() as patch:
            patch.setattr(flags, "register_resolution", lambda: None)
            patch.setattr(prefix, "register_tree", lambda: None)
            patch.setattr(backend, "register_backend", lambda: None)
            patch.setattr(compat, "register_hooks", lambda: pytest.fail("hooks were registered"))
            patch.setattr(part, name, fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                plugin.register()


def test_off_means_stock_classes() -> None:
    """The hooks are in place in every SGLang process, but without the switch they answer as SGLang would."""
    from sgl_vtensor.srt.host_platform import HostPlatform
    from sgl_vtensor.srt.pool import kv_pool_class, padded_cell_size, pool_budget

    platform = HostPlatform()
    assert platform.get_kv_pool_cls(kind="mha") is None
    assert platform.get_paged_allocator_cls() is None
    assert kv_pool_class(lambda platform, *, kind: f"stock {kind}", platform, kind="mha") == "stock mha"
    assert padded_cell_size(100, None, None, 2) is None
    assert pool_budget(lambda configurator, free: 7, SimpleNamespace(device="cuda", gpu_id=0), 1.0) == 7


@pytest.mark.parametrize(
    ("device", "integrated", "free_gib", "budget_gib"),
    [
        ("cuda", False, 78.5, 40.0),  # a context of its own
        ("cuda", False, 76.5, 40.0),
        ("cuda", False, 60.0, 40.0 + 0.5 * 20.0),
        ("cuda", True, 60.0, 40.0),
        ("cpu", False, 60.0, 40.0),
    ],
)
def test_a_pool_is_as_large_as_without_neighbours(
    monkeypatch: pytest.MonkeyPatch, device: str, integrated: bool, free_gib: float, budget_gib: float
) -> None:
    """80 GiB, of which ``--mem-fraction-static`` is a half; what others have counts as if it were free."""
    from sgl_vtensor.config import VTensorConfig
    from sgl_vtensor.srt import pool

    monkeypatch.setattr(pool, "active_config", VTensorConfig)
    monkeypatch.setattr(pool, "get_schedule", lambda: SimpleNamespace(mem_fraction_static=0.5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 << 30, 80 << 30))
    properties = SimpleNamespace(is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = pool.pool_budget(lambda configurator, free: 40 << 30, SimpleNamespace(device=device, gpu_id=0), free_gib)
    assert found == int(budget_gib * (1 << 30))


# A plugin whose hooks SGLang drops without a word in one process: the launching one, or one of its children.
_BROKEN = """
import os
from sglang.srt.plugins.hook_registry import HookRegistry

apply = HookRegistry._apply_target.__func__

def fail(cls, target, hooks):
    if target.endswith(os.environ["LOST_HOOK"]):
        raise RuntimeError("lost on purpose")
    return apply(cls, target, hooks)

HookRegistry._apply_target = classmethod(fail)
"""


LOST = ("Scheduler.on_idle", "ServerArgs.from_cli_args")
Starts = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def starts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starts]:
    """Side by side, since each takes one core."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "sitecustomize.py").write_text(_BROKEN)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(lost: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            launch_command(tiny_llama, [*VTENSOR, "--max-total-tokens=2048"]),
            env=environment({"PYTHONPATH": path, "LOST_HOOK": lost}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )

    with ThreadPoolExecutor(len(LOST)) as executor:
        yield {lost: executor.submit(run, lost) for lost in LOST}


@pytest.mark.server
@pytest.mark.parametrize("lost", LOST)
def test_server_without_a_hook_stops(starts: Starts, lost: str) -> None:
    done = starts[lost].result()
    assert done.returncode != 0
    assert "fired up" not in done.stdout
    assert "did not install these hooks" in done.stdout and lost in done.stdout
