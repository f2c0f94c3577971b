"""The worker process: same frames, and whatever happens to it is an error of the clip and of nothing else."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from clips import read_barcodes, set_rotation, write_clip
from hostile_files import announce_samples, base_clip
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from video_panda.processing import isolated_memory_video_panda as isolated_memory
from video_panda.processing import isolated_video_panda as isolated
from video_panda.processing.decode_limits_video_panda import VideoPandaDecodeLimits, read_mp4_tracks
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, decode_video

NUM_FRAMES = 30
needs_mapping = pytest.mark.skipif(not isolated_memory.CAN_MAP, reason="needs memory without a name")

# A worker that does what the name of the file says. It is found through sys.path, which a worker gets from its caller.
MISBEHAVING = """
import importlib, json, mmap, os, signal, sys, time
import numpy

def serve(descriptor):
    worker = importlib.import_module("video_panda_worker.isolated_worker_video_panda")
    reading = importlib.import_module(READING)
    original = reading.read_frames

    def read_frames(opened, choose, limits, make_array):
        name = os.path.basename(str(opened.content))
        if "abort" in name:
            os.abort()
        if "exit" in name:
            os._exit(7)
        if "stop" in name:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "hang" in name:
            time.sleep(1000)
        if "deaf" in name:
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
            time.sleep(1000)
        if "greedy" in name:
            mmap.mmap(-1, 3 * 2**30)
        if "memory" in name:
            held = bytearray(2 * 2**30)
        if "environment" in name:
            raise worker.VideoPandaDecodeError(json.dumps(dict(os.environ)))
        if "nonsense" in name:
            os.write(descriptor, b"GET / HTTP/1.1")
        if "pickle" in name:
            os.write(descriptor, b"\\0\\0\\0\\x12cos\\nsystem\\n(S'x'\\ntR")
        if "huge" in name:
            os.write(descriptor, b"\\xff\\xff\\xff\\xff")
        if "list" in name:
            os.write(descriptor, b"\\0\\0\\0\\2[]")
        if "keyless" in name:
            os.write(descriptor, b"\\0\\0\\0\\2{}")
        if "vast" in name:
            sizes = {"total_num_frames": 1, "width": 10**6, "height": 10**6, "fps": 1, "duration": 1}
            answer = json.dumps({"metadata": {**sizes, "source_frame_times": None}}).encode()
            os.write(descriptor, len(answer).to_bytes(4, "big") + answer)
        if "late" in name:
            chosen = choose
            def choose(metadata):
                chosen(metadata)
                os.abort()
        if "short" in name:
            worker._VideoPandaOutput.__setitem__ = lambda frames, place, frame: None
        if "boast" in name:
            worker._VideoPandaOutput.written = property(lambda frames: [0, 1, 2], lambda frames, value: None)
            worker._VideoPandaOutput.__setitem__ = lambda frames, place, frame: None
        if "cutting" in name:
            written = worker._VideoPandaOutput.__setitem__
            def write_and_cut(frames, place, frame):
                written(frames, place, frame)
                os.ftruncate(frames._descriptor, 0)
            worker._VideoPandaOutput.__setitem__ = write_and_cut
        if "twice" in name:
            made = make_array
            def make_array(shape):
                frames = made(shape)
                for place in range(shape[0]):
                    frames[place] = numpy.zeros(shape[1:], numpy.uint8)
                return frames
        return original(opened, choose, limits, make_array)

    worker.read_frames = read_frames
    worker.serve(descriptor)
"""


def take(*indices):
    return lambda metadata: list(indices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder):
    return write_clip(folder / "clip.mp4", NUM_FRAMES, width=160, height=96)


@pytest.fixture(scope="module")
def large(folder):
    """A clip of which two frames are large enough to be lent."""
    clip = write_clip(folder / "large.mp4", NUM_FRAMES, width=640, height=360)
    assert isolated_memory._MIN_LENT_BYTES < 2 * 640 * 360 * 3
    return clip


@pytest.fixture
def named(clip):
    """The good clip under another name."""

    def link(name):
        path = clip.with_name(name)
        if not path.exists():
            os.link(clip, path)
        return path

    return link


def idle_workers():
    return [] if isolated._workers is None else [worker._process.pid for worker in isolated._workers._idle]


@pytest.fixture(scope="module")
def misbehaving_module(folder):
    reading = "video_panda_worker.frame_reading_video_panda"
    (folder / "misbehaving_worker.py").write_text(f"READING = {reading!r}\n{MISBEHAVING}")
    return folder


@pytest.fixture
def misbehaving(misbehaving_module, monkeypatch):
    """Workers that are started meanwhile misbehave; they are gone afterwards."""
    good = "importlib.import_module('video_panda_worker.isolated_worker_video_panda')"
    assert good in isolated._START
    monkeypatch.setattr(
        isolated, "_START", isolated._START.replace(good, "importlib.import_module('misbehaving_worker')")
    )
    monkeypatch.syspath_prepend(misbehaving_module)
    monkeypatch.setattr(isolated, "_workers", isolated._VideoPandaWorkers())
    yield
    isolated.end_workers()


# --------------------------------------------------------------------------------------------------- good clips


def test_frames_and_metadata_are_those_of_the_same_process(clip, folder):
    uneven = write_clip(folder / "uneven.mkv", 12, ticks=[index * (index + 5) for index in range(12)])
    turned = set_rotation(write_clip(folder / "turned.mp4", 12, width=160, height=96), 90)
    for source in (clip, str(turned), uneven, clip.read_bytes(), memoryview(turned.read_bytes())):
        expected, told = decode_video(source, take(9, 0, 9, 3), isolate=False)
        frames, metadata = decode_video(source, take(9, 0, 9, 3), isolate=True)
        assert torch.equal(frames, expected)
        assert (vars(metadata), metadata.timestamps) == (vars(told), told.timestamps)
        assert type(metadata) is type(told)
    assert len(idle_workers()) == 1
    frames[:] = 0  # memory of one's own, which may be written to
    assert read_barcodes(decode_video(clip, take(9), isolate=True)[0]) == [9]


def test_frames_are_chosen_in_the_process_that_asks(clip):
    seen = []
    decode_video(clip, lambda metadata: seen.append((os.getpid(), metadata.total_num_frames)) or [1], isolate=True)
    assert seen == [(os.getpid(), NUM_FRAMES)]
    before = idle_workers()
    for mistake in (ZeroDivisionError, KeyboardInterrupt, TimeoutError, VideoDecodeError):

        def fail(metadata, mistake=mistake):
            raise mistake("of the caller")

        with pytest.raises(mistake, match="of the caller"):
            decode_video(clip, fail, isolate=True)
    for wrong in ([], [NUM_FRAMES], [-1]):
        with pytest.raises(ValueError, match=r"clip\.mp4.*0 to 29"):
            decode_video(clip, take(*wrong), isolate=True)
    assert read_barcodes(decode_video(clip, take(2), isolate=True)[0]) == [2]
    assert idle_workers() == before


def test_threads_have_workers_of_their_own(clip):
    together = threading.Barrier(3)
    results = []

    def read(index):
        def choose(metadata):
            together.wait(timeout=60)  # all three are in the middle of a clip
            return [index]

        results.append((index, *read_barcodes(decode_video(clip, choose, isolate=True)[0])))

    threads = [threading.Thread(target=read, args=(index,)) for index in (4, 5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(4, 4), (5, 5), (6, 6)]
    assert len(set(idle_workers())) == 3


def test_a_forked_process_has_workers_of_its_own(clip):
    decode_video(clip, take(0), isolate=True)
    before = idle_workers()
    reading, writing = os.pipe()
    with isolated._making_pool, isolated._workers._lock:  # as if another thread were at it
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                barcodes = read_barcodes(decode_video(clip, take(7), isolate=True)[0])
                os.write(writing, repr((barcodes, set(idle_workers()) & set(before))).encode())
            os._exit(0)
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 1000) == b"([7], set())"
    os.close(reading)
    assert read_barcodes(decode_video(clip, take(8), isolate=True)[0]) == [8]
    assert idle_workers() == before


def test_a_worker_that_was_killed_meanwhile_is_replaced(clip):
    decode_video(clip, take(0), isolate=True)
    before = idle_workers()
    for worker in before:
        os.kill(worker, signal.SIGKILL)
        psutil.Process(worker).wait(timeout=5)
    assert read_barcodes(decode_video(clip, take(8), isolate=True)[0]) == [8]
    assert not set(idle_workers()) & set(before)


def test_the_copies_beside_a_checkpoint_isolate_as_well(clip, tmp_path, monkeypatch):
    """Loaded by transformers as remote code, under another name and from another folder."""
    from video_panda import __path__ as installed

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    kind = get_class_from_dynamic_module(
        "video_processing_video_panda.VideoPandaVideoProcessor", os.path.join(installed[0], "processing")
    )
    assert kind.__module__.startswith("transformers_modules")
    frames, _ = kind().fetch_videos(clip, take(3), isolate=True)
    assert read_barcodes(frames) == [3]
    own = sys.modules[kind.__module__.rpartition(".")[0] + ".isolated_video_panda"]
    (worker,) = own._workers._idle
    command = psutil.Process(worker._process.pid).cmdline()
    own.end_workers()
    assert any(argument.startswith(str(tmp_path / "modules")) for argument in command)
    assert str(installed[0]) not in command


@needs_mapping
def test_frames_are_used_where_they_were_written(large):
    """And their memory again for the next, but not before they are gone."""
    expected, _ = decode_video(large, take(9, 0, 9, 3), isolate=False)
    frames, _ = decode_video(large, take(9, 0, 9, 3), isolate=True)
    (file,) = isolated._workers.memory._lent
    assert "/memfd:video-panda" in Path("/proc/self/maps").read_text()
    later, _ = decode_video(large, take(5, 6, 7, 8), isolate=True)
    assert torch.equal(frames, expected)
    frames.zero_()
    assert read_barcodes(later) == [5, 6, 7, 8]
    del frames
    assert isolated._workers.memory._free[-1] is file
    again, _ = decode_video(large, take(1, 2), isolate=True)
    assert file in isolated._workers.memory._lent
    assert read_barcodes(again) == [1, 2]
    isolated.end_workers()
    assert read_barcodes(later) == [5, 6, 7, 8]


@needs_mapping
def test_frames_that_a_forked_process_has_as_well_stay_as_they_are(large):
    frames, _ = decode_video(large, take(4, 5, 6), isolate=True)
    (reading, writing), (waiting, ready) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.read(waiting, 1)
            os.write(writing, repr(read_barcodes(frames)).encode())
        os._exit(0)
    os.close(writing)
    del frames
    assert read_barcodes(decode_video(large, take(20, 21, 22), isolate=True)[0]) == [20, 21, 22]
    os.write(ready, b".")
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 1000) == b"[4, 5, 6]"
    for end in (reading, waiting, ready):
        os.close(end)


def num_page_faults(pid: int) -> int:
    """Pages that the system had to give to a process so far."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_a_worker_keeps_the_memory_of_a_frame_for_the_next(tmp_path):
    clip = write_clip(tmp_path / "large.mp4", 12, width=1280, height=720)
    counts = []
    for _ in range(5):
        decode_video(clip, take(0, 5, 11), isolate=True)
        counts.append(num_page_faults(idle_workers()[-1]))
    assert counts[-1] - counts[-2] < 500, "a frame alone has 675 pages; given back each time, a clip takes thousands"


# ----------------------------------------------------------------------------------------------- what may happen


ENDS = {
    "abort.mp4": "ended the worker process: killed by SIGABRT",
    "late.mp4": "ended the worker process: killed by SIGABRT",
    "exit.mp4": "ended the worker process: exit code 7",
    "memory.mp4": "takes more than 1000000000 bytes of memory",
    "vast.mp4": "1000000 x 1000000 px",
    "short.mp4": "fewer pixels",
    "pickle.mp4": "wrong answer",
    "nonsense.mp4": "wrong answer",
    "huge.mp4": "wrong answer",
    "list.mp4": "wrong answer",
    "keyless.mp4": "wrong answer",
}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(
            name, reason, marks=[pytest.mark.slow] * (name in ("exit.mp4", "nonsense.mp4", "huge.mp4", "list.mp4"))
        )
        for name, reason in ENDS.items()
    ],
)
def test_what_ends_a_worker_is_an_error_of_the_clip(misbehaving, named, name, reason):
    limits = VideoPandaDecodeLimits(memory_bytes=10**9)
    with pytest.raises(VideoDecodeError, match=rf"{name}: .*{reason}"):
        decode_video(named(name), take(1), isolate=True, limits=limits)
    # The next clip is read as if nothing had happened.
    assert read_barcodes(decode_video(named("good.mp4"), take(2), isolate=True)[0]) == [2]


def test_the_last_of_what_is_written_counts(misbehaving, named):
    """As where one way to decode gives up in the middle, and another writes all frames again."""
    for _ in range(2):
        assert read_barcodes(decode_video(named("twice.mp4"), take(4, 0, 9), isolate=True)[0]) == [4, 0, 9]


@pytest.mark.parametrize("least_lent", [isolated_memory._MIN_LENT_BYTES, 0], ids=["copied", "lent"])
def test_a_worker_cannot_cut_off_what_it_is_given(misbehaving, named, monkeypatch, least_lent):
    """Frames in memory that is cut off would end this process when they are used."""
    monkeypatch.setattr(isolated_memory, "_MIN_LENT_BYTES", least_lent)
    with pytest.raises(VideoDecodeError, match=r"cutting\.mp4: .*ended the worker process"):
        decode_video(named("cutting.mp4"), take(1), isolate=True)


@pytest.mark.parametrize("least_lent", [isolated_memory._MIN_LENT_BYTES, 0], ids=["copied", "lent"])
def test_no_frame_is_given_that_was_not_written(misbehaving, named, monkeypatch, least_lent):
    monkeypatch.setattr(isolated_memory, "_MIN_LENT_BYTES", least_lent)
    decode_video(named("good.mp4"), take(1, 2), isolate=True)
    for name in ("short.mp4", "boast.mp4"):
        with pytest.raises(VideoDecodeError, match=rf"{name}: the worker gave fewer pixels"):
            decode_video(named(name), take(1), isolate=True)


@pytest.mark.parametrize("name", ["hang.mp4", "stop.mp4", pytest.param("deaf.mp4", marks=pytest.mark.slow)])
def test_time_is_limited(misbehaving, named, name):
    decode_video(named("good.mp4"), take(0), isolate=True)
    (worker,) = idle_workers()
    begin = time.monotonic()
    with pytest.raises(VideoDecodeError, match=rf"{name}: decoding did not end within 0\.3 s"):
        decode_video(named(name), take(1), isolate=True, limits=VideoPandaDecodeLimits(seconds=0.3))
    assert time.monotonic() - begin < 2
    assert not psutil.pid_exists(worker)


def test_an_interrupted_request_ends_its_worker(misbehaving, named):
    decode_video(named("good.mp4"), take(0), isolate=True)
    (worker,) = idle_workers()
    # Started in the background, as by a script, a process ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            decode_video(named("hang.mp4"), take(1), isolate=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not psutil.pid_exists(worker)
    assert idle_workers() == []


def test_a_worker_sees_no_secrets(misbehaving, named, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(VideoDecodeError, match="PATH") as caught:
        decode_video(named("environment.mp4"), take(1), isolate=True)
    assert "hf_secret" not in str(caught.value)


def test_a_worker_that_cannot_start_says_so(misbehaving_module, clip, monkeypatch):
    monkeypatch.setattr(isolated, "_START", "import sys; sys.exit(5)")
    monkeypatch.setattr(isolated, "_workers", isolated._VideoPandaWorkers())
    with pytest.raises(RuntimeError, match="does not start: exit code 5"):
        decode_video(clip, take(1), isolate=True)


@pytest.mark.parametrize("name", ["good.mp4", "hang.mp4"])
def test_a_worker_ends_with_the_process_that_started_it(misbehaving_module, named, name):
    """Killed itself, a caller can end nobody: the worker has to notice."""
    code = (
        "import sys, importlib, types\n"
        "sys.modules['torch'] = types.ModuleType('torch')  # for large frames only, and seconds to import\n"
        "package = types.ModuleType('callers'); package.__path__ = [sys.argv[1]]; sys.modules['callers'] = package\n"
        "isolated = importlib.import_module('callers.isolated_video_panda')\n"
        "limits = isolated.VideoPandaDecodeLimits()\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "good = 'video_panda_worker.isolated_worker_video_panda'\n"
        "isolated._START = isolated._START.replace(good, 'misbehaving_worker')\n"
        "worker = isolated._VideoPandaWorker(isolated.VideoPandaFrameMemory())\n"
        "print(worker._process.pid, flush=True)\n"
        "worker.read(isolated.VideoPandaSource(sys.argv[3], 'name'), lambda metadata: [0], limits)\n"
        "print('done', flush=True)\n"
        "input()\n"
    )
    arguments = [os.path.dirname(isolated.__file__), str(misbehaving_module), str(named(name))]
    caller = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = psutil.Process(int(caller.stdout.readline()))
    if name == "good.mp4":
        assert caller.stdout.readline() == "done\n"
    else:
        time.sleep(0.5)
    caller.kill()
    caller.communicate()
    worker.wait(timeout=5)


# ------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"num_frames": 29}, "30 frames, more than the limit of 29"),
        ({"frame_pixels": 160 * 96 - 1}, "160 x 96 px, more than the limit"),
        ({"output_bytes": 2 * 160 * 96 * 3}, "3 frames of 160 x 96 px take .* ask for fewer"),
    ],
)
def test_limits_hold_with_and_without_a_worker(clip, isolate, limits, reason):
    limits = VideoPandaDecodeLimits(**limits)
    with pytest.raises(VideoDecodeError, match=rf"clip\.mp4: .*{reason}"):
        decode_video(clip, take(0, 1, 2), isolate=isolate, limits=limits)


def test_limits_that_are_none(clip):
    exact = {"num_frames": NUM_FRAMES, "frame_pixels": 160 * 96, "output_bytes": 160 * 96 * 3}
    assert len(decode_video(clip, take(0), limits=VideoPandaDecodeLimits(**exact))[0]) == 1
    for wrong in ({"seconds": 0}, {"num_frames": 1.5}, {"frame_pixels": True}, {"output_bytes": "1"}):
        with pytest.raises(ValueError, match="positive number"):
            VideoPandaDecodeLimits(**wrong)


def test_declared_samples_are_compared_before_a_decoder_sees_them(tmp_path, clip):
    tracks, num_bytes = read_mp4_tracks(str(clip))
    assert [(track.handler, track.num_samples) for track in tracks] == [(b"vide", NUM_FRAMES)]
    assert num_bytes == clip.stat().st_size
    assert read_mp4_tracks(write_clip(tmp_path / "a.mkv", 3).read_bytes())[0] == []
    sound = write_clip(tmp_path / "sound.mp4", 10, with_audio=True)
    assert sorted(track.handler for track in read_mp4_tracks(str(sound))[0]) == [b"soun", b"vide"]
    forged = announce_samples(base_clip(tmp_path, "hevc.mp4").read_bytes(), 2_000_000_000)
    assert len(forged) < 5000
    with pytest.raises(VideoDecodeError, match=r"bytes in memory>: declares 2000000000 samples in a file of"):
        decode_video(forged, take(0), isolate=False)


def test_the_forged_table_does_abort_decord(tmp_path):
    """What all this is for. If it aborts no more, look for another such file."""
    (tmp_path / "forged.mp4").write_bytes(announce_samples(base_clip(tmp_path, "hevc.mp4").read_bytes(), 2 * 10**9))
    code = "import decord, resource, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); decord.VideoReader(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "forged.mp4"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGABRT
