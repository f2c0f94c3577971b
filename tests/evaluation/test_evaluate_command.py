"""`video-panda evaluate` on the paper's benchmarks in miniature: the command, processes, judges, kills, bad clips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import JudgeServer
from miniatures import write_video_chatgpt, write_zero_shot_qa
from typer.testing import CliRunner

from video_panda import cli, evaluate
from video_panda.evaluation import preparing
from video_panda.evaluation.benchmarks import open_benchmark
from video_panda.evaluation.unreadable import TooManyUnreadableError

TESTS = Path(__file__).parents[1]
REPORT = ("answers.jsonl", "scores.json", "scores.md")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of data by name of the benchmark."""
    folder = tmp_path_factory.mktemp("data")
    written = {"tgif-qa": write_zero_shot_qa(folder / "tgif-qa", folder / "clips", 3, formats=("gif",), typed=False)}
    for name in ("msvd-qa", "msrvtt-qa", "activitynet-qa"):
        written[name] = write_zero_shot_qa(folder / name, folder / "clips", 4, typed=name == "activitynet-qa")
    return {**written, "video-chatgpt": write_video_chatgpt(folder / "video-chatgpt", folder / "clips", 3)}


@pytest.fixture(scope="module")
def model():
    return cli.load_model(str(cli.DEFAULT_MODEL), "float32", "cpu")


@pytest.fixture(scope="module")
def processor():
    return cli.load_processor(str(cli.DEFAULT_MODEL))


def run(*args, code: int = 0):
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, args)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def report_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in REPORT}


@pytest.mark.parametrize("name", ["msvd-qa", "msrvtt-qa", "tgif-qa", "activitynet-qa", "video-chatgpt"])
def test_a_miniature_of_each_benchmark(name, data, tmp_path):
    """Known answers about real clips, judged over HTTP and without a judge."""
    out = tmp_path / "out"
    options = ("--benchmark", name, "--data", data[name], "--model", cli.DEFAULT_MODEL, "--output", out)
    with JudgeServer() as server:
        printed = run(*options, "--dtype", "float32", "--judge", "judge", "--judge-url", server.url).stdout
    scores = json.loads((out / "scores.json").read_text())
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert scores["total"]["num_questions"] == len(answers) == len(open_benchmark(name, data[name]).questions)
    assert scores["total"]["accuracy"] > 0.85
    assert scores["num_left_out"] == 0
    (judged,) = (out / "judges").glob("*/scores.json")
    judged = json.loads(judged.read_text())
    if name == "video-chatgpt":
        assert [row["kind"] for row in judged["rows"]] == [
            "correctness",
            "detail",
            "context",
            "temporal",
            "consistency",
        ]
        assert judged["total"]["score"]["value"] > 4
    else:
        assert judged["total"]["accuracy"]["value"] == pytest.approx(scores["total"]["accuracy"])
    for text in ("| all |", "Judge: judge at http://127.0.0.1"):
        assert text in printed
    about = json.loads((out / "run.json").read_text())["about"]
    assert about["num_visual_parameters"] < about["num_parameters"] < 2_000_000
    assert (about["dtype"], about["device"], about["split"]) == ("float32", "cpu", "test")


def test_two_processes_give_the_report_of_one(data, tmp_path):
    options = ["evaluate", str(cli.DEFAULT_MODEL), "--benchmark", "msvd-qa", "--data", str(data["msvd-qa"])]
    options += ["--batch-size", "2", "--dtype", "float32", "--output"]
    run(*options[1:], tmp_path / "one")
    # What `accelerate launch` starts where there are GPUs; without any it starts a single process.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "video_panda.cli"]
    command = [sys.executable, *launch, *options, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert report_of(tmp_path / "two") == report_of(tmp_path / "one")
    assert result.stdout.count("| all |") == 1, "one of them reports"
    assert not list((tmp_path / "two").glob("answers-rank*"))
    counts = [
        json.loads((tmp_path / name / "run.json").read_text())["about"]["num_processes"] for name in ("one", "two")
    ]
    assert counts == [1, 2]


def kill(folder: Path, num_kills: int) -> list[dict]:
    command = [sys.executable, str(TESTS / "killing_evaluation.py"), str(folder), str(num_kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_identical_report(num_kills, tmp_path):
    outcomes = kill(tmp_path, num_kills)
    assert sum(outcome["kills"] for outcome in outcomes) == num_kills
    assert all(outcome["is_equal"] for outcome in outcomes), outcomes
    assert all(outcome["num_redone"] <= outcome["kills"] for outcome in outcomes), outcomes
    assert any(outcome["num_redone"] for outcome in outcomes), "no signal came within a batch"


def test_answers_of_other_processes_are_not_asked_for_again(data, model, processor, tmp_path, monkeypatch):
    """A run of several processes that was killed goes on in one."""
    benchmark = open_benchmark("msvd-qa", data["msvd-qa"])
    evaluate(model, benchmark, processor, output_dir=tmp_path, batch_size=2)
    expected = report_of(tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "answers-rank1.jsonl").write_text("".join(lines[2:]) + '{"id": "cut o')
    monkeypatch.setattr(type(model), "generate", lambda *args, **options: pytest.fail("asked again"))
    evaluate(model, benchmark, processor, output_dir=tmp_path, batch_size=2)
    assert report_of(tmp_path) == expected
    assert not (tmp_path / "answers-rank1.jsonl").exists()


def break_clips(folder: Path, num_missing: int, num_broken: int):
    """The first clips taken away, the next ones damaged."""
    videos = sorted((folder / "videos").iterdir())
    for path in videos[:num_missing]:
        path.unlink()
    for path in videos[num_missing : num_missing + num_broken]:
        path.write_bytes(b"no clip at all" * 100)
    return [path.name for path in videos]


def test_missing_clips_are_listed_before_anything_costs_time(data, tmp_path, monkeypatch):
    folder = write_zero_shot_qa(tmp_path / "data", data["msvd-qa"].parent / "clips", 4)
    names = break_clips(folder, 2, 0)
    benchmark = open_benchmark("msvd-qa", folder)
    with pytest.raises(TooManyUnreadableError) as raised:
        evaluate(None, benchmark, None, max_unreadable_share=0.1)
    assert all(name.split(".")[0] in str(raised.value) for name in names[:2])
    num_questions = len(benchmark.questions)
    assert f"of {num_questions} questions cannot be read, the share allowed is 0.1" in str(raised.value)


def test_unreadable_clips_within_the_share_are_left_out_and_counted(data, model, processor, tmp_path):
    folder = write_zero_shot_qa(tmp_path / "data", data["msvd-qa"].parent / "clips", 4)
    names = break_clips(folder, 1, 1)
    benchmark = open_benchmark("msvd-qa", folder)
    bad = [q for q in benchmark.questions if Path(q.video).stem in {Path(name).stem for name in names[:2]}]
    options = {"output_dir": tmp_path / "out", "batch_size": 2}
    result = evaluate(model, benchmark, processor, max_unreadable_share=0.6, **options)
    assert result.scores.num_left_out == len(bad)
    assert result.scores.total.num_questions == len(benchmark.questions) - len(bad)
    assert [answer is None for answer in result.answers] == [question in bad for question in benchmark.questions]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    errors = [line for line in lines if line["answer"] is None]
    assert errors
    assert all(names[1] in line["error"] for line in errors)
    assert f"Left out, because their clips could not be read: {len(bad)} questions." in str(result.scores)

    # Too many: the clip is named, the answers are kept, and one that was put right is asked about again.
    with pytest.raises(TooManyUnreadableError, match="Answers are kept"):
        evaluate(model, benchmark, processor, max_unreadable_share=0.3, **options)
    source = data["msvd-qa"] / "videos"
    (folder / "videos" / names[1]).write_bytes((source / names[1]).read_bytes())
    again = evaluate(model, benchmark, processor, max_unreadable_share=0.6, **options)
    assert again.scores == result.scores, "nothing is asked again unless that is wanted"
    again = evaluate(model, benchmark, processor, max_unreadable_share=0.6, retry_unreadable=True, **options)
    assert again.scores.num_left_out < len(bad)


def test_a_folder_in_use_and_one_that_cannot_be_written(data, model, processor, tmp_path):
    from video_panda.evaluation.files import lock

    benchmark = open_benchmark("msvd-qa", data["msvd-qa"])
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out"), pytest.raises(ValueError, match="is in use by another process"):
        evaluate(model, benchmark, processor, output_dir=tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate(model, benchmark, processor, output_dir=tmp_path / "file")


def test_the_words_around_a_question(data, model, processor, tmp_path, monkeypatch):
    benchmark = open_benchmark("msvd-qa", data["msvd-qa"], num_clips=1)
    monkeypatch.setattr(preparing.sys, "platform", "darwin")  # the batches are prepared in this process
    seen = []
    original = processor.apply_chat_template
    monkeypatch.setattr(
        type(processor), "apply_chat_template", lambda self, chats, **o: (seen.extend(chats), original(chats, **o))[1]
    )
    evaluate(model, benchmark, processor, prompt="{question} Answer briefly.", output_dir=tmp_path)
    assert seen[0][0]["content"][1]["text"] == f"{benchmark.questions[0].question} Answer briefly."
    assert json.loads((tmp_path / "run.json").read_text())["prompt"] == "{question} Answer briefly."
    with pytest.raises(ValueError, match=r"must have \{question\}"):
        evaluate(model, benchmark, processor, prompt="Answer.")


def test_what_does_not_go_together():
    both = CliRunner().invoke(cli.app, ["evaluate", "a", "--model", "b"])
    assert "name two checkpoints, a and b" in str(both.exception)
    nameless = CliRunner().invoke(cli.app, ["evaluate", "--judge-url", "http://localhost:1/v1"])
    assert "none is named" in str(nameless.exception)
