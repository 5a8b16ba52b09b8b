"""What the server tests share: a small random Llama, prompts, and the answers of stock SGLang to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import browser as chromium
import pytest
from fault_plan import FaultPlan
from server import Answer, Imported, SGLangServer, end_at_once

from sgl_vtensor.cli.smollm2 import smollm2
from sgl_vtensor.cli.tiny_model import TinyLlama

VOCABULARY = 49000
MIN_GAP = 1e-4
"""float32 sums differ by about 1e-5 with the shape of a batch; nearer ties would make tokens a matter of luck."""

Start = Callable[..., SGLangServer]


@dataclass(frozen=True)
class Expected:
    """A prompt, and what stock SGLang answers when it is alone."""

    prompt: tuple[int, ...]
    answer: Answer

    @property
    def output_ids(self) -> tuple[int, ...]:
        return self.answer.output_ids

    @property
    def tokens(self) -> int:
        return len(self.output_ids)


@dataclass(frozen=True)
class StockAnswers:
    """Everything that is asked of stock SGLang, in one server start."""

    mixed: tuple[Expected, ...]
    """Of 1 to 600 tokens, every edge of a page of 16 among them; some have a beginning in common. 48 new tokens."""
    hungry: tuple[Expected, ...]
    """Short prompts with long answers: together far more than a small pool holds."""
    twin: Expected
    """A prompt to be sent twice at once."""


def _random_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(length))


def _mixed_prompts() -> list[tuple[int, ...]]:
    rng = random.Random(5)
    lengths = (1, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100, 129, 161, 250, 333, 600)
    beginning = _random_prompt(rng, 200)
    prompts = [_random_prompt(rng, length) for length in lengths]
    # Beginnings that part at a page's edge, just before it, inside a page, and after all of it.
    prompts += [beginning[:shared] + _random_prompt(rng, own) for shared, own in ((192, 5), (191, 40), (70, 90))]
    prompts += [beginning, beginning + _random_prompt(rng, 1), beginning + _random_prompt(rng, 120)]
    return prompts


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyLlama().write(tmp_path_factory.mktemp("model") / "tiny-llama", tokenizer=smollm2())


@pytest.fixture(scope="session")
def start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a server on the small Llama: ``with start("--flag", env={...}) as server``.

    The one after it imports SGLang while its tests go on: that is most of a start, and takes a core that they leave.
    ``then`` says which variables that one is to have; where another comes, only time is lost.
    ``fresh``: as users start it, with nothing done before.
    """
    spares: list[Imported] = []  # one, or none

    def imported(env: dict[str, str] | None) -> Imported:
        return Imported(tmp_path_factory.mktemp("server") / "log", env)

    def end_spares() -> None:
        while spares:
            end_at_once(spares.pop().server)

    def run(
        *flags: str,
        model: Path = tiny_llama,
        env: dict[str, str] | None = None,
        then: dict[str, str] | None = None,
        fresh: bool = False,
    ) -> SGLangServer:
        if fresh:
            return SGLangServer(model, tmp_path_factory.mktemp("server") / "log", flags, env)
        if [spare.env for spare in spares] != [env or {}]:
            end_spares()
            spares.append(imported(env))
        server = SGLangServer(model, spares.pop(), flags)
        spares.append(imported(then))
        return server

    yield run
    end_spares()


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> FaultPlan:
    """Of faults of the servers that are started with its variables."""
    return FaultPlan(tmp_path_factory.mktemp("faults") / "plan.json")


@pytest.fixture(scope="session")
def _tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with chromium.Browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def browser(_tab: chromium.Browser) -> Iterator[chromium.Browser]:
    """A tab of its own kind: whatever the page throws fails the test."""
    yield _tab
    _tab.open("about:blank")
    errors, _tab.errors = _tab.errors, []
    assert not errors


@pytest.fixture(scope="session")
def stock(start: Start, plan: FaultPlan) -> Iterator[StockAnswers]:
    rng = random.Random(6)
    # The first tests that ask for them are those of faults.
    with start("--max-total-tokens=16384", then=plan.environment) as server:

        def ask(prompts: Sequence[tuple[int, ...]], tokens: int = 48) -> tuple[Expected, ...]:
            found = tuple(Expected(prompt, server.generate(prompt, tokens, logprobs=True)) for prompt in prompts)
            near = [len(one.prompt) for one in found if one.answer.least_gap < MIN_GAP]
            assert not near, f"prompts of {near} tokens come too near to a tie; take another seed"
            return found

        answers = StockAnswers(
            mixed=ask(_mixed_prompts()),
            hungry=ask([_random_prompt(rng, 40 + 7 * number) for number in range(8)], tokens=150),
            twin=ask([_random_prompt(rng, 450)], tokens=100)[0],
        )
        server.check_healthy()
    yield answers
