"""Do two servers compute the same? First-token logprobs of prompts that are short, long, shared and chunked, asked one
by one; and those of the tokens that follow, of prompts that are asked together and begin alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from servers import Remote
from workloads import VOCABULARY

PROBED_TOKENS = list(range(100, 1700, 100))
"""Their logprobs are compared, whatever the model says next."""
LEAST_SPREAD = 0.1
"""In nat: a model whose logprobs vary less from prompt to prompt hardly looks at its cache, as with dummy weights."""


DECODED_TOKENS = 96
"""Of each prompt that is asked together with others."""
Decoded = list[tuple[int, float]]
"""Tokens as the server chose them, each with its logprob."""


@dataclass(frozen=True)
class Answer:
    """To one prompt."""

    first_token: int
    logprobs: tuple[float, ...]


def _tokens_of(seed: int) -> Callable[[int], list[int]]:
    """What draws so many tokens more."""
    draw = random.Random(seed)
    return lambda count: [draw.randrange(VOCABULARY.start, VOCABULARY.stop) for _ in range(count)]


def _fitting(server: Remote, longest: int) -> int:
    """The longest prompt that the server takes, too."""
    return min(longest, server.info().get("max_req_input_len") or longest)


def prompts() -> list[list[int]]:
    """32 prompts of 1 to 9 000 tokens.

    Alone, with a beginning that an earlier one has cached, equal to an earlier one, and longer than a chunk of prefill
    (8 192 tokens on a large GPU).
    """
    tokens = _tokens_of(7)
    shared = [tokens(4096), tokens(1000), tokens(127)]
    found = [tokens(count) for count in (1, 15, 16, 17, 63, 64, 65, 500, 1023, 2049, 4097, 8000, 8500, 9000)]
    found += [base + tokens(extra) for base in shared for extra in (1, 16, 200, 777, 3900)]
    found += [found[11], found[14], shared[0]]
    return found


def ask(server: Remote, longest: int) -> dict[int, Answer]:
    """The prompts of at most ``longest`` tokens, one after the other, from an empty cache; by their number."""
    longest = _fitting(server, longest)
    server.flush()
    answers = {}
    for number, prompt in enumerate(prompts()):
        if len(prompt) > longest:
            continue
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": -1,
            "token_ids_logprob": PROBED_TOKENS,
        }
        reply = server.post("/generate", body)
        values = reply["meta_info"]["output_token_ids_logprobs"][0]
        answers[number] = Answer(reply["output_ids"][0], tuple(value for value, *_ in values))
    return answers


def spread(answers: dict[int, Answer]) -> float:
    """How much the prompt decides: the standard deviation over the prompts of a token's logprob, the mean over tokens.

    Where it is small, ``difference`` shows nothing, whatever the servers do.
    """
    by_token = zip(*(answer.logprobs for answer in answers.values()), strict=True)
    return statistics.fmean(statistics.pstdev(values) for values in by_token)


def difference(mine: dict[int, Answer], theirs: dict[int, Answer]) -> dict[str, float]:
    """The largest and the mean difference of any logprob, in nat, and how many first tokens differ, of ``prompts``."""
    pairs = [(mine[number], theirs[number]) for number in mine.keys() & theirs.keys()]
    gaps = [abs(x - y) for own, other in pairs for x, y in zip(own.logprobs, other.logprobs, strict=True)]
    return {
        "prompts": float(len(pairs)),
        "max_abs_diff": max(gaps),
        "mean_abs_diff": sum(gaps) / len(gaps),
        "first_tokens_differ": float(sum(own.first_token != other.first_token for own, other in pairs)),
    }


def ask_together(server: Remote, longest: int) -> dict[int, Decoded]:
    """Prompts of at most ``longest`` tokens, of which several begin alike, all at once; by their number.

    So they are decoded in one batch, in which a backend may read what they share once for several of them.
    """
    tokens, longest = _tokens_of(3), _fitting(server, longest)
    asked = [base + tokens(extra) for base in map(tokens, (4096, 900, 300)) for extra in (1, 5, 40, 128, 129, 300, 700)]
    asked += [tokens(count) for count in (1, 50, 3000)]

    def ask_one(prompt: list[int]) -> Decoded:
        sampling = {"max_new_tokens": DECODED_TOKENS, "temperature": 0, "ignore_eos": True}
        reply = server.post("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
        return [(token, logprob) for logprob, token, *_ in reply["meta_info"]["output_token_logprobs"]]

    server.flush()
    fitting = {number: prompt for number, prompt in enumerate(asked) if len(prompt) + DECODED_TOKENS <= longest}
    with ThreadPoolExecutor(max(len(fitting), 1)) as executor:
        return dict(zip(fitting, executor.map(ask_one, fitting.values()), strict=True))


def decoded_difference(mine: dict[int, Decoded], theirs: dict[int, Decoded]) -> dict[str, float]:
    """The largest and the mean difference of a chosen token's logprob, in nat, up to the first one that differs.

    Greedy decoding parts at a near tie, so ``tokens_alike``, how many are compared of each answer, is small for servers
    whose kernels round differently; wrong keys show in the logprobs.
    """
    gaps, alike = [], []
    for number in mine.keys() & theirs.keys():
        pairs = list(zip(mine[number], theirs[number], strict=True))
        same = next((at for at, (own, other) in enumerate(pairs) if own[0] != other[0]), len(pairs))
        gaps += [abs(own[1] - other[1]) for own, other in pairs[:same]]
        alike.append(same)
    return {
        "decoded_max_abs_diff": max(gaps, default=0.0),
        "decoded_mean_abs_diff": statistics.fmean(gaps) if gaps else 0.0,
        "decoded_tokens_alike": statistics.fmean(alike) if alike else 0.0,
    }
