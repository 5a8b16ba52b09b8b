"""The table of answers names rows that there are."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import workloads

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("page", ("README.md", "history.md"))
def test_every_answer_names_its_rows(page: str) -> None:
    table = (BENCH / page).read_text().split("| --- |", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    assert len(table) >= 10
    for line in table:
        question, _, where, *head = (cell.strip() for cell in line.strip("|").split("|"))
        found = re.fullmatch(r"`(\w+\.csv)`: (.+)", where)
        assert found, question
        with (BENCH / "results" / found[1]).open() as file:
            rows = {(row["impl"], row["date"], row["commit"], row["gpu"]) for row in csv.DictReader(file)}
        for name in found[2].split(", "):
            assert (name, *head) in rows, f"{question}: no row of {name} at {head} in {found[1]}"


def test_every_workload_is_described() -> None:
    text = (BENCH / "README.md").read_text()
    assert all(f"`{name}`" in text for name in workloads.TABLE)
