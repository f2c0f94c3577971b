"""Runs transformers' own tests: `pytest tests/upstream --upstream installed`, and the same with `remote`.

A test that is skipped without a row in docs/upstream_tests.md fails; so does a run in which a row was not needed.
"""

import os

import pytest
from upstream import subjects
from upstream.table import read_table

FOLDER = os.path.dirname(__file__)
UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "training_ci",
    "is_training_test",
    "is_tensor_parallel_test",
)
# What a mixin has empty, for its users to fill in.
GIVEN_TO_UPSTREAM = {"setUp", "setUpClass", "model_tester", "image_processor_tester_class", "_is_composite"}
GIVEN_TO_UPSTREAM |= {"image_processor_dict", "test_cast_dtype", "_abc_impl"}
collect_ignore = ["stand_ins"]
skipped: set[tuple[str, str]] = set()
unavailable: list[str] = []  # modules whose upstream part cannot be had here


def pytest_addoption(parser):
    parser.addoption("--upstream", choices=subjects.KINDS, help="run transformers' tests for these classes")


def pytest_configure(config):
    kind = config.getoption("upstream", None)
    subjects.chosen[:] = [kind] if kind else []
    if kind:
        # Before transformers is imported: remote code goes where no other run has any, and nothing is asked of the Hub.
        os.environ["HF_MODULES_CACHE"] = subjects.scratch_folder("modules")
        os.environ["HF_HUB_OFFLINE"] = "1"
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")


def pytest_ignore_collect(collection_path, config):
    if collection_path.name.startswith("test_upstream_") and not subjects.chosen:
        return True
    return None


def _name_of(item) -> tuple[str, str]:
    return item.cls.__name__ if item.cls else "", item.name


def _is_upstream(item) -> bool:
    return item.path.name.startswith("test_upstream_")


def _overridden(test_class) -> set[str]:
    """The names by which a test class of ours changes what upstream wrote."""
    ours = [base for base in test_class.__mro__ if base.__module__ == test_class.__module__]
    upstream = [base for base in test_class.__mro__ if base.__module__.startswith("transformers_tests.")]
    names = {
        name
        for base in ours
        for name, value in vars(base).items()
        if not (name.startswith("__") or hasattr(value, "__wrapped__"))  # upstream wraps each test when it is inherited
    }
    changed = {
        name for name in names if name.startswith(("skip_", "test_")) or any(name in vars(up) for up in upstream)
    }
    return changed - GIVEN_TO_UPSTREAM if upstream else set()


def _check_overrides(test_class) -> None:
    listed = {name for row in read_table() if row.test_class == test_class.__name__ for name in row.tests}
    if unlisted := _overridden(test_class) - listed:
        raise pytest.UsageError(f"{test_class.__name__} overrides {unlisted}: docs/upstream_tests.md must say why")


def pytest_collection_modifyitems(items):
    for test_class in {item.cls for item in items if _is_upstream(item) and item.cls}:
        _check_overrides(test_class)
    left_out = [row for row in read_table() if row.kind == "left out"]
    for item in filter(_is_upstream, items):
        for row in left_out:
            if row.matches(*_name_of(item), subjects.chosen[0]):
                item.add_marker(pytest.mark.skip(reason=row.reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and _is_upstream(item):
        skipped.add(_name_of(item))
        if not any(row.matches(*_name_of(item), subjects.chosen[0]) for row in read_table()):
            report.outcome = "failed"
            report.longrepr = f"skipped ({report.longrepr}), but docs/upstream_tests.md does not list it"
    return report


def pytest_collectreport(report):
    if report.skipped:
        unavailable.append(report.nodeid)


def pytest_sessionfinish(session):
    """A row that no skipped test of a whole run needed is stale."""
    import torch

    paths = [os.path.abspath(arg) for arg in session.config.args]
    whole = paths == [FOLDER] and not (session.config.option.keyword or session.config.option.deselect)
    if not subjects.chosen or not whole or unavailable or torch.cuda.is_available():
        return
    for row in read_table():
        needed = row.kind in ("replaced", "setting") or any(row.matches(*name, subjects.chosen[0]) for name in skipped)
        if not needed and row.classes in ("both", subjects.chosen[0]):
            print(f"\ndocs/upstream_tests.md lists {row.test_class} {row.tests} as {row.kind}, but nothing was skipped")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
