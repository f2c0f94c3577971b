"""Scores that need no judge: answers counted by kind of question, with intervals, beside chance."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .intervals import clip_interval, wilson_interval
from .questions import Question
from .text_scores import containment, exact_match, normalise_answer, token_f1


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95% interval.

    Attributes:
        value: the mean.
        low, high: the interval, by resampling clips.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, videos: Sequence[str], values: Sequence[float]) -> "Estimate":
        """The mean of `values`, one of each question; `videos` says which questions are about one clip."""
        return cls(float(np.mean(values)), *clip_interval(videos, values))


@dataclass(frozen=True)
class ScoreRow:
    """How the answers to one kind of question agree with the truth.

    Attributes:
        kind: of question; "all" for the whole.
        num_questions, num_correct: counts; correct is what equals the truth after `normalise_answer`.
        num_unanswered: questions without an answer (None, or no word in it); they count as wrong.
        accuracy: num_correct / num_questions.
        low, high: its 95% interval: Wilson's where each clip was asked once, else by resampling clips.
        chance: what guessing gets, or None where that has no meaning.
        containment: the share of answers that contain the truth.
        token_f1: the mean of `text_scores.token_f1`.
    """

    kind: str
    num_questions: int
    num_correct: int
    num_unanswered: int
    accuracy: float
    low: float
    high: float
    chance: float | None
    containment: Estimate
    token_f1: Estimate


@dataclass(frozen=True)
class ScoreTable:
    """Scores by kind, and over all questions.

    Attributes:
        rows: one for each kind that was asked.
        total: over all questions.
        macro_accuracy: the mean of the kinds' accuracies, each kind weighing the same.
        num_left_out: questions whose clip could not be read; they are in no row.
    """

    rows: tuple[ScoreRow, ...]
    total: ScoreRow
    macro_accuracy: float
    num_left_out: int = 0

    def __getitem__(self, kind: str) -> ScoreRow:
        for row in (*self.rows, self.total):
            if row.kind == kind:
                return row
        raise KeyError(f"no questions of kind {kind!r} were asked; there are {[row.kind for row in self.rows]}")

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table by kind, in percent: accuracy with its interval beside chance, and what is less strict."""
        lines = [
            "| kind | questions | correct | accuracy % | 95% interval | chance % | contains the truth % | token F1 % |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in (*self.rows, self.total):
            chance = "" if row.chance is None else f"{100 * row.chance:.1f}"
            lines.append(
                f"| {row.kind} | {row.num_questions} | {row.num_correct} | {100 * row.accuracy:.1f} "
                f"| {100 * row.low:.1f} to {100 * row.high:.1f} | {chance} "
                f"| {100 * row.containment.value:.1f} | {100 * row.token_f1.value:.1f} |"
            )
        if self.num_left_out:
            lines += ["", f"Left out, because their clips could not be read: {self.num_left_out} questions."]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()


def score(
    questions: Sequence[Question],
    answers: Sequence[str | None],
    chance: Mapping[str, float] | None = None,
    kinds: Sequence[str] | None = None,
    num_left_out: int = 0,
) -> ScoreTable:
    """Compare answers with the truth.

    Args:
        questions: what was asked.
        answers: one for each question, in the same order; None or a text without a word is a wrong answer.
        chance: by kind, what guessing gets.
        kinds: the order of the rows; default: as they come.
        num_left_out: of questions that are not among these, for the record.

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
    pairs = [(question, answer or "") for question, answer in zip(questions, answers)]
    rows = []
    for kind in kinds or asked:
        own = [pair for pair in pairs if pair[0].kind == kind]
        if own:
            rows.append(_row(kind, own, chance.get(kind)))
    all_chances = [chance.get(question.kind) for question in questions]
    total = _row("all", pairs, None if None in all_chances else float(np.mean(all_chances)))
    return ScoreTable(tuple(rows), total, float(np.mean([row.accuracy for row in rows])), num_left_out)


def _row(kind: str, pairs: Sequence[tuple[Question, str]], chance: float | None) -> ScoreRow:
    videos = [question.video for question, _ in pairs]
    is_correct, is_contained, shared = (
        [measure(answer, question.answer) for question, answer in pairs]
        for measure in (exact_match, containment, token_f1)
    )
    num_questions, num_correct = len(pairs), sum(is_correct)
    is_independent = len(set(videos)) == num_questions
    return ScoreRow(
        kind,
        num_questions,
        num_correct,
        # Punctuation alone is no answer, whatever the truth is.
        sum(not normalise_answer(answer) for _, answer in pairs),
        num_correct / num_questions,
        *(wilson_interval(num_correct, num_questions) if is_independent else clip_interval(videos, is_correct)),
        chance,
        Estimate.of(videos, is_contained),
        Estimate.of(videos, shared),
    )
