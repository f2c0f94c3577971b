"""What the ablations show: a table, a plot, and a comparison with the paper's."""

import math
from pathlib import Path
from statistics import mean, variance

from video_panda import ShapesQA

# The 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
GROUPS = {"single objects": ShapesQA.basic_kinds, "about time": ShapesQA.time_kinds}
NO_INTERVAL = math.inf


def t_quantile(freedom: int) -> float:
    """For a two-sided 95 % interval; beyond the table that of the normal distribution, which is 0.2 below at most."""
    return T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96


def accuracies(runs: list[dict], group: str) -> list[float]:
    """Of each run, %: of a kind of question, or the mean of a group of kinds."""
    kinds = GROUPS.get(group, (group,))
    return [100 * mean(run[kind] for kind in kinds) for run in runs]


def with_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over the seeds; infinite for a single seed."""
    if len(values) < 2:
        return values[0], NO_INTERVAL
    return mean(values), t_quantile(len(values) - 1) * math.sqrt(variance(values) / len(values))


def difference(values: list[float], base: list[float]) -> tuple[float, float]:
    """Of two means, and half the width of its 95 % interval; both are taken to scatter alike over the seeds."""
    freedom = len(values) + len(base) - 2
    if min(len(values), len(base)) < 2:
        return mean(values) - mean(base), NO_INTERVAL
    pooled = ((len(values) - 1) * variance(values) + (len(base) - 1) * variance(base)) / freedom
    return mean(values) - mean(base), t_quantile(freedom) * math.sqrt(pooled * (1 / len(values) + 1 / len(base)))


def verdict(paper_change: float, change: float, half_width: float) -> str:
    """Whether a change that the paper found shows here."""
    if abs(change) <= half_width:
        return "does not show"
    return "shows" if (change < 0) == (paper_change < 0) else "the other way round"


def write_report(path: Path, rows: dict[str, list[dict]], variants: dict, base: str) -> None:
    """Two tables in Markdown.

    Args:
        path: the file.
        rows: for each variant, accuracies by kind of each run.
        variants: what the paper says of each; `table` and `paper`.
        base: name of the variant that the others are compared with.
    """
    kinds = [*GROUPS, *ShapesQA.kinds]
    lines = ["## What the paper found, and what shows here", ""]
    lines += ["| variant | table | MSVD-QA % | change | single objects, change | about time, change | |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|"]
    for name, runs in rows.items():
        if name == base:
            lines.append(f"| {name} | | {variants[name].paper[0]} | | | | |")
            continue
        paper_change = variants[name].paper[0] - variants[base].paper[0]
        changes = [difference(accuracies(runs, group), accuracies(rows[base], group)) for group in GROUPS]
        # What shows in either group shows.
        verdicts = {verdict(paper_change, *change) for change in changes}
        found = next(word for word in ("shows", "the other way round", "does not show") if word in verdicts)
        shown = " | ".join(_signed(*change) for change in changes)
        lines.append(
            f"| {_escaped(name)} | {variants[name].table} | {variants[name].paper[0]} | {paper_change:+.1f} | {shown} | {found} |"
        )
    lines += ["", "## By kind of question", ""]
    lines += ["| variant | seeds | " + " | ".join(kinds) + " |", "|---|--:|" + "--:|" * len(kinds)]
    for name, runs in rows.items():
        cells = [_plain(*with_interval(accuracies(runs, kind))) for kind in kinds]
        lines.append(f"| {_escaped(name)} | {len(runs)} | " + " | ".join(cells) + " |")
    chances = [100 * mean(ShapesQA.chance[kind] for kind in GROUPS.get(group, (group,))) for group in kinds]
    lines.append("| chance | | " + " | ".join(f"{chance:.0f}" for chance in chances) + " |")
    path.write_text("\n".join(lines) + "\n")


def _escaped(name: str) -> str:
    """As Markdown, which takes `<row>` for HTML."""
    return name.replace("<row>", "`<row>`")


def _plain(value: float, half_width: float) -> str:
    return f"{value:.0f}" if half_width == NO_INTERVAL else f"{value:.0f} ± {half_width:.0f}"


def _signed(value: float, half_width: float) -> str:
    return f"{value:+.1f}" if half_width == NO_INTERVAL else f"{value:+.1f} ± {half_width:.1f}"


def plot(path: Path, rows: dict[str, list[dict]], variants: dict, base: str) -> None:
    """Changes against the base: the paper's on the left, ours on the right; told apart by shape as well as by colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in rows if name != base]
    places = range(len(names))
    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=(9, 0.4 * len(names) + 1.6))
    left.barh(places, [variants[name].paper[0] - variants[base].paper[0] for name in names], color="0.6")
    left.set_title("the paper: MSVD-QA, points")
    for offset, group, marker, colour in (
        (-0.15, "single objects", "o", "#0072b2"),
        (0.15, "about time", "s", "#d55e00"),
    ):
        changes = [difference(accuracies(rows[name], group), accuracies(rows[base], group)) for name in names]
        widths = [0 if width == NO_INTERVAL else width for _, width in changes]
        right.errorbar(
            [change for change, _ in changes],
            [place + offset for place in places],
            xerr=widths,
            fmt=marker,
            color=colour,
            label=group,
        )
    right.set_title("here: ShapesQA, points")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncol=2, frameon=False)
    left.set_yticks(list(places), names)
    left.invert_yaxis()
    for axes in (left, right):
        axes.axvline(0, color="black", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
