"""The benchmark of Video-ChatGPT (Maaz et al. 2024): five scores, 0 to 5, of a judge.

DIR/generic_qa.json       [{"video_name": ..., "Q": ..., "A": ...}, ...]              correctness, detail, context
DIR/temporal_qa.json      the same                                                   temporal
DIR/consistency_qa.json   [{"video_name": ..., "Q1": ..., "Q2": ..., "A": ...}, ...]  consistency
DIR/Test_Videos/...       clips of any format; any folder in DIR does
"""

from collections.abc import Mapping, Sequence

from .folder_benchmark import FolderBenchmark
from .judge_items import JudgeItem
from .qa_files import read_entries, text_of
from .questions import Question
from .video_files import check_name

GENERIC, TEMPORAL, CONSISTENCY = "generic", "temporal", "consistency"
# Which criteria the answers to which questions are judged by.
CRITERIA = {GENERIC: ("correctness", "detail", "context"), TEMPORAL: ("temporal",), CONSISTENCY: ("consistency",)}


class VideoChatGPTBenchmark(FolderBenchmark):
    """Questions that are answered in sentences; what they are worth only a judge can tell. See `FolderBenchmark`."""

    name, title = "video-chatgpt", "Video-ChatGPT benchmark"
    kinds = tuple(CRITERIA)
    criteria = tuple(criterion for criteria in CRITERIA.values() for criterion in criteria)

    def read_questions(self) -> list[Question]:
        """File by file; the two of a pair one after the other."""
        questions = []
        for kind in CRITERIA:
            path = self.folder / f"{kind}_qa.json"
            names = ("Q1", "Q2") if kind == CONSISTENCY else ("Q",)
            for number, entry in enumerate(read_entries(path, ("video_name", *names, "A"))):
                place = f"{path}, entry {number}"
                video = self.find_video(check_name(entry["video_name"], f"{place}: 'video_name'"))
                truth = text_of(entry, "A", place)
                for name in names:
                    own = f"{kind}-{number}" + (f"-{name[1:]}" if kind == CONSISTENCY else "")
                    questions.append(Question(own, video, text_of(entry, name, place), truth, kind))
        return questions

    def judge_items(self, answers: Mapping[str, str]) -> list[JudgeItem]:
        """Three criteria for each generic answer, one for each temporal answer and for each pair of answers."""
        groups = [(question,) for question in self.questions if question.kind != CONSISTENCY]
        pairs = [question for question in self.questions if question.kind == CONSISTENCY]
        groups += list(zip(pairs[::2], pairs[1::2], strict=True))
        return [
            _item(criterion, group, answers)
            for group in groups
            if all(question.id in answers for question in group)
            for criterion in CRITERIA[group[0].kind]
        ]


def _item(criterion: str, group: Sequence[Question], answers: Mapping[str, str]) -> JudgeItem:
    first = group[0]
    return JudgeItem(
        f"{first.id}-{criterion}",
        criterion,
        criterion,
        first.video,
        first.question,
        first.answer,
        tuple(answers[question.id] for question in group),
        group[1].question if len(group) > 1 else None,
    )
