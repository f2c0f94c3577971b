"""From nothing to a video-language model that answers about clips it has never seen: python examples/quickstart.py

Five minutes on two cores; no download. Makes in FOLDER (default: quickstart):

    checkpoint/        what one would push to the Hub: weights, code, processor, card with scores
    questions.png      six held-out clips with question, answer and truth
    stage1/ ...        the stages on the way; interrupt it, call it again, and it goes on

What the real recipe takes pretrained is made here first, in miniature: a tiny Llama reads captions and questions (it stands
where Vicuna stands), and a tiny network learns the renderer's labels (it stands where LanguageBind, the teacher, stands).
"""

import argparse
import time
from pathlib import Path

from shapes.recipe import Recipe, make_model, scaled
from shapes.report import (
    ask_in_fresh_process,
    basic_accuracy,
    measure,
    table,
    write_card,
    write_checkpoint,
    write_contact_sheet,
)

from video_panda import ShapesQA, VideoPandaProcessor

DESCRIPTION = (
    """A demonstration: trained in minutes on synthetic clips of coloured shapes (ShapesQA), it knows nothing else."""
)
ASKED_KINDS = ("direction", "colour", "shape", "count", "drift", "position")


def ask_six(folder: Path, split: str, num_clips: int) -> None:
    """One question of each kind about a held-out clip; the answers come from a fresh process."""
    checkpoint = folder / "checkpoint"
    benchmark = ShapesQA(folder, split, num_clips)
    chosen = [next(own for own in benchmark.questions if own.kind == kind) for kind in ASKED_KINDS]
    clips = [benchmark.video_path(question) for question in chosen]
    answers = ask_in_fresh_process(checkpoint, [(clip.resolve(), own.question) for clip, own in zip(clips, chosen)])
    rows = [(clip, own.question, answer, own.answer) for clip, own, answer in zip(clips, chosen, answers)]
    for _, question, answer, truth in rows:
        print(f"{question}  {answer}  (truth: {truth})")
    write_contact_sheet(folder / "questions.png", rows, VideoPandaProcessor.from_pretrained(checkpoint))


def main(folder: Path, recipe: Recipe, split: str, num_test_clips: int) -> float:
    """Everything; returns the mean accuracy over the kinds about single objects."""
    begin = time.perf_counter()
    trained = make_model(folder, recipe)
    checkpoint = folder / "checkpoint"
    write_checkpoint(trained, checkpoint)
    measured = measure(checkpoint, folder, folder / "evaluation", split, num_test_clips)
    write_card(checkpoint, measured, split, "video-panda-quickstart", DESCRIPTION)
    print(table(measured))
    accuracy = basic_accuracy(measured["scores"])
    print(f"\nsingle objects: {100 * accuracy:.1f} %\n")
    ask_six(folder, split, num_test_clips)
    print(f"\n{checkpoint} and {folder / 'questions.png'}, {time.perf_counter() - begin:.0f} s")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of training")
    parser.add_argument("--clips", type=int, default=Recipe.num_clips, help="training clips")
    parser.add_argument("--test-clips", type=int, default=200)
    parser.add_argument("--split", default="test", help="choices are made on validation")
    options = parser.parse_args()
    main(
        options.folder,
        scaled(Recipe(seed=options.seed, num_clips=options.clips), options.scale),
        options.split,
        options.test_clips,
    )
