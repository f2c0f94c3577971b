"""The folders of the phases: whose work they hold, and whether it is done."""

import json
from dataclasses import asdict
from pathlib import Path

RECIPE_FILE = "recipe.json"
_MARK = "complete"


def claim(folder: Path, recipe) -> None:
    """Write the recipe into its folder, or compare it with what is there.

    Raises:
        ValueError: the folder holds the work of another recipe.
    """
    path = folder / RECIPE_FILE
    own = json.loads(json.dumps(asdict(recipe)))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=2))
    found = json.loads(path.read_text())
    if found != own:
        names = [name for name in own if own[name] != found.get(name)]
        raise ValueError(f"{path} is of another recipe (it differs in {', '.join(names)}); choose another folder")


def is_complete(folder: Path) -> bool:
    """Whether all files of a phase have been written."""
    return (folder / _MARK).is_file()


def mark_complete(folder: Path) -> None:
    """To be called after the last file: a model's configuration is written before its weights, and says nothing."""
    (folder / _MARK).touch()
