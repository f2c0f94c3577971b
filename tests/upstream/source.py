"""The test mixins of transformers: fetched with pip at test time, unpacked beside the checkout, imported as a package.

The source distribution holds `tests/*.py` and no folder of `tests/`. What the mixins import from such folders comes from
`stand_ins/`, which is searched after the unpacked files: where a later release brings the real file, that one is used.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
CACHE = ROOT / ".upstream"  # ignored by git
PACKAGE = "transformers_tests"
# Set by CI: what is skipped on a machine without a package index is an error there.
REQUIRED = "VIDEO_PANDA_REQUIRE_UPSTREAM"
DOWNLOAD_SECONDS = 240


class UpstreamMissing(Exception):
    """The mixins cannot be had; says why."""


def pinned_version() -> str:
    """The version of transformers in constraints.txt."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(r"^transformers==(\S+)$", constraints, re.MULTILINE)[1]


def fetch(version: str, cache: Path = CACHE, package: str = "transformers") -> Path:
    """The unpacked `tests` folder of a source distribution; downloaded once.

    Args:
        version: the release to fetch.
        cache: where the unpacked folder is kept.
        package: name of the distribution.

    Raises:
        UpstreamMissing: pip cannot fetch it; its last words are in the message.
    """
    target = cache / f"{package}-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        # Through pip, so that whatever index this machine is set up for is asked.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "-d", scratch]
        try:
            subprocess.run(
                [*command, f"{package}=={version}"],
                check=True,
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
            raise UpstreamMissing(f"pip cannot fetch the source of {package}=={version}: {reason[0]}") from error
        except subprocess.TimeoutExpired as error:
            raise UpstreamMissing(f"pip did not fetch {package}=={version} within {DOWNLOAD_SECONDS} s") from error
        unpacked = Path(scratch, "unpacked")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        tests = unpacked / f"{package}-{version}" / "tests"
        (tests / "__init__.py").touch()  # the configuration mixin opens it
        try:
            os.replace(tests, target)
        except OSError:
            if not target.is_dir():  # another run may have been faster
                raise
    return target


def import_upstream(name: str) -> ModuleType:
    """A module of transformers' `tests`, for example "test_modeling_common".

    Raises:
        UpstreamMissing: it cannot be fetched, another version is installed, or a package it needs is not.
    """
    if PACKAGE not in sys.modules:
        version = pinned_version()
        if transformers.__version__ != version:
            raise UpstreamMissing(
                f"transformers {transformers.__version__} is installed, constraints.txt says {version}"
            )
        package = ModuleType(PACKAGE, "transformers' own tests")
        package.__path__ = [str(fetch(version)), str(STAND_INS)]
        sys.modules[PACKAGE] = package
        sys.path.append(str(STAND_INS / "utils"))  # where the mixins look for `fetch_hub_objects_for_ci`
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        raise UpstreamMissing(f"transformers' tests need the package {error.name}: pip install it") from error


def require_upstream(name: str) -> ModuleType:
    """As `import_upstream`; where it cannot be had, the test module is skipped, and fails if CI asks for it."""
    try:
        return import_upstream(name)
    except UpstreamMissing as missing:
        if os.environ.get(REQUIRED):
            raise
        pytest.skip(str(missing), allow_module_level=True)
