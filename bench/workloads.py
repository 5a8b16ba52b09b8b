"""Named workloads for servers: who says what, how long, and when. The same seed gives the same traffic, always.

A workload is a list of sessions, each with a beginning that its group shares and one or more turns. Sizes in ``TABLE``
are for one large GPU; ``scale`` makes them smaller: lengths by the factor itself, numbers by its square root.

Lengths of chat turns (``Lengths``): their means are published, the log-normal shape and its spread are ours.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

VOCABULARY = range(1000, 40000)
"""Token ids to draw from: in every model's vocabulary that we serve, and no special ones."""
_WORDS = (
    "the a and of to in is was for on with as by at from that it his her they we you this which or had not are "
    "but all one two three new old good great small large long short time year day way man woman child world life "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend"
)
WORDS = tuple(_WORDS.split())
"""For endpoints that take text: words of about one token each."""

Content = tuple[int, ...] | str
"""Token ids, or text."""


@dataclass(frozen=True)
class Lengths:
    """Turns of a chat: how many, and how long in tokens."""

    single_turn: float
    """Share of the conversations that have one turn."""
    turns_mean: float
    most_turns: int
    question_mean: float
    answer_mean: float
    question_sigma: float = 1.0
    answer_sigma: float = 0.8
    most_tokens: int = 2048
    """Longest question or answer."""

    def turns(self, draw: random.Random) -> int:
        if draw.random() < self.single_turn:
            return 1
        # Two, and then geometric, so that the mean of all is turns_mean (before the cut at most_turns).
        more = (self.turns_mean - self.single_turn) / (1 - self.single_turn) - 2
        return min(self.most_turns, 2 + int(math.log(1 - draw.random()) / math.log(more / (1 + more))))

    def question(self, draw: random.Random) -> int:
        return _log_normal(draw, self.question_mean, self.question_sigma, self.most_tokens)

    def answer(self, draw: random.Random) -> int:
        return _log_normal(draw, self.answer_mean, self.answer_sigma, self.most_tokens)


SHAREGPT = Lengths(single_turn=0.27, turns_mean=5.75, most_turns=20, question_mean=161, answer_mean=338)
"""ShareGPT, as papers describe it: 73% of the conversations have several turns, 5.75 turns on average (CachedAttention,
arXiv 2403.19708); 161 tokens in a prompt and 338 in an answer on average (vLLM, arXiv 2309.06180, section 6.1)."""


@dataclass(frozen=True)
class Turn:
    """What the user adds, how much the server is to answer, and how long the user thinks before."""

    content: Content
    answer_tokens: int
    think_s: float = 0.0
    scripted: Content = ()
    """An answer to put into the history in place of the server's."""


@dataclass(frozen=True)
class Session:
    """One conversation."""

    number: int
    group: int
    system: Content
    turns: tuple[Turn, ...]
    start_s: float = 0.0
    """When it begins, from the start of the run. Closed loop: 0, it begins when its user's last one has ended."""


@dataclass(frozen=True)
class Workload:
    """Sessions, and how many users play them at a time (closed loop); ``users`` of 0 means open loop."""

    name: str
    sessions: tuple[Session, ...]
    users: int
    in_waves: bool = False
    """Whether users begin their sessions together, and go on together after the first turn, so that a server's figures
    can be told apart: those of first turns, and those of later ones."""

    @property
    def case(self) -> str:
        """For a row of results: the name and what tells it from the same name at another scale or seed."""
        requests = sum(len(session.turns) for session in self.sessions)
        loop = f"c{self.users}" if self.users else "open loop"
        return f"{self.name} {len(self.sessions)} sessions {requests} requests {loop} longest {self.longest}"

    @property
    def longest(self) -> int:
        """Tokens (or words) of the longest prompt with its answer: what the context must hold."""
        return max(
            _size(session.system) + sum(_size(turn.content) + turn.answer_tokens for turn in session.turns)
            for session in self.sessions
        )


@dataclass(frozen=True)
class Kind:
    """One row of the table: sizes at scale 1, in tokens. Lengths of 0 for question and answer follow ``trace``."""

    what: str
    users: int
    sessions: int
    groups: int
    system: int
    turns: int = 1
    """0: as in the trace."""
    question: int = 0
    answer: int = 0
    history: int = 0
    """Of each session's own, before its first question."""
    in_waves: bool = False
    trace: Lengths = SHAREGPT


TABLE = {
    "chat": Kind("chats with ShareGPT's lengths; 4 system prompts", 32, 64, 4, 512, turns=0),
    "chat-16k": Kind(
        "chats of 8 turns that grow to 16k tokens", 16, 64, 1, 1024, turns=8, question=1408, answer=512, in_waves=True
    ),
    "chat-32k": Kind("chats that go on after 32k tokens", 8, 8, 1, 512, turns=4, history=32_000),
    "chat-100k": Kind("chats that go on after 100k tokens", 3, 3, 1, 512, turns=3, history=100_000),
    "shared-few": Kind("4 system prompts, many users each", 32, 128, 4, 4096, question=128, answer=64),
    "shared-many": Kind("64 system prompts, few users each", 32, 256, 64, 2048, question=128, answer=64),
    "document": Kind("one document of 64k tokens, many questions", 16, 64, 1, 64_000, question=64, answer=64),
    # About 220 tokens an answer: what SGLang's own agentic benchmark takes for traces like OpenHands'.
    "agent": Kind("agents: tools and rules for all, 12 steps", 16, 16, 1, 4096, turns=12, question=600, answer=220),
    "single": Kind("one question each, nothing shared", 32, 128, 128, 0, question=1024, answer=128),
    "generate": Kind(
        "long answers to long questions, as in the vTensor paper", 16, 16, 16, 0, question=7000, answer=3000
    ),
    "gsp": Kind("sglang.bench_serving's generated-shared-prefix", 32, 128, 8, 4096, question=256, answer=64),
}


def _parsed(text: str) -> tuple[str, int, int, float]:
    """NAME, NAME:SESSIONS, and @USERS or ~RATE behind either: the name and these numbers; 0: not said."""
    found = re.fullmatch(r"(?P<name>[^:@~]+)(:(?P<sessions>\d+))?(@(?P<users>\d+)|~(?P<rate>\d+(\.\d+)?))?", text)
    if not found:
        raise ValueError(text)
    sessions, users, rate = found["sessions"], found["users"], found["rate"]
    if found["name"] not in TABLE or any(said and not float(said) for said in (sessions, users, rate)):
        raise ValueError(text)
    return found["name"], int(sessions or 0), int(users or 0), float(rate or 0)


def asked_name(text: str) -> str:
    """The type of a command line's workload."""
    try:
        _parsed(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no workload; say NAME, NAME:SESSIONS, NAME@USERS or NAME~RATE with one of "
            f"{', '.join(sorted(TABLE))}"
        ) from None
    return text


def asked(text: str, seed: int, *, scale: float) -> Workload:
    """The workload of a name that a command line took."""
    name, sessions, users, rate = _parsed(text)
    built = build(name, seed, scale=scale, sessions=sessions, users=users, rate=rate)
    return replace(built, name=text) if rate else replace(built, name=text.partition("@")[0])


def build(
    name: str | Kind,
    seed: int,
    *,
    scale: float = 1.0,
    text: bool = False,
    think_s: float = 0.0,
    rate: float = 0.0,
    users: int = 0,
    sessions: int = 0,
) -> Workload:
    """One workload of the table, or of a kind that is not in it.

    Args:
        text: words in place of token ids.
        think_s: mean time between an answer and the next question of its user, in seconds; exponential.
        rate: sessions a second, Poisson (open loop); 0: closed loop.
        users: in place of the table's number of users in a closed loop.
        sessions: in place of the table's number of conversations.

    Raises:
        KeyError: no such name.
    """
    kind = TABLE[name] if isinstance(name, str) else name
    name = name if isinstance(name, str) else kind.what
    draw = random.Random(f"{name} {seed}")

    def number(count: int) -> int:
        return max(min(count, 2), round(count * math.sqrt(scale)))

    def tokens(count: int) -> int:
        return max(1, round(count * scale)) if count else 0

    groups = number(kind.groups)
    systems = [_content(draw, tokens(kind.system), text) for _ in range(groups)]
    all_sessions, start_s = [], 0.0
    for index in range(sessions or max(number(kind.sessions), users)):
        turns = []
        for turn in range(kind.turns or kind.trace.turns(draw)):
            question = tokens(kind.question or kind.trace.question(draw))
            answer = tokens(kind.answer or kind.trace.answer(draw))
            turns.append(
                Turn(
                    content=_content(draw, question + (0 if turn else tokens(kind.history)), text),
                    # Two at least: a gap between tokens needs them.
                    answer_tokens=max(2, answer),
                    think_s=draw.expovariate(1 / think_s) if think_s and turn else 0.0,
                    scripted=_content(draw, max(2, answer), text),
                )
            )
        start_s += draw.expovariate(rate) if rate else 0.0
        all_sessions.append(Session(index, index % groups, systems[index % groups], tuple(turns), start_s))
    if kind.groups > 1 and len(all_sessions) > groups:
        draw.shuffle(all_sessions)
    at_once = 0 if rate else min(users or number(kind.users), len(all_sessions))
    return Workload(name, tuple(all_sessions), at_once, kind.in_waves and not rate)


@dataclass(frozen=True)
class Conversation:
    """Of a file: questions and their answers, behind a system prompt if the file has one."""

    pairs: tuple[tuple[str, str], ...]
    system: str | None = None


def from_file(
    path: Path, seed: int, *, sessions: int, users: int, groups: int = 1, system: int = 0, think_s: float = 0.0,
    rate: float = 0.0, tokens_a_character: float = 0.25,
) -> Workload:  # fmt: skip
    """Conversations from ShareGPT's JSON, or agents' sessions from a ``BFCL_*_multi_turn_*.json`` of bfcl-eval.

    Answers are as long as the ones in the file, counted by ``tokens_a_character``, for no tokenizer is asked.

    Args:
        groups, system: so many system prompts of so many words, where the file has none.

    Raises:
        ValueError: the file has neither form, or holds no conversation.
        FileNotFoundError: it, or for bfcl-eval one of the files that belong to it, is not there.
    """
    draw = random.Random(seed)
    found = read_bfcl(path) if _is_bfcl(path) else read_sharegpt(path)
    if not found:
        raise ValueError(f"{path} holds no conversation; see the docstrings of read_sharegpt and read_bfcl")
    drawn = [_content(draw, system, True) for _ in range(groups)]
    number_of: dict[Content, int] = {}
    chosen, start_s = [], 0.0
    for index, conversation in enumerate(draw.sample(found, min(sessions, len(found)))):
        turns = tuple(
            Turn(
                content=question,
                answer_tokens=max(2, round(tokens_a_character * len(answer))),
                think_s=draw.expovariate(1 / think_s) if think_s and number else 0.0,
                scripted=answer,
            )
            for number, (question, answer) in enumerate(conversation.pairs)
        )
        start_s += draw.expovariate(rate) if rate else 0.0
        beginning = drawn[index % groups] if conversation.system is None else conversation.system
        group = number_of.setdefault(beginning, len(number_of))
        chosen.append(Session(index, group, beginning, turns, start_s))
    return Workload(path.name, tuple(chosen), 0 if rate else min(users, len(chosen)))


def read_sharegpt(path: Path) -> list[Conversation]:
    """From ``[{"conversations": [{"from": "human" or "gpt", "value": text}, ...]}]``."""
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        said = [(one.get("from"), one.get("value", "")) for one in entry.get("conversations", [])]
        while said and said[0][0] not in ("human", "user"):
            said.pop(0)
        pairs = tuple(
            (question, answer)
            for (asker, question), (answerer, answer) in zip(said[::2], said[1::2], strict=False)
            if asker in ("human", "user") and answerer in ("gpt", "chatgpt", "assistant") and question and answer
        )
        if pairs:
            found.append(Conversation(pairs))
    return found


BFCL_DOCS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Where bfcl-eval describes a class's functions (executable_backend_config.py, MULTI_TURN_FUNC_DOC_FILE_MAPPING)."""


def _is_bfcl(path: Path) -> bool:
    with path.open(encoding="utf-8") as lines:
        return lines.read(1) == "{"  # an object a line; ShareGPT's file is one list


def read_bfcl(path: Path) -> list[Conversation]:
    """Sessions of agents, an object a line: ``{"id", "question": [[{"role", "content"}], ...], "involved_classes"}``.

    The functions of its classes stand before each session, as ``multi_turn_func_doc/`` beside the file describes them;
    what is answered is the calls in ``possible_answer/``. Their results are not played.
    """
    answers = {
        one["id"]: one["ground_truth"] for one in map(json.loads, _lines(path.parent / "possible_answer" / path.name))
    }
    found = []
    for session in map(json.loads, _lines(path)):
        try:
            names = [BFCL_DOCS[name] for name in session["involved_classes"]]
            turns = zip(session["question"], answers[session["id"]], strict=True)
        except KeyError as error:
            raise ValueError(f"{path} is no multi-turn file of bfcl-eval: {error} is missing or unknown") from error
        pairs = tuple(
            ("\n".join(one["content"] for one in asked), f"[{', '.join(calls)}]") for asked, calls in turns if asked
        )
        docs = (line for name in names for line in _lines(path.parent / "multi_turn_func_doc" / f"{name}.json"))
        if pairs:
            found.append(Conversation(pairs, "Answer with calls of these functions.\n" + "\n".join(docs)))
    return found


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def describe() -> str:
    """The table, for --help."""
    return "\n".join(f"  {name:12} {kind.what}" for name, kind in TABLE.items())


def _content(draw: random.Random, count: int, text: bool) -> Content:
    if text:
        return " ".join(draw.choice(WORDS) for _ in range(count))
    return tuple(draw.randrange(VOCABULARY.start, VOCABULARY.stop) for _ in range(count))


def _log_normal(draw: random.Random, mean: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


def _size(content: Content) -> int:
    return len(content.split()) if isinstance(content, str) else len(content)
