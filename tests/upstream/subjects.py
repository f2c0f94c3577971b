"""The classes under test: those of the installed package, or those that a checkpoint folder brings as remote code.

A test run is about one kind. That of remote code never imports `video_panda`: the folder is written by another process.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

KINDS = ("installed", "remote")
NAMES = (
    "VideoPandaConfig",
    "VideoPandaVisionConfig",
    "VideoPandaModel",
    "VideoPandaForConditionalGeneration",
    "VideoPandaProcessor",
    "VideoPandaVideoProcessor",
    "VideoPandaImageProcessor",
)
_TESTS = Path(__file__).parents[1]
_WRITE = "import sys; from tiny import write_tiny_checkpoint; write_tiny_checkpoint(sys.argv[1])"
chosen: list[str] = []  # what --upstream said


def scratch_folder(name: str) -> str:
    """A folder that is gone after this run."""
    folder = tempfile.mkdtemp(prefix=f"upstream_{name}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def checkpoint() -> str:
    """A folder with a tiny model and its processor, written by a process of its own."""
    folder = scratch_folder("checkpoint")
    environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
    subprocess.run([sys.executable, "-c", _WRITE, folder], check=True, env=environment)
    return folder


@cache
def subjects() -> SimpleNamespace:
    """The classes by name."""
    if chosen[0] == "installed":
        import video_panda

        return SimpleNamespace(**{name: getattr(video_panda, name) for name in NAMES})
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(checkpoint(), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint(), trust_remote_code=True)
    objects = [model, model.model, model.config, model.config.vision_config]
    objects += [processor, processor.video_processor, processor.image_processor]
    classes = {type(item).__name__: type(item) for item in objects}
    assert set(classes) == set(NAMES), sorted(classes)
    assert all(kind.__module__.startswith("transformers_modules.") for kind in classes.values())
    assert "video_panda" not in sys.modules
    return SimpleNamespace(**classes)


def trusting(auto_class) -> SimpleNamespace:
    """An Auto class whose user trusts remote code, as one must who loads a folder that brings it."""

    def from_pretrained(*args, **kwargs):
        return auto_class.from_pretrained(*args, trust_remote_code=True, **kwargs)

    return SimpleNamespace(from_pretrained=from_pretrained)
