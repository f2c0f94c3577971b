"""Model cards: `README.md` of a checkpoint, from the template `model_card.md`, what was recorded of its training and measured.

A card that was written here carries a mark with a digest of its text, so that one which a person wrote, or edited, is told
apart: its text is kept, and only results are added to its metadata.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling_video_panda.configuration_video_panda import VideoPandaConfig
from ..modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
from ..processing.geometry_video_panda import token_grid
from .card_results import DTYPES, MEASURED_BY, TASK, cell, describe_run, eval_results, percent, read_runs
from .card_training import dataset_ids_of, describe_stage, hub_ids, read_training

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent.parent / "model_card.md"
CARD_FILE = "README.md"
LICENSE = "apache-2.0"
_MARK = re.compile(r"\s*<!-- video-panda wrote this card \((?P<digest>[0-9a-f]{12})\)[^>]*-->\n?")
# What the card of a model says that transformers itself pushed, and nobody has filled in.
_UNFILLED, _NUM_UNFILLED = "[More Information Needed]", 20
# Of a card written here, the metadata that its owner may have changed.
_OWNERS = ("license", "license_name", "license_link", "language", "base_model", "datasets", "tags")


@dataclass(frozen=True)
class ComposedCard:
    """A card's content, and what was done, in a few words."""

    content: str
    action: str


def write_model_card(folder: str | os.PathLike, *, name: str, **options) -> Path:
    """Write `README.md` into a checkpoint's folder. A card that a person wrote keeps its text, and is given the results.

    Args:
        folder: of the checkpoint, with its `config.json`.
        name: of the model; the card's title.
        options: see `compose_card`.

    Returns:
        The file, replaced as a whole.

    Raises:
        ValueError, OSError: as `compose_card`.
    """
    path = Path(folder, CARD_FILE)
    existing = path.read_text(encoding="utf-8-sig") if path.is_file() else None
    composed = compose_card(folder, name=name, existing=existing, **options)
    logger.info("%s: %s", path, composed.action)
    write_card_file(path, composed.content)
    return path


def write_card_file(path: Path, content: str) -> None:
    """Replace a card as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def compose_card(
    folder: str | os.PathLike,
    *,
    name: str,
    repo_id: str | None = None,
    description: str = "",
    evaluation: str = "",
    results: Mapping[str, float] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    runs: Iterable[str | os.PathLike] = (),
    dataset_ids: Mapping[str, str] | None = None,
    config: VideoPandaConfig | None = None,
    training: Mapping | None = None,
    latency: Sequence[Mapping] = (),
    license: str | None = None,
    language: str | list[str] | None = None,
    base_model: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    tags: Sequence[str] = (),
    existing: str | None = None,
) -> ComposedCard:
    """The card of a checkpoint. What is not known is said to be unknown, or left out.

    Args:
        folder: of the checkpoint, with its `config.json` unless `config` is given.
        name: of the model; the card's title.
        repo_id: under which it will be on the Hub; default: the name.
        description: a paragraph of Markdown.
        evaluation: Markdown about results.
        results: accuracies in [0, 1] by what was measured, without a run's folder; they go into the card's metadata.
        dataset, split: what they were measured on.
        runs: folders of evaluation runs of this checkpoint (`video-panda evaluate --output-dir`).
        dataset_ids: benchmark -> dataset on the Hub, for the metadata.
        config: of the model; default: the folder's.
        training: as `trainers/training_facts.py` makes it; default: the folder's `training.json`, if there is one.
        latency: measurements, each a row of column -> value; none: the card says that it was not measured.
        license, language, base_model, datasets, tags: of the metadata; default: those of the existing card; else Apache-2.0,
            English, what the training's record says, and `video-panda`. A folder's path is left out.
        existing: content of the card that is there.

    Raises:
        ValueError: results without a data set, outside [0, 1], or of another model; a damaged file; they are named.
        OSError: no such checkpoint or run.
    """
    read = read_runs(runs, folder)
    found = _plain_results(results, dataset, split) + eval_results(read, dataset_ids)
    kept = None if existing is None else _parse(existing)
    if kept is not None and not is_ours(kept):
        return _extend(kept, existing, found, name)
    training = read_training(folder) if training is None else training
    given = {"license": license, "language": language}
    given |= {"base_model": _ids(base_model), "datasets": _ids(datasets)}
    given["tags"] = list(tags) or None
    data = ModelCardData(
        **_metadata(given, training, None if kept is None else kept.data),
        library_name="transformers",
        pipeline_tag=TASK,
        model_name=name if found else None,
        eval_results=found or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id or name,
        description=description,
        evaluation=evaluation,
        plain_dataset=dataset,
        plain_results=[] if evaluation else [(cell(own), percent(value)) for own, value in (results or {}).items()],
        runs=[describe_run(run) for run in read],
        stages=[describe_stage(stage) for stage in training.get("stages", ())],
        **_latency_table(latency),
        **_size_of(VideoPandaConfig.from_pretrained(folder) if config is None else config),
    )
    body = re.sub(r"\n{3,}", "\n\n", card.text.strip()) + "\n"
    card.text = f"\n<!-- video-panda wrote this card ({_digest(body)}); once edited, its text is kept -->\n\n{body}"
    lost = kept is not None and kept.data.eval_results and not found
    action = (
        "written" if kept is None else "written anew" + (", without the results of the earlier one" if lost else "")
    )
    return ComposedCard(str(card), action + ("" if found else "; it says that there are no results"))


def is_ours(card: ModelCard) -> bool:
    """Whether a card's text is as it was written here, or as transformers writes it for somebody to fill in."""
    mark = _MARK.match(card.text)
    if mark is None:
        return not card.text.strip() or card.text.count(_UNFILLED) >= _NUM_UNFILLED
    return _digest(card.text[mark.end() :]) == mark["digest"]


def is_written_by_hand(content: str) -> bool:
    """Whether a person wrote or edited a card. Raises: ValueError where its metadata cannot be read."""
    return not is_ours(_parse(content))


def _digest(body: str) -> str:
    """Of a card's text; spaces at its ends and kinds of line ends do not matter."""
    return hashlib.sha256("\n".join(body.strip().splitlines()).encode()).hexdigest()[:12]


def _parse(content: str) -> ModelCard:
    try:
        return ModelCard(content)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{CARD_FILE}: the metadata at its top cannot be read: {reason}") from error


def _extend(card: ModelCard, content: str, found: list[EvalResult], name: str) -> ComposedCard:
    """Put results into the metadata of a card that somebody wrote."""
    if not found:
        return ComposedCard(content, "kept as it is: it was written or edited by hand")
    new = {(result.unique_identifier, result.metric_name) for result in found}
    measured_on = {result.unique_identifier for result in found}
    kept = [
        result
        for result in card.data.eval_results or ()
        if (result.unique_identifier, result.metric_name) not in new
        # Older ones of ours: a judge's name and date stand in the names, and both figures would stay.
        and not (_is_measured_here(result) and result.unique_identifier in measured_on)
    ]
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = kept + found
    words = f"{len(found)} results put into its metadata; its text, written or edited by hand, is kept"
    return ComposedCard(str(card), words)


def _is_measured_here(result: EvalResult) -> bool:
    measured_by = (result.metric_args or {}).get("measured_by", "") if isinstance(result.metric_args, dict) else ""
    return measured_by.split(" ")[0] == MEASURED_BY.split(" ")[0]


def _metadata(given: Mapping, training: Mapping, existing: ModelCardData | None) -> dict:
    """License, language, base model, data sets and tags: as given, else as the card had it, else as recorded."""
    recorded = {"base_model": training.get("base_model"), "datasets": dataset_ids_of(training)}
    defaults = {"license": LICENSE, "language": "en", "tags": ["video-panda"], **recorded}
    metadata = {}
    for key in _OWNERS:
        earlier = None if existing is None else existing.get(key)
        metadata[key] = next((value for value in (given.get(key), earlier, defaults.get(key)) if value), None)
    if "video-panda" not in metadata["tags"]:
        metadata["tags"] = [*metadata["tags"], "video-panda"]
    if given.get("license"):  # another license has another name
        metadata |= {"license_name": None, "license_link": None}
    if existing is not None:
        own = {*_OWNERS, "library_name", "pipeline_tag", "model_name", "eval_results"}
        metadata |= {key: value for key, value in existing.to_dict().items() if key not in {*own, "model-index"}}
    return metadata


def _ids(names: str | list[str] | None) -> str | list[str] | None:
    """Ids on the Hub; what is a folder on somebody's disk is left out."""
    if not names or isinstance(names, str):
        return names if names and hub_ids([names]) else None
    return hub_ids(names)


def _plain_results(results: Mapping[str, float] | None, dataset: str | None, split: str | None) -> list[EvalResult]:
    if results and dataset is None:
        raise ValueError("results were given without the data set that they were measured on")
    for metric, accuracy in (results or {}).items():
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy {metric!r} is {accuracy}, expected a share from 0 to 1")
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=f"accuracy ({metric})",
            metric_value=round(accuracy, 4),
        )
        for metric, accuracy in (results or {}).items()
    ]


def _latency_table(latency: Sequence[Mapping]) -> dict:
    columns = list(dict.fromkeys(str(column) for row in latency for column in row))
    rows = [[cell(row.get(column, "")) for column in columns] for row in latency]
    return {"latency_columns": [cell(column) for column in columns], "latency": rows}


def _size_of(config: VideoPandaConfig) -> dict:
    """What the configuration alone says: parameters, their memory, tokens of a clip."""
    with torch.device("meta"):
        model = VideoPandaForConditionalGeneration(config)
    parts = {"STAB": model.model.stab, "projector": model.model.projector, "language model": model.model.language_model}
    counts = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in parts.items()}
    total = model.num_parameters()
    counts["head of the language model"] = total - sum(counts.values())
    if not counts["head of the language model"]:  # it is the embeddings again
        del counts["head of the language model"]
    bytes_of = {name: getattr(torch, name).itemsize for name in DTYPES}
    vision = config.vision_config
    return {
        "num_visual_parameters": _short(counts["STAB"] + counts["projector"]),
        "num_parameters": _short(total),
        "num_frames": vision.num_frames,
        "image_size": vision.image_size,
        "num_video_tokens": vision.num_frames * vision.num_frame_tokens(*token_grid(16, 9, vision.num_tokens_per_side)),
        "dtypes": DTYPES,
        "memory": [
            [name, f"{count:,}", *(format_bytes(count * size) for size in bytes_of.values())]
            for name, count in [*counts.items(), ("all", total)]
        ],
    }


def _short(count: int) -> str:
    """45.07 M"""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def format_bytes(count: int) -> str:
    """14.1 GB: decimal, as the Hub counts."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
