"""What an answer is worth without a judge: it equals the truth, contains it, or shares words with it.

All three compare normalised words, so that case, punctuation and articles do not count.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

_ARTICLES = frozenset({"a", "an", "the"})


@lru_cache(2**14)  # each is looked at several times over, and many are the same
def normalise_answer(text: str) -> str:
    """What two answers are compared by: lower case, without punctuation, articles and superfluous white space.

    Args:
        text: an answer.

    Returns:
        Its words joined by single spaces; an answer of articles alone stays as it is.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]", " ", text).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(answer: str, truth: str) -> bool:
    """Whether the answer is the truth and says nothing else; an answer without a word never is."""
    given = normalise_answer(answer)
    return bool(given) and given == normalise_answer(truth)


def containment(answer: str, truth: str) -> bool:
    """Whether the words of the truth stand in the answer, one after the other; whole words only."""
    wanted = normalise_answer(truth)
    return bool(wanted) and f" {wanted} " in f" {normalise_answer(answer)} "


def token_f1(answer: str, truth: str) -> float:
    """The harmonic mean of two shares: of the answer's words that the truth has, and of the truth's that the answer has.

    Source: SQuAD (Rajpurkar et al. 2016, section 6.1). Repeated words count as often as they stand in both.
    """
    given, wanted = normalise_answer(answer).split(), normalise_answer(truth).split()
    num_shared = (Counter(given) & Counter(wanted)).total()
    return 2 * num_shared / (len(given) + len(wanted)) if num_shared else 0.0
