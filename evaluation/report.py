"""The comparison of runs with each other and with the published figures, as `report.md`, `report.html` and plots.

The files follow from the folders of the runs alone: the same bytes every time. Every row and every mark in a plot says whether
it was measured or is published.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

from .benchmarks import BENCHMARKS
from .files import write_whole
from .judging import JudgeRow, JudgeTable
from .published import published_answers, published_conversations, published_mark, published_results, training_data
from .report_page import Notes, Page, Part, Picture, Row, Section, Table
from .report_plots import (
    MAX_SERIES,
    Measured,
    Panel,
    check_matplotlib,
    draw_accuracy,
    draw_criteria,
    draw_kinds,
    short_count,
)
from .report_runs import MAX_SCORE, TOTAL_KIND, Run, one_line, read_runs
from .scores import Estimate, ScoreRow
from .video_chatgpt import VideoChatGPTBenchmark

MARKDOWN_FILE, HTML_FILE = "report.md", "report.html"
MEASURED = "measured"
_ORDER = [benchmark.name for benchmark in BENCHMARKS]
_CRITERIA = VideoChatGPTBenchmark.criteria
# Of `about` in run.json, as columns.
_MACHINE = {
    "device": "device",
    "dtype": "dtype",
    "package_version": "video-panda",
    "torch_version": "torch",
    "transformers_version": "transformers",
}
_MAX_OPTION_LENGTH = 120


def write_report(
    outputs: Sequence[str | os.PathLike], destination: str | os.PathLike, *, draw_plots: bool = True
) -> list[Path]:
    """Compare runs with each other and with the figures of the paper.

    Args:
        outputs: folders of complete runs, as `evaluate` has left them; tables keep their order.
        destination: folder for the report, made if it is not there; files of an earlier report are replaced.
        draw_plots: whether to draw; it needs the extra `report`.

    Returns:
        The files: `report.md`, `report.html`, and the plots, PNG files that `report.md` shows and `report.html` holds.

    Raises:
        ValueError: a folder is no complete run, is given twice, or holds what cannot be; it is named.
        ImportError: a plot is to be drawn and matplotlib is not there.
        OSError: a file cannot be read, or the report not be written; then no file of it has changed.
    """
    runs = read_runs(outputs)
    page = _page(runs, draw_plots)
    files = {MARKDOWN_FILE: page.to_markdown().encode(), HTML_FILE: page.to_html().encode()}
    files |= {picture.name: picture.png for picture in page.pictures}
    return _write_files(Path(destination), files)


def _write_files(destination: Path, files: Mapping[str, bytes]) -> list[Path]:
    """All files or none: what is most likely to fail is done before the first is replaced."""
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(f"{destination} is a file; expected a folder for the report, or a new name")
    for name in files:
        if (destination / name).is_dir():
            raise IsADirectoryError(f"{destination / name} is a folder, and a file of the report is called so")
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=destination) as partial:
        for name, content in files.items():
            write_whole(Path(partial, name), content)
        for name in reversed(files):  # the pages come last, when all that they show is there
            os.replace(Path(partial, name), destination / name)
    return [destination / name for name in files]


# --- the page -----------------------------------------------------------------------------------------------------------


def _page(runs: Sequence[Run], draw_plots: bool) -> Page:
    drawing = _Drawing(draw_plots)
    sections = [_runs_section(runs)]
    if any(published_answers(run.title) for run in runs):
        sections.append(Section("Accuracy against visual parameters", _accuracy_parts(runs, drawing)))
    names = {run.benchmark: None for run in runs}
    for name in sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        own = [run for run in runs if run.benchmark == name]
        sections.append(Section(own[0].title, _benchmark_parts(own, drawing)))
    judge, paper = published_results()["judge"], published_results()["paper"]
    parts: list[Part] = [
        f"Rows marked “{MEASURED}” were measured: their numbers come from the runs below. Rows marked "
        f"“{published_mark()}” were not measured again: their numbers are copied from the tables of {paper}, where "
        f"{judge} was the judge.",
        "Different judges are on different scales, and exact match is on one of its own: it has a table of its own, and "
        "every verdict stands beside its judge and the judge's date. Intervals are 95% intervals. “200 of 13157” questions: "
        "the run was asked, or could answer, only a part.",
    ]
    if not drawing.names:
        why = "no plot applies to these runs" if draw_plots else "plots were not asked for"
        parts.append(f"Nothing is drawn: {why}.")
    return Page("Comparison of evaluation runs", parts, sections)


class _Drawing:
    """Draws, if it is wanted, and gives every picture a name of its own.

    Args:
        is_wanted: whether to draw at all.

    Attributes:
        names: of the pictures that were drawn.
    """

    def __init__(self, is_wanted: bool):
        self.is_wanted = is_wanted
        self.names: list[str] = []

    def picture(self, name: str, alternative: str, caption: str, draw: Callable[[], bytes]) -> list[Part]:
        """The picture that `draw` gives, if pictures are wanted."""
        if not self.is_wanted:
            return []
        check_matplotlib()
        names = (f"{name}{'' if number == 1 else f'-{number}'}.png" for number in count(1))
        self.names.append(next(own for own in names if own not in self.names))
        return [Picture(self.names[-1], draw(), alternative, caption)]


def _runs_section(runs: Sequence[Run]) -> Section:
    columns = ["run", "folder", "benchmark", "split", "model", "weights", "date", "options"]
    rows = [
        Row(
            [
                str(run.number),
                run.folder,
                run.title,
                run.known("split"),
                run.model_name,
                run.digest[:8] or "unknown",
                run.known("date"),
                _options(run),
                _parameters(run, "num_visual_parameters"),
                _parameters(run, "num_parameters"),
            ]
        )
        for run in runs
    ]
    numbers = ["visual parameters", "parameters"]
    parts: list[Part] = [Table("What was measured", [*columns, *numbers], rows, len(columns))]
    machines = [([run.known(name) for name in _MACHINE], run) for run in runs]
    parts.append(_grouped("Machines and versions", list(_MACHINE.values()), machines))
    judges = [(_judge_cells(table), run) for run in runs for table in run.judged]
    if judges:
        columns = ["judge", "backend", "server", "templates", "temperature", "date"]
        parts.append(_grouped("Judges", columns, judges))
    return Section("Runs", parts)


def _grouped(title: str, columns: Sequence[str], entries: Sequence[tuple[Sequence[str], Run]]) -> Table:
    """Each different row once, with the runs that it is about."""
    groups: dict[tuple[str, ...], dict[str, None]] = {}
    for cells, run in entries:
        groups.setdefault(tuple(cells), {})[str(run.number)] = None
    rows = [Row([*cells, ", ".join(numbers)]) for cells, numbers in groups.items()]
    return Table(title, [*columns, "runs"], rows, len(columns) + 1)


def _options(run: Run) -> str:
    texts = []
    for name, value in run.options.items():
        text = one_line(f"{name} {json.dumps(value, ensure_ascii=False)}")
        texts.append(text if len(text) <= _MAX_OPTION_LENGTH else text[: _MAX_OPTION_LENGTH - 3] + "...")
    return ", ".join(texts)


def _parameters(run: Run, name: str) -> str:
    value = run.about.get(name)
    return short_count(value) if isinstance(value, int) else "unknown"


def _judge_cells(table: JudgeTable) -> tuple[str, ...]:
    judge = table.judge
    templates = ", ".join(dict.fromkeys(map(str, (judge.get("templates") or {}).values())))
    known = [
        judge["judge"],
        judge.get("backend"),
        _server(judge),
        templates,
        judge.get("temperature"),
        judge.get("date"),
    ]
    return tuple("" if value is None else one_line(value) for value in known)


def _server(judge: Mapping) -> str:
    """Host and port only: an address may hold a password."""
    address = str(judge.get("base_url") or "").rpartition("@")[2]
    return re.split("[/?#]", address.rpartition("://")[2])[0]


def _judge_name(table: JudgeTable) -> str:
    return f"{table.judge['judge']} ({one_line(table.judge.get('date') or 'date unknown')})"


# --- accuracy against visual parameters ---------------------------------------------------------------------------------


def _accuracy_parts(runs: Sequence[Run], drawing: _Drawing) -> list[Part]:
    measured: dict[str, list[Measured]] = {}
    left_out = []
    for run in runs:
        if not published_answers(run.title):
            continue
        what = f"Run {run.number} ({run.model}, {run.title}) is not in the plot: "
        if not run.judged:
            left_out.append(f"{what}no judge has judged it, and exact match is on another scale.")
        elif not run.num_visual_parameters:
            left_out.append(f"{what}the number of its visual parameters is {run.num_visual_parameters or 'unknown'}.")
        else:
            for table in run.judged:
                if table.total.accuracy is None:
                    left_out.append(f"{what}{table.judge['judge']} has given no verdict that can be read.")
                    continue
                series = f"{run.model}, judged by {table.judge['judge']}"
                part = f" ({_num_questions(run)})" if run.is_part else ""
                label = f"run {run.number}{part}"
                point = Measured(run.num_visual_parameters, table.total.accuracy, label, series)
                measured.setdefault(run.title, []).append(point)
    titles = [benchmark.title for benchmark in BENCHMARKS if benchmark.title in measured]
    if not titles:
        return ["Not drawn: no judged run of these sets.", Notes(left_out)]
    picture = drawing.picture(
        "accuracy-by-visual-parameters",
        f"Judged accuracy against visual parameters in log scale, {', '.join(titles)}: published models and measured runs. "
        "The numbers are in the tables below.",
        f"Judged accuracy against visual parameters, as in Figure 1 of {published_results()['paper']}. Hollow grey "
        f"circles and squares: published, judged by {published_results()['judge']}. Filled stars: measured, judged by the "
        "judge in the legend, with 95% intervals. Different judges are on different scales.",
        lambda: draw_accuracy([Panel(title, published_answers(title), measured[title]) for title in titles]),
    )
    return [*picture, *([Notes(left_out)] if left_out else [])]


# --- benchmarks ---------------------------------------------------------------------------------------------------------


def _benchmark_parts(runs: Sequence[Run], drawing: _Drawing) -> list[Part]:
    """What is said about one benchmark."""
    is_conversation = runs[0].benchmark == VideoChatGPTBenchmark.name
    parts = _conversation_parts(runs, drawing) if is_conversation else _judged_parts(runs)
    parts.append(_unjudged_table(runs))
    parts += [Notes(notes)] if (notes := _notes(runs)) else []
    if is_conversation:
        return parts
    own = {f"run {run.number}, {run.model}": {row.kind: row for row in _all_rows(run.scores)} for run in runs}
    parts += _kind_parts(runs, own, "exact match", "kinds", drawing)
    judged: dict[str, dict[str, ScoreRow | JudgeRow]] = {}
    for run in runs:
        for table in run.judged:
            rows = {row.kind: row for row in _all_rows(table) if row.accuracy is not None}
            if rows:
                judged[_unused(f"run {run.number}, {run.model}, judged by {table.judge['judge']}", judged)] = rows
    return parts + (_kind_parts(runs, judged, "judged accuracy", "judged-kinds", drawing) if judged else [])


def _unused(label: str, used: Mapping) -> str:
    """The label, with a number if it is there: one judge may have been asked at two places."""
    labels = (label if number == 1 else f"{label} [{number}]" for number in count(1))
    return next(own for own in labels if own not in used)


def _all_rows(table) -> list:
    """Rows and total, the total only where it is not the only row once more."""
    return [*table.rows, table.total] if len(table.rows) != 1 else list(table.rows)


def _percent(estimate: Estimate | None) -> str:
    return _interval(estimate, 100, 1)


def _interval(estimate: Estimate | None, factor: int, digits: int) -> str:
    """64.7 (63.9 to 65.5)"""
    if estimate is None:
        return ""
    value, low, high = (f"{factor * number:.{digits}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _exact(row: ScoreRow) -> Estimate:
    return Estimate(row.accuracy, row.low, row.high)


def _num_questions(run: Run) -> str:
    """13157, or 200 of 13157."""
    number = run.scores.total.num_questions
    return f"{number} of {run.num_questions_full}" if run.is_part else str(number)


def _measured_cells(run: Run) -> list[str]:
    return [MEASURED, str(run.number), run.model]


def _unjudged_table(runs: Sequence[Run]) -> Table:
    columns = ["source", "run", "model", "split", "date", "questions", "left out", "unanswered"]
    columns += ["exact match % (95%)", "contains the truth % (95%)", "token F1 % (95%)"]
    has_chance = any(run.scores.total.chance is not None for run in runs)
    if has_chance:
        columns += ["chance %", "mean of kinds %"]
    rows = []
    for run in runs:
        total = run.scores.total
        cells = [*_measured_cells(run), run.known("split"), run.known("date"), _num_questions(run)]
        cells += [str(run.scores.num_left_out), str(total.num_unanswered), _percent(_exact(total))]
        cells += [_percent(total.containment), _percent(total.token_f1)]
        if has_chance:
            chance = "" if total.chance is None else f"{100 * total.chance:.1f}"
            cells += [chance, f"{100 * run.scores.macro_accuracy:.1f}"]
        rows.append(Row(cells, is_measured=True))
    return Table(f"{runs[0].title}, accuracy without a judge", columns, rows, 5)


def _judged_parts(runs: Sequence[Run]) -> list[Part]:
    published = published_answers(runs[0].title)
    judged = [(run, table) for run in runs for table in run.judged]
    if not published and not judged:
        return []
    columns = ["source", "run", "model", "training data", "date", "judge", "visual parameters", "questions", "left out"]
    columns += ["unparsed", "no reply", "judged accuracy % (95%)", "score 0 to 5 (95%)"]
    rows = []
    for run, table in judged:
        cells = [*_measured_cells(run), "", run.known("date"), _judge_name(table)]
        cells += [_parameters(run, "num_visual_parameters"), _num_questions(run), str(run.scores.num_left_out)]
        cells += [str(table.num_unparsed), str(table.num_failed)]
        rows.append(Row([*cells, _percent(table.total.accuracy), _interval(table.total.score, 1, 2)], is_measured=True))
    for row in published:
        cells = [published_mark(), "", row.model, training_data(row.trained_on), "", published_results()["judge"]]
        numbers = ["not reported" if value is None else f"{value:.1f}" for value in (row.accuracy, row.score)]
        rows.append(Row([*cells, short_count(row.num_visual_parameters), "", "", "", "", *numbers]))
    parts: list[Part] = [Table(f"{runs[0].title}, accuracy and score of a judge", columns, rows, 6)]
    if not judged:
        parts.append("No measured run of this set was judged, so that none stands beside the published ones.")
    return parts


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before comparing the rows."""
    notes = []
    if len({(run.questions_digest, run.scores.total.num_questions) for run in runs}) > 1:
        notes.append("Not all of these runs were asked, or have answered, the same questions: compare them with care.")
    for run in runs:
        num_answers = run.scores.total.num_questions
        for table in run.judged:
            seen = table.total.num_judged + table.num_unparsed + table.num_failed
            if run.benchmark != VideoChatGPTBenchmark.name and seen != num_answers:
                notes.append(
                    f"Run {run.number}: {table.judge['judge']} was asked about {seen} answers of {num_answers}; run the "
                    "evaluate command with that judge again."
                )
        for name in run.unfinished_judges:
            notes.append(f"Run {run.number}: {name} has not finished judging; run the evaluate command with it again.")
    return notes


def _kind_parts(
    runs: Sequence[Run], series: Mapping[str, Mapping], what: str, name: str, drawing: _Drawing
) -> list[Part]:
    """A table and plots by kind of question; nothing where there is one kind only."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in (row.kind for row in run.scores.rows)))
    if len(kinds) < 2:
        return []
    kinds.append(TOTAL_KIND)
    chances = {row.kind: row.chance for run in runs for row in _all_rows(run.scores) if row.chance is not None}
    rows = []
    for kind in kinds:
        cells = [kind, *([f"{100 * chances[kind]:.1f}" if kind in chances else ""] if chances else [])]
        rows.append(Row([*cells, *(_kind_cell(shares.get(kind)) for shares in series.values())]))
    title = f"{runs[0].title}, {what} by kind of question, % (95% interval) and number of questions"
    columns = ["kind", *(["chance %"] if chances else []), *(f"{MEASURED}: {label}" for label in series)]
    parts: list[Part] = [Table(title, columns, rows, 1)]
    labels = list(series)
    for start in range(0, len(labels), MAX_SERIES):
        chosen = {
            label: {kind: _share(row) for kind, row in series[label].items()}
            for label in labels[start : start + MAX_SERIES]
        }
        parts += drawing.picture(
            f"{_file_name(runs[0].benchmark)}-{name}",
            f"{runs[0].title}: {what} in percent by kind of question. The numbers are in the table above.",
            f"{runs[0].title}: {what} by kind of question. All bars are measured; thin lines are 95% intervals"
            + (", broken lines what guessing gets." if chances else "."),
            lambda chosen=chosen: draw_kinds(runs[0].title, kinds, chosen, chances, what),
        )
    return parts


def _share(row: ScoreRow | JudgeRow) -> Estimate:
    return _exact(row) if isinstance(row, ScoreRow) else row.accuracy


def _kind_cell(row: ScoreRow | JudgeRow | None) -> str:
    if row is None:
        return ""
    num_answers = row.num_questions if isinstance(row, ScoreRow) else row.num_judged
    return f"{_percent(_share(row))}, n = {num_answers}"


def _file_name(benchmark: str) -> str:
    return re.sub("[^a-z0-9]+", "-", benchmark.lower()).strip("-") or "benchmark"


# --- the benchmark of Video-ChatGPT -------------------------------------------------------------------------------------


def _odd_averages() -> str:
    """A sentence on each published average that is not the mean of its row, which one would take for a slip of ours."""
    rows = [(row, sum(row.scores.values()) / len(row.scores)) for row in published_conversations()]
    return "".join(
        f" That of {row.model} is copied as it is, {row.average:.2f}; the mean of its five scores is {mean:.2f}."
        for row, mean in rows
        if abs(mean - row.average) > 0.0051  # half of the last digit
    )


def _conversation_parts(runs: Sequence[Run], drawing: _Drawing) -> list[Part]:
    columns = ["source", "run", "model", "date", "judge", "questions", "left out", "unparsed", "no reply"]
    rows, charts, left_out = [], {}, []
    for run in runs:
        for table in run.judged:
            scores = {row.kind: row.score for row in table.rows}
            found = [scores.get(criterion) for criterion in _CRITERIA]
            is_whole = None not in found
            average = f"{sum(own.value for own in found) / len(found):.2f}" if is_whole else ""
            cells = [*_measured_cells(run), run.known("date"), _judge_name(table), _num_questions(run)]
            cells += [str(run.scores.num_left_out), str(table.num_unparsed), str(table.num_failed)]
            rows.append(Row([*cells, *(_interval(own, 1, 2) for own in found), average], is_measured=True))
            if is_whole:
                label = _unused(f"run {run.number}, {run.model}, judged by {table.judge['judge']}", charts)
                charts[label] = [own.value for own in found]
            else:
                missing = ", ".join(criterion for criterion, own in zip(_CRITERIA, found) if own is None)
                left_out.append(
                    f"Run {run.number} is not in the chart: {table.judge['judge']} has no score of {missing}."
                )
        if not run.judged:
            left_out.append(f"Run {run.number} ({run.model}) is not in the chart: no judge has judged it.")
    for row in published_conversations():
        cells = [published_mark(), "", row.model, "", published_results()["judge"], "", "", "", ""]
        rows.append(Row([*cells, *(f"{row.scores[criterion]:.2f}" for criterion in _CRITERIA), f"{row.average:.2f}"]))
    parts: list[Part] = [Table("Scores of a judge, 0 to 5 (95%)", [*columns, *_CRITERIA, "average"], rows, 5)]
    parts.append(
        "An average is the mean of the five scores. The scale of the published ones: "
        f"{published_results()['table_2_video_chatgpt_benchmark']['scale']}.{_odd_averages()}"
    )
    labels = list(charts)
    for start in range(0, len(labels), MAX_SERIES):
        chosen = {label: charts[label] for label in labels[start : start + MAX_SERIES]}
        parts += drawing.picture(
            "video-chatgpt-criteria",
            "Chart of five axes, the scores from 0 to 5 by criterion. The numbers are in the table above.",
            f"Scores by criterion, each axis from 0 to {MAX_SCORE}. Filled stars and solid lines: measured. Hollow marks and "
            f"broken lines: published, judged by {published_results()['judge']}.",
            lambda chosen=chosen: draw_criteria(_CRITERIA, published_conversations(), chosen),
        )
    return parts + ([Notes(left_out)] if left_out else [])
