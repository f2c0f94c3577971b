"""Folders of evaluation runs as `video_panda.evaluation` writes them, made from numbers: what cards and pushes read."""

import json
from pathlib import Path

import torch

from video_panda import VideoPandaForConditionalGeneration
from video_panda.weights import weights_digest

JUDGE = {
    "judge": "gpt-3.5-turbo-0125",
    "backend": "openai",
    "base_url": "http://localhost:1/v1",
    "temperature": 0,
    "templates": {"qa": "qa-1"},
    "date": "2026-11-27",
}


def estimate(value: float, half_width: float = 0.05) -> dict:
    return {"value": value, "low": value - half_width, "high": value + half_width}


def score_row(kind: str, num_questions: int = 100, accuracy: float = 0.4, chance: float | None = None, **more) -> dict:
    own = {"kind": kind, "num_questions": num_questions, "num_correct": round(accuracy * num_questions)}
    own |= {"num_unanswered": 2, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
    return {**own, "chance": chance, "containment": estimate(0.61237), "token_f1": estimate(0.45), **more}


def judge_row(kind: str, num_judged: int = 97, accuracy: float | None = 0.70128, score: float = 3.456) -> dict:
    own = {"kind": kind, "num_judged": num_judged, "num_unparsed": 2, "num_failed": 1, "score": estimate(score)}
    return {**own, "accuracy": None if accuracy is None else estimate(accuracy)}


def write_run(
    folder: Path,
    checkpoint: Path,
    benchmark: str = "msvd-qa",
    *,
    rows: list[dict] | None = None,
    judges: dict[str, list[dict]] | None = None,
    dtype: str = "float32",
    settings: dict | None = None,
    about: dict | None = None,
) -> Path:
    """A finished run about the weights of `checkpoint`, asked in `dtype`; `judges`: model id -> rows, the total last."""
    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    rows = rows or [score_row("what"), score_row("all")]
    run = {
        "model": str(checkpoint.absolute()),
        "model_digest": weights_digest(model),
        "benchmark": benchmark,
        "questions_digest": "0" * 64,
        "num_questions": 103,
        "max_new_tokens": 32,
        "num_frames": 8,
        **(settings or {}),
        "about": {
            "date": "2026-11-26",
            "dtype": dtype,
            "device": "NVIDIA H100",
            "dataset_name": "MSVD-QA",
            "split": "test",
            "num_questions_full": 13157,
            "package_version": "0.1.0",
            "torch_version": "2.13.0",
            "transformers_version": "5.23.0",
            **(about or {}),
        },
    }
    scores = {"rows": rows[:-1], "total": rows[-1], "macro_accuracy": 0.4, "num_left_out": 3}
    write_json(folder / "run.json", run)
    write_json(folder / "scores.json", scores)
    for number, (judge, own) in enumerate((judges or {}).items()):
        place = folder / "judges" / f"judge-{number}"
        write_json(place / "judge.json", {**JUDGE, "judge": judge})
        write_json(place / "scores.json", {"rows": own[:-1], "total": own[-1], "num_unparsed": 2, "num_failed": 1})
    return folder


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")
