"""What a judge is asked, and what it says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeItem:
    """One answer to be judged, or two that are compared.

    Attributes:
        id: of the question, or of the pair.
        criterion: what is judged; a key of `judge_templates.TEMPLATES`.
        kind: under which the verdict is counted.
        video: the clip: verdicts about one hang together.
        question: the text; of two questions, the first.
        truth: the true answer.
        answers: one answer of the model; two where the criterion is "consistency".
        second_question: of two, the second.
    """

    id: str
    criterion: str
    kind: str
    video: str
    question: str
    truth: str
    answers: tuple[str, ...]
    second_question: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge said about an item.

    Attributes:
        score: from 0 to 5.
        is_correct: whether the answer means the truth; None where the criterion has no such question.
    """

    score: float
    is_correct: bool | None = None
