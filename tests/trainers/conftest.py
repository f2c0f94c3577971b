"""What the training tests share: clips with words about them, and a tiny teacher."""

import pytest
from training_runs import tiny_teacher, write_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Read-only: the JSON file of eight clips."""
    return write_samples(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(samples):
    """A CLIP of width 32; its folder `teacher` lies beside the samples."""
    return tiny_teacher(samples.parent / "teacher")
