"""What must not leave somebody's disk: access tokens, private keys, and paths of their machine."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

# Name -> what it looks like. They ask for digits where words could otherwise be taken for a key.
SECRETS = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "an OpenAI-like key": re.compile(r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,})"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{10,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
}
# Not behind a letter, a digit or a dot: "https://host/home/page" is no path of a machine.
_UNIX_PATH = re.compile(
    r"(?<![\w.~/-])/(?:home|Users|root|mnt|media|tmp|scratch|gpfs|lustre|workspace|private|Volumes|srv|opt)/[\w.@+-]+[^\s\"'`,;)]*"
)
_WINDOWS_PATH = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]:(?:\\{1,2}[\w .@+-]+){2,}")
# Whose words may look like anything: of these only what the patterns above find.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
_MAX_TEXT_BYTES = 256 * 2**20
_BYTES_AT_A_TIME, _OVERLAP_BYTES = 16 * 2**20, 256


def find_leaks(text: str, name: str, own_paths: tuple[str, ...] = ()) -> Iterator[str]:
    """Tokens, keys and absolute paths in the text of a file, one line each; secrets are not shown whole.

    Args:
        text: the content.
        name: of the file, which decides whether it is read as JSON.
        own_paths: further paths that must not stand there, such as the user's home.
    """
    for kind, match in _matches(text):
        line = text.count("\n", 0, match.start()) + 1
        shown = match[0] if kind.endswith("path") else f"{match[0][:6]}..."
        yield f"line {line}: {kind} ({shown})"
    found = set()
    for path in own_paths:
        start = text.find(path)
        if start >= 0 and not any(match.start() <= start < match.end() for _, match in _matches(text)):
            yield f"line {text.count(chr(10), 0, start) + 1}: an absolute path ({path})"
            found.add(path)
    if name.endswith(".json") and PurePosixPath(name).name not in _VOCABULARIES:
        for value in _absolute_values(text):
            if value not in found and not any(match[0] in value for _, match in _matches(value)):
                yield f"an absolute path ({value})"


def _matches(text: str) -> Iterator[tuple[str, re.Match]]:
    for kind, pattern in SECRETS.items():
        for match in pattern.finditer(text):
            yield kind, match
    for pattern in (_UNIX_PATH, _WINDOWS_PATH):
        for match in pattern.finditer(text):
            yield "an absolute path", match


def _absolute_values(text: str) -> list[str]:
    """Values in a JSON file that are absolute paths of any kind, wherever they point."""
    try:
        return list(dict.fromkeys(_paths_in(json.loads(text))))
    except ValueError:
        return []


def _paths_in(value) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _paths_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner)
    elif isinstance(value, str) and "\n" not in value:
        is_posix = PurePosixPath(value).is_absolute() and len(PurePosixPath(value).parts) > 2
        if is_posix or PureWindowsPath(value).drive or value.startswith(("~/", "file://")):
            yield value


def find_secrets(path: Path) -> Iterator[str]:
    """Tokens and keys in a file that is no text; paths are not looked for: other people's tokenizers hold such."""
    start, kept = 0, b""
    found = set()
    with path.open("rb") as file:
        while chunk := file.read(_BYTES_AT_A_TIME):
            # What lies across the border of two pieces is seen whole in the second.
            text = (kept + chunk).decode("latin-1")
            for kind, pattern in SECRETS.items():
                for match in pattern.finditer(text):
                    place = start - len(kept) + match.start()
                    if (kind, place) not in found:
                        found.add((kind, place))
                        yield f"byte {place}: {kind} ({match[0][:6]}...)"
            start, kept = start + len(chunk), chunk[-_OVERLAP_BYTES:]


def read_text(path: Path) -> str | None:
    """The content of a text file; None for another, or one too large to be a text."""
    if path.stat().st_size > _MAX_TEXT_BYTES:
        return None
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
