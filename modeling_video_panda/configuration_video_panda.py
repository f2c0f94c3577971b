"""Configuration of Video-Panda: STAB (`vision_config`), the language model (`text_config`) and the placeholder ids.

Defaults are the published 7B model (arXiv 2412.18609 and the authors' release `jh-yi/Video-Panda-7B`).
"""

import os
from collections.abc import Iterable
from dataclasses import fields
from math import inf
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

from .saved_files_video_panda import check_saved_files, saving_aside

DOWNSAMPLINGS = ("lsd", "avg_pool", "half_resolution", "perceiver_resampler")
DOWNSAMPLING_POSITIONS = ("after_lste", "before_lste")
VOCABULARY_MULTIPLE = 64

# CLIP's, for pixels in [0, 1]; also the processors' defaults.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Everything of the model loads through these; the full model can `generate`, so each Auto class gives that one.
AUTO_MAP = {
    "AutoConfig": "configuration_video_panda.VideoPandaConfig",
    "AutoModel": "modeling_video_panda.VideoPandaForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_video_panda.VideoPandaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_video_panda.VideoPandaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_video_panda.VideoPandaForConditionalGeneration",
    "AutoProcessor": "processing_video_panda.VideoPandaProcessor",
    "AutoVideoProcessor": "video_processing_video_panda.VideoPandaVideoProcessor",
    "AutoImageProcessor": "image_processing_video_panda.VideoPandaImageProcessor",
}

# Where Vicuna-7B v1.5 differs from what transformers calls a Llama; its 32000 tokens and the placeholders, padded.
_VICUNA_7B = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 0}

# How language models of transformers say what else they do to their logits, and the value that means: nothing.
_NEUTRAL_HEAD = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_mup_width_multiplier": 1.0,
    "lm_head_bias": False,
}

# What transformers itself stores in a config or passes to its constructor, beside the declared fields.
_TRANSFORMERS_KEYS = frozenset(
    (
        "model_type",
        "auto_map",
        "name_or_path",
        "torch_dtype",
        "attn_implementation",
        "experts_implementation",
        "num_labels",
        "output_attentions",
        "use_cache",
        "quantization_config",
        "transformers_weights",
        "per_layer_config",
        "tie_last_hidden_states",
        "base_model_tp_plan",
        "base_model_pp_plan",
        # What tutorials set on a model's top-level configuration, though the language model's own is what counts.
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "pretraining_tp",
        "task_specific_params",
        "tokenizer_class",
    )
)


def _refuse_unknown(config: PreTrainedConfig, extra: Iterable[str]) -> None:
    """A misspelt ablation must not be silently ignored: transformers would store any keyword as an attribute."""
    declared = {field.name for field in fields(config)}
    unknown = sorted(key for key in extra if key not in _TRANSFORMERS_KEYS and not key.startswith("_"))
    if unknown:
        own = sorted(declared - {field.name for field in fields(PreTrainedConfig)})
        raise ValueError(
            f"{type(config).__name__}: unknown field {', '.join(unknown)}. The fields are: {', '.join(own)}"
        )


def _require_positive_integers(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")


def _require_number(config: PreTrainedConfig, name: str, low: float, high: float, expected: str) -> None:
    """A number in [low, high); a bool is none, and NaN lies in no interval."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{type(config).__name__}.{name} must {expected}, got {value!r}")


def _language_model_vocab_size(text_config: PreTrainedConfig) -> int:
    """Its `vocab_size`, or a ValueError where the configuration is of another kind of model."""
    try:
        vocab_size = text_config.vocab_size
    except AttributeError:
        vocab_size = None
    if vocab_size is None or text_config.is_encoder_decoder:
        reason = "it has no vocab_size" if vocab_size is None else "it is an encoder-decoder"
        raise ValueError(
            f"VideoPandaConfig.text_config must be a causal language model's, got model_type "
            f"{text_config.model_type!r}: {reason} (of a multimodal model, give its own text_config)"
        )
    return vocab_size


class VideoPandaVisionConfig(PreTrainedConfig):
    """Configuration of STAB, the Spatio-Temporal Alignment Block (paper section 3), and of the projector.

    Args:
        image_size: side of the square canvas in px, before `downsampling="half_resolution"` halves it.
        patch_size: side of a patch in px.
        num_channels: colour channels of a frame.
        downsample_window: side of the window of patches that becomes one token (2: 2 x 2 patches).
        hidden_size: width D of STAB.
        num_attention_heads: heads of every attention in STAB.
        num_frames: frames a video is sampled to (what the checkpoint was trained with; any number can be given).
        num_chunk_frames: frames K of a chunk, the temporal extent of everything in STAB.
        lste_reduction: LSTE's inner width is floor(hidden_size / lste_reduction).
        gstra_mlp_ratio: inner width of GSTRA's MLP over hidden_size.
        gstra_dropout: dropout inside GSTRA's MLP, in training.
        fusion_dropout: dropout before the fusion's linear layer, in training.
        projector_hidden_act: activation between the projector's two linear layers ("gelu" is the erf form).
        layer_norm_eps, batch_norm_eps: epsilons.
        initializer_range: standard deviation of freshly drawn weights.
        use_row_token: put the learned `<row>` embedding after each row of tokens (Table 4).
        use_fsra: compute S, the frame's own context (Table 4).
        use_lste: local spatio-temporal encoding (Table 4).
        use_gstra: compute V, the chunk's global context (Table 4; without LSTE and GSTRA: EVE* of Table 1).
        downsampling: how a window of patches becomes a token: "lsd", "avg_pool", "half_resolution" (the frame is shown
            at half size and every patch is a token) or "perceiver_resampler" (Table 9).
        downsampling_position: "after_lste", or "before_lste" for the variant of Table 8.
        num_perceiver_layers: depth of the Perceiver Resampler, where that is chosen.
        image_mean, image_std: of each channel, for pixels in [0, 1]: how pixels that are given as uint8 are normalised.

    Raises:
        ValueError: for a field that does not exist, is out of range, or contradicts another one.
    """

    model_type = "video_panda_vision"
    base_config_key = "vision_config"

    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    downsample_window: int = 2
    hidden_size: int = 1024
    num_attention_heads: int = 8
    num_frames: int = 8
    num_chunk_frames: int = 4
    lste_reduction: float = 1.5
    gstra_mlp_ratio: int = 4
    gstra_dropout: float = 0.5
    fusion_dropout: float = 0.5
    projector_hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_row_token: bool = True
    use_fsra: bool = True
    use_lste: bool = True
    use_gstra: bool = True
    downsampling: str = "lsd"
    downsampling_position: str = "after_lste"
    num_perceiver_layers: int = 2
    image_mean: list[float] | tuple[float, ...] = _CLIP_MEAN
    image_std: list[float] | tuple[float, ...] = _CLIP_STD

    def __post_init__(self, **kwargs):
        _refuse_unknown(self, kwargs)
        for name in ("image_mean", "image_std"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))  # as config.json has it
        super().__post_init__(**kwargs)
        self.check()

    @property
    def canvas_size(self) -> int:
        """Side of the canvas that STAB is given, in px."""
        halved = self.downsampling == "half_resolution"
        return self.image_size // self.downsample_window if halved else self.image_size

    @property
    def num_patches_per_side(self) -> int:
        """P: patches a side of the canvas."""
        return self.canvas_size // self.patch_size

    @property
    def num_tokens_per_side(self) -> int:
        """G: tokens a side of the canvas; the (h, w) grid of a frame is at most this."""
        return self.image_size // (self.patch_size * self.downsample_window)

    @property
    def effective_window(self) -> int:
        """Patches a side of one token: `downsample_window`, or 1 at half resolution."""
        return 1 if self.downsampling == "half_resolution" else self.downsample_window

    def num_frame_tokens(self, height: int, width: int) -> int:
        """Tokens of one frame of a (height, width) grid: the context, the patches and the row ends."""
        return height * (width + int(self.use_row_token)) + 1

    def check(self) -> None:
        """Raise a ValueError that says which field is wrong, what it holds and what is expected."""
        _require_positive_integers(self, "image_size", "patch_size", "num_channels", "downsample_window", "hidden_size")
        _require_positive_integers(self, "num_attention_heads", "num_frames", "num_chunk_frames", "gstra_mlp_ratio")
        _require_positive_integers(self, "num_perceiver_layers")
        self._check_geometry()
        for name in ("gstra_dropout", "fusion_dropout"):
            _require_number(self, name, 0, 1, "lie in [0, 1)")
        for name in ("layer_norm_eps", "batch_norm_eps"):
            _require_number(self, name, 5e-324, inf, "be a positive number")
        _require_number(self, "initializer_range", 0, inf, "be a number from 0 on")
        if not isinstance(self.projector_hidden_act, str) or self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                "VideoPandaVisionConfig.projector_hidden_act must be one of transformers' activations "
                f"({', '.join(sorted(ACT2FN))}), got {self.projector_hidden_act!r}"
            )
        for name in ("use_row_token", "use_fsra", "use_lste", "use_gstra"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"VideoPandaVisionConfig.{name} must be True or False, got {getattr(self, name)!r}")
        for name, known in (("downsampling", DOWNSAMPLINGS), ("downsampling_position", DOWNSAMPLING_POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"VideoPandaVisionConfig.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        self._check_normalization()
        self._check_ablations()

    def _check_normalization(self) -> None:
        for name, low, high in (("image_mean", 0, 1 + 1e-6), ("image_std", 5e-324, inf)):
            value = getattr(self, name)
            is_list = isinstance(value, list) and len(value) == self.num_channels
            if not is_list or any(isinstance(number, (bool, str)) or not low <= number < high for number in value):
                raise ValueError(
                    f"VideoPandaVisionConfig.{name} must be a list of numbers for pixels in [0, 1], one for each of the "
                    f"{self.num_channels} channels, got {value!r}"
                )

    def _check_geometry(self) -> None:
        if self.image_size % (self.patch_size * self.downsample_window):
            raise ValueError(
                f"VideoPandaVisionConfig.image_size ({self.image_size} px) must be a multiple of patch_size x "
                f"downsample_window = {self.patch_size} x {self.downsample_window} px"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"VideoPandaVisionConfig.hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        expected = f"lie between 1 and hidden_size ({self.hidden_size})"
        _require_number(self, "lste_reduction", 1, self.hidden_size + 1e-6, expected)

    def _check_ablations(self) -> None:
        """Refuse the combinations that have no meaning, with the reason."""
        if not self.use_fsra and not self.use_gstra:
            raise ValueError(
                "use_fsra=False with use_gstra=False leaves nothing that a frame's context token could hold: "
                "keep one of the two"
            )
        if self.downsampling_position == "before_lste":
            if not self.use_lste:
                raise ValueError(
                    'downsampling_position="before_lste" with use_lste=False: there is no LSTE to stand before'
                )
            if self.downsampling not in ("lsd", "avg_pool"):
                raise ValueError(
                    f'downsampling_position="before_lste" needs a downsampling that keeps the grid of patches (lsd or '
                    f"avg_pool), got {self.downsampling!r}"
                )


class VideoPandaConfig(PreTrainedConfig):
    """Configuration of a Video-Panda model.

    Args:
        vision_config: a `VideoPandaVisionConfig` or a dict of its fields: STAB and the projector.
        text_config: the configuration (or its dict, with `model_type`) of any causal LM of transformers; Llama with
            Vicuna-7B's sizes and the enlarged vocabulary by default. Its `vocab_size` counts the placeholders too; see
            `from_text_config`.
        video_token_id, row_token_id, frame_token_id, image_token_id: ids of `<video>` (a patch of a frame), `<row>`
            (the end of a row), `<frame>` (the context of a frame) and `<image>` (a patch of a still image). They are
            consecutive and follow the language model's own vocabulary: from the first of them on, nothing is text.
        rotary_table_dtype: PARITY: the dtype that the language model's rotary tables (cosines and sines) are rounded to.
            The release keeps them in float16 and was trained so: converted checkpoints say "float16". None: no rounding.
        tie_word_embeddings: share the input embedding with `lm_head`.

    Raises:
        ValueError: for a field that does not exist or contradicts another one.
    """

    model_type = "video_panda"
    sub_configs_defaults = {  # noqa: RUF012 - the way transformers declares sub-configurations
        "vision_config": SubConfigSpec(config_class=VideoPandaVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs=_VICUNA_7B),
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - likewise

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    video_token_id: int = 32000
    row_token_id: int = 32001
    frame_token_id: int = 32002
    image_token_id: int = 32003
    rotary_table_dtype: str | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        _refuse_unknown(self, kwargs)
        for name, expected in (("vision_config", VideoPandaVisionConfig), ("text_config", PreTrainedConfig)):
            value = getattr(self, name)
            # By model_type: a config that came as remote code is of another class object than the one here.
            same_kind = isinstance(value, PreTrainedConfig) and expected.model_type in ("", value.model_type)
            if not (value is None or isinstance(value, dict) or same_kind):
                raise ValueError(
                    f"VideoPandaConfig.{name} must be a {expected.__name__} or a dict of its fields, got {value!r}"
                )
        given = self.vision_config.get("model_type") if isinstance(self.vision_config, dict) else None
        if given not in (None, VideoPandaVisionConfig.model_type):
            raise ValueError(
                f"VideoPandaConfig.vision_config is of model_type {given!r}, expected {VideoPandaVisionConfig.model_type!r}"
            )
        try:
            super().__post_init__(**kwargs)
        except ValueError:
            raise
        except Exception as error:  # configs of transformers refuse a value with several kinds of error
            raise ValueError(f"VideoPandaConfig: a sub-configuration refuses its fields: {error}") from error
        self.check()

    @classmethod
    def from_text_config(cls, text_config: PreTrainedConfig, num_text_tokens: int | None = None, **kwargs):
        """The configuration that puts Video-Panda on top of a text-only language model.

        Args:
            text_config: the language model's configuration; it is not changed.
            num_text_tokens: size of its own vocabulary (default: `text_config.vocab_size`). The placeholders get the
                next four ids and the embeddings are padded to a multiple of 64.
            kwargs: further fields of `VideoPandaConfig`.

        Raises:
            ValueError: for a configuration that is not a language model's, or a number of tokens that is none.
        """
        if not isinstance(text_config, PreTrainedConfig):
            raise ValueError(f"text_config must be the configuration of a language model, got {text_config!r}")
        first = _language_model_vocab_size(text_config) if num_text_tokens is None else num_text_tokens
        if isinstance(first, bool) or not isinstance(first, int) or first < 1:
            raise ValueError(f"num_text_tokens must be a positive integer, got {first!r}")
        text = text_config.to_dict()
        text["vocab_size"] = -(-(first + 4) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        ids = dict(zip(("video_token_id", "row_token_id", "frame_token_id", "image_token_id"), range(first, first + 4)))
        kwargs.setdefault("tie_word_embeddings", bool(text.get("tie_word_embeddings", False)))
        return cls(text_config=text, **ids, **kwargs)

    @property
    def placeholder_token_ids(self) -> tuple[int, int, int, int]:
        """Ids of `<video>`, `<row>`, `<frame>`, `<image>`."""
        return self.video_token_id, self.row_token_id, self.frame_token_id, self.image_token_id

    @property
    def num_text_tokens(self) -> int:
        """Size of the language model's own vocabulary: the ids below it are text, the others never are."""
        return min(self.placeholder_token_ids)

    def check(self) -> None:
        """Raise a ValueError that says which field is wrong, what it holds and what is expected."""
        ids = self.placeholder_token_ids
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 for token_id in ids):
            raise ValueError(f"VideoPandaConfig: the placeholder ids must be non-negative integers, got {ids}")
        if sorted(ids) != list(range(min(ids), min(ids) + 4)):
            raise ValueError(
                "VideoPandaConfig: video_token_id, row_token_id, frame_token_id and image_token_id must be four "
                f"consecutive ids that follow the language model's own vocabulary, got {ids}"
            )
        vocab_size = _language_model_vocab_size(self.text_config)
        if max(ids) >= vocab_size:
            raise ValueError(
                f"VideoPandaConfig.text_config.vocab_size is {vocab_size}, but the placeholder ids go up to {max(ids)}: "
                f"expected at least {max(ids) + 1} (VideoPandaConfig.from_text_config enlarges a text-only vocabulary)"
            )
        if self.rotary_table_dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(
                "VideoPandaConfig.rotary_table_dtype must be None, float16, bfloat16 or float32, got "
                f"{self.rotary_table_dtype!r}"
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(
                f"VideoPandaConfig.tie_word_embeddings must be True or False, got {self.tie_word_embeddings!r}"
            )
        _require_number(self, "initializer_range", 0, inf, "be a number from 0 on")
        self._check_head()
        self.vision_config.check()

    def _check_head(self) -> None:
        """`lm_head` is one linear layer; a language model that does more to its logits would silently differ."""
        text = self.text_config.to_dict()
        for name, neutral in _NEUTRAL_HEAD.items():
            if text.get(name, neutral) not in (None, neutral):
                raise ValueError(
                    f"VideoPandaConfig.text_config ({self.text_config.model_type}) sets {name}={text[name]}: language "
                    "models whose logits are more than one linear layer without bias are not supported"
                )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # What `from_pretrained` reads, before anything else of a checkpoint. transformers goes on with a warning if it is the configuration of another model.
        source = pretrained_model_name_or_path
        if source is not None and os.path.isdir(source):
            check_saved_files(Path(source, kwargs.get("subfolder") or ""), cls.__module__, "config")
        config_dict, kwargs = super().get_config_dict(source, **kwargs)
        if config_dict.get("model_type") != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a Video-Panda checkpoint: its config.json says model_type "
                f"{config_dict.get('model_type')!r}, expected {cls.model_type!r}"
            )
        return config_dict, kwargs

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"Cannot save to {save_directory}: it is a file, expected a folder")
        # Before anything is written: fields can be assigned after the configuration was made, and what cannot be loaded
        # again must not be saved.
        _refuse_unknown(self, set(vars(self)) - {field.name for field in fields(self)})
        self.check()
        # Complete, whatever subset of the Auto classes the object at hand came through.
        self.auto_map = dict(AUTO_MAP)
        with saving_aside(save_directory, "config") as aside:
            super().save_pretrained(aside, **kwargs)
        if push_to_hub:  # transformers uploads what it has just written
            super().save_pretrained(save_directory, push_to_hub=True, **kwargs)


VideoPandaConfig.register_for_auto_class()

__all__ = ["VideoPandaConfig", "VideoPandaVisionConfig"]
