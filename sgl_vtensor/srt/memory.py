"""When memory is taken and when it is given back: ahead of need, under a limit that moves, when idle, for neighbours.

All of it happens between two launches, on the scheduler's thread, in steps of a few milliseconds. What evicts cached
prefixes changes what SGLang admits, so tensor-parallel ranks must agree on it. On the limit they do, since SGLang
brings it to all of them in the same step; what follows from clocks and free memory is decided by rank 0 (``agree``).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from sgl_vtensor.config import Size, VTensorConfig, format_bytes
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory
from sgl_vtensor.srt.agree import Decision, Ranks

logger = logging.getLogger(__name__)

PAGES_RELEASED_AT_ONCE = 64
"""Giving back a page takes some tens of microseconds, and a batch may be waiting to be launched."""
PAGES_RELEASED_UNDER_LOAD = 32
"""The same in one look while requests run: less than 5 ms, by which no token may be late."""
PAGES_CREATED_AT_ONCE = 8
"""Behind a launch that computes for a few milliseconds."""
REFILL_SHARE = 0.5
"""Of what is to be ready: below it pages are created, launch after launch, until all of it is. A few behind each launch
would make every first token later, by 2.3 of 26 ms for prompts that begin three pages each."""
BURST_SECONDS = 10.0
"""What one launch took of pages is kept ready for the next that takes as many: agents that come back together, or the
chunks of a long prompt. So long, and up to twice as long, after the last."""
BURST_SHARE = 0.05
"""Of the limit, so much at most."""
PAGES_EVICTED_AT_ONCE = 256
LOOK_SECONDS = 0.5
"""How often the age of the cache and the device's free memory are looked at."""
HASTY_LOOK_SECONDS = 0.1
"""The same by an idle server while memory is short: a neighbour's prompts fill several GiB a second."""
PAGES_YIELDED_AT_ONCE = 256
"""By an idle server, whom a neighbour would otherwise outrun: its next batch wants more than what is short now, and
evicts what its own users come back for. With ``--sleep-on-idle`` the next look is a second away."""
MARGIN_BYTES = 512 << 20
"""Device memory that is never taken: other allocations of this process and its neighbours need some."""
NEIGHBOUR_SECONDS = 30.0
"""While the device has less than twice the margin free, prefixes that nobody asked for in so long are dropped."""
IDLE_NEIGHBOUR_SECONDS = 2.0
"""The same of a server without work: what its users lose is computed again, what a neighbour lacks holds it up now."""
PAGES_BESIDE_A_REQUEST = 2
RELEASE_AGAIN_SECONDS = 5.0
SAY_SECONDS = 30.0
"""Of one kind of event, so often at most the log speaks."""
SHORTAGE_SECONDS = 60.0
SHORTAGE_POLL_SECONDS = 0.01


class MemoryPolicy:
    """The limit, the reserve, and what becomes of memory that nobody needs now."""

    def __init__(self, pool: VTensorPool, config: VTensorConfig, *, ranks: Ranks | None = None) -> None:
        self.pool = pool
        self.config = config
        self.ranks = ranks
        if ranks is not None:
            pool.pages.agreed_pages = pool.pages.num_pages
            ranks.publish(pool.pages.num_pages)
        pool.pages.on_refusal = self._do_without if ranks is None else self._wait_for_memory
        pool.pages.on_blind = self._note_blind
        self._on_cuda = pool.driver.name == "cuda"
        pool.pages.margin_bytes = MARGIN_BYTES if self._on_cuda else 0
        self.capacity_bytes = pool.pages.num_pages * pool.layout.page_bytes
        self.set_limit((config.memory_limit or Size("100%", 1.0, True)).bytes_of(self.capacity_bytes))
        reserve = config.reserve or (Size("1%", 0.01, True) if self._on_cuda else Size("0%", 0.0, True))
        self.reserve_pages = self._num_pages(reserve)
        if config.reserve is not None and self.reserve_pages > pool.pages.limit_pages:
            raise ConfigError(
                f"--vtensor-reserve {reserve} is more than the memory limit of {config.memory_limit or 'the pool'}; "
                "lower it"
            )
        self._keep_pages = self._num_pages(config.cache_keep)
        self.full_request_lens = (0, 0)
        """SGLang's bounds when there is no limit."""
        self._idle_since: float | None = None
        self._next_look = 0.0
        self._next_release = 0.0
        self._least_free = 0
        """Free pages that were there all the time since the last count of them."""
        self._next_count = 0.0
        self._unused = 0
        """What was counted and is to go."""
        self._taken = 0
        """Pages that had been handed out by the last launch."""
        self._bursts = [0, 0]
        """The most that one launch took, in this stretch of time and in the one before."""
        self._next_stretch = 0.0
        self._refills = True
        self._is_short = False
        """Whether the device has no memory to spare, as the last look said."""
        self._next_decision = 0.0
        self._said: dict[str, float] = {}
        self._shortage_since = self._last_shortage = float("-inf")
        self.pages_created_ahead = 0
        """Of all that were created, those for which no launch had to wait."""
        self.pages_evicted_by_limit = 0
        self.pages_evicted_by_age = 0

    def _num_pages(self, size: Size) -> int:
        return size.bytes_of(self.capacity_bytes) // self.pool.layout.page_bytes

    # The limit.

    def set_limit(self, num_bytes: int) -> None:
        """Let the pool hold so much. Memory follows in the next steps; nothing that runs is stopped.

        Raises:
            ConfigError: the pool cannot hold so much, or not one page fits.
        """
        self.check_limit(num_bytes)
        self.pool.set_limit(num_bytes // self.pool.layout.page_bytes)

    def check_limit(self, num_bytes: float) -> None:
        """Raise what ``set_limit`` would."""
        page_bytes = self.pool.layout.page_bytes
        if not page_bytes <= num_bytes <= self.capacity_bytes:
            raise ConfigError(
                f"a memory limit of {num_bytes} bytes cannot be set: give at least one page "
                f"({format_bytes(page_bytes)}) and at most what the pool can hold "
                f"({format_bytes(self.capacity_bytes)}; --mem-fraction-static or --max-total-tokens decides)"
            )

    def request_lens(self) -> tuple[int, int]:
        """SGLang's bounds on a request and on its prompt, in tokens: what does not fit the limit is refused at once.

        Requests that were accepted before are served all the same, each alone if need be (``VTensorPrefillBudget``).
        """
        len_tokens, input_len_tokens = self.full_request_lens
        pages, page_tokens = self.pool.pages, self.pool.layout.page_tokens
        # Admission wants a page more than a request fills, and one that it copies from is locked meanwhile: without
        # room for both, the longest would wait for ever, and all behind it.
        most = min(pages.limit_pages * page_tokens - 1, (pages.num_pages - PAGES_BESIDE_A_REQUEST) * page_tokens)
        cut = max(0, len_tokens - most)
        return len_tokens - cut, input_len_tokens - cut

    @property
    def ready_pages(self) -> int:
        """Free pages that are to have memory now, ahead of need: the reserve, or as many as one launch takes lately.

        Without a reserve nothing is taken ahead; while the device is short of memory no more than the reserve is.
        """
        if not self.reserve_pages or self._is_short:
            return self.reserve_pages
        return max(self.reserve_pages, min(max(self._bursts), int(BURST_SHARE * self.pool.pages.limit_pages)))

    # What happens between launches.

    def step(self, tree_cache: Any, now: float) -> None:
        """Between two launches. ``now``: seconds of ``time.monotonic``, the clock of SGLang's tree."""
        if self.pool.pages_beyond_limit:
            self._follow_limit(tree_cache)
        self._least_free = min(self._least_free, self.pool.pages.num_free_backed)
        if now >= self._next_stretch:
            self._bursts, self._next_stretch = [0, self._bursts[0]], now + BURST_SECONDS
        if now >= self._next_look:
            self._release_unused(now)
            yields = self._yields(now)
            short = self._release_for_neighbours(yields)
            self._is_short = short is not None
            self._next_look = now + (HASTY_LOOK_SECONDS if yields and short is not None else LOOK_SECONDS)
            if self.ranks is not None:
                possible = self.pool.pages.possible()
                if possible is not None:  # else what was said last holds
                    self.ranks.publish(possible)
                self.ranks.lack(short or 0)
            else:
                evicted = self._evict(tree_cache, self._old_pages(tree_cache, now, short or 0))
                self.pages_evicted_by_age += evicted
                if evicted and short and yields:
                    self._release_for_neighbours(yields)

    def launched(self, pages_soon: int = 0, pages_computed: int = 0, *, hurried: bool = False) -> None:
        """Behind a launch, while the GPU computes: some pages ahead of need, so that the next launch waits for none.

        This itself never waits, and what each rank has ready decides nothing.

        Args:
            pages_soon: that requests begin in the next steps. Requests of one length begin theirs in the same one, more
                than a reserve holds. Without a reserve nothing is taken ahead.
            pages_computed: that this launch fills, if it is a prefill: it computes for so much longer than it takes to
                create as many.
            hurried: first tokens wait for this thread rather than for the GPU: nothing is created.
        """
        self._idle_since = None
        pages = self.pool.pages
        self._bursts[0] = max(self._bursts[0], pages.num_taken - self._taken)
        self._taken = pages.num_taken
        ready = pages.num_free_backed
        if hurried:
            return
        wanted = max(self.ready_pages, pages_soon) if self.reserve_pages else 0
        refills = ready < (wanted if self._refills else max(REFILL_SHARE * wanted, pages_soon))
        if refills:
            try:
                self.pool.prepare(min(wanted, ready + PAGES_CREATED_AT_ONCE + pages_computed))
            except OutOfMemory:
                pass  # when a page is needed it is asked for again
            except DriverError as error:
                self._warn("reserve", "the reserve could not be filled (%s)", error)
            self.pages_created_ahead += pages.num_free_backed - ready
        self._refills = refills and pages.num_free_backed < wanted

    def idle(self, tree_cache: Any, now: float) -> None:
        """No batch is in flight. SGLang comes here again and again while there is nothing to do."""
        self.step(tree_cache, now)
        if self._idle_since is None:
            self._idle_since = now
        seconds = self.config.idle_seconds
        if not seconds or now - self._idle_since < seconds or not self.pool.pages.num_free_backed:
            return
        self._release(0, PAGES_RELEASED_AT_ONCE)
        if not self.pool.pages.num_free_backed:
            self._say("idle", "idle, %d pages given back since the start", self.pool.pages.num_released)

    def _release_unused(self, now: float) -> None:
        """Under load, too, free pages go back that no request has needed for a while. What is to be ready stays.

        Prefixes that expire leave such pages, and so do requests that are longer than what follows them.
        """
        if not self.config.idle_seconds:
            return
        free = self.pool.pages.num_free_backed
        if now >= self._next_count:
            self._unused = self._least_free - self.ready_pages
            self._least_free, self._next_count = free, now + self.config.idle_seconds
        self._unused = min(self._unused, free - self.ready_pages)
        if self._unused > 0:
            self._unused -= self._release(self.ready_pages, min(self._unused, PAGES_RELEASED_UNDER_LOAD))

    def _follow_limit(self, tree_cache: Any) -> None:
        """Cached prefixes go first. Requests that run keep what they have: admission waits for them."""
        pages = self.pool.pages
        excess = min(pages.num_in_use - pages.limit_pages, PAGES_RELEASED_AT_ONCE)
        if excess > 0:
            self.pages_evicted_by_limit += self._evict(tree_cache, excess)
        self._release(max(0, pages.num_free_backed - self.pool.pages_beyond_limit), PAGES_RELEASED_AT_ONCE)
        if not self.pool.pages_beyond_limit:
            self._say("within", "what is backed is within the limit again")

    def _release_for_neighbours(self, yields: bool) -> int | None:
        """Servers that share a device settle without talking: each lets go of what it needs least when memory is short.

        The reserve stays, so that what is let go here is not taken again by the next step.

        Returns how many pages should go beyond those that are free; None: there is memory enough, as far as one knows.
        """
        margin_bytes = self.pool.pages.margin_bytes
        if not margin_bytes:
            return None
        free_bytes = self.pool.pages.free_bytes()
        if free_bytes is None:
            return None
        short = -(-(2 * margin_bytes - free_bytes) // self.pool.layout.page_bytes)
        if short <= 0:
            return None
        at_once = PAGES_RELEASED_AT_ONCE
        if yields:
            at_once = PAGES_YIELDED_AT_ONCE
            short = max(short, at_once)
        spare = max(0, self.pool.pages.num_free_backed - self.reserve_pages)
        if self._release(self.reserve_pages, min(short, at_once)):
            self._say("neighbours", "the device has %s free: free pages go back to it", format_bytes(free_bytes))
        return max(0, short - spare)

    def _yields(self, now: float) -> bool:
        """Whether nobody has waited for this server for a while."""
        return self._idle_since is not None and now - self._idle_since >= IDLE_NEIGHBOUR_SECONDS

    def note_shortage(self) -> None:
        """Space was refused. Where it is the device that has none, the log says so: requests wait or are retracted."""
        pages = self.pool.pages
        if self._silent("shortage") or pages.most_in_use(beyond_limit=True) >= pages.limit_pages:
            return
        backed = format_bytes(pages.num_backed * self.pool.layout.page_bytes)
        self._say("shortage", "the device has no memory for more pages, so requests wait; %s are backed", backed)

    def _silent(self, event: str) -> bool:
        """Whether the log has just spoken of such an event."""
        return time.monotonic() - self._said.get(event, float("-inf")) < SAY_SECONDS

    def _say(self, event: str, text: str, *arguments: object, level: int = logging.INFO) -> None:
        if not self._silent(event):
            self._said[event] = time.monotonic()
            logger.log(level, f"vTensor memory: {text}", *arguments)

    def _warn(self, event: str, text: str, error: DriverError) -> None:
        self._say(event, text, error, level=logging.WARNING)

    def _old_pages(self, tree_cache: Any, now: float, short: int) -> int:
        """How many cached pages are to go: those too old to keep, or, as far as memory is short, rather old ones."""
        if not hasattr(tree_cache, "old_pages"):  # the radix cache is switched off
            return 0
        expired = 0
        if self.config.cache_seconds:
            surplus = tree_cache.evictable_size() // self.pool.layout.page_tokens - self._keep_pages
            expired = tree_cache.old_pages(now - self.config.cache_seconds, min(surplus, PAGES_EVICTED_AT_ONCE))
        age = IDLE_NEIGHBOUR_SECONDS if self._yields(now) else NEIGHBOUR_SECONDS
        return max(expired, tree_cache.old_pages(now - age, min(short, PAGES_EVICTED_AT_ONCE)))

    def flushed(self) -> None:
        """The cache has been emptied by hand: its memory goes at once."""
        self._release(0, self.pool.pages.num_pages)

    # Several ranks.

    def decide(self, tree_cache: Any, now: float) -> Decision | None:
        """On rank 0, before SGLang broadcasts its requests: what all ranks do in this step; None: nothing new."""
        assert self.ranks is not None
        if now < self._next_decision:
            return None
        most = max(1, self.ranks.least())
        short = max(self.pool.pages.num_in_use - most, self.ranks.most_lacking())
        self._next_decision = now + (HASTY_LOOK_SECONDS if self._yields(now) else LOOK_SECONDS)
        decision = Decision(most, self._old_pages(tree_cache, now, short))
        return decision if decision != Decision(self.pool.pages.agreed_pages or 0, 0) else None

    def follow(self, decision: Decision, tree_cache: Any) -> None:
        """On every rank, in the same step."""
        self.pool.pages.agreed_pages = decision.most_in_use
        self.pages_evicted_by_age += self._evict(tree_cache, decision.evict_pages)

    def _do_without(self, error: DriverError) -> bool:
        """Cached prefixes go, requests wait or are retracted. Of a full device ``note_shortage`` speaks."""
        if not isinstance(error, OutOfMemory):
            self._warn("refusal", "a page could not be backed, requests wait for others (%s)", error)
        return False

    def _note_blind(self, error: DriverError) -> None:
        self._warn("blind", "free memory is not known, so the driver's refusals alone say when it ends (%s)", error)

    def _wait_for_memory(self, error: DriverError) -> bool:
        """A neighbour was faster. The other ranks wait for this one's launch, so waiting lets none of them run ahead.

        Raises:
            DriverError: ``error``, after ``SHORTAGE_SECONDS``. The server must stop.
        """
        now = time.monotonic()
        if now - self._last_shortage > 1.0:
            self._shortage_since = now
            logger.warning("vTensor memory: another process was faster; waiting for memory (%s)", error)
        self._last_shortage = now
        if now - self._shortage_since > SHORTAGE_SECONDS:
            raise error
        time.sleep(SHORTAGE_POLL_SECONDS)
        return True

    def _evict(self, tree_cache: Any, num_pages: int) -> int:
        """Evict at least so many pages by their age."""
        return int(tree_cache.evict_oldest(num_pages)) if num_pages > 0 else 0

    def _release(self, keep_pages: int, at_most: int) -> int:
        """Give back free pages' memory. That is no duty: a driver that refuses is left alone for a while."""
        if time.monotonic() < self._next_release:
            return 0
        before = self.pool.pages.num_released
        try:
            self.pool.shrink(keep_pages, at_most=at_most)
        except DriverError as error:
            self._next_release = time.monotonic() + RELEASE_AGAIN_SECONDS
            logger.warning("vTensor memory: a page could not be given back, it is kept (%s)", error)
        return self.pool.pages.num_released - before


class LimitHandler:
    """How ``POST /set_internal_state`` with ``{"server_args": {"vtensor_memory_limit_bytes": N}}`` moves the limit.

    SGLang brings an update, which may hold only numbers, to all ranks and guards it by its API keys.
    """

    KEY = "vtensor_memory_limit_bytes"

    def __init__(self, policy: MemoryPolicy, scheduler: Any, rejection: type[Exception]) -> None:
        self.policy = policy
        self.scheduler = scheduler
        self.rejection = rejection

    def validate(self, key: str, value: float) -> None:
        try:
            self.policy.check_limit(value)  # as it is: int() of NaN or Infinity would raise
        except ConfigError as error:
            raise self.rejection(str(error)) from error

    def apply(self, key: str, value: float) -> None:
        self.policy.set_limit(int(value))
        self.scheduler.max_req_len, self.scheduler.max_req_input_len = self.policy.request_lens()
        pages, page_bytes = self.policy.pool.pages, self.policy.pool.layout.page_bytes
        logger.info(
            "vTensor memory: the limit is %s now; %s are backed, %s in use",
            format_bytes(pages.limit_pages * page_bytes),
            format_bytes(pages.num_backed * page_bytes),
            format_bytes(pages.num_in_use * page_bytes),
        )
