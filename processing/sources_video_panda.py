"""Where pictures and clips come from: regular files, bytes in memory, and URLs where the caller allows them.

Everything a decoder or an image reader gets has passed through here, so that a string can never make one of them
open something else: FFmpeg would follow `concat:`, `subfile,,` and `http://` by itself.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import os
import socket
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_DOWNLOAD_BYTES = 2**30
DOWNLOAD_TIMEOUT_S = 120.0
SOCKET_TIMEOUT_S = 20.0
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")  # all that has been given out

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"})


def is_url(source) -> bool:
    """Whether a source is a string that begins with http:// or https://."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def describe_source(source) -> str:
    """How an error message calls a source: its path or URL, or how many bytes it has."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes in memory>"
    text = os.fspath(source) if isinstance(source, os.PathLike) else str(source)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"


def regular_file(
    source: str | os.PathLike, allowed_dirs: str | os.PathLike | Sequence[str | os.PathLike] | None = None
) -> str:
    """The real path of an existing regular file.

    Args:
        source: a path; symbolic links are followed.
        allowed_dirs: a folder, or several, in one of which the file must lie once links are followed; default:
            anywhere. An empty list allows nothing.

    Returns:
        The absolute path, in which no link is left.

    Raises:
        FileNotFoundError: nothing is there (a URL or an FFmpeg protocol string is just a missing file).
        IsADirectoryError: a directory is there.
        PermissionError: it is out of the allowed folders, whether or not anything is there.
        OSError: something else than a regular file is there (a pipe, a device).
        ValueError: it is no possible path.
    """
    if not os.fspath(source):
        raise FileNotFoundError("the path is empty, expected the path of a file")
    path = os.path.realpath(os.fspath(source))
    if allowed_dirs is not None:
        folders = [allowed_dirs] if isinstance(allowed_dirs, (str, os.PathLike)) else list(allowed_dirs)
        if not any(_lies_in(path, os.path.realpath(os.fspath(folder))) for folder in folders):
            raise PermissionError(f"outside the allowed folders: {describe_source(source)}")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {describe_source(source)}") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"expected a file, got a directory: {describe_source(source)}")
    if not stat.S_ISREG(mode):
        raise OSError(f"expected a regular file, got a pipe, socket or device: {describe_source(source)}")
    return path


def _lies_in(path: str | bytes, folder: str) -> bool:
    """Whether a real path lies in a real folder; by whole names, so that `/media2` is not in `/media`."""
    return os.path.commonpath([os.fsdecode(path), folder]) == folder


def download(
    url: str, *, allow_urls: bool, max_bytes: int = MAX_DOWNLOAD_BYTES, timeout_s: float = DOWNLOAD_TIMEOUT_S
) -> bytes:
    """Fetch a URL into memory, from a public address.

    Each address that a name stands for is looked at, and the connection then goes to one of those that were, so that the
    name cannot mean something else a moment later; likewise after every redirect. Proxies are not used, for nobody could
    tell where they connect to.

    Args:
        url: http:// or https:// address; redirects stay within these two.
        allow_urls: the caller's permission; a program that takes paths from strangers must not be made to fetch.
        max_bytes: give up beyond this size.
        timeout_s: give up beyond this time, seconds, from looking up the name to the last byte.

    Returns:
        The body.

    Raises:
        ValueError: not allowed, not such an address, or too large.
        OSError: it leads to an address that is not public, cannot be fetched, or not in time.
    """
    if not allow_urls:
        raise ValueError(f"{url} is a URL and URLs are off; pass allow_urls=True to have it fetched")
    if not is_url(url):
        raise ValueError(f"expected an http:// or https:// address, got {url!r}")
    chunks, size = [], 0
    try:
        with _VideoPandaDeadline(timeout_s) as deadline, _web_opener(deadline).open(url) as response:
            num_missing = response.length or 0
            while size + num_missing <= max_bytes and (chunk := response.read1(1 << 20)):
                deadline.check()
                chunks.append(chunk)
                size += len(chunk)
                num_missing = response.length or 0
            deadline.check()  # a connection that it has ended looks like the end of the body
    # ValueError: urllib's word for an address that is none
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = deadline.reason() or str(error) or type(error).__name__
        raise OSError(f"cannot fetch {url}: {reason}") from error
    if size + num_missing > max_bytes:
        raise ValueError(f"{url} is larger than the {max_bytes} bytes allowed")
    if num_missing:
        raise OSError(f"cannot fetch {url}: it broke off, {num_missing} bytes before its end")
    return b"".join(chunks)


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and so may be connected to.

    Loopback, private, link-local, shared, multicast and reserved addresses do not; nor do IPv6 addresses that stand for an
    IPv4 one (mapped, NAT64, 6to4, Teredo), whatever it is.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip.sixtofour or ip.teredo or ip not in _IPV6_UNICAST):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class _VideoPandaDeadline:
    """Ends the connections of a download when its time is over, whatever they wait for."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._connections: list[socket.socket] = []
        self._timer = threading.Timer(timeout_s, self._hang_up)
        self._timer.daemon = True

    def __enter__(self):
        self._timer.start()
        return self

    def __exit__(self, *exception) -> None:
        self._timer.cancel()
        self._timer.join()
        for connection in self._connections:
            connection.close()

    def seconds_left(self) -> float:
        """What is left of the time, never 0, which would mean "no limit" to a socket."""
        return max(0.001, self._end - time.monotonic())

    def reason(self) -> str:
        """Why it ended the download, or nothing."""
        return f"it did not arrive within {self.timeout_s:g} s" if time.monotonic() >= self._end else ""

    def check(self) -> None:
        """Raises: TimeoutError once the time is over."""
        if reason := self.reason():
            raise TimeoutError(reason)

    def watch(self, connection: socket.socket) -> None:
        """End this connection, too."""
        self._connections.append(connection.dup())  # TLS takes the socket itself away

    def _hang_up(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)


def _connect(host: str, port: int, deadline: _VideoPandaDeadline) -> socket.socket:
    """A connection to a host, all of whose addresses are public."""
    addresses = _look_up(host, port, deadline)
    for *_, (address, *_) in addresses:
        if not is_public_address(address):
            raise PermissionError(f"{host} is at {address}, which is not a public address")
    problem = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in addresses:
        connection = socket.socket(family, kind, protocol)
        try:
            deadline.watch(connection)
            connection.settimeout(min(SOCKET_TIMEOUT_S, deadline.seconds_left()))
            connection.connect(address)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    raise problem


def _look_up(host: str, port: int, deadline: _VideoPandaDeadline) -> list[tuple]:
    """The addresses of a host, as `socket.getaddrinfo` gives them, which itself knows no limit of time."""
    found: list = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(deadline.seconds_left())
    if not found:
        raise TimeoutError(f"{host} was not looked up in time")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _web_opener(deadline: _VideoPandaDeadline) -> urllib.request.OpenerDirector:
    """An opener that knows http and https only, without proxies: urllib's own would also open ftp:// and file://."""

    class Connection(http.client.HTTPConnection):
        def connect(self):
            self.sock = _connect(self.host, self.port, deadline)

    class SecureConnection(http.client.HTTPSConnection, Connection):
        """TLS over what `Connection.connect` opens: that is the order in which Python looks for it."""

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(Connection, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(SecureConnection, request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        Handler(),
        SecureHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def is_image_file_name(source) -> bool:
    """Whether a path or URL ends like a still picture. GIF does not count: it is read as a video."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    name = os.fspath(source)
    if is_url(name):
        name = name.split("?", 1)[0].split("#", 1)[0]
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def load_rgb_image(
    source,
    *,
    allow_urls: bool = False,
    convert_rgb: bool = True,
    allowed_dirs: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
) -> torch.Tensor:
    """A still picture as pixels, upright and in RGB.

    Args:
        source: a PIL image; a path; the bytes of an image file; a `data:image/...;base64,` string or plain base64;
            or, where allowed, a URL.
        allow_urls: whether URLs may be fetched.
        convert_rgb: turn grayscale, palette, CMYK and transparent pictures into RGB; if not, they are refused.
        allowed_dirs: folders out of which no path may lead, as in `regular_file`.

    Returns:
        uint8 tensor (3, H, W), the EXIF orientation applied.

    Raises:
        ValueError: not a readable picture, or not RGB where `convert_rgb` is off.
        OSError: the file is missing or not a regular file, or the URL cannot be fetched.
    """
    image = source if isinstance(source, Image.Image) else _open_image(source, allow_urls, allowed_dirs)
    name = "<PIL image>" if image is source else describe_source(source)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode != "RGB" and not convert_rgb:
            raise ValueError(f"{name}: mode {image.mode!r}, expected 'RGB' (or do_convert_rgb=True)")
        if image.mode == "F":
            raise ValueError(f"{name}: mode 'F' (floats of any size), expected whole numbers or an array in [0, 1]")
        if image.mode.startswith("I"):
            # PIL clips 16-bit gray at 255, which would turn nearly all of it white.
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: the picture cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open_image(source, allow_urls: bool, allowed_dirs=None) -> Image.Image:
    name = describe_source(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
    elif is_url(source):
        content = download(source, allow_urls=allow_urls)
    elif isinstance(source, str) and source.startswith("data:image/"):
        content = _decode_base64(source.partition(",")[2], name)
    elif isinstance(source, (str, os.PathLike)):
        try:
            content = Path(regular_file(source, allowed_dirs)).read_bytes()
        except (OSError, ValueError):
            # A long string that is no path may be the picture itself in base64.
            if not isinstance(source, str) or len(source) < 64:
                raise
            try:
                content = _decode_base64(source, name)
            except ValueError:
                content = None
            if content is None:
                raise
    else:
        raise ValueError(f"expected a PIL image, path, bytes, base64 text or URL, got {type(source).__name__}")
    if not content:
        raise ValueError(f"{name}: the picture is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # its message tells of a file object that the caller has never seen
        raise ValueError(f"{name}: not a picture that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a picture that can be read: {error}") from error


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: not valid base64: {error}") from error
