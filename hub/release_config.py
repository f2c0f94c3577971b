"""Finding a checkpoint of the authors, and their config.json and generation_config.json in our terms."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig

from ..modeling_video_panda.configuration_video_panda import VideoPandaConfig, VideoPandaVisionConfig
from .release_keys import EVE, VIDEOPANDA
from .shards import INDEX_NAMES, SINGLE_NAMES, read_json, weight_map_of

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# Fields of the release's config.json that the language model has too, under the same names.
_REQUIRED_TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TEXT_FIELDS = (
    *_REQUIRED_TEXT_FIELDS,
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "pretraining_tp",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
# The release's name of each field of `VideoPandaVisionConfig` that its config.json decides.
_VISION_FIELDS = {
    VIDEOPANDA: {
        "image_size": "image_size",
        "patch_size": "patch_stride",
        "downsample_window": "conv_stride",
        "hidden_size": "video_hidden_size",
        "num_chunk_frames": "num_frames",
        "num_frames": "all_num_frames",
    },
    # An image model: it knows no frames, and its canvas (672 px) is not that of stage 1. The rest is the published model.
    EVE: {"hidden_size": "mm_hidden_size"},
}
_PROJECTOR_TYPE = "mlp2x_gelu"
# transformers refuses to save these where nothing is sampled.
_SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)


def find_source(source: str | Path, subfolder: str | None, revision: str | None) -> Path:
    """The local folder of a checkpoint; one on the Hub is downloaded (only the files that are needed).

    Raises:
        OSError: there is no such folder, or it cannot be downloaded.
    """
    local = Path(source).expanduser()
    if local.exists():
        folder = local / subfolder if subfolder else local
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder: expected one that holds a checkpoint's config.json")
        if not (folder / "config.json").is_file():
            inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f"; its subfolders {', '.join(inner)} do: name one as the subfolder" if inner else ""
            raise FileNotFoundError(f"{folder} holds no config.json{hint}")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source}: no such folder, and not a repository's name on the Hub (owner/name)")
    try:
        return _download(str(source), subfolder, revision)
    except OSError as error:
        place = f"{source}/{subfolder}" if subfolder else source
        raise OSError(f"{place}: no such folder, and it cannot be had from the Hub: {error}") from error


def _download(repo_id: str, subfolder: str | None, revision: str | None) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""

    def fetch(names, revision=revision) -> Path:
        patterns = [prefix + name for name in names]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    snapshot = fetch((*_SMALL_FILES, *TOKENIZER_FILES, *INDEX_NAMES))
    folder, commit = snapshot / prefix, snapshot.name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"it holds no {prefix}config.json")
    for index_name, single_name in zip(INDEX_NAMES, SINGLE_NAMES):
        has_index = (folder / index_name).is_file()
        fetch(set(weight_map_of(folder / index_name).values()) if has_index else (single_name,), commit)
        if has_index or (folder / single_name).is_file():
            break
    return folder


def read_release_config(folder: Path) -> tuple[str, dict]:
    """Which kind of checkpoint ("videopanda" or "eve") it is, and its config.json.

    Raises:
        ValueError: it is a checkpoint of another model, or has another projector.
    """
    path = folder / "config.json"
    release = read_json(path)
    kind = release.get("model_type")
    if kind not in (VIDEOPANDA, EVE):
        raise ValueError(
            f"{path}: this is a checkpoint of another model: model_type is {kind!r}, expected {VIDEOPANDA!r} (the authors' "
            f"release) or {EVE!r} (EVE-7B)"
        )
    projector = release.get("mm_projector_type")
    if projector != _PROJECTOR_TYPE:
        raise ValueError(f"{path}: mm_projector_type is {projector!r}, expected {_PROJECTOR_TYPE!r}")
    return kind, release


def make_config(
    folder: Path, kind: str, release: dict, num_text_tokens: int, vision_config: dict | None
) -> VideoPandaConfig:
    """Our configuration of a checkpoint.

    Args:
        num_text_tokens: rows of its input embedding: its vocabulary.
        vision_config: for an EVE checkpoint: fields of `VideoPandaVisionConfig` to choose otherwise.

    Raises:
        ValueError: a field is missing or makes no sense.
    """
    path = folder / "config.json"
    missing = [name for name in (*_REQUIRED_TEXT_FIELDS, *_VISION_FIELDS[kind].values()) if release.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if num_text_tokens < release["vocab_size"]:
        raise ValueError(
            f"{path}: vocab_size is {release['vocab_size']}, but the input embedding has {num_text_tokens} rows"
        )
    text = {name: release[name] for name in _TEXT_FIELDS if release.get(name) is not None}
    text["vocab_size"] = num_text_tokens
    if text.get("pad_token_id", 0) < 0:  # the first LLaMA's way of saying "none"
        del text["pad_token_id"]
    vision = {ours: release[theirs] for ours, theirs in _VISION_FIELDS[kind].items()}
    if vision_config and kind != EVE:
        raise ValueError(f"vision_config can be chosen for an EVE checkpoint only, this one is {kind!r}")
    try:
        return VideoPandaConfig.from_text_config(
            LlamaConfig(**text),
            vision_config=VideoPandaVisionConfig(**(vision | (vision_config or {}))),
            rotary_table_dtype="float16",  # PARITY: see VideoPandaConfig
            architectures=["VideoPandaForConditionalGeneration"],
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def make_generation_config(folder: Path, text_config: LlamaConfig) -> GenerationConfig:
    """The release's generation settings, without what transformers would refuse to save.

    Raises:
        ValueError: what remains contradicts itself.
    """
    path = folder / "generation_config.json"
    fields = read_json(path) if path.is_file() else {}
    for name in ("_from_model_config", "transformers_version"):
        fields.pop(name, None)
    if not fields.get("do_sample"):
        for name in _SAMPLING_FIELDS:
            fields.pop(name, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(text_config, name))
    try:
        generation = GenerationConfig(**fields)
        generation.validate(strict=True)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return generation
