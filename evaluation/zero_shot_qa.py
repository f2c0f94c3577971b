"""The four open-ended question-answering sets of the paper, as users have them on disk ("GPT_Zero_Shot_QA"):

    DIR/test_q.json     [{"video_name": ..., "question": ..., "question_id": ...}, ...]
    DIR/test_a.json     [{"answer": ..., "question_id": ..., "type": ...}, ...]
    DIR/videos/...      clips of any format; any folder in DIR does

Source of the layout: the evaluation data of Video-ChatGPT and Video-LLaVA.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from .folder_benchmark import FolderBenchmark
from .qa_files import check_unique, read_entries, text_of
from .questions import Question
from .video_files import check_name

QUESTIONS_FILE, ANSWERS_FILE = "test_q.json", "test_a.json"
_FIRST_WORDS = ("what", "who", "how", "when", "where")
OTHER = "other"
# ActivityNet-QA's types, by their number.
ACTIVITYNET_TYPES = MappingProxyType(
    {
        "0": "motion",
        "1": "spatial relation",
        "2": "temporal relation",
        "3": "yes/no",
        "4": "colour",
        "5": "object",
        "6": "location",
        "7": "number",
        "8": OTHER,
    }
)


class ZeroShotQA(FolderBenchmark):
    """Open-ended questions about clips, answered with a word or a phrase; see `FolderBenchmark`.

    Attributes:
        type_names: what the numbers of the data's `type` mean; where there is no type the first word of the question is the
            kind.

    Raises:
        ValueError: also if questions and answers do not fit, or an id stands there twice or has path separators.
    """

    type_names: Mapping[str, str] = MappingProxyType({})

    def _kinds_of(self, questions: list[Question]) -> tuple[str, ...]:
        order = [*self.type_names.values(), *_FIRST_WORDS]
        kinds = {question.kind for question in questions}
        return tuple(sorted(kinds, key=lambda kind: (order.index(kind) if kind in order else len(order), kind)))

    def read_questions(self) -> list[Question]:
        """See `FolderBenchmark`."""
        path = self.folder / QUESTIONS_FILE
        entries = read_entries(path, ("video_name", "question", "question_id"))
        ids = [check_name(own["question_id"], f"{path}, entry {n}: 'question_id'") for n, own in enumerate(entries)]
        check_unique(ids, path)
        answers = self._answers_of(ids)
        questions = []
        for number, (own, entry) in enumerate(zip(ids, entries)):
            place = f"{path}, entry {number} (id {own})"
            video = self.find_video(check_name(entry["video_name"], f"{place}: 'video_name'"))
            truth = text_of(answers[own], "answer", f"{self.folder / ANSWERS_FILE} (id {own})")
            text = text_of(entry, "question", place)
            questions.append(Question(own, video, text, truth, self._kind(answers[own], text)))
        return questions

    def _answers_of(self, ids: list[str]) -> dict[str, dict]:
        """The entries of the answers, by id of their question; by place where they have no ids."""
        path = self.folder / ANSWERS_FILE
        entries = read_entries(path, ("answer",))
        if len(entries) != len(ids):
            raise ValueError(f"{path}: {len(entries)} answers to {len(ids)} questions of {QUESTIONS_FILE}")
        if "question_id" not in entries[0]:
            return dict(zip(ids, entries))
        own = []
        for number, entry in enumerate(entries):
            if "question_id" not in entry:
                raise ValueError(f"{path}, entry {number}: 'question_id' is missing, the entries before have one")
            own.append(check_name(entry["question_id"], f"{path}, entry {number}: 'question_id'"))
        check_unique(own, path)
        if unknown := sorted(set(ids) - set(own)):
            raise ValueError(
                f"{path}: no answer to the question {unknown[0]!r}, and {len(unknown)} such questions in all"
            )
        return dict(zip(own, entries))

    def _kind(self, answer: dict, question: str) -> str:
        if answer.get("type") is not None:
            return self.type_names.get(str(answer["type"]), str(answer["type"]))
        first = re.match("[a-z]*", question.lower()).group()
        return first if first in _FIRST_WORDS else OTHER


class MSVDQA(ZeroShotQA):
    """MSVD-QA (Xu et al. 2017), 13157 test questions about 520 clips."""

    name, title, num_questions_full = "msvd-qa", "MSVD-QA", 13157


class MSRVTTQA(ZeroShotQA):
    """MSRVTT-QA (Xu et al. 2017), 72821 test questions about 2990 clips."""

    name, title, num_questions_full = "msrvtt-qa", "MSRVTT-QA", 72821


class TGIFQA(ZeroShotQA):
    """The frame questions of TGIF-QA (Jang et al. 2017), 25751 about GIFs."""

    name, title, num_questions_full = "tgif-qa", "TGIF-QA", 25751


class ActivityNetQA(ZeroShotQA):
    """ActivityNet-QA (Yu et al. 2019), 8000 test questions about 800 clips of minutes."""

    name, title, num_questions_full = "activitynet-qa", "ActivityNet-QA", 8000
    type_names = ACTIVITYNET_TYPES
