"""Each program in examples/ runs as a user would run it."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*args) -> str:
    return subprocess.run(
        [sys.executable, *map(str, args)], check=True, capture_output=True, text=True, timeout=300
    ).stdout


def test_the_tiny_checkpoint_can_be_asked(tmp_path):
    folder = tmp_path / "tiny"
    assert f"wrote {folder}" in run(EXAMPLES / "tiny_checkpoint.py", folder)
    answer = run(EXAMPLES / "ask.py", folder, folder / "clip.mp4", "What happens in this video?")
    assert answer.strip()
