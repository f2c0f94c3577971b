"""LanguageBind's video encoder: CLIP's vision tower, each layer with one more attention over time.

The layout is not in transformers; it is built here on transformers' CLIP, under the published checkpoint's names. Source:
LanguageBind (arXiv 2310.01852) and the numbers of its published `LanguageBind_Video_merge`.

Shape suffixes: V videos, T frames, N = 1 + S² positions (class token first), D width.
"""

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

MODEL_TYPE = "LanguageBindVideo"

# What of a published `vision_config` decides the encoder; the rest is transformers' own or belongs to its training.
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *("patch_size", "hidden_act", "layer_norm_eps", "add_time_attn", "num_frames"),
)


@strict
class LanguageBindVideoConfig(CLIPVisionConfig):
    """The vision tower's configuration: CLIP's fields and two more.

    Args:
        add_time_attn: whether the layers attend over time.
        num_frames: entries of each layer's temporal embedding, the most frames the encoder takes then.
    """

    model_type = MODEL_TYPE

    add_time_attn: bool = False
    num_frames: int = 1

    @classmethod
    def from_checkpoint(cls, fields: dict) -> "LanguageBindVideoConfig":
        """From the content of a published checkpoint's `config.json`.

        Args:
            fields: the whole file; its `vision_config` is used.

        Raises:
            ValueError: it has no `vision_config`, or a value in it is of the wrong kind.
        """
        vision = fields.get("vision_config")
        if not isinstance(vision, dict):
            raise ValueError(f"config.json: expected an object `vision_config`, got {vision!r:.80}")
        try:
            config = cls(**{name: vision[name] for name in _FIELDS if name in vision})
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: `vision_config` does not describe a CLIP vision tower: {error}") from error
        if config.num_frames < 1:
            raise ValueError(f"config.json: `vision_config.num_frames` must be at least 1, got {config.num_frames}")
        return config


class LanguageBindVideoLayer(CLIPEncoderLayer):
    """A CLIP layer that first lets the frames of each position see each other, if `add_time_attn`."""

    def __init__(self, config: LanguageBindVideoConfig):
        super().__init__(config)
        self.add_time_attn = config.add_time_attn
        if self.add_time_attn:
            self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
            self.temporal_attn = CLIPAttention(config)
            self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, num_frames: int = 1, **kwargs) -> torch.Tensor:
        """hidden_states: (V * T, N, D), the T = `num_frames` frames of a video one behind the other."""
        if self.add_time_attn:
            hidden_states = self._attend_over_time(hidden_states, num_frames)
        return super().forward(hidden_states, attention_mask, **kwargs)

    def _attend_over_time(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        states_VTND = hidden_states.unflatten(0, (-1, num_frames))
        states_VNTD = states_VTND.transpose(1, 2)
        # PARITY: a single frame gets no temporal embedding, though it does pass the attention.
        if num_frames > 1:
            states_VNTD = states_VNTD + self.temporal_embedding[:, None, :num_frames]
        normed = self.temporal_layer_norm1(states_VNTD.flatten(0, 1))
        attended = self.temporal_attn(normed)[0].view_as(states_VNTD)
        return (states_VNTD + attended).transpose(1, 2).flatten(0, 1)


class LanguageBindVideoModel(CLIPVisionModel):
    """The vision tower: videos in, hidden states of every frame's positions and one vector a video out."""

    config_class = LanguageBindVideoConfig
    # Published weights are called vision_model.*; transformers takes this prefix off.
    base_model_prefix = "vision_model"

    def __init__(self, config: LanguageBindVideoConfig):
        super().__init__(config)
        self.encoder.layers = nn.ModuleList(LanguageBindVideoLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LanguageBindVideoLayer) and module.add_time_attn:
            init.normal_(module.temporal_embedding, std=self.config.hidden_size**-0.5)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> BaseModelOutputWithPooling:
        """Encode videos of equally many frames.

        Args:
            pixel_values: (V, T, 3, image_size, image_size), normalised with CLIP's mean and standard deviation.
            interpolate_pos_encoding: take pictures of another size than the configuration's.

        Returns:
            `last_hidden_state` (V, T, N, D), before the final norm; `pooler_output` (V, D): the class tokens after the
            final norm, averaged over the frames.

        Raises:
            ValueError: more frames than there are temporal embeddings, or not five dimensions.
        """
        if pixel_values.ndim != 5:
            raise ValueError(f"expected videos (V, T, 3, S, S), got shape {tuple(pixel_values.shape)}")
        num_videos, num_frames = pixel_values.shape[:2]
        if self.config.add_time_attn and num_frames > self.config.num_frames:
            raise ValueError(
                f"LanguageBind attends over at most {self.config.num_frames} frames (`num_frames` of its config.json), "
                f"got {num_frames}; take fewer frames, or switch its temporal attention off"
            )
        hidden_states = self.embeddings(pixel_values.flatten(0, 1), interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(hidden_states)
        hidden_states = self.encoder(hidden_states, num_frames=num_frames).last_hidden_state
        hidden_states = hidden_states.unflatten(0, (num_videos, num_frames))
        pooled = self.post_layernorm(hidden_states[:, :, 0]).mean(1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)
