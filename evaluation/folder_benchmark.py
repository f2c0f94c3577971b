"""What the benchmarks have in common that users have in a folder: questions in JSON files, clips beside them."""

import os
from abc import abstractmethod
from functools import cached_property
from pathlib import Path

from .benchmark import Benchmark
from .questions import Question
from .video_files import VideoFiles


class FolderBenchmark(Benchmark):
    """Questions about the clips in a folder.

    Args:
        folder: with the files, and the clips in it or in folders of it.
        num_clips: only the questions about the first so many clips.

    Raises:
        OSError: the folder or a file is not there.
        ValueError: a file is damaged; it and the entry are named.
    """

    def __init__(self, folder: str | os.PathLike, num_clips: int | None = None):
        if num_clips is not None and (isinstance(num_clips, bool) or not isinstance(num_clips, int) or num_clips < 1):
            raise ValueError(f"`num_clips` must be a whole number of at least 1, got {num_clips!r}")
        self.folder = Path(folder)
        self._num_clips = num_clips
        self._files, self._found = VideoFiles(self.folder), {}
        # Read at once: what is wrong with the data is said before a model is loaded.
        questions = self.questions
        self.kinds = self.kinds or self._kinds_of(questions)

    @abstractmethod
    def read_questions(self) -> list[Question]:
        """All questions of the files, in their order."""

    def _kinds_of(self, questions: list[Question]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(question.kind for question in questions))

    @cached_property
    def questions(self) -> list[Question]:
        """The questions about the clips that were asked for."""
        questions = self.read_questions()
        chosen = set(list(dict.fromkeys(question.video for question in questions))[: self._num_clips])
        return [question for question in questions if question.video in chosen]

    def find_video(self, name: str) -> str:
        """The path of a clip, relative to the folder; its name, where it is not there: errors have to call it something."""
        if name not in self._found:
            self._found[name] = self._files.find(name) or name
        return self._found[name]

    def video_path(self, question: Question) -> Path:
        """See `Benchmark`."""
        path = self.folder / question.video
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such clip (question {question.id})")
        return path

    def missing_videos(self) -> list[str]:
        """See `Benchmark`."""
        videos = dict.fromkeys(question.video for question in self.questions)
        return [video for video in videos if not (self.folder / video).is_file()]
