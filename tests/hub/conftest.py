"""Checkpoints of the authors' format, and one of them converted."""

import shutil
from pathlib import Path

import pytest
from release_checkpoints import VOCABULARY, word_tokenizer, write_release

from video_panda.hub.convert import convert_checkpoint


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Read-only: a small release checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    word_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture
def own_release(release, tmp_path) -> Path:
    """A copy of `release` to spoil."""
    return Path(shutil.copytree(release, tmp_path / "release"))


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory) -> Path:
    """Read-only: `release`, converted."""
    return convert_checkpoint(release, tmp_path_factory.mktemp("out") / "model", progress=False)
