"""A question about a clip."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


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
