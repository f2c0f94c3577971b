"""The command line, and the same as functions."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_clip
from PIL import Image
from tiny import tiny_config, write_tiny_checkpoint
from typer.testing import CliRunner

from video_panda import ask, cli, info


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a clip and a picture."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_checkpoint(folder / "checkpoint")
    write_clip(folder / "clip.mp4", num_frames=30, fps=10, width=128, height=72)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "photo.png")
    return folder


def run(*args, code: int = 0):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def main_error(monkeypatch, capsys, *args) -> str:
    """What `video-panda ARGS` prints on stderr when it fails."""
    monkeypatch.setattr(sys, "argv", ["video-panda", *map(str, args)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    return capsys.readouterr().err


def test_ask_streams_the_answer_and_json_holds_the_same(folder):
    options = (folder / "clip.mp4", "What happens?", "--model", folder / "checkpoint", "--max-new-tokens", "8")
    streamed = run("ask", *options)
    report = json.loads(run("ask", *options, "--json").stdout)
    assert streamed.stdout.strip() == report["answer"]
    assert "answering" in streamed.stderr
    assert report["frames_indices"] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert report["timestamps"] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8])
    assert report["num_answer_tokens"] == 8
    assert list(report["seconds"]) == ["read", "load", "answer"]


def test_several_questions_are_answered_as_one_by_one(folder, monkeypatch):
    from video_panda.modeling_video_panda.stab_video_panda import VideoPandaSTAB
    from video_panda.processing import video_processing_video_panda as video_processing

    encoded, decoded, options = [], [], {"max_new_tokens": 6, "num_frames": 12}
    questions = ["What happens?", "What colour is the ball?", "Who?"]
    forward, decode = VideoPandaSTAB.forward, video_processing.decode_video
    for clip in (folder / "clip.mp4", folder / "photo.png"):
        alone = [ask(clip, question, folder / "checkpoint", **options) for question in questions]
        with monkeypatch.context() as patch:
            patch.setattr(VideoPandaSTAB, "forward", lambda *args, **kw: encoded.append(1) or forward(*args, **kw))
            patch.setattr(
                video_processing, "decode_video", lambda *args, **kw: decoded.append(1) or decode(*args, **kw)
            )
            together = ask(clip, questions, folder / "checkpoint", **options)
        for result in (*alone, *together):
            seconds = result.pop("seconds")
            assert list(seconds) == ["read", "load", "answer"]
            assert min(seconds.values()) >= 0
        assert together == alone
    assert len(encoded) == 2, "the clip, and the picture"
    assert len(decoded) == 1
    with pytest.raises(ValueError, match="at least one question"):
        ask(folder / "clip.mp4", [], folder / "checkpoint")


def test_several_questions_on_the_command_line(folder):
    options = (folder / "clip.mp4", "What happens?", "Who?", "--model", folder / "checkpoint", "--max-new-tokens", "4")
    reports = [json.loads(line) for line in run("ask", *options, "--json").stdout.splitlines()]
    assert [report["question"] for report in reports] == ["What happens?", "Who?"]
    streamed = run("ask", *options)
    assert streamed.stdout.split() == " ".join(report["answer"] for report in reports).split()
    assert "prompt tokens): Who?" in streamed.stderr


def test_frames_and_dtype(folder):
    options = ("--frames", "4", "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", "2", "--json")
    report = json.loads(run("ask", folder / "clip.mp4", "What?", "--model", folder / "checkpoint", *options).stdout)
    assert len(report["frames_indices"]) == 4


def test_a_picture_is_a_still_image(folder):
    result = ask(folder / "photo.png", "What?", folder / "checkpoint", max_new_tokens=2)
    assert result["frames_indices"] is None
    config = tiny_config()
    longer = ask(folder / "clip.mp4", "What?", folder / "checkpoint", max_new_tokens=2)
    one_image, video = (config.vision_config.num_frame_tokens(h, w) * t for t, h, w in ((1, 3, 3), (8, 2, 3)))
    assert longer["num_prompt_tokens"] - result["num_prompt_tokens"] == video - one_image


def test_a_loaded_model_is_asked_without_loading_it_again(folder):
    model, processor = cli.load_model(str(folder / "checkpoint")), cli.load_processor(str(folder / "checkpoint"))
    first = ask(folder / "clip.mp4", "What?", model, processor=processor, max_new_tokens=4)
    assert first["answer"] == ask(folder / "clip.mp4", "What?", folder / "checkpoint", max_new_tokens=4)["answer"]
    with pytest.raises(ValueError, match="needs its processor"):
        ask(folder / "clip.mp4", "What?", model)


def test_info_counts_what_the_model_has(folder):
    model = cli.load_model(str(folder / "checkpoint"))
    result = info(str(folder / "checkpoint"))
    assert result["parameters"]["STAB"] == sum(parameter.numel() for parameter in model.model.stab.parameters())
    assert result["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(result["parameters"].values()) == 2 * result["parameters"]["total"]
    assert result["tokens"] == {"square": {"frame": 13, "video": 104}, "16:9": {"frame": 9, "video": 72}}
    assert result["memory_bytes"]["bfloat16"] == 2 * result["parameters"]["total"]
    printed = run("info", folder / "checkpoint").stdout
    assert f"{result['parameters']['STAB']:,}" in printed
    assert json.loads(run("info", folder / "checkpoint", "--json").stdout) == result


def test_info_reads_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "checkpoint" / "config.json").read_text())
    assert info(str(tmp_path))["parameters"] == info(str(folder / "checkpoint"))["parameters"]


def test_every_form_of_a_clip_can_be_asked_about(folder):
    model, processor = cli.load_model(str(folder / "checkpoint")), cli.load_processor(str(folder / "checkpoint"))
    picture = Image.new("RGB", (48, 27))
    forms = [
        str(folder / "clip.mp4"),
        (folder / "clip.mp4").read_bytes(),
        np.zeros((12, 27, 48, 3), np.uint8),
        torch.zeros(5, 3, 27, 48),
        [picture] * 6,
        picture,
    ]
    counts = [8, 8, 8, 5, 6, 1]
    for form, count in zip(forms, counts):
        result = ask(form, "What?", model, processor=processor, max_new_tokens=1)
        assert len(result["frames_indices"]) == count
        assert (result["timestamps"] is None) == (not isinstance(form, (str, bytes))), "an array has no frame rate"


def test_errors_are_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # or it asks a Hub that is not there, for long
    checkpoint, clip = folder / "checkpoint", folder / "clip.mp4"
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 100)
    (tmp_path / "empty").mkdir()
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    cases = [
        (("ask", tmp_path / "none.mp4", "?", "--model", checkpoint), "none.mp4"),
        (("ask", tmp_path, "?", "--model", checkpoint), "expected a file, got a directory"),
        (("ask", text, "?", "--model", checkpoint), "text.mp4"),
        (("ask", "http://127.0.0.1:9/clip.mp4", "?", "--model", checkpoint), "add --allow-urls"),
        (("ask", clip, "?", "--model", checkpoint, "--dtype", "int8"), "got 'int8'"),
        (("ask", clip, "?", "--model", checkpoint, "--device", "nowhere"), "device 'nowhere' cannot be used"),
        (("ask", clip, "?", "--model", bare), "has no tokenizer: convert the checkpoint again"),
        (("ask", clip, "?", "--model", tmp_path / "nofolder"), "nofolder: no such folder"),
        (("info", "nobody/nothing"), "nobody/nothing: no such folder, and it cannot be had from the Hub"),
        (("info", tmp_path / "empty"), "has no config.json"),
    ]
    for args, expected in cases:
        lines = [line for line in main_error(monkeypatch, capsys, *args).splitlines() if "video-panda:" in line]
        *progress, error = lines
        assert error.startswith("video-panda: error: ")
        assert expected in error
        assert not any("error" in line for line in progress)


def test_a_mistake_in_the_clip_does_not_cost_loading_the_model(folder, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(FileNotFoundError):
        ask(folder / "none.mp4", "What?", folder / "checkpoint")


@pytest.mark.parametrize(("model_type", "expected"), [("videopanda", "video-panda convert"), ("llama", "type 'llama'")])
def test_a_checkpoint_of_another_model(folder, tmp_path, monkeypatch, capsys, model_type, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for args in (("info", tmp_path), ("ask", folder / "clip.mp4", "?", "--model", tmp_path)):
        assert expected in main_error(monkeypatch, capsys, *args)


def test_loading_goes_straight_to_the_device(folder):
    model = cli.load_model(str(folder / "checkpoint"), "float16", "cpu")
    assert model.dtype == torch.float16
    assert model.device.type == "cpu"
    assert not model.training


def test_the_convert_command_hands_its_options_on(monkeypatch, tmp_path):
    from video_panda.hub import convert

    calls = []
    monkeypatch.setattr(
        convert, "convert_checkpoint", lambda *args, **options: calls.append((args, options)) or args[1]
    )
    run("convert", "source", tmp_path / "out", "--subfolder", "videopanda_fitu", "--dtype", "bfloat16", "--overwrite")
    ((source, destination), options) = calls[0]
    assert (source, destination) == ("source", Path(tmp_path / "out"))
    assert options["subfolder"] == "videopanda_fitu"
    assert options["dtype"] == "bfloat16"
    assert options["overwrite"] is True


def test_check_data_lists_what_cannot_be_read(tmp_path):
    conversation = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
    samples = [
        {"id": name, "video": f"{name}.mp4", "conversations": conversation} for name in ("good", "broken", "missing")
    ]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    write_clip(tmp_path / "good.mp4", num_frames=8)
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    result = run("check-data", tmp_path / "train.json", tmp_path, "--workers", "1", code=1)
    *problems, summary = result.stdout.splitlines()
    assert [problem.split(":")[0] for problem in problems] == ["sample 1 (id 'broken')", "sample 2 (id 'missing')"]
    assert summary.startswith("3 samples, 3 clips, 2 samples with something wrong")
    assert (tmp_path / "train.json.check.jsonl").exists()


def test_train_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("stage: stage_4\n")
    error = main_error(monkeypatch, capsys, "train", tmp_path / "config.yaml", "--learning_rate", "1e-4")
    assert "stage_4" in error
    assert "initial_alignment" in error
    assert error.count("\n") == 1
