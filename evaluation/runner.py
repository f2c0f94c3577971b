"""Asks a model the questions of a benchmark, in batches, and counts the right answers.

A run has a folder. Each answer is written there as soon as it is known, so that an interrupted run goes on where it was:

    run.json         what is measured: the model, the benchmark, the options; another run is refused the folder
    answers.jsonl    one line a question: id, question, true answer, answer
    scores.json      counts, accuracies and intervals by kind of question
    scores.md        the same as a table
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .benchmark import Benchmark, Question, ScoreTable
from .files import write_whole

RUN_FILE, ANSWERS_FILE, SCORES_FILE, TABLE_FILE = "run.json", "answers.jsonl", "scores.json", "scores.md"
DIGEST_NAME = "model_digest"


@dataclass(frozen=True)
class Evaluation:
    """What came out of a run.

    Attributes:
        scores: by kind of question.
        questions, answers: in the benchmark's order, one answer a question.
        settings: what was measured; see `run.json`.
    """

    scores: ScoreTable
    questions: list[Question]
    answers: list[str]
    settings: dict


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
    model_name: str | None = None,
    show_progress: bool | None = None,
) -> Evaluation:
    """Ask the model each question of a benchmark, one conversation a question, decoded greedily.

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
        model_name: how `run.json` calls it; default: where it was loaded from.
        show_progress: whether to show a bar; None: on a terminal.

    Returns:
        Scores and answers.

    Raises:
        ValueError: a bad option, a folder of another run, or a clip that cannot be read (its file is named).
        OSError: a clip is missing, or the folder cannot be written to.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")
    if repeat_frame is not None and num_frames is not None:
        raise ValueError("`repeat_frame` shows one frame, as often as the processor takes frames; give no `num_frames`")
    frames = {"num_frames": num_frames}
    if repeat_frame is not None:
        frames = {"frame_indices": [repeat_frame] * processor.video_processor.num_frames}
    questions = list(benchmark.questions)
    settings = {
        "model": model_name or model.config._name_or_path or type(model).__name__,
        DIGEST_NAME: weights_digest(model),
        "benchmark": benchmark.name,
        "questions_digest": _digest(repr(questions).encode()),
        "num_questions": len(questions),
        "max_new_tokens": max_new_tokens,
        **frames,
    }
    record = _Record(output_dir, settings)
    missing = [question for question in questions if question.id not in record.answers]
    asker = _Asker(model, processor, benchmark, max_new_tokens, frames)
    was_training, disable = model.training, None if show_progress is None else not show_progress
    model.eval()
    try:
        with tqdm(total=len(missing), desc="questions", unit="question", disable=disable, leave=False) as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                record.add(batch, asker.ask(batch))
                bar.update(len(batch))
    finally:
        model.train(was_training)
    answers = [record.answers[question.id] for question in questions]
    scores = benchmark.score(questions, answers)
    record.write_scores(scores)
    return Evaluation(scores, questions, answers, settings)


class _Asker:
    """Answers batches of questions; the frames of the clips of a batch are decoded once each."""

    def __init__(self, model, processor, benchmark: Benchmark, max_new_tokens: int, frames: dict):
        self.model, self.processor, self.benchmark = model, processor, benchmark
        self.max_new_tokens = max_new_tokens
        self.frames = {name: value for name, value in frames.items() if value is not None}
        self._last: tuple[str, torch.Tensor] | None = None

    def ask(self, questions: Sequence[Question]) -> list[str]:
        """One answer a question, white space around it removed."""
        chats = []
        for question in questions:
            video = {"type": "video", "video": self._decode(question)}
            chats.append([{"role": "user", "content": [video, {"type": "text", "text": question.question}]}])
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            # The frames are chosen already, and their channels are where the decoders put them.
            processor_kwargs={
                "padding": True,
                "return_tensors": "pt",
                "videos_kwargs": {"do_sample_frames": False, "input_data_format": "channels_last"},
            },
        )
        output = self.model.generate(
            **inputs.to(self.model.device), do_sample=False, max_new_tokens=self.max_new_tokens
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new_tokens, skip_special_tokens=True)]

    def _decode(self, question: Question) -> torch.Tensor:
        """uint8 (T, H, W, 3); the clip of the question before is remembered."""
        if self._last is None or self._last[0] != question.video:
            path = self.benchmark.video_path(question)
            video_processor = self.processor.video_processor
            frames, _ = video_processor.fetch_videos(path, lambda metadata: self._choose(video_processor, metadata))
            self._last = question.video, frames
        return self._last[1]

    def _choose(self, video_processor, metadata):
        return video_processor.sample_frames(metadata, **self.frames)


class _Record:
    """The files of a run, or none."""

    def __init__(self, output_dir: str | os.PathLike | None, settings: dict):
        self.folder = None if output_dir is None else Path(output_dir)
        self.answers: dict[str, str] = {}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        run_file = self.folder / RUN_FILE
        if run_file.exists():
            self._check_run(run_file, settings)
            self._read_answers(self.folder / ANSWERS_FILE)
        else:
            write_whole(run_file, json.dumps(settings, indent=2))

    @staticmethod
    def _check_run(run_file: Path, settings: dict) -> None:
        found = _parse(run_file.read_bytes(), run_file)
        names = sorted(set(found) | set(settings))
        # Where the same weights lie does not matter.
        other = [name for name in names if name != "model" and found.get(name) != settings.get(name)]
        if other:
            name = other[0]
            raise ValueError(
                f"{run_file.parent} holds another run: its {name} is {found.get(name)!r}, this one's is "
                f"{settings.get(name)!r}; choose another folder, or delete that one"
            )

    def _read_answers(self, path: Path) -> None:
        """What was answered before; a last line that was cut off is taken away."""
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            answered = _parse(line, f"{path}, line {number}")
            if not {"id", "answer"} <= set(answered):
                raise ValueError(f"{path}, line {number}: expected `id` and `answer`, got {list(answered)}")
            self.answers[answered["id"]] = answered["answer"]

    def add(self, questions: Sequence[Question], answers: Sequence[str]) -> None:
        """Remember and write answers."""
        lines = []
        for question, answer in zip(questions, answers, strict=True):
            self.answers[question.id] = answer
            line = {"id": question.id, "kind": question.kind, "video": question.video, "question": question.question}
            lines.append(json.dumps({**line, "truth": question.answer, "answer": answer}, ensure_ascii=False) + "\n")
        if self.folder is not None:
            with open(self.folder / ANSWERS_FILE, "a", encoding="utf-8") as file:
                file.writelines(lines)

    def write_scores(self, scores: ScoreTable) -> None:
        """`scores.json` and `scores.md`, each replaced as a whole."""
        if self.folder is not None:
            write_whole(self.folder / SCORES_FILE, json.dumps(scores.to_dict(), indent=2))
            write_whole(self.folder / TABLE_FILE, scores.to_markdown() + "\n")


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes and values of a model's weights: the same wherever they lie.

    Of each tensor at most 4096 numbers, evenly spread, are read: it tells trainings apart, not single numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // 4096)].cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def _parse(content: bytes, place: str | os.PathLike) -> dict:
    """The JSON object that a run wrote before.

    Raises:
        ValueError: it is none; the place is named.
    """
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); correct or delete it, or choose another folder") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
