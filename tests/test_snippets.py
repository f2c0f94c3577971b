"""The machinery that runs the documentation's snippets: what it reads, runs, and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from snippets import SnippetError, named_command, parse_page, read_page, run_snippets, write_media

README_COMMAND = Path(__file__).resolve().parents[1] / ".ci" / "readme_command.py"


def page(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def test_reads_language_text_and_line():
    snippets = parse_page(
        page("# Title", "```python", "a = 1", "", "b = 2", "```", "text", "~~~json extra words", "{}", "~~~"), "p.md"
    )
    assert [(s.language, s.line, s.text, s.runs) for s in snippets] == [
        ("python", 3, "a = 1\n\nb = 2\n", True),
        ("json", 9, "{}\n", False),
    ]
    assert snippets[0].place == "p.md:3"


def test_a_fence_in_a_list_loses_its_indentation():
    (snippet,) = parse_page(page("1. first", "   ```python", "   if True:", "       a = 1", "", "   ```"), "p.md")
    assert snippet.text == "if True:\n    a = 1\n\n"


def test_a_longer_fence_holds_a_shorter_one():
    (snippet,) = parse_page(page("````text", "```python", "1 / 0", "```", "````"), "p.md")
    assert snippet.text == "```python\n1 / 0\n```\n"
    assert not snippet.runs


def test_substitutions_change_what_runs_but_not_what_is_shown():
    (snippet,) = parse_page(
        page(
            '<!-- run: substitute "you/name" -> "./checkpoint", "cuda" -> "cpu" -->',
            '<!-- run: substitute "slow" -> "" -->',
            "```bash",
            "command you/name --device cuda slow; echo you/name",
            "```",
        ),
        "p.md",
    )
    assert snippet.code() == "command ./checkpoint --device cpu ; echo ./checkpoint\n"
    assert "you/name" in snippet.text
    assert snippet.runs


def test_a_substitution_that_finds_nothing_is_an_error():
    (snippet,) = parse_page(page('<!-- run: substitute "old/name" -> "x" -->', "```bash", "echo new/name", "```"), "p")
    with pytest.raises(SnippetError, match=r"p:3: nothing to substitute: 'old/name'"):
        snippet.code()


def test_a_skipped_snippet_keeps_its_reason_and_does_not_run():
    snippets = parse_page(page("<!-- run: skip: needs the 15 GB release -->", "```python", "1 / 0", "```"), "p.md")
    assert snippets[0].skip == "needs the 15 GB release"
    assert run_snippets(snippets) == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["<!-- run: skip: -->", "```bash", "```"], r"p\.md:1: expected 'command: NAME'"),
        (["<!-- run: skipp: why -->", "```bash", "```"], r"p\.md:1: expected 'command: NAME'"),
        (["<!-- run: substitute a -> b -->", "```bash", "```"], r"p\.md:1: expected 'command: NAME'"),
        (["<!-- command: two words -->", "```bash", "```"], r"p\.md:1: expected 'command: NAME'"),
        (["text", "<!-- run skip: why -->", "```bash", "```"], r"p\.md:2: expected <!-- run"),
        (["<!-- run: skip: spread over", "two lines -->", "```bash", "```"], r"p\.md:1: expected <!-- run"),
        (["<!-- run: skip: why -->", "", "```bash", "```"], r"p\.md:1: expected a fence right below"),
        (["```bash", "```", "<!-- run: skip: why -->"], r"p\.md:3: expected a fence right below"),
        (["<!-- run: skip: why -->", "```json", "```"], r"p\.md:1: a run comment above a 'json' fence"),
        (["```sh", "```"], r"p\.md:1: write 'bash', got 'sh'"),
        (["text", "```python", "a = 1"], r"p\.md:2: this fence is never closed"),
    ],
)
def test_a_comment_or_fence_that_would_do_nothing_is_refused(lines, message):
    with pytest.raises(SnippetError, match=message):
        parse_page(page(*lines), "p.md")


def test_other_comments_are_left_alone():
    assert parse_page(page("<!-- a note to writers -->", "", "text"), "p.md") == []


def test_one_page_runs_in_order_in_one_namespace_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page(
        *("```python", "value = 20", "```"),
        *("```bash", "# a comment", "printf 22 > \\", "  from_bash.txt", "```"),
        *("```python", "from pathlib import Path", "total = value + int(Path('from_bash.txt').read_text())", "```"),
        *("```python", "def twice():", "    return 2 * total", "", "Path('out.txt').write_text(str(twice()))", "```"),
    )
    assert run_snippets(parse_page(text, "p.md")) == 4
    assert (tmp_path / "out.txt").read_text() == "84"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (["a = 1", "a / 0"], r"^p\.md:5: ZeroDivisionError: division by zero$"),
        (["def fail():", "    raise KeyError('k')", "fail()"], r"^p\.md:5: KeyError: 'k'$"),
        (["import json", "json.loads('{')"], r"^p\.md:5: JSONDecodeError: "),
        (["import json", "", "if True print()"], r"^p\.md:6: SyntaxError: "),
        (["raise SystemExit(3)"], r"^p\.md:4: SystemExit: 3$"),
    ],
)
def test_a_failing_python_snippet_names_page_and_line(code, message):
    with pytest.raises(SnippetError, match=message):
        run_snippets(parse_page(page("# Title", "", "```python", *code, "```"), "p.md"))


@pytest.mark.parametrize("code", ["exit 7", "echo seen; false; exit 0", "false | cat", "echo $undefined_name"])
def test_a_failing_bash_snippet_names_page_and_line(code):
    with pytest.raises(SnippetError, match=r"^p\.md:3: exit status \d+:"):
        run_snippets(parse_page(page("text", "```bash", code, "```"), "p.md"))


def test_a_bash_snippet_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("snippets.BASH_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SnippetError, match=r"^p\.md:2: still running after 0\.2 s"):
        run_snippets(parse_page(page("```bash", "sleep 60", "```"), "p.md"))


def test_bash_finds_the_programs_of_this_environment():
    text = page("```bash", f'test "$(command -v python)" -ef "{sys.executable}"', "```")
    assert run_snippets(parse_page(text, "p.md")) == 1


def test_snippets_below_a_failure_do_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SnippetError):
        run_snippets(parse_page(page("```bash", "false", "```", "```bash", "touch made", "```"), "p.md"))
    assert not (tmp_path / "made").exists()


def test_named_commands_are_found_and_not_run(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(page("<!-- command: test -->", "```bash", "make", "false", "```"), encoding="utf-8")
    snippets = read_page(readme)
    assert run_snippets(snippets) == 0
    assert named_command(snippets, "test") == "make\nfalse"

    printed = subprocess.run([sys.executable, str(README_COMMAND), "test", str(readme)], capture_output=True, text=True)
    assert (printed.returncode, printed.stdout) == (0, "make\nfalse\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page("<!-- command: other -->", "```bash", "true", "```"), "named 'test', got 0; the page has ['other']"),
        (page("<!-- command: test -->", "```bash", "true", "```") * 2, "named 'test', got 2"),
        (None, "No such file"),
    ],
)
def test_a_missing_command_fails_and_says_so(tmp_path, text, message):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text, encoding="utf-8")
    result = subprocess.run([sys.executable, str(README_COMMAND), "test", str(readme)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr


def test_the_workspace_has_clips_and_a_photo(tmp_path):
    av = pytest.importorskip("av")
    from PIL import Image

    write_media(tmp_path)
    for name, num_frames, size in [("clip.mp4", 48, (96, 64)), ("clip2.mp4", 24, (64, 96))]:
        with av.open(str(tmp_path / name)) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == num_frames
        assert (frames[0].width, frames[0].height) == size
    assert Image.open(tmp_path / "photo.jpg").size == (96, 64)
