"""The sections of `reliability.py` about damage: of checkpoints, of their code, of training runs; and full disks."""

import collections
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import damage
from reliability import Figure
from tiny import tiny_model, tiny_processor, write_tiny_checkpoint
from transformers.utils import logging as transformers_logging

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor

TESTS = Path(__file__).parents[1] / "tests"
LOADERS = {
    "config": VideoPandaConfig.from_pretrained,
    "model": VideoPandaForConditionalGeneration.from_pretrained,
    "processor": VideoPandaProcessor.from_pretrained,
}
FEW_BYTES = 400_000


class _Kept(logging.Handler):
    """What was warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


def _figures(found: collections.Counter, harmless: collections.Counter, must_be_named: bool = True) -> list[Figure]:
    silent, unnamed = found.pop("SILENT", 0), found.pop("noticed, unnamed", 0)
    reasons = ", ".join(f"{name} x {count}" for name, count in sorted(harmless.items()))
    return [
        Figure("damages", "", found.total() + silent + unnamed, None),
        Figure("refused with an error that names the file", "", found["noticed"], None),
        Figure("loaded with a warning that names the file", "", found["warned of"], None),
        Figure("harmless: everything loads, and the answer is the same", "", found["harmless"], None),
        Figure("which those are", "", reasons or "none", None),
        Figure(
            "refused, the file not named",
            "0" if must_be_named else "",
            unnamed,
            unnamed == 0 if must_be_named else None,
        ),
        Figure("unnoticed", "0", silent, silent == 0),
    ]


def damaged_checkpoints(quick: bool) -> list[Figure]:
    """Every file but code, of one file of weights and of several; loaded through the installed classes."""
    found, harmless, kept = collections.Counter(), collections.Counter(), _Kept()
    transformers_logging.disable_progress_bar()
    logging.getLogger().addHandler(kept)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        single, sharded = folder / "single", folder / "sharded"
        write_tiny_checkpoint(single)
        shutil.copytree(single, sharded)
        VideoPandaForConditionalGeneration.from_pretrained(single).save_pretrained(sharded, max_shard_size="200KB")
        others = damage.write_others(folder / "others")
        for checkpoint in (single, sharded):
            good = damage.load_all(checkpoint, LOADERS)["answer"]
            for case in damage.damages(checkpoint, others, num_cuts=2 if quick else 40):
                kept.text = ""
                target = case.copy_of(checkpoint, folder / "case")
                told = damage.verdict(case, damage.load_all(target, LOADERS), good, kept.text)
                found[told] += 1
                harmless[f"{case.file} {case.way}"] += told == "harmless"
                shutil.rmtree(target)
    logging.getLogger().removeHandler(kept)
    return _figures(found, +harmless)


def damaged_code(quick: bool) -> list[Figure]:
    """Every code file, loaded as remote code by the Auto classes in processes without the package."""
    found, harmless = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name, "checkpoint")
        write_tiny_checkpoint(checkpoint)
        cases = list(damage.damages_of_code(checkpoint, *((2, 5) if quick else (5, None))))
        for case, outcome in zip(cases, damage.load_damaged_code(cases, checkpoint, Path(name))):
            told = damage.verdict(case, *outcome)
            found[told] += 1
            harmless[f"{case.file} {case.way}"] += told == "harmless"
    # Of a file full of zeros, Python itself says no more than that there are null bytes in source code.
    return _figures(found, +harmless, must_be_named=False)


def _run_tests(name: str, file: str, quick: bool, only: str = "") -> Figure:
    """The tests of a file, the slow ones too."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
    command += ["-k", only] if only else []
    done = subprocess.run(command + ([] if quick else ["--slow"]), capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    return Figure(name, "all pass", f"{passed[1] if passed else 0} passed", done.returncode == 0)


def damaged_runs(quick: bool) -> list[Figure]:
    """The newest checkpoint of a run: each file of it damaged, then resumed."""
    return [_run_tests("each damage passed over, and the run resumed", "trainers/test_damaged_runs.py", quick)]


@contextmanager
def _small_disk(num_bytes: int) -> Iterator[Path | None]:
    """A file system of its own; None where none can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder]
        is_mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True, check=False).returncode
        try:
            yield Path(folder) if is_mounted else None
        finally:
            if is_mounted:
                subprocess.run(["umount", folder], check=True)


def full_disk(quick: bool) -> list[Figure]:
    """Saving where there is no room: under a limit on files' sizes, and on a small file system where one can be mounted."""
    figures = [
        _run_tests(f"under a limit on sizes: {name}", file, quick, only)
        for name, file, only in (
            ("model, processor, config, convert, cache, evaluation", "hub/test_damage.py", "full_disk"),
            ("checkpoint of a training run", "trainers/test_damaged_runs.py", "full_disk"),
        )
    ]
    with tempfile.TemporaryDirectory() as good, _small_disk(1_600_000) as disk:
        if disk is None:
            return [*figures, Figure("on a small file system", "", "cannot be mounted here", None)]
        write_tiny_checkpoint(good)
        saved = disk / "saved"
        shutil.copytree(good, saved)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(max(0, room - FEW_BYTES)))
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        for name, part in (("model", tiny_model(seed=5)), ("processor", tiny_processor())):
            if name == "processor":
                room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "more").write_bytes(bytes(max(0, room - 40_000)))
            try:
                part.save_pretrained(saved)
                told = "saved"
            except OSError as error:
                told = "error that names the folder" if str(saved) in str(error) else f"unnamed: {error}"
            is_same = before == {path.name: path.read_bytes() for path in saved.iterdir()}
            told += ", what was there intact" if is_same else ", WHAT WAS THERE CHANGED"
            holds = told == "error that names the folder, what was there intact"
            figures.append(Figure(f"on a small file system: {name}", "error, the old state intact", told, holds))
    return figures
