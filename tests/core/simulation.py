"""A seeded stand-in for SGLang's scheduler over the real pool and the host driver.

Kernels run late: a launch notes what it will read and write, and touches the bytes only when its fence is waited for
or when the timing dice say so, in stream order. So every way in which unmapping, releasing, remapping or reuse can
overtake a kernel can happen, and does. What happens and when kernels run are decided by separate dice.

``python -m tests.core.simulation --seeds 1000000 --steps 60 --record FILE`` for a long run, which goes on where it was
ended; ``--seed S --timing T`` to replay one seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sgl_vtensor.core.checks import check_tables
from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import PADDING_PAGE, Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.rows import PADDING_ROW
from sgl_vtensor.core.trace import RecordedPool
from sgl_vtensor.errors import OutOfMemory
from sgl_vtensor.vmm.base import Mapping
from sgl_vtensor.vmm.host import HostDriver

Marks = npt.NDArray[np.int64]
LAYERS = 2
NO_TOKEN = -1
"""Fills the last page of a request that has ended; no request has it."""


@dataclass(frozen=True)
class World:
    """The sizes of one simulated server, drawn from its seed."""

    page_tokens: int
    num_pages: int
    num_slots: int
    num_rows: int
    max_len: int
    chunk_tokens: int
    overlap: bool
    mixed: bool
    max_mappings: int | None
    alphabet: int
    reserve: int
    copies: bool
    """Whether hits are token-granular: the beginning of a cached page is copied into the request's own."""
    homes: bool
    """Whether a launch may read pages at their homes where rows are not mapped."""

    @classmethod
    def draw(cls, dice: random.Random) -> World:
        page_tokens = dice.choice((1, 2, 3, 4, 8))
        max_pages = dice.randint(4, 10)
        num_slots = dice.randint(2, 6)
        return cls(
            page_tokens=page_tokens,
            num_pages=dice.randint(max_pages, 5 * max_pages),
            num_slots=num_slots,
            num_rows=num_slots + 1 + dice.choice((0, 1, num_slots, 3 * num_slots)),
            max_len=page_tokens * max_pages - dice.randrange(page_tokens),
            chunk_tokens=dice.randint(page_tokens, 4 * page_tokens + 1),
            overlap=dice.random() < 0.8,
            mixed=dice.random() < 0.3,
            max_mappings=dice.choice((None, None, 3 * max_pages, 6 * max_pages)),
            alphabet=dice.choice((1, 2, 3)),
            reserve=dice.choice((0, 0, 1, num_slots)),
            copies=dice.random() < 0.7,
            homes=dice.random() < 0.5,
        )


@dataclass(eq=False)
class Node:
    """One page of the tree."""

    key: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    locks: int = 0
    used_at: int = 0


class Tree:
    """SGLang's radix tree with one page a node: match, insert, lock, evict the least recently used leaf."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.root = Node((), PADDING_PAGE, None)
        self.nodes: dict[int, Node] = {}  # by page
        self._clock = 0

    def match(self, tokens: Sequence[int]) -> Node:
        node, self._clock = self.root, self._clock + 1
        for key in self._keys(tokens):
            if key not in node.children:
                break
            node = node.children[key]
            node.used_at = self._clock
        return node

    def peek(self, tokens: Sequence[int]) -> list[int]:
        """The pages that ``match`` would find, untouched."""
        node, pages = self.root, []
        for key in self._keys(tokens):
            if key not in node.children:
                break
            node = node.children[key]
            pages.append(node.page)
        return pages

    def closest(self, node: Node, rest: Sequence[int]) -> tuple[Node, int]:
        """The page behind ``node`` that begins most like ``rest``, and how many tokens they share."""
        best, most = node, 0
        for key in sorted(node.children):
            shared = next((at for at, (a, b) in enumerate(zip(key, rest, strict=False)) if a != b), len(rest))
            if shared > most:
                best, most = node.children[key], shared
        best.used_at = self._clock
        return best, most

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> Node:
        """Keep these pages where the tree has none yet; returns the end of the path, which may hold others."""
        node, self._clock = self.root, self._clock + 1
        for key, page in zip(self._keys(tokens), pages, strict=True):
            if key not in node.children:
                assert page not in self.nodes, f"page {page} is in the tree twice"
                node.children[key] = self.nodes[page] = Node(key, page, node)
            node = node.children[key]
            node.used_at = self._clock
        return node

    def path(self, node: Node) -> list[Node]:
        nodes = []
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def lock(self, node: Node, change: int = 1) -> None:
        for step in self.path(node):
            step.locks += change
            assert step.locks >= 0, f"page {step.page} is unlocked too often"

    def num_evictable(self) -> int:
        return sum(node.locks == 0 for node in self.nodes.values())

    def evict(self) -> int | None:
        leaves = [node for node in self.nodes.values() if not node.children and not node.locks]
        if not leaves:
            return None
        leaf = min(leaves, key=lambda node: (node.used_at, node.page))
        assert leaf.parent is not None
        del leaf.parent.children[leaf.key], self.nodes[leaf.page]
        return leaf.page

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self.page_tokens
        return (tuple(tokens[at : at + size]) for at in range(0, len(tokens) // size * size, size))


@dataclass(eq=False)
class Request:
    """``tokens`` holds what launches have sampled, too, ``num_out`` counts only what the host has seen of it."""

    number: int
    tokens: list[int]
    num_prompt: int
    max_new: int
    node: Node
    num_out: int = 0
    slot: int = 0
    computed: int = 0
    """Tokens whose keys and values are, or will be once the launches have run, in the row."""
    protected: int = 0
    """Tokens whose pages the tree owns."""
    life: int = 0
    """Grows with each retraction: results of launches from an earlier life are dropped."""
    aborted: bool = False
    done: bool = False

    @property
    def num_known(self) -> int:
        return self.num_prompt + self.num_out


@dataclass
class Part:
    """One request in one launch: it writes ``[start, stop)`` and reads ``[0, stop)``."""

    request: Request
    start: int
    stop: int
    is_decode: bool = False
    life: int = 0
    samples: bool = False


def marks_of(tokens: Sequence[int]) -> Marks:
    """What a token's keys and values depend on, as one number: itself and every token before it. Never 0."""
    mark, marks = 1, np.empty(len(tokens), dtype=np.int64)
    for position, token in enumerate(tokens):
        mark = (mark * 6364136223846793005 + (token + 1) * 1442695040888963407) % (1 << 62) | 1
        marks[position] = mark
    return marks


class Kernel:
    """One launch, and its fence. It looks at no table of the pool's after it has been made, as a real kernel would."""

    def __init__(self, server: Server, parts: list[Part]) -> None:
        pool, size = server.pool, server.world.page_tokens
        self.server = server
        self.parts = parts
        self.started = False
        self.fresh = list(pool.take_fresh())
        self.copies, server.copies = server.copies, []
        slots, marks = [], []
        self.reads: list[tuple[int, Marks]] = []
        self.home_reads: list[tuple[Marks, Marks]] = []  # token slots, what is there
        reads_homes = not pool.is_synced([part.request.slot for part in parts])
        assert server.world.homes or not reads_homes, "a launch reads rows that are not mapped"
        self.tails: list[tuple[int, int]] = []  # page, bytes of it that have tokens
        self.mappings: list[tuple[int, Mapping]] = []
        written: set[int] = set()
        for part in parts:
            slot, request = part.request.slot, part.request
            row = int(pool.row_of_slot[slot])
            assert row != PADDING_ROW, "a running request has no row"
            expected = marks_of(request.tokens[: part.stop])
            positions = np.arange(part.start, part.stop)
            pages = pool.wanted[slot, positions // size].astype(np.int64)
            slots.append(pages * size + positions % size)
            marks.append(expected[part.start :])
            written.update(pages.tolist())
            if part.stop % size:
                used = part.stop % size * pool.layout.token_stride_bytes
                self.tails.append((int(pool.wanted[slot, part.stop // size]), used))
            if reads_homes:
                tokens = np.arange(part.stop)
                pages = pool.wanted[slot, tokens // size].astype(np.int64)
                self.home_reads.append((pages * size + tokens % size, expected))
                self._note(pool.pages.home(page) for page in dict.fromkeys(pages.tolist()))
            else:
                self.reads.append((row, expected))
                self._note(pool.rows.address(row, position) for position in range(-(-part.stop // size)))
        assert not written & server.tree.nodes.keys(), "a launch writes to a page that the tree shares"
        assert PADDING_PAGE not in written, "a launch writes a request's tokens to the padding page"
        copied = {page for source, target, _ in self.copies for page in (source, target)}
        self._note(pool.pages.home(page) for page in sorted(written.union(self.fresh, copied)))
        self.slots, self.marks = np.concatenate(slots), np.concatenate(marks)

    def synchronize(self) -> None:
        self.server.run_through(self)

    def start(self) -> None:
        """Zero new pages, copy cached tokens, write the new ones through the homes."""
        self._check_mappings("writes")
        server = self.server
        for page in self.fresh:
            server.page_bytes[page] = 0
        for source, target, num_tokens in self.copies:
            num_bytes = num_tokens * server.pool.layout.token_stride_bytes
            server.page_bytes[target, :num_bytes] = server.page_bytes[source, :num_bytes]
        for view in server.home_marks:
            view[self.slots] = self.marks
        self.started = True

    def finish(self) -> None:
        """Read every request from its first token to its last, through its row or at the homes."""
        self._check_mappings("reads")
        for row, expected in self.reads:
            for view in self.server.row_marks:
                found = view[row, : len(expected)]
                if not np.array_equal(found, expected):
                    at = int(np.flatnonzero(found != expected)[0])
                    raise AssertionError(f"row {row} shows {found[at]} at token {at}, not {expected[at]}")

        for page, used in self.tails:
            assert not self.server.page_bytes[page, used:].any(), f"page {page} is not zero behind the last token"
        for slots, expected in self.home_reads:
            for view in self.server.home_marks:
                assert np.array_equal(view[slots], expected), f"homes show {view[slots]}, not {expected}"

    def _note(self, addresses: Iterator[int]) -> None:
        for address in addresses:
            mapping = self.server.driver._mappings.get(address)
            assert mapping is not None, f"{self.server.place(address)} is not mapped when a launch needs it"
            self.mappings.append((address, mapping))

    def _check_mappings(self, verb: str) -> None:
        """A real kernel would fault, or read a page half replaced; here it would end the process."""
        current = self.server.driver._mappings
        for address, mapping in self.mappings:
            if current.get(address) is not mapping:
                raise AssertionError(f"{self.server.place(address)} was unmapped before a kernel {verb} it")


class Server:
    """SGLang's scheduler, as far as the pool can tell: the same calls in the same order.

    Args:
        seed: what happens.
        timing: when kernels run. It must make no difference to any decision of the pool's.
        checks: look at all tables after each step; without, only the kernels notice that something is wrong.
        trace: a file to record the pool to.
    """

    def __init__(self, seed: int, timing: int = 0, *, checks: bool = True, trace: Path | None = None) -> None:
        self.seed, self.timing, self.checks = seed, timing, checks
        self.dice = random.Random(seed)
        self.world = world = World.draw(self.dice)
        self.clock = random.Random(f"{seed}/{timing}")
        self.ahead = random.Random(f"{seed}/ahead")
        self.eagerness = self.clock.choice((0.0, 0.1, 0.5))
        self.driver = HostDriver(capacity_bytes=1 << 30)
        layout = plan_layout(
            num_layers=LAYERS,
            num_kv_heads=1,
            head_dim=2,
            v_head_dim=2,
            itemsize=8,
            granule_bytes=self.driver.granularity,
            page_tokens=world.page_tokens,
        )
        self.page_size_bytes = layout.page_bytes
        make: Callable[..., VTensorPool] = VTensorPool if trace is None else partial(RecordedPool, path=trace)
        self.pool = make(
            Pages(self.driver, layout, world.num_pages),
            num_slots=world.num_slots,
            max_len_tokens=world.max_len,
            num_rows=world.num_rows,
            max_mappings=world.max_mappings,
        )
        home_k, home_v = (self.pool.pages.home_views(layer, torch.int64)[layer] for layer in range(LAYERS))
        row_k, row_v = (self.pool.row_views(layer, torch.int64)[layer] for layer in range(LAYERS))
        self.home_marks = [home_k.numpy()[:, 0, 0], home_v.numpy()[:, -1, -1]]
        self.row_marks = [row_k.numpy()[:, :, 0, 0], row_v.numpy()[:, :, -1, -1]]
        self.page_bytes = self.pool.pages.tensor().numpy().reshape(world.num_pages + 1, -1)
        self.padding = [self.driver._mappings[address] for address in self._padding_addresses()]
        self.tree = Tree(world.page_tokens)
        self.copies: list[tuple[int, int, int]] = []
        """(page, request's own page, tokens) to be copied by the next launch."""
        self.free_slots = list(range(world.num_slots, 0, -1))
        self.waiting: list[Request] = []
        self.joining: list[Request] = []
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.last: Kernel | None = None
        self.stream: deque[Kernel] = deque()
        self.prompts: list[list[int]] = [[]]
        self.arriving = True
        self.steps = 0
        self.digest = 0
        """Of every decision: which rows, which pages, in which launch."""
        self.seen: Counter[str] = Counter()

    # Running it.

    def run(self, num_steps: int) -> Server:
        """So many steps, and then to the end: nothing may be left over."""
        try:
            for _ in range(num_steps):
                self.step()
            self.end()
        except Exception as error:
            world = self.world
            error.add_note(f"seed {self.seed}, timing {self.timing}, step {self.steps}: {world}")
            error.add_note(f"replay: python -m tests.core.simulation --seed {self.seed} --timing {self.timing}")
            raise
        finally:
            self.stream.clear()
            self.driver.close()
            if isinstance(self.pool, RecordedPool):
                self.pool.close_trace()
        return self

    def step(self) -> None:
        self.steps += 1
        self._tick()
        if self.arriving:
            self._happen()
            self._squeeze()
        parts = self._next_batch()
        kernel = self._launch(parts) if parts else None
        self._map_ahead()
        self._tick()
        if self.arriving:
            self._squeeze()
        if not self.world.overlap and kernel:
            self._process(kernel)
        elif self.last:
            self._process(self.last)
        elif kernel is None:
            self.pool.drain(in_flight=0)
            self._idle()
        self.last = kernel if self.world.overlap else None
        if self.checks:
            self.check()

    def end(self) -> None:
        """Let everything come to its end, give all memory back, and look for what was lost."""
        self.arriving = False
        for request in [*self.waiting, *self.running, *self.joining, *([self.chunked] if self.chunked else [])]:
            request.aborted = True
        for _ in range(10):
            self.step()
        assert not self.running and not self.joining and self.chunked is None and not self.stream
        self._check_tree_bytes()
        self._evict(lambda: False)
        assert not self.tree.nodes, "locks are left"
        pages = self.pool.pages
        assert pages.num_available == pages.num_pages, f"{pages.num_in_use} pages are in use by nobody"
        assert not pages.fenced, f"pages {[*pages.fenced]} are fenced for nobody"
        self.check()
        self.pool.shrink(0)
        assert pages.num_backed == 0, f"{pages.num_backed} free pages could not be released"
        self.check()
        self.pool.shutdown()
        driver = self.driver
        left = (driver.num_mappings, driver.physical_bytes, driver.num_handles, driver.num_reservations)
        assert left == (0, 0, 0, 0), f"mappings, bytes, handles, reservations left: {left}"

    def run_through(self, kernel: Kernel) -> None:
        while kernel in self.stream:
            self._advance()

    def _advance(self) -> None:
        kernel = self.stream[0]
        if not kernel.started:
            kernel.start()
            return
        kernel.finish()
        self.stream.popleft()

    def _tick(self) -> None:
        """The GPU gets on with its work, or not."""
        while self.stream and self.clock.random() < self.eagerness:
            self._advance()

    # What happens to a server.

    def _happen(self) -> None:
        """Clients come and go."""
        dice = self.dice
        if dice.random() < 0.4 and len(self.waiting) < 8:
            self._arrive()
        if dice.random() < 0.05:
            alive = [*self.waiting, *self.running, *self.joining, *([self.chunked] if self.chunked else [])]
            if alive:
                dice.choice(alive).aborted = True
                self.seen["abort"] += 1
        self._tick()

    def _squeeze(self) -> None:
        """Memory is asked for, given back, limited, or taken by a neighbour."""
        dice, world, pool = self.dice, self.world, self.pool
        if dice.random() < 0.05:
            self.seen["shrink"] += 1
            pool.shrink(dice.choice((0, 1, world.num_pages // 2)))
        if dice.random() < 0.05:
            self.seen["reserve"] += 1
            with contextlib.suppress(OutOfMemory):
                pool.prepare(dice.randint(1, 4))
        if dice.random() < 0.02:
            pool.pages.limit_pages = dice.choice((world.num_pages, dice.randint(1, world.num_pages)))
        if dice.random() < 0.02:
            held = self.driver.physical_bytes
            self.driver.capacity_bytes = held + dice.choice((0, 1, 2, world.num_pages)) * self.page_size_bytes
        self._tick()

    def _arrive(self) -> None:
        dice, world = self.dice, self.world
        tokens = list(dice.choice(self.prompts))
        tokens = tokens[: dice.randint(0, len(tokens))] if dice.random() < 0.7 else tokens
        longest = world.max_len - 1
        for _ in range(dice.choice((0, 1, 2, 2 * world.page_tokens))):
            tokens.append(dice.randrange(world.alphabet))
        tokens = tokens[: dice.choice((longest, longest, longest // 2))] or [0]
        self.prompts = [*self.prompts[-6:], tokens]
        max_new = dice.randint(1, max(1, min(world.max_len - len(tokens), 4 * world.page_tokens)))
        self.seen["arrival"] += 1
        for _ in range(dice.choice((1, 1, 2))):  # twins compute the same pages at the same time
            self.waiting.append(Request(self.seen["request"], list(tokens), len(tokens), max_new, self.tree.root))
            self.seen["request"] += 1

    def _idle(self) -> None:
        self.seen["idle"] += 1
        self._check_tree_bytes()
        # At the end no flush hides what was lost.
        if (
            self.arriving
            and self.dice.random() < 0.3
            and not (self.waiting or self.running or self.joining or self.chunked)
        ):
            self.seen["flush"] += 1
            self.tree = Tree(self.world.page_tokens)
            self.pool.reset()

    # Which batch comes next.

    def _next_batch(self) -> list[Part]:
        self.waiting = [request for request in self.waiting if not request.aborted]
        if self.chunked and self.chunked.aborted:
            self.seen["chunked abort"] += 1
            self._release(self.chunked, keep=False)
            self.chunked = None
        if self.chunked:
            self._checkpoint(self.chunked, self.chunked.computed)  # the chunk may be running
        self._tick()
        self.running = [request for request in self.running + self.joining if not request.done]
        self.joining = []
        parts = self._prefill()
        if not parts:
            return self._decode()
        if self.world.mixed:
            parts += [Part(request, request.computed, request.computed + 1, True) for request in self.running]
        return parts

    def _prefill(self) -> list[Part]:
        """A chunk of the request that is under way, then as many waiting ones as fit."""
        size, parts = self.world.page_tokens, []
        room = self.world.chunk_tokens
        self._promised = self._crossing(self.running) if self.world.mixed else 0
        if self.chunked:
            request = self.chunked
            stop = self._fit(request, request.computed, room, beyond_limit=True)
            if stop > request.computed:
                parts.append(Part(request, request.computed, stop))
                room -= stop - request.computed
                self.chunked = None if stop == len(request.tokens) else request
            elif not self.running and not self.last:
                request.aborted = True
        while self.waiting and not self.chunked and room > 0 and len(self.free_slots) > 0:
            request = self.waiting[0]
            node = self.tree.match(request.tokens[: len(request.tokens) - 1])
            protected = start = len(self.tree.path(node)) * size
            if self.world.copies:
                node, shared = self.tree.closest(
                    node, request.tokens[start : min(start + size, len(request.tokens) - 1)]
                )
                start += shared
            self.tree.lock(node)  # with the page that is copied from
            stop = self._fit(request, start, room)
            if stop == start:
                self.tree.lock(node, -1)
                if not parts and not self.running and not self.last and room == self.world.chunk_tokens:
                    self.waiting.pop(0)  # it never fits: SGLang answers with an error
                break
            self.waiting.pop(0)
            self.seen["hit pages"] += start // size
            self.seen["copied tokens"] += start - protected
            request.node, request.computed, request.protected = node, start, protected
            request.slot = self.free_slots.pop()
            self.pool_open(request, stop)
            parts.append(Part(request, start, stop))
            room -= stop - start
            if stop < len(request.tokens):
                self.chunked = request
        return parts

    def pool_open(self, request: Request, stop: int) -> None:
        pages = [node.page for node in self.tree.path(request.node)][: request.protected // self.world.page_tokens]
        self.pool.drain(in_flight=1 if self.world.overlap and self.last else 0)
        self.pool.open(request.slot, pages, stop)

    def _fit(self, request: Request, start: int, room: int, *, beyond_limit: bool = False) -> int:
        """Where a chunk from ``start`` on ends: at the last token, or at a page's edge. ``start``: no memory.

        The page of ``start`` is new, also where its beginning is copied.
        """
        size, total = self.world.page_tokens, len(request.tokens)
        stop = total if total - start <= room else (start + room) // size * size
        free = self._budget(beyond_limit) - self._promised - self.world.reserve
        stop = min(stop, (start // size + max(free, 0)) * size)
        if stop > start:
            self._promised += -(-stop // size) - start // size
        return max(stop, start)

    def _budget(self, beyond_limit: bool) -> int:
        """``VTensorPrefillBudget``, in pages."""
        pages = self.pool.pages
        room = pages.most_in_use(beyond_limit=beyond_limit) - pages.num_in_use
        return min(pages.num_available, room) + self.tree.num_evictable()

    def _decode(self) -> list[Part]:
        while self.running and not self._decode_fits():
            victim = self.running.pop()
            self.seen["retract"] += 1
            self._release(victim, keep=False)
            victim.life += 1
            if self.running:
                del victim.tokens[victim.num_known :]
                victim.computed = victim.protected = 0
                victim.done = False
                self.waiting.insert(0, victim)
        return [Part(request, request.computed, request.computed + 1, True) for request in self.running]

    def _decode_fits(self) -> bool:
        need, pool = self._crossing(self.running), self.pool
        self._evict(lambda: pool.pages.num_available >= need)
        if pool.pages.num_available < need:
            return False
        is_last = len(self.running) == 1
        secure = lambda: pool.secure(need, beyond_limit=is_last)  # noqa: E731
        return secure() or self._evict(secure)

    def _crossing(self, requests: list[Request]) -> int:
        return sum(request.computed % self.world.page_tokens == 0 for request in requests)

    def _evict(self, succeeds: Callable[[], bool]) -> bool:
        while not succeeds():
            page = self.tree.evict()
            if page is None:
                return False
            self.seen["evicted pages"] += 1
            self.pool.free([page])
            self._tick()
        return True

    # A launch and its results.

    def _launch(self, parts: list[Part]) -> Kernel:
        pool, size = self.pool, self.world.page_tokens
        pool.drain(in_flight=1 if self.world.overlap and self.last else 0)
        for kind in (False, True):
            some = [p for p in parts if p.is_decode is kind and (p.start % size == 0 or not p.is_decode)]
            slots, stops = [p.request.slot for p in some], [p.stop for p in some]
            need = sum(-(-p.stop // size) - (-(-p.start // size) if kind else p.start // size) for p in some)
            self._evict(lambda need=need: pool.pages.num_available >= need)  # type: ignore[misc]
            grow = lambda slots=slots, stops=stops: pool.grow(slots, stops, beyond_limit=True)  # noqa: E731
            before = pool.num_wanted[slots]
            assert grow() or self._evict(grow), "SGLang was promised pages that are not there"
            ends = [(p.request.slot, p.stop // size) for p in some if p.stop % size]
            begun = dict(zip(slots, before.tolist(), strict=True))
            pool.clear([int(pool.wanted[slot, position]) for slot, position in ends if position >= begun[slot]])
            self.copies += [copy for part in some if (copy := self._copy_for(part))]
        batch = np.array([p.request.slot for p in parts], dtype=np.int32)
        if not self.world.homes or self.dice.random() < 0.4:
            self._map(batch)
        for part in parts:
            part.life = part.request.life
            part.samples = part.stop == len(part.request.tokens)
        kernel = Kernel(self, parts)
        pool.launch(kernel)
        self.stream.append(kernel)
        rows = pool.row_of_slot[batch].tolist()
        self.digest = zlib.crc32(repr((rows, kernel.slots.tolist(), kernel.copies)).encode(), self.digest)
        self.seen["launch"] += 1
        self.seen["launch at homes"] += bool(kernel.home_reads)
        if self.world.homes and self.dice.random() < 0.4:
            self._map(batch)  # behind the launch
        for part in parts:
            request = part.request
            request.computed = part.stop
            if part.samples:
                request.tokens.append(self.dice.randrange(self.world.alphabet))
                if not part.is_decode:
                    self.joining.append(request)
        return kernel

    def _map(self, slots: npt.NDArray[np.int32]) -> None:
        if self.pool.ensure(slots):
            self._check_mapping_limit()

    def _map_ahead(self) -> None:
        """Behind the launch, for requests that wait: no page is touched, nobody waits, and no more calls are made."""
        pool, dice = self.pool, self.ahead
        if dice.random() < 0.4:
            return
        prefixes = [self.tree.peek(request.tokens[:-1]) for request in self.waiting[: dice.randint(1, 4)]]
        at_most = dice.choice((1, 2, 3, 8, 30))
        calls, settled, backed = self.driver.calls.copy(), pool.epochs.settled, pool.pages.num_backed
        mapped = pool.map_ahead(prefixes, at_most=at_most)
        made = sum(self.driver.calls.values()) - sum(calls.values())
        assert mapped <= made <= at_most, f"{mapped} positions were mapped ahead in {made} calls, {at_most} at most"
        assert (pool.epochs.settled, pool.pages.num_backed) == (settled, backed), "more was done than to map"
        limit = pool.rows.max_mappings
        assert not mapped or limit is None or pool.rows.num_mappings <= limit, "over the limit of mappings"
        self.seen["mapped ahead"] += mapped

    def _copy_for(self, part: Part) -> tuple[int, int, int] | None:
        """Where a request begins inside a page: that page's beginning, into its own page."""
        at, num_tokens = divmod(part.start, self.world.page_tokens)
        if part.is_decode or not num_tokens:
            return None
        return self.tree.path(part.request.node)[at].page, int(self.pool.wanted[part.request.slot, at]), num_tokens

    def _process(self, kernel: Kernel) -> None:
        """The host sees what a launch sampled. Under overlap the next launch, with all its requests, is under way."""
        kernel.synchronize()
        for part in kernel.parts:
            request = part.request
            self._tick()
            if part.life != request.life or request.done or not part.samples:
                continue
            request.num_out += 1
            if request.aborted:
                self._release(request, keep=self.dice.random() < 0.5)
            elif request.num_out >= request.max_new or self.dice.random() < 0.05:
                self.seen["finish"] += 1
                self._release(request, keep=True, unsaid=self.dice.choice((0, 0, 0, 1, 3)))
            elif not part.is_decode:
                self._checkpoint(request, part.stop)

    def _checkpoint(self, request: Request, up_to: int, *, ended: bool = False) -> None:
        """``VTensorRadixCache.checkpoint``."""
        size, pool = self.world.page_tokens, self.pool
        tokens = request.tokens[:up_to]
        if ended and self.world.copies:
            tokens += [NO_TOKEN] * (-up_to % size)
        num_pages, first = len(tokens) // size, request.protected // size
        node = self.tree.insert(tokens[: num_pages * size], pool.pages_of(request.slot, 0, num_pages))
        kept = [step.page for step in self.tree.path(node)]
        assert len(kept) == num_pages
        self.seen["duplicates"] += len(pool.adopt(request.slot, first, kept[first:]))
        request.protected = num_pages * size
        self.tree.lock(request.node, -1)
        self.tree.lock(node)
        request.node = node

    def _release(self, request: Request, *, keep: bool, unsaid: int = 0) -> None:
        """``release_kv_cache``: the tree keeps whole pages of what was said, the rest is freed, then the slot."""
        size, pool = self.world.page_tokens, self.pool
        owned = min(request.num_known - 1, request.computed) if keep else request.computed
        owned = max(owned - unsaid, request.protected)
        if keep:
            self._checkpoint(request, owned, ended=True)
        self.free_pages_of(request, request.protected // size, -(-owned // size))
        self.free_pages_of(request, -(-owned // size), -(-request.computed // size))
        self.tree.lock(request.node, -1)
        request.node = self.tree.root
        pool.close(request.slot)
        self.free_slots.append(request.slot)
        request.slot, request.done = 0, True

    def free_pages_of(self, request: Request, start: int, stop: int) -> None:
        self.pool.free(self.pool.pages_of(request.slot, start, stop))

    # What must hold at any time.

    def check(self) -> None:
        check_tables(self.pool, self.driver, self.owned_pages())
        addresses = self._padding_addresses()
        for address, mapping in zip(addresses, self.padding, strict=True):
            assert self.driver._mappings.get(address) is mapping, f"{self.place(address)} was touched"

    def _check_mapping_limit(self) -> None:
        """What running rows need may exceed the limit; parked rows must then have given theirs."""
        rows, settled = self.pool.rows, self.pool.epochs.settled
        if rows.max_mappings is not None and rows.num_mappings > rows.max_mappings:
            self.seen["over the mapping limit"] += 1
            assert all(rows._last_epoch[row] > settled for row in rows._parked), "parked rows could have been unmapped"

    def owned_pages(self) -> list[int]:
        """By the tree, and by each request behind what the tree protects."""
        pages = list(self.tree.nodes)
        requests = {id(r): r for r in (*self.running, *self.joining, *([self.chunked] if self.chunked else []))}
        for request in requests.values():
            if request.slot:
                slot = request.slot
                first = request.protected // self.world.page_tokens
                pages += self.pool.wanted[slot, first : self.pool.num_wanted[slot]].tolist()
        return pages

    def place(self, address: int) -> str:
        pool = self.pool
        if 0 <= address - pool.pages.home_base < pool.pages.home_bytes:
            return f"the home of page {(address - pool.pages.home_base) // self.page_size_bytes}"
        row, offset = divmod(address - pool.rows.window_base, pool.rows.row_bytes)
        return f"position {offset // self.page_size_bytes} of row {row}"

    def _padding_addresses(self) -> list[int]:
        rows = self.pool.rows
        return [self.pool.pages.home(PADDING_PAGE), *(rows.address(PADDING_ROW, at) for at in range(rows.max_pages))]

    def _check_tree_bytes(self) -> None:
        """At rest, every page of the tree holds what its path says."""
        size = self.world.page_tokens
        for node in self.tree.nodes.values():
            if node.children:
                continue
            path = self.tree.path(node)
            expected = marks_of([token for step in path for token in step.key if token != NO_TOKEN])
            pages = np.array([step.page for step in path])
            backed = self.pool.pages.backed
            assert backed[pages].all(), f"a path of the tree, pages {pages}, lost its memory"
            slots = (pages[:, None] * size + np.arange(size)).ravel()[: len(expected)]
            for view in self.home_marks:
                assert np.array_equal(view[slots], expected), f"a path of the tree, pages {pages}, was overwritten"


def simulate(seed: int, num_steps: int, *, timing: int = 0, checks: bool = True, trace: Path | None = None) -> Server:
    """Run one seed to its end. A failure carries the seed, the step and how to replay it as notes."""
    return Server(seed, timing, checks=checks, trace=trace).run(num_steps)


@dataclass
class Progress:
    """How far a long run has come: kept in a file, it goes on where it was ended."""

    first: int
    steps: int
    timing: int
    done: int = 0
    seconds: float = 0.0
    seen: dict[str, int] = field(default_factory=dict)

    def resume(self, path: Path) -> None:
        """Take over what the file says was done with the same settings."""
        if path.exists():
            before = Progress(**json.loads(path.read_text()))
            if (before.first, before.steps, before.timing) != (self.first, self.steps, self.timing):
                raise SystemExit(f"{path} is of a run with other settings: {before}; name another file")
            self.done, self.seconds, self.seen = before.done, before.seconds, before.seen

    def save(self, path: Path) -> None:
        """A run that is killed meanwhile leaves the file of the last time."""
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(asdict(self)))
        new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--timing", type=int, default=0, help="when kernels run")
    parser.add_argument("--steps", type=int, default=500, help="scheduling steps a seed")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the progress there, and go on from it")
    args = parser.parse_args()
    first, num_seeds = (args.first, args.seeds) if args.seed is None else (args.seed, 1)
    progress = Progress(first, args.steps, args.timing)
    if args.record is not None:
        progress.resume(args.record)
    seen = Counter(progress.seen)
    began, shown = time.monotonic() - progress.seconds, time.monotonic()
    while progress.done < num_seeds:
        seen += simulate(first + progress.done, args.steps, timing=args.timing).seen
        progress.done += 1
        now = time.monotonic()
        if now - shown > 10 or progress.done == num_seeds:
            shown, steps = now, progress.done * args.steps
            progress.seconds, progress.seen = now - began, dict(seen)
            rate = steps / progress.seconds
            print(f"{progress.done} seeds, {steps} steps, {rate:.0f} steps/s, no difference", flush=True)
            if args.record is not None:
                progress.save(args.record)
    print(", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
