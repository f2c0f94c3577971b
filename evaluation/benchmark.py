"""What every benchmark has in common.

Nothing here knows a model: a benchmark gives questions, something else answers them, and the answers are compared with
the truth, by `score` and by a judge.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .judge_items import JudgeItem
from .questions import Question
from .scores import ScoreTable, score


class Benchmark(ABC):
    """A set of questions about clips.

    Attributes:
        name: how commands call it.
        title: how people call it.
        split: which part of it.
        kinds: the kinds of questions, in the order of the report; empty: as they come.
        criteria: the kinds of verdicts that a judge gives; empty: those of the questions.
        chance: for each kind, the share that guessing gets right; empty for open answers.
        num_questions_full: of the whole split, where users may have a part of it.
    """

    name: str
    title: str
    split: str = "test"
    kinds: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()
    chance: Mapping[str, float] = MappingProxyType({})
    num_questions_full: int | None = None

    @property
    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """All questions, in a fixed order."""

    @abstractmethod
    def video_path(self, question: Question) -> Path:
        """The file that a question is about.

        Raises:
            OSError: it is not there.
        """

    def missing_videos(self) -> list[str]:
        """The clips that are not there, found without opening any; empty where they are made when they are needed."""
        return []

    def score(self, questions: Sequence[Question], answers: Sequence[str | None], num_left_out: int = 0) -> ScoreTable:
        """See `scores.score`."""
        return score(questions, answers, self.chance, self.kinds or None, num_left_out)

    def judge_items(self, answers: Mapping[str, str]) -> list[JudgeItem]:
        """What a judge is asked about these answers (by id of the question): for each whether it means the truth."""
        return [
            JudgeItem(question.id, "qa", question.kind, question.video, question.question, question.answer, (answer,))
            for question in self.questions
            if (answer := answers.get(question.id)) is not None
        ]
