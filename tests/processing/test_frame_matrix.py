"""On every kind of stream, however it is asked for: the frames are the frames asked for. Never others without a word."""

import math
import random
import re
from pathlib import Path

import av
import decord
import numpy as np
import pytest
from clips import read_barcodes
from frame_matrix import COMBINATIONS, encode

from video_panda import VideoPandaVideoProcessor
from video_panda.processing import frame_reading_video_panda as frame_reading
from video_panda.processing import pyav_reading_video_panda as pyav_reading
from video_panda.processing import stream_probe_video_panda as stream_probe
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, decode_video

DOCS = Path(__file__).parents[2] / "docs" / "exact_frames.md"
NUM_FRAMES, WIDTH, HEIGHT, FPS = 40, 208, 144, 25
BY_FILE = {combination.file: combination for combination in COMBINATIONS}
ALWAYS, NEVER = float("-inf"), float("inf")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Encodes each kind once: (path, the number on each frame)."""
    folder, made = tmp_path_factory.mktemp("matrix"), {}

    def make(combination):
        path = folder / combination.file
        if combination.file not in made:
            made[combination.file] = encode(combination, path, NUM_FRAMES, WIDTH, HEIGHT)
        if made[combination.file] is None:
            pytest.skip(f"this PyAV cannot encode {combination.pictures}")
        return path, made[combination.file]

    return make


@pytest.fixture(params=["as it comes", "random access", pytest.param("a large file", marks=pytest.mark.slow)])
def way(request, monkeypatch):
    """Reads small clips the other ways, too: by decord wherever it is trusted, and as a file too large to be kept."""
    if request.param == "random access":
        monkeypatch.setattr(frame_reading, "_PIXELS_OF_OPENING", ALWAYS)
        monkeypatch.setattr(stream_probe, "_MAX_KEPT_BYTES", 0)
        monkeypatch.setattr(pyav_reading, "_PIXELS_FOR_ONE_THREAD", 0)
    if request.param == "a large file":
        monkeypatch.setattr(frame_reading, "_PIXELS_OF_OPENING", NEVER)
        monkeypatch.setattr(pyav_reading, "_PIXELS_FOR_ONE_THREAD", 0)
        monkeypatch.setattr(stream_probe, "_MAX_KEPT_BYTES", 0)
        monkeypatch.setattr(pyav_reading, "_MAX_KEPT_FRAME_BYTES", 0)
    return request.param


needs_to_be_told = pytest.mark.skipif(not stream_probe._TELLS_OF_CHANGES, reason="PyAV 15 skips nothing")


def patterns(num_frames: int, seed: str) -> dict[str, list[int]]:
    """Which frames one may ask for, and in which order."""
    everything = list(range(num_frames))
    drawn = random.Random(seed).choices(everything, k=8)
    return {
        "uniform": np.linspace(0, num_frames - 1, 8).astype(int).tolist(),
        "random": drawn,
        "reversed": everything[::-3],
        "duplicates": [drawn[0], drawn[1], drawn[0], drawn[0]],
        "last": everything[-1:],
        "all": everything,
    }


def test_there_are_enough_kinds():
    assert len(BY_FILE) == len(COMBINATIONS) >= 24
    containers = {combination.container for combination in COMBINATIONS}
    assert containers == {"mp4", "mov", "mkv", "webm", "avi", "ts", "flv", "wmv", "mpg", "gif"}


@pytest.mark.parametrize("file", BY_FILE)
def test_frames_are_the_frames_asked_for(clip, way, file):
    combination = BY_FILE[file]
    path, numbers = clip(combination)
    width, height = combination.size_px or (WIDTH, HEIGHT)
    for pattern, indices in patterns(len(numbers), file).items():
        frames, metadata = decode_video(path, lambda metadata, indices=indices: indices)
        assert tuple(frames.shape) == (len(indices), height, width, 3)
        assert read_barcodes(frames) == [numbers[index] for index in indices], pattern
        assert metadata.frames_indices == indices
        assert (metadata.total_num_frames, metadata.width, metadata.height) == (len(numbers), width, height)
        is_random = way == "random access" and combination.is_for_decord
        assert metadata.video_backend == ("decord" if is_random else "pyav")
    assert_times(combination, metadata, numbers)


@needs_to_be_told
@pytest.mark.parametrize("file", BY_FILE)
def test_where_decoding_may_begin(clip, file):
    path, _ = clip(BY_FILE[file])
    with av.open(str(path)) as container:
        info = stream_probe.probe_stream(container)
    assert info.groups_stand_alone == BY_FILE[file].random_access
    assert info.random_access_is_exact == BY_FILE[file].is_for_decord


def assert_times(combination, metadata, numbers):
    """When each frame is shown; after all frames were asked for."""
    ticks = [number if combination.ticks is None else combination.ticks(number) for number in numbers]
    expected = [(tick - ticks[0]) / FPS for tick in ticks]
    if combination.file == "uneven.gif":  # its times are whole hundredths of a second, and each is rounded by itself
        assert metadata.timestamps == pytest.approx(expected, abs=0.011 * len(ticks))
    elif metadata.source_frame_times is not None:
        assert metadata.timestamps == pytest.approx(expected, abs=1.5e-3)  # Matroska counts in milliseconds
    else:
        assert combination.file == "closed.avi"


def plain_random_access(path, indices):
    """Numbers of the frames that decord gives when one simply asks it; None where it refuses."""
    try:
        with frame_reading._VideoPandaQuietDecord(decord):
            return read_barcodes(decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy())
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError, AssertionError):
        return None


def test_the_matrix_has_traps_in_it(clip):
    """Asked directly, decord gives other frames without a word: the barcodes see it, and the guard is needed."""
    wrong = []
    for combination in COMBINATIONS:
        path, numbers = clip(combination)
        indices = patterns(len(numbers), combination.file)["random"]
        got = plain_random_access(path, indices)
        if got is not None and got != [numbers[index] for index in indices]:
            wrong.append(combination.file)
    assert {"open.mp4", "refresh.mp4", "cut.mp4", "mpeg4.avi", "mpeg2.mpg", "wmv2.wmv"} <= set(wrong)
    trusted = {combination.file for combination in COMBINATIONS if combination.is_for_decord}
    assert not trusted & set(wrong)


@pytest.mark.parametrize("file", ["closed.mp4", "closed.mkv", "vp9.webm"])
def test_a_frame_that_the_decoder_leaves_out_moves_no_other(clip, file, monkeypatch):
    """Frames are found by their time: where one is missing, the others are still themselves."""
    path, _ = clip(BY_FILE[file])
    original = pyav_reading.follow_damage

    def leave_out(frames):
        for frame, is_damaged in original(frames):
            if frame.pts != seventh:
                yield frame, is_damaged

    with av.open(str(path)) as container:
        seventh = [frame.pts for frame in container.decode(video=0)][7]
    monkeypatch.setattr(pyav_reading, "follow_damage", leave_out)
    frames, _ = decode_video(path, lambda metadata: [39, 8, 6])
    assert read_barcodes(frames) == [39, 8, 6]
    with pytest.raises(VideoDecodeError, match=rf"{file}: frames \[7\] were expected"):
        decode_video(path, lambda metadata: [6, 7, 8])


@needs_to_be_told
@pytest.mark.parametrize(
    ("file", "most_decoded"),
    # 0 and 30 of groups of 12: the first packet, then packets 0, and 24 up to that of 30
    [
        ("closed.mp4", 1 + 1 + 8),
        ("closed.mkv", 1 + 1 + 8),
        ("open.mp4", 40),
        ("mpeg4.avi", 40),
        ("animation.gif", 40),
    ],
)
def test_a_file_is_opened_once_and_only_what_is_needed_is_decoded(clip, monkeypatch, file, most_decoded):
    path, _ = clip(BY_FILE[file])
    opened, decoded, converted = [], [], []
    upright, video = pyav_reading._VideoPandaUpright, pyav_reading.VideoPandaPyavVideo
    open_file, convert, decode, decode_packets = av.open, upright.__call__, video._decode, video._decode_packets

    def noting(frames):
        for frame in frames:
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or open_file(*args, **options))
    monkeypatch.setattr(upright, "__call__", lambda own, frame: converted.append(frame) or convert(own, frame))
    monkeypatch.setattr(video, "_decode", lambda own: noting(decode(own)))
    monkeypatch.setattr(video, "_decode_packets", lambda own, *args: noting(decode_packets(own, *args)))
    frames, _ = decode_video(path, lambda metadata: [30, 0, 30])
    assert read_barcodes(frames) == [30, 0, 30]
    assert len(opened) == 1
    assert len(converted) == 2
    assert len(decoded) <= most_decoded


@needs_to_be_told
@pytest.mark.parametrize("name", ["_is_hidden_vp8", "_decode_packets", "_changes_the_decoder"])
def test_where_in_doubt_all_is_decoded_from_the_start(clip, monkeypatch, name):
    """A picture too few, a first packet without a picture, a decoder that must be told on the way."""
    path, _ = clip(BY_FILE["vp8.webm"])
    skipped = []
    original = pyav_reading.VideoPandaPyavVideo._from_groups
    monkeypatch.setattr(
        pyav_reading.VideoPandaPyavVideo, "_from_groups", lambda *args: skipped.append(args) or original(*args)
    )
    assert read_barcodes(decode_video(path, lambda metadata: [39, 3])[0]) == [39, 3]
    assert len(skipped) == 1
    if name == "_decode_packets":
        monkeypatch.setattr(pyav_reading.VideoPandaPyavVideo, name, lambda *args: iter(()))
    else:
        monkeypatch.setattr(stream_probe, name, lambda packet: packet.pts > 900)
    assert read_barcodes(decode_video(path, lambda metadata: [39, 3])[0]) == [39, 3]
    assert len(skipped) == 1


@pytest.mark.parametrize("hidden", [0, 5])
def test_pictures_that_are_only_referred_to_are_not_counted(clip, way, tmp_path, hidden):
    """Encoders of VP8 put such pictures into packets of their own."""
    path, numbers = clip(BY_FILE["vp8.webm"])
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][hidden]
        first_bytes = bytes(packet)[:16]
    content = bytearray(path.read_bytes())
    content[content.find(first_bytes)] &= ~0x10
    target = tmp_path / "hidden.webm"
    target.write_bytes(content)
    frames, metadata = decode_video(target, lambda metadata: list(range(metadata.total_num_frames)))
    assert read_barcodes(frames) == [number for number in numbers if number != hidden]
    assert metadata.video_backend == "pyav"


@pytest.mark.parametrize("file", [file for file in BY_FILE if "uneven" in file])
@pytest.mark.parametrize(("fps", "start", "end"), [(5, None, None), (2, 0.8, 6.0), (25, 1.0, 3.0), (None, 2.0, 4.5)])
def test_sampling_by_time_goes_by_the_times_of_the_frames(clip, file, fps, start, end):
    combination = BY_FILE[file]
    path, numbers = clip(combination)
    processor = VideoPandaVideoProcessor(image_size=112)
    options = {"fps": fps} if fps else {"do_sample_frames": False}
    output = processor(path, start=start, end=end, return_metadata=True, **options)
    metadata = output["video_metadata"][0]
    times = metadata.source_frame_times
    if file != "uneven.gif":
        assert times == pytest.approx(
            [(combination.ticks(n) - combination.ticks(0)) / FPS for n in numbers], abs=1.5e-3
        )
    inside = [n for n in numbers if (start or 0) - 1e-6 <= times[n] < (end or math.inf) - 1e-6]
    if fps:
        # What a viewer sees who looks every 1/fps seconds, from the first frame of the window on.
        until = min(
            end or math.inf, times[inside[-1] + 1] if inside[-1] + 1 < len(times) else times[-1] + 1 / metadata.fps
        )
        looks = [times[inside[0]] + k / fps for k in range(math.ceil((until - times[inside[0]]) * fps))]
        looks = [moment for moment in looks if moment < until - 1e-3]
        expected = sorted({max(n for n in inside if times[n] <= moment + 1e-3) for moment in looks})
    else:
        expected = inside
    assert metadata.frames_indices == expected
    assert len(expected) > 1


def test_the_page_lists_the_matrix():
    """docs/exact_frames.md has one line for each kind, in order, and says how it is read."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    ways = {True: "random access", False: "from the start"}
    assert rows == [(kind.file, kind.pictures, ways[kind.random_access]) for kind in COMBINATIONS]
