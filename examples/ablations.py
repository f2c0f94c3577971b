"""The paper's ablations in miniature, on ShapesQA: python examples/ablations.py FOLDER

Trains every variant from several seeds with the recipe of quickstart.py (clips, tiny Llama and teacher are made once and
shared), measures each, and writes to FOLDER

    results.json      accuracies of every run by kind of question
    ablations.md      a table by kind of question, and what the paper found beside what shows here
    ablations.svg     the same as a plot

Some minutes a run; interrupt it, call it again, and it goes on. `--report` writes the three from what is there.
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from shapes.ablation_report import plot, write_report
from shapes.phases import claim
from shapes.recipe import Prepared, Recipe, prepare, scaled, train_stages

from video_panda import ShapesQA, VideoPandaForConditionalGeneration, VideoPandaProcessor, evaluate


@dataclass(frozen=True)
class Variant:
    """A row of one of the paper's tables.

    Attributes:
        table: its number there.
        paper: accuracy on MSVD-QA and on ActivityNet-QA, %; Video-Panda itself has 64.7 and 40.0.
        vision: what differs in `VideoPandaVisionConfig`.
        recipe: what else differs in the recipe.
    """

    table: int
    paper: tuple[float, float]
    vision: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)


BASE = "Video-Panda"
VARIANTS = {
    BASE: Variant(4, (64.7, 40.0)),
    "without <row>": Variant(4, (63.2, 39.5), {"use_row_token": False}),
    "without FSRA": Variant(4, (63.4, 39.2), {"use_fsra": False}),
    "without LSTE": Variant(4, (63.6, 39.4), {"use_lste": False}),
    "without GSTRA": Variant(4, (63.0, 38.2), {"use_gstra": False}),
    "without GSTRA and LSTE": Variant(4, (62.2, 38.1), {"use_gstra": False, "use_lste": False}),
    "no distillation": Variant(5, (63.1, 39.8), recipe={"distillation_loss": "none"}),
    "mean squared error": Variant(5, (63.5, 38.2), recipe={"distillation_loss": "mse"}),
    "all of stage 1's data": Variant(7, (63.7, 39.7), recipe={"data_fraction": 1.0}),
    "downsampling before LSTE": Variant(8, (64.2, 42.3), {"downsampling_position": "before_lste"}),
    "average pooling": Variant(9, (58.0, 38.1), {"downsampling": "avg_pool"}),
    "half resolution": Variant(9, (48.2, 38.5), {"downsampling": "half_resolution"}),
    "Perceiver Resampler": Variant(9, (43.4, 27.8), {"downsampling": "perceiver_resampler"}),
}


def recipe_of(variant: Variant, base: Recipe, seed: int) -> Recipe:
    """The recipe of a run; all of stage 1's data, not half, take twice the steps, as one epoch of each does."""
    first, *others = base.stage_steps
    steps = (round(first * variant.recipe.get("data_fraction", base.data_fraction) / base.data_fraction), *others)
    return replace(base, seed=seed, vision=variant.vision, stage_steps=steps, **variant.recipe)


def run_one(folder: Path, recipe: Recipe, prepared: Prepared, num_clips: int) -> dict[str, float]:
    """Train and measure; returns accuracies by kind of question, from what is there if it is complete."""
    scores = folder / "scores.json"
    claim(folder, recipe)
    if not scores.exists():
        trained = train_stages(folder, recipe, prepared)
        model = VideoPandaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
        benchmark = ShapesQA(prepared.folder, "validation", num_clips)
        result = evaluate(
            model,
            benchmark,
            VideoPandaProcessor.from_pretrained(trained),
            output_dir=folder / "evaluation",
            batch_size=32,
            max_new_tokens=8,
        ).scores
        scores.write_text(json.dumps({row.kind: row.accuracy for row in (*result.rows, result.total)}))
    return json.loads(scores.read_text())


def name_of_folder(name: str, seed: int) -> str:
    """Of a variant's run."""
    return f"{''.join(letter if letter.isalnum() else '-' for letter in name.lower())}-{seed}"


def main(folder: Path, base: Recipe, seeds: int, num_clips: int, names: list[str], only_report: bool) -> None:
    """Train what is missing, seed by seed, so that a first comparison is there early; then report."""
    prepared = None
    results: dict[str, dict[str, dict]] = {name: {} for name in names}
    for seed in range(seeds):
        for name in names:
            own = folder / name_of_folder(name, seed)
            if not (own / "scores.json").exists():
                if only_report:
                    continue
                if prepared is None:
                    prepared = prepare(folder / "shared", base)
                print(f"{name}, seed {seed}", flush=True)
            results[name][seed] = run_one(own, recipe_of(VARIANTS[name], base, seed), prepared, num_clips)
            (folder / "results.json").write_text(json.dumps(results, indent=1))
    rows = {name: list(runs.values()) for name, runs in results.items() if runs}
    write_report(folder / "ablations.md", rows, VARIANTS, BASE)
    plot(folder / "ablations.svg", rows, VARIANTS, BASE)
    print(f"{folder / 'ablations.md'} and {folder / 'ablations.svg'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--clips", type=int, default=Recipe.num_clips, help="training clips")
    parser.add_argument("--test-clips", type=int, default=400, help="of the validation split")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of training")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    options = parser.parse_args()
    names = options.variants if BASE in options.variants else [BASE, *options.variants]
    base = scaled(Recipe(num_clips=options.clips), options.scale)
    main(options.folder, base, options.seeds, options.test_clips, names, options.report)
