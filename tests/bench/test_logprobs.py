"""The prompts of the logprob comparison are of the kinds that it promises, and a difference is seen."""

from __future__ import annotations

import pytest
from logprobs import Answer, decoded_difference, difference, prompts, spread


def test_prompts_are_short_long_shared_equal_and_chunked() -> None:
    found = prompts()
    assert len(found) == 32 and found == prompts()
    lengths = [len(prompt) for prompt in found]
    assert min(lengths) == 1 and sum(length > 8192 for length in lengths) >= 2
    hits = [n for n, prompt in enumerate(found) if any(before[:1000] == prompt[:1000] for before in found[:n])]
    assert sum(lengths[n] > 1000 for n in hits) >= 8
    assert len({tuple(prompt) for prompt in found}) < 32


def test_differences_of_the_prompts_that_both_answered() -> None:
    mine = {0: Answer(5, (-1.0, -2.0)), 1: Answer(6, (-1.0, -2.5)), 7: Answer(9, (0.0, 0.0))}
    theirs = {0: Answer(5, (-1.0, -2.0)), 1: Answer(8, (-1.0, -2.0))}
    assert difference(mine, theirs) == pytest.approx(
        {"prompts": 2, "max_abs_diff": 0.5, "mean_abs_diff": 0.125, "first_tokens_differ": 1}
    )


def test_a_model_that_does_not_mind_its_prompt_is_told_from_one_that_does() -> None:
    assert spread({0: Answer(5, (-1.0, -2.0)), 1: Answer(5, (-1.0, -2.0))}) == 0
    assert spread({0: Answer(5, (-1.0, -2.0)), 1: Answer(5, (-3.0, -2.0))}) == pytest.approx(0.5)


def test_decoded_tokens_are_compared_up_to_where_the_answers_part() -> None:
    mine = {0: [(5, -1.0), (6, -2.0), (7, -1.0)], 1: [(5, -1.0), (6, -1.0)]}
    theirs = {0: [(5, -1.25), (6, -2.0), (8, -9.0)], 1: [(5, -1.0), (6, -1.75)], 2: [(5, -50.0)]}
    assert decoded_difference(mine, theirs) == {
        "decoded_max_abs_diff": 0.75, "decoded_mean_abs_diff": 0.25, "decoded_tokens_alike": 2.0,
    }  # fmt: skip
    assert decoded_difference(mine, {}) == dict.fromkeys(decoded_difference(mine, theirs), 0.0)
