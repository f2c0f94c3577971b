"""Each program in examples/ runs as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_packages_own_model_is_asked_by_its_remote_code(tmp_path):
    folder = ROOT / "default_model"
    program = (ROOT / "examples" / "ask.py").read_text()
    assert "video_panda" not in program
    question, truth = next(iter(json.loads((folder / "example.json").read_text()).items()))
    arguments = [str(folder), str(folder / "example.mp4"), question]
    command = [sys.executable, str(ROOT / "examples" / "ask.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == truth
