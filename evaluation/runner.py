"""Asks a model the questions of a benchmark, in batches, and counts the right answers; see `run_folder` for its files."""

import datetime
import hashlib
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from ..version import __version__
from ..weights import weights_digest
from .asking import Asker
from .benchmark import Benchmark
from .judging import JudgeTable, judge_run
from .preparing import Preparation
from .questions import Question
from .run_folder import RunFolder
from .scores import ScoreTable
from .unreadable import Unreadable

DIGEST_NAME = "model_digest"
PROMPT = "{question}"


@dataclass(frozen=True)
class Evaluation:
    """What came out of a run.

    Attributes:
        scores: by kind of question.
        questions, answers: in the benchmark's order, one answer a question; None where the clip could not be read.
        settings: what was measured; see `run.json`.
        judged: what the judge found, if there was one.
        is_first_process: of several, the one that reports.
    """

    scores: ScoreTable
    questions: list[Question]
    answers: list[str | None]
    settings: dict
    judged: JudgeTable | None = None
    is_first_process: bool = True

    def __str__(self) -> str:
        tables = [self.scores] if self.judged is None else [self.scores, self.judged]
        return "\n\n".join(table.to_markdown() for table in tables)


def evaluate(
    model,
    benchmark: Benchmark,
    processor,
    *,
    output_dir: str | os.PathLike | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    num_frames: int | None = None,
    repeat_frame: int | None = None,
    prompt: str = PROMPT,
    max_unreadable_share: float = 0.0,
    retry_unreadable: bool = False,
    judge=None,
    model_name: str | None = None,
    show_progress: bool | None = None,
) -> Evaluation:
    """Ask the model each question of a benchmark, one conversation a question, decoded greedily.

    Started by `accelerate launch`, the processes share the questions; each needs a model of its own.

    Args:
        model: `VideoPandaForConditionalGeneration`; it answers in eval mode and is left in the mode it was in.
        benchmark: gives the questions and the files.
        processor: the model's.
        output_dir: folder of the run, to resume it; None: nothing is written.
        batch_size: questions that are answered at once.
        max_new_tokens: longest answer.
        num_frames: frames of a video to look at; default: the processor's own.
        repeat_frame: show this one frame of the file again and again instead, counted from 0: what a model then still
            knows about time, it guessed. Does not go with `num_frames`.
        prompt: the words around a question, with `{question}` in its place.
        max_unreadable_share: of questions whose clips may be missing or unreadable, 0 to 1. They are left out of the
            scores, and counted; more of them stop the run.
        retry_unreadable: ask again where a clip could not be read in an earlier run.
        judge: asked about each answer when all are there; see `judge_run`. Needs `output_dir`.
        model_name: how `run.json` calls it; default: where it was loaded from.
        show_progress: whether to show a bar; None: on a terminal.

    Returns:
        Scores and answers, the same in each process; what the judge says in the first one only.

    Raises:
        ValueError: a bad option, a folder of another run, or too many clips that cannot be read (they are named).
        OSError: the folder cannot be written to.
    """
    _check_options(batch_size, max_new_tokens, num_frames, repeat_frame, prompt)
    processes = _Processes()
    if output_dir is None and (judge is not None or processes.count > 1):
        raise ValueError("a judge, and several processes, need a folder: give an `output_dir`")
    frames = {"num_frames": num_frames}
    if repeat_frame is not None:
        frames = {"frame_indices": [repeat_frame] * processor.video_processor.num_frames}
    unreadable = Unreadable(benchmark, max_unreadable_share)
    options = {"max_new_tokens": max_new_tokens, **frames, **({} if prompt == PROMPT else {"prompt": prompt})}
    settings = _settings(model, model_name, benchmark, options, processes.count)
    with processes.main_first():
        folder = RunFolder(output_dir, settings, processes.rank)
    processes.wait()  # or one would write answers before another has read which there are
    try:
        if retry_unreadable:
            folder.forget_unreadable()
        asker = Asker(model, Preparation(processor, benchmark, frames, prompt), max_new_tokens)
        batches = _unanswered_batches(unreadable.asked, folder, batch_size)
        _ask(asker, batches[processes.rank :: processes.count], folder, unreadable, processes, show_progress)
        processes.wait()
        if processes.rank == 0:
            folder.gather(unreadable.asked)
        processes.wait()
        if processes.rank:
            folder.read_answers()
        unreadable.check(folder.answers)
        scores = _score(benchmark, folder)
        is_judging = judge is not None and processes.rank == 0
        judged = judge_run(folder.path, benchmark, judge, show_progress=show_progress) if is_judging else None
    finally:
        folder.close()
    questions = list(benchmark.questions)
    answers = [folder.text_of(question) for question in questions]
    return Evaluation(scores, questions, answers, folder.settings, judged, processes.rank == 0)


def _check_options(batch_size, max_new_tokens, num_frames, repeat_frame, prompt) -> None:
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if repeat_frame is not None and num_frames is not None:
        raise ValueError("`repeat_frame` shows one frame, as often as the processor takes frames; give no `num_frames`")
    if "{question}" not in prompt:
        raise ValueError(f"`prompt` must have {{question}} in the place of the question, got {prompt!r}")


def _unanswered_batches(questions: Sequence[Question], folder: RunFolder, batch_size: int) -> list[Sequence[Question]]:
    """The batches with a question that is not answered.

    They are cut from all questions, and asked anew as a whole: padding moves the last bits of the numbers, and a run that was
    killed must end as it would have.
    """
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    return [batch for batch in batches if any(question.id not in folder.answers for question in batch)]


def _ask(
    asker: Asker,
    batches: Sequence[Sequence[Question]],
    folder: RunFolder,
    unreadable: Unreadable,
    processes: "_Processes",
    show_progress: bool | None,
) -> None:
    """Answer the batches of this process."""
    model = asker.model
    was_training = model.training
    disable = True if processes.rank else None if show_progress is None else not show_progress
    label = "questions" if processes.count == 1 else f"questions (1 of {processes.count} processes)"
    model.eval()
    try:
        with (
            tqdm(total=sum(map(len, batches)), desc=label, unit="question", disable=disable, leave=False) as bar,
            closing(asker.ask_all(batches)) as answered,  # at once, whatever stops this: batches are being prepared
        ):
            for batch, answers in answered:
                folder.add(batch, answers)
                bar.update(len(batch))
                if any(answer.error for answer in answers):
                    unreadable.check(folder.answers)
        folder.wait_for_disk()
    finally:
        model.train(was_training)


def _score(benchmark: Benchmark, folder: RunFolder) -> ScoreTable:
    """Scores of what was answered, written down."""
    kept = [question for question in benchmark.questions if folder.text_of(question) is not None]
    texts = [folder.text_of(question) for question in kept]
    scores = benchmark.score(kept, texts, len(benchmark.questions) - len(kept))
    if folder.rank == 0:
        folder.write_scores(scores)
    return scores


def _settings(model, model_name: str | None, benchmark: Benchmark, options: dict, num_processes: int) -> dict:
    """What makes a run another one, and what is good to know about it."""
    questions = list(benchmark.questions)
    return {
        "model": model_name or model.config._name_or_path or type(model).__name__,
        DIGEST_NAME: weights_digest(model),
        "benchmark": benchmark.name,
        "questions_digest": hashlib.sha256(repr(questions).encode()).hexdigest(),
        "num_questions": len(questions),
        **options,
        "about": {**_about(model, benchmark), "num_processes": num_processes},
    }


def _about(model, benchmark: Benchmark) -> dict:
    """What a reader of the scores wants to know about the run, and what does not make it another one."""
    base = getattr(model, "model", model)
    visual = [part for part in (getattr(base, "stab", None), getattr(base, "projector", None)) if part is not None]
    device = model.device
    return {
        "date": datetime.date.today().isoformat(),
        "dataset_name": benchmark.title,
        "split": benchmark.split,
        "num_questions_full": benchmark.num_questions_full,
        "num_parameters": sum(tensor.numel() for tensor in model.parameters()),
        "num_visual_parameters": sum(tensor.numel() for part in visual for tensor in part.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "package_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


class _Processes:
    """This process among those that share the work."""

    def __init__(self):
        # Only where there are several: accelerate's state is one for the whole program, and a trainer that is made later
        # would find its device chosen already.
        is_shared = torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) > 1
        # A process may have to wait for another's longest batches, and for the judge.
        patience = datetime.timedelta(days=7)
        # Unless it is told that this is a CPU, accelerate takes each process for the only one.
        cpu = not torch.cuda.is_available()
        self._state = PartialState(cpu=cpu, timeout=patience) if is_shared else None
        self.rank = self._state.process_index if is_shared else 0
        self.count = self._state.num_processes if is_shared else 1

    def main_first(self):
        """A context that the first process leaves before the others enter it."""
        return nullcontext() if self._state is None else self._state.main_process_first()

    def wait(self) -> None:
        """Until all have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def own_device() -> str | None:
    """Where this process of several puts its model; None: there is one process, which may choose."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
