"""Reads the folders of runs for a report: what `run_folder` and `judging` have written, and whether it can be true."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .benchmarks import BENCHMARKS
from .files import read_object
from .judging import JUDGE_FILE, JUDGES_FOLDER, JudgeRow, JudgeTable
from .judging import SCORES_FILE as JUDGE_SCORES_FILE
from .run_folder import RUN_FILE, SCORES_FILE
from .scores import Estimate, ScoreRow, ScoreTable

TOTAL_KIND = "all"
MAX_SCORE = 5
_MAX_COUNT = 10**15
# What a run is known by; the other settings are options.
_IDENTITY = ("model", "model_digest", "benchmark", "questions_digest", "num_questions", "about")
_KNOWN = {benchmark.name: benchmark for benchmark in BENCHMARKS}


@dataclass(frozen=True)
class Run:
    """A run that is complete.

    Attributes:
        number: in the order given, from 1; plots and tables call it by this.
        folder: its name, with as many of the folders above as tell it from the others.
        model: as the user named it, shortened likewise where it is a path.
        model_name: in full.
        digest: of the weights; "" where it is unknown, as in folders of older versions.
        benchmark, title: its name for commands and for people.
        questions_digest: of the questions; "" likewise.
        options: settings other than these, those that are None left out.
        about: what else is known, texts and numbers.
        num_questions_full: of the whole benchmark; None where that is unknown or has no meaning.
        num_visual_parameters: of the model; None where it is unknown.
        scores: without a judge; an older folder's rows have None for `containment` and `token_f1`.
        judged: what each judge found, by name.
        unfinished_judges: names of judges that were interrupted.
    """

    number: int
    folder: str
    model: str
    model_name: str
    digest: str
    benchmark: str
    title: str
    questions_digest: str
    options: Mapping[str, object]
    about: Mapping[str, object]
    num_questions_full: int | None
    num_visual_parameters: int | None
    scores: ScoreTable
    judged: tuple[JudgeTable, ...] = field(default=())
    unfinished_judges: tuple[str, ...] = field(default=())

    @property
    def is_part(self) -> bool:
        """Whether the scores are not about all questions of the benchmark, as far as their number is known."""
        return self.num_questions_full not in (None, self.scores.total.num_questions)

    def known(self, name: str) -> str:
        """What `about` says, as text; "unknown" in folders of older versions."""
        value = self.about.get(name)
        return "unknown" if value is None else one_line(value)


def one_line(text: object) -> str:
    """A text from a file with what cannot be printed, or would break the line, replaced."""
    words = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def read_runs(outputs: Sequence[str | os.PathLike]) -> list[Run]:
    """Read the folders of runs.

    Args:
        outputs: what `evaluate` was given as its output.

    Returns:
        The runs, in the same order.

    Raises:
        ValueError: no folder is given, or one is no complete run, is given twice, or holds what cannot be; it is named.
        OSError: a file cannot be read.
    """
    folders = [Path(output) for output in outputs]
    if not folders:
        raise ValueError("there are no folders of runs, expected at least one")
    known: dict[Path, Path] = {}
    for folder in folders:
        _check_run_folder(folder)
        other = known.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise ValueError(f"{folder} and {other} are the same folder; give each run once")
    settings = [read_object(folder / RUN_FILE) for folder in folders]
    for folder, found in zip(folders, settings):
        for name in ("model", "benchmark"):
            if not isinstance(found.get(name), str) or not found[name]:
                raise ValueError(f"{folder / RUN_FILE}: {name} is {found.get(name)!r}, expected a text")
    folder_names = short_names([str(folder.resolve()) for folder in folders])
    models = _model_labels(settings)
    return [
        _read_run(place + 1, folder, folder_names[place], models[place], found)
        for place, (folder, found) in enumerate(zip(folders, settings))
    ]


def short_names(paths: Iterable[str], num_parts: int = 1) -> list[str]:
    """The last parts of each path, at least `num_parts`, and as many as tell it from the others."""
    paths = list(paths)
    parts = {path: [part for part in re.split(r"[/\\]+", path) if part not in ("", ".")] or [path] for path in paths}

    def short(path: str) -> str:
        own = parts[path]
        for count in range(min(num_parts, len(own)), len(own) + 1):
            if not any(other[-count:] == own[-count:] for name, other in parts.items() if name != path):
                return "/".join(own[-count:])
        return path

    return [one_line(short(path)) for path in paths]


def _model_labels(settings: Sequence[Mapping]) -> list[str]:
    """How the report calls the models: with the start of the digest where one name stands for several weights."""
    names = short_names([found["model"] for found in settings], num_parts=2)
    digests = {name: {_digest(f) for n, f in zip(names, settings) if n == name} for name in names}
    return [
        f"{name} ({_digest(found)[:8] or 'unknown weights'})" if len(digests[name]) > 1 else name
        for name, found in zip(names, settings)
    ]


def _digest(found: Mapping) -> str:
    return one_line(found.get("model_digest") or "")


def _check_run_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; expected the output of `video-panda evaluate`")
    if not (folder / RUN_FILE).is_file():
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{RUN_FILE}"))
        hint = f"; there are runs in it: {', '.join(inside[:5])}" if inside else ""
        raise ValueError(
            f"{folder} is no folder of a run: it has no {RUN_FILE}; expected the output of `video-panda evaluate`{hint}"
        )
    if not (folder / SCORES_FILE).is_file():
        raise ValueError(
            f"{folder} has no {SCORES_FILE}: the run is not finished. Run the same `video-panda evaluate` command again, "
            "it goes on where it was"
        )


def _read_run(number: int, folder: Path, name: str, model: str, found: dict) -> Run:
    place = str(folder / RUN_FILE)
    about = found.get("about") or {}
    if not isinstance(about, dict):
        raise ValueError(f"{place}: about is {about!r}, expected an object")
    benchmark = found["benchmark"]
    known = _KNOWN.get(benchmark)
    title = known.title if known else str(about.get("dataset_name") or benchmark)
    if not known and title in {other.title for other in BENCHMARKS}:
        title = f"{title} ({benchmark})"  # somebody's own, which is not to stand beside published figures
    num_full = _optional_count(about, "num_questions_full", place)
    _optional_count(about, "num_parameters", place)
    scores = _read_scores(folder / SCORES_FILE)
    num_asked = _optional_count(found, "num_questions", place)
    num_found = scores.total.num_questions + scores.num_left_out
    if num_asked is not None and num_asked != num_found:
        raise ValueError(
            f"{folder / SCORES_FILE}: {num_found} questions are scored or left out, expected num_questions of {RUN_FILE}, "
            f"{num_asked}; run the same `video-panda evaluate` command again"
        )
    judged, unfinished = _read_judges(folder / JUDGES_FOLDER)
    return Run(
        number,
        name,
        model,
        one_line(found["model"]),
        _digest(found),
        one_line(benchmark),
        one_line(title),
        one_line(found.get("questions_digest") or ""),
        {option: value for option, value in found.items() if option not in _IDENTITY and value is not None},
        about,
        known.num_questions_full if known and num_full is None else num_full,
        _optional_count(about, "num_visual_parameters", place),
        scores,
        judged,
        unfinished,
    )


def _read_scores(path: Path) -> ScoreTable:
    content = read_object(path)
    rows, total = _rows(content, path, _score_row)
    left_out = _optional_count(content, "num_left_out", str(path))
    return ScoreTable(rows, total, _number(content, "macro_accuracy", str(path)), left_out or 0)


def _rows(content: dict, path: Path, read) -> tuple[tuple, object]:
    """The rows and the total of a file of scores, each read by `read(row, place)`."""
    found, total = content.get("rows"), content.get("total")
    if not isinstance(found, list) or not isinstance(total, dict) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: expected `rows`, a list of objects, and `total`, an object")
    for row in (*found, total):
        if not isinstance(row.get("kind"), str):
            raise ValueError(f"{path}: the kind of a row is {row.get('kind')!r}, expected a text")
    counts = Counter(row["kind"] for row in found)
    if twice := [kind for kind, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: there are several rows of the kind {twice[0]!r}, expected one")
    return tuple(read(row, f"{path}, row {row['kind']!r}") for row in found), read(total, f"{path}, total")


def _score_row(row: dict, place: str) -> ScoreRow:
    num_questions = _count(row, "num_questions", place, low=1)
    accuracy = Estimate(*(_number(row, name, place) for name in ("accuracy", "low", "high")))
    _check_order(accuracy, "accuracy", place)
    return ScoreRow(
        one_line(row["kind"]),
        num_questions,
        _count(row, "num_correct", place, high=num_questions),
        _count(row, "num_unanswered", place, high=num_questions),
        accuracy.value,
        accuracy.low,
        accuracy.high,
        None if row.get("chance") is None else _number(row, "chance", place),
        _optional_estimate(row, "containment", place),
        _optional_estimate(row, "token_f1", place),
    )


def _read_judges(folder: Path) -> tuple[tuple[JudgeTable, ...], tuple[str, ...]]:
    """What the judges found, by name; and the names of those that have not finished."""
    judged, unfinished = [], []
    for own in sorted(path for path in folder.glob("*") if path.is_dir()):
        if not (own / JUDGE_SCORES_FILE).exists():
            has_name = (own / JUDGE_FILE).exists()
            unfinished.append(one_line(read_object(own / JUDGE_FILE).get("judge", own.name) if has_name else own.name))
            continue
        if not (own / JUDGE_FILE).exists():
            raise ValueError(f"{own} has scores and no {JUDGE_FILE}: it is not known who judged; delete that folder")
        judge, place = read_object(own / JUDGE_FILE), str(own / JUDGE_FILE)
        if not isinstance(judge.get("judge"), str) or not judge["judge"]:
            raise ValueError(f"{place}: judge is {judge.get('judge')!r}, expected a text")
        if not isinstance(judge.get("templates") or {}, dict):
            raise ValueError(f"{place}: templates is {judge['templates']!r}, expected an object")
        content, place = read_object(own / JUDGE_SCORES_FILE), str(own / JUDGE_SCORES_FILE)
        rows, total = _rows(content, own / JUDGE_SCORES_FILE, _judge_row)
        num_unparsed, num_failed = (_count(content, name, place) for name in ("num_unparsed", "num_failed"))
        judged.append(JudgeTable(rows, total, num_unparsed, num_failed, {**judge, "judge": one_line(judge["judge"])}))
    return tuple(sorted(judged, key=lambda table: table.judge["judge"])), tuple(sorted(unfinished))


def _judge_row(row: dict, place: str) -> JudgeRow:
    return JudgeRow(
        one_line(row["kind"]),
        *(_count(row, name, place) for name in ("num_judged", "num_unparsed", "num_failed")),
        _optional_estimate(row, "accuracy", place),
        _optional_estimate(row, "score", place, MAX_SCORE),
    )


def _count(content: dict, name: str, place: str, low: int = 0, high: int = _MAX_COUNT) -> int:
    value = content.get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or not low <= value <= high:
        raise ValueError(f"{place}: {name} is {value!r}, expected a whole number from {low} to {high}")
    return value


def _optional_count(content: dict, name: str, place: str) -> int | None:
    return None if content.get(name) is None else _count(content, name, place)


def _number(content: dict, name: str, place: str, high: float = 1) -> float:
    value = content.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= high:
        raise ValueError(f"{place}: {name} is {value!r}, expected a number from 0 to {high}")
    return float(value)


def _optional_estimate(content: dict, name: str, place: str, high: float = 1) -> Estimate | None:
    """Null where there is none; older folders do not have all."""
    found = content.get(name)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{place}: {name} is {found!r}, expected an object of value, low and high")
    estimate = Estimate(*(_number(found, part, f"{place}, {name}", high) for part in ("value", "low", "high")))
    _check_order(estimate, name, place)
    return estimate


def _check_order(estimate: Estimate, name: str, place: str) -> None:
    if estimate.low > estimate.high:
        raise ValueError(
            f"{place}: the interval of {name} is {estimate.low} to {estimate.high}, expected the lower end first"
        )
