"""The sections of `reliability.py` about reading videos: hostile files, isolation, memory, workers, paths."""

import collections
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from clips import write_clip
from hostile_files import hostile_files
from reliability import Figure

from video_panda.processing import isolated_video_panda as isolated
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, VideoPandaDecodeLimits, decode_video
from video_panda.processing.video_processing_video_panda import VideoPandaVideoProcessor

TESTS = Path(__file__).parents[1] / "tests" / "processing"
LIMITS = VideoPandaDecodeLimits(seconds=10.0)
GRACE_SECONDS = 2.0  # for killing the worker
SIZES = ((320, 240), (640, 360), (1280, 720), (1920, 1080))


def _choose(metadata) -> list[int]:
    return sorted({0, metadata.total_num_frames // 2, metadata.total_num_frames - 1})


def _outcome(path: Path, isolate: bool) -> str:
    try:
        frames, _ = decode_video(path, _choose, isolate=isolate, limits=LIMITS)
        return "frames" if len(frames) else "no frames"
    except VideoDecodeError as error:
        return "error" if str(path)[:200] in str(error) else "unnamed error"
    except Exception as error:  # noqa: BLE001 - what else there is, is what is counted
        return f"another error: {type(error).__name__}"


def _outcome_in_own_process(path: Path, isolate: bool) -> tuple[str, float]:
    """(what became of the file in a forked process, seconds)."""
    begin = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(60)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writing, _outcome(path, isolate).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with open(reading, "rb") as file:
        told = file.read().decode()
    if os.WIFSIGNALED(status):
        told = (
            "hang" if os.WTERMSIG(status) == signal.SIGALRM else f"crash ({signal.Signals(os.WTERMSIG(status)).name})"
        )
    return told, time.monotonic() - begin


def _read_all(quick: bool, isolate: bool) -> tuple[collections.Counter, int, float]:
    counts, num_files, slowest = collections.Counter(), 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _, path in hostile_files(Path(folder), 20 if quick else 1):
            told, seconds = _outcome_in_own_process(path, isolate)
            counts[told] += 1
            num_files += 1
            slowest = max(slowest, seconds)
    return counts, num_files, slowest


def hostile_files_isolated(quick: bool) -> list[Figure]:
    """Every hostile file, read with `isolate=True` by a process of its own."""
    counts, num_files, slowest = _read_all(quick, isolate=True)
    limit = LIMITS.seconds + GRACE_SECONDS
    crashes = sum(count for told, count in counts.items() if told.startswith("crash"))
    others = {told: count for told, count in counts.items() if told not in ("frames", "error")}
    return [
        Figure("files", "at least 1000", num_files, quick or num_files >= 1000),
        Figure("crashes of the caller", "0", crashes, crashes == 0),
        Figure(
            "hangs past the limit", "0", counts["hang"] + int(slowest > limit), not counts["hang"] and slowest <= limit
        ),
        Figure(
            "slowest file, s, start of the worker included", f"at most {limit:g}", round(slowest, 2), slowest <= limit
        ),
        Figure("VideoDecodeError that names the file", "", counts["error"], None),
        Figure("frames", "", counts["frames"], None),
        Figure("anything else", "none", str(others or "none"), not others),
    ]


def hostile_files_in_process(quick: bool) -> list[Figure]:
    """The same without isolation, where only the limits and the guards stand before the decoders."""
    counts, num_files, slowest = _read_all(quick, isolate=False)
    return [
        Figure("files", "", num_files, None),
        *(Figure(told, "", count, None) for told, count in sorted(counts.items())),
        Figure("slowest file, s", "", round(slowest, 2), None),
    ]


def cost_of_isolation(quick: bool) -> list[Figure]:
    """Good clips of 10 seconds, with and without a worker in turns; the median of the ratios of neighbours."""
    processor, figures = VideoPandaVideoProcessor(), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES[:2] if quick else SIZES:
            options = {"g": "50", "preset": "veryfast"}
            clip = write_clip(Path(folder, f"{width}.mp4"), 250, width=width, height=height, options=options)
            times = {False: [], True: []}
            for turn in range(6 if quick else 120):
                for isolate in (False, True) if turn % 2 else (True, False):
                    time.sleep(0.02)  # the decoder's threads of the turn before are still ending
                    begin = time.perf_counter()
                    processor(str(clip), isolate=isolate)
                    times[isolate].append(time.perf_counter() - begin)
            ratio = statistics.median(own / plain for own, plain in zip(times[True][2:], times[False][2:]))
            medians = [statistics.median(times[isolate]) * 1000 for isolate in (False, True)]
            name = f"{width} x {height} px: file to pixel values, ms ({medians[0]:.1f} in process, {medians[1]:.1f} isolated)"
            figures.append(Figure(name, "at most 1.10 x", round(ratio, 3), ratio <= 1.10))
        isolated.end_workers()
        begin = time.perf_counter()
        decode_video(clip, _choose, isolate=True)
        figures.append(
            Figure("the first clip, a worker's start included, s", "", round(time.perf_counter() - begin, 2), None)
        )
    return figures


def _passes(name: str, asked: str, *arguments: str) -> Figure:
    """A figure that a test stands for."""
    command = [sys.executable, "-m", "pytest", "-q", "--slow", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parents[1])
    return Figure(name, asked, done.stdout.strip().splitlines()[-1], done.returncode == 0)


def opening_files(quick: bool) -> list[Figure]:
    """Memory and descriptors after many good and many failing opens, in this process and its workers."""
    which = "share" if quick else "five_hundred"
    asked = "at most 10 MB more, descriptors and threads the same"
    return [_passes(f"good and failing opens ({which})", asked, str(TESTS / "test_decoding_memory.py"), "-k", which)]


def data_loader(quick: bool) -> list[Figure]:
    """Workers of a DataLoader, forked and spawned."""
    file = str(TESTS / "test_decoding_memory.py")
    which = "same_frames and fork-2" if quick else "same_frames"
    asked = "frames identical to those of 0 workers, no hang"
    return [_passes("fork and spawn x 2, 4 workers, isolated and not", asked, file, "-k", which)]


def paths_and_addresses(quick: bool) -> list[Figure]:
    """What paths and URLs of strangers reach."""
    asked = "no connection, no file opened outside, no address that is not public"
    return [_passes("paths, protocol strings, addresses, redirects", asked, str(TESTS / "test_untrusted_sources.py"))]
