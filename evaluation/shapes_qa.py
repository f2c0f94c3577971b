"""ShapesQA: a benchmark that makes its own clips, so that a tiny model can be trained and measured anywhere.

A clip is known by its seed, and each split has seeds of its own. Clips are rendered when they are needed and kept in a
folder:

    FOLDER/train-v1/0000000000.mp4 ...    clips, named by seed; the number behind the v is the renderer's version
    FOLDER/train.json                     samples for training, in the format of Valley
    FOLDER/train-questions.json           the questions, one by one
"""

import json
import multiprocessing
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from .benchmark import Benchmark
from .files import write_whole
from .questions import Question, shuffled_labels
from .scores import ScoreTable
from .scores import score as score_answers
from .shapes_questions import BASIC_KINDS, CHANCE, KINDS, TIME_KINDS, ask_about, describe_scene
from .shapes_render import RENDERER_VERSION, write_clip
from .shapes_scenes import FAMILIES, draw_family, draw_scene

__all__ = ["SPLITS", "ShapesQA", "clip_path", "render_clips", "score", "shuffled_labels", "split_seeds", "write_split"]

_SEEDS_OF_SPLIT = 1_000_000_000
SPLITS = {
    name: range(number * _SEEDS_OF_SPLIT, (number + 1) * _SEEDS_OF_SPLIT)
    for number, name in enumerate(("train", "validation", "test"))
}
CONTENTS = ("captions", "questions", "single questions")
_CLIPS_A_TASK = 64


def split_seeds(split: str, num_clips: int, first: int = 0, families: Collection[str] = FAMILIES) -> list[int]:
    """The seeds of some clips of a split.

    Args:
        split: "train", "validation" or "test".
        num_clips: how many.
        first: how many seeds of the split to leave out before; choose another one for fresh clips.
        families: the kinds of scenes wanted; seeds of others are passed over.

    Returns:
        Ascending seeds, all of them the split's own.

    Raises:
        ValueError: an unknown split or family, a number that is none, or more clips than the split has.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, expected one of {list(SPLITS)}")
    for name, number in (("num_clips", num_clips), ("first", first)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"`{name}` must be a whole number of at least 0, got {number!r}")
    wanted = {families} if isinstance(families, str) else set(families)
    if not wanted or not wanted <= set(FAMILIES):
        raise ValueError(f"`families` is {families!r}, expected some of {list(FAMILIES)}")
    seeds = []
    for seed in SPLITS[split][first:]:
        if len(seeds) == num_clips:
            break
        if len(wanted) == len(FAMILIES) or draw_family(seed) in wanted:
            seeds.append(seed)
    if len(seeds) < num_clips:
        raise ValueError(f"the split {split!r} has only {len(seeds)} such clips from {first} on, asked for {num_clips}")
    return seeds


def clip_path(seed: int) -> str:
    """Where the clip of a seed lies, relative to the folder of the benchmark.

    Raises:
        ValueError: the seed belongs to no split.
    """
    for split, seeds in SPLITS.items():
        if seed in seeds:
            return f"{split}-v{RENDERER_VERSION}/{seed:010d}.mp4"
    raise ValueError(f"the seed {seed!r} belongs to no split, expected 0 to {len(SPLITS) * _SEEDS_OF_SPLIT - 1}")


# ------------------------------------------------------------------------------------------------------------ rendering


def render_clips(
    folder: str | os.PathLike, seeds: Sequence[int], num_workers: int = 0, show_progress: bool | None = None
) -> int:
    """Render those clips that are not there yet.

    Args:
        folder: of the benchmark; made if it is not there.
        seeds: the clips.
        num_workers: processes to render in; 0: in this one. With more, the calling program must be guarded by
            `if __name__ == "__main__":`.
        show_progress: whether to show a bar; None: on a terminal.

    Returns:
        How many were rendered. Interrupted, the next call goes on with the missing ones.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: a seed belongs to no split, or `num_workers` is negative.
    """
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"`num_workers` must be a whole number of at least 0, got {num_workers!r}")
    folder = Path(folder)
    clips = [(seed, folder / clip_path(seed)) for seed in dict.fromkeys(seeds)]
    for parent in {path.parent for _, path in clips}:
        parent.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if not _is_there(clip[1])]
    disable = None if show_progress is None else not show_progress
    with tqdm(total=len(missing), desc="rendering clips", unit="clip", disable=disable, leave=False) as bar:
        if num_workers == 0:
            for clip in missing:
                bar.update(_render([clip]))
            return len(missing)
        tasks = [missing[start : start + _CLIPS_A_TASK] for start in range(0, len(missing), _CLIPS_A_TASK)]
        # Not forked: the program may run threads by now, whose locks a copy would inherit.
        pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            for task in as_completed([pool.submit(_render, task) for task in tasks]):
                bar.update(task.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return len(missing)


def _render(clips: list[tuple[int, Path]]) -> int:
    for seed, path in clips:
        write_clip(seed, path)
    return len(clips)


def _is_there(path: Path) -> bool:
    # A machine that lost its power may leave the name of a file without its content.
    return path.is_file() and path.stat().st_size > 0


# ---------------------------------------------------------------------------------------------------------- the benchmark


class ShapesQA(Benchmark):
    """The questions about some clips of a split.

    Args:
        folder: where the clips are kept.
        split: "train", "validation" or "test". Choices are made on validation; the test split is for the last look.
        num_clips, first, families: see `split_seeds`.
        kinds: only questions of these kinds.

    Attributes:
        time_kinds: the kinds that no single frame tells.
        basic_kinds: the kinds about single objects, and their number: what a model learns within minutes.

    Raises:
        ValueError: an unknown kind, or as `split_seeds`.
    """

    name, title = "shapes-qa", "ShapesQA"
    kinds = KINDS
    time_kinds, basic_kinds = TIME_KINDS, BASIC_KINDS
    chance = CHANCE

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str = "test",
        num_clips: int = 1000,
        first: int = 0,
        families: Collection[str] = FAMILIES,
        kinds: Collection[str] = KINDS,
    ):
        self.asked = {kinds} if isinstance(kinds, str) else set(kinds)
        if not self.asked or not self.asked <= set(KINDS):
            raise ValueError(f"`kinds` is {kinds!r}, expected some of {list(KINDS)}")
        self.folder = Path(folder)
        self.split = split
        self.seeds = split_seeds(split, num_clips, first, families)

    @cached_property
    def questions(self) -> list[Question]:
        """All questions, clip by clip; nothing is rendered for that."""
        return [question for question in questions_of(self.seeds) if question.kind in self.asked]

    def prepare(self, num_workers: int = 0, show_progress: bool | None = None) -> int:
        """Render what is missing; see `render_clips`."""
        return render_clips(self.folder, self.seeds, num_workers, show_progress)

    def video_path(self, question: Question) -> Path:
        """The file that a question is about, rendered now if it is not there.

        Raises:
            OSError: the file cannot be written.
            ValueError: the question is none of this benchmark.
        """
        if question.video not in self._seed_of_video:
            raise ValueError(f"question {question.id}: {question.video!r} is no clip of this benchmark")
        path = self.folder / question.video
        if not _is_there(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(self._seed_of_video[question.video], path)
        return path

    @cached_property
    def _seed_of_video(self) -> dict[str, int]:
        return {clip_path(seed): seed for seed in self.seeds}


def questions_of(seeds: Sequence[int]) -> list[Question]:
    """The questions about the clips of the seeds, one of each kind that a clip answers."""
    return [
        Question(f"{seed:010d}-{pair.kind}", clip_path(seed), pair.question, pair.answer, pair.kind, pair.choices)
        for seed in seeds
        for pair in ask_about(draw_scene(seed))
    ]


def score(questions: Sequence[Question], answers: Sequence[str | None]) -> ScoreTable:
    """Accuracy by kind with 95% intervals beside chance; see `benchmark.score`."""
    return score_answers(questions, answers, CHANCE, KINDS)


# ------------------------------------------------------------------------------------------------------------- training


def training_samples(seeds: Sequence[int], content: str = "questions", words_seed: int = 0) -> list[dict]:
    """Samples for training, in the format of Valley.

    Args:
        seeds: the clips.
        content: "questions": one sample a clip, all its questions as turns of one conversation; "single questions":
            one sample a question; "captions": one sample a clip, which asks for a description.
        words_seed: another one says the same in other words.

    Returns:
        Objects with `id`, `video` (relative path) and `conversations`.

    Raises:
        ValueError: an unknown content.
    """
    if content not in CONTENTS:
        raise ValueError(f"`content` is {content!r}, expected one of {list(CONTENTS)}")
    samples = []
    for seed in seeds:
        scene = draw_scene(seed)
        if content == "captions":
            pairs = [("Describe the video.", describe_scene(scene, words_seed))]
        else:
            pairs = [(pair.question, pair.answer) for pair in ask_about(scene, words_seed)]
        for number, turns in enumerate([[pair] for pair in pairs] if content == "single questions" else [pairs]):
            name = f"{seed:010d}-{number}" if content == "single questions" else f"{seed:010d}"
            samples.append({"id": name, "video": clip_path(seed), "conversations": _conversation(turns)})
    return samples


def _conversation(turns: list[tuple[str, str]]) -> list[dict]:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        marker = "<video>\n" if number == 0 else ""
        conversation.append({"from": "human", "value": marker + question})
        conversation.append({"from": "gpt", "value": answer})
    return conversation


def write_split(
    folder: str | os.PathLike,
    split: str,
    num_clips: int,
    first: int = 0,
    families: Collection[str] = FAMILIES,
    content: str | Collection[str] = "questions",
    words_seed: int = 0,
    num_workers: int = 0,
    show_progress: bool | None = None,
) -> ShapesQA:
    """Clips, training samples and questions of a split, as files.

    Args:
        folder: where to; made if it is not there. The root folder of the samples' videos.
        split, num_clips, first, families: see `split_seeds`.
        content: of the samples, see `training_samples`; several are written one after the other, clip by clip.
        words_seed: of the samples; the questions are those of `ShapesQA`.
        num_workers, show_progress: see `render_clips`.

    Returns:
        The benchmark of these clips; `FOLDER/SPLIT.json` holds the samples, `FOLDER/SPLIT-questions.json` the questions.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: see `split_seeds` and `training_samples`.
    """
    benchmark = ShapesQA(folder, split, num_clips, first, families)
    contents = [content] if isinstance(content, str) else list(content)
    samples = [sample for kind in contents for sample in training_samples(benchmark.seeds, kind, words_seed)]
    if len(contents) > 1:
        samples.sort(key=lambda sample: sample["video"])  # stable: the contents of a clip keep their order
    benchmark.prepare(num_workers, show_progress)
    benchmark.folder.mkdir(parents=True, exist_ok=True)
    questions = [asdict(question) for question in benchmark.questions]
    for name, content in ((split, samples), (f"{split}-questions", questions)):
        write_whole(benchmark.folder / f"{name}.json", json.dumps(content, ensure_ascii=False, indent=1))
    return benchmark
