"""What the benchmarks share: a description of the machine, Markdown tables, files under `results/`."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def describe_machine(*distributions: str) -> str:
    """Processor, cores, memory, system and versions, in one line."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    parts = [
        cpu[1].strip() if cpu else platform.machine(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"{int(total[1]) / 2**20:.0f} GiB memory",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in distributions),
    ]
    return ", ".join(parts)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Numbers are right-aligned, the first column is not."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(name: str, text: str) -> None:
    """Print a result and keep it in `results/NAME.md`."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
