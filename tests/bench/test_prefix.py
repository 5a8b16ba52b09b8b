"""bench_prefix.py on small workloads: its books add up, and what fits is found whatever the page."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_prefix
import pytest
import workloads


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
@pytest.mark.parametrize("name", ["chat", "shared-many"])
def test_every_token_of_the_pool_is_free_or_kept(name: str, page_tokens: int) -> None:
    workload = workloads.build(name, 1, scale=0.05)
    kept = bench_prefix._kept_of_all(workload)
    world = bench_prefix.world_of(workload, kept * 2 // 3, page_tokens)
    total = world.room_tokens()
    for _ in range(2):
        assert 0 <= bench_prefix.play(world, workload) < 1
        assert world.room_tokens() == total, "all of it can go once nobody runs"
        assert 0 < world.held_tokens() <= total


def test_hits_do_not_depend_on_pages_where_all_fits(tmp_path: Path) -> None:
    options = "--no-record --scale=0.05 --seeds=1 --workloads chat --pages 16 64 --pools 9 0.5"
    bench_prefix.main([*options.split(), f"--out={tmp_path}"])
    with (tmp_path / "prefix.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["impl"] for row in rows} == {"sglang-p1", "vtensor-p16", "vtensor-p64"}
    found = {(row["case"].rpartition(" ")[2], row["impl"], row["metric"]): float(row["p50"]) for row in rows}
    for state in bench_prefix.STATES:
        hits = [found["900%", impl, f"hits {state}"] for impl in ("sglang-p1", "vtensor-p16", "vtensor-p64")]
        # Of a prompt that is being computed only whole pages are shared: here a page is as long as many a question.
        assert max(hits) - min(hits) < 0.02 and min(hits) > 0.3
    assert found["50%", "sglang-p1", "hits warm"] < found["900%", "sglang-p1", "hits warm"]
    held = [found["900%", impl, "held"] for impl in ("sglang-p1", "vtensor-p16", "vtensor-p64")]
    assert held == sorted(held) and held[0] == 1
    assert (tmp_path / "prefix-chat-0.50.svg").exists()
