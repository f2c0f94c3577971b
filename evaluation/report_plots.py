"""The plots of a report, as PNG files in memory. What was measured is told from what is published by form and filling, not by
colour alone, and so are the runs from each other: the plots read in grey print and by the colour-blind.

The same input gives the same bytes, whatever the user's own settings of matplotlib are.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .published import SAME_DATA, PublishedAnswers, PublishedConversation, published_mark, training_data
from .report_runs import MAX_SCORE
from .scores import Estimate

DPI = 200

# Okabe and Ito's palette, without the black of the outlines and the yellow that is lost on white.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")
MAX_SERIES = len(COLOURS)
_STARS = ((5, 1, 0), (4, 1, 0), "X", "P", (6, 1, 0), (8, 1, 0))  # (points, 1 for a star, degrees), or a name
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "||||")
_DASHES = ((4, 2), (1, 1.5), (6, 2, 1, 2), (2, 2), (8, 2), (6, 2, 1, 2, 1, 2), (3, 1, 3, 3), (1, 3), (10, 3, 2, 3))
_HOLLOW = ("o", "s", "^", "v", "D", "<", "p", ">", "h")
_GREY, _LIGHT = "#555555", "#d5d5d5"
_STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a name is a "$"
}


@dataclass(frozen=True)
class Measured:
    """A measured point.

    Attributes:
        num_visual_parameters: above 0.
        accuracy: share with its interval.
        label: stands beside it.
        series: what has one colour and marker in all panels, and stands in the legend.
    """

    num_visual_parameters: int
    accuracy: Estimate
    label: str
    series: str


@dataclass(frozen=True)
class Panel:
    """One benchmark of the plot of accuracy against visual parameters."""

    title: str
    published: Sequence[PublishedAnswers]
    measured: Sequence[Measured]


@contextmanager
def _style():
    """Our settings, and matplotlib's own for the rest."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def check_matplotlib() -> None:
    """Raises: ImportError, which says what to install, if plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("drawing the plots needs matplotlib: pip install 'video-panda[report]'") from error


def _new_figure(width: float, height: float):
    """A figure of its own, in inches; pyplot would keep it, and may open a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=DPI, metadata={"Software": None})
    return written.getvalue()


def _add_legend(figure, handles: Sequence, labels: Sequence[str]) -> None:
    """A legend below all, for which the figure grows."""
    width, height = figure.get_size_inches()
    labels = [_lines(label, int((width - 0.8) / 0.07)) for label in labels]
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=1, handletextpad=0.6, labelspacing=0.55)
    figure.set_size_inches(width, height + legend.get_window_extent(figure.canvas.get_renderer()).height / DPI)


def _lines(label: str, width: int) -> str:
    """The label in up to three lines."""
    return textwrap.fill(label, width, break_on_hyphens=False, max_lines=3, placeholder="\N{HORIZONTAL ELLIPSIS}")


def shorten(label: str, length: int = 34) -> str:
    """The label, or its beginning and end, where it is too long to stand in a plot."""
    if len(label) <= length:
        return label
    head = (length - 1) // 2
    return f"{label[:head]}\N{HORIZONTAL ELLIPSIS}{label[head + 1 - length :]}"


# --- accuracy against visual parameters ---------------------------------------------------------------------------------


def draw_accuracy(panels: Sequence[Panel]) -> bytes:
    """Accuracy against visual parameters in log scale, a panel a benchmark, as in the paper's Figure 1.

    Args:
        panels: at least one.

    Returns:
        The PNG file.
    """
    names = list(dict.fromkeys(point.series for panel in panels for point in panel.measured))
    with _style():
        num_columns = min(2, len(panels))
        num_rows = math.ceil(len(panels) / num_columns)
        figure = _new_figure(5.6 * num_columns + (1.2 if num_columns == 1 else 0), 4.1 * num_rows)
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08, hspace=0.04, wspace=0.03)
        axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
        for own, panel in zip(axes, panels):
            _draw_panel(own, panel, names, _limits(panels))
        for unused in list(axes)[len(panels) :]:
            unused.set_axis_off()
        _accuracy_legend(figure, panels, names)
        # Labels are put where there is room, which is known when everything else has its place.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for own, panel in zip(figure.axes, panels):
            _place_labels(own, panel)
        return _png(figure)


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """Of the axis of parameters, the same in all panels."""
    counts = [point.num_visual_parameters for panel in panels for point in (*panel.published, *panel.measured)]
    return min(counts) / 1.9, max(counts) * 2.4


def _draw_panel(axes, panel: Panel, names: Sequence[str], limits: tuple[float, float]) -> None:
    for point in panel.published:
        if point.accuracy is not None:
            # Above the stars, in which they would be lost: a model that is measured is as large as when it was published.
            axes.plot(point.num_visual_parameters, point.accuracy, ls="", zorder=7, **_hollow(point.trained_on))
    for point in panel.measured:
        place = names.index(point.series)
        value = 100 * point.accuracy.value
        bar = [
            [_length(point.accuracy.value, point.accuracy.low)],
            [_length(point.accuracy.high, point.accuracy.value)],
        ]
        axes.errorbar(
            point.num_visual_parameters, value, yerr=bar, fmt="none", ecolor="black", elinewidth=1, capsize=3, zorder=4
        )
        axes.plot(
            point.num_visual_parameters,
            value,
            ms=15,
            zorder=5,
            **_star(place),
        )
    values = [point.accuracy for point in panel.published if point.accuracy is not None]
    values += [100 * edge for point in panel.measured for edge in (point.accuracy.low, point.accuracy.high)]
    room = max(3.0, 0.09 * (max(values) - min(values)))
    axes.set_ylim(max(min(values) - room, -2), min(max(values) + room, 104))
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    _label_counts(axes, limits)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("visual parameters (log scale)")
    axes.set_ylabel("judged accuracy, %")


def _hollow(trained_on: str) -> dict:
    """Marker of a published point; the square fits into the circle, so that both are seen at the same place."""
    form = {"marker": "s", "ms": 4.6} if trained_on == SAME_DATA else {"marker": "o", "ms": 7.2}
    return {**form, "mfc": "white", "mec": _GREY, "mew": 1.1}


def _star(place: int) -> dict:
    """Marker and colour; after all colours each comes with another form."""
    marker = _STARS[(place + place // len(COLOURS)) % len(_STARS)]
    return {"marker": marker, "mfc": COLOURS[place % len(COLOURS)], "mec": "black", "mew": 0.8}


def _length(upper: float, lower: float) -> float:
    """Of an error bar, in percent; rounding may put a mean a hair beyond the end of its interval."""
    return 100 * max(0.0, upper - lower)


def _label_counts(axes, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    exponents = range(math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1])) + 1)
    for leads in ((1, 2, 5), (1, 3), (1,)):
        ticks = [lead * 10**exponent for exponent in exponents for lead in leads]
        ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
        if len(ticks) <= 8:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [short_count(tick) for tick in ticks])


def short_count(count: float) -> str:
    """45.07 M"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g}"


def _accuracy_legend(figure, panels: Sequence[Panel], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    kinds = {point.trained_on for panel in panels for point in panel.published}
    handles = [Line2D([], [], ls="", **_hollow(kind)) for kind in sorted(kinds)]
    labels = [f"{published_mark()}: trained on {training_data(kind)} data" for kind in sorted(kinds)]
    for place, name in enumerate(names):
        handles.append(Line2D([], [], ls="", ms=12, **_star(place)))
        labels.append(f"measured: {name}")
    _add_legend(figure, handles, labels)


def _place_labels(axes, panel: Panel) -> None:
    """Names beside the points, each at the first of a row of places where it touches nothing; the same every time."""
    from matplotlib.transforms import Bbox

    renderer, scale = axes.figure.canvas.get_renderer(), DPI / 72
    points = [
        (point.num_visual_parameters, 100 * point.accuracy.value, point.label, True)
        for point in sorted(panel.measured, key=lambda point: point.num_visual_parameters)
    ]
    points += [
        (point.num_visual_parameters, point.accuracy, point.model, False)
        for point in sorted(panel.published, key=lambda point: point.num_visual_parameters)
        if point.accuracy is not None
    ]
    taken = []
    for x, y, _, is_measured in points:
        centre, half = axes.transData.transform((x, y)), scale * (8 if is_measured else 4)
        taken.append(Bbox([centre - half, centre + half]))
    num_points = len(taken)
    for point in panel.measured:
        edges = [(point.num_visual_parameters, 100 * edge) for edge in (point.accuracy.low, point.accuracy.high)]
        taken.append(Bbox(axes.transData.transform(edges)).padded(3 * scale))
    inside = axes.get_window_extent(renderer)
    for number, (x, y, name, is_measured) in enumerate(points):
        style = {"fontweight": "bold"} if is_measured else {"color": "#333333"}
        text = axes.annotate(
            shorten(name),
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5 if is_measured else 8,
            zorder=6,
            in_layout=False,
            **style,
        )
        size = text.get_window_extent(renderer).size / scale
        costs = {}
        for offset in _places(size, 9 if is_measured else 5.5):
            text.set_position(offset)
            box = text.get_window_extent(renderer).padded(scale)
            # Its own marker is near in any case.
            others = [other for place, other in enumerate(taken) if place != number or place >= num_points]
            costs[offset] = _outside(box, inside) + sum(_shared(box, other) for other in others)
            if costs[offset] == 0:
                break
        best = min(costs, key=costs.get)
        text.set_position(best)
        taken.append(text.get_window_extent(renderer))
        _lead(axes, (x, y), best, size, 9 if is_measured else 5.5)


def _places(size: Sequence[float], gap: float) -> list[tuple[float, float]]:
    """Where the lower left corner of a text of that size can be, from near to far, in points from its point."""
    width, height = (float(number) for number in size)
    places = []
    for reach in (0.0, 7.0, 14.0, 22.0, 31.0, 41.0):
        far = gap + reach
        places += [(far, -height / 2), (-far - width, -height / 2)]
        places += [(-width / 2, far - 2), (-width / 2, -far - height + 2)]
        for across in (0.7 * far, 0.35 * far):
            places += [(across, far - 3), (across, -far - height + 3)]
            places += [(-across - width, far - 3), (-across - width, -far - height + 3)]
    return places


def _shared(box, other) -> float:
    """The area that two boxes share."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(width, 0) * max(height, 0)


def _outside(box, inside) -> float:
    """The area of a box that is not inside another, weighing more than sharing does."""
    return 10 * max(0.0, box.width * box.height - _shared(box, inside))


def _lead(axes, point: tuple[float, float], offset: tuple[float, float], size: Sequence[float], gap: float) -> None:
    """A thin line from a point to its label, where that stands apart."""
    width, height = (float(number) for number in size)
    near = (min(max(0, offset[0]), offset[0] + width), min(max(0, offset[1]), offset[1] + height))
    if math.hypot(*near) > gap + 3:
        line = {"arrowstyle": "-", "color": "#888888", "lw": 0.6, "shrinkA": 0, "shrinkB": gap - 2}
        axes.annotate("", point, xytext=near, textcoords="offset points", arrowprops=line, in_layout=False)


# --- five criteria ------------------------------------------------------------------------------------------------------


def draw_criteria(
    criteria: Sequence[str], published: Sequence[PublishedConversation], measured: Mapping[str, Sequence[float]]
) -> bytes:
    """A chart of one axis a criterion, each from 0 to 5.

    Args:
        criteria: their names.
        published: rows of Table 2.
        measured: by label, a score for each criterion; at most `MAX_SERIES`.

    Returns:
        The PNG file.
    """
    angles = [2 * math.pi * place / len(criteria) for place in range(len(criteria))]
    closed = [*angles, 0.0]
    with _style():
        figure = _new_figure(9.2, 6.0)
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        axes.set_ylim(0, MAX_SCORE)
        axes.grid(False)
        axes.spines["polar"].set_visible(False)
        for level in range(1, MAX_SCORE + 1):
            axes.plot(closed, [level] * len(closed), color=_LIGHT, lw=1.0 if level == MAX_SCORE else 0.6, zorder=0)
        for angle in angles:
            axes.plot([angle, angle], [0, MAX_SCORE], color=_LIGHT, lw=0.6, zorder=0)
        axes.set_yticks([])
        # Between two axes, where the lines are less dense: there the pentagons come nearer to the centre.
        half = math.pi / len(criteria)
        box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85}
        for level in range(MAX_SCORE + 1):
            place = (-half, level * math.cos(half))
            axes.text(*place, str(level), ha="center", va="center", fontsize=7.5, color="#333333", zorder=6, bbox=box)
        axes.set_xticks([])
        for angle, criterion in zip(angles, criteria):
            side = round(math.sin(angle), 6)
            align = "center" if side == 0 else "left" if side > 0 else "right"
            rise = "bottom" if math.cos(angle) > 0.9 else "top" if math.cos(angle) < -0.5 else "center"
            axes.text(angle, MAX_SCORE + 0.15, criterion, ha=align, va=rise, fontsize=10)
        for place, row in enumerate(published):
            scores = [row.scores[criterion] for criterion in criteria]
            axes.plot(closed, [*scores, scores[0]], label=row.model, **_published_line(row, place))
        published_handles, published_labels = axes.get_legend_handles_labels()
        lines = []
        for place, (label, scores) in enumerate(measured.items()):
            style = {"color": COLOURS[place], "marker": _STARS[place], "mec": "black"}
            lines += axes.plot(closed, [*scores, scores[0]], lw=2.2, ms=12, mew=0.7, zorder=5, **style)
            lines[-1].set_label(_lines(label, 40))
        columns = {"loc": "upper left", "alignment": "left", "handlelength": 4.2, "labelspacing": 0.7}
        own = figure.legend(lines, [line.get_label() for line in lines], title="measured", **columns)
        others = figure.legend(published_handles, published_labels, title=published_mark(), **columns)
        _stack_at_right(figure, axes, [own, others])
        return _png(figure)


def _published_line(row: PublishedConversation, place: int) -> dict:
    """Thin, broken and grey; the paper's own model black."""
    if row.model.startswith("Video-Panda"):
        return {
            "color": "black",
            "lw": 1.4,
            "dashes": (5, 1.5, 1, 1.5),
            "marker": "D",
            "ms": 4.5,
            "mfc": "white",
            "zorder": 6,
        }
    shade = ("#777777", "#999999", "#5a5a5a")[place % 3]
    dashes, marker = _DASHES[place % len(_DASHES)], _HOLLOW[place % len(_HOLLOW)]
    return {"color": shade, "lw": 0.9, "dashes": dashes, "marker": marker, "ms": 4, "mfc": "white", "mew": 0.8}


def _stack_at_right(figure, axes, legends: Sequence) -> None:
    """The chart at the left, the legends below each other at the right, and the figure as high as they need."""
    figure.set_layout_engine("none")
    for legend in legends:
        legend.get_title().set_fontweight("bold")
    renderer = figure.canvas.get_renderer()
    heights = [legend.get_window_extent(renderer).height / DPI for legend in legends]
    widest = max(legend.get_window_extent(renderer).width / DPI for legend in legends)
    # In inches; a pentagon does not reach as far down as up.
    size, gap, left = 4.8, 0.15, 1.0
    width, height = left + size + 0.7 + widest, max(size + 0.4, sum(heights) + 2 * gap)
    figure.set_size_inches(width, height)
    axes.set_position([left / width, (height - size - 0.5) / height, size / width, size / height])
    top = (height + sum(heights) + gap) / 2
    for legend, own in zip(legends, heights):
        legend.set_bbox_to_anchor(((width - widest - 0.1) / width, top / height), figure.transFigure)
        top -= own + gap


# --- by kind of question ------------------------------------------------------------------------------------------------


def draw_kinds(
    title: str,
    kinds: Sequence[str],
    series: Mapping[str, Mapping[str, Estimate]],
    chances: Mapping[str, float],
    measure: str,
) -> bytes:
    """Bars of accuracy by kind of question, with intervals, beside chance.

    Args:
        title: of the plot.
        kinds: from top to bottom.
        series: by label, shares by kind; at most `MAX_SERIES`.
        chances: by kind; those without one have no line.
        measure: what the bars are, for the axis.

    Returns:
        The PNG file.
    """
    thickness = 0.8 / len(series)
    with _style():
        height = len(kinds) * (0.24 + 0.17 * len(series)) + 0.9
        figure = _new_figure(7.4, height)
        axes = figure.add_subplot()
        for place, (label, shares) in enumerate(series.items()):
            asked = [(row, shares[kind]) for row, kind in enumerate(kinds) if kind in shares]
            rows = [row - 0.4 + (place + 0.5) * thickness for row, _ in asked]
            bars = [
                [_length(own.value, own.low) for _, own in asked],
                [_length(own.high, own.value) for _, own in asked],
            ]
            axes.barh(
                rows,
                [100 * own.value for _, own in asked],
                thickness * 0.92,
                xerr=bars,
                color=COLOURS[place],
                hatch=_HATCHES[place],
                edgecolor="black",
                linewidth=0.6,
                error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "black"},
                label=f"measured: {label}",
            )
            for row, (_, own) in zip(rows, asked):
                end = 100 * max(own.high, own.value) + 1.2
                axes.text(end, row, f"{100 * own.value:.1f}", va="center_baseline", fontsize=7, color="#222222")
        known = [row for row, kind in enumerate(kinds) if kind in chances]
        if known:
            places = [100 * chances[kinds[row]] for row in known]
            edges = [[row + side for row in known] for side in (-0.46, 0.46)]
            axes.vlines(places, *edges, color="white", lw=3.0, zorder=4)
            axes.vlines(places, *edges, color="black", lw=1.6, ls=(0, (2, 1)), zorder=5, label="chance")
        axes.set_yticks(range(len(kinds)), [shorten(kind, 30) for kind in kinds])
        axes.set_ylim(len(kinds) - 0.45, -0.55)
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_bounds(0, 100)
        if len(kinds) > 1:
            axes.axhline(len(kinds) - 1.5, color="#777777", lw=0.6, zorder=0)  # the last are all together
        axes.set_xlabel(f"{measure}, % (thin lines: 95% intervals)")
        axes.set_title(f"{title}: {measure} by kind of question", loc="left")
        _add_legend(figure, *axes.get_legend_handles_labels())
        return _png(figure)
