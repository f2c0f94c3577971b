"""The cache of teacher features: exact, shared between processes, and never fooled by damage or by another teacher."""

import json
import logging
import multiprocessing
import os
import pickle
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from video_panda.trainers import teacher_cache
from video_panda.trainers.teacher_cache import DESCRIPTION_NAME, TeacherCache, clip_digest

KEYS = [TeacherCache.key(f"clip {number}", [0, 1], (2, 3)) for number in range(8)]


def features(seed=0, dtype=torch.float32, num_frames=2):
    return torch.randn(num_frames, 2, 3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shards(cache):
    return sorted(cache.folder.glob("*.safetensors"))


@pytest.fixture
def cache(tmp_path):
    return TeacherCache(tmp_path / "cache", "a teacher")


@pytest.fixture
def filled(tmp_path):
    """Another process' view of a folder with two files of two entries each."""
    writer = TeacherCache(tmp_path / "cache", "a teacher")
    for number in range(4):
        writer.put(KEYS[number], features(number))
        if number % 2:
            writer.flush()
    assert len(shards(writer)) == 2
    return TeacherCache(tmp_path / "cache", "a teacher")


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bit_for_bit(cache, dtype):
    """Before and after writing, in this process and in the next, NaN and negative zero included."""
    expected = features(dtype=dtype)
    expected[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1.0])
    cache.put(KEYS[0], expected)
    pending = cache.get(KEYS[0])
    cache.flush()
    for got in (pending, cache.get(KEYS[0]), TeacherCache(cache.folder.parent, "a teacher").get(KEYS[0])):
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        assert torch.equal(bits(got), bits(expected))


def test_what_is_changed_afterwards_is_not_changed_in_the_cache(cache):
    batch = torch.zeros(3, 2, 2, 3, 4)
    cache.put(KEYS[0], batch[1])
    batch += 1
    cache.get(KEYS[0]).add_(1)
    assert not cache.get(KEYS[0]).any()
    cache.flush()
    cache.get(KEYS[0]).add_(1)
    assert not cache.get(KEYS[0]).any()


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_any_shape_and_layout(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    writer = TeacherCache(folder, "a teacher", shard_bytes=data.draw(st.integers(1, 400)))
    written = {}
    for key in KEYS[: data.draw(st.integers(1, 8))]:
        shape = data.draw(st.lists(st.integers(1, 4), min_size=4, max_size=4))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        tensor = torch.randn(shape).to(dtype).permute(data.draw(st.permutations(range(4))))
        writer.put(key, tensor)
        written[key] = tensor
    writer.flush()
    reader = TeacherCache(folder, "a teacher")
    assert len(reader) == len(written)
    for key, tensor in written.items():
        got = reader.get(key)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


def test_an_existing_key_is_left_alone(filled):
    before = set(shards(filled))
    filled.put(KEYS[0], features(99))
    filled.put(KEYS[5], features(5))
    filled.put(KEYS[5], features(99))
    filled.flush()
    filled.flush()
    assert torch.equal(filled.get(KEYS[0]), features(0))
    assert torch.equal(filled.get(KEYS[5]), features(5))
    (written,) = set(shards(filled)) - before
    with safe_open(written, framework="pt") as opened:
        assert list(opened.keys()) == [KEYS[5]]


def test_memory_is_bounded(tmp_path):
    """A file as soon as `shard_bytes` have been collected; an entry takes 192 bytes."""
    cache = TeacherCache(tmp_path, "a teacher", shard_bytes=400)
    for number in range(7):
        cache.put(KEYS[number], features(number))
        assert len(shards(cache)) == (number + 1) // 3
    assert len(cache) == 7


def test_nothing_is_created_before_there_is_something(cache):
    assert cache.get(KEYS[0]) is None
    assert KEYS[0] not in cache
    cache.flush()
    assert not cache.folder.parent.exists()


def test_only_for_its_own_fingerprint(cache, caplog):
    cache.put(KEYS[0], features())
    cache.flush()
    description = json.loads((cache.folder / DESCRIPTION_NAME).read_text())
    assert description["fingerprint"] == "a teacher"
    other = TeacherCache(cache.folder.parent, "another teacher")
    assert other.folder != cache.folder
    assert other.get(KEYS[0]) is None
    # Not even if somebody copies the files.
    other.folder.mkdir()
    copy = other.folder / shards(cache)[0].name
    copy.write_bytes(shards(cache)[0].read_bytes())
    assert other.get(KEYS[0]) is None
    assert f"{copy} cannot be used" in caplog.text


def test_keys_tell_clips_frames_and_grids_apart():
    keys = {
        TeacherCache.key(*content)
        for content in [
            ("a", [0, 1], (2, 3)),
            ("b", [0, 1], (2, 3)),
            ("a", [1, 0], (2, 3)),
            ("a", [0], (2, 3)),
            ("a", [0, 1], (3, 2)),
            ("a", [0, 1, 2], (3,)),
        ]
    }
    assert len(keys) == 6
    assert TeacherCache.key("a", torch.tensor([0, 1]), torch.tensor([2, 3])) == TeacherCache.key("a", [0, 1], (2, 3))


def zero_values(path):
    """The last bytes become zeros, as after a power cut."""
    content = path.read_bytes()
    path.write_bytes(content[:-50] + bytes(50))


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeroed values": zero_values,
    "random": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "not an object": lambda path: path.write_bytes((4).to_bytes(8, "little") + b"[1] "),
    "odd entries": lambda path: path.write_bytes((8).to_bytes(8, "little") + b'{"a": 1}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("is_open", [False, True], ids=["before", "after opening"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_counts_as_not_there(filled, caplog, damage, is_open):
    """It is named in one warning; the other file still answers; its entries can be written again."""
    if is_open:
        assert len(filled) == 4
    by_file = {}
    for path in shards(filled):
        with safe_open(path, framework="pt") as opened:
            by_file[path] = sorted(opened.keys())
    damaged, intact = by_file
    DAMAGES[damage](damaged)
    # Of "zeroed values" only one entry is hit: look at both before asking again.
    answers = [[filled.get(key) for key in KEYS[:4]] for _ in range(2)][1]
    for number, answer in enumerate(answers):
        if KEYS[number] in by_file[intact]:
            assert torch.equal(answer, features(number))
        else:
            assert answer is None
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(damaged) in warnings[0]
    for number in range(4):
        filled.put(KEYS[number], features(number))
    filled.flush()
    reader = TeacherCache(filled.folder.parent, "a teacher")
    assert all(torch.equal(reader.get(KEYS[number]), features(number)) for number in range(4))


@pytest.mark.parametrize("seed", range(2))
def test_an_entry_that_two_ranks_wrote_survives_damage_to_either(tmp_path, caplog, seed):
    for _ in range(2):
        writer = TeacherCache(tmp_path, "a teacher")
        writer._find = lambda key: None  # a rank that has not yet seen the other's file
        writer.put(KEYS[0], features())
        writer.flush()
    damaged = shards(writer)[seed]
    reader = TeacherCache(tmp_path, "a teacher")
    assert len(reader) == 1
    zero_values(damaged)
    for _ in range(2):
        assert torch.equal(reader.get(KEYS[0]), features())
    assert len(caplog.records) <= 1


def test_a_file_that_disappears(filled, caplog):
    assert len(filled) == 4
    for path in shards(filled):
        path.unlink()
    assert [filled.get(key) for key in KEYS[:4]] == [None] * 4
    assert len(caplog.records) == 1, "the folder is read anew, and the other file is not missed"


def test_unfinished_files_are_never_read(filled):
    shards(filled)[0].rename(filled.folder / ".abc.safetensors.1234.writing")
    assert len(filled) == 2


def test_a_failed_write_leaves_nothing_and_loses_nothing(cache, monkeypatch):
    cache.put(KEYS[0], features())

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert not [path for path in cache.folder.iterdir() if path.name != DESCRIPTION_NAME]
    assert torch.equal(cache.get(KEYS[0]), features())
    cache.flush()
    assert TeacherCache(cache.folder.parent, "a teacher").get(KEYS[0]) is not None


def test_what_killed_writers_left_behind_goes(cache):
    cache.folder.mkdir(parents=True)
    old, fresh = (cache.folder / f".{name}.safetensors.1234.writing" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"unfinished")
    os.utime(old, (time.time() - 10**6,) * 2)
    cache.put(KEYS[0], features())
    cache.flush()
    assert not old.exists()
    assert fresh.exists(), "another writer may be at it"


def test_a_file_is_synced_before_it_gets_its_name(cache, monkeypatch):
    events = []
    monkeypatch.setattr(teacher_cache, "_sync", lambda path: events.append(("sync", path.is_dir(), path.suffix)))
    replace = os.replace
    monkeypatch.setattr(
        teacher_cache.os, "replace", lambda *paths: (events.append(("rename", *map(str, paths))), replace(*paths))
    )
    cache.put(KEYS[0], features())
    cache.flush()
    events = events[3:]  # the first three are the description's
    assert [event[0] for event in events] == ["sync", "rename", "sync"]
    assert events[0][1:] == (False, ".writing")
    assert events[2][1] is True


def test_later_files_are_found(filled):
    """Also those of the same moment in the file system's clock."""
    writer = TeacherCache(filled.folder.parent, "a teacher")
    for number in range(4, 8):
        assert filled.get(KEYS[number]) is None
        writer.put(KEYS[number], features(number))
        writer.flush()
        assert torch.equal(filled.get(KEYS[number]), features(number))


def test_a_folder_that_does_not_change_is_looked_through_once(filled, monkeypatch):
    """Once its last change is a while ago."""
    long_ago = time.time() - 100
    os.utime(filled.folder, (long_ago, long_ago))
    count, scandir = [], os.scandir
    monkeypatch.setattr(teacher_cache.os, "scandir", lambda path: (count.append(path), scandir(path))[1])
    for _ in range(5):
        assert filled.get(KEYS[7]) is None
        assert filled.get(KEYS[0]) is not None
    assert len(count) == 1


def test_a_folder_that_has_just_changed_is_looked_through_again():
    """A second change within the same tick of the file system's clock does not show in its time."""
    assert teacher_cache._ScanRecord(changed_ns=10**12, wall_s=1000.5).is_due(10**12)
    assert not teacher_cache._ScanRecord(changed_ns=10**12, wall_s=1010.0).is_due(10**12)


def test_a_large_folder_is_not_looked_through_at_each_miss(monkeypatch):
    """A small one is, however long it took: entries just written must be found on a busy machine."""
    clock = [100.0]
    monkeypatch.setattr(teacher_cache.time, "monotonic", lambda: clock[0])
    scan = {"changed_ns": 1, "wall_s": 1e3, "monotonic_s": 100.0, "took_s": 0.1}
    record = teacher_cache._ScanRecord(**scan, num_files=5000)
    assert not record.is_due(2)
    clock[0] = 102.1
    assert record.is_due(2)
    assert not record.is_due(1), "nothing has changed"
    clock[0] = 100.1
    assert teacher_cache._ScanRecord(**scan, num_files=5).is_due(2)


def write_as_a_rank(folder, number):
    cache = TeacherCache(folder, "a teacher", shard_bytes=200)
    for offset in range(4):
        cache.put(KEYS[(2 * number + offset) % 8], features((2 * number + offset) % 8))
    cache.flush()


def test_several_ranks_write_at_once(tmp_path):
    """Entries of two ranks each: both may have written them, all are there."""
    ranks = [multiprocessing.get_context("fork").Process(target=write_as_a_rank, args=(tmp_path, n)) for n in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    reader = TeacherCache(tmp_path, "a teacher")
    assert len(reader) == 8
    assert all(torch.equal(reader.get(key), features(number)) for number, key in enumerate(KEYS))


class Lookups(Dataset):
    def __init__(self, cache, keys):
        self.cache, self.keys = cache, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, place):
        found = self.cache.get(self.keys[place])
        return -1.0 if found is None else found.sum().item()


def test_a_worker_finds_what_the_main_process_writes_later(cache):
    """A persistent worker looks for the same clip in every epoch, and never writes what its parent has collected."""
    cache.put(KEYS[0], features(0))
    loader = DataLoader(Lookups(cache, KEYS[:2]), batch_size=None, num_workers=1, persistent_workers=True)
    assert list(loader) == [-1.0, -1.0], "not yet written: a worker sees what is on the disk"
    cache.flush()
    assert list(loader) == [features(0).sum().item(), -1.0]
    cache.put(KEYS[1], features(1))
    cache.flush()
    assert list(loader) == [features(0).sum().item(), features(1).sum().item()]


def test_a_forked_child_does_not_write_for_its_parent(cache):
    cache.put(KEYS[0], features(0))

    def child():
        cache.put(KEYS[1], features(1))
        cache.flush()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    reader = TeacherCache(cache.folder.parent, "a teacher")
    assert reader.get(KEYS[0]) is None
    assert reader.get(KEYS[1]) is not None
    cache.flush()
    assert reader.get(KEYS[0]) is not None


def test_pickling(filled):
    filled.put(KEYS[4], features(4))
    copy = pickle.loads(pickle.dumps(filled))
    assert (copy.folder, copy.fingerprint, copy.shard_bytes) == (filled.folder, "a teacher", filled.shard_bytes)
    assert torch.equal(copy.get(KEYS[0]), features(0))
    assert copy.get(KEYS[4]) is None
    copy.flush()
    assert len(shards(filled)) == 2


def test_reading_while_writing(tmp_path):
    """A reader never sees half a file: every answer is either nothing or right."""
    writer, reader = (TeacherCache(tmp_path, "a teacher", shard_bytes=1) for _ in range(2))
    keys = [TeacherCache.key(str(number), [0], (2, 3)) for number in range(30)]

    def write():
        for number, key in enumerate(keys):
            writer.put(key, features(number))

    thread = threading.Thread(target=write)
    thread.start()
    found = 0
    while found < len(keys):
        is_over = not thread.is_alive()
        answers = [(number, reader.get(key)) for number, key in enumerate(keys)]
        assert all(torch.equal(got, features(number)) for number, got in answers if got is not None)
        found = sum(got is not None for _, got in answers)
        assert not is_over or found == len(keys)
    thread.join()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_features_of_another_kind(cache, dtype):
    with pytest.raises(ValueError, match=f"features of {dtype}; expected one of torch.float64"):
        cache.put(KEYS[0], torch.zeros(1, 2, 2, 3, dtype=dtype))


@pytest.mark.parametrize("key", ["", "__metadata__", "a/b", "x" * 300])
def test_keys_that_are_none(cache, key):
    with pytest.raises(ValueError, match="Not a key"):
        cache.put(key, features())


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_shard_size_that_is_none(tmp_path, size):
    with pytest.raises(ValueError, match=f"whole number of at least 1, got {size}"):
        TeacherCache(tmp_path, "a teacher", shard_bytes=size)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder"):
        TeacherCache(tmp_path / "file", "a teacher")


def test_the_digest_of_a_clip(tmp_path, monkeypatch):
    """By content, read once; a changed file is read again."""
    first, copy = tmp_path / "a.mp4", tmp_path / "b.mp4"
    first.write_bytes(b"frames")
    copy.write_bytes(b"frames")
    digest = clip_digest(first)
    assert digest == clip_digest(copy) == clip_digest(str(first))
    first.write_bytes(b"Frames")
    os.utime(first, ns=(1, 1))
    assert clip_digest(first) != digest
    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache.hashlib, "file_digest", None)
        assert clip_digest(copy) == digest


def test_the_digest_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        clip_digest(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        clip_digest(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        clip_digest(tmp_path / "nothing.mp4")
