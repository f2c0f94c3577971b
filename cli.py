"""The `video-panda` command: one thin function a subcommand. What it computes can also be called from Python."""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Video-Panda: ask a small video-language model about a clip, convert and train one.",
)

STAGES = ("read", "load", "answer")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_MODEL = Path(__file__).parent / "default_model"
DEFAULT_MODEL_NOTE = (
    "no --model given: using the demonstration model of the package, which knows synthetic shapes only; "
    "name a real checkpoint (a folder or a Hub id) with --model"
)
# Options of several commands.
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="Frames to look at.")]
Dtype = Annotated[str, typer.Option("--dtype", help=f"One of {', '.join(DTYPES)}.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda:0. Default: a GPU if there is one.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository.")]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def check_checkpoint(model: str, revision: str | None = None) -> None:
    """Make sure that a folder or repository holds a Video-Panda checkpoint, from its configuration alone.

    Raises:
        ValueError: it is a checkpoint of another model.
        OSError: there is no such folder or repository.
    """
    from transformers import PreTrainedConfig

    from .hub.release_keys import EVE, VIDEOPANDA

    try:
        found, _ = PreTrainedConfig.get_config_dict(model, **_pinned(revision))
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{model}: no such folder, and it cannot be had from the Hub: {reason}") from error
    if not found:
        raise FileNotFoundError(f"{model} has no config.json: it is not a checkpoint")
    if found.get("model_type") in (VIDEOPANDA, EVE):
        raise ValueError(f"{model} is in the authors' own format: run `video-panda convert {model} FOLDER` first")
    if found.get("model_type") != "video_panda":
        raise ValueError(f"{model} holds a model of type {found.get('model_type')!r}, expected 'video_panda'")


def _pinned(revision: str | None) -> dict:
    return {} if revision is None else {"revision": revision}


def load_processor(model: str, revision: str | None = None):
    """The processor of a checkpoint (folder or Hub id). Raises: ValueError, OSError as `check_checkpoint`."""
    from .processing.processing_video_panda import VideoPandaProcessor

    check_checkpoint(model, revision)
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in TOKENIZER_FILES):
        raise OSError(f"{model} has no tokenizer: convert the checkpoint again with --tokenizer")
    return VideoPandaProcessor.from_pretrained(model, **_pinned(revision))


def load_model(model: str, dtype: str = "auto", device: str | None = None, revision: str | None = None):
    """The model of a checkpoint, in eval mode.

    Args:
        model: folder or Hub id.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: such as "cpu" or "cuda:0"; default: the first GPU if there is one.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ValueError: unknown dtype, a device that is not there, or a checkpoint of another model.
        OSError: no such folder or repository, or a file of it is missing.
    """
    import torch

    from .modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    check_checkpoint(model, revision)
    # Straight to the device: no copy of the weights in main memory first.
    return VideoPandaForConditionalGeneration.from_pretrained(
        model, dtype=dtype, device_map=device, **_pinned(revision)
    ).eval()


def ask(
    clip,
    question: str | Sequence[str],
    model=None,
    *,
    processor=None,
    num_frames: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 256,
    allow_urls: bool = False,
    make_streamer=None,
    report=None,
) -> dict | list[dict]:
    """Ask a question about a video, or about a picture; or several, of which the clip is encoded for the first only.

    Args:
        clip: whatever the processor takes as a video: path, bytes, array, list of frames; a picture file is asked about
            as a still image.
        question: the question, or a list of questions.
        model: folder or Hub id; or a loaded model, with its `processor`; default: the package's own demonstration model,
            which knows synthetic shapes only.
        processor: of a loaded model.
        num_frames: frames to look at; default: what the processor was made with.
        dtype, device, revision: see `load_model`.
        max_new_tokens: longest answer, in tokens.
        allow_urls: whether `clip` may be fetched from the web.
        make_streamer: called with the tokenizer, returns what is given the tokens as they come (`TextStreamer`).
        report: called with a line of text at each stage.

    Returns:
        `answer`, `question`, `frames_indices` (None for a picture), `timestamps` (seconds; None where the rate of the
        frames is unknown), `num_prompt_tokens`, `num_answer_tokens`, `seconds` by stage ("read", "load", "answer"). Of
        several questions, a list of these.

    Raises:
        ValueError, OSError: what is wrong with the checkpoint or the clip, and where.
    """
    report = report or (lambda line: None)
    if model is None:
        report(DEFAULT_MODEL_NOTE)
        model = DEFAULT_MODEL
    is_loaded = not isinstance(model, (str, Path))
    if is_loaded and processor is None:
        raise ValueError("a loaded model needs its processor: ask(clip, question, model, processor=processor)")
    questions = [question] if isinstance(question, str) else list(question)
    if not questions:
        raise ValueError("question is an empty list; expected at least one question")
    times = [time.perf_counter()]

    # The clip first: a mistake in its name should not cost the loading of a large model.
    report("reading the clip")
    processor = processor or load_processor(str(model), revision)
    seen = {}
    if len(questions) > 1:
        clip, seen = _decode_once(processor, clip, num_frames, allow_urls)
    inputs, frames = _read_clip(processor, clip, questions[0], num_frames, allow_urls)
    frames.update(seen)
    times.append(time.perf_counter())

    if not is_loaded:
        report(f"loading {'the demonstration model' if model == DEFAULT_MODEL else model}")
        model = load_model(str(model), dtype, device, revision)
    times.append(time.perf_counter())

    results = []
    cache = model.prefix_cache() if len(questions) > 1 else None
    for own_question in questions:
        if results:
            inputs, _ = _read_clip(processor, clip, own_question, num_frames, allow_urls)
            times = [times[-1], *[time.perf_counter()] * 2]  # nothing is loaded
        num_prompt_tokens = inputs["input_ids"].shape[1]
        report(f"answering ({num_prompt_tokens} prompt tokens)" + f": {own_question}" * (len(questions) > 1))
        streamer = make_streamer(processor.tokenizer) if make_streamer else None
        options = {"past_key_values": cache, "do_sample": False, "max_new_tokens": max_new_tokens}
        output = model.generate(**inputs.to(model.device), **options, streamer=streamer)
        times.append(time.perf_counter())
        answer = processor.decode(output[0, num_prompt_tokens:], skip_special_tokens=True).strip()
        counts = {"num_prompt_tokens": num_prompt_tokens, "num_answer_tokens": output.shape[1] - num_prompt_tokens}
        seconds = {name: round(end - begin, 3) for name, begin, end in zip(STAGES, times, times[1:])}
        results.append({"answer": answer, "question": own_question, **frames, **counts, "seconds": seconds})
    return results[0] if isinstance(question, str) else results


def _decode_once(processor, clip, num_frames: int | None, allow_urls: bool):
    """The frames of a video file that the model will see, and which they are; anything else as it is."""
    from .processing.sources_video_panda import is_image_file_name

    if not isinstance(clip, (str, Path, bytes)) or is_image_file_name(clip):
        return clip, {}
    choose = partial(processor.video_processor.sample_frames, num_frames=num_frames)
    frames, metadata = processor.video_processor.fetch_videos(clip, choose, allow_urls)
    return frames, _frames_seen([metadata])


def _frames_seen(metadatas) -> dict:
    """Index and time of each frame."""
    seen = {"frames_indices": None, "timestamps": None}
    for metadata in metadatas:
        seen["frames_indices"] = [int(index) for index in metadata.frames_indices]
        if metadata.fps is not None or metadata.source_frame_times is not None:
            seen["timestamps"] = [float(second) for second in metadata.timestamps]
    return seen


def _read_clip(processor, clip, question: str, num_frames: int | None, allow_urls: bool):
    """The model's inputs for one question about one clip, and which frames it will see."""
    from .processing.sources_video_panda import is_image_file_name

    kind = "image" if is_image_file_name(clip) else "video"
    conversation = [{"role": "user", "content": [{"type": kind, kind: clip}, {"type": "text", "text": question}]}]
    options = {"return_metadata": True, "allow_urls": allow_urls, "num_frames": num_frames}
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={name: value for name, value in options.items() if value is not None},
    )
    return inputs, _frames_seen(inputs.pop("video_metadata", None) or ())


def info(model: str, revision: str | None = None) -> dict:
    """What a checkpoint costs, from its configuration alone: no weights are read.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        `parameters` by part, `tokens` of a frame and of a video for a square and a 16:9 clip, `memory_bytes` of the
        weights by dtype.

    Raises:
        ValueError, OSError: as `check_checkpoint`.
    """
    import torch

    from .modeling_video_panda.configuration_video_panda import VideoPandaConfig
    from .modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
    from .processing.geometry_video_panda import token_grid

    check_checkpoint(model, revision)
    config = VideoPandaConfig.from_pretrained(model, **_pinned(revision))
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
    question: Annotated[
        list[str], typer.Argument(help="What to ask about it. Of several questions, each has its answer on a line.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: a folder or a Hub id. Default: a demonstration model.")
    ] = None,
    frames: Frames = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch CLIP where it is an http(s) address.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the running text.")] = False,
) -> None:
    """Ask one or more questions about a video; the answer is printed as it is generated."""
    from transformers import TextStreamer

    from .processing.sources_video_panda import is_url

    if is_url(clip) and not allow_urls:
        raise ValueError(f"{clip} is a URL and URLs are off: add --allow-urls to have it fetched")
    results = ask(
        clip,
        question,
        model,
        num_frames=frames,
        dtype=dtype,
        device=device,
        revision=revision,
        max_new_tokens=max_new_tokens,
        allow_urls=allow_urls,
        make_streamer=None if as_json else partial(TextStreamer, skip_prompt=True, skip_special_tokens=True),
        report=lambda line: typer.echo(f"video-panda: {line}", err=True),
    )
    if as_json:
        for result in results:
            typer.echo(json.dumps({"clip": clip, "model": model, **result}, ensure_ascii=False))


@app.command("info")
def _info_command(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a Hub id.")],
    revision: Revision = None,
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
    revision: Revision = None,
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


@app.command("check-data")
def _check_data_command(
    file: Annotated[Path, typer.Argument(help="Training data: a JSON or JSONL file.")],
    root: Annotated[Path, typer.Argument(help="Folder that the samples' paths start from.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
    report: Annotated[Path | None, typer.Option(help="Report, JSON lines. Default: FILE.check.jsonl.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to read of a video.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a clip counts as bad.")] = 60.0,
) -> None:
    """Read every clip of training data once and list those that cannot be read; exit code 1 if there are any."""
    from .trainers.check_data import check_data

    result = check_data(file, root, num_workers=workers, report=report, num_frames=frames, timeout_s=timeout)
    for problem in result.bad:
        typer.echo(f"sample {problem['index']} (id {problem['id']!r}): {problem['reason_kind']}: {problem['reason']}")
    typer.echo(
        f"{result.num_samples} samples, {result.num_clips} clips, {result.num_bad} samples with something wrong; "
        f"report: {result.report}"
    )
    if result.num_bad:
        raise typer.Exit(1)


@app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _train_command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file: stage, model, data, and any training argument.")],
) -> None:
    """Train one stage; options such as --learning_rate 1e-4 win over the file."""
    from .trainers.train import train

    train(config, context.args)


# Options of `evaluate` alone.
Output = Annotated[
    Path | None,
    typer.Option("--output", "--output-dir", help="Folder of the run, to resume it. Default: results/BENCHMARK."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", "--data-dir", help="Folder of questions and clips. Default for shapes-qa: OUTPUT/clips."),
]
UnreadableShare = Annotated[
    float, typer.Option(min=0, max=1, help="Of questions whose clips may be missing or unreadable.")
]
JudgeName = Annotated[
    str | None, typer.Option(help="Model that judges the answers: a folder or Hub id, or an id at --judge-url.")
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible server, such as http://localhost:8000/v1. Texts go there.")
]


@app.command("evaluate")
def _evaluate_command(
    checkpoint: Annotated[str | None, typer.Argument(metavar="MODEL", help="Default: a demonstration model.")] = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL: a folder or a Hub id.")] = None,
    benchmark: Annotated[str, typer.Option(help="One of the names below.")] = "shapes-qa",
    output: Output = None,
    data: Data = None,
    split: Annotated[str | None, typer.Option(help="Part of the benchmark. Default: test.")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Only so many clips.")] = None,
    frames: Frames = None,
    repeat_frame: Annotated[int | None, typer.Option(min=0, help="Show this one frame again and again.")] = None,
    prompt: Annotated[str, typer.Option(help="Words around {question}.")] = "{question}",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    max_unreadable_share: UnreadableShare = 0.0,
    retry_unreadable: Annotated[bool, typer.Option(help="Ask again where a clip could not be read before.")] = False,
    judge: JudgeName = None,
    judge_url: JudgeUrl = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Ask a checkpoint the questions of a benchmark; prints accuracies by kind of question.

    Benchmarks: shapes-qa, msvd-qa, msrvtt-qa, tgif-qa, activitynet-qa, video-chatgpt.
    """
    from .evaluation.benchmarks import open_benchmark
    from .evaluation.judges import open_judge
    from .evaluation.runner import evaluate, own_device

    model = _one_model(checkpoint, model)
    output = output or Path("results", benchmark)
    # What is wrong with the data, or the judge's name, should not cost the loading of a large model.
    opened = open_benchmark(benchmark, data or output / "clips", split, clips)
    chosen_judge = open_judge(judge, judge_url)
    processor = load_processor(model, revision)
    result = evaluate(
        load_model(model, dtype, device or own_device(), revision),
        opened,
        processor,
        output_dir=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_frames=frames,
        repeat_frame=repeat_frame,
        prompt=prompt,
        max_unreadable_share=max_unreadable_share,
        retry_unreadable=retry_unreadable,
        judge=chosen_judge,
        model_name=model,
    )
    if result.is_first_process:
        typer.echo(str(result))


def _one_model(argument: str | None, option: str | None) -> str:
    """The checkpoint that is named in one of two ways, or the demonstration model."""
    if argument is not None and option is not None:
        raise ValueError(f"MODEL and --model name two checkpoints, {argument} and {option}, expected one")
    if argument is None and option is None:
        typer.echo(f"video-panda: {DEFAULT_MODEL_NOTE}", err=True)
    return argument or option or str(DEFAULT_MODEL)


@app.command("report")
def _report_command(
    outputs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Folders that evaluate has written.")],
    output: Annotated[Path, typer.Option("--output", "--output-dir", help="Folder of the report.")] = Path("report"),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw; needs the extra `report`.")] = True,
) -> None:
    """Compare runs with each other and with the paper's figures: report.md, report.html and plots."""
    from .evaluation.report import write_report

    for path in write_report(outputs, output, draw_plots=plots):
        typer.echo(path)


@app.command("push")
def _push_command(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="On the Hub, such as you/video-panda-7b.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there. Default: main.")] = None,
    results: Annotated[list[Path] | None, typer.Option(help="Folder of an evaluation run; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list; push nothing.")] = False,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of files to leave alone.")] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card. Default: the repository's name.")] = None,
    description: Annotated[str, typer.Option(help="Paragraph for the card.")] = "",
    license: Annotated[str | None, typer.Option(help="Of the weights. Default: the card's, else apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was made from.")] = None,
    latency: Annotated[Path | None, typer.Option(help="JSON file of measured rows for the card.")] = None,
    dataset_id: Annotated[
        list[str] | None, typer.Option(help="BENCHMARK=OWNER/DATASET, for the Hub's leaderboards.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for loading in a fresh process.")] = 600.0,
    device: Annotated[str | None, typer.Option(help="For that, such as cpu. Default: a GPU if there is one.")] = None,
) -> None:
    """Check a checkpoint's folder, write its model card, and push both to the Hub in one commit."""
    from .hub.push import parse_dataset_ids, push_checkpoint, read_latency

    options = {"name": name, "license": license, "base_model": base_model}
    push_checkpoint(
        folder,
        repo_id,
        private=private,
        revision=revision,
        results=results or (),
        dry_run=dry_run,
        exclude=exclude or (),
        timeout_s=timeout,
        device=device,
        dataset_ids=parse_dataset_ids(dataset_id or ()),
        description=description,
        latency=() if latency is None else read_latency(latency),
        report=typer.echo,
        **{key: value for key, value in options.items() if value is not None},
    )


def main() -> None:
    """The console script: what the user can mend is one line on stderr, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"video-panda: error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
