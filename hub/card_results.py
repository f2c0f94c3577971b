"""What evaluation runs found, read from their folders: tables for a model card, and the metadata that the Hub shows.

A run's folder holds `run.json`, `scores.json` and, for each judge, `judges/NAME/judge.json` and `judges/NAME/scores.json`;
`evaluation/` writes them. Only files are read here, and each number that a card states comes from one of them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml
from huggingface_hub import EvalResult

from ..modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
from ..version import __version__
from ..weights import weights_digest
from .shards import read_json

TASK = "video-text-to-text"
MEASURED_BY = f"video-panda {__version__}"
DTYPES = ("float32", "bfloat16", "float16")
RUN_FILE, SCORES_FILE, JUDGES_FOLDER, JUDGE_FILE = "run.json", "scores.json", "judges", "judge.json"
_TITLES = {
    "shapes-qa": "ShapesQA",
    "msvd-qa": "MSVD-QA",
    "msrvtt-qa": "MSRVTT-QA",
    "tgif-qa": "TGIF-QA",
    "activitynet-qa": "ActivityNet-QA",
    "video-chatgpt": "Video-ChatGPT benchmark",
}


@dataclass(frozen=True)
class Judgement:
    """What one judge said about a run: `judge.json`, and the rows of its `scores.json`, the last of all kinds."""

    about: dict
    rows: tuple[dict, ...]

    @property
    def name(self) -> str:
        return public_name(self.about["judge"])

    @property
    def date(self) -> str:
        return self.about["date"]


@dataclass(frozen=True)
class Run:
    """One evaluation run.

    Attributes:
        folder: where it was read from.
        settings: of `run.json`.
        rows: of `scores.json`, the last of all kinds.
        num_left_out: questions whose clips could not be read; None where the run does not say.
        judgements: one for each judge.
    """

    folder: Path
    settings: dict
    rows: tuple[dict, ...]
    num_left_out: int | None
    judgements: tuple[Judgement, ...]

    @property
    def about(self) -> dict:
        return self.settings.get("about") or {}

    @property
    def benchmark(self) -> str:
        return self.settings["benchmark"]

    @property
    def dataset_name(self) -> str:
        return self.about.get("dataset_name") or _TITLES.get(self.benchmark, self.benchmark)

    @property
    def split(self) -> str | None:
        return self.about.get("split")

    @property
    def repeated_frame(self) -> int | None:
        """The frame that was shown again and again in the place of the clip: a control, and no result of the model."""
        frames = self.settings.get("frame_indices") or ()
        return frames[0] if len(frames) > 1 and len(set(frames)) == 1 else None


def read_run(folder: str | os.PathLike) -> Run:
    """Read the folder of a finished run.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or holds something else than expected; file and field are named.
    """
    folder = Path(folder)
    settings = read_json(folder / RUN_FILE)
    for name in ("benchmark", "model_digest"):
        if not isinstance(settings.get(name), str):
            raise ValueError(f"{folder / RUN_FILE}: {name} must be a text, got {settings.get(name)!r}")
    if not (folder / SCORES_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {SCORES_FILE}: the run is not complete, let it finish first")
    scores = read_json(folder / SCORES_FILE)
    rows = _rows(folder / SCORES_FILE, scores)
    for row in rows:
        _check_row(folder / SCORES_FILE, row)
    judges = folder / JUDGES_FOLDER
    judged = sorted(path for path in judges.iterdir() if path.is_dir()) if judges.is_dir() else []
    num_left_out = scores.get("num_left_out")
    if num_left_out is not None:
        _check_count(folder / SCORES_FILE, "num_left_out", num_left_out)
    return Run(folder, settings, rows, num_left_out, tuple(_read_judgement(path) for path in judged))


def _read_judgement(folder: Path) -> Judgement:
    about, scores = read_json(folder / JUDGE_FILE), read_json(folder / SCORES_FILE)
    for name in ("judge", "date"):
        if not isinstance(about.get(name), str):
            raise ValueError(f"{folder / JUDGE_FILE}: {name} must be a text, got {about.get(name)!r}")
    rows = _rows(folder / SCORES_FILE, scores)
    for row in rows:
        where = f"row {row['kind']!r}"
        for name in ("num_judged", "num_unparsed", "num_failed"):
            _check_count(folder / SCORES_FILE, f"{name} of {where}", row.get(name))
        for name, highest in (("accuracy", 1), ("score", 5)):
            if row.get(name) is not None:
                _check_estimate(folder / SCORES_FILE, f"{name} of {where}", row[name], highest)
    return Judgement(about, rows)


def _rows(path: Path, scores: Mapping) -> tuple[dict, ...]:
    rows = [*(scores.get("rows") or ()), scores.get("total")]
    if not all(isinstance(row, dict) and isinstance(row.get("kind"), str) for row in rows):
        raise ValueError(f"{path}: expected `rows` and `total`, objects with a `kind`")
    return tuple(rows)


def _check_row(path: Path, row: Mapping) -> None:
    where = f"row {row['kind']!r}"
    for name in ("num_questions", "num_correct", "num_unanswered"):
        _check_count(path, f"{name} of {where}", row.get(name))
    for name in ("accuracy", "low", "high", *(["chance"] if row.get("chance") is not None else [])):
        _check_number(path, f"{name} of {where}", row.get(name), 1)
    for name in ("containment", "token_f1"):
        if row.get(name) is not None:
            _check_estimate(path, f"{name} of {where}", row[name], 1)


def _check_count(path: Path, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{path}: {name} must be a whole number from 0 on, got {value!r}")


def _check_number(path: Path, name: str, value, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
        raise ValueError(f"{path}: {name} must be a number from 0 to {highest}, got {value!r}")


def _check_estimate(path: Path, name: str, estimate, highest: float) -> None:
    if not isinstance(estimate, Mapping):
        raise ValueError(f"{path}: {name} must have a value, low and high, got {estimate!r}")
    for part in ("value", "low", "high"):
        _check_number(path, f"{part} of {name}", estimate.get(part), highest)


def read_runs(folders: Iterable[str | os.PathLike], checkpoint: str | os.PathLike) -> list[Run]:
    """Read runs, and make sure that they are of a checkpoint's weights.

    Args:
        folders: of the runs.
        checkpoint: folder of the model; its weights are read where there are runs.

    Raises:
        OSError, ValueError: as `read_run`; two runs of the same measurement, or a run of other weights.
    """
    runs = [read_run(folder) for folder in folders]
    _refuse_doubles(runs)
    digests: dict[str, str] = {}
    for run in runs:
        # Digests are of the weights in the dtype that they were asked in; older runs do not say which.
        dtype = run.about.get("dtype")
        tried = (dtype,) if dtype in DTYPES else ("auto", *DTYPES)
        for name in tried:
            if name not in digests:
                digests[name] = weights_digest(
                    VideoPandaForConditionalGeneration.from_pretrained(checkpoint, dtype=name)
                )
            if digests[name] == run.settings["model_digest"]:
                break
        else:
            raise ValueError(
                f"{run.folder / RUN_FILE}: the run is of another model: its model_digest is "
                f"{run.settings['model_digest'][:12]}..., that of the weights in {checkpoint} "
                f"{digests[tried[0]][:12]}... ({dtype or 'dtype as stored'})"
            )
    return runs


def _refuse_doubles(runs: Sequence[Run]) -> None:
    seen: dict[str, Path] = {}
    for run in runs:
        key = repr(sorted((name, value) for name, value in run.settings.items() if name not in ("about", "model")))
        if key in seen:
            raise ValueError(f"{run.folder} and {seen[key]} are runs of the same measurement, expected one of them")
        seen[key] = run.folder


# For the Hub ----------------------------------------------------------------------------------------------------------


def eval_results(runs: Iterable[Run], dataset_ids: Mapping[str, str] | None = None) -> list[EvalResult]:
    """The `model-index`: of each run exact match by kind, containment and token F1 in all, and what each judge found.

    Args:
        runs: those with one repeated frame are left out: what they measure is no ability of the model.
        dataset_ids: benchmark -> dataset on the Hub; default: the benchmark's own name.

    Returns:
        Shares in [0, 1], rounded to 4 digits; scores of a judge in [0, 5], to 2.
    """
    found = []
    for run in runs:
        if run.repeated_frame is not None:
            continue
        dataset = {
            "task_type": TASK,
            "dataset_type": (dataset_ids or {}).get(run.benchmark, run.benchmark),
            "dataset_name": run.dataset_name,
            "dataset_split": run.split,
        }
        for metric in (*_unjudged_metrics(run), *(own for judged in run.judgements for own in _judged_metrics(judged))):
            found.append(EvalResult(**dataset, **metric))
    return found


def _unjudged_metrics(run: Run) -> list[dict]:
    *kinds, total = run.rows
    args = {"measured_by": MEASURED_BY, "judge": "none", "num_questions": total["num_questions"]}
    if run.about.get("date"):
        args["date"] = run.about["date"]
    if run.num_left_out is not None:
        args["num_left_out"] = run.num_left_out
    metrics = [_metric("exact_match", "exact match", round(total["accuracy"], 4), args)]
    for kind in kinds if len(kinds) > 1 else ():
        own = {**args, "num_questions": kind["num_questions"]}
        metrics.append(_metric("exact_match", f"exact match ({kind['kind']})", round(kind["accuracy"], 4), own))
    for name, metric_type, words in (("containment", "containment", "containment"), ("token_f1", "f1", "token F1")):
        if total.get(name) is not None:
            metrics.append(_metric(metric_type, words, round(total[name]["value"], 4), args))
    return metrics


def _judged_metrics(judged: Judgement) -> list[dict]:
    *kinds, total = judged.rows
    by = f"(judge {judged.name}, {judged.date})"
    metrics = []
    for row in (total, *(kinds if len(kinds) > 1 else ())):
        which = "" if row is total else f" of {row['kind']}"
        args = {"measured_by": MEASURED_BY, "judge": judged.name, "date": judged.date}
        args |= {name: row[name] for name in ("num_judged", "num_unparsed", "num_failed")}
        if row.get("accuracy") is not None:
            metrics.append(_metric("accuracy", f"accuracy{which} {by}", round(row["accuracy"]["value"], 4), args))
        if row.get("score") is not None:
            metrics.append(_metric("score", f"score 0-5{which} {by}", round(row["score"]["value"], 2), args))
    return metrics


def _metric(metric_type: str, name: str, value: float, args: dict) -> dict:
    return {"metric_type": metric_type, "metric_name": name, "metric_value": value, "metric_args": args}


def eval_result_files(runs: Iterable[Run], dataset_ids: Mapping[str, str]) -> dict[str, str]:
    """`.eval_results/BENCHMARK.yaml`, from which the Hub fills the leaderboards of datasets.

    Args:
        runs: those of other benchmarks than `dataset_ids` names are passed over: there is no dataset to show them at.
        dataset_ids: benchmark -> dataset on the Hub.

    Returns:
        File name in the repository -> its content: the judge's accuracy (or score), else exact match.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # newer than the oldest that will do

    entries: dict[str, list] = {}
    for run in runs:
        if run.benchmark not in dataset_ids or run.repeated_frame is not None:
            continue
        judged = [_judged_metrics(own)[0] for own in run.judgements if _judged_metrics(own)]
        for metric in judged or _unjudged_metrics(run)[:1]:
            notes = f"{metric['metric_name']}; {metric['metric_args'].get('num_judged', run.rows[-1]['num_questions'])} questions"
            entry = EvalResultEntry(
                dataset_id=dataset_ids[run.benchmark],
                task_id="default",
                value=metric["metric_value"],
                date=metric["metric_args"].get("date"),
                notes=notes,
            )
            entries.setdefault(run.benchmark, []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(own), sort_keys=False)
        for name, own in entries.items()
    }


# For people -----------------------------------------------------------------------------------------------------------


def describe_run(run: Run) -> dict:
    """What the template needs of a run: `title`, `circumstances`, `columns`, `rows`, `judges`; all texts."""
    split = f", split {run.split}" if run.split else ""
    control = "" if run.repeated_frame is None else f": control, frame {run.repeated_frame} shown again and again"
    return {
        "title": cell(f"{run.dataset_name}{split}{control}"),
        "circumstances": _circumstances(run),
        **_unjudged_table(run),
        "judges": [_judged_table(judged) for judged in run.judgements],
    }


def _circumstances(run: Run) -> str:
    about, settings = run.about, run.settings
    num_asked = settings.get("num_questions", run.rows[-1]["num_questions"])
    full = about.get("num_questions_full")
    of_all = f" of {full:,}" if full and full != num_asked else ""
    asked = (
        f"{num_asked:,}{of_all} questions, asked {'on ' + about['date'] if about.get('date') else 'at an unknown date'}"
    )
    left_out = {None: "it is not known how many were", 0: "none was"}.get(run.num_left_out, f"{run.num_left_out} were")
    asked += f"; {left_out} left out because their clips could not be read."
    frames = settings.get("frame_indices") or settings.get("num_frames")
    details = [
        about.get("dtype"),
        f"on {about['device']}" if about.get("device") else None,
        f"{len(frames) if isinstance(frames, list) else frames} frames" if frames else None,
        f"answers of at most {settings['max_new_tokens']} tokens" if settings.get("max_new_tokens") else None,
        *(f"{title} {about[key]}" for key, title in _VERSIONS.items() if about.get(key)),
    ]
    details = [cell(own) for own in details if own]
    return asked + (f" {', '.join(details)}." if details else "")


_VERSIONS = {"package_version": "video-panda", "torch_version": "torch", "transformers_version": "transformers"}


def _unjudged_table(run: Run) -> dict:
    extra = [(name, title) for name, title in (("containment", "containment %"), ("token_f1", "token F1 %"))]
    extra = [(name, title) for name, title in extra if any(row.get(name) is not None for row in run.rows)]
    has_chance = any(row.get("chance") is not None for row in run.rows)
    columns = ["kind", "questions", "exact match %", "95% interval", *(title for _, title in extra), "no answer"]
    rows = []
    for row in run.rows:
        cells = [row["kind"], f"{row['num_questions']:,}", percent(row["accuracy"]), _interval(row, 100, 1)]
        cells += ["" if row.get(name) is None else percent(row[name]["value"]) for name, _ in extra]
        cells.append(str(row["num_unanswered"]))
        if has_chance:
            cells.append("" if row.get("chance") is None else percent(row["chance"]))
        rows.append([cell(own) for own in cells])
    return {"columns": columns + ["chance %"] * has_chance, "rows": rows}


def _judged_table(judged: Judgement) -> dict:
    about = judged.about
    details = [about.get("backend"), *(f"template {version}" for version in (about.get("templates") or {}).values())]
    if about.get("temperature") is not None:
        details.append(f"temperature {about['temperature']}")
    details = ", ".join(str(own) for own in details if own)
    has_accuracy = any(row.get("accuracy") is not None for row in judged.rows)
    columns = ["kind", "judged", *(["accuracy %", "95% interval"] * has_accuracy), "score (0-5)", "95% interval"]
    rows = []
    for row in judged.rows:
        cells = [row["kind"], f"{row['num_judged']:,}"]
        for name, factor, digits in (("accuracy", 100, 1), ("score", 1, 2)):
            if name == "score" or has_accuracy:
                own = row.get(name)
                cells += (
                    ["", ""] if own is None else [f"{factor * own['value']:.{digits}f}", _interval(own, factor, digits)]
                )
        rows.append([cell(own) for own in (*cells, row["num_unparsed"], row["num_failed"])])
    words = f"Judged by `{judged.name}` on {judged.date}{f' ({details})' if details else ''}. Other judges give other numbers:"
    return {"words": cell(words), "columns": [*columns, "unparsed", "no reply"], "rows": rows}


def _interval(estimate: Mapping, factor: int, digits: int) -> str:
    return f"{factor * estimate['low']:.{digits}f} to {factor * estimate['high']:.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def cell(value) -> str:
    """A text in a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def public_name(name: str) -> str:
    """A model's name without where it lies on somebody's disk: the last part of a path, and a Hub id as it is."""
    is_path = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith((".", "~"))
    is_path = is_path or name.count("/") > 1 or "\\" in name or os.path.exists(name)
    return PureWindowsPath(name).name if is_path else name
