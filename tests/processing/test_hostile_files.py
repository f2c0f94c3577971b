"""Hostile files give frames or a `VideoDecodeError` that names them: no crash, no hang, no other error."""

import collections
import os
import time

import pytest
from hostile_files import hostile_files

from video_panda.processing.video_decoding_video_panda import VideoDecodeError, VideoPandaDecodeLimits, decode_video

LIMITS = VideoPandaDecodeLimits(seconds=10.0, memory_bytes=2**30)
HARMLESS = {"bits flipped", "zeroed", "truncated", "spliced", "forged box", "forged table", "forged size", "noise"}


def choose(metadata):
    """A frame of the beginning, of the middle and of the end."""
    return sorted({0, metadata.total_num_frames // 2, metadata.total_num_frames - 1})


def outcome(path, isolate):
    """What becomes of a file: "frames", "error" or what else there is to say."""
    begin = time.monotonic()
    try:
        frames, metadata = decode_video(path, choose, isolate=isolate, limits=LIMITS)
        result = "frames" if len(frames) == len(metadata.frames_indices) else "other frames"
    except VideoDecodeError as error:
        named = str(path)[:200] in str(error)
        result = "error" if named else f"error that does not name it: {error}"
    return result if time.monotonic() - begin < LIMITS.seconds + 2 else "too late"


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_file_gives_frames_or_an_error_that_names_it(tmp_path, every):
    counts, wrong = collections.Counter(), {}
    for kind, path in hostile_files(tmp_path, every):
        for isolate in (False, True) if kind == "no regular file" else (True,):
            result = outcome(path, isolate)
            counts[kind, result] += 1
            if result not in ("frames", "error") or (result == "frames" and kind not in HARMLESS):
                wrong[path.name] = result
    assert wrong == {}
    assert sum(counts.values()) >= (1500 if every == 1 else 140)
    # Some damage lies where nobody looks; most of it is noticed.
    assert counts["truncated", "error"] > counts["truncated", "frames"]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("missing.mp4", FileNotFoundError),
        ("", FileNotFoundError),
        ("folder", IsADirectoryError),
        ("fifo", OSError),
        ("/dev/zero", OSError),
        ("loop", OSError),
        ("n" * 300, OSError),
        ("secret.mp4", PermissionError),
    ],
)
def test_what_is_no_file_is_both_kinds_of_error(tmp_path, monkeypatch, isolate, name, kind):
    """One type for all that cannot be read, and still the one that Python programs expect of a missing file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "secret.mp4").touch()
    os.mkfifo(tmp_path / "fifo")
    allowed = [tmp_path / "folder"] if name == "secret.mp4" else None
    with pytest.raises(VideoDecodeError) as caught:
        decode_video(name, choose, isolate=isolate, allowed_dirs=allowed)
    assert isinstance(caught.value, kind)
    assert isinstance(caught.value, ValueError)
    assert name in str(caught.value)
