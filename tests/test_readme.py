"""What README.md and docs/*.md show works: every snippet is run, and the README's two commands can be found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import make_workspace, read_page, run_snippets

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = {page: read_page(page) for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PAGES_TO_RUN = [page for page, snippets in SNIPPETS.items() if any(snippet.runs for snippet in snippets)]
SKIPPED = [snippet for snippets in SNIPPETS.values() for snippet in snippets if snippet.skip]


def short(path: str | Path) -> str:
    return os.path.relpath(path, ROOT)


@pytest.fixture(scope="session")
def workspace_template(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def docs_workspace(workspace_template, tmp_path, monkeypatch):
    """A folder of the test's own with a small checkpoint, two clips and a photo; the current folder."""
    folder = tmp_path / "workspace"
    shutil.copytree(workspace_template, folder)
    monkeypatch.chdir(folder)
    # Commands that a page starts find no network either.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=short)
def test_every_snippet_of_the_page_runs(page, docs_workspace):
    assert run_snippets(SNIPPETS[page]) > 0


def test_snippets_not_run_are_listed_with_their_reason():
    if SKIPPED:
        pytest.skip("; ".join(f"{short(snippet.place)}: {snippet.skip}" for snippet in SKIPPED))


@pytest.mark.parametrize(("name", "expected"), [("test", "-m pytest"), ("main-job", "video-panda")])
def test_readme_holds_the_command(name, expected):
    result = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "readme_command.py"), name], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert "constraints.txt" in result.stdout, "a fresh machine installs the versions that were tested"
