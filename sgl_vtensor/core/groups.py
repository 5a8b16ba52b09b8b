"""Which requests of a batch begin with the same pages, so that a decode kernel reads these once for several of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def alone(batch: int) -> npt.NDArray[np.int32]:
    """Groups of one request each, as ``group_prefixes`` returns them."""
    groups = np.zeros((4, batch), dtype=np.int32)
    groups[0] = groups[1] = np.arange(batch)
    groups[2] = 1
    return groups


def group_prefixes(
    pages: npt.NDArray[np.int32],
    num_pages: npt.NDArray[np.int64],
    *,
    page_tokens: int,
    max_members: int,
    min_pages: int,
) -> npt.NDArray[np.int32]:
    """Put requests together that share their first pages, ``max_members`` in a group at most.

    Args:
        pages: [batch, max_pages], page ids of each request in order.
        num_pages: [batch], how many of them may be shared: full ones, but not the last token's.
        page_tokens: tokens of a page.
        max_members: requests that a tile of the kernel has room for.
        min_pages: fewer shared pages are not worth a group: each member gets one more part to combine.

    Returns [4, batch]: requests in an order in which groups are together; for each position of it the position that its
    group begins at, how many requests the group has (0 but at its beginning), and how many tokens it shares.
    """
    batch = len(pages)
    groups = alone(batch)
    width = int(num_pages.max(initial=0))
    if max_members < 2 or width < min_pages:
        return groups
    # Where a request has no page it has a number of its own.
    own = -1 - np.arange(batch, dtype=np.int32)[:, None]
    known = np.where(np.arange(width) < num_pages[:, None], pages[:, :width], own)
    # Any order of the bytes has rows together that begin alike, and more so the longer they do.
    order = np.argsort(np.ascontiguousarray(known).view(np.dtype((np.void, 4 * width))).ravel(), kind="stable")
    ordered = known[order]
    differs = ordered[1:] != ordered[:-1]
    common = np.where(differs.any(1), differs.argmax(1), width).tolist()
    groups[0] = order
    first = 0
    while first < batch:
        members, shared = 1, width
        while first + members < batch and members < max_members:
            longer = min(shared, common[first + members - 1])
            # One more reads the group's keys for nothing, but may shorten what all of them share.
            if longer < min_pages or longer * members <= shared * (members - 1):
                break
            members, shared = members + 1, longer
        if members > 1:
            group = slice(first, first + members)
            groups[1, group] = first
            groups[2, group] = 0
            groups[2, first] = members
            groups[3, group] = shared * page_tokens
        first += members
    return groups


def saved_tokens(groups: npt.NDArray[np.int32]) -> int:
    """Tokens that are read less often, by groups as ``group_prefixes`` returns them."""
    members, tokens = groups[2], groups[3]
    return int(((members - 1) * tokens)[members > 0].sum())
