"""Train the model that comes with the package, the default of `video-panda ask`: python examples/train_default.py FOLDER

The recipe of quickstart.py with a larger language model and more steps: within an hour on two idle cores, and 5 GB of
memory. Interrupt it, call it again, and it goes on. The test split is looked at once, at the very end; choices were made on
validation (--split validation).
"""

import argparse
import shutil
from pathlib import Path

from quickstart import ask_six
from shapes.recipe import Recipe, make_model, scaled
from shapes.report import basic_accuracy, measure, table, write_card, write_checkpoint

from video_panda import ShapesQA

RECIPE = Recipe(
    num_clips=16000,
    num_text_layers=4,
    language_steps=600,
    teacher_steps=600,
    stage_steps=(200, 600, 2400),
)
NAME = "video-panda-shapes"
DESCRIPTION = """The default of `video-panda ask`: a demonstration that runs anywhere. It was trained from nothing on ShapesQA, synthetic clips of
64 px and 8 frames in which one to four coloured shapes rest, move, flicker or jump, and knows nothing else: not people, not
scenes, no other words. Its language model was pretrained on the words of ShapesQA, its teacher on the renderer's labels; then
the three stages followed, by `examples/train_default.py`. Questions are answered with one or two words."""


def main(folder: Path, recipe: Recipe, split: str, num_test_clips: int) -> None:
    """Train, measure, write the folder `checkpoint`."""
    trained = make_model(folder, recipe)
    checkpoint = folder / "checkpoint"
    write_checkpoint(trained, checkpoint)
    measured = measure(checkpoint, folder, folder / "evaluation", split, num_test_clips)
    write_card(checkpoint, measured, split, NAME, DESCRIPTION)
    print(table(measured))
    print(f"\nsingle objects: {100 * basic_accuracy(measured['scores']):.1f} %\n")
    ask_six(folder, split, num_test_clips)
    benchmark = ShapesQA(folder, split, num_test_clips, kinds="direction")
    shutil.copy(benchmark.video_path(benchmark.questions[0]), checkpoint / "example.mp4")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of training")
    parser.add_argument("--clips", type=int, default=RECIPE.num_clips, help="training clips")
    parser.add_argument("--test-clips", type=int, default=1000)
    parser.add_argument("--split", default="test", help="choices are made on validation")
    options = parser.parse_args()
    main(options.folder, scaled(RECIPE, options.scale, num_clips=options.clips), options.split, options.test_clips)
