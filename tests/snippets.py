"""Run what the documentation shows: the fenced `python` and `bash` snippets of README.md and docs/*.md.

The snippets of one page run from top to bottom, in one folder and (python) one namespace, as a reader would type them.
HTML comments on the lines right above a fence, invisible on the rendered page, steer a snippet:

    <!-- run: substitute "you/video-panda-7b" -> "./checkpoint" -->     put the small checkpoint of the tests there
    <!-- run: skip: needs the 15 GB release -->                         not run; the reason is listed by pytest -ra
    <!-- command: test -->                                              a named command, run by .ci/run and not here

Nothing is left out in silence: a comment that is misspelt, stands elsewhere or replaces nothing is an error. Importing
this module needs the standard library only, because .ci/readme_command.py reads the README with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RUN_LANGUAGES = ("python", "bash")
# Other names of the two languages would let a snippet slip past the tests.
OTHER_NAMES = {"py": "python", "python3": "python", "pycon": "python", "sh": "bash", "shell": "bash", "console": "bash"}
BASH_TIMEOUT_SECONDS = 300

_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})\s*(?P<language>[^\s`]*)[^`]*$")
_DIRECTIVE_START = re.compile(r"^\s*<!--\s*(command|run)\b")
_DIRECTIVE = re.compile(r"^\s*<!--\s*(?P<kind>command|run):\s*(?P<body>.*?)\s*-->\s*$")
_PAIR = r'"([^"]+)"\s*->\s*"([^"]*)"'
_SUBSTITUTE = re.compile(rf"substitute\s+({_PAIR}(?:\s*,\s*{_PAIR})*)")


class SnippetError(Exception):
    """A snippet that is badly marked, or that failed; the message starts with `page:line:`."""


@dataclass(frozen=True)
class Snippet:
    """One fenced block.

    Args:
        page: the path of the page it stands on.
        line: the number of its first line of code (1 is the first line of the page).
        language: the first word after the fence, possibly empty.
        text: the code, without the fence's indentation.
        command: its name if the block is a named command (`<!-- command: NAME -->`).
        skip: the reason not to run it, if one is given.
        substitutions: pairs (text on the page, text to run instead).
    """

    page: str
    line: int
    language: str
    text: str
    command: str | None = None
    skip: str | None = None
    substitutions: tuple[tuple[str, str], ...] = ()

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the tests run it."""
        return self.language in RUN_LANGUAGES and self.command is None and self.skip is None

    def code(self) -> str:
        """The text to run: the text on the page with the substitutions made.

        Raises:
            SnippetError: if a substitution's left side is not in the text.
        """
        text = self.text
        for shown, used in self.substitutions:
            if shown not in text:
                raise SnippetError(f"{self.place}: nothing to substitute: {shown!r} is not in the snippet")
            text = text.replace(shown, used)
        return text


def read_page(path: str | Path) -> list[Snippet]:
    """The fenced blocks of a Markdown page, in order.

    Raises:
        SnippetError: for a fence that is not closed and for any comment that would silently do nothing.
    """
    path = Path(path)
    return parse_page(path.read_text(encoding="utf-8"), str(path))


def parse_page(text: str, page: str) -> list[Snippet]:
    """`read_page` on a text; `page` is the name that messages give it."""
    snippets: list[Snippet] = []
    directives: list[tuple[int, str, str]] = []  # (line, kind, body), waiting for their fence
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence = _FENCE.match(line)
        if fence:
            end = _closing_line(lines, number, fence["marks"], page)
            code = "\n".join(_outdent(row, len(fence["indent"])) for row in lines[number:end]) + "\n"
            snippets.append(_make_snippet(page, number + 1, fence["language"], code, directives))
            directives, number = [], end + 1
        elif _DIRECTIVE_START.match(line):
            directive = _DIRECTIVE.match(line)
            if directive is None:
                raise SnippetError(f"{page}:{number}: expected <!-- run: … --> or <!-- command: … -->, got {line!r}")
            directives.append((number, directive["kind"], directive["body"]))
        elif directives:
            raise SnippetError(f"{page}:{directives[0][0]}: expected a fence right below this comment, got {line!r}")
    if directives:
        raise SnippetError(f"{page}:{directives[0][0]}: expected a fence right below this comment, got the page's end")
    return snippets


def _closing_line(lines: list[str], start: int, marks: str, page: str) -> int:
    """The index of the line that closes a fence whose code starts at index `start`."""
    for index in range(start, len(lines)):
        stripped = lines[index].strip()
        if stripped.startswith(marks) and set(stripped) == {marks[0]}:
            return index
    raise SnippetError(f"{page}:{start}: this fence is never closed")


def _outdent(line: str, num_spaces: int) -> str:
    """`line` without up to `num_spaces` leading spaces."""
    return line[min(num_spaces, len(line) - len(line.lstrip(" "))) :]


def _make_snippet(page: str, line: int, language: str, text: str, directives: list[tuple[int, str, str]]) -> Snippet:
    """A snippet from its text and the comments above it."""
    if language in OTHER_NAMES:
        raise SnippetError(f"{page}:{line - 1}: write {OTHER_NAMES[language]!r}, got {language!r}: only that is tested")
    command, skip, substitutions = None, None, []
    for number, kind, body in directives:
        if language not in RUN_LANGUAGES:
            raise SnippetError(f"{page}:{number}: a {kind} comment above a {language!r} fence, which is never run")
        substitute = _SUBSTITUTE.fullmatch(body)
        reason = re.fullmatch(r"skip:\s*(\S.*)", body)
        if kind == "command" and re.fullmatch(r"[\w-]+", body):
            command = body
        elif kind == "run" and reason:
            skip = reason[1]
        elif kind == "run" and substitute:
            substitutions += re.findall(_PAIR, substitute[1])
        else:
            raise SnippetError(
                f"{page}:{number}: expected 'command: NAME', 'run: skip: REASON' or "
                f'\'run: substitute "SHOWN" -> "USED"\', got {kind + ": " + body!r}'
            )
    return Snippet(page, line, language, text, command, skip, tuple(substitutions))


def named_command(snippets: Iterable[Snippet], name: str) -> str:
    """The text of the block marked `<!-- command: NAME -->`.

    Raises:
        SnippetError: if there is none or more than one.
    """
    snippets = list(snippets)
    found = [snippet for snippet in snippets if snippet.command == name]
    if len(found) != 1:
        known = [snippet.command for snippet in snippets if snippet.command]
        raise SnippetError(f"expected one command named {name!r}, got {len(found)}; the page has {known}")
    return found[0].text.strip()


def run_snippets(snippets: Iterable[Snippet]) -> int:
    """Run the snippets of one page in order, in the current folder.

    Returns:
        How many were run.

    Raises:
        SnippetError: at the first one that fails; those below it are not run.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    num_run = 0
    for snippet in snippets:
        if not snippet.runs:
            continue
        if snippet.language == "python":
            _run_python(snippet, namespace)
        else:
            _run_bash(snippet)
        num_run += 1
    return num_run


def _run_python(snippet: Snippet, namespace: dict[str, object]) -> None:
    # The empty lines in front make Python's line numbers those of the page.
    code = "\n" * (snippet.line - 1) + snippet.code()
    try:
        exec(compile(code, snippet.page, "exec"), namespace)
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == snippet.page:
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = [frame.lineno for frame in frames if frame.filename == snippet.page][-1]
        raise SnippetError(f"{snippet.page}:{line}: {type(error).__name__}: {error}") from error


def _run_bash(snippet: Snippet) -> None:
    # The environment's own console scripts come first, as in an activated environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", snippet.code()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BASH_TIMEOUT_SECONDS,
            env={**os.environ, "PATH": path},
        )
    except subprocess.TimeoutExpired as error:
        raise SnippetError(f"{snippet.place}: still running after {BASH_TIMEOUT_SECONDS} s") from error
    print(result.stdout)
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-20:])
        raise SnippetError(f"{snippet.place}: exit status {result.returncode}:\n{tail}")


def make_workspace(folder: Path) -> Path:
    """What the snippets find in their folder: `checkpoint/`, `clip.mp4`, `clip2.mp4`, `photo.jpg`."""
    from tiny import write_tiny_checkpoint

    write_media(folder)
    write_tiny_checkpoint(folder / "checkpoint")
    return folder


def write_media(folder: Path) -> None:
    """A landscape clip of 4 s, a portrait clip of 2 s (both 12 frames a second), and a photo."""
    from clips import barcode_frame, write_clip
    from PIL import Image

    write_clip(folder / "clip.mp4", num_frames=48, fps=12, width=96, height=64)
    write_clip(folder / "clip2.mp4", num_frames=24, fps=12, width=64, height=96)
    Image.fromarray(barcode_frame(1, width=96, height=64)).save(folder / "photo.jpg")
