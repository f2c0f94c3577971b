"""Print a command of README.md by its name: `python3 .ci/readme_command.py NAME [README]`.

The README marks its two commands with `<!-- command: main-job -->` and `<!-- command: test -->` on the line above
their fence. Needs the standard library only: .ci/run calls it before anything is installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from snippets import SnippetError, named_command, read_page  # noqa: E402


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    name, page = arguments[0], Path(arguments[1]) if len(arguments) == 2 else ROOT / "README.md"
    try:
        print(named_command(read_page(page), name))
    except (SnippetError, OSError) as error:
        print(f"readme_command: {page}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
