"""What can be checked of the runs of transformers' own tests without running them: the table, and how they are fetched."""

import ast
import subprocess
import tarfile
from pathlib import Path

import pytest
from upstream import source
from upstream.table import KINDS, PAGE, read_table

FOLDER = Path(__file__).parent
ROWS = read_table()


def classes_of(path: Path) -> dict[str, ast.ClassDef]:
    """The classes of a module, by name."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def functions_of(node: ast.ClassDef) -> list[str]:
    return [child.name for child in node.body if isinstance(child, ast.FunctionDef)]


MODULES = {path.name: classes_of(path) for path in FOLDER.glob("test_upstream_*.py")}
TEST_CLASSES = {name for classes in MODULES.values() for name in classes if name.endswith("Test")}


def test_every_line_of_the_table_is_a_row():
    table = PAGE.read_text(encoding="utf-8").split("| class | tests |")[1].splitlines()[2:]
    assert len([line for line in table if line.startswith("|")]) == len(ROWS) > 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.test_class}-{row.tests[0]}")
def test_a_row_is_whole(row):
    assert row.test_class in TEST_CLASSES
    assert row.tests
    assert row.kind in KINDS
    assert row.classes in ("both", "installed", "remote")
    assert row.reason


def test_no_test_stands_in_two_rows():
    listed = [(row.test_class, name) for row in ROWS for name in row.tests]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_replaces_an_upstream_test_is_listed(module):
    classes = MODULES[module]
    listed = {name for row in ROWS if row.test_class in classes for name in row.tests}
    replacements = functions_of(classes["Replacements"]) if "Replacements" in classes else []
    own_helpers = {"_without_auto_map", "_check_that_asking_changes_nothing"}
    assert set(replacements) - own_helpers <= listed


def test_the_page_counts_our_tests_of_generation():
    tester = classes_of(FOLDER / "stand_ins" / "generation" / "test_utils.py")["GenerationTesterMixin"]
    count = sum(name.startswith("test_") for name in functions_of(tester))
    assert f"{count} tests of what `generate` must do" in PAGE.read_text(encoding="utf-8")


def test_the_pinned_version_is_read():
    assert source.pinned_version().count(".") == 2


def write_distribution(command: list[str], **_) -> None:
    """What `pip download` leaves: `name-version.tar.gz` with a folder of tests."""
    folder, (name, version) = Path(command[command.index("-d") + 1]), command[-1].split("==")
    inside = folder / "made" / f"{name}-{version}"
    (inside / "tests").mkdir(parents=True)
    (inside / "tests" / "test_common.py").write_text("NUMBER = 7\n")
    with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
        archive.add(inside, arcname=inside.name)


def test_a_distribution_is_fetched_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: (calls.append(command), write_distribution(command)))
    for _ in range(2):
        folder = source.fetch("1.2.3", cache=tmp_path)
    assert (folder / "test_common.py").read_text() == "NUMBER = 7\n"
    assert (folder / "__init__.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["transformers-1.2.3"]
    assert len(calls) == 1
    assert calls[0][1:4] == ["-m", "pip", "download"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (subprocess.CalledProcessError(1, "pip", stderr="first\nERROR: no such version\n"), "ERROR: no such version"),
        (subprocess.TimeoutExpired("pip", 1), "within"),
    ],
)
def test_what_cannot_be_fetched_is_skipped_and_in_ci_an_error(error, words, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(source, "import_upstream", lambda name: source.fetch("1.2.3", cache=tmp_path))
    monkeypatch.delenv(source.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=words):
        source.require_upstream("test_modeling_common")
    monkeypatch.setenv(source.REQUIRED, "1")
    with pytest.raises(source.UpstreamMissing, match=words):
        source.require_upstream("test_modeling_common")
    assert list(tmp_path.iterdir()) == []
