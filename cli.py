"""The `video-panda` command: one thin function a subcommand. What it computes can also be called from Python."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Video-Panda: ask a small video-language model about a clip.",
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
RELEASE_MODEL_TYPES = ("videopanda", "eve")


def load(model: str, dtype: str = "auto", device: str | None = None, revision: str | None = None):
    """Load a checkpoint to ask.

    Args:
        model: folder or Hub id.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: such as "cpu" or "cuda:0"; default: the first GPU if there is one.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        (model in eval mode, processor).

    Raises:
        ValueError: unknown dtype, or a checkpoint of another model.
        OSError: no such folder or repository, or a file of it is missing.
    """
    import torch

    from .modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
    from .processing.processing_video_panda import VideoPandaProcessor

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {} if revision is None else {"revision": revision}
    _check_model_type(model, options)
    # Straight to the device: no copy of the weights in main memory first.
    network = VideoPandaForConditionalGeneration.from_pretrained(model, dtype=dtype, device_map=device, **options)
    return network.eval(), VideoPandaProcessor.from_pretrained(model, **options)


def _check_model_type(model: str, options: dict) -> None:
    from transformers import PreTrainedConfig

    found, _ = PreTrainedConfig.get_config_dict(model, **options)
    if not found:
        raise FileNotFoundError(f"{model} has no config.json: it is not a checkpoint")
    model_type = found.get("model_type")
    if model_type in RELEASE_MODEL_TYPES:
        raise ValueError(f"{model} is in the authors' own format: run `video-panda convert {model} FOLDER` first")
    if model_type != "video_panda":
        raise ValueError(f"{model} holds a model of type {model_type!r}, expected 'video_panda'")


def ask(
    clip,
    question: str,
    model,
    *,
    processor=None,
    num_frames: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 256,
    allow_urls: bool = False,
    streamer=None,
    report=None,
) -> dict:
    """Ask a question about a video, or about a picture.

    Args:
        clip: whatever the processor takes as a video: path, bytes, array, list of frames; a picture file is asked about
            as a still image.
        question: the question.
        model: folder or Hub id; or a loaded model, with its `processor`.
        processor: of a loaded model.
        num_frames: frames to look at; default: what the processor was made with.
        dtype, device, revision: see `load`.
        max_new_tokens: longest answer, in tokens.
        allow_urls: whether `clip` may be fetched from the web.
        streamer: called with tokens as they come, such as transformers' `TextStreamer`; or a function that makes one
            from the tokenizer.
        report: called with a line of text at each stage.

    Returns:
        `answer`, `question`, `frames_indices` and `timestamps` (seconds; None for a picture), `num_prompt_tokens`,
        `num_answer_tokens`, `seconds` by stage ("load", "read", "answer").

    Raises:
        ValueError, OSError: what is wrong with the checkpoint or the clip, and where.
    """
    import torch

    from .processing.sources_video_panda import is_image_file_name

    report = report or (lambda line: None)
    times = [time.perf_counter()]
    if isinstance(model, (str, Path)):
        report(f"loading {model}")
        model, processor = load(str(model), dtype, device, revision)
    elif processor is None:
        raise ValueError("a loaded model needs its processor: ask(clip, question, model, processor=processor)")
    times.append(time.perf_counter())

    report("reading the clip")
    visual = {"type": "image" if is_image_file_name(clip) else "video"}
    visual[visual["type"]] = clip
    conversation = [{"role": "user", "content": [visual, {"type": "text", "text": question}]}]
    options = {"return_metadata": True, "allow_urls": allow_urls, "num_frames": num_frames}
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={name: value for name, value in options.items() if value is not None},
    )
    metadata = (inputs.pop("video_metadata", None) or [None])[0]
    num_prompt_tokens = inputs["input_ids"].shape[1]
    times.append(time.perf_counter())

    report(f"answering ({num_prompt_tokens} prompt tokens)")
    if callable(streamer) and not hasattr(streamer, "put"):
        streamer = streamer(processor.tokenizer)
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device), do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer
        )
    new_tokens = output[0, num_prompt_tokens:]
    times.append(time.perf_counter())
    stages = zip(("load", "read", "answer"), times, times[1:])
    return {
        "answer": processor.decode(new_tokens, skip_special_tokens=True).strip(),
        "question": question,
        "frames_indices": None if metadata is None else [int(index) for index in metadata.frames_indices],
        "timestamps": None if metadata is None else [float(second) for second in metadata.timestamps],
        "num_prompt_tokens": num_prompt_tokens,
        "num_answer_tokens": len(new_tokens),
        "seconds": {name: round(end - start, 3) for name, start, end in stages},
    }


def info(model: str, revision: str | None = None) -> dict:
    """What a checkpoint costs, from its configuration alone: no weights are read.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        `parameters` by part, `tokens` of a frame and of a video for a square and a 16:9 clip, `memory_bytes` of the
        weights by dtype.

    Raises:
        ValueError, OSError: as `load`.
    """
    import torch

    from .modeling_video_panda.configuration_video_panda import VideoPandaConfig
    from .modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
    from .processing.geometry_video_panda import token_grid

    options = {} if revision is None else {"revision": revision}
    _check_model_type(model, options)
    config = VideoPandaConfig.from_pretrained(model, **options)
    with torch.device("meta"):
        network = VideoPandaForConditionalGeneration(config)
    parts = {
        "STAB": network.model.stab,
        "projector": network.model.projector,
        "language model": network.model.language_model,
    }
    parameters = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in parts.items()}
    total = network.num_parameters()
    parameters["lm_head"] = total - sum(parameters.values())
    vision, tokens = config.vision_config, {}
    for shape, size_px in (("square", (1, 1)), ("16:9", (16, 9))):
        of_frame = vision.num_frame_tokens(*token_grid(*size_px, vision.num_tokens_per_side))
        tokens[shape] = {"frame": of_frame, "video": of_frame * vision.num_frames}
    return {
        "model": str(model),
        "parameters": {**parameters, "total": total},
        "num_frames": vision.num_frames,
        "tokens": tokens,
        "memory_bytes": {"float32": 4 * total, "bfloat16": 2 * total, "float16": 2 * total},
    }


@app.command("ask")
def _ask_command(
    clip: Annotated[str, typer.Argument(help="Video file (or picture).")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub id.")],
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to look at.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch CLIP where it is an http(s) address.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the running text.")] = False,
) -> None:
    """Ask a question about a video; the answer is printed as it is generated."""
    from transformers import TextStreamer

    def stream(tokenizer):
        return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    result = ask(
        clip,
        question,
        model,
        num_frames=frames,
        dtype=dtype,
        device=device,
        revision=revision,
        max_new_tokens=max_new_tokens,
        allow_urls=allow_urls,
        streamer=None if as_json else stream,
        report=lambda line: typer.echo(f"video-panda: {line}", err=True),
    )
    if as_json:
        typer.echo(json.dumps({"clip": clip, "model": model, **result}, ensure_ascii=False))


@app.command("info")
def _info_command(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print parameters per part, tokens per video and memory per dtype of a checkpoint."""
    result = info(model, revision)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{'part':<16}{'parameters':>16}")
    for name, count in result["parameters"].items():
        typer.echo(f"{name:<16}{count:>16,}")
    typer.echo(f"\n{'clip':<16}{'tokens a frame':>16}{'tokens a video':>16}  ({result['num_frames']} frames)")
    for shape, tokens in result["tokens"].items():
        typer.echo(f"{shape:<16}{tokens['frame']:>16,}{tokens['video']:>16,}")
    typer.echo(f"\n{'dtype':<16}{'weights':>16}")
    for name, size in result["memory_bytes"].items():
        typer.echo(f"{name:<16}{size / 2**20:>12,.1f} MiB")


@app.command("convert")
def _convert_command(
    source: Annotated[str, typer.Argument(help="The authors' checkpoint: a folder or a Hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder of it inside a Hub repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, where the source has none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert the weights to this dtype.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    keep_alignment_head: Annotated[
        bool, typer.Option("--keep-alignment-head", help="Also write the distillation's head, to go on training.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn the authors' checkpoint (or EVE-7B) into a folder that loads with the Auto classes."""
    from .hub.convert import convert_checkpoint

    written = convert_checkpoint(
        source,
        destination,
        subfolder=subfolder,
        revision=revision,
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_size=max_shard_size,
        keep_alignment_head=keep_alignment_head,
        overwrite=overwrite,
    )
    typer.echo(str(written))


def main() -> None:
    """The console script: what the user can mend is one line on stderr, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"video-panda: error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
