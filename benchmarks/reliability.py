"""What the project promises about hostile input, memory and damage, measured in full: `results/reliability.json`.

    python benchmarks/reliability.py [SECTION ...] [--quick]

A section is a function of `SECTIONS` that gets `quick` and gives its figures; each says what was asked, what was found and
whether that holds. Sections that are run replace their old figures and leave the others. Leaves with status 1 if one does not
hold.
"""

import argparse
import datetime
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from report import RESULTS, describe_machine, markdown_table

# Name of the section: the module in this folder, and the function in it, (quick: bool) -> list[Figure].
SECTIONS = {
    "hostile files": ("reliability_decoding", "hostile_files_isolated"),
    "hostile files without isolation": ("reliability_decoding", "hostile_files_in_process"),
    "cost of isolation": ("reliability_decoding", "cost_of_isolation"),
    "opening files": ("reliability_decoding", "opening_files"),
    "data loader": ("reliability_decoding", "data_loader"),
    "paths and addresses": ("reliability_decoding", "paths_and_addresses"),
    "generate calls": ("reliability_numbers", "generate_calls"),
    "training steps": ("reliability_numbers", "training_steps"),
    "damaged checkpoints": ("reliability_damage", "damaged_checkpoints"),
    "damaged code": ("reliability_damage", "damaged_code"),
    "damaged runs": ("reliability_damage", "damaged_runs"),
    "full disk": ("reliability_damage", "full_disk"),
}
FILE = RESULTS / "reliability.json"


@dataclass
class Figure:
    """One thing that was asked and measured.

    Attributes:
        name: what.
        asked: the limit, in words.
        found: what was measured, in words or as a number.
        holds: whether it is what was asked; None where nothing was.
    """

    name: str
    asked: str
    found: str | int | float
    holds: bool | None


def run_sections(names: list[str], quick: bool, file: Path = FILE) -> bool:
    """Run sections one after the other and write each down as soon as it is done.

    Args:
        names: of `SECTIONS`.
        quick: a share of each.
        file: the results; figures of other sections in it stay.

    Returns:
        Whether all that was asked holds.
    """
    all_hold = True
    for name in names:
        module, function = SECTIONS[name]
        section: Callable[[bool], list[Figure]] = getattr(importlib.import_module(module), function)
        begin = time.perf_counter()
        figures = section(quick)
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"sections": {}}
        results["sections"][name] = {
            "machine": describe_machine("torch", "av", "decord2", "transformers"),
            "date": datetime.date.today().isoformat(),
            "quick": quick,
            "seconds": round(time.perf_counter() - begin, 1),
            "figures": [asdict(figure) for figure in figures],
        }
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        rows = [[f.name, f.asked, str(f.found), {True: "yes", False: "NO", None: ""}[f.holds]] for f in figures]
        print(f"## {name}\n\n{markdown_table(['', 'asked', 'found', 'holds'], rows)}\n", flush=True)
        all_hold = all_hold and all(figure.holds is not False for figure in figures)
    return all_hold


def main(arguments: list[str] | None = None) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a share of each section")
    parser.add_argument("--output", type=Path, default=FILE, help="the file of results")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; expected one of {', '.join(SECTIONS)}")
    return 0 if run_sections(options.sections or list(SECTIONS), options.quick, options.output) else 1


if __name__ == "__main__":
    sys.exit(main())
