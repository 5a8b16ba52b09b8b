"""The simulator is worth its runs only if it notices bugs: each of these, put back, is found within a few seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

from sgl_vtensor.core.epochs import Epochs
from sgl_vtensor.core.layout import KVLayout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.rows import PageArray, Rows
from sgl_vtensor.errors import VTensorError
from tests.core.simulation import Request, Server, simulate

MAX_SEEDS = 40
NUM_STEPS = 120
PLENTY = 1 << 30

Patch = pytest.MonkeyPatch


def settle_does_not_wait(patch: Patch) -> None:
    """Unmap before completion: what was launched counts as finished."""

    def settle(self: Epochs, epoch: int) -> None:
        self.settled = max(self.settled, min(epoch, self.launched))

    patch.setattr(Epochs, "settle", settle)


def settle_one_too_many(patch: Patch) -> None:
    """Unmap before completion: the newest launch but one is waited for, and the newest counts as finished, too."""
    original = Epochs.settle

    def settle(self: Epochs, epoch: int) -> None:
        original(self, epoch)
        self.settled = min(epoch + 1, self.launched)

    patch.setattr(Epochs, "settle", settle)


def retire_forgets_the_launch(patch: Patch) -> None:
    """Reuse of a row before retirement: its last launch is not waited for."""
    original = Rows.retire

    def retire(self: Rows, row: int) -> None:
        original(self, row)
        self._last_epoch[row] = 0

    patch.setattr(Rows, "retire", retire)


def retire_forgets_the_newest_launch(patch: Patch) -> None:
    """Reuse of a row before retirement: the launch that still holds a finished request is overlooked."""
    original = Rows.retire

    def retire(self: Rows, row: int) -> None:
        original(self, row)
        self._last_epoch[row] = max(0, self.epochs.launched - 1)

    patch.setattr(Rows, "retire", retire)


def duplicates_are_free_at_once(patch: Patch) -> None:
    """Missed resync after dedup: a page that the row still shows can be handed out."""

    def keep_duplicate(self: Rows, row: int, position: int, page: int) -> None:
        self.pages.free([page], self.epochs.launched)

    patch.setattr(Rows, "keep_duplicate", keep_duplicate)


def adopt_forgets_the_ledger(patch: Patch) -> None:
    """Missed resync after dedup: the request goes on with pages that it has given back."""

    def adopt(self: VTensorPool, slot: int, start: int, pages: Sequence[int]) -> list[int]:
        mine = self.wanted[slot, start : start + len(pages)].tolist()
        changed = [at for at, (old, new) in enumerate(zip(mine, pages, strict=True), start) if old != new]
        for position in changed:
            self.rows.keep_duplicate(int(self.row_of_slot[slot]), position, int(self.wanted[slot, position]))
        return changed

    patch.setattr(VTensorPool, "adopt", adopt)


def duplicates_are_released_while_read(patch: Patch) -> None:
    """Missed wait before resync: the tree's page is mapped under a running launch."""

    def secure(self: VTensorPool, num_pages: int, *, beyond_limit: bool = False) -> bool:
        if self.pages.secure(num_pages, beyond_limit=beyond_limit):
            return True
        settled, self.epochs.settled = self.epochs.settled, self.epochs.launched
        self.rows.release_duplicates({int(row): self.wanted[slot] for slot, row in enumerate(self.row_of_slot) if row})
        self.epochs.settled = settled
        return self.pages.secure(num_pages, beyond_limit=beyond_limit)

    patch.setattr(VTensorPool, "secure", secure)


def unfenced_duplicates_stay_mapped(patch: Patch) -> None:
    """Missed resync: duplicates are handed out again, but the row is not mapped anew."""

    def release_duplicates(self: Rows, wanted_of_row: dict[int, PageArray]) -> int:
        for duplicates in self._duplicates.values():
            for page in duplicates.values():
                self.pages.unfence(page, self.epochs.launched)
        self._duplicates.clear()
        return 0

    patch.setattr(Rows, "release_duplicates", release_duplicates)


def num_pages_rounds_down(patch: Patch) -> None:
    """Off by one at a page edge: a last page that is partly filled is forgotten."""
    patch.setattr(KVLayout, "num_pages", lambda self, len_tokens: max(1, len_tokens // self.page_tokens))


def num_pages_misses_the_edge(patch: Patch) -> None:
    """Off by one at a page edge: a page too many where a length ends on the edge."""
    patch.setattr(KVLayout, "num_pages", lambda self, len_tokens: len_tokens // self.page_tokens + 1)


def ensure_stops_short(patch: Patch) -> None:
    """Off by one at a page edge: the last new page is not mapped, unless it is the only one."""
    original = Rows.ensure

    def ensure(self: Rows, row: int, wanted: PageArray, start: int, stop: int) -> int:
        return original(self, row, wanted, start, max(start + 1, stop - 1))

    patch.setattr(Rows, "ensure", ensure)


def abort_leaks(patch: Patch) -> None:
    """Leak on abort: the slot is closed, its pages are not freed."""
    original = Server.free_pages_of

    def free_pages_of(self: Server, request: Request, start: int, stop: int) -> None:
        if not request.aborted:
            original(self, request, start, stop)

    patch.setattr(Server, "free_pages_of", free_pages_of)


def close_keeps_duplicates_fenced(patch: Patch) -> None:
    """Leak on abort: pages that a closed row read as duplicates stay fenced for ever."""
    original = Rows.retire

    def retire(self: Rows, row: int) -> None:
        self._duplicates.pop(row, None)
        original(self, row)

    patch.setattr(Rows, "retire", retire)


def shrink_forgets_running_launches(patch: Patch) -> None:
    """Release before completion: pages that a launch writes or reads go back. Either of the two checks would do."""
    original = Pages.releasable
    patch.setattr(Pages, "releasable", lambda self, keep_pages, _: original(self, keep_pages, PLENTY))
    patch.setattr(Rows, "can_forget", lambda self, page: True)


def shrink_forgets_zeroing(patch: Patch) -> None:
    """Release before completion: pages that nobody has yet go back while a launch zeroes them."""
    original = Pages.releasable
    patch.setattr(Pages, "releasable", lambda self, keep_pages, _: original(self, keep_pages, PLENTY))


def zeroing_is_no_use(patch: Patch) -> None:
    """Release before completion: a page goes back while the launch that zeroes it is under way."""
    original = Pages.take_fresh
    patch.setattr(Pages, "take_fresh", lambda self, epoch: original(self, 0))


def begun_pages_are_not_cleared(patch: Patch) -> None:
    """Stale bytes: a kernel that reads whole tiles reads what another request left behind the last token."""
    patch.setattr(Pages, "clear", lambda self, pages: None)


def parked_mappings_are_ownership(patch: Patch) -> None:
    """Double ownership: the page that a row shows is taken, whoever has it now."""
    original = Pages.take

    def take(self: Pages, page: int) -> bool:
        return original(self, page) or not self.is_free[page]

    patch.setattr(Pages, "take", take)


def rows_are_parked_in_use(patch: Patch) -> None:
    """Unmap before completion: parked rows give their mappings although a launch reads them."""

    def unmap_parked(self: Rows, num_mappings: int) -> int:
        self._last_epoch[:] = 0
        return original(self, num_mappings)

    original = Rows.unmap_parked
    patch.setattr(Rows, "unmap_parked", unmap_parked)


def mapping_ahead_overtakes_launches(patch: Patch) -> None:
    """Unmap before completion: a waiting request's prefix is mapped into a row that a launch still reads."""
    patch.setattr(Rows, "_is_ready", lambda self, row, kept: row not in kept)


def reset_forgets_the_fenced(patch: Patch) -> None:
    """Leak at flush: pages in use are not freed."""

    def reset(self: Pages, epoch: int) -> None:
        for page in list(self.fenced):
            self.unfence(page, epoch)

    patch.setattr(Pages, "reset", reset)


def padding_is_handed_out(patch: Patch) -> None:
    """The padding row is a row like any other."""
    original = Rows.__init__

    def init(self: Rows, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        self._empty.append(0)

    patch.setattr(Rows, "__init__", init)


def mappers_are_forgotten(patch: Patch) -> None:
    """Release of a page that a parked row still maps: the reverse index loses entries."""
    original = Rows.retire

    def retire(self: Rows, row: int) -> None:
        original(self, row)
        for page in np.unique(self.mapped[row]).tolist():
            self._mappers.get(page, {}).pop(row * self.max_pages, None)

    patch.setattr(Rows, "retire", retire)


def eviction_frees_nothing(patch: Patch) -> None:
    """Leak at eviction: the tree lets go of pages that nobody gets back."""
    original = VTensorPool.free

    def free(self: VTensorPool, pages: Iterable[int]) -> None:
        pages = list(pages)
        original(self, pages[:-1] if len(pages) == 1 and self.pages.num_available == 0 else pages)

    patch.setattr(VTensorPool, "free", free)


MUTATIONS: list[Callable[[Patch], None]] = [
    settle_does_not_wait,
    settle_one_too_many,
    retire_forgets_the_launch,
    retire_forgets_the_newest_launch,
    duplicates_are_free_at_once,
    adopt_forgets_the_ledger,
    duplicates_are_released_while_read,
    unfenced_duplicates_stay_mapped,
    num_pages_rounds_down,
    num_pages_misses_the_edge,
    ensure_stops_short,
    abort_leaks,
    close_keeps_duplicates_fenced,
    shrink_forgets_running_launches,
    shrink_forgets_zeroing,
    zeroing_is_no_use,
    begun_pages_are_not_cleared,
    parked_mappings_are_ownership,
    rows_are_parked_in_use,
    mapping_ahead_overtakes_launches,
    reset_forgets_the_fenced,
    padding_is_handed_out,
    mappers_are_forgotten,
    eviction_frees_nothing,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("checks", [True, False], ids=["tables", "kernels"])
def test_the_simulator_catches(mutate: Callable[[Patch], None], checks: bool, monkeypatch: Patch) -> None:
    """Once with the tables looked at after each step, and once by what kernels and the last count notice alone."""
    mutate(monkeypatch)
    with pytest.raises((AssertionError, VTensorError, KeyError)) as caught:
        for seed in range(MAX_SEEDS):
            simulate(seed, NUM_STEPS, checks=checks)
    assert any(note.startswith("seed ") for note in caught.value.__notes__)


def test_the_same_seeds_pass_without_a_mutation() -> None:
    """What the mutations are caught by is the mutation."""
    for seed in range(MAX_SEEDS // 2):
        simulate(seed, NUM_STEPS)
