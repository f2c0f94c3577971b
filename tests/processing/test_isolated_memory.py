"""Memory of isolated frames: used again, and never while anybody has the frames that lie in it."""

import gc
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_panda.processing import isolated_memory_video_panda as isolated_memory
from video_panda.processing.isolated_memory_video_panda import VideoPandaFrameMemory, open_memory

pytestmark = pytest.mark.skipif(not isolated_memory.CAN_MAP, reason="needs memory without a name")
SHAPE = (2, 8, 8, 3)


@pytest.fixture(autouse=True)
def lending_all(monkeypatch):
    monkeypatch.setattr(isolated_memory, "_MIN_LENT_BYTES", 1)


def receive(memory: VideoPandaFrameMemory, value: int, shape=SHAPE):
    """Frames of one value, as a worker would have written them."""
    file = memory.take_file(math.prod(shape))
    os.pwrite(file.fileno(), bytes([value]) * math.prod(shape), 0)
    return memory.frames_in(file, shape)


KINDS = {
    "the array": lambda frames: frames,
    "a slice of it": lambda frames: frames[1:, ::2],
    "other axes": lambda frames: frames.transpose(3, 0, 1, 2)[1],
    "as other numbers": lambda frames: frames.view(np.int8),
    "a tensor": torch.from_numpy,
    "a part of a tensor": lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2)[:, 1],
    "a flat tensor": lambda frames: torch.from_numpy(frames).view(-1)[3:],
    "an array of a tensor": lambda frames: torch.from_numpy(frames).numpy()[0],
    "DLPack": torch.from_dlpack,
    "a memoryview": lambda frames: np.asarray(memoryview(frames)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_used_again_while_anybody_has_it(kind):
    memory = VideoPandaFrameMemory()
    held = KINDS[kind](receive(memory, 1))
    gc.collect()
    others = [receive(memory, 2), receive(memory, 3)]
    assert (np.asarray(held) == 1).all()
    assert len(memory._lent) == 3
    del held
    assert (len(memory._lent), len(memory._free)) == (2, 1)
    assert [int(frames.max()) for frames in others] == [2, 3]


@given(
    st.lists(
        st.tuples(st.sampled_from(["receive", "drop", "write", "fork"]), st.integers(0, 9), st.integers(1, 5)),
        max_size=40,
    )
)
@settings(deadline=None, max_examples=60)
def test_whatever_happens_frames_stay_those_of_their_owner(steps):
    memory, held, value = VideoPandaFrameMemory(), [], 0
    for action, place, num_frames in steps:
        if action == "receive":
            value = value % 250 + 1
            held.append((receive(memory, value, (num_frames, 40, 40, 3)), value))
        elif action == "fork":
            memory.begin_fork()
            memory.end_fork()
        elif held and action == "write":
            frames, _ = held[place % len(held)]
            frames[:] = value
            held[place % len(held)] = (frames, value)
        elif held:
            del held[place % len(held)]
        frames = None
        assert all((frames == own).all() for frames, own in held)
        assert len(memory._free) + len(memory._lent) <= isolated_memory._MAX_KEPT_FILES
        assert len(memory._lent) <= len(held)


def test_what_one_writes_the_next_does_not_see():
    memory = VideoPandaFrameMemory()
    frames = receive(memory, 1)
    frames[:] = 9
    del frames
    (file,) = memory._free
    assert memory.take_file(1) is file
    assert memory.frames_in(file, SHAPE).max() == 1


def test_what_is_lent_during_a_fork_is_never_used_again():
    memory = VideoPandaFrameMemory()
    before = receive(memory, 1)
    memory.begin_fork()
    meanwhile = receive(memory, 2)
    memory.end_fork()
    after = receive(memory, 3)
    assert len(memory._lent) == 1
    del before, meanwhile, after
    assert (len(memory._lent), len(memory._free)) == (0, 1)


def test_memory_is_limited(monkeypatch):
    monkeypatch.setattr(isolated_memory, "_MAX_KEPT_BYTES", math.prod(SHAPE))
    memory, num_files = VideoPandaFrameMemory(), len(os.listdir("/proc/self/fd"))
    held = [receive(memory, value) for value in range(10)]
    held.append(receive(memory, 10, (3, *SHAPE[1:])))  # larger than what is kept
    assert len(os.listdir("/proc/self/fd")) == num_files + isolated_memory._MAX_KEPT_FILES
    assert [int(frames.max()) for frames in held] == list(range(11))
    held.clear()
    del memory._free[1:]
    large = receive(memory, 11, (3, *SHAPE[1:]))  # grew, and is not kept either
    assert (len(memory._free), len(memory._lent), large.max()) == (0, 0, 11)
    memory.forget()
    assert len(os.listdir("/proc/self/fd")) == num_files


def test_threads_do_not_meet_in_one_memory():
    memory = VideoPandaFrameMemory()

    def num_wrong(value):
        found = 0
        for _ in range(100):
            frames = receive(memory, value)
            time.sleep(1e-4)  # the others receive theirs
            found += int((frames != value).sum())
        return found

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(num_wrong, range(1, 7))) == [0] * 6


def test_a_file_in_memory_cannot_be_cut_off():
    with open_memory() as file:
        os.ftruncate(file.fileno(), 100)
        with pytest.raises(PermissionError):
            os.ftruncate(file.fileno(), 50)


def test_a_file_that_was_cut_off_gives_no_frames(monkeypatch):
    """Where it can be, the frames are copied."""
    monkeypatch.setattr(isolated_memory, "CAN_MAP", False)
    memory = VideoPandaFrameMemory()
    file = memory.take_file(math.prod(SHAPE))
    os.ftruncate(file.fileno(), 10)
    assert memory.frames_in(file, SHAPE) is None
    assert file.closed
    assert receive(memory, 4).max() == 4
