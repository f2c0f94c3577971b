"""Open-ended question answering about clips in a folder of the user's, as tasks of lmms-eval. Imports lmms-eval.

The YAML files beside this one name what is here by its import path.
"""

import os
from pathlib import Path

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from ..benchmarks import open_benchmark
from ..text_scores import containment, exact_match, token_f1
from ..unreadable import Unreadable

_KNOWN = ("benchmark", "folder", "folder_variable", "max_missing_share")


class ZeroShotQATask(ConfigurableMessagesTask):
    """Questions that are read by the project's benchmark of that name; for chat models.

    Args:
        config: of the YAML file. Its `dataset_kwargs`: `benchmark`, as `video-panda evaluate` calls it; `folder`, or
            `folder_variable`, the environment variable that names it; `max_missing_share`, of questions that may be left
            out because their clips are not there (0).

    Raises:
        ValueError: no folder is named, too many clips are missing, or the data are damaged.
        OSError: the folder or a file is not there.
    """

    def __init__(self, config: dict):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """Read the questions; nothing is downloaded. lmms-eval calls it so."""
        given = dict(dataset_kwargs or {})
        if unknown := sorted(set(given) - set(_KNOWN)):
            raise ValueError(f"{self.config.task}: dataset_kwargs has {unknown[0]!r}, expected {', '.join(_KNOWN)}")
        self._benchmark = open_benchmark(given.get("benchmark"), self._folder(given))
        asked = Unreadable(self._benchmark, given.get("max_missing_share", 0.0)).asked
        documents = [
            {
                "question_id": question.id,
                "video": question.video,
                "question": question.question,
                "answer": question.answer,
                "kind": question.kind,
            }
            for question in asked
        ]
        self.dataset = DatasetDict({self.config.test_split: Dataset.from_list(documents)})
        self.dataset_no_image = self.dataset

    def _folder(self, given: dict) -> Path:
        variable = given.get("folder_variable")
        folder = given.get("folder") or (os.environ.get(variable) if variable else None)
        if not folder:
            raise ValueError(
                f"{self.config.task}: where are the data? Set the environment variable {variable or '(none is named)'} "
                "to the folder that holds test_q.json, test_a.json and the clips"
            )
        return Path(folder).expanduser()

    def doc_to_visual(self, doc: dict) -> list[dict]:
        """The clip; called a video, because lmms-eval would take a GIF for a picture."""
        return [{"type": "video", "url": str((self._benchmark.folder / doc["video"]).absolute())}]

    def doc_to_messages(self, doc: dict, **rounds) -> list[dict]:
        """The clip and the question."""
        return self._build_user_turn(self.doc_to_visual(doc), self.doc_to_text(doc))


def score(doc: dict, results: list[str]) -> dict:
    """What an answer is worth without a judge; see `text_scores`."""
    answer, truth = results[0], doc["answer"]
    return {
        "exact_match": float(exact_match(answer, truth)),
        "containment": float(containment(answer, truth)),
        "token_f1": token_f1(answer, truth),
        "question_id": doc["question_id"],  # no metric: it goes into the log, which keeps nothing else of a document
    }
