"""The folder of a run: what is measured, and every answer as soon as it is known, so that a killed run goes on.

run.json         what is measured: the model, the benchmark, the options; another run is refused the folder
answers.jsonl    one line a question: id, question, true answer, answer, or the error of a clip that cannot be read;
                 with several processes each writes `answers-rankN.jsonl` until all are done
scores.json      counts, accuracies and intervals by kind of question
scores.md        the same as a table
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from .files import GrowingFile, lock, read_object, read_objects, write_whole
from .questions import Question
from .scores import ScoreTable

RUN_FILE, ANSWERS_FILE, SCORES_FILE, TABLE_FILE = "run.json", "answers.jsonl", "scores.json", "scores.md"
# Where the same weights lie does not matter, nor what is said about the run.
_NOT_COMPARED = ("model", "about")


@dataclass(frozen=True)
class Answer:
    """What the model said about a question.

    Attributes:
        text: its answer; None where the clip could not be read.
        error: why not.
    """

    text: str | None
    error: str | None = None


class RunFolder:
    """The files of a run; the same calls write nothing where there is no folder.

    Args:
        path: the folder, made if it is not there; None: nothing is kept.
        settings: what identifies the run, and `about`, what does not.
        rank: of this process; only 0 writes more than its own answers.

    Attributes:
        answers: by id of the question, those that were there and those that were added.
        settings: those of the run that is there, if it is the same, else the ones given.

    Raises:
        ValueError: the folder holds another run, is in use, or a file of it is damaged; it is named.
        OSError: it cannot be written to.
    """

    def __init__(self, path: str | os.PathLike | None, settings: Mapping, rank: int = 0):
        self.path = None if path is None else Path(path)
        self.settings = dict(settings)
        self.rank = rank
        self.answers: dict[str, Answer] = {}
        self._open = ExitStack()
        self._own_answers: GrowingFile | None = None
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            self._open.enter_context(lock(self.path))
        self._own_answers = self._open.enter_context(closing(GrowingFile(self._own_file)))
        try:
            self._go_on()
        except BaseException:
            self.close()
            raise

    def _go_on(self) -> None:
        run_file = self.path / RUN_FILE
        if run_file.exists():
            self.settings = self._same_run(run_file)
            self.read_answers()
        elif self.rank == 0:
            write_whole(run_file, json.dumps(self.settings, indent=2))

    def close(self) -> None:
        """Let others have the folder."""
        self._open.close()

    def _same_run(self, run_file: Path) -> dict:
        found = read_object(run_file)
        for name in sorted(set(found) | set(self.settings)):
            if name not in _NOT_COMPARED and found.get(name) != self.settings.get(name):
                raise ValueError(
                    f"{run_file.parent} holds another run: its {name} is {found.get(name)!r}, this one's is "
                    f"{self.settings.get(name)!r}; choose another folder, or delete that one"
                )
        return found

    def read_answers(self) -> None:
        """What was answered, by any number of processes."""
        self.answers |= read_answers([self.path / ANSWERS_FILE, *self._parts()], mended=self._own_file)

    def forget_unreadable(self) -> None:
        """As if the questions whose clips could not be read had not been asked."""
        self.answers = {name: answer for name, answer in self.answers.items() if answer.error is None}

    def text_of(self, question: Question) -> str | None:
        """The answer to a question; None where there is none."""
        answer = self.answers.get(question.id)
        return None if answer is None else answer.text

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("answers-rank*.jsonl"))

    @property
    def _own_file(self) -> Path:
        return self.path / (ANSWERS_FILE if self.rank == 0 else f"answers-rank{self.rank}.jsonl")

    def add(self, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
        """Remember answers, and write them down, all of a batch at once; the disk may take its time until the next call.

        Raises:
            OSError: these or those before cannot be written.
        """
        self.answers.update({question.id: answer for question, answer in zip(questions, answers, strict=True)})
        if self._own_answers is not None:
            self._own_answers.append("".join(_line(*pair) for pair in zip(questions, answers)))

    def wait_for_disk(self) -> None:
        """Until it has all answers.

        Raises:
            OSError: it cannot keep them.
        """
        if self._own_answers is not None:
            self._own_answers.wait()

    def gather(self, questions: Sequence[Question]) -> None:
        """After all processes are done: all answers in one file, in the order of the questions. By one process only."""
        if self.path is None:
            return
        self.wait_for_disk()
        self.read_answers()
        lines = [_line(question, self.answers[question.id]) for question in questions]
        write_whole(self.path / ANSWERS_FILE, "".join(lines))
        for part in self._parts():
            part.unlink()

    def write_scores(self, scores: ScoreTable) -> None:
        """`scores.json` and `scores.md`, each replaced as a whole."""
        if self.path is not None:
            write_whole(self.path / SCORES_FILE, json.dumps(scores.to_dict(), indent=2))
            write_whole(self.path / TABLE_FILE, scores.to_markdown() + "\n")


def read_answers(paths: Iterable[Path], mended: Path | None = None) -> dict[str, Answer]:
    """Answers by id of the question.

    Args:
        paths: files of answers; those that are not there are passed over; later lines win, and answers over errors.
        mended: the one whose last line is taken away if it was cut off; another process may just be writing the others.

    Raises:
        ValueError: a line is damaged; it is named.
    """
    answers = {}
    for path in paths:
        for number, line in read_objects(path, is_mended=path == mended):
            if not {"id", "answer"} <= set(line):
                raise ValueError(f"{path}, line {number}: expected `id` and `answer`, got {list(line)}")
            # A clip that could be read at one time can be read.
            if line["id"] not in answers or line["answer"] is not None:
                answers[line["id"]] = Answer(line["answer"], line.get("error"))
    return answers


def _line(question: Question, answer: Answer) -> str:
    line = {"id": question.id, "kind": question.kind, "video": question.video, "question": question.question}
    line |= {"truth": question.answer, "answer": answer.text}
    if answer.error is not None:
        line["error"] = answer.error
    return json.dumps(line, ensure_ascii=False) + "\n"
