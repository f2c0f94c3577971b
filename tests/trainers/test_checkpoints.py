"""Sealing, publishing, verifying and rotating checkpoints, and being killed in between."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint
from transformers.trainer_utils import rotate_checkpoints as rotate_as_transformers

from video_panda.trainers import checkpoints
from video_panda.trainers.checkpoints import (
    MANIFEST_FILE,
    CheckpointError,
    clear_staging,
    delete_checkpoint,
    find_checkpoint,
    list_checkpoints,
    publish,
    remove_leftovers,
    rotate_checkpoints,
    seal,
    staging_folder,
    verify,
)

FILES = {"model.safetensors": b"weights" * 999, "config.json": b"{}", "global_step/rank_0.pt": b"r" * 50, "empty": b""}


def write_files(folder, files=FILES):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def save(run_folder, step, files=FILES):
    staging = clear_staging(run_folder, step)
    write_files(staging, files)
    seal(staging)
    publish(staging, run_folder / f"checkpoint-{step}")
    return run_folder / f"checkpoint-{step}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_published_checkpoint_verifies(tmp_path):
    checkpoint = save(tmp_path / "run", 5)
    verify(checkpoint)
    assert {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} == {
        *FILES,
        MANIFEST_FILE,
    }
    entries = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert {name: entry["size"] for name, entry in entries.items()} == {name: len(FILES[name]) for name in FILES}
    assert names(tmp_path / "run") == ["checkpoint-5"]
    assert find_checkpoint(tmp_path / "run") == (checkpoint, [])


def test_a_relative_folder_verifies_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("run"), 5)
    assert find_checkpoint("run") == (Path("run/checkpoint-5"), [])


def test_transformers_never_takes_the_staging_folder_for_a_checkpoint(tmp_path):
    write_files(clear_staging(tmp_path, 7))
    assert get_last_checkpoint(str(tmp_path)) is None
    assert list_checkpoints(tmp_path) == []
    assert find_checkpoint(tmp_path) == (None, [])
    assert list_checkpoints(tmp_path / "missing") == []


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert names(tmp_path)[-1] == "checkpoint-best"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path)[0].name == "checkpoint-100"


def test_clear_staging_drops_what_a_killed_save_left(tmp_path):
    write_files(clear_staging(tmp_path, 3), {"old.bin": b"old"})
    staging = clear_staging(tmp_path, 3)
    assert staging == staging_folder(tmp_path, 3)
    assert names(staging) == []


def drop_manifest(folder):
    (folder / MANIFEST_FILE).unlink()


def zero(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(bytes(path.stat().st_size))

    return damage


def truncate(name):
    def damage(folder):
        os.truncate(folder / name, (folder / name).stat().st_size // 2)

    return damage


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def forget_a_file(folder):
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["files"]["config.json"]
    path.write_text(json.dumps(content))


def replace_by_link(folder):
    path = folder / "model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def replace_folder_by_link(folder):
    shutil.move(folder / "global_step", folder.parent / "elsewhere")
    (folder / "global_step").symlink_to(folder.parent / "elsewhere")


DAMAGES = {
    "no manifest": (drop_manifest, "has no manifest.json: it was saved by another program"),
    "manifest zeroed": (zero(MANIFEST_FILE), "manifest.json is damaged"),
    "manifest cut": (truncate(MANIFEST_FILE), "manifest.json is damaged"),
    "manifest edited": (forget_a_file, "manifest.json is damaged"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST_FILE).write_text("[1]"), "manifest.json is damaged"),
    "zeroed": (zero("model.safetensors"), "model.safetensors has another content than was saved"),
    "one bit": (flip_a_bit, "model.safetensors has another content than was saved"),
    "cut": (truncate("model.safetensors"), "model.safetensors holds 3496 bytes, expected 6993"),
    "longer": (lambda folder: (folder / "empty").write_bytes(b"x"), "empty holds 1 bytes, expected 0"),
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "missing deep down": (lambda folder: shutil.rmtree(folder / "global_step"), "rank_0.pt is missing"),
    "a link": (replace_by_link, "model.safetensors is a symbolic link"),
    "a linked folder": (replace_folder_by_link, "global_step is a symbolic link"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_older_checkpoint_taken(damage, tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    spoil, reason = DAMAGES[damage]
    spoil(newer)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        verify(newer)
    found, passed_over = find_checkpoint(tmp_path)
    assert found == older
    assert [path for path, _ in passed_over] == [newer]
    assert reason in passed_over[0][1]


@pytest.mark.parametrize("seed", range(30))
def test_any_change_of_any_byte_is_found(seed, tmp_path):
    generator = random.Random(seed)
    checkpoint = save(tmp_path, 1)
    path = checkpoint / generator.choice(["model.safetensors", "config.json", "global_step/rank_0.pt", MANIFEST_FILE])
    content = bytearray(path.read_bytes())
    if path.name == MANIFEST_FILE:  # white space between its tokens carries nothing
        places = [place for place, byte in enumerate(content) if byte not in b" \n"]
    else:
        places = range(len(content))
    content[generator.choice(places)] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(checkpoint)


def test_without_deep_only_sizes_are_compared(tmp_path):
    checkpoint = save(tmp_path, 1)
    flip_a_bit(checkpoint)
    verify(checkpoint, deep=False)
    path = checkpoint / "model.safetensors"
    for content in (path.read_bytes() + b"x", b"short"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"holds {len(content)} bytes, expected 6993"):
            verify(checkpoint, deep=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_reason_not_a_crash(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint / "config.json").chmod(0)
    assert "cannot be read" in find_checkpoint(tmp_path)[1][0][1]


def test_a_disk_error_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 1)

    def fail(file, algorithm):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints.hashlib, "file_digest", fail)
    found, passed_over = find_checkpoint(tmp_path)
    assert found is None
    assert passed_over == [(checkpoint, f"{checkpoint} cannot be read: Input/output error")]


def test_what_is_called_checkpoint_but_is_none_is_passed_over(tmp_path):
    good = save(tmp_path, 1)
    (tmp_path / "checkpoint-2").write_text("a file")
    (tmp_path / "checkpoint-3").symlink_to(good)
    (tmp_path / "checkpoint-4").mkdir()
    found, passed_over = find_checkpoint(tmp_path)
    assert found == good
    assert [path.name for path, _ in passed_over] == ["checkpoint-4", "checkpoint-3", "checkpoint-2"]


def test_files_added_later_are_no_fault(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint / "notes.txt").write_text("the best so far")
    (checkpoint / "global_step" / "more").mkdir()
    verify(checkpoint)


def test_links_and_empty_folders_are_not_sealed(tmp_path):
    staging = clear_staging(tmp_path, 1)
    with pytest.raises(CheckpointError, match="holds no file"):
        seal(staging)
    with pytest.raises(CheckpointError, match="holds no file"):
        seal(tmp_path / "missing")
    write_files(staging)
    (staging / "link").symlink_to(staging / "config.json")
    with pytest.raises(CheckpointError, match="link is a symbolic link"):
        seal(staging)
    (staging / "link").unlink()
    os.mkfifo(staging / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a symbolic link, or neither"):
        seal(staging)
    with pytest.raises(CheckpointError, match="seal it before"):
        publish(staging, tmp_path / "checkpoint-1")
    assert list_checkpoints(tmp_path) == []


def test_sealing_again_replaces_the_manifest(tmp_path):
    staging = clear_staging(tmp_path, 1)
    write_files(staging)
    seal(staging)
    (staging / ".manifest.json.partial").write_text("of a sealing that was killed")
    (staging / "config.json").write_text("{1: 2}")
    seal(staging)
    publish(staging, tmp_path / "checkpoint-1")
    verify(tmp_path / "checkpoint-1")


def test_every_file_and_folder_is_brought_to_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    descriptors, fsync, rename = {}, os.fsync, os.rename
    real_open = os.open

    def watched_open(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        descriptors[descriptor] = Path(path).name
        return descriptor

    def watched_fsync(descriptor):
        events.append(descriptors.pop(descriptor, "written"))
        fsync(descriptor)

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {Path(name).name for name in FILES} | {"global_step", "_staging-checkpoint-1", "written"} <= set(before)
    assert before[-2:] == ["written", "_staging-checkpoint-1"]  # the manifest, and the folder that names it
    assert after == [tmp_path.name]


def test_an_older_save_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1, {"model.safetensors": b"old", "stale.bin": b"x"})
    checkpoint = save(tmp_path, 1, {"model.safetensors": b"new"})
    assert names(checkpoint) == [MANIFEST_FILE, "model.safetensors"]
    assert names(tmp_path) == ["checkpoint-1"]
    verify(checkpoint)
    (tmp_path / "checkpoint-2").write_text("a file in the way")
    verify(save(tmp_path, 2))
    shutil.copytree(checkpoint, tmp_path / "_replaced-checkpoint-1")  # of a replacement that was killed
    verify(save(tmp_path, 1))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("moment", range(5))
def test_replacing_killed_between_its_steps(moment, tmp_path, monkeypatch):
    """Raising at each rename or deletion stands for a kill there."""
    save(tmp_path, 1, {"model.safetensors": b"old"})
    calls = []

    def stop(name, real):
        def wrapper(*args, **kwargs):
            calls.append(name)
            if len(calls) == moment + 1:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        staging = clear_staging(tmp_path, 1)
        write_files(staging, {"model.safetensors": b"new"})
        seal(staging)
        patch.setattr(os, "rename", stop("rename", os.rename))
        patch.setattr(shutil, "rmtree", stop("rmtree", shutil.rmtree))
        try:
            publish(staging, tmp_path / "checkpoint-1")
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    assert interrupted == (moment < 4)  # aside, in, out of sight, deleted
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")
    expected = b"old" if moment < 2 else b"new"
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == expected


def test_leftovers_are_cleared_and_nothing_else(tmp_path):
    kept = save(tmp_path, 1)
    write_files(clear_staging(tmp_path, 2))
    shutil.copytree(kept, tmp_path / "_replaced-checkpoint-1")
    shutil.copytree(kept, tmp_path / "_deleted-checkpoint-3-0123abcd")
    (tmp_path / "_staging-checkpoint-8").write_text("a file")
    others = ["_staging-notes", "runs", "_deleted-checkpoint-x", "staging-checkpoint-5"]
    for name in others:
        (tmp_path / name).mkdir()
    removed = remove_leftovers(tmp_path)
    assert {path.name for path in removed} == {
        "_staging-checkpoint-2",
        "_replaced-checkpoint-1",
        "_deleted-checkpoint-3-0123abcd",
        "_staging-checkpoint-8",
    }
    assert names(tmp_path) == sorted(["checkpoint-1", *others])
    assert remove_leftovers(tmp_path / "missing") == []


def test_deleting_never_leaves_half_a_checkpoint(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 1)

    def fail(path):
        (path / "config.json").unlink()
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        delete_checkpoint(checkpoint)
    assert list_checkpoints(tmp_path) == []
    assert len(names(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="checkpoint-1"):
        delete_checkpoint(checkpoint)


@pytest.mark.parametrize("seed", range(20))
def test_rotation_keeps_what_transformers_keeps(seed, tmp_path):
    generator = random.Random(seed)
    steps = generator.sample(range(1, 200), generator.randrange(1, 7))
    limit = generator.choice([None, 0, 1, 1, 2, 3])
    best = generator.choice([None, *steps, *steps])
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for step in steps:
        save(ours, step, {"model": b"w"})
        (theirs / f"checkpoint-{step}").mkdir(parents=True)
    rotate_as_transformers(str(theirs), limit, None if best is None else str(theirs / f"checkpoint-{best}"))
    deleted = rotate_checkpoints(ours, limit, None if best is None else ours / f"checkpoint-{best}")
    assert names(ours) == names(theirs)
    assert len(deleted) == len(steps) - len(names(ours))


def test_rotation_spares_the_one_just_saved_not_a_damaged_one_of_a_higher_step(tmp_path):
    for step in (50, 60, 100):
        save(tmp_path, step)
    zero("model.safetensors")(tmp_path / "checkpoint-100")
    deleted = rotate_checkpoints(tmp_path, 1, newest=tmp_path / "checkpoint-60")
    assert [path.name for path in deleted] == ["checkpoint-100", "checkpoint-50"]
    save(tmp_path, 70)
    (save(tmp_path, 80) / "config.json").unlink()
    rotate_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-70"]
    save(tmp_path, 90)
    with pytest.raises(ValueError, match="newest"):
        rotate_checkpoints(tmp_path, 1, newest=tmp_path / "final")


# Saves without end: step after step, each step twice, keeping three. The content says which save it was.
SAVING = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import checkpoints  # the file itself: importing the package would take seconds

    run, step = Path(sys.argv[1]), 0
    checkpoints.remove_leftovers(run)
    last, _ = checkpoints.find_checkpoint(run)
    step = 0 if last is None else checkpoints.checkpoint_step(last)
    print("saving", flush=True)
    while True:
        step += 1
        for save in range(2):
            staging = checkpoints.clear_staging(run, step)
            for number in range(3):
                (staging / f"{number}.bin").write_bytes(f"{step}.{save}.{number};".encode() * 60_000)
            (staging / "deep").mkdir()
            (staging / "deep" / "state.bin").write_bytes(f"{step}.{save}".encode())
            checkpoints.seal(staging)
            checkpoints.publish(staging, run / f"checkpoint-{step}")
            print(f"{step}.{save}", flush=True)
        checkpoints.rotate_checkpoints(run, 3, newest=run / f"checkpoint-{step}")
"""


def check_after_kill(run, published):
    """What is found is complete, right, and the last published save or one that was published since it was printed."""
    remove_leftovers(run)
    found, passed_over = find_checkpoint(run)
    assert passed_over == []
    assert all(path.name.startswith("checkpoint-") for path in run.iterdir())
    if published is None and found is None:
        return None
    step, save_number = (found / "deep" / "state.bin").read_text().split(".")
    for number in range(3):
        content = (found / f"{number}.bin").read_bytes()
        assert content == f"{step}.{save_number}.{number};".encode() * 60_000
    assert found.name == f"checkpoint-{step}"
    found_save = (int(step), int(save_number))
    assert published is None or found_save >= published
    return found_save


def test_killed_at_random_moments_a_complete_checkpoint_is_found(tmp_path):
    generator = random.Random(0)
    run, folder = tmp_path / "run", Path(checkpoints.__file__).parent
    run.mkdir()
    last, moments = None, []
    for attempt in range(20):
        command = [sys.executable, "-c", textwrap.dedent(SAVING), str(run), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "saving\n"
        first = process.stdout.readline() if attempt % 2 else ""  # on a slow machine too, some get beyond a save
        time.sleep(generator.uniform(0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        printed = (first + process.communicate()[0]).split()
        moments.append({path.name.split("-")[0] for path in run.iterdir()})
        published = tuple(map(int, printed[-1].split("."))) if printed else last
        last = check_after_kill(run, published)
    assert last is not None
    assert last[0] >= 10
    assert sum("_staging" in left for left in moments) > 3  # it did hit saves
