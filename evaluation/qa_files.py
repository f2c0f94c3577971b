"""Reads questions and answers from the JSON files of benchmarks, and says exactly what is wrong with them."""

import json
from pathlib import Path


def read_entries(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """A JSON list of objects.

    Args:
        path: the file.
        fields: that each object must have.

    Returns:
        The objects.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list; file, number of the entry (counted from 0) and field are named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of objects, got {_kind(entries)}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {number}: expected an object, got {_kind(entry)}")
        if missing := [name for name in fields if name not in entry]:
            raise ValueError(f"{path}, entry {number}: {missing[0]!r} is missing, got {sorted(entry)}")
    return entries


def _kind(value: object) -> str:
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def text_of(entry: dict, name: str, place: str) -> str:
    """A text, or a number as one.

    Raises:
        ValueError: it is neither, or empty; the place is named.
    """
    value = entry[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {name!r} is {value!r}, expected a text")
    return value.strip()


def check_unique(ids: list[str], path: Path) -> None:
    """Raises: ValueError, if an id stands there twice; it is named."""
    seen: dict[str, int] = {}
    for number, own in enumerate(ids):
        if own in seen:
            raise ValueError(f"{path}: the id {own!r} stands at entries {seen[own]} and {number}, expected one")
        seen[own] = number
