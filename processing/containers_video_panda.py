"""Which files may reach FFmpeg at all, judged by their container and first bytes.

FFmpeg finds out by itself what a file is, and some of what it knows are lists that name other files and addresses
(ffconcat, HLS, DASH, SDP, numbered pictures). A file could pass for a clip and show what lies beside it. So the formats
are listed that hold all they need themselves, and nothing else is opened.
"""

import os

# FFmpeg's names of self-contained formats. Never to be added: concat, hls, dash, sdp, image2, imf, vobsub, mlv, lavfi.
SELF_CONTAINED_FORMATS = (
    # containers
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "kux", "asf"),
    *("asf_o", "ogg", "ivf", "mxf", "gxf", "dv", "wtv", "rm", "nut", "nsv", "nuv", "pva", "ty", "yuv4mpegpipe"),
    # bare streams
    *("h261", "h263", "h264", "hevc", "vvc", "evc", "av1", "obu", "m4v", "mpegvideo", "vc1", "vc1test", "dirac"),
    *("cavsvideo", "avs2", "avs3", "mjpeg", "mjpeg_2000", "dnxhd", "apv"),
    # animations and single pictures, from one file
    *("gif", "apng", "webp", "jpegxl_anim", "flic", "gif_pipe", "png_pipe", "jpeg_pipe", "jpegxl_pipe", "webp_pipe"),
    *("bmp_pipe", "tiff_pipe", "j2k_pipe"),
    # sound: so that the message says "no video stream"
    *("mp3", "wav", "flac", "aac", "aiff", "ac3", "eac3", "amr", "caf", "w64"),
)

_EBML = b"\x1a\x45\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"
_MP4_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"uuid"})
_ASF = bytes.fromhex("3026b2758e66cf11")
_BARE_STARTS = (b"\x00\x00\x01", b"\x00\x00\x00\x01")  # MPEG-PS and bare MPEG, H.264 and HEVC streams


def read_head(source: str | bytes, num_bytes: int = 4096) -> bytes:
    """The first bytes of a file or of bytes in memory."""
    if isinstance(source, bytes):
        return source[:num_bytes]
    with open(os.fspath(source), "rb") as file:
        return file.read(num_bytes)


def looks_like_text(head: bytes) -> bool:
    """Whether a file's first bytes are plain text, which no clip is; for the message alone, the whitelist guards.

    Args:
        head: the first bytes of the file, up to a few thousand.
    """
    if head.startswith(b"YUV4MPEG2 "):  # a line of text, then raw pictures
        return False
    if any(byte < 32 and byte not in b"\t\r\n\f" for byte in head):
        return False
    try:
        # a character cut at the end does not make it binary
        head[: max(0, len(head) - 3)].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(head)


def is_indexed_container(head: bytes) -> bool:
    """Whether a file begins as MP4, MOV, Matroska or WebM do: those in which decord's random access is trusted."""
    return head.startswith(_EBML) or (head[:1] in (b"\x00", b"") and head[4:8] in _MP4_BOXES)


def is_known_clip(head: bytes) -> bool:
    """Whether a file begins as a self-contained clip does that decord may open without PyAV's whitelist."""
    if b"<mpd" in head.lower():  # a DASH list may hide behind another beginning
        return False
    return (
        is_indexed_container(head)
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or head.startswith((b"FLV\x01", b"GIF87a", b"GIF89a", b"OggS", b"DKIF", _ASF, *_BARE_STARTS))
    )


def missing_matroska_bytes(source: str | bytes) -> int:
    """How many bytes a Matroska or WebM file lacks of the length that its segment states.

    Such a file opens well when it is cut off, and simply ends early: its index gives no number of frames.

    Args:
        source: the path of the file, or its bytes.

    Returns:
        The number; 0 for a whole file, for one of unknown length (written live), and for every other format.
    """
    head = read_head(source)
    if not head.startswith(_EBML):
        return 0
    content, after = _ebml_length(head, len(_EBML))
    segment = after + (content or 0)
    if content is None or head[segment : segment + 4] != _MATROSKA_SEGMENT:
        return 0
    content, after = _ebml_length(head, segment + 4)
    if content is None:
        return 0
    present = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    return max(0, after + content - present)


def _ebml_length(head: bytes, position: int) -> tuple[int | None, int]:
    """(length, where the content begins) of the element whose length field stands here; None: unknown or cut."""
    if position >= len(head) or head[position] == 0:
        return None, position
    num_bytes = 9 - head[position].bit_length()
    field = head[position : position + num_bytes]
    largest = (1 << (7 * num_bytes)) - 1
    length = int.from_bytes(field, "big") & largest
    known = len(field) == num_bytes and length != largest
    return (length if known else None), position + num_bytes
