"""Every clip is read beforehand, in processes that may die of it."""

import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from clips import barcode_frame, truncate, write_clip
from PIL import Image

from video_panda.trainers import check_data as module
from video_panda.trainers.check_data import ClipPool, check_clip, check_data

# Functions for the processes: a module of the test's own, which they find through sys.path. Light to import.
MISBEHAVING = """
import os, signal, time

def check(kind, path, num_frames):
    name = os.path.basename(path)
    with open(os.path.join(os.path.dirname(path), "read.log"), "a") as log:
        log.write(name + "\\n")
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("exit"):
        os._exit(7)
    if name.startswith("hang"):
        time.sleep(1000)
    if name == "deaf":
        os.kill(os.getpid(), signal.SIGINT)
    if name == "interrupt" and os.path.exists(path):
        with open(os.path.join(os.path.dirname(path), "program.pid")) as file:
            os.kill(int(file.read()), signal.SIGINT)
        time.sleep(1000)
    return f"{kind} {num_frames} is bad" if name.startswith("bad") else None
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def misbehaving(tmp_path, monkeypatch):
    (tmp_path / "misbehaving_clips.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(tmp_path)
    import misbehaving_clips

    monkeypatch.setattr(module, "check_clip", misbehaving_clips.check)
    yield misbehaving_clips
    del sys.modules["misbehaving_clips"]


def sample(name, kind="video", number=0):
    turns = [{"from": "human", "value": f"<{kind}>\nQ"}, {"from": "gpt", "value": "A"}]
    return {"id": f"{name}-{number}", kind: name, "conversations": turns}


def touch(root, *names):
    for name in names:
        (root / name).write_text(name)
    return [sample(name) for name in names]


def reads(root):
    return sorted((root / "read.log").read_text().split())


def records(report):
    return [json.loads(line) for line in Path(report).read_text(encoding="utf-8").splitlines()]


def test_real_clips_and_pictures(root, tmp_path):
    write_clip(root / "good.mp4", num_frames=24, fps=12)
    truncate(root / "good.mp4", root / "cut.mp4")
    Image.fromarray(barcode_frame(1)).save(root / "good.png")
    (root / "bad.png").write_bytes(b"no picture")
    text = {"id": "t", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    samples = [
        *(sample("good.mp4"), sample("cut.mp4"), {"id": "x", "conversations": []}, sample("none.mp4")),
        *(sample("good.png", "image"), sample("bad.png", "image"), sample("cut.mp4", number=1), text),
        *({"id": "q", "q": "Q", "a": "A", "video_id": "good"}, {"q": "Q", "a": "A", "video_id": "gone"}),
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(samples))
    report = check_data(file, root, num_workers=1)
    assert (report.num_samples, report.num_clips, report.num_read, report.num_bad) == (10, 5, 5, 6)
    assert report.report == tmp_path / "train.json.check.jsonl"
    cut, none = str(root / "cut.mp4"), str(root / "none.mp4")
    assert [(entry["index"], entry["id"], entry["reason_kind"], entry["path"]) for entry in report.bad] == [
        (1, "cut.mp4-0", "unreadable", cut),
        (2, "x", "invalid", None),
        (3, "none.mp4-0", "unreadable", none),
        (5, "bad.png-0", "unreadable", str(root / "bad.png")),
        (6, "cut.mp4-1", "unreadable", cut),
        (9, "gone", "unreadable", "gone"),
    ]
    assert "is not a video that can be read" in report.bad[0]["reason"]
    assert "`conversations` is empty" in report.bad[1]["reason"]
    written = records(report.report)
    assert [{"kind": "sample", **entry} for entry in report.bad] == [r for r in written if r["kind"] == "sample"]
    # What is known is not read again, and gives the same; a clip that has come meanwhile is read.
    again = check_data(file, root, num_workers=1, report=report.report)
    assert (again.num_read, again.bad) == (1, report.bad)


def test_the_right_number_of_frames_is_read(root):
    write_clip(root / "a.mp4", num_frames=24, fps=12)
    assert check_clip("video", str(root / "a.mp4"), 3) is None
    assert "not a picture" in check_clip("image", str(root / "a.mp4"), 3)


def test_clips_that_kill_or_block_their_process(root, misbehaving):
    samples = touch(root, "good1", "crash", "hang", "bad", "exit", "good2")
    report = check_data(samples, root, num_workers=2, timeout_s=1.0, num_frames=4)
    assert report.report is None
    found = {Path(entry["path"]).name: (entry["reason_kind"], entry["reason"]) for entry in report.bad}
    assert found == {
        "crash": ("crash", "reading it ended the process: killed by SIGSEGV"),
        "hang": ("timeout", "reading it did not end within 1 s"),
        "bad": ("unreadable", "video 4 is bad"),
        "exit": ("crash", "reading it ended the process: exit code 7"),
    }
    assert reads(root) == ["bad", "crash", "exit", "good1", "good2", "hang"]


def test_each_clip_is_read_once_and_again_only_when_it_changed(root, tmp_path, misbehaving):
    samples = [*touch(root, "good", "bad", "exit"), sample("good", number=1), sample("good", "image")]
    report = tmp_path / "reports" / "r.jsonl"
    first = check_data(samples, root, num_workers=1, report=report, show_progress=False)
    assert (first.num_clips, first.num_read, first.num_bad) == (4, 4, 2)
    assert reads(root) == ["bad", "exit", "good", "good"]
    (root / "read.log").unlink()

    # A crash may have had another cause; a changed clip is another; the cut line is what a killed run leaves.
    (root / "good").write_text("longer than before")
    with open(report, "a") as file:
        file.write('{"kind": "clip", "type": "vi')
    more = [*samples, *touch(root, "good3")]
    second = check_data(more, root, num_workers=1, report=report, show_progress=False)
    assert reads(root) == ["exit", "good", "good", "good3"]
    assert second.bad == first.bad
    clips = [record["path"] for record in records(report) if record["kind"] == "clip"]
    assert set(clips) == {str(root / name) for name in ("good", "bad", "exit", "good3")}
    assert len([record for record in records(report) if record["kind"] == "sample"]) == 2
    (root / "read.log").unlink()

    check_data(samples, root, num_workers=1, report=report, num_frames=16, show_progress=False)
    assert reads(root) == ["bad", "exit", "good"]  # the picture has no frames to choose


@pytest.fixture
def heeds_interrupts():
    """A program that a shell started in the background ignores SIGINT, and so does Python then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_stops_the_processes_and_keeps_what_was_read(root, tmp_path, misbehaving):
    (root / "program.pid").write_text(str(os.getpid()))
    samples = touch(root, "good1", "bad", "deaf", "interrupt", "good2", "good3")
    report = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        check_data(samples, root, num_workers=1, report=report)
    assert multiprocessing.active_children() == []
    known = {record["path"]: record["reason"] for record in records(report) if record["kind"] == "clip"}
    assert known == {str(root / name): None for name in ("good1", "deaf")} | {str(root / "bad"): "video 8 is bad"}
    (root / "read.log").unlink()
    (root / "interrupt").unlink()
    result = check_data(samples, root, num_workers=1, report=report)
    assert (result.num_read, result.num_bad) == (3, 1)
    assert reads(root) == ["good2", "good3", "interrupt"]


def test_progress_tells_the_rate_and_what_is_bad(root, misbehaving, capsys):
    check_data(touch(root, "bad", "good"), root, num_workers=1)
    assert re.search(r"clips: 100%.* 2/2 \[.*(clip/s|s/clip), bad=1\]", capsys.readouterr().err)


def test_processes_that_do_not_start(root, monkeypatch):
    pool = ClipPool(check_clip, 8, 1, 60.0)
    monkeypatch.setattr(module, "_serve", os._exit)  # called with the wrong arguments: ends with a TypeError
    with pytest.raises(RuntimeError, match=r"does not start \(exit code 1\); .*__main__"):
        list(pool.run([("video", str(root / "a.mp4"))]))


def test_a_report_that_is_none_is_not_overwritten(root, tmp_path):
    other = tmp_path / "notes.jsonl"
    other.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=r"notes\.jsonl is not a report of check-data"):
        check_data(touch(root, "a"), root, report=other)
    assert other.read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "`num_workers` must be a whole number of at least 1, got 0"),
        ({"num_frames": 0}, "`num_frames` must be a whole number of at least 1, got 0"),
        ({"timeout_s": 0}, "`timeout_s` must be a positive number of seconds, got 0"),
        ({"timeout_s": float("nan")}, "`timeout_s` must be a positive number"),
        ({"root": "no/such/folder"}, "`root` must be the folder"),
        ({"file": []}, "the dataset holds no samples"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_data(**{"file": [sample("a")], **options})


def test_text_alone_needs_no_process(monkeypatch):
    monkeypatch.delattr(module, "_Worker")
    text = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    report = check_data([text, {"id": 3}])
    assert (report.num_samples, report.num_clips, report.num_bad) == (2, 0, 1)
