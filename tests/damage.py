"""Damaged checkpoints: each file missing, cut off, zeroed or another's, and what became of loading them.

Also a program: `damage.py` with cases as JSON on its standard input loads each in a forked process, as remote code.
"""

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RECORD = "saved_files.json"
MARK = "became of it: "


@dataclass(frozen=True)
class Damage:
    """What is done to a file.

    Attributes:
        file: its name.
        way: in words.
        content: what it then holds; None: it is gone.
    """

    file: str
    way: str
    content: bytes | None

    def copy_of(self, checkpoint: Path, target: Path) -> Path:
        """A copy of a checkpoint with this damage."""
        shutil.copytree(checkpoint, target)
        path = target / self.file
        if self.content is None:
            path.unlink()
        else:
            path.write_bytes(self.content)
        return target


def damages(checkpoint: Path, others: dict[str, Path], num_cuts: int = 6) -> Iterator[Damage]:
    """Every damage of every file but code.

    Args:
        checkpoint: the good one.
        others: what kind of other checkpoint it is: its folder; its files take the place of those of the good one.
        num_cuts: lengths at which each file is cut off, beside one byte less and nothing at all.
    """
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".py":
            continue
        good, name = path.read_bytes(), path.name
        yield Damage(name, "missing", None)
        yield from _generic(name, good, num_cuts)
        for kind, other in others.items():
            content = (other / name).read_bytes() if (other / name).exists() else good
            if content != good:
                yield Damage(name, f"of {kind}", content)


def _generic(name: str, good: bytes, num_cuts: int) -> Iterator[Damage]:
    size = len(good)
    for length in sorted({0, size - 1, *(size * number // (num_cuts + 1) for number in range(1, num_cuts + 1))}):
        yield Damage(name, "cut off", good[:length])
    yield Damage(name, "zeroed", bytes(size))
    for begin in (0, size // 3, size - size // 4):
        yield Damage(name, "zeroed in part", good[:begin] + bytes(size // 4) + good[begin + size // 4 :])


def damages_of_code(checkpoint: Path, num_cuts: int = 4, num_files: int | None = None) -> Iterator[Damage]:
    """Those of each code file; it is cut off, among others, where what is left is still Python."""
    files = sorted(checkpoint.glob("*.py"))
    for path in files[:: 1 if num_files is None else max(1, len(files) // num_files)]:
        good, name = path.read_bytes(), path.name
        yield Damage(name, "missing", None)
        yield Damage(name, "zeroed", bytes(len(good)))
        yield Damage(name, "cut off", good[: len(good) // 2])
        yield Damage(name, "of another version", good + b"\n_ADDED = 1\n")
        lines = good.splitlines(keepends=True)
        whole = [b"".join(lines[:end]) for end in range(len(lines) - 1, 1, -1)]
        whole = [part for part in whole if _is_python(part)]
        chosen = {len(whole) * number // num_cuts for number in range(num_cuts)} if whole else ()
        for place in sorted(chosen):
            yield Damage(name, "cut off, still Python", whole[place])


def _is_python(content: bytes) -> bool:
    try:
        ast.parse(content)
    except SyntaxError:
        return False
    return True


def answer(model, processor) -> dict:
    """What a checkpoint says, in lists: of one clip, its logits (summed up), the tokens that follow, and the prompt."""
    import numpy
    import torch

    clip_THWC = numpy.random.default_rng(0).integers(0, 256, (3, 60, 100, 3), dtype=numpy.uint8)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What colour?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], videos=[clip_THWC])
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=4)
    return {
        "prompt": prompt,
        "inputs": inputs["input_ids"].tolist(),
        "logits": float(logits.max(-1).values.sum()),
        "ids": ids.tolist(),
    }


def load_all(folder: Path, loaders: dict) -> dict:
    """What became of loading a checkpoint.

    Args:
        folder: the checkpoint's.
        loaders: "config", "model" and "processor", each a function of the folder.

    Returns:
        "errors" by name of the loader, and the "answer" where there are none.
    """
    errors, loaded = {}, {}
    for name, load in loaders.items():
        try:
            loaded[name] = load(folder)
        except Exception as error:  # noqa: BLE001 - which one it is, is what is looked at
            errors[name] = f"{type(error).__name__}: {error}"
    if errors:
        return {"errors": errors, "answer": None}
    return {"errors": {}, "answer": answer(loaded["model"], loaded["processor"])}


def verdict(damage: Damage, outcome: dict, good: dict, warnings: str = "") -> str:
    """ "noticed", "noticed, unnamed", "warned of", "harmless" or "SILENT"."""
    if outcome["errors"]:
        texts = list(outcome["errors"].values())
        # The record and a file that it lists can only contradict each other.
        names = [damage.file in text or Path(damage.file).stem in text or RECORD in text for text in texts]
        # What Python itself says of code that cannot be read, some loaders' errors: one of them names it.
        is_named = any(names) if damage.file.endswith(".py") else all(names)
        return "noticed" if is_named else "noticed, unnamed"
    if damage.file in warnings:
        return "warned of"
    return "harmless" if outcome["answer"] == good else "SILENT"


def write_others(root: Path) -> dict[str, Path]:
    """Two other checkpoints than `tiny.write_tiny_checkpoint` writes: of other sizes, and of the same with all else other."""
    from tiny import tiny_config, tiny_model, tiny_processor

    larger, twin = root / "larger", root / "twin"
    processor = tiny_processor("words", use_row_token=False)
    processor.chat_template = "{{ messages[0]['content'] }}"
    text = {"hidden_size": 64, "num_hidden_layers": 3, "eos_token_id": 5}
    vision = {"hidden_size": 48, "use_row_token": False}
    tiny_model(tiny_config(processor.video_token_id, text=text, vision=vision), seed=1).save_pretrained(larger)
    processor.save_pretrained(larger)
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace("USER: ", "user: ")
    processor.video_processor.num_frames = 9
    content = processor.tokenizer.backend_tokenizer.to_str()
    swapped = content.replace('"a": ', '"\0": ').replace('"b": ', '"a": ').replace('"\0": ', '"b": ')
    processor.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(swapped)
    text = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "eos_token_id": 3}
    tiny_model(tiny_config(processor.video_token_id, text=text), seed=2).save_pretrained(twin)
    processor.save_pretrained(twin)
    return {"another of other sizes": larger, "another of the same sizes": twin}


@contextmanager
def full_disk(max_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: writing fails as on a full disk, with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def load_damaged_code(cases: Sequence[Damage], checkpoint: Path, folder: Path) -> list[tuple[dict, dict]]:
    """What became of each case, loaded as remote code in a process without the package, and the good one's answer."""
    folders = [str(shutil.copytree(checkpoint, folder / "good"))]
    folders += [str(case.copy_of(checkpoint, folder / f"case{number}")) for number, case in enumerate(cases)]
    env = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=json.dumps(folders), env=env, cwd=folder, capture_output=True, text=True, check=True
    )
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    outcomes = dict(map(json.loads, lines))
    assert outcomes.keys() == set(folders), done.stderr[-3000:]
    good = outcomes[folders[0]]["answer"]
    assert good is not None, outcomes[folders[0]]
    return [(outcomes[place], good) for place in folders[1:]]


def _load_as_remote_code(folder: str) -> None:
    import logging

    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

    logging.captureWarnings(True)
    transformers.utils.logging.disable_progress_bar()
    loaders = {"config": AutoConfig, "model": AutoModelForCausalLM, "processor": AutoProcessor}
    loaders = {
        name: (lambda place, auto=auto: auto.from_pretrained(place, trust_remote_code=True))
        for name, auto in loaders.items()
    }
    print(MARK + json.dumps([folder, load_all(folder, loaders)]), flush=True)


def main() -> None:
    """Load each folder named on standard input, in a process of its own; the package is not there."""
    sys.modules["video_panda"] = None
    import torch
    import transformers  # noqa: F401 - once, not in every process

    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM  # noqa: F401

    for folder in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            try:
                _load_as_remote_code(folder)
            except BaseException:  # noqa: BLE001 - the process ends here
                traceback.print_exc()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
