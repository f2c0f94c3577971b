"""Paths and URLs of strangers: what may be opened, where connections may go, and that nothing else happens."""

import base64
import builtins
import io
import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from clips import read_barcodes, write_clip
from PIL import Image

from video_panda.processing import sources_video_panda as sources
from video_panda.processing.image_processing_video_panda import VideoPandaImageProcessor
from video_panda.processing.sources_video_panda import download, is_public_address, load_rgb_image, regular_file
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, decode_video
from video_panda.processing.video_processing_video_panda import VideoPandaVideoProcessor

PUBLIC = "93.184.216.34"


# -------------------------------------------------------------------------------------------------- allowed folders


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder that is allowed, and one beside it that is not, with every kind of way from one to the other."""
    root = tmp_path_factory.mktemp("tree")
    media, secret = root / "media", root / "secret"
    for folder in (media / "inner", secret, root / "media2", root / "Media"):
        folder.mkdir(parents=True)
    clip = write_clip(media / "clip.mp4", 3).read_bytes()
    for place in (media / "inner", secret, root / "media2", root / "Media"):
        (place / "clip.mp4").write_bytes(clip)
    Image.new("RGB", (8, 8)).save(media / "photo.png")
    Image.new("RGB", (8, 8)).save(secret / "photo.png")
    (media / "concat:clip.mp4|clip.mp4").write_bytes(clip)
    links = {
        media / "to_file.mp4": secret / "clip.mp4",
        media / "to_folder": secret,
        media / "up": root,
        media / "relative.mp4": "../secret/clip.mp4",
        media / "chain1.mp4": "chain2.mp4",
        media / "chain2.mp4": "to_file.mp4",
        media / "loop.mp4": "loop.mp4",
        media / "loop_a": "loop_b",
        media / "loop_b": "loop_a",
        media / "inner" / "back.mp4": "../clip.mp4",
        media / "proc": "/proc/self",
        media / "null": "/dev/null",
        media / "zero.mp4": "/dev/zero",
        media / "dangling.mp4": "not_there.mp4",
        media / "dangling_out.mp4": "../secret/not_there.mp4",
        root / "link_to_media": media,
    }
    for link, target in links.items():
        link.symlink_to(target)
    return root


# {root} stands for the folder around the allowed one.
OUTSIDE = [
    "{root}/secret/clip.mp4",
    "{root}/media/../secret/clip.mp4",
    "{root}/media/inner/../../secret/clip.mp4",
    "{root}/media/./../secret/./clip.mp4",
    "{root}/media//..//secret//clip.mp4",
    "{root}/media2/clip.mp4",
    "{root}/Media/clip.mp4",
    "{root}/media/to_file.mp4",
    "{root}/media/to_folder/clip.mp4",
    "{root}/media/up/secret/clip.mp4",
    "{root}/media/relative.mp4",
    "{root}/media/chain1.mp4",
    "{root}/media/up/media/up/secret/clip.mp4",
    "{root}/media/to_folder/../secret/clip.mp4",
    "{root}/media/proc/root{root}/secret/clip.mp4",
    "{root}/media/proc/cwd/../secret/clip.mp4",
    "{root}/media/proc/environ",
    "{root}/media/null",
    "{root}/media/zero.mp4",
    "{root}/media/dangling_out.mp4",
    "{root}/secret/not_there.mp4",
    "{root}/secret",
    "{root}",
    "/",
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/self/mem",
    "/proc/self/root/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/dev/fd/0",
    "../secret/clip.mp4",
    "./../secret/clip.mp4",
    "inner/../../secret/clip.mp4",
    "to_file.mp4",
    "up/secret/clip.mp4",
    "~/../../etc/passwd",
    "concat:../secret/clip.mp4|../secret/clip.mp4",
    "concat:{root}/secret/clip.mp4",
    "subfile,,start,0,end,0,,:{root}/secret/clip.mp4",
    "file:{root}/secret/clip.mp4",
    "file://{root}/secret/clip.mp4",
    "FILE://{root}/secret/clip.mp4",
    "crypto:{root}/secret/clip.mp4",
    "async:cache:{root}/secret/clip.mp4",
    "data:video/mp4;base64,AAAA",
    "pipe:0",
    "fd:0",
    "tcp://127.0.0.1:9",
    "udp://127.0.0.1:9",
    "rtsp://127.0.0.1:9/clip",
    "rtmp://127.0.0.1:9/clip",
    "ftp://127.0.0.1/clip.mp4",
    "sftp://127.0.0.1/clip.mp4",
    "gopher://127.0.0.1/clip.mp4",
    "tls://127.0.0.1:9",
    "hls+http://127.0.0.1:9/list.m3u8",
    "unix:/run/socket",
    "http://127.0.0.1:9/clip.mp4",
    "HTTP://127.0.0.1:9/clip.mp4",
    "https://127.0.0.1:9/clip.mp4",
    "clip.mp4\0.png",
    "",
    "loop.mp4",
    "loop_a/clip.mp4",
]
INSIDE = [
    "{root}/media/clip.mp4",
    "{root}/media/inner/clip.mp4",
    "{root}/media/inner/../clip.mp4",
    "{root}/media/inner/back.mp4",
    "{root}/link_to_media/clip.mp4",
    "{root}/secret/../media/clip.mp4",
    "{root}/media/up/media/clip.mp4",
    "clip.mp4",
    "./inner/clip.mp4",
    "concat:clip.mp4|clip.mp4",
]


@pytest.fixture
def watched(tree, monkeypatch):
    """What is opened and connected to meanwhile, the way Python does it; decoders get only paths that were opened."""
    seen = {"opened": [], "connected": []}
    original = builtins.open

    def watch_open(file, *args, **kwargs):
        seen["opened"].append(os.path.realpath(file) if isinstance(file, (str, os.PathLike)) else str(file))
        return original(file, *args, **kwargs)

    def refuse(self, address):
        seen["connected"].append(address)
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(builtins, "open", watch_open)
    monkeypatch.setattr(io, "open", watch_open)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tree / "media")
    return seen


def test_nothing_outside_the_allowed_folders_is_opened(tree, watched):
    assert len(OUTSIDE) + len(INSIDE) >= 50
    for pattern in OUTSIDE:
        path = pattern.replace("{root}", str(tree))
        with pytest.raises(VideoDecodeError):
            decode_video(path, lambda metadata: [0], allowed_dirs=[tree / "media"])
        with pytest.raises((OSError, ValueError)):
            load_rgb_image(path, allowed_dirs=str(tree / "media"))
    with pytest.raises((OSError, ValueError)):
        load_rgb_image(str(tree / "secret" / "photo.png"), allowed_dirs=str(tree / "media"))
    assert watched == {"opened": [], "connected": []}


def test_what_lies_inside_is_read(tree, watched):
    for pattern in INSIDE:
        for path in (pattern.replace("{root}", str(tree)), Path(pattern.replace("{root}", str(tree)))):
            frames, _ = decode_video(path, lambda metadata: [1], allowed_dirs=[tree / "secret", tree / "media"])
            assert read_barcodes(frames) == [1]
    assert load_rgb_image("photo.png", allowed_dirs=tree / "link_to_media").shape == (3, 8, 8)
    assert watched["connected"] == []
    assert all(path.startswith(str(tree / "media")) for path in watched["opened"])


def test_the_processors_confine_paths_as_well(tree, watched):
    photo, clip = str(tree / "secret" / "photo.png"), str(tree / "secret" / "clip.mp4")
    inside = [str(tree / "media" / name) for name in ("clip.mp4", "photo.png")]
    for options, call in (({"allowed_dirs": tree / "media"}, {}), ({}, {"allowed_dirs": [str(tree / "media")]})):
        of_videos, of_images = VideoPandaVideoProcessor(**options), VideoPandaImageProcessor(**options)
        for video in (clip, [photo, photo]):
            with pytest.raises(PermissionError, match="outside the allowed folders"):
                of_videos(video, **call)
        with pytest.raises(PermissionError, match="outside the allowed folders"):
            of_images([photo], **call)
        assert watched["opened"] == []
        assert of_videos(inside[0], **call)["video_grid_thw"].shape == (1, 3)
        assert of_images(inside[1], **call)["image_grid_thw"].shape == (1, 3)
        watched["opened"].clear()


@pytest.mark.parametrize("kind", [VideoPandaVideoProcessor, VideoPandaImageProcessor])
def test_a_checkpoint_has_no_say_in_what_may_be_opened(kind, tmp_path):
    own = kind(allow_urls=True, allowed_dirs=["/media"])
    own.save_pretrained(tmp_path)
    written = next(tmp_path.glob("*.json"))
    assert not {"allow_urls", "allowed_dirs", "isolate"} & set(json.loads(written.read_text()))
    hostile = {**json.loads(written.read_text()), "allow_urls": True, "allowed_dirs": ["/"], "isolate": False}
    written.write_text(json.dumps(hostile))
    loaded = kind.from_pretrained(tmp_path)
    assert (loaded.allow_urls, loaded.allowed_dirs, getattr(loaded, "isolate", None)) == (False, None, None)
    assert kind.from_pretrained(tmp_path, allow_urls=True).allow_urls


def test_an_existing_file_outside_is_not_told_from_a_missing_one(tree):
    for allowed, error in (
        (tree / "media", PermissionError),
        ([], PermissionError),
        ([tree / "none"], PermissionError),
    ):
        for name in ("secret/clip.mp4", "secret/none.mp4"):
            with pytest.raises(error, match="outside the allowed folders"):
                regular_file(tree / name, allowed)
    # Without the option any path is as good as another.
    assert regular_file(tree / "secret" / "clip.mp4") == str((tree / "secret" / "clip.mp4").resolve())


def test_pictures_in_the_text_itself_need_no_file(watched):
    content = io.BytesIO()
    Image.new("RGB", (9, 7), (255, 0, 0)).save(content, "PNG")
    text = base64.b64encode(content.getvalue()).decode()
    for source in (text, f"data:image/png;base64,{text}"):
        assert load_rgb_image(source, allowed_dirs=[]).shape == (3, 7, 9)
    assert watched == {"opened": [], "connected": []}


# ------------------------------------------------------------------------------------------------------------ URLs


NOT_PUBLIC_ADDRESSES = """127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1
198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 fe80::1 fe80::1%eth0
fc00::1 fd12:3456::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1
64:ff9b:1::7f00:1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 100::1 fec0::1"""


@pytest.mark.parametrize("address", NOT_PUBLIC_ADDRESSES.split())
def test_addresses_that_are_not_public(address):
    assert not is_public_address(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111"])
def test_addresses_that_are_public(address):
    assert is_public_address(address)


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine, which passes for one at a public address under the names of `NAMES`."""
    asked, connected = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
            elif self.path == "/drip":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for number in range(50):
                    time.sleep(0.05)
                    self.wfile.write(b"X-%d: 0\r\n" % number)
            elif self.path == "/huge":
                self.send_response(200)
                self.send_header("Content-Length", str(2**40))
                self.end_headers()
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"content")

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    names = {"public.test": [PUBLIC], "inside.test": ["192.168.1.1"], "both.test": [PUBLIC, "127.0.0.1"]}
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def resolve(host, port, *args, **kwargs):
        if host not in names:
            return look_up(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    def redirect(self, address):
        connected.append(address[0])
        return connect(self, ("127.0.0.1", web.server_port) if address[0] == PUBLIC else address)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", redirect)
    web.asked, web.connected, web.names = asked, connected, names
    yield web
    web.shutdown()
    web.server_close()


def test_a_public_server_is_read(server):
    assert download("http://public.test/clip", allow_urls=True) == b"content"
    assert download("http://public.test/to/http://public.test/clip", allow_urls=True) == b"content"
    assert server.asked == ["/clip", "/to/http://public.test/clip", "/clip"]
    assert server.connected == [PUBLIC] * 3


NOT_PUBLIC = [
    "http://127.0.0.1/x",
    "http://localhost/x",
    "http://127.1/x",
    "http://2130706433/x",
    "http://0x7f000001/x",
    "http://0/x",
    "http://[::1]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://169.254.169.254/latest/meta-data",
    "http://192.168.0.1/x",
    "http://inside.test/x",
    "http://both.test/x",
    "https://127.0.0.1/x",
    "https://inside.test/x",
]


@pytest.mark.parametrize("url", NOT_PUBLIC)
def test_addresses_inside_are_not_connected_to(server, url):
    with pytest.raises(OSError, match=r"cannot fetch.*not a public address"):
        download(url, allow_urls=True)
    assert server.connected == []
    with pytest.raises(OSError, match=r"cannot fetch.*not a public address"):
        download(f"http://public.test/to/{url}", allow_urls=True)
    assert server.connected == [PUBLIC]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://public.test/x", "gopher://public.test/", "data:,x"])
def test_redirects_stay_with_http(server, target):
    with pytest.raises(OSError, match="cannot fetch"):
        download(f"http://public.test/to/{target}", allow_urls=True)
    assert server.connected == [PUBLIC]


def test_endless_redirects_end(server):
    server.RequestHandlerClass.do_GET = lambda self: (
        self.send_response(302),
        self.send_header("Location", self.path + "x"),
        self.end_headers(),
    )
    with pytest.raises(OSError, match="cannot fetch"):
        download("http://public.test/", allow_urls=True)
    assert len(server.connected) <= 11


def test_the_address_that_was_looked_at_is_the_one_connected_to(server, monkeypatch):
    """A name that changes its address from one question to the next: only the first answer counts."""
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])

    def rebind(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    assert download("http://rebinding.test/clip", allow_urls=True) == b"content"
    assert server.connected == [PUBLIC]


def test_proxies_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert download("http://public.test/clip", allow_urls=True) == b"content"
    assert server.connected == [PUBLIC]


@contextmanager
def within(seconds):
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def test_time_is_limited_whatever_the_server_does(server, monkeypatch):
    with within(2), pytest.raises(OSError, match=r"within 0\.3 s"):
        download("http://public.test/drip", allow_urls=True, timeout_s=0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2))
    with within(1), pytest.raises(OSError, match=r"within 0\.3 s"):
        download("http://public.test/clip", allow_urls=True, timeout_s=0.3)


def test_a_body_that_is_announced_too_large_is_not_read(server):
    with within(2), pytest.raises(ValueError, match="larger than the 1000 bytes"):
        download("http://public.test/huge", allow_urls=True, max_bytes=1000)


def test_urls_are_off_unless_allowed(watched):
    for url in ("http://public.test/clip.mp4", "https://public.test/clip.mp4"):
        for read in (lambda url: decode_video(url, lambda metadata: [0]), load_rgb_image):
            with pytest.raises(ValueError, match="allow_urls=True"):
                read(url)
    assert watched == {"opened": [], "connected": []}
    assert sources.MAX_DOWNLOAD_BYTES == 2**30
