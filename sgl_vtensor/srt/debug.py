"""Debug mode (``--vtensor-debug`` or ``SGL_VTENSOR_DEBUG=1``): every invariant of the memory, before every launch.

It waits for the device at each launch and reads memory back: for tests and for hunting a bug, not for serving.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_vtensor.core.rows import PADDING_ROW
from sgl_vtensor.errors import VTensorError

NAN_WORD = -1
"""All bits set is NaN in every floating-point dtype that a KV cache is kept in, fp8 included."""


class DebugChecker:
    """Checks a runtime's pool against SGLang's tables, and against the bytes that the rows show.

    Raises:
        VTensorError: an invariant does not hold; the message says which, for which request or page.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.pool = runtime.pool
        self.pool.pages.freed = []
        rows = self.pool.rows
        self._row_words = rows.tensor().view(torch.int64)

    def poison_freed(self, words: torch.Tensor) -> None:
        """Fill pages that were freed since the last launch with NaN, on the forward stream: nobody may need them."""
        pages = self.pool.pages
        freed, pages.freed = pages.freed, []
        poisoned = [page for page in set(freed) if pages.backed[page] and page not in pages.fenced]
        if poisoned:
            words.index_fill_(0, torch.tensor(poisoned, device=words.device), NAN_WORD)

    def check(self, batch: Any) -> None:
        """Before a launch, behind the device work that page turnover queued."""
        slots = batch.req_pool_indices_cpu.numpy()
        lens = batch.seq_lens_cpu.numpy()
        self._check_owners(batch.tree_cache)
        for slot, len_tokens in zip(slots.tolist(), lens.tolist(), strict=True):
            self._check_table(batch.req_to_token_pool, slot, len_tokens)
            if not self.runtime.launch_reads_homes:
                self._check_row(slot, len_tokens)

    def _check_owners(self, tree_cache: Any) -> None:
        """Every page is free, or the tree's, or one request's: exactly one of them (invariants 4 and 5)."""
        pool, page_tokens = self.pool, self.pool.layout.page_tokens
        owners = np.zeros(pool.pages.num_pages + 1, dtype=np.int64)
        owners[0] = 1
        owners += pool.pages.is_free
        tree_pages = set(tree_cache.all_pages())
        if tree_pages != set(np.flatnonzero(tree_cache.is_cached).tolist()):
            raise VTensorError("the tree owns other pages than it says; please report this")
        owners[list(tree_pages)] += 1
        for slot in np.flatnonzero(pool.row_of_slot).tolist():
            for page in pool.wanted[slot, : pool.num_wanted[slot]].tolist():
                if page not in tree_pages:
                    owners[page] += 1
        wrong = np.flatnonzero(owners != 1)
        if wrong.size:
            page = int(wrong[0])
            raise VTensorError(
                f"page {page} of {page_tokens} tokens has {owners[page]} owners; {wrong.size} such pages"
            )

    def _check_table(self, req_to_token_pool: Any, slot: int, len_tokens: int) -> None:
        """The host ledger and SGLang's device table name the same token slots (wall W2)."""
        pool, page_tokens = self.pool, self.pool.layout.page_tokens
        table = req_to_token_pool.req_to_token[slot, :len_tokens].cpu().numpy()
        positions = np.arange(len_tokens)
        expected = pool.wanted[slot, positions // page_tokens].astype(np.int64) * page_tokens + positions % page_tokens
        self._compare(table, expected, f"slot {slot}: SGLang's table and the ledger differ at token")

    def _check_row(self, slot: int, len_tokens: int) -> None:
        """The row shows the wanted pages, or duplicates that are fenced (invariant 1): in the books and in memory."""
        pool = self.pool
        row, num_pages = int(pool.row_of_slot[slot]), pool.layout.num_pages(len_tokens)
        if row == PADDING_ROW:
            raise VTensorError(f"slot {slot} is launched without a row")
        mapped, wanted = pool.rows.mapped[row, :num_pages], pool.wanted[slot, :num_pages]
        for position in np.flatnonzero(mapped != wanted).tolist():
            if int(mapped[position]) not in pool.pages.fenced:
                raise VTensorError(
                    f"slot {slot}, row {row}, position {position} maps page {mapped[position]}, "
                    f"not {wanted[position]}, and it is no fenced duplicate"
                )
        words_a_page = pool.layout.page_bytes // 8
        first = row * pool.rows.max_pages * words_a_page + np.arange(num_pages) * words_a_page
        through_row = self._words_at(self._row_words, first)
        through_home = self._words_at(self.runtime.words.view(-1), mapped.astype(np.int64) * words_a_page)
        self._compare(through_row, through_home, f"slot {slot}, row {row} does not show the page at position")

    def _words_at(self, words: torch.Tensor, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = words[torch.from_numpy(indices).to(words.device)].cpu().numpy()
        return found

    def _compare(self, found: npt.NDArray[Any], expected: npt.NDArray[Any], what: str) -> None:
        differs = np.flatnonzero(found != expected)
        if differs.size:
            at = int(differs[0])
            raise VTensorError(f"{what} {at}: {found[at]} in place of {expected[at]}")
