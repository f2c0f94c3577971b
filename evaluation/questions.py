"""What every benchmark has in common: questions about clips, and answers counted by kind of question.

Nothing here knows a model: a benchmark gives questions, something else answers them, and `score` counts.
"""

import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution's 97.5% point
_ARTICLES = frozenset({"a", "an", "the"})
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Question:
    """One question about one clip.

    Attributes:
        id: its own name within the benchmark.
        video: path of the clip, relative to the benchmark's folder.
        question: the text.
        answer: the true answer.
        kind: what it is about, for example "colour".
        choices: the possible answers, the true one among them; empty where the answer is open.
    """

    id: str
    video: str
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...] = ()


class Benchmark(ABC):
    """A set of questions about clips.

    Attributes:
        name: how commands call it.
        kinds: the kinds of questions, in the order of the report.
        chance: for each kind, the share that guessing gets right; empty for open answers.
    """

    name: str
    kinds: tuple[str, ...]
    chance: Mapping[str, float]

    @property
    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """All questions, in a fixed order."""

    @abstractmethod
    def video_path(self, question: Question) -> Path:
        """The file that a question is about."""

    def score(self, questions: Sequence[Question], answers: Sequence[str | None]) -> "ScoreTable":
        """See `score`."""
        return score(questions, answers, self.chance, self.kinds)


# ----------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class ScoreRow:
    """How many answers to one kind of question are right.

    Attributes:
        kind: of question; "all" for the whole.
        num_questions, num_correct: counts.
        num_unanswered: questions without an answer (None, or no word in it); they count as wrong.
        accuracy: num_correct / num_questions.
        low, high: its 95% interval.
        chance: what guessing gets, or None where that has no meaning.
    """

    kind: str
    num_questions: int
    num_correct: int
    num_unanswered: int
    accuracy: float
    low: float
    high: float
    chance: float | None


@dataclass(frozen=True)
class ScoreTable:
    """Scores by kind, and over all questions.

    Attributes:
        rows: one for each kind that was asked.
        total: over all questions, its interval by resampling clips: the questions about one clip are not independent.
        macro_accuracy: the mean of the kinds' accuracies, each kind weighing the same.
    """

    rows: tuple[ScoreRow, ...]
    total: ScoreRow
    macro_accuracy: float

    def __getitem__(self, kind: str) -> ScoreRow:
        for row in (*self.rows, self.total):
            if row.kind == kind:
                return row
        raise KeyError(f"no questions of kind {kind!r} were asked; there are {[row.kind for row in self.rows]}")

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table by kind: accuracy with its 95% interval beside chance, in percent."""
        lines = ["| kind | questions | correct | accuracy % | 95% interval | chance % |", "|---|--:|--:|--:|--:|--:|"]
        for row in (*self.rows, self.total):
            chance = "" if row.chance is None else f"{100 * row.chance:.1f}"
            lines.append(
                f"| {row.kind} | {row.num_questions} | {row.num_correct} | {100 * row.accuracy:.1f} "
                f"| {100 * row.low:.1f} to {100 * row.high:.1f} | {chance} |"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()


def score(
    questions: Sequence[Question],
    answers: Sequence[str | None],
    chance: Mapping[str, float] | None = None,
    kinds: Sequence[str] | None = None,
) -> ScoreTable:
    """Count the answers that equal the truth after `normalise_answer`.

    Args:
        questions: what was asked.
        answers: one for each question, in the same order; None or a text without a word is a wrong answer.
        chance: by kind, what guessing gets.
        kinds: the order of the rows; default: as they come.

    Returns:
        The table.

    Raises:
        ValueError: no questions, another number of answers than of questions, or a kind that is not among `kinds`.
    """
    if not questions:
        raise ValueError("there are no questions to score, expected at least one")
    if len(questions) != len(answers):
        raise ValueError(f"got {len(answers)} answers to {len(questions)} questions, expected one each, in order")
    asked = list(dict.fromkeys(question.kind for question in questions))
    if kinds is not None and (unknown := [kind for kind in asked if kind not in kinds]):
        raise ValueError(f"questions of the kinds {unknown} are unknown here, expected some of {list(kinds)}")
    chance = chance or {}
    given = [normalise_answer(answer or "") for answer in answers]
    # Punctuation alone is no answer, whatever the truth is.
    is_answered = np.array([bool(answer) for answer in given])
    is_right = [answer == normalise_answer(question.answer) for question, answer in zip(questions, given)]
    is_correct = is_answered & np.array(is_right)
    rows = []
    for kind in kinds or asked:
        places = [place for place, question in enumerate(questions) if question.kind == kind]
        if places:
            num_correct = int(is_correct[places].sum())
            interval = wilson_interval(num_correct, len(places))
            rows.append(_row(kind, is_answered[places], num_correct, interval, chance.get(kind)))
    all_chances = [chance.get(question.kind) for question in questions]
    total_chance = None if None in all_chances else float(np.mean(all_chances))
    interval = _clip_interval([question.video for question in questions], is_correct)
    total = _row("all", is_answered, int(is_correct.sum()), interval, total_chance)
    return ScoreTable(tuple(rows), total, float(np.mean([row.accuracy for row in rows])))


def _row(kind, is_answered: np.ndarray, num_correct: int, interval, chance: float | None) -> ScoreRow:
    num_questions = len(is_answered)
    num_unanswered = int((~is_answered).sum())
    return ScoreRow(kind, num_questions, num_correct, num_unanswered, num_correct / num_questions, *interval, chance)


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


def wilson_interval(num_correct: int, num_questions: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927), which is sensible at 0 and 1, too.

    Args:
        num_correct, num_questions: counts, 0 <= num_correct <= num_questions.

    Returns:
        (low, high), within [0, 1].

    Raises:
        ValueError: the counts are not such counts.
    """
    if not 0 <= num_correct <= num_questions or num_questions == 0:
        raise ValueError(
            f"got {num_correct} right of {num_questions}, expected 0 <= right <= questions, and a question"
        )
    share, weight = num_correct / num_questions, Z_95**2 / num_questions
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / num_questions + weight / (4 * num_questions))
    # At the ends rounding may fall a hair beyond what the formula gives exactly.
    low = 0.0 if num_correct == 0 else max(0.0, centre - half)
    return low, 1.0 if num_correct == num_questions else min(1.0, centre + half)


def _clip_interval(videos: Sequence[str], is_correct: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95% interval of the share correct, drawing whole clips; the same numbers on every call."""
    _, clips = np.unique(np.array(videos), return_inverse=True)
    num_asked = np.bincount(clips)
    num_right = np.bincount(clips, weights=is_correct)
    drawn = np.random.Generator(np.random.PCG64(0))
    shares = np.empty(_NUM_RESAMPLES)
    for place in range(_NUM_RESAMPLES):  # one by one: all at once would need clips x resamples numbers
        chosen = drawn.integers(len(num_asked), size=len(num_asked))
        shares[place] = num_right[chosen].sum() / num_asked[chosen].sum()
    return float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def shuffled_labels(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions with the true answers dealt out anew among those of a kind: a check of the evaluation.

    Scored against these, or trained on them, any model must fall to chance. What is dealt out is the *place* of the
    answer among the question's choices, so that "the red or the blue one" never gets the answer "green".

    Args:
        questions: with choices, the true answer among them.
        seed: of the shuffling.

    Returns:
        As many questions in the same order, with other answers.

    Raises:
        ValueError: a question has no choices, or its answer is not among them.
    """
    for question in questions:
        if question.answer not in question.choices:
            raise ValueError(f"{question.id}: the answer {question.answer!r} is not one of {question.choices}")
    drawn = np.random.Generator(np.random.PCG64(seed))
    shuffled = list(questions)
    for group in sorted({(question.kind, len(question.choices)) for question in questions}):
        places = [place for place, q in enumerate(questions) if (q.kind, len(q.choices)) == group]
        labels = [questions[place].choices.index(questions[place].answer) for place in places]
        for place, label in zip(places, drawn.permutation(labels)):
            shuffled[place] = replace(questions[place], answer=questions[place].choices[label])
    return shuffled
