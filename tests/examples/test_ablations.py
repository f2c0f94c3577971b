"""The ablations: what each run is, and what the report makes of the runs."""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

from video_panda import ShapesQA

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import ablations  # noqa: E402
from shapes import ablation_report as report  # noqa: E402
from shapes import recipe  # noqa: E402


def runs(*accuracies: float) -> list[dict]:
    return [dict.fromkeys((*ShapesQA.kinds, "all"), accuracy) for accuracy in accuracies]


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_is_a_model_that_can_be_made(name):
    own = ablations.recipe_of(ablations.VARIANTS[name], recipe.Recipe(), seed=2)
    processor = recipe.processor_of(recipe.make_config(own))
    assert own.seed == 2
    assert processor.use_row_token == (name != "without <row>")
    assert processor.video_processor.image_size == (32 if name == "half resolution" else 64)
    assert (own != recipe.Recipe(seed=2)) == (name != ablations.BASE)


def test_all_of_the_data_takes_twice_the_steps_of_half_of_it():
    base = recipe.Recipe(stage_steps=(50, 70, 90))
    own = ablations.recipe_of(ablations.VARIANTS["all of stage 1's data"], base, seed=0)
    assert own.stage_steps == (100, 70, 90)
    assert own.data_fraction == 1.0


def test_runs_have_folders_of_their_own():
    names = [ablations.name_of_folder(name, seed) for name in ablations.VARIANTS for seed in range(3)]
    assert len(set(names)) == len(names)
    assert ablations.name_of_folder("without <row>", 1) == "without--row--1"


def test_intervals_by_hand():
    assert report.with_interval([50.0]) == (50.0, math.inf)
    values = [50.0, 52.0, 57.0]
    centre, half = report.with_interval(values)
    assert centre == mean(values)
    assert half == pytest.approx(4.303 * stdev(values) / math.sqrt(3))
    change, half = report.difference(values, [60.0, 61.0, 62.0])
    assert change == pytest.approx(-8)
    assert half == pytest.approx(2.776 * math.sqrt((stdev(values) ** 2 + 1) / 2 * 2 / 3))
    assert report.difference([50.0], values)[1] == math.inf


@pytest.mark.parametrize(
    ("paper", "change", "half_width", "expected"),
    [
        (-1.5, -3.0, 2.0, "shows"),
        (-1.5, -1.0, 2.0, "does not show"),
        (-1.5, 3.0, 2.0, "the other way round"),
        (2.3, 3.0, 2.0, "shows"),
        (-1.5, -30.0, math.inf, "does not show"),
    ],
)
def test_what_shows(paper, change, half_width, expected):
    assert report.verdict(paper, change, half_width) == expected


def test_the_report_says_what_was_measured(tmp_path):
    names = [ablations.BASE, "average pooling", "without <row>", "half resolution"]
    rows = dict(zip(names, (runs(0.9, 0.92, 0.94), runs(0.6, 0.62, 0.64), runs(0.9, 0.94), runs(0.5))))
    report.write_report(tmp_path / "report.md", rows, ablations.VARIANTS, ablations.BASE)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| average pooling | 9 | 58.0 | -6.7 | -30.0 ± 4.5 | -30.0 ± 4.5 | shows |" in lines
    assert "| without `<row>` | 4 | 63.2 | -1.5 | +0.0 ± 6.7 | +0.0 ± 6.7 | does not show |" in lines
    assert "| half resolution | 9 | 48.2 | -16.5 | -42.0 | -42.0 | does not show |" in lines
    assert "| average pooling | 3 |" + " 62 ± 5 |" * 13 in lines
    assert lines[-1].startswith("| chance | | 28 | 38 | 17 | 25 | 50 |")
    report.plot(tmp_path / "plot.svg", rows, ablations.VARIANTS, ablations.BASE)
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


@pytest.mark.slow
def test_the_ablations_in_miniature_go_on_where_they_were(tmp_path):
    command = [sys.executable, str(EXAMPLES / "ablations.py"), str(tmp_path), "--seeds", "1", "--scale", "0.02"]
    options = [
        "--clips",
        "32",
        "--test-clips",
        "20",
        "--variants",
        "half resolution",
        "without <row>",
        "no distillation",
    ]
    first, second = (
        subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first.count(", seed 0") == 4
    assert ", seed 0" not in second
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == [ablations.BASE, "half resolution", "without <row>", "no distillation"]
    assert (tmp_path / "ablations.svg").stat().st_size > 1000
    assert "half resolution" in (tmp_path / "ablations.md").read_text()


def test_the_page_in_the_docs_says_what_was_measured(tmp_path):
    """Its tables are those of the recorded runs: nobody has corrected a figure by hand."""
    root = EXAMPLES.parent
    results = json.loads((root / "benchmarks" / "results" / "ablations.json").read_text())
    rows = {name: list(runs.values()) for name, runs in results.items()}
    assert {len(runs) for runs in rows.values()} == {3}
    assert set(rows) == set(ablations.VARIANTS)
    report.write_report(tmp_path / "report.md", rows, ablations.VARIANTS, ablations.BASE)
    assert (tmp_path / "report.md").read_text() in (root / "docs" / "ablations.md").read_text()
