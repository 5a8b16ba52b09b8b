"""How much of what is asked again is found, by page size, and what that takes, in pools that hold all of it and less.

No server and no GPU: the tree is the one that servers have, its pool's driver does nothing, and requests come, run a
token a step and end as users in a closed loop let them. Stock is SGLang's own tree, with pages of one token. A pool of
95% holds 95% of the tokens that stock would keep of all; ``held`` is a part of these, too. Nothing is timed:

    python bench/bench_prefix.py [--workloads chat agent] [--pages 64 128] [--pools 0.95] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import workloads
from plots import line_plot
from results import Results
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.srt.prefix import VTensorRadixCache
from sgl_vtensor.vmm.null import NullDriver

WORKLOADS = ("chat", "agent", "single", "shared-many")
STATES = ("cold", "warm")


@dataclass(eq=False)
class Request:
    """What the tree looks at of SGLang's, and where it is in its session."""

    slot: int
    tokens: array[int]
    session: workloads.Session
    turn: int
    computed: int = 0
    has_finished: bool = False
    prefix_len: int = 0
    last_node: Any = None
    lock: Any = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    origin_input_ids: array[int] = field(init=False)
    kv: Any = field(init=False)

    def __post_init__(self) -> None:
        self.origin_input_ids = self.tokens[:]
        self.kv = SimpleNamespace(req_pool_idx=self.slot, cache_protected_len=0, cache_inserted_len=0)

    @property
    def most_tokens(self) -> int:
        return len(self.origin_input_ids) + self.session.turns[self.turn].answer_tokens

    def finished(self) -> bool:
        return self.has_finished

    @property
    def full_untruncated_fill_ids(self) -> array[int]:
        return self.tokens[: self.computed]


class Stock:
    """SGLang's tree with pages of one token; of its pool only how many are free."""

    name = "sglang-p1"

    def __init__(self, num_tokens: int) -> None:
        self.free_tokens = num_tokens
        allocator: Any = SimpleNamespace(device="cpu", free_segment=self._free)
        self.tree = RadixCache(CacheInitParams(False, None, allocator, 1))  # type: ignore[arg-type]

    def _free(self, slots: torch.Tensor, **_: Any) -> None:
        self.free_tokens += len(slots)

    def begin(self, request: Request) -> None:
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(request.tokens[:-1])))
        request.prefix_len = request.computed = request.kv.cache_protected_len = found.device_prefix_len
        request.last_node = found.last_device_node
        request.lock = self.tree.lock(request.last_node)

    def turn_away(self, request: Request) -> None:
        self.tree.unlock(request.lock)

    def room_tokens(self) -> int:
        return self.free_tokens + self.tree.evictable_size()

    def still_needs(self, request: Request) -> int:
        return request.most_tokens - request.computed

    def compute(self, request: Request, len_tokens: int) -> None:
        new = len_tokens - request.computed
        if new > self.free_tokens:
            self.tree.evict(EvictParams(num_tokens=new - self.free_tokens))
        assert new <= self.free_tokens, "what was promised is not there"
        self.free_tokens -= new
        request.computed = len_tokens

    def checkpoint(self, request: Request) -> None:
        tokens = request.full_untruncated_fill_ids
        inserted = self._insert(tokens)
        if request.has_finished:  # so that eviction can drop the answer and keep the prompt
            self._insert(request.origin_input_ids)
        self.free_tokens += inserted.prefix_len - request.kv.cache_protected_len
        self.tree.unlock(request.lock)
        request.last_node, request.kv.cache_protected_len = inserted.last_device_node, len(tokens)
        request.lock = self.tree.lock(request.last_node)

    def _insert(self, tokens: array[int]) -> Any:
        value = torch.empty(len(tokens), dtype=torch.int8)
        return self.tree.insert(InsertParams(key=RadixKey(tokens), value=value, inserted_len=0, priority=0))

    def end(self, request: Request) -> None:
        request.has_finished = True
        self.checkpoint(request)
        self.tree.unlock(request.lock)

    def held_tokens(self) -> int:
        """That the tree's pages could hold."""
        held: int = self.tree.evictable_size() + self.tree.protected_size()
        return held


class Ours:
    """Our tree over our pool, for a Llama-8B shape."""

    def __init__(self, num_tokens: int, *, page_tokens: int, num_slots: int, longest: int) -> None:
        self.page_tokens = page_tokens
        self.name = f"vtensor-p{page_tokens}"
        layout = plan_layout(
            num_layers=32, num_kv_heads=8, head_dim=128, v_head_dim=128, itemsize=2, granule_bytes=2 << 20,
            page_tokens=page_tokens,
        )  # fmt: skip
        pages = Pages(NullDriver(2 << 20), layout, num_tokens // page_tokens)
        self.pool = VTensorPool(pages, num_slots=num_slots, max_len_tokens=longest + page_tokens)
        allocator: Any = SimpleNamespace(
            device="cpu", pool=self.pool, size=num_tokens, free_segment=lambda run, **_: self.pool.free(run.pages)
        )
        table: Any = SimpleNamespace(write=lambda *_: None)
        self.tree = VTensorRadixCache(CacheInitParams(False, table, allocator, page_tokens))

    def begin(self, request: Request) -> None:
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(request.tokens[:-1])))
        protected = found.cache_protected_len
        request.prefix_len = request.computed = found.device_prefix_len
        request.kv.cache_protected_len = request.prefix_len if protected is None else protected
        request.last_node = found.last_device_node
        request.lock = self.tree.lock(request.last_node)
        pages = self.tree.prefix_pages(request)[: request.kv.cache_protected_len // self.page_tokens]
        self.pool.open(request.slot, pages, request.prefix_len)

    def turn_away(self, request: Request) -> None:
        self.tree.unlock(request.lock)
        self.pool.close(request.slot)

    def room_tokens(self) -> int:
        evictable: int = self.tree.evictable_size()
        return self.pool.pages.num_available * self.page_tokens + evictable

    def still_needs(self, request: Request) -> int:
        has = int(self.pool.num_wanted[request.slot])
        return (self.pool.layout.num_pages(request.most_tokens) - has) * self.page_tokens

    def compute(self, request: Request, len_tokens: int) -> None:
        needed = self.pool.layout.num_pages(len_tokens) - int(self.pool.num_wanted[request.slot])
        if (missing := needed - self.pool.pages.num_available) > 0:
            self.tree.evict(EvictParams(num_tokens=missing * self.page_tokens))
        assert self.pool.grow([request.slot], [len_tokens]), "what was promised is not there"
        request.computed = len_tokens

    def checkpoint(self, request: Request) -> None:
        self.tree.checkpoint(request, up_to=request.computed)

    def end(self, request: Request) -> None:
        request.has_finished = True
        self.checkpoint(request)
        self.tree.free_kv_row(request.kv, [(request.kv.cache_protected_len, request.computed)])
        self.tree.unlock(request.lock)
        self.pool.close(request.slot)

    def held_tokens(self) -> int:
        return len(self.tree.all_pages()) * self.page_tokens


def play(world: Stock | Ours, workload: workloads.Workload) -> float:
    """All sessions in a closed loop; the share of prompt tokens that were found."""
    to_come = deque(workload.sessions)
    waiting: deque[tuple[workloads.Session, int, array[int]]] = deque()
    running: list[Request] = []
    slots = list(range(1, workload.users + 1))
    found_tokens = prompt_tokens = 0

    def next_session() -> None:
        if to_come:
            session = to_come.popleft()
            waiting.append((session, 0, array("q", _ids(session.system))))

    for _ in range(workload.users):
        next_session()
    while waiting or running:
        while waiting:
            session, turn, history = waiting[0]
            request = Request(slots[-1], history + array("q", _ids(session.turns[turn].content)), session, turn)
            world.begin(request)
            promised = sum(world.still_needs(other) for other in running)
            if running and world.still_needs(request) + promised > world.room_tokens():
                world.turn_away(request)
                break
            waiting.popleft()
            slots.pop()
            found_tokens += request.prefix_len
            prompt_tokens += len(request.tokens)
            world.compute(request, len(request.tokens))
            world.checkpoint(request)
            running.append(request)
        for request in list(running):
            answer = _ids(request.session.turns[request.turn].scripted)
            told = len(request.tokens) - len(request.origin_input_ids) + 1
            if told < len(answer):  # the last token is not computed
                request.tokens.append(answer[told - 1])
                world.compute(request, len(request.tokens))
                continue
            world.end(request)
            running.remove(request)
            slots.append(request.slot)
            if request.turn + 1 < len(request.session.turns):
                waiting.append((request.session, request.turn + 1, request.origin_input_ids + array("q", answer)))
            else:
                next_session()
    return found_tokens / prompt_tokens


def _ids(content: workloads.Content) -> tuple[int, ...]:
    assert not isinstance(content, str)
    return content


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads", nargs="+", default=WORKLOADS, choices=workloads.TABLE, help="default: %(default)s"
    )
    parser.add_argument("--pages", nargs="+", type=int, default=(16, 64, 128, 256), help="tokens; default: %(default)s")
    parser.add_argument("--pools", nargs="+", type=float, default=(1.5, 0.95, 0.6), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths and numbers (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="no rows in bench/results")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the rows, and for plots")
    options = parser.parse_args(argv)
    results = Results("prefix", options.out, keep=not options.no_record)
    for name in options.workloads:
        played = [workloads.build(name, seed + 1, scale=options.scale) for seed in range(options.seeds)]
        kept = [_kept_of_all(workload) for workload in played]
        for share in options.pools:
            lines: dict[str, list[tuple[float, float]]] = {state: [] for state in STATES}
            for page_tokens in (1, *options.pages):
                figures: dict[str, list[float]] = {}
                for workload, tokens in zip(played, kept, strict=True):
                    impl, found = measure(workload, tokens, share, page_tokens)
                    for metric, value in found.items():
                        figures.setdefault(metric, []).append(value)
                middles = {metric: statistics.median_high(values) for metric, values in figures.items()}
                shown = ", ".join(f"{metric} {value:.3f}" for metric, value in middles.items())
                print(f"{name}, pool of {share:.0%}: {impl:13} {shown}", flush=True)
                for metric, values in figures.items():
                    results.add(f"{played[0].case} pool of {share:.0%}", impl, metric, "1", values)
                for state in STATES:
                    lines[state].append((page_tokens, 100 * middles[f"hits {state}"]))
            if options.out is not None:
                title = f"{name}, a pool of {share:.0%} of its tokens"
                line_plot(options.out / f"prefix-{name}-{share:.2f}.svg", title, "tokens a page", "% found", lines)


def world_of(workload: workloads.Workload, num_tokens: int, page_tokens: int) -> Stock | Ours:
    """With pages of one token SGLang's tree, else ours."""
    if page_tokens == 1:
        return Stock(num_tokens)
    return Ours(num_tokens, page_tokens=page_tokens, num_slots=workload.users, longest=workload.longest)


def measure(
    workload: workloads.Workload, kept_tokens: int, share: float, page_tokens: int
) -> tuple[str, dict[str, float]]:
    """Hits when nothing is cached, and when all has been asked before; then what the pages that are kept could hold."""
    world = world_of(workload, int(share * kept_tokens), page_tokens)
    found = {f"hits {state}": play(world, workload) for state in STATES}
    return world.name, found | {"held": world.held_tokens() / kept_tokens}


def _kept_of_all(workload: workloads.Workload) -> int:
    """Tokens that stock keeps where nothing is evicted."""
    world = Stock(1 << 40)
    play(world, workload)
    return world.held_tokens()


if __name__ == "__main__":
    main()
