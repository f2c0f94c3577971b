"""What a judge's reply says: read strictly, as JSON or as one fixed form of words, and never run."""

import json
import math
import re

from .judge_items import Verdict

# Longer than any sensible reply; reading one takes time that grows with it.
_MAX_CHARACTERS = 20_000
_MAX_CHARACTERS_OF_WORDS = 200
# Possessive (`*+`): backtracking would take time with the square of the length.
_FENCE = re.compile(r"```[a-zA-Z]*+(.*?)```", re.DOTALL)
# What reasoning models think before they answer.
_THOUGHT = re.compile(r"\s*+<think>.*?</think>", re.DOTALL)
# `verdict: yes, score: 4`, with or without braces and quotes: the other form that language models like to answer in.
_KEY = r"""["']?{name}["']?\s*[:=]\s*"""
_PLAIN_SCORE = re.compile(
    r"\{?\s*(?:" + _KEY.format(name="(?:verdict|pred)") + r"""["']?(?P<verdict>yes|no)["']?\s*[,;\n]\s*)?"""
    + _KEY.format(name="score") + r"""["']?(?P<score>[0-9]{1,2}(?:\.[0-9]{1,6})?)["']?\s*[.,]?\s*\}?""",
    re.IGNORECASE | re.ASCII,
)  # fmt: skip


class UnparsedReplyError(ValueError):
    """A reply that says nothing that can be counted; names what was expected."""


def parse_reply(reply: str, has_verdict: bool) -> Verdict:
    """The verdict in a reply.

    Args:
        reply: what the judge wrote.
        has_verdict: whether a yes or no is asked for beside the score.

    Returns:
        The verdict; its score is from 0 to 5.

    Raises:
        UnparsedReplyError: none is there, more than one, or its score lies outside.
    """
    if len(reply) > _MAX_CHARACTERS:
        raise UnparsedReplyError(f"{len(reply)} characters, expected a short reply")
    thought = _THOUGHT.match(reply)
    reply = reply[thought.end() :] if thought else reply
    found = _from_json(reply)
    if found is None:
        found = _from_words(reply)
    if found is None:
        raise UnparsedReplyError("neither a JSON object nor `verdict: …, score: …`")
    score = _score(found.get("score"))
    if not has_verdict:
        return Verdict(score)
    # "pred" is how Video-ChatGPT's judges call it, and what some models say from habit.
    verdict = found.get("verdict", found.get("pred"))
    if not isinstance(verdict, str) or verdict.strip().lower() not in ("yes", "no"):
        raise UnparsedReplyError(f"verdict is {_short(verdict)}, expected yes or no")
    return Verdict(score, verdict.strip().lower() == "yes")


def _from_json(reply: str) -> dict | None:
    """The one JSON object of a reply, which may stand in a code fence; None: there is no such thing."""
    fenced = _FENCE.findall(reply)
    if len(fenced) > 1:
        raise UnparsedReplyError(f"{len(fenced)} blocks of code, expected one verdict")
    text = (fenced[0] if fenced else reply).strip()
    try:
        found = json.loads(text, object_pairs_hook=_without_repetition)
    except UnparsedReplyError:
        raise
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        raise UnparsedReplyError(f"JSON, but a {type(found).__name__}, expected an object")
    return found


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise UnparsedReplyError(f"{_short(key)} stands there twice")
        found[key] = value
    return found


def _from_words(reply: str) -> dict | None:
    """The same from `verdict: yes, score: 4`; nothing else may stand beside it."""
    reply = reply.strip()
    match = _PLAIN_SCORE.fullmatch(reply) if len(reply) <= _MAX_CHARACTERS_OF_WORDS else None
    return None if match is None else {name: value for name, value in match.groupdict().items() if value is not None}


def _score(value) -> float:
    """A number from 0 to 5; written as text it is one, too."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,2}(\.[0-9]{1,6})?\s*", value, re.ASCII):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnparsedReplyError(f"score is {_short(value)}, expected a number from 0 to 5")
    # Compared before it is converted: a whole number may be too large for a float.
    if not 0 <= value <= 5 or not math.isfinite(value):
        raise UnparsedReplyError(f"score is {_short(value)}, expected 0 to 5")
    return float(value)


def _short(value) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, a list within lists
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
