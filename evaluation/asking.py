"""Asks a model questions in batches, which are prepared ahead of it."""

from collections.abc import Iterator, Sequence

from transformers import BatchFeature

from .preparing import Preparation, Prepared, prepare_all
from .questions import Question
from .run_folder import Answer


class Asker:
    """Answers batches of questions.

    Args:
        model: `VideoPandaForConditionalGeneration`, in eval mode.
        preparation: makes its inputs.
        max_new_tokens: longest answer.
    """

    def __init__(self, model, preparation: Preparation, max_new_tokens: int):
        self.model, self.preparation, self.max_new_tokens = model, preparation, max_new_tokens

    def ask_all(self, batches: Sequence[Sequence[Question]]) -> Iterator[tuple[Sequence[Question], list[Answer]]]:
        """Each batch with its answers, in order."""
        for prepared in prepare_all(self.preparation, batches):
            yield prepared.questions, self._answer(prepared)

    def _answer(self, prepared: Prepared) -> list[Answer]:
        texts = iter(() if prepared.inputs is None else self._generate(prepared.inputs))
        return [
            Answer(None, prepared.errors[question.id]) if question.id in prepared.errors else Answer(next(texts))
            for question in prepared.questions
        ]

    def _generate(self, inputs: dict) -> list[str]:
        """One answer a conversation, white space around it removed."""
        inputs = BatchFeature(inputs).to(self.model.device)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        processor = self.preparation.processor
        return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
