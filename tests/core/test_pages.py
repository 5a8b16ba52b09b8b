"""Which pages are backed, free, fenced or in use; real memory at their homes."""

from __future__ import annotations

import pytest
import torch

from sgl_vtensor.core.pages import PADDING_PAGE, Pages
from sgl_vtensor.errors import DriverError, OutOfMemory, VTensorError
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import small_layout


@pytest.fixture
def pages(driver: HostDriver) -> Pages:
    return Pages(driver, small_layout(driver), 8)


def test_only_the_padding_page_is_backed_at_first(pages: Pages, driver: HostDriver) -> None:
    assert (pages.num_available, pages.num_backed, pages.num_in_use, pages.num_free_backed) == (8, 0, 0, 0)
    assert driver.physical_bytes == pages.layout.page_bytes
    assert list(pages.take_fresh(1)) == [PADDING_PAGE]
    k, v = pages.home_views(0, torch.float32)
    k[: pages.layout.page_tokens] = 1
    v[: pages.layout.page_tokens] = 2
    assert k.shape[0] == 9 * pages.layout.page_tokens


def test_pages_are_backed_at_first_use_and_keep_their_memory(pages: Pages, driver: HostDriver) -> None:
    taken = pages.take_many(3)
    assert taken == [1, 2, 3]
    assert (pages.num_available, pages.num_backed, pages.num_in_use) == (5, 3, 3)
    pages.free(taken, epoch=0)
    creates = driver.calls["create"]
    assert sorted(pages.take_many(3)) == taken
    assert driver.calls["create"] == creates


def test_what_is_prepared_fills_the_limit_and_the_memory_and_no_more(pages: Pages, driver: HostDriver) -> None:
    pages.limit_pages = 3
    pages.prepare(8)
    assert (pages.num_backed, pages.num_free_backed) == (3, 3)
    pages.limit_pages = 8
    pages.margin_bytes = pages.layout.page_bytes
    driver.capacity_bytes = driver.physical_bytes + 3 * pages.layout.page_bytes
    pages.prepare(8)
    assert pages.num_backed == 5, "a page's memory is left to others"


def test_the_longest_free_page_is_taken_first(pages: Pages) -> None:
    taken = pages.take_many(3)
    pages.free([taken[1]], epoch=0)
    pages.free([taken[0], taken[2]], epoch=0)
    assert pages.take_many(3) == [taken[1], taken[0], taken[2]]


def test_memory_at_home_is_real_and_apart(pages: Pages) -> None:
    size = pages.layout.page_tokens
    k, _ = pages.home_views(2, torch.float32)
    for page in pages.take_many(8):
        k[page * size : (page + 1) * size] = page
    for page in range(1, 9):
        assert (k[page * size : (page + 1) * size] == page).all()


def test_a_page_is_freed_once(pages: Pages) -> None:
    page = pages.take_many(1)[0]
    pages.free([page], epoch=0)
    with pytest.raises(VTensorError, match="freed twice"):
        pages.free([page], epoch=0)
    with pytest.raises(VTensorError, match="freed twice"):
        pages.fence(page)
    with pytest.raises(VTensorError, match="never handed out"):
        pages.free([PADDING_PAGE], epoch=0)


def test_secure_stops_at_the_limit(pages: Pages) -> None:
    pages.limit_pages = 3
    assert not pages.secure(4)
    assert pages.num_free_backed == 0, "nothing is backed in vain"
    assert pages.secure(3)
    with pytest.raises(OutOfMemory):
        pages.take_many(4)
    assert pages.num_free_backed == 3, "nothing was taken"
    pages.limit_pages = 8
    assert len(pages.take_many(4)) == 4


def test_secure_stops_at_the_memory_of_the_device() -> None:
    with HostDriver(capacity_bytes=4 * 4096) as driver:
        pages = Pages(driver, small_layout(driver), 8)
        assert not pages.secure(4)
        assert pages.num_free_backed == 3
        assert driver.memory_info()[0] == 0


def test_what_is_in_use_counts_for_the_limit_whatever_is_backed(pages: Pages) -> None:
    taken = pages.take_many(5)
    pages.free(taken[:3], epoch=0)
    pages.limit_pages = 4
    assert pages.num_free_backed == 3
    assert pages.secure(2) and not pages.secure(3)
    assert pages.secure(3, beyond_limit=True) and pages.secure(6, beyond_limit=True)
    assert not pages.secure(7, beyond_limit=True)
    assert (pages.most_in_use(), pages.most_in_use(beyond_limit=True)) == (4, 8)


def test_ranks_that_agreed_do_not_decide_by_their_own_memory() -> None:
    with HostDriver(capacity_bytes=6 * 4096) as driver:
        pages = Pages(driver, small_layout(driver), 8)
        assert pages.most_in_use() == 5
        pages.agreed_pages = 3
        assert pages.most_in_use() == pages.most_in_use(beyond_limit=True) == 3
        assert pages.secure(3) and not pages.secure(4) and not pages.secure(4, beyond_limit=True)
        pages.agreed_pages = 8
        assert pages.most_in_use() == 8
        errors: list[DriverError] = []

        def raise_at_the_third(error: DriverError) -> bool:
            errors.append(error)
            if len(errors) == 3:
                raise error
            return True

        pages.on_refusal = raise_at_the_third
        with pytest.raises(OutOfMemory):
            pages.secure(6)
        assert len(errors) == 3 and pages.num_free_backed == 5


def test_secure_stops_at_the_number_of_pages(pages: Pages) -> None:
    assert not pages.secure(9)
    assert pages.secure(8) and pages.secure(0)


def test_this_very_page_is_had_only_if_free_and_backed(pages: Pages) -> None:
    assert not pages.take(5), "it is not backed"
    page = pages.take_many(1)[0]
    assert not pages.take(page), "somebody has it"
    pages.free([page], epoch=0)
    assert pages.take(page)
    assert not pages.is_free[page]


def test_fenced_pages_count_as_available_but_are_not_handed_out(pages: Pages) -> None:
    taken = pages.take_many(8)
    pages.fence(taken[0])
    assert (pages.num_available, pages.num_in_use) == (1, 7)
    assert not pages.secure(1) and not pages.take(taken[0])
    pages.unfence(taken[0], epoch=0)
    assert pages.take_many(1) == [taken[0]]


def test_release_gives_memory_back_and_the_next_use_makes_new(pages: Pages, driver: HostDriver) -> None:
    page = pages.take_many(1)[0]
    with pytest.raises(VTensorError, match="not free and backed"):
        pages.release(page)
    pages.free([page], epoch=0)
    before = driver.physical_bytes
    pages.release(page)
    assert driver.physical_bytes == before - pages.layout.page_bytes
    assert not pages.backed[page] and pages.num_available == 8
    with pytest.raises(VTensorError, match="not free and backed"):
        pages.release(page)
    assert pages.take_many(1) == [page]
    assert driver.physical_bytes == before


def test_releasable_waits_for_launches_and_keeps_what_it_is_told(pages: Pages) -> None:
    taken = pages.take_many(4)
    for epoch, page in enumerate(taken, 1):
        pages.free([page], epoch)
    assert list(pages.releasable(0, settled_epoch=0)) == []
    assert list(pages.releasable(0, settled_epoch=2)) == taken[:2]
    assert list(pages.releasable(3, settled_epoch=2)) == taken[:1]
    assert list(pages.releasable(4, settled_epoch=9)) == []


def test_a_page_that_a_launch_zeroes_is_not_released_before_its_end(pages: Pages) -> None:
    assert pages.secure(2)
    assert set(pages.take_fresh(epoch=5)) == {PADDING_PAGE, 1, 2}
    assert list(pages.releasable(0, settled_epoch=4)) == []
    assert list(pages.releasable(0, settled_epoch=5)) == [1, 2]


def test_fresh_pages_are_named_once_and_not_after_their_release(pages: Pages) -> None:
    pages.secure(2)
    pages.release(1)
    assert set(pages.take_fresh(1)) == {PADDING_PAGE, 2}
    assert not pages.take_fresh(2)


def test_reset_frees_everything_and_keeps_the_memory(pages: Pages) -> None:
    taken = pages.take_many(5)
    pages.fence(taken[0])
    pages.free([taken[1]], epoch=0)
    pages.reset(epoch=0)
    assert (pages.num_available, pages.num_free_backed, pages.num_in_use, len(pages.fenced)) == (8, 5, 0, 0)


def test_close_gives_everything_back(pages: Pages, driver: HostDriver) -> None:
    pages.take_many(4)
    pages.secure(2)
    pages.close()
    assert (driver.num_mappings, driver.physical_bytes, driver.num_handles, driver.num_reservations) == (0, 0, 0, 0)
