"""Files that are not what they say: cut, flipped, zeroed, forged and disguised, to be read without harm.

`hostile_files` writes more than a thousand, made the same way each time. The forged ones are aimed at decoders: tables that announce
thousands of millions of samples in 4 KB, frames of gigapixels, boxes inside boxes. Used by
`tests/processing/test_hostile_files.py` (some) and `benchmarks/reliability.py` (all).
"""

from __future__ import annotations

import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from clips import write_audio, write_clip

NUM_FRAMES = 16
TWO_THOUSAND_MILLION = 2_000_000_000

_BASES = {
    "h264.mp4": {"options": {"g": "8"}},
    "faststart.mp4": {"options": {"g": "8"}, "container_options": {"movflags": "faststart"}, "with_audio": True},
    "fragments.mp4": {"options": {"g": "8"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=8:log-level=none"}, "width": 96, "height": 64},
    "h264.mkv": {"options": {"g": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "8", "cpu-used": "8"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "8", "bf": "2"}},
    "h264.ts": {"options": {"g": "8"}, "container_format": "mpegts"},
    "flv1.flv": {"codec": "flv"},
    "gif.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}
_MAGICS = {
    "mp4": b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2",
    "ebml": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm",
    "avi": b"RIFF\xff\xff\xff\x7fAVI LIST",
    "flv": b"FLV\x01\x05\x00\x00\x00\x09\x00\x00\x00\x00",
    "gif": b"GIF89a\xff\xff\xff\xff\xf7\x00\x00",
    "ogg": b"OggS\x00\x02" + bytes(20),
    "asf": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    "mpegps": b"\x00\x00\x01\xba\x44\x00\x04\x00\x04\x01",
    "annexb": b"\x00\x00\x00\x01\x67\x42\x00\x1e",
    "ivf": b"DKIF\x00\x00\x20\x00VP90\xff\xff\xff\xff",
    "y4m": b"YUV4MPEG2 W64 H48 F25:1 Ip C420\nFRAME\n",
    "ts": (b"\x47\x40\x00\x10" + bytes(184)) * 2,
}


def hostile_files(folder: Path, every: int = 1) -> Iterator[tuple[str, Path]]:
    """Write the files one by one.

    Args:
        folder: an empty folder.
        every: only every so-many-th of each kind; the first of each is always there.

    Yields:
        (kind, path).
    """
    (folder / "bases").mkdir()
    contents = {name: base_clip(folder / "bases", name).read_bytes() for name in _BASES}
    kinds: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
        "truncated": lambda: _truncated(contents),
        "bits flipped": lambda: _flipped(contents),
        "zeroed": lambda: _zeroed(contents),
        "forged table": lambda: _forged_tables(contents),
        "forged box": lambda: _forged_boxes(contents["faststart.mp4"]),
        "forged size": lambda: _forged_sizes(contents),
        "spliced": lambda: _spliced(contents),
        "noise": _noise,
        "playlist or text": _texts,
    }
    for kind, make in kinds.items():
        for number, (name, content) in enumerate(make()):
            if number % every == 0:
                path = folder / f"{kind.replace(' ', '_')}-{number}-{name}"
                path.write_bytes(content)
                yield kind, path
    yield from _special(folder, with_large=every == 1)


def base_clip(folder: Path, name: str) -> Path:
    """Write one of the good clips that the others are made of."""
    kwargs = dict(_BASES[name])
    options = {"fflags": "+bitexact", **kwargs.pop("container_options", {})}
    return write_clip(folder / name, NUM_FRAMES, container_options=options, **kwargs)


def _truncated(contents: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for name, content in contents.items():
        for part in range(20):
            yield name, content[: 1 + part * len(content) // 20]
        for missing in (1, 2, 7, 40):
            yield name, content[:-missing]


def _flipped(contents: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for name, content in contents.items():
        chance = random.Random(f"flip {name}")
        for number in range(28):
            damaged = bytearray(content)
            end = min(1500, len(content)) if number % 2 else len(content)
            for _ in range(1 + number % 5):
                damaged[chance.randrange(end)] ^= 1 << chance.randrange(8)
            yield name, bytes(damaged)


def _zeroed(contents: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for name, content in contents.items():
        chance = random.Random(f"zero {name}")
        for number in range(16):
            size = (16, 64, 256, 1024)[number % 4]
            start = chance.randrange(len(content))
            yield name, content[:start] + bytes(min(size, len(content) - start)) + content[start + size :]


# ------------------------------------------------------------------------------------------------------ forged MP4


def box(kind: bytes, *contents: bytes) -> bytes:
    """A box of an MP4 file."""
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def full_box(kind: bytes, *contents: bytes) -> bytes:
    """A box with a version and flags of 0."""
    return box(kind, bytes(4), *contents)


def forged_mp4(
    num_samples: int = TWO_THOUSAND_MILLION,
    tables: dict[bytes, bytes] | None = None,
    width: int = 64,
    height: int = 48,
    handler: bytes = b"vide",
    extradata: bytes = b"",
    content: bytes = b"",
) -> bytes:
    """An MP4 file of some 4 KB whose sample table says whatever it is told to say.

    Args:
        num_samples: how many samples it announces, all of one byte.
        tables: tables that replace its own, by name; the content behind version and flags.
        width, height: what the headers announce, px.
        handler: the kind of its track.
        extradata: boxes behind the entry of the codec, such as avcC.
        content: what lies in its `mdat`; 3 KB of zeros unless given.
    """
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    entry = bytes(6) + struct.pack(">H", 1) + bytes(16)
    entry += struct.pack(">HHIIIH", width & 0xFFFF, height & 0xFFFF, 72 << 16, 72 << 16, 0, 1)
    entry += bytes(32) + struct.pack(">Hh", 24, -1) + extradata
    own = {
        b"stsd": struct.pack(">I", 1) + box(b"avc1" if extradata else b"mp4v", entry),
        b"stts": struct.pack(">III", 1, num_samples, 1),
        b"stsc": struct.pack(">IIII", 1, 1, num_samples, 1),
        b"stsz": struct.pack(">II", 1, num_samples),
        b"stco": struct.pack(">II", 1, 900),
        **(tables or {}),
    }
    stbl = box(b"stbl", *(full_box(kind, table) for kind, table in own.items()))
    dinf = box(b"dinf", full_box(b"dref", struct.pack(">I", 1), box(b"url ", b"\x00\x00\x00\x01")))
    minf = box(b"minf", full_box(b"vmhd", bytes(8)), dinf, stbl)
    times = struct.pack(">IIII", 0, 0, 25, min(num_samples, 2**32 - 1))
    mdia = box(
        b"mdia",
        full_box(b"mdhd", times, bytes(4)),
        full_box(b"hdlr", bytes(4), handler, bytes(12), b"forged\0"),
        minf,
    )
    track_id = struct.pack(">IIIII", 0, 0, 1, 0, 1000)
    tkhd = full_box(
        b"tkhd", track_id, bytes(16), matrix, struct.pack(">II", width << 16 & 0xFFFFFFFF, height << 16 & 0xFFFFFFFF)
    )
    mvhd = full_box(b"mvhd", struct.pack(">IIII", 0, 0, 25, 1000), bytes(16), matrix, bytes(24), struct.pack(">I", 2))
    moov = box(b"moov", mvhd, box(b"trak", tkhd, mdia))
    return box(b"ftyp", b"isom\x00\x00\x02\x00isommp41") + moov + box(b"mdat", content or bytes(3072))


def announce_samples(content: bytes, num_samples: int, sample_bytes: int = 100) -> bytes:
    """An MP4 file whose tables announce so many samples of one size. HEVC then aborts the process in decord."""
    forged = bytearray(content)
    at = content.find(b"stsz") + 8
    forged[at : at + 8] = struct.pack(">II", sample_bytes, num_samples)
    at = content.find(b"stts") + 12
    forged[at : at + 4] = struct.pack(">I", num_samples)
    return bytes(forged)


def _forged_tables(contents: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    counts = (TWO_THOUSAND_MILLION, 2**32 - 1, 2**31, 170_000_000, 50_000_000, 11_000_000)
    for count in counts:
        many, few = struct.pack(">I", count), struct.pack(">I", 4)
        yield f"samples{count}.mp4", forged_mp4(count)
        yield f"sound{count}.mp4", forged_mp4(count, handler=b"soun")
        yield f"list{count}.mp4", forged_mp4(4, {b"stsz": bytes(4) + many + struct.pack(">4I", 9, 9, 9, 9)})
        yield f"empty{count}.mp4", forged_mp4(count, {b"stsz": struct.pack(">II", 0, count)})
        for table in (b"stts", b"ctts", b"stsc", b"stco", b"stss", b"stps", b"sbgp", b"sdtp", b"stsd", b"cslg"):
            yield f"{table.decode()}{count}.mp4", forged_mp4(4, {table: many + few * 6})
        yield f"runs{count}.mp4", forged_mp4(4, {b"ctts": struct.pack(">I", 1) + many + few})
        yield f"times{count}.mp4", forged_mp4(4, {b"stts": struct.pack(">I", 1) + many + few})
        yield f"co64{count}.mp4", forged_mp4(4, {b"co64": many + bytes(16)})
        yield f"far{count}.mp4", forged_mp4(4, {b"stco": struct.pack(">I", 1) + many})
        yield f"chunks{count}.mp4", forged_mp4(4, {b"stsc": struct.pack(">IIII", 1, 1, count, 1)})
    for name in ("hevc.mp4", "h264.mp4", "mjpeg.mov"):
        for count in counts:
            for size in (1, 100, 2**31):
                yield f"announced{count}x{size}-{name}", announce_samples(contents[name], count, size)
    # The tables of a good clip, with another number in them.
    for name in ("h264.mp4", "faststart.mp4", "hevc.mp4", "mjpeg.mov"):
        for table, offset in ((b"stsz", 8), (b"stts", 8), (b"stsc", 4), (b"stco", 4), (b"ctts", 8), (b"elst", 4)):
            start = contents[name].find(table)
            for count in (0, 1, 70_000, TWO_THOUSAND_MILLION) if start > 0 else ():
                forged = bytearray(contents[name])
                forged[start + 4 + offset : start + 8 + offset] = struct.pack(">I", count)
                yield f"{table.decode()}{count}-{name}", bytes(forged)


def _boxes(content: bytes, start: int = 0, end: int | None = None) -> Iterator[int]:
    """Where the boxes of an MP4 file begin, those inside others as well."""
    end = len(content) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", content[start : start + 8])
        yield start
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"edts", b"udta"):
            yield from _boxes(content, start + 8, start + size)
        if size < 8:
            return
        start += size


def _forged_boxes(content: bytes) -> Iterator[tuple[str, bytes]]:
    for start in _boxes(content):
        kind = content[start + 4 : start + 8].decode("latin-1")
        for size in (0, 1, 7, 0x7FFFFFFF, 0xFFFFFFFF):
            yield f"{kind}-{size}.mp4", content[:start] + struct.pack(">I", size) + content[start + 4 :]
        yield f"{kind}-none.mp4", content[: start + 4] + b"none" + content[start + 8 :]
    nested = b""
    for kind in (b"moov", b"trak", b"udta", b"meta"):
        nested = bytes(8)
        for _ in range(3000):
            nested = box(kind, nested)
        yield f"nested-{kind.decode()}.mp4", box(b"ftyp", b"isom\0\0\2\0isom") + nested
    yield "tracks.mp4", box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", box(b"trak", box(b"mdia")) * 5000)


def _forged_sizes(contents: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for width, height in ((16384, 8192), (65535, 65535), (32767, 32767), (0, 0), (1, 65535)):
        sizes = struct.pack(">HH", width, height)
        yield f"mp4v-{width}x{height}.mp4", forged_mp4(16, width=width, height=height)
        # JPEG: the frame header (SOF0) behind precision; GIF: the logical screen; PNG: IHDR.
        mjpeg = contents["mjpeg.mov"]
        at = mjpeg.find(b"\xff\xc0") + 5
        yield f"jpeg-{width}x{height}.mov", mjpeg[:at] + sizes[2:] + sizes[:2] + mjpeg[at + 4 :]
        gif = contents["gif.gif"]
        yield f"gif-{width}x{height}.gif", gif[:6] + struct.pack("<HH", width, height) + gif[10:]
        header = struct.pack(">II", width, height) + b"\x08\x06\x00\x00\x00"
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        pixels = zlib.compress(bytes(100_000))
        data = struct.pack(">I", len(pixels)) + b"IDAT" + pixels + struct.pack(">I", zlib.crc32(b"IDAT" + pixels))
        yield f"png-{width}x{height}.mp4", b"\x89PNG\r\n\x1a\n" + chunk + data
        line = f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420\nFRAME\n".encode()
        yield f"y4m-{width}x{height}.y4m", line + bytes(4096)
        mkv = contents["h264.mkv"]
        at = mkv.find(b"\xb0\x81\x40\xba\x81\x30")  # PixelWidth 64, PixelHeight 48, of one byte each
        wide = b"\xb0\x82" + sizes[:2] + b"\xba\x80"
        yield f"mkv-{width}x{height}.mkv", mkv[:at] + wide + mkv[at + 6 :]
        avi = bytearray(contents["mpeg4.avi"])
        at = avi.find(b"strf") + 12
        avi[at : at + 8] = struct.pack("<II", width, height)
        yield f"avi-{width}x{height}.avi", bytes(avi)
        ivf = b"DKIF\0\0\x20\0VP90" + struct.pack("<HHIII", width, height, 25, 1, TWO_THOUSAND_MILLION) + bytes(4)
        yield f"ivf-{width}x{height}.ivf", ivf + struct.pack("<IQ", 2**31 - 1, 0) + bytes(500)
    rates = ((0, 0), (0, 1), (1, 0), (2**31 - 1, 1))
    for rate, scale in rates:
        avi = bytearray(contents["mpeg4.avi"])
        at = avi.find(b"strh") + 8 + 20
        avi[at : at + 8] = struct.pack("<II", scale, rate)
        yield f"rate-{rate}-{scale}.avi", bytes(avi)


def _spliced(contents: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for name, content in contents.items():
        for other, tail in contents.items():
            if other != name:
                yield f"{other}-{name}", content[: len(content) // 2] + tail[len(tail) // 2 :]


def _noise() -> Iterator[tuple[str, bytes]]:
    for magic, head in _MAGICS.items():
        chance = random.Random(f"noise {magic}")
        for size in (0, 3, 50, 600, 5000, 60_000):
            yield f"{magic}.mp4", head + chance.randbytes(size)
    for size in (1, 2, 4, 8, 9, 64, 4096):
        yield "random.mp4", random.Random(size).randbytes(size)
        yield "zeros.mp4", bytes(size)
        yield "ones.mkv", b"\xff" * size


def _texts() -> Iterator[tuple[str, bytes]]:
    yield "empty.mp4", b""
    texts = {
        "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "remote.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": b"ffconcat version 1.0\nfile bases/h264.mp4\n",
        "list.mpd": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
        "session.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "list.imf": b'<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
        "page.html": b"<html><body>404</body></html>",
        "data.json": b'{"error": "not found"}',
        "words.mp4": b"This is not a video.\n" * 500,
        "sub.srt": b"1\n00:00:00,000 --> 00:00:01,000\nwords\n",
        "sub.idx": b"# VobSub index file, v7\nsize: 64x48\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 0\n",
        "script.py": b"raise SystemExit(3)\n",
        "meta.ffmeta": b";FFMETADATA1\ntitle=x\n",
        "utf16.mp4": "not a video".encode("utf-16"),
        "list.asx": b'<asx version="3.0"><entry><ref href="file:///etc/passwd"/></entry></asx>',
        "list.pls": b"[playlist]\nFile1=/etc/passwd\n",
    }
    for name, content in texts.items():
        yield name, content
        yield f"nul-{name}", content + b"\0"
        yield f"bin-{name}", content[:20] + b"\n#\x01\n" + content[20:]
    for name, head in (("zip", b"PK\3\4"), ("elf", b"\x7fELF"), ("pdf", b"%PDF-1.7\n"), ("gz", b"\x1f\x8b\x08")):
        yield f"{name}.mp4", head + random.Random(name).randbytes(3000)


def _special(folder: Path, with_large: bool) -> Iterator[tuple[str, Path]]:
    """What is no regular file, and what has no pictures."""
    yield "sound only", write_audio(folder / "sound.mp4")
    yield "sound only", write_clip(folder / "no_frames.mkv", 0, with_audio=True)
    if with_large:  # a good clip, if a large one
        name = folder / "16k.mov"
        yield "too large", write_clip(name, 1, width=16384, height=8192, codec="mjpeg", pix_fmt="yuvj420p")
    os.mkfifo(folder / "fifo.mp4")
    yield "no regular file", folder / "fifo.mp4"
    (folder / "folder.mp4").mkdir()
    yield "no regular file", folder / "folder.mp4"
    links = {"loop.mp4": "loop.mp4", "loop1.mp4": "loop2.mp4", "loop2.mp4": "loop1.mp4", "dangling.mp4": "nothing.mp4"}
    for name, target in {
        **links,
        "null.mp4": "/dev/null",
        "zero.mp4": "/dev/zero",
        "urandom.mp4": "/dev/urandom",
    }.items():
        (folder / name).symlink_to(target)
        yield "no regular file", folder / name
    yield "no regular file", folder / "missing.mp4"
    yield "no regular file", folder / ("n" * 300)
    yield "no regular file", folder / "fifo.mp4" / "below.mp4"
    for name in ("/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/fd", "/"):
        yield "no regular file", Path(name)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket may not be long
        try:
            server.bind("socket.mp4")
        finally:
            os.chdir(here)
    yield "no regular file", folder / "socket.mp4"
