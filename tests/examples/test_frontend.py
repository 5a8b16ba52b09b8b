"""The frontend language programs, run as a user would, on one server on vTensor memory: what they share is shared."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from server import PAGE_TOKENS, SGLangServer

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Report:
    """What a program printed: all of it, and the figures at its end."""

    text: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    pages_reused: int
    pages_shared: int


Run = Callable[[str], Report]


@pytest.fixture
def run(server: SGLangServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run one program with an empty cache; the server is idle and its books are in order afterwards."""

    def program(name: str) -> Report:
        server.flush_cache()
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, f"--url=http://127.0.0.1:{server.port}"])
        # In this process: a new one would take 6 s to import SGLang.
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        text = capsys.readouterr().out
        figures = re.search(
            rf"(\d+) requests: (\d+) prompt tokens, (\d+) cached .*\n"
            rf"pages of {PAGE_TOKENS} tokens: (\d+) taken .* at most (\d+) shared",
            text,
        )
        assert figures, text
        return Report(text, *map(int, figures.groups()))

    yield program
    server.check_healthy()


def test_chat_every_turn_has_the_ones_before_it_cached(run: Run) -> None:
    report = run("frontend_chat.py")
    cached = [int(count) for count in re.findall(r"(\d+) tokens were cached", report.text)]
    assert len(cached) == report.requests == 4
    assert cached[0] == 0 and cached == sorted(set(cached)), "each turn has more cached than the one before"
    # What is new in a turn is an answer of up to 40 tokens, which is not said again, and a question.
    assert report.cached_tokens > 0.6 * report.prompt_tokens
    assert report.pages_reused == sum(count // PAGE_TOKENS for count in cached)


def test_few_shot_examples_are_computed_once(run: Run) -> None:
    report = run("frontend_few_shot.py")
    assert len(re.findall(r"^(?:positive|negative|neutral) ", report.text, re.MULTILINE)) == 8
    assert report.cached_tokens > 0.9 * report.prompt_tokens
    assert report.pages_shared >= 5, "the examples fill more than five pages, and run in several requests at once"


def test_branches_of_a_fork_share_what_came_before(run: Run) -> None:
    report = run("frontend_tips.py")
    assert report.requests == 5
    # Four branches and the summary begin with about 100 tokens that fork has sent ahead.
    assert report.cached_tokens > 0.6 * report.prompt_tokens
    assert report.pages_shared >= 5


def test_tree_of_thought_shares_task_and_plans(run: Run) -> None:
    report = run("frontend_tree_of_thought.py")
    grades = re.search(r"grades of the 3 plans: \[(\d), (\d), (\d)\]", report.text)
    assert grades and all(1 <= int(grade) <= 5 for grade in grades.groups())
    assert report.cached_tokens > 0.8 * report.prompt_tokens
    assert report.pages_shared >= 5


def test_json_has_the_form_of_the_regular_expression(run: Run) -> None:
    report = run("frontend_json.py")
    lines = [line for line in report.text.splitlines() if line.startswith("{")]
    assert len(lines) == report.requests == 4
    for line in lines:
        found = json.loads(line.replace("'", '"').replace("True", "true").replace("False", "false"))
        assert found["kind"] in ("ferry", "tanker", "trawler", "yacht") and 1 <= found["length_m"] <= 999
    assert report.cached_tokens > 0.5 * report.prompt_tokens


def test_without_a_server_a_program_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["frontend_chat.py", "--url=http://127.0.0.1:9"])
    with pytest.raises(SystemExit, match=r"No server answers at http://127\.0\.0\.1:9"):
        runpy.run_path(str(EXAMPLES / "frontend_chat.py"), run_name="__main__")
