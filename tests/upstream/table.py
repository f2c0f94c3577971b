"""The table of docs/upstream_tests.md: every upstream test that does not run as it is, with its reason."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "upstream_tests.md"
# left out: skipped because of this row. skips itself: by upstream's own condition. needs ...: likewise, and runs where that
# is there. slow: runs with --slow. replaced: another body of ours under the same name. setting: a value upstream asks for.
KINDS = ("left out", "skips itself", "needs a GPU", "needs a package", "slow", "replaced", "setting")


@dataclass(frozen=True)
class Row:
    """One row: `tests` are names or patterns (`*`) of tests of one class; `classes`: "installed", "remote" or "both"."""

    test_class: str
    tests: tuple[str, ...]
    kind: str
    classes: str
    reason: str

    def matches(self, test_class: str, test: str, classes: str) -> bool:
        """Whether this row is about that test in a run of that kind of classes."""
        return (
            self.test_class == test_class
            and self.classes in ("both", classes)
            and any(fnmatchcase(test, pattern) for pattern in self.tests)
        )


def read_table(page: Path = PAGE) -> list[Row]:
    """The rows, in the order of the page."""
    rows = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("| `") or len(cells) != 5:
            continue
        test_class, tests, kind, classes, reason = cells
        rows.append(Row(test_class.strip("`"), tuple(re.findall(r"`([^`]+)`", tests)), kind, classes, reason))
    return rows
