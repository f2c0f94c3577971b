"""The authors' checkpoints to folders that load with the Auto classes: `video-panda convert`.

Everything is checked against names, dtypes and shapes before the first byte is written; then the tensors stream from the
source's shards, mapped from disk one at a time, into safetensors files.
"""

import copy
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.dynamic_module_utils import custom_object_save

from ..modeling_video_panda.configuration_video_panda import VideoPandaConfig
from ..modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
from ..modeling_video_panda.saved_files_video_panda import record_saved_files
from ..modeling_video_panda.stab_video_panda import VideoPandaSTAB
from . import release_keys as keys
from .destination import check_destination, folder_in_the_making
from .release_config import TOKENIZER_FILES, find_source, make_config, make_generation_config, read_release_config
from .shards import SafetensorsWriter, TensorInfo, make_scratch, num_bytes_of, open_shard, parse_size, scan_shards

logger = logging.getLogger(__name__)

ALIGNMENT_HEAD_FILE = "alignment_head.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NUM_NAMED = 20  # names of a kind that a message lists
_ROWS_AT_A_TIME = 64


@dataclass
class _Plan:
    """What goes where, settled before anything is written.

    Args:
        kind: "videopanda" or "eve".
        config: our configuration.
        model: our model on the meta device: names and shapes, no values.
        sources: the checkpoint's tensors, in the order of its shards.
        rules: source name -> what it becomes.
        head: source name -> our name, for the tensors of the alignment head that are kept.
        outputs: our name -> (dtype, shape), in the order of writing.
        fresh: our names that the checkpoint cannot hold, drawn anew.
        dropped: reason -> how many tensors.
    """

    kind: str
    config: VideoPandaConfig
    model: VideoPandaForConditionalGeneration
    sources: dict[str, TensorInfo]
    rules: dict[str, keys.Rule] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    tokenizer=None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    keep_alignment_head: bool = False,
    vision_config: dict | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint of the authors (or EVE-7B, to start stage 1 from) to one that loads with the Auto classes.

    Args:
        source: folder, or repository on the Hub (`jh-yi/Video-Panda-7B`).
        destination: the folder to make. It appears when everything is in it, and not before.
        subfolder: of the source (`videopanda_fitu`, `videopanda_prtr1`).
        revision: branch, tag or commit of a source on the Hub.
        tokenizer: the language model's: an object, a folder or a repository's name; default: the source's own. Without any,
            the video and image processors are written alone.
        dtype: "float32", "float16" or "bfloat16" to cast to; default: each tensor as it is stored. BatchNorm's running
            statistics are float32 in any case.
        max_shard_size: of a file of weights, in bytes or like "5GB".
        overwrite: replace what is at `destination`.
        keep_alignment_head: write the alignment head of the distillation to `alignment_head.safetensors` (`norms.{j}`,
            `projections.{j}`, `input`, `output`), for training to go on from.
        vision_config: for EVE-7B: fields of `VideoPandaVisionConfig` that shall not have the published model's value.
        seed: of what is drawn: the rows of new tokens and, from EVE-7B, the temporal parts.
        progress: show a bar on stderr.

    Returns:
        `destination`.

    Raises:
        ValueError: another model's checkpoint; unknown or missing tensors, other shapes than expected; a damaged or unsafe
            file; a tokenizer of another size than the vocabulary.
        OSError: the source or one of its shards is missing, or the destination is taken.
    """
    cast = _checked_dtype(dtype)
    shard_bytes = parse_size(max_shard_size)
    target = Path(destination).expanduser().resolve()
    check_destination(target, overwrite)
    folder = find_source(source, subfolder, revision)
    if folder.resolve() == target or target in folder.resolve().parents:
        raise ValueError(f"{destination} is the source itself, or holds it: choose another folder")
    plan = _make_plan(folder, cast, keep_alignment_head, vision_config)
    generation = make_generation_config(folder, plan.config.text_config)
    processors = _make_processor(plan.config, _load_tokenizer(tokenizer, folder, plan.config))
    with folder_in_the_making(target, overwrite) as made:
        _write_weights(plan, made, shard_bytes, seed, cast, progress)
        _save_processor(processors, made)
        generation.save_pretrained(made)
        custom_object_save(plan.model, made)
        plan.config.save_pretrained(made)
        record_saved_files(made)
    _log_summary(plan, destination)
    return Path(destination)


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def _make_plan(folder: Path, cast: torch.dtype | None, keep_alignment_head: bool, vision_config: dict | None) -> _Plan:
    """Assign every tensor of the checkpoint, and every one of the model. Raises: ValueError, naming those that fail."""
    kind, release = read_release_config(folder)
    sources = scan_shards(folder)
    embedding = sources.get(keys.RELEASE_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        got = "it is missing" if embedding is None else f"got {embedding.shape}"
        raise ValueError(f"{folder}: {keys.RELEASE_EMBEDDING} must have shape (vocabulary, width), {got}")
    config = make_config(folder, kind, release, embedding.shape[0], vision_config)
    with torch.device("meta"):
        model = VideoPandaForConditionalGeneration(config)
    plan = _Plan(kind, config, model, sources)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[keys.HEAD]

    stored = cast or embedding.dtype
    problems = _assign_sources(plan, expected, keep_alignment_head, cast)
    taken = {target for rule in plan.rules.values() for target in rule.targets}
    absent = [name for name in expected if name not in taken and name != keys.STEP_COUNTER]
    plan.fresh = [name for name in absent if keys.starts_fresh(kind, name)]
    names_by_target = _names_by_target(kind, expected)
    missing = [names_by_target.get(name, name) for name in absent if not keys.starts_fresh(kind, name)]
    problems["missing"] = list(dict.fromkeys(missing)) + problems["missing"]
    for name in (*plan.fresh, *({keys.STEP_COUNTER} & expected.keys())):
        plan.outputs[name] = (_output_dtype(name, stored, None), expected[name])
    config.dtype = str(stored).removeprefix("torch.")

    if any(problems.values()):
        raise ValueError(f"{folder} is not a complete {kind} checkpoint: " + "; ".join(_describe(problems)))
    return plan


def _assign_sources(plan: _Plan, expected: dict, keep_alignment_head: bool, cast) -> dict[str, list[str]]:
    """Fill `rules`, `head`, `outputs` and `dropped`; return what is wrong, by kind."""
    rules = keys.key_map(plan.kind, set(expected))
    patterns = keys.dropped_patterns(plan.kind, set(expected), keep_alignment_head)
    text = plan.config.text_config
    head_shapes = keys.alignment_head_shapes(text.num_hidden_layers, text.hidden_size)
    problems: dict[str, list[str]] = {"unknown": [], "missing": [], "of the wrong shape": [], "of the wrong dtype": []}
    for name, info in plan.sources.items():
        rule, head_name = rules.get(name), keys.alignment_head_name(plan.kind, name) if keep_alignment_head else None
        if rule is not None:
            shape = _expected_shape(rule, expected, plan.config)
            if info.shape != shape:
                problems["of the wrong shape"].append(f"{name} (got {info.shape}, expected {shape})")
            if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
                problems["of the wrong dtype"].append(f"{name} (got {info.dtype}, expected floating point)")
            plan.rules[name] = rule
            for target in rule.targets:
                plan.outputs[target] = (_output_dtype(target, info.dtype, cast), expected[target])
        elif head_name is not None and info.shape == head_shapes.get(head_name):
            plan.head[name] = head_name
        elif head_name is not None and plan.kind == keys.EVE:
            plan.dropped["the alignment head, where it does not match"] += 1
        elif head_name is not None:
            shape = head_shapes.get(head_name, "no such tensor")
            problems["of the wrong shape"].append(f"{name} (got {info.shape}, expected {shape})")
        else:
            reason = next((patterns[pattern] for pattern in patterns if re.fullmatch(pattern, name)), None)
            if reason is None:
                problems["unknown"].append(name)
            else:
                plan.dropped[reason] += 1
    if keep_alignment_head and plan.kind != keys.EVE:
        kept = set(plan.head.values())
        problems["missing"] += [f"the alignment head's {name}" for name in head_shapes if name not in kept]
    return problems


def _expected_shape(rule: keys.Rule, expected: dict, config: VideoPandaConfig) -> tuple[int, ...]:
    shape = rule.source_shape(expected[rule.targets[0]])
    if rule.targets in ((keys.EMBEDDING,), (keys.HEAD,)):  # before the placeholders were added
        shape = (config.num_text_tokens, *shape[1:])
    return shape


def _output_dtype(name: str, stored: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    if name == keys.STEP_COUNTER:
        return torch.int64
    return torch.float32 if name in keys.RUNNING_STATISTICS else cast or stored


def _names_by_target(kind: str, expected: dict) -> dict[str, str]:
    """Our names -> the release's."""
    rules = keys.key_map(kind, set(expected))
    return {target: name for name, rule in rules.items() for target in rule.targets}


def _describe(problems: dict[str, list[str]]) -> list[str]:
    lines = []
    for kind, names in problems.items():
        if names:
            shown = ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")
            lines.append(f"{kind} ({len(names)}): {shown}")
    return lines


def _write_weights(plan: _Plan, made: Path, shard_bytes: int, seed: int, cast, progress: bool) -> None:
    """Stream every tensor to its place, one shard of the source after the other."""
    writers = _open_writers(plan.outputs, made, shard_bytes)
    if plan.head:
        layout = {
            ours: (cast or plan.sources[name].dtype, plan.sources[name].shape) for name, ours in plan.head.items()
        }
        writers |= dict.fromkeys(layout, SafetensorsWriter(made / ALIGNMENT_HEAD_FILE, layout))
    num_bytes = sum(num_bytes_of(*output) for output in plan.outputs.values())
    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc="converting", disable=not progress)
    try:
        for shard in dict.fromkeys(info.shard for info in plan.sources.values()):
            bar.set_postfix_str(shard.name)
            _write_shard(shard, plan, writers, seed, bar)
        for name, tensor in _fresh_tensors(plan, seed):
            writers[name].write(name, [tensor])
            bar.update(num_bytes_of(*plan.outputs[name]))
        for writer in set(writers.values()):
            writer.finish()
    finally:
        bar.close()
        for writer in set(writers.values()):
            writer.close()


def _open_writers(outputs: dict, made: Path, shard_bytes: int) -> dict[str, SafetensorsWriter]:
    """Our name -> the file it goes to; with an index beside if there are several."""
    groups: list[dict] = [{}]
    room = shard_bytes
    for name, output in outputs.items():
        num_bytes = num_bytes_of(*output)
        if num_bytes > room and groups[-1]:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = output
        room -= num_bytes
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    else:
        total = sum(num_bytes_of(*output) for output in outputs.values())
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (made / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    writers: dict[str, SafetensorsWriter] = {}
    scratch = make_scratch()
    for file, group in zip(files, groups):
        writers |= dict.fromkeys(group, SafetensorsWriter(made / file, group, scratch))
    return writers


def _write_shard(shard: Path, plan: _Plan, writers: dict[str, SafetensorsWriter], seed: int, bar: tqdm) -> None:
    with open_shard(shard) as tensors:
        for name, tensor in tensors.items():
            if name in plan.head:
                writers[plan.head[name]].write(plan.head[name], [tensor])
            elif name in plan.rules:
                targets = plan.rules[name].targets
                parts = tensor.chunk(len(targets)) if len(targets) > 1 else [tensor]
                for target, part in zip(targets, parts):
                    writers[target].write(target, [part, *_new_rows(target, part, plan, seed)])
                    bar.update(num_bytes_of(*plan.outputs[target]))


def _new_rows(target: str, old_rows: torch.Tensor, plan: _Plan, seed: int) -> list[torch.Tensor]:
    """What the vocabulary's new rows hold: zeros in the head; in the embedding, draws with the mean and spread of the old
    rows. They are never read as embeddings (visual tokens take their places), but each must differ from all the others:
    that is how the model finds placeholders among `inputs_embeds`."""
    if target not in (keys.EMBEDDING, keys.HEAD):
        return []
    num_old, width = old_rows.shape
    num_new = plan.outputs[target][1][0] - num_old
    if target == keys.HEAD:
        return [torch.zeros(num_new, width)]
    total, total_of_squares = torch.zeros(2, width, dtype=torch.float64)
    for rows in old_rows.split(_ROWS_AT_A_TIME):
        total += rows.double().sum(0)
        total_of_squares += rows.double().square().sum(0)
    mean = total / num_old
    spread = (total_of_squares / num_old - mean.square()).clamp(min=0).sqrt()
    noise = torch.randn(num_new, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [mean + spread * noise]


def _fresh_tensors(plan: _Plan, seed: int) -> list[tuple[str, torch.Tensor]]:
    """The step counter, and what the model's own initialisation draws for the parts that EVE-7B has not."""
    fresh = [(keys.STEP_COUNTER, torch.tensor(0))] if keys.STEP_COUNTER in plan.outputs else []
    names = [name for name in plan.fresh if name != keys.STEP_COUNTER]
    if names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = VideoPandaSTAB(plan.config.vision_config).state_dict()
        fresh += [(name, drawn[name.removeprefix("model.stab.")]) for name in names]
    return fresh


def _load_tokenizer(tokenizer, folder: Path, config: VideoPandaConfig):
    """The language model's tokenizer, or None if there is none. Raises: ValueError for one of another vocabulary."""
    # With a configuration at hand, the release's own config.json (of an unknown model_type) is not consulted.
    load = partial(AutoTokenizer.from_pretrained, config=config.text_config)
    if tokenizer is None:
        present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if not present:
            return None
        tokenizer = folder
        if present == ["tokenizer.model"]:
            # Without a word on its class, transformers would guess, and split the same text otherwise.
            load = LlamaTokenizer.from_pretrained
    if isinstance(tokenizer, (str, Path)):
        place = str(tokenizer)
        try:
            tokenizer = load(tokenizer)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"{place}: the tokenizer cannot be loaded (a tokenizer.model needs the packages sentencepiece and protobuf "
                f"once, for the conversion): {error}"
            ) from error
    else:
        place, tokenizer = type(tokenizer).__name__, copy.deepcopy(tokenizer)
    from ..processing.processing_video_panda import PLACEHOLDER_TOKENS

    vocabulary = tokenizer.get_vocab()
    num_text_tokens = len(tokenizer) - sum(token in vocabulary for token in PLACEHOLDER_TOKENS)
    sizes = f"{place}: the tokenizer has {num_text_tokens} tokens, but the checkpoint's vocabulary has {config.num_text_tokens}"
    if num_text_tokens > config.num_text_tokens:
        raise ValueError(sizes)
    if num_text_tokens < config.num_text_tokens:
        logger.warning("%s: it is filled up with unused tokens", sizes)
    return tokenizer


def _make_processor(config: VideoPandaConfig, tokenizer):
    """The processor, or without a tokenizer the image and video processors alone.

    Raises:
        ValueError: if the tokenizer has the placeholders at other ids than the configuration.
    """
    from ..processing.image_processing_video_panda import VideoPandaImageProcessor
    from ..processing.processing_video_panda import VideoPandaProcessor
    from ..processing.video_processing_video_panda import VideoPandaVideoProcessor

    vision = config.vision_config
    geometry = {
        "image_size": vision.canvas_size,  # half of vision.image_size at half resolution
        "patch_size": vision.patch_size,
        "downsample_window": vision.effective_window,
    }
    parts = [VideoPandaImageProcessor(**geometry), VideoPandaVideoProcessor(**geometry, num_frames=vision.num_frames)]
    if tokenizer is None:
        logger.warning("No tokenizer: the video and image processors are saved without one (see the option tokenizer)")
        return parts
    options = {"use_row_token": vision.use_row_token, "num_text_tokens": config.num_text_tokens}
    try:
        return [VideoPandaProcessor(*parts, tokenizer, **options)]
    except ValueError as error:
        raise ValueError(f"{tokenizer.name_or_path or type(tokenizer).__name__}: {error}") from error


def _save_processor(processors: list, made: Path) -> None:
    from ..processing.processing_video_panda import VideoPandaProcessor

    for processor in processors:
        processor.save_pretrained(made)
    # config.json names it: without a tokenizer, loading shall miss that and not the code.
    custom_object_save(object.__new__(VideoPandaProcessor), made)


def _log_summary(plan: _Plan, destination: str | Path) -> None:
    dropped = ", ".join(f"{number} ({reason})" for reason, number in sorted(plan.dropped.items())) or "none"
    logger.info("%s: %d tensors from %d; dropped: %s", destination, len(plan.outputs), len(plan.rules), dropped)
    if plan.fresh:
        logger.warning("These start fresh, the checkpoint has none: %s", ", ".join(plan.fresh))
