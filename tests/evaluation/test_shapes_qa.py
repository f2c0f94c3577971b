"""Splits that never meet, files that appear whole, and samples that training takes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_panda.evaluation import shapes_qa
from video_panda.evaluation.shapes_qa import SPLITS, ShapesQA, render_clips, score, shuffled_labels, split_seeds
from video_panda.evaluation.shapes_questions import CHANCE, KINDS
from video_panda.evaluation.shapes_scenes import FAMILIES, draw_family, draw_scene
from video_panda.processing.video_decoding_video_panda import decode_video
from video_panda.trainers.samples import check_samples, load_samples, parse_sample

splits = st.sampled_from(sorted(SPLITS))


def test_the_seeds_of_the_splits_never_meet():
    ranges = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert list(SPLITS) == ["train", "validation", "test"]
    assert all(one.stop <= other.start for one, other in itertools.pairwise(ranges))


@settings(max_examples=50, deadline=None)
@given(splits, st.integers(0, 40), st.integers(0, 10**9 - 500), st.sets(st.sampled_from(FAMILIES), min_size=1))
def test_a_split_gives_only_seeds_of_its_own(split, num_clips, first, families):
    seeds = split_seeds(split, num_clips, first, families)
    assert len(seeds) == num_clips
    assert seeds == sorted(set(seeds))
    assert all(seed in SPLITS[split] and seed >= SPLITS[split].start + first for seed in seeds)
    assert {draw_family(seed) for seed in seeds} <= families
    assert all(shapes_qa.clip_path(seed).startswith(f"{split}-v") for seed in seeds)


def test_no_clip_of_one_split_is_drawn_in_another():
    seen = {}
    for split in SPLITS:
        for seed in split_seeds(split, 600):
            scene = draw_scene(seed)
            seen.setdefault((scene.objects, scene.background), set()).add(split)
    # Pictures are many, so that two alike would be a mistake in the seeds rather than an accident.
    assert sum(len(found) > 1 for found in seen.values()) == 0


def test_fresh_clips_are_others():
    assert not set(split_seeds("test", 50)) & set(split_seeds("test", 50, first=50))
    assert split_seeds("test", 50, first=0, families="count")[0] >= SPLITS["test"].start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 3), "'dev', expected one of"),
        (("test", -1), "`num_clips` must be a whole number of at least 0, got -1"),
        (("test", 3, 0.5), "`first` must be a whole number"),
        (("test", 3, 0, ["double"]), "`families` is"),
        (("test", 3, 0, []), "`families` is"),
        (("test", 3, 10**9 - 2), "has only 2 such clips"),
    ],
)
def test_seeds_that_are_not_there(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_seeds(*arguments)


def test_the_seed_of_no_split():
    with pytest.raises(ValueError, match="belongs to no split"):
        shapes_qa.clip_path(3 * 10**9)


# ------------------------------------------------------------------------------------------------------------ rendering


def test_clips_are_rendered_once_and_empty_files_again(tmp_path):
    seeds = split_seeds("validation", 4)
    assert render_clips(tmp_path, seeds) == 4
    paths = [tmp_path / shapes_qa.clip_path(seed) for seed in seeds]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[2].write_bytes(b"")
    assert render_clips(tmp_path, [*seeds, seeds[0]]) == 1
    assert [path.stat().st_mtime_ns == then for path, then in zip(paths, times)] == [True, True, False, True]
    assert decode_video(paths[2], lambda _: range(8))[0].shape == (8, 64, 64, 3)


def test_a_benchmark_renders_a_clip_when_it_is_asked_for(tmp_path):
    benchmark = ShapesQA(tmp_path / "clips", "test", num_clips=3)
    question = benchmark.questions[-1]
    assert not (tmp_path / "clips").exists()
    path = benchmark.video_path(question)
    assert path == tmp_path / "clips" / question.video
    content = path.read_bytes()
    assert benchmark.prepare() == 2
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=r"'x\.mp4' is no clip of this benchmark"):
        benchmark.video_path(replace(question, video="x.mp4"))
    assert (benchmark.name, benchmark.kinds, benchmark.chance) == ("shapes-qa", KINDS, CHANCE)


def test_several_processes_give_the_same_files(tmp_path):
    seeds = split_seeds("train", 5)
    render_clips(tmp_path / "one", seeds)
    assert render_clips(tmp_path / "two", seeds, num_workers=1) == 5
    for seed in seeds:
        name = shapes_qa.clip_path(seed)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_killed_run_leaves_whole_clips_only(tmp_path):
    program = (
        "import sys; from video_panda.evaluation import shapes_qa as s; s.render_clips(sys.argv[1], range(100000))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    folder, deadline = tmp_path / os.path.dirname(shapes_qa.clip_path(0)), time.monotonic() + 60
    try:
        while len(list(folder.glob("*.mp4")) if folder.exists() else []) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for path in sorted(folder.glob("*.mp4"))[-3:]:
        assert decode_video(path, lambda facts: range(facts.total_num_frames))[0].shape == (8, 64, 64, 3)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        render_clips(tmp_path / "file", [0])
    with pytest.raises(ValueError, match="`num_workers`"):
        render_clips(tmp_path, [0], num_workers=-1)


# ------------------------------------------------------------------------------------------------------------- training


def test_a_split_on_disk_is_what_training_takes(tmp_path):
    benchmark = shapes_qa.write_split(tmp_path, "train", 6, content=["questions", "captions"])
    samples = load_samples(tmp_path / "train.json")
    check_samples(samples)
    assert len(samples) == 12
    parsed = [parse_sample(sample, index) for index, sample in enumerate(samples)]
    assert all((tmp_path / video).is_file() for sample in parsed for video in sample.videos)
    assert [sample.videos for sample in parsed[::2]] == [sample.videos for sample in parsed[1::2]]
    asked = {}
    for question in benchmark.questions:
        asked.setdefault(question.video, []).append((question.question, question.answer))
    for sample in parsed[::2]:
        texts = [message["content"][-1]["text"] for message in sample.messages]
        assert list(zip(texts[::2], texts[1::2])) == asked[sample.videos[0]]
    assert parsed[1].messages[0]["content"][-1]["text"] == "Describe the video."
    questions = json.loads((tmp_path / "train-questions.json").read_text())
    assert [question["id"] for question in questions] == [question.id for question in benchmark.questions]
    assert len({question["id"] for question in questions}) == len(questions)
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_single_questions_are_samples_of_their_own():
    seeds = split_seeds("train", 10)
    whole = shapes_qa.training_samples(seeds)
    single = shapes_qa.training_samples(seeds, "single questions")
    assert len(single) == sum(len(sample["conversations"]) // 2 for sample in whole)
    assert len({sample["id"] for sample in single}) == len(single)
    for sample in single:
        assert len(parse_sample(sample, 0).messages) == 2
    said = [
        [turn["value"].removeprefix("<video>\n") for sample in samples for turn in sample["conversations"]]
        for samples in (single, whole)
    ]
    assert said[0] == said[1]


def test_an_unknown_content(tmp_path):
    with pytest.raises(ValueError, match="`content` is 'answers', expected one of"):
        shapes_qa.write_split(tmp_path, "train", 2, content="answers")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- scores


def test_true_answers_score_all_and_shuffled_ones_chance():
    questions = shapes_qa.questions_of(split_seeds("validation", 1000))
    answers = [question.answer for question in questions]
    assert score(questions, answers).macro_accuracy == 1
    shuffled = shuffled_labels(questions, seed=1)
    table = score(shuffled, answers)
    assert [row.kind for row in table.rows] == list(KINDS)
    for row in table.rows:
        deviation = (row.chance * (1 - row.chance) / row.num_questions) ** 0.5
        assert row.accuracy == pytest.approx(row.chance, abs=4.5 * deviation), row.kind
    assert (
        table.total.low < table.total.chance < table.total.high or abs(table.total.accuracy - table.total.chance) < 0.02
    )
    assert [(q.id, q.kind, q.video) for q in shuffled] == [(q.id, q.kind, q.video) for q in questions]


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_constant_answer_scores_chance(place):
    questions = shapes_qa.questions_of(split_seeds("test", 1000))
    table = score(questions, [question.choices[place] for question in questions])
    for row in table.rows:
        deviation = (row.chance * (1 - row.chance) / row.num_questions) ** 0.5
        assert row.accuracy == pytest.approx(row.chance, abs=4.5 * deviation), row.kind
