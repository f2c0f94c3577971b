"""Fixtures and markers of the whole suite."""

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"

# The models are tiny: on a busy machine several threads wait for each other longer than they compute.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Numbers computed with the authors' release."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the folder shared/golden is not beside this repository")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def video_folder() -> Path:
    """Real clips."""
    if not (SHARED / "videos").is_dir():
        pytest.skip("the folder shared/videos is not beside this repository")
    return SHARED / "videos"
