"""Stand-in for a file that the source distribution lacks: the pictures and clips that the mixins take from the Hub.

Ours are made here, offline: a clip of 11 frames (what the mixins count on), and a picture. Sound is refused.
"""

import atexit
import shutil
import tempfile
from pathlib import Path

import numpy as np
from clips import write_clip
from PIL import Image

_FOLDER: list[Path] = []


def _folder() -> Path:
    if not _FOLDER:
        _FOLDER.append(Path(tempfile.mkdtemp(prefix="upstream_media_")))
        atexit.register(shutil.rmtree, _FOLDER[0], ignore_errors=True)
    return _FOLDER[0]


def url_to_local_path(url: str, return_url_if_not_found: bool = True) -> str:
    """The path of a file of the kind that `url` names; the url itself for a sound, which nothing here opens."""
    name = url.rsplit("/", 1)[-1]
    path = _folder() / name
    if path.exists():
        return str(path)
    if path.suffix in (".png", ".jpg"):
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    elif path.suffix == ".mp4":
        write_clip(path, num_frames=11, fps=30, width=64, height=48)
    else:
        return url
    return str(path)
