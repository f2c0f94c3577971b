"""The account of questions whose clips are missing or cannot be read, and when there are too many."""

from collections.abc import Mapping, Sequence

from .benchmark import Benchmark
from .questions import Question
from .run_folder import Answer

_NUM_NAMED = 10


class TooManyUnreadableError(ValueError):
    """More clips than allowed are missing or cannot be read; names them. Answers that are there are kept."""


class Unreadable:
    """Counts questions that cannot be asked.

    Args:
        benchmark: knows which clips are missing.
        max_share: of questions that may be left out, 0 to 1.

    Attributes:
        asked: the questions whose clips are there.

    Raises:
        ValueError: a share that is none, or too many clips are missing; nothing has cost time by then.
    """

    def __init__(self, benchmark: Benchmark, max_share: float):
        if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not 0 <= max_share <= 1:
            raise ValueError(f"`max_unreadable_share` must be a share from 0 to 1, got {max_share!r}")
        self.name, self.max_share = benchmark.name, max_share
        self.num_questions = len(benchmark.questions)
        if not self.num_questions:
            raise ValueError(f"{benchmark.name}: there are no questions to ask, expected at least one")
        missing = set(benchmark.missing_videos())
        self._missing = [f"{name}: there is no such clip" for name in sorted(missing)]
        self.asked: list[Question] = [question for question in benchmark.questions if question.video not in missing]
        self.check({})

    def check(self, answers: Mapping[str, Answer]) -> None:
        """Raises: TooManyUnreadableError, if it is more than the share by now."""
        errors = [answer.error for answer in answers.values() if answer.error is not None]
        num_left_out = self.num_questions - len(self.asked) + len(errors)
        if num_left_out > self.max_share * self.num_questions or num_left_out == self.num_questions:
            kept = ". Answers are kept: put the clips right and have them tried again" if errors else ""
            raise TooManyUnreadableError(
                f"{self.name}: the clips of {num_left_out} of {self.num_questions} questions cannot be read, the share "
                f"allowed is {self.max_share:g}{kept}:\n{_listed([*self._missing, *errors])}"
            )


def _listed(reasons: Sequence[str]) -> str:
    reasons = list(dict.fromkeys(reasons))
    more = [f"and {len(reasons) - _NUM_NAMED} more"] if len(reasons) > _NUM_NAMED else []
    return "\n".join(f"  {reason}" for reason in [*reasons[:_NUM_NAMED], *more])
