"""Loads a checkpoint as anybody would who has it from the Hub: in a new process, without this package, its files alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# One line on stdout: {} or {"error": ...}. Answers a question about four frames with one token.
_PROGRAM = """
import json, sys
sys.modules["video_panda"] = None  # importing it fails, as where it is not installed

def answer(folder, device):
    import numpy
    import torch
    from transformers import AutoModel, AutoProcessor

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval().to(device)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    clip = numpy.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=numpy.uint8)
    chat = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What happens?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs.to(device), **options)
    if not torch.isfinite(output.logits[0]).all():
        raise ValueError("the logits of its first answer are not finite: the weights are damaged")
    processor.decode(output.sequences[0, -1:], skip_special_tokens=True)

try:
    answer(*json.loads(sys.argv[1]))
    result = {}
except Exception as error:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    result = {"error": f"{type(error).__name__}: {lines[0].strip()}"}
print(json.dumps(result))
"""
# Settings of the caller that could lead the process to other files, or hand it a token.
_NOT_INHERITED = re.compile(r"HF_.*|HUGGING.*|TRANSFORMERS_.*|PYTORCH_TRANSFORMERS.*|PYTHONSTARTUP|OPENAI_.*|AWS_.*")


def load_in_fresh_process(
    files: Mapping[str, Path], *, timeout_s: float = 600.0, device: str | None = None
) -> str | None:
    """Load exactly these files as a checkpoint, and have it answer a question about a tiny clip, offline.

    Args:
        files: name in the repository -> where the file is.
        timeout_s: seconds after which it is given up.
        device: such as "cpu"; default: the first GPU if there is one.

    Returns:
        What went wrong, in one line; None if nothing did.
    """
    with tempfile.TemporaryDirectory(prefix="video-panda-") as scratch:
        folder = Path(scratch, "checkpoint")
        _link_all(files, folder)
        work, home = Path(scratch, "work"), Path(scratch, "home")
        work.mkdir()
        env = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name.upper())}
        env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-c", _PROGRAM, json.dumps([str(folder), device])]
        try:
            process = subprocess.run(
                command,
                cwd=work,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return f"it was not loaded and asked within {timeout_s:g} s: give it more time, or a faster device"
        return _outcome(process, folder)


def _link_all(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.symlink_to(path.resolve())
        except OSError:  # Windows allows links to some users only
            shutil.copyfile(path, place)


def _outcome(process: subprocess.CompletedProcess, folder: Path) -> str | None:
    try:
        error = json.loads(process.stdout.splitlines()[-1]).get("error")
    except (IndexError, ValueError, AttributeError):
        last = [line for line in process.stderr.splitlines() if line.strip()][-1:] or ["no word"]
        ended = f"was killed by signal {-process.returncode} (out of memory?)" if process.returncode < 0 else "failed"
        error = f"the process {ended}: {last[0].strip()}"
    return None if error is None else error.replace(f"{folder}{os.sep}", "").replace(str(folder), "the folder")
