"""Frames are the frames asked for, on every kind of stream; a file that cannot be read says so.

The clips carry their frame numbers as barcodes. Where decord's random access is trusted, the test proves it right;
where it is not, the expected backend shows that another way is taken.
"""

import io
import os
import random
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import torch
from clips import barcode_frame, read_barcodes, set_rotation, truncate, write_audio, write_clip

from video_panda.processing import containers_video_panda as containers
from video_panda.processing import frame_reading_video_panda as decoding
from video_panda.processing import pyav_reading_video_panda as pyav_reading
from video_panda.processing import sources_video_panda as sources
from video_panda.processing import stream_probe_video_panda as stream_probe
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, VideoPandaDecodeError, decode_video

NUM_FRAMES = 40
REORDERED = "bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"
UNEVEN = [index * (index + 9) // 7 for index in range(NUM_FRAMES)]

KINDS = {
    # name: (backend expected, arguments of write_clip)
    "h264.mp4": ("decord", {"options": {"x264-params": REORDERED}}),
    "h264.mkv": ("decord", {"options": {"x264-params": REORDERED}}),
    "h264_uneven.mp4": ("decord", {"options": {"x264-params": REORDERED}, "ticks": UNEVEN}),
    "h264_late_start.mp4": ("decord", {"options": {"x264-params": REORDERED}, "ticks": range(50, 50 + NUM_FRAMES)}),
    "vp9.webm": ("decord", {"codec": "libvpx-vp9", "options": {"g": "12", "b": "400000", "cpu-used": "8"}}),
    "h264_open.mp4": ("pyav", {"options": {"x264-params": REORDERED + ":open-gop=1"}}),
    "h264.ts": ("pyav", {"options": {"g": "12"}, "container_format": "mpegts"}),
    "mpeg4.avi": ("pyav", {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "800000"}}),
}


@pytest.fixture(autouse=True)
def random_access_pays(monkeypatch):
    """decord reads only what is too large to be kept; small clips would all be PyAV's."""
    monkeypatch.setattr(decoding, "_PIXELS_OF_OPENING", float("-inf"))
    monkeypatch.setattr(stream_probe, "_MAX_KEPT_BYTES", 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Encodes a clip of a kind once for the module."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name):
        path = folder / name
        if not path.exists():
            try:
                write_clip(path, NUM_FRAMES, width=160, height=96, **KINDS[name][1])
            except av.codec.codec.UnknownCodecError:
                pytest.skip(f"this PyAV cannot encode {name}")
        return path

    return make


def take(indices):
    return lambda metadata: indices


@pytest.mark.parametrize("name", ["h264.mp4", "h264_open.mp4", "h264.ts"])
def test_bytes_are_read_as_the_file(clip, name):
    from_path, _ = decode_video(str(clip(name)), take([3, 17, 30]))
    from_bytes, metadata = decode_video(clip(name).read_bytes(), take([3, 17, 30]))
    assert torch.equal(from_path, from_bytes)
    assert metadata.video_backend == KINDS[name][0]


@pytest.mark.parametrize("name", ["h264.mp4", "h264_uneven.mp4", "vp9.webm"])
def test_both_readers_give_the_same_pixels(clip, name, monkeypatch):
    by_decord, first = decode_video(clip(name), take([0, 9, 20, 39]))
    monkeypatch.setattr(decoding, "_import_decord", lambda: None)
    by_pyav, second = decode_video(clip(name), take([0, 9, 20, 39]))
    assert (first.video_backend, second.video_backend) == ("decord", "pyav")
    assert torch.equal(by_decord, by_pyav)


@pytest.mark.parametrize("name", ["h264.mp4", "h264_open.mp4", "mpeg4.avi"])
def test_without_pyav_decord_reads_from_the_start(clip, name, monkeypatch):
    monkeypatch.setattr(decoding, "av", None)
    frames, metadata = decode_video(clip(name), take([30, 4, 17, 4]))
    assert read_barcodes(frames) == [30, 4, 17, 4]
    assert metadata.total_num_frames == NUM_FRAMES
    assert metadata.video_backend == "decord-sequential"
    with pytest.raises(VideoDecodeError, match="transport stream"):
        decode_video(clip("h264.ts"), take([0]))
    monkeypatch.setattr(decoding, "_import_decord", lambda: None)
    with pytest.raises(ImportError, match="pip install av"):
        decode_video(clip(name), take([0]))


def test_a_rate_that_is_not_a_number_is_refused(clip, monkeypatch):
    import decord

    monkeypatch.setattr(decoding, "av", None)
    monkeypatch.setattr(decord.VideoReader, "get_avg_fps", lambda reader: float("nan"))
    with pytest.raises(VideoDecodeError, match=r"h264\.mp4.*frame rate: got nan"):
        decode_video(clip("h264.mp4"), take([0]))


def test_rate_and_times(clip):
    import decord

    for name in ("h264.mp4", "h264_uneven.mp4", "h264.mkv", "vp9.webm"):
        _, metadata = decode_video(clip(name), take([0, 7, 30]))
        assert metadata.fps == pytest.approx(decord.VideoReader(str(clip(name)), num_threads=1).get_avg_fps())
    _, metadata = decode_video(clip("h264.mp4"), take([0, 7, 30]))
    assert metadata.timestamps == pytest.approx([0, 7 / 25, 30 / 25])
    assert metadata.duration == pytest.approx(NUM_FRAMES / 25)
    # Where the rate varies, times are those of the frames and not index / fps.
    _, metadata = decode_video(clip("h264_uneven.mp4"), take([0, 7, 30]))
    assert metadata.timestamps == pytest.approx([UNEVEN[index] / 25 for index in (0, 7, 30)])
    assert dict(metadata)["frames_indices"] == [0, 7, 30]
    _, metadata = decode_video(clip("h264_late_start.mp4"), take([0, 7]))
    assert metadata.timestamps == pytest.approx([0, 7 / 25])


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_rotation_is_applied(tmp_path, monkeypatch, degrees, backend):
    upright = barcode_frame(341, 320, 192)
    path = write_clip(tmp_path / "turned.mp4", 3, width=320, height=192)
    set_rotation(path, degrees)
    if backend == "pyav":
        monkeypatch.setattr(decoding, "_import_decord", lambda: None)
    frames, metadata = decode_video(path, take([0, 2]))
    assert metadata.video_backend == backend
    assert (metadata.height, metadata.width) == tuple(frames.shape[1:3])
    assert tuple(frames.shape[1:3]) == ((192, 320) if degrees == 180 else (320, 192))
    # A player turns the stored picture clockwise by so much: the red strip at its bottom ends at this side.
    red = (frames[0].float() - torch.tensor(upright[-1, 0]).float()).abs().sum(-1) < 90
    side = {90: red[:, :20], 180: red[:20], 270: red[:, -20:]}[degrees]
    assert side.float().mean() > 0.9
    assert red.float().mean() < 0.5


def test_a_file_cut_with_an_edit_list(clip, tmp_path):
    """Stream copying from the middle of a group leaves pictures in the file that are decoded but never shown."""
    source, target = clip("h264.mp4"), tmp_path / "cut.mp4"
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.size]
        ticks = int(1 / 25 / stream.time_base)
        for packet in packets:
            if packet.pts >= 12 * ticks:  # the key frame before the cut
                packet.pts -= 18 * ticks
                packet.dts -= 18 * ticks
                packet.stream = copy
                written.mux(packet)
    frames, metadata = decode_video(target, lambda metadata: list(range(metadata.total_num_frames)))
    assert read_barcodes(frames) == list(range(18, NUM_FRAMES))
    assert metadata.video_backend == "pyav"


def test_narrow_pictures(tmp_path):
    """decord takes some narrow pictures for four-channel ones; they are then read with PyAV."""
    for width in (16, 32, 96, 98):
        path = write_clip(tmp_path / f"{width}.mp4", 12, width=width, height=64)
        frames, _ = decode_video(path, take([0, 11]))
        assert tuple(frames.shape) == (2, 64, width, 3)


def test_a_bridge_of_the_program_is_left_alone(clip):
    import decord

    decord.bridge.set_bridge("torch")
    try:
        frames, metadata = decode_video(clip("h264.mp4"), take([2, 5]))
        reader = decord.VideoReader(str(clip("h264.mp4")), num_threads=1)
        assert isinstance(reader.get_batch([0]), torch.Tensor)
    finally:
        decord.bridge.set_bridge("native")
    assert metadata.video_backend == "decord"
    assert read_barcodes(frames) == [2, 5]


def test_another_thread_reads_as_well(clip):
    results = []
    path = clip("h264.mp4")
    threads = [threading.Thread(target=lambda: results.append(decode_video(path, take([1, 30]))[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_barcodes(frames) for frames in results] == [[1, 30]] * 2


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "a.mp4", 3)
    for missing in ("none.mp4", "concat:a.mp4|a.mp4", "subfile,,start,0,end,0,,:a.mp4", "file:a.mp4", "pipe:0"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            decode_video(missing, take([0]))
    with pytest.raises(IsADirectoryError, match="directory"):
        decode_video(tmp_path, take([0]))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="regular file"):
            decode_video(tmp_path / "pipe", take([0]))
    with pytest.raises(ValueError, match=r"http://localhost:9/a\.mp4.*allow_urls"):
        decode_video("http://localhost:9/a.mp4", take([0]))
    with pytest.raises(ValueError, match="int"):
        decode_video(7, take([0]))


def test_a_link_is_followed(tmp_path):
    write_clip(tmp_path / "a.mp4", 3)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    frames, _ = decode_video(tmp_path / "link.mp4", take([1]))
    assert read_barcodes(frames) == [1]


def test_files_that_are_not_videos(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("This is not a video.\n" * 200)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(random.Random(0).randbytes(20_000))
    sound = write_audio(tmp_path / "sound.mp4")
    whole = write_clip(tmp_path / "whole.mp4", 30, options={"x264-params": "keyint=5"}, width=160, height=96)
    no_index = truncate(whole, tmp_path / "no_index.mp4")
    no_frames = write_clip(tmp_path / "no_frames.mkv", 0, with_audio=True)
    for path, reason in [
        (text, "is a text"),
        (empty, "is empty"),
        (noise, "not a video"),
        (sound, "no video stream, only audio"),
        (no_index, "not a video"),
        (no_frames, "not a single frame"),
    ]:
        with pytest.raises(VideoPandaDecodeError, match=rf"{path.name}.*({reason})"):
            decode_video(path, take([0]))
    with pytest.raises(VideoDecodeError, match="0 bytes in memory"):
        decode_video(b"", take([0]))


def test_a_file_cut_off_after_its_index(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", 30, container_options={"movflags": "faststart"}, width=160, height=96)
    decode_video(whole, take([29]))
    cut = truncate(whole, tmp_path / "cut.mp4", keep=0.8)
    with pytest.raises(VideoDecodeError, match=r"cut\.mp4.*cut off"):
        decode_video(cut, take([0]))


def test_data_damaged_in_the_middle(tmp_path):
    """What FFmpeg notices is an error. It does not notice everything: see "Damaged files" in docs/processor.md."""
    whole = write_clip(tmp_path / "whole.mp4", 30, options={"x264-params": "keyint=30"}, width=160, height=96)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    content = bytearray(whole.read_bytes())
    victim = packets[12]
    content[victim.pos : victim.pos + victim.size] = b"\xff" * victim.size
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(bytes(content))
    with pytest.raises(VideoDecodeError, match=r"broken\.mp4"):
        decode_video(broken, take(list(range(30))))


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_damage_lasts_until_the_next_key_frame(tmp_path, monkeypatch, kept_bytes):
    """FFmpeg flags the damaged picture alone; those predicted from it are just as wrong."""
    monkeypatch.setattr(stream_probe, "_MAX_KEPT_BYTES", kept_bytes)
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:b-adapt=0:ref=1"}
    source = write_clip(tmp_path / "whole.mkv", NUM_FRAMES, options=options, width=160, height=96)
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    victim = packets[11]  # the first one after the second key frame: a P-frame, shown as number 13
    content = bytearray(source.read_bytes())
    start = content.find(bytes(victim))
    content[start + victim.size // 3 : start + victim.size] = random.Random(0).randbytes(victim.size - victim.size // 3)
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(bytes(content))
    with av.open(str(broken)) as container:
        flagged = [index for index, frame in enumerate(container.decode(video=0)) if frame.is_corrupt]
    assert flagged, "FFmpeg notices this damage"
    assert set(flagged) < set(range(11, 20))

    def read(indices):
        with pyav_reading.VideoPandaPyavVideo(decoding.VideoPandaSource(str(broken), "broken.mkv")) as video:
            return video.read(indices, (96, 160))

    with av.open(str(broken)) as container:
        followed = stream_probe.follow_damage(container.decode(video=0))
        damaged = [index for index, (_, is_damaged) in enumerate(followed) if is_damaged]
    assert damaged == list(range(11, 20))
    assert read_barcodes(read([0, 10, 20, 39])) == [0, 10, 20, 39]
    for index in (11, 13, 16, 19):
        with pytest.raises(VideoDecodeError, match=rf"broken\.mkv: frame {index} is damaged"):
            read([0, index])


def test_endless_b_frames_are_not_all_waited_for():
    from types import SimpleNamespace

    kind = av.video.frame.PictureType
    frames = [SimpleNamespace(is_corrupt=False, key_frame=index == 0, pict_type=kind.B) for index in range(100)]
    taken = []
    followed = stream_probe.follow_damage(taken.append(frame) or frame for frame in frames)
    next(followed)
    assert len(taken) <= 17
    assert len(list(followed)) == 99


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm"])
def test_matroska_that_is_cut_off(clip, tmp_path, name):
    content = clip(name).read_bytes()
    assert containers.missing_matroska_bytes(content) == 0
    for keep in (0.5, 0.9):
        cut = truncate(clip(name), tmp_path / name, keep)
        with pytest.raises(
            VideoDecodeError, match=rf"{name}: is cut off: .* {len(content) - cut.stat().st_size} bytes"
        ):
            decode_video(cut, take([0]))
        with pytest.raises(VideoDecodeError, match="is cut off"):
            decode_video(cut.read_bytes(), take([0]))


def test_matroska_of_unknown_length(tmp_path):
    live = write_clip(tmp_path / "live.mkv", 20, container_options={"live": "1"}, width=160, height=96)
    assert containers.missing_matroska_bytes(str(live)) == 0
    assert read_barcodes(decode_video(live, take([19]))[0]) == [19]
    for head in (b"", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x00", b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01"):
        assert containers.missing_matroska_bytes(head) == 0


def test_playlists_open_nothing(tmp_path):
    secret = write_clip(tmp_path / "secret.mp4", 3)
    for name, content in {
        "list.mp4": f"ffconcat version 1.0\nfile {secret.name}\n",
        "list.mkv": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret.name}\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(VideoDecodeError, match="is a text"):
            decode_video(tmp_path / name, take([0]))
    assert not containers.looks_like_text(secret.read_bytes()[:4096])
    assert not containers.looks_like_text(b"")


LISTS = {
    "list.mp4": b"ffconcat version 1.0\n# \x01\nfile secret.mp4\n",
    "list.m3u8": b"#EXTM3U\n#\x01\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "%01d.dpx": b"SDPX" + bytes(100),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("with_pyav", [True, False])
def test_disguised_playlists_open_nothing(tmp_path, monkeypatch, name, with_pyav):
    """One byte that is no text, and a list of files passes for a clip: only its format tells."""
    write_clip(tmp_path / "secret.mp4", 3)
    write_clip(tmp_path / "secret.ts", 3, container_format="mpegts")
    (tmp_path / name).write_bytes(LISTS[name])
    assert not containers.looks_like_text(LISTS[name])
    if not with_pyav:
        monkeypatch.setattr(decoding, "av", None)
    with pytest.raises(VideoDecodeError, match=r"not a video|not of a format"):
        decode_video(tmp_path / name, take([0]))


def test_what_ffmpeg_may_open(clip, monkeypatch):
    """And not as options of the streams: with those, PyAV 15 and 16 end the process on MPEG-PS."""
    path, seen = clip("h264.ts"), []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: seen.append(kwargs) or original(*args, **kwargs))
    decode_video(path, take([0]))
    assert all(set(options) == {"container_options"} for options in seen)
    seen = [options["container_options"] for options in seen]
    formats = {name for options in seen for name in options["format_whitelist"].split(",")}
    assert {options["protocol_whitelist"] for options in seen} == {"file"}
    assert not formats & {"concat", "hls", "dash", "sdp", "rtsp", "image2", "imf", "vobsub", "mlv", "lavfi", "webvtt"}
    assert containers.is_indexed_container(clip("h264.mp4").read_bytes()[:64])
    assert not containers.is_indexed_container(clip("h264.ts").read_bytes()[:64])
    assert containers.is_known_clip(clip("vp9.webm").read_bytes()[:64])
    assert not containers.is_known_clip(b"\x1a\x45\xdf\xa3 <MPD ")


def test_decord_gets_only_its_own_containers(clip, monkeypatch):
    """Even if the probe took a transport stream for one that decord reads exactly."""
    original = pyav_reading.probe_stream

    def trusting(container):
        info = original(container)
        info.random_access_is_exact = True
        return info

    monkeypatch.setattr(pyav_reading, "probe_stream", trusting)
    assert decode_video(clip("h264.ts"), take([3]))[1].video_backend == "pyav"


def test_raw_pictures_with_a_line_of_text_in_front(tmp_path):
    path = write_clip(tmp_path / "raw.y4m", 5, codec="rawvideo", container_format="yuv4mpegpipe", width=160, height=96)
    assert read_barcodes(decode_video(path, take([0, 4]))[0]) == [0, 4]


def test_pictures_of_another_shape_are_read_again(clip, monkeypatch):
    monkeypatch.setattr(decoding, "_get_batch", lambda *args: torch.zeros(1, 160, 72, 4, dtype=torch.uint8))
    frames, metadata = decode_video(clip("h264.mp4"), take([7]))
    assert metadata.video_backend == "pyav"
    assert read_barcodes(frames) == [7]


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_the_best_of_several_streams_is_shown(tmp_path, monkeypatch, backend):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for width, height in ((160, 96), (320, 192)):
            streams.append(container.add_stream("libx264", rate=25))
            streams[-1].width, streams[-1].height, streams[-1].pix_fmt = width, height, "yuv420p"
        streams[0].disposition = 0
        streams[1].disposition = av.stream.Disposition.default.value
        for index in range(8):
            for stream, first in zip(streams, (500, 0)):
                picture = barcode_frame(first + index, stream.width, stream.height)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    if backend == "pyav":
        monkeypatch.setattr(decoding, "_import_decord", lambda: None)
    frames, metadata = decode_video(path, take([0, 7]))
    assert (metadata.width, metadata.height, metadata.video_backend) == (320, 192, backend)
    assert read_barcodes(frames) == [0, 7]


@pytest.mark.parametrize("indices", [[], [40], [-1], [0, 1000]])
def test_indices_out_of_range(clip, indices):
    with pytest.raises(ValueError, match=r"h264\.mp4.*0 to 39"):
        decode_video(clip("h264.mp4"), take(indices))


def test_what_choose_frames_is_told(clip):
    seen = []
    decode_video(clip("h264.mp4"), lambda metadata: seen.append(dict(metadata)) or [0])
    assert len(seen) == 1
    assert seen[0]["total_num_frames"] == NUM_FRAMES
    assert (seen[0]["fps"], seen[0]["width"], seen[0]["height"]) == (25.0, 160, 96)


def test_urls_are_fetched_only_where_allowed(clip, web):
    url = web(clip("h264.mp4").read_bytes())
    with pytest.raises(ValueError, match="allow_urls"):
        decode_video(url, take([0]))
    frames, _ = decode_video(url, take([4, 8]), allow_urls=True)
    assert read_barcodes(frames) == [4, 8]
    with pytest.raises(OSError, match="404"):
        decode_video(url + "/missing", take([0]), allow_urls=True)


def test_downloads_are_limited(web):
    from video_panda.processing.sources_video_panda import download

    url = web(b"x" * 5000)
    assert len(download(url, allow_urls=True)) == 5000
    with pytest.raises(ValueError, match="larger than the 4999 bytes"):
        download(url, allow_urls=True, max_bytes=4999)
    with pytest.raises(OSError, match="cannot fetch"):
        download(url + "/to-a-file", allow_urls=True)


def test_downloads_that_break_off(web):
    from video_panda.processing.sources_video_panda import download

    url = web(b"x" * 5000)
    for path in ("/half", "/chunk", "/nonsense", "/nothing", "/a b", "/\x01", "/é"):
        with pytest.raises(OSError, match="cannot fetch http://127.*" + path) as caught:
            download(url + path, allow_urls=True)
        assert path != "/half" or "2500 bytes before its end" in str(caught.value)
    for address in ("http://", "http://[::1", "http://127.0.0.1:port/x"):
        with pytest.raises(OSError, match="cannot fetch http"):
            download(address, allow_urls=True)
    with pytest.raises(OSError, match=r"cannot fetch .*within 0\.2 s"):
        download(url + "/slow", allow_urls=True, timeout_s=0.2)


@pytest.fixture
def web(monkeypatch):
    """A web server of one page; /missing is not there and /to-a-file redirects to file://."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    monkeypatch.setattr(sources, "is_public_address", lambda address: address == "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith("/to-a-file"):
                self.send_response(302)
                self.send_header("Location", "file:///dev/null")
                self.end_headers()
                return
            size = len(self.server.content)
            if self.path.endswith("/half"):
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                self.wfile.write(self.server.content[: size // 2])
                return
            if self.path.endswith("/chunk"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nabc")
                return
            if self.path.endswith("/slow"):
                self.send_response(200)
                self.end_headers()
                for _ in range(12):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
                return
            if self.path.endswith(("/nonsense", "/nothing")):
                self.wfile.write(b"NONSENSE\r\n\r\n" if self.path.endswith("/nonsense") else b"")
                return
            found = not self.path.endswith("/missing")
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(self.server.content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def serve(content):
        server.content = content
        return f"http://127.0.0.1:{server.server_port}/clip.mp4"

    yield serve
    server.shutdown()
    server.server_close()


def test_nothing_is_written_to_stderr(clip, tmp_path):
    """FFmpeg's own lines would drown a program's; what is wrong is in the exception."""
    broken = tmp_path / "broken.mp4"
    content = bytearray(clip("h264.mp4").read_bytes())
    with av.open(str(clip("h264.mp4"))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    content[packets[20].pos : packets[20].pos + packets[20].size] = b"\xff" * packets[20].size
    broken.write_bytes(bytes(content))
    code = (
        "import sys\n"
        "from video_panda.processing.video_decoding_video_panda import decode_video\n"
        "decode_video(sys.argv[1], lambda metadata: [0, 20])\n"
        "try:\n"
        "    decode_video(sys.argv[2], lambda metadata: list(range(40)))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(clip("h264.mp4")), str(broken)], capture_output=True, text=True, check=True
    )
    assert "broken.mp4" in done.stdout
    assert done.stderr == ""


def test_reading_from_a_file_object_is_not_needed(clip):
    """Only paths and bytes are sources: an open file could be anything."""
    with pytest.raises(ValueError, match="BytesIO"):
        decode_video(io.BytesIO(clip("h264.mp4").read_bytes()), take([0]))


def test_numpy_indices(clip):
    frames, metadata = decode_video(clip("h264.mp4"), lambda metadata: np.array([1, 2]))
    assert read_barcodes(frames) == [1, 2]
    assert metadata.frames_indices == [1, 2]
