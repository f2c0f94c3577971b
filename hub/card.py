"""Model cards: `README.md` of a checkpoint, from the template `model_card.md` and what was measured."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling_video_panda.configuration_video_panda import VideoPandaConfig
from ..modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration

TEMPLATE = Path(__file__).parent.parent / "model_card.md"


def write_model_card(
    folder: str | os.PathLike,
    *,
    name: str,
    repo_id: str | None = None,
    description: str = "",
    evaluation: str = "",
    results: Mapping[str, float] | None = None,
    dataset: str | None = None,
    split: str | None = None,
) -> Path:
    """Write `README.md` into a checkpoint's folder.

    Args:
        folder: of the checkpoint, with its `config.json`.
        name: of the model; the card's title.
        repo_id: under which it will be on the Hub; default: the name.
        description: a paragraph of Markdown.
        evaluation: a section of Markdown.
        results: accuracies in [0, 1] by what was measured; they go into the card's metadata, where the Hub finds them.
        dataset, split: what they were measured on.

    Returns:
        The file, replaced as a whole.

    Raises:
        ValueError: results without a data set, or one outside [0, 1].
        OSError: no such checkpoint.
    """
    results = dict(results or {})
    if results and dataset is None:
        raise ValueError("results were given without the data set that they were measured on")
    for metric, accuracy in results.items():
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy {metric!r} is {accuracy}, expected a share from 0 to 1")
    with torch.device("meta"):
        model = VideoPandaForConditionalGeneration(VideoPandaConfig.from_pretrained(folder))
    visual = (model.model.stab, model.model.projector)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        license="apache-2.0",
        tags=["video-panda"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="video-text-to-text",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type="accuracy",
                metric_name=f"accuracy ({metric})",
                metric_value=round(accuracy, 4),
            )
            for metric, accuracy in results.items()
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id or name,
        description=description,
        evaluation=evaluation,
        num_visual_parameters=_short(sum(tensor.numel() for part in visual for tensor in part.parameters())),
        num_parameters=_short(model.num_parameters()),
    )
    path = Path(folder, "README.md")
    partial = path.with_name(f".README.{os.getpid()}.partial")
    try:
        card.save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _short(count: int) -> str:
    """45.07 M"""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
