"""Memory and file descriptors stay flat, and workers of a DataLoader read the same frames however they are started."""

import gc
import os
import threading

import psutil
import pytest
import torch
from clips import truncate, write_clip
from torch.utils.data import DataLoader, Dataset

from video_panda.processing import isolated_memory_video_panda as isolated_memory
from video_panda.processing import isolated_video_panda as isolated
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, decode_video

MAX_GROWTH_BYTES = 10 * 2**20
WAYS = ("h264.mp4", "open.mp4", "h264.ts")  # decord, PyAV from the start, PyAV that counts first


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "h264.mp4", 24, width=160, height=96, options={"g": "8"})
    write_clip(folder / "open.mp4", 24, width=160, height=96, options={"x264-params": "keyint=8:open-gop=1:bframes=2"})
    write_clip(folder / "h264.ts", 24, width=160, height=96, container_format="mpegts")
    return [folder / name for name in WAYS]


def open_and_fail(clips, broken, times, isolate):
    """As many good opens as failing ones."""
    for number in range(times):
        decode_video(clips[number % len(clips)], lambda metadata: [0, 9, 20], isolate=isolate)
        with pytest.raises(VideoDecodeError):
            decode_video(broken[number % len(broken)], lambda metadata: [0, 9, 20], isolate=isolate)


def resources():
    """(private bytes, descriptors, threads) of this process and of its workers."""
    gc.collect()
    processes = [psutil.Process()] + [psutil.Process(worker._process.pid) for worker in isolated._pool()._idle]
    memory = sum(process.memory_full_info().uss for process in processes)
    return memory, sum(process.num_fds() for process in processes), threading.active_count()


@pytest.mark.parametrize(("times", "isolate"), [(30, True)])
def test_a_share_of_it(clips, tmp_path, times, isolate):
    check_growth(clips, tmp_path, times, isolate)


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [False, True])
def test_five_hundred_good_and_five_hundred_failing_opens(clips, tmp_path, isolate):
    check_growth(clips, tmp_path, 500, isolate)


def check_growth(clips, tmp_path, times, isolate):
    cut = truncate(clips[0], tmp_path / "cut.mp4")
    (tmp_path / "noise.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + os.urandom(5000))
    (tmp_path / "flat.mp4").write_bytes(clips[0].read_bytes()[:200] + bytes(3000))
    broken = [cut, tmp_path / "noise.mkv", tmp_path / "missing.mp4", tmp_path / "flat.mp4"]
    isolated.end_workers()
    open_and_fail(clips, broken, 30, isolate)  # until every pool and cache has its size
    memory, descriptors, num_threads = resources()
    open_and_fail(clips, broken, times, isolate)
    after = resources()
    assert after[1:] == (descriptors, num_threads)
    assert after[0] - memory <= MAX_GROWTH_BYTES


def test_frames_that_are_kept_keep_few_descriptors(clips, tmp_path):
    large = write_clip(tmp_path / "large.mp4", 3, width=1280, height=720, options={"preset": "ultrafast"})
    isolated.end_workers()
    decode_video(clips[0], lambda metadata: [0], isolate=True)
    before = psutil.Process().num_fds()
    kept = [decode_video(large, lambda metadata: [0, 1, 2, 0], isolate=True)[0] for _ in range(9)]  # 11 MB each
    assert psutil.Process().num_fds() <= before + isolated_memory._MAX_KEPT_FILES
    assert all(torch.equal(frames, kept[0]) for frames in kept)
    kept[0][:] = 0
    assert kept[1].any()


class Clips(Dataset):
    """Frames of the clips, read in whatever process asks."""

    def __init__(self, paths, isolate):
        self.paths, self.isolate = paths, isolate

    def __len__(self):
        return 3 * len(self.paths)

    def __getitem__(self, place):
        frames, _ = decode_video(
            self.paths[place % len(self.paths)], lambda metadata: [place, 2 * place], isolate=self.isolate
        )
        return frames


def read_all(clips, isolate, num_workers, start_method):
    context = start_method if num_workers else None
    loader = DataLoader(
        Clips(clips, isolate), num_workers=num_workers, multiprocessing_context=context, timeout=120 * bool(num_workers)
    )
    return torch.cat([frames[0] for frames in loader])


@pytest.mark.parametrize(
    ("start_method", "num_workers"),
    [
        ("fork", 2),
        pytest.param("fork", 4, marks=pytest.mark.slow),
        pytest.param("spawn", 2, marks=pytest.mark.slow),
        pytest.param("spawn", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("isolate", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_of_a_loader_read_the_same_frames(clips, isolate, start_method, num_workers):
    expected = read_all(clips, isolate, 0, None)  # this process has read, and has a worker, before it is forked
    assert expected.shape == (18, 96, 160, 3)
    assert torch.equal(read_all(clips, isolate, num_workers, start_method), expected)
