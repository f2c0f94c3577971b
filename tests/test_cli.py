"""The command line, and the same as functions."""

import json
import sys
from pathlib import Path

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
    assert set(report["seconds"]) == {"load", "read", "answer"}


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
    model, processor = cli.load(str(folder / "checkpoint"))
    first = ask(folder / "clip.mp4", "What?", model, processor=processor, max_new_tokens=4)
    assert first["answer"] == ask(folder / "clip.mp4", "What?", folder / "checkpoint", max_new_tokens=4)["answer"]
    with pytest.raises(ValueError, match="needs its processor"):
        ask(folder / "clip.mp4", "What?", model)


def test_info_counts_what_the_model_has(folder):
    model, _ = cli.load(str(folder / "checkpoint"))
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


def test_errors_are_one_line(folder, tmp_path, monkeypatch, capsys):
    checkpoint = folder / "checkpoint"
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 100)
    cases = [
        (("ask", tmp_path / "none.mp4", "?", "--model", checkpoint), "none.mp4"),
        (("ask", tmp_path, "?", "--model", checkpoint), "expected a file, got a directory"),
        (("ask", text, "?", "--model", checkpoint), "text.mp4"),
        (("ask", "http://127.0.0.1:9/clip.mp4", "?", "--model", checkpoint), "URLs are off"),
        (("ask", folder / "clip.mp4", "?", "--model", checkpoint, "--dtype", "int8"), "got 'int8'"),
        (("info", tmp_path), "config.json"),
    ]
    for args, expected in cases:
        error = main_error(monkeypatch, capsys, *args)
        assert error.splitlines()[-1].startswith("video-panda: error: ") or "config.json" in error
        assert expected in error
        assert "Traceback" not in error


@pytest.mark.parametrize(("model_type", "expected"), [("videopanda", "video-panda convert"), ("llama", "type 'llama'")])
def test_a_checkpoint_of_another_model(folder, tmp_path, monkeypatch, capsys, model_type, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for args in (("info", tmp_path), ("ask", folder / "clip.mp4", "?", "--model", tmp_path)):
        assert expected in main_error(monkeypatch, capsys, *args)


def test_loading_goes_straight_to_the_device(folder):
    model, _ = cli.load(str(folder / "checkpoint"), "float16", "cpu")
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
