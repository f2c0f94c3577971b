"""Asking a model the questions of a benchmark: batches, files, resuming, and what cannot cheat."""

import json

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_processor

from video_panda import ShapesQA, evaluate
from video_panda.evaluation import runner
from video_panda.evaluation.asking import Asker
from video_panda.evaluation.benchmark import Benchmark
from video_panda.evaluation.benchmarks import BENCHMARKS, find_benchmark, open_benchmark
from video_panda.evaluation.questions import shuffled_labels
from video_panda.evaluation.run_folder import Answer, read_answers
from video_panda.evaluation.shapes_questions import TIME_KINDS

NUM_CLIPS = 4


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    benchmark = ShapesQA(tmp_path_factory.mktemp("shapes"), "validation", NUM_CLIPS)
    benchmark.prepare(show_progress=False)
    return benchmark


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(tiny_config(processor.video_token_id))


def run(model, shapes, processor, **options):
    return evaluate(model, shapes, processor, **{"max_new_tokens": 3, "batch_size": 4, **options})


def test_answers_do_not_depend_on_the_batch_and_are_scored(model, shapes, processor):
    together, alone = (run(model, shapes, processor, batch_size=size) for size in (8, 1))
    assert together.answers == alone.answers
    assert len(together.answers) == len(shapes.questions) == together.scores.total.num_questions
    assert together.scores == shapes.score(shapes.questions, together.answers)


def test_the_answers_are_those_of_ask(model, shapes, processor):
    from video_panda import ask

    found = run(model, shapes, processor)
    for question, answer in list(zip(shapes.questions, found.answers))[:3]:
        path = shapes.video_path(question)
        assert ask(path, question.question, model, processor=processor, max_new_tokens=3)["answer"] == answer


def test_the_model_is_asked_in_eval_mode_and_left_as_it_was(model, shapes, processor):
    model.train()
    try:
        first, second = (run(model, shapes, processor).answers for _ in range(2))
        assert model.training
    finally:
        model.eval()
    assert first == second == run(model, shapes, processor).answers


class Interrupted(Exception):
    pass


def kept(folder):
    """What of a folder must not depend on how often the run was interrupted."""
    return {name: (folder / name).read_bytes() for name in ("answers.jsonl", "scores.json", "scores.md")}


def test_an_interrupted_run_goes_on_where_it_was(model, shapes, processor, tmp_path, monkeypatch):
    run(model, shapes, processor, output_dir=tmp_path / "whole")
    asked = []
    original = Asker._generate

    def generate(self, inputs):
        if len(asked) == 2:
            raise Interrupted
        asked.append(len(inputs["input_ids"]))
        return original(self, inputs)

    monkeypatch.setattr(Asker, "_generate", generate)
    with pytest.raises(Interrupted):
        run(model, shapes, processor, output_dir=tmp_path / "part")
    assert not (tmp_path / "part" / "scores.json").exists()
    answers_file = tmp_path / "part" / "answers.jsonl"
    lines = answers_file.read_text().splitlines(keepends=True)
    assert len(lines) == sum(asked) == 8
    # The signal came within a write: a batch is there in part, and its last line is cut off.
    (tmp_path / "part" / "answers.jsonl").write_text("".join(lines[:-1]) + '{"id": "cut o')
    asked.clear()
    monkeypatch.setattr(
        Asker, "_generate", lambda self, own: (asked.append(len(own["input_ids"])), original(self, own))[1]
    )
    run(model, shapes, processor, output_dir=tmp_path / "part")
    assert sum(asked) == len(shapes.questions) - 4, "only the batch that was cut off may be asked again"
    assert kept(tmp_path / "part") == kept(tmp_path / "whole")


def test_batches_of_a_resumed_run_are_those_of_a_whole_one(model, shapes, processor, tmp_path, monkeypatch):
    """Padding moves the last bits: an answer that hangs on one must not depend on where a run was interrupted."""
    run(model, shapes, processor, output_dir=tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:6] + lines[8:]))
    batches = []
    original = Asker._answer
    monkeypatch.setattr(
        Asker,
        "_answer",
        lambda self, prepared: (batches.append([q.id for q in prepared.questions]), original(self, prepared))[1],
    )
    run(model, shapes, processor, output_dir=tmp_path)
    assert batches == [[question.id for question in shapes.questions[4:8]]]


def test_a_folder_of_another_run_is_refused(model, shapes, processor, tmp_path):
    run(model, shapes, processor, output_dir=tmp_path)
    with pytest.raises(ValueError, match="holds another run: its max_new_tokens is 3, this one's is 2"):
        run(model, shapes, processor, output_dir=tmp_path, max_new_tokens=2)
    other = tiny_model(tiny_config(processor.video_token_id), seed=1)
    with pytest.raises(ValueError, match=runner.DIGEST_NAME):
        run(other, shapes, processor, output_dir=tmp_path)
    changed = ShapesQA(shapes.folder, "validation", NUM_CLIPS, kinds=TIME_KINDS)
    with pytest.raises(ValueError, match="holds another run"):
        run(model, changed, processor, output_dir=tmp_path)
    assert run(model, shapes, processor, output_dir=tmp_path, model_name="elsewhere").answers


def test_one_repeated_frame_is_all_that_the_model_sees(model, shapes, processor, monkeypatch):
    seen = []
    original = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: (seen.append(inputs["pixel_values_videos"]), original(**inputs))[1]
    )
    run(model, shapes, processor, repeat_frame=3)
    pixels_VTCSS = torch.cat(seen)
    assert pixels_VTCSS.shape[1] == 8
    assert torch.equal(pixels_VTCSS, pixels_VTCSS[:, :1].expand_as(pixels_VTCSS))
    seen.clear()
    run(model, shapes, processor)
    assert torch.equal(torch.cat(seen)[:, 3], pixels_VTCSS[:, 0])


class AnswersFrom:
    """Gives fixed answers in the place of a model's."""

    def __init__(self, model, answers):
        self.model, self.answers = model, answers

    def ask_all(self, batches):
        for batch in batches:
            yield batch, [Answer(self.answers[question.id]) for question in batch]


def test_shuffled_labels_give_chance(model, processor, tmp_path, monkeypatch):
    """Perfect answers, scored against labels that were dealt out anew, are right as often as guesses."""
    benchmark = ShapesQA(tmp_path, "validation", 1500)
    truth = {question.id: question.answer for question in benchmark.questions}
    monkeypatch.setattr(runner, "Asker", lambda *args: AnswersFrom(model, truth))
    assert evaluate(model, benchmark, processor).scores.total.accuracy == 1

    class Shuffled(ShapesQA):
        @property
        def questions(self):
            return shuffled_labels(benchmark.questions)

    scores = evaluate(model, Shuffled(tmp_path, "validation", 1500), processor).scores
    for row in scores.rows:
        assert row.low - 0.02 <= row.chance <= row.high + 0.02, row
    assert scores.total.accuracy < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "`max_new_tokens` must be a whole number of at least 1, got 1.5"),
        ({"repeat_frame": 1, "num_frames": 4}, "give no `num_frames`"),
        ({"repeat_frame": 99}, "99"),
    ],
)
def test_bad_options_are_named(model, shapes, processor, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, shapes, processor, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("answers.jsonl", b'{"id": "a", "answer": "red"}\n{"id": \n', "answers.jsonl, line 2: not JSON"),
        ("answers.jsonl", b"\xff\xfe\n", "answers.jsonl, line 1: not JSON"),
        ("answers.jsonl", b"[1]\n", "answers.jsonl, line 1: expected a JSON object, got list"),
        ("answers.jsonl", b'{"id": "a"}\n', "line 1: expected `id` and `answer`, got \\['id'\\]"),
        ("run.json", b"", "run.json: not JSON"),
    ],
)
def test_a_damaged_run_says_where(model, shapes, processor, tmp_path, name, content, message):
    run(model, shapes, processor, output_dir=tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(model, shapes, processor, output_dir=tmp_path)
    assert (tmp_path / name).read_bytes() == content


def test_a_benchmark_without_questions_says_so(model, processor, tmp_path):
    with pytest.raises(ValueError, match="shapes-qa: there are no questions to ask"):
        evaluate(model, ShapesQA(tmp_path, "validation", 0), processor)


def test_only_the_kinds_that_were_asked_for(tmp_path):
    benchmark = ShapesQA(tmp_path, "validation", 100, kinds=TIME_KINDS)
    assert {question.kind for question in benchmark.questions} == set(TIME_KINDS)
    with pytest.raises(ValueError, match="`kinds` is 'taste'"):
        ShapesQA(tmp_path, "validation", 100, kinds="taste")


def test_benchmarks_are_found_by_name(tmp_path):
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert len(set(names)) == len(names)
    assert all(issubclass(find_benchmark(name), Benchmark) for name in names)
    assert open_benchmark("shapes-qa", tmp_path, "validation", 3).seeds == ShapesQA(tmp_path, "validation", 3).seeds
    assert open_benchmark("shapes-qa", tmp_path).split == "test"
    with pytest.raises(ValueError, match="benchmark is 'shapes', expected one of shapes-qa, msvd-qa"):
        open_benchmark("shapes", tmp_path)


def test_an_answer_wins_over_an_error_of_another_process(tmp_path):
    """A clip was put right and asked about again, and the file of a process that was killed before still has the error."""
    answered, failed = {"id": "1", "answer": "red"}, {"id": "1", "answer": None, "error": "no clip"}
    for place, lines in enumerate(([answered, failed], [failed, answered])):
        paths = [tmp_path / f"{place}-{number}.jsonl" for number in range(2)]
        for path, line in zip(paths, lines):
            path.write_text(json.dumps(line) + "\n")
        assert read_answers(paths) == {"1": Answer("red")}
