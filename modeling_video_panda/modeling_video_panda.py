"""Video-Panda: STAB's tokens in the place of a vision encoder's, in front of any causal language model.

Shape suffixes: B prompts, L prompt length, V videos, I images, T frames, C channels, S px a side of the canvas, D width
of STAB, H width of the language model; see `stab_video_panda.py` for M, K, h, w.
"""

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .checkpoint_video_panda import VideoPandaCheckpoint
from .configuration_video_panda import VideoPandaConfig
from .generation_video_panda import VideoPandaGenerationMixin
from .stab_video_panda import VideoPandaSTAB
from .vision_video_panda import VideoPandaProjector, VideoPandaVisionMixin, join_sequences

# What `lm_head`, one linear layer, and a cache of keys and values would silently do otherwise than the original.
_BIASED_HEAD = "its output layer has a bias"
_NO_CACHE = "it has a recurrent state in the place of keys and values"
UNSUPPORTED_LANGUAGE_MODELS = {
    **dict.fromkeys(("codegen", "ctrl", "gptj", "phi"), _BIASED_HEAD),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), _NO_CACHE),
    "minicpm3": "it scales its logits",
}


@dataclass
class VideoPandaModelOutputWithPast(ModelOutput):
    """Output of the model without head; `video_hidden_states` / `image_hidden_states`: projected tokens, concatenated."""

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None


@dataclass
class VideoPandaCausalLMOutputWithPast(ModelOutput):
    """Output with head: `loss` is the LM loss where labels were given; `logits` (B, L, vocab_size)."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None


def _round_rotary_table(module, args, cos_and_sin, dtype: torch.dtype):
    """PARITY: the release keeps its rotary tables in float16, whatever the activations are computed in."""
    return tuple(table.to(dtype).to(table.dtype) for table in cos_and_sin)


def _build_language_model(config: VideoPandaConfig) -> nn.Module:
    """The language model without its head; a ValueError for one that this model could only run wrongly."""
    text, kind = config.text_config, f"VideoPandaConfig.text_config ({config.text_config.model_type})"
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{kind} is not the configuration of a causal language model of transformers")
    if text.model_type in UNSUPPORTED_LANGUAGE_MODELS:
        raise ValueError(f"{kind} is not supported: {UNSUPPORTED_LANGUAGE_MODELS[text.model_type]}")
    language_model = AutoModel.from_config(text)
    width = language_model.get_input_embeddings().embedding_dim  # its weight may be spread over processes (ZeRO-3)
    if width != text.hidden_size:
        raise ValueError(f"{kind} has embeddings of width {width}, expected its hidden_size, {text.hidden_size}")
    if config.rotary_table_dtype is not None:
        rotary = dict(language_model.named_children()).get("rotary_emb")
        if rotary is None:
            raise ValueError(
                f"VideoPandaConfig.rotary_table_dtype is {config.rotary_table_dtype!r}, but {kind} has no rotary tables: "
                "expected None"
            )
        rotary.register_forward_hook(partial(_round_rotary_table, dtype=getattr(torch, config.rotary_table_dtype)))
    return language_model


class VideoPandaPreTrainedModel(VideoPandaCheckpoint):
    """What both models share: loading and saving."""

    config: VideoPandaConfig
    config_class = VideoPandaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    # A device map cuts between whole blocks of STAB: a query and its residual stay together.
    _no_split_modules = ["VideoPandaSTAB", "VideoPandaProjector"]  # noqa: RUF012 - as transformers declares it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class VideoPandaModel(VideoPandaPreTrainedModel, VideoPandaVisionMixin):
    """STAB, the projector and the language model, without a head."""

    def __init__(self, config: VideoPandaConfig):
        config.check()
        super().__init__(config)
        self.stab = VideoPandaSTAB(config.vision_config)
        self.projector = VideoPandaProjector(config)
        self.language_model = _build_language_model(config)
        self.post_init()

    @property
    def visual(self) -> nn.Module:
        """STAB, by the name that transformers' `get_encoder("video")` looks for."""
        return self.stab

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """The counterpart of `get_encoder`; overridden because transformers would add `encoder` beside STAB."""
        if modality in ("image", "video"):
            self.stab = encoder
        else:
            super().set_encoder(encoder, modality=modality)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
    ) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """Where the visual tokens stand: (B, L, 1) masks of the images' and of the videos' positions.

        `<frame>` and `<row>` serve both kinds; the patch beside them says whose they are.

        Raises:
            ValueError: if the number of placeholders is not that of the features; both counts are named.
        """
        if input_ids is None:
            input_ids = self.find_placeholders(inputs_embeds)
        masks = self.locate_visual_tokens(input_ids)
        for kind, mask, features in zip(("image", "video"), masks, (image_features, video_features)):
            num_placeholders, num_features = mask.sum(), 0 if features is None else len(features)
            torch_compilable_check(
                num_placeholders == num_features,
                lambda kind=kind, got=num_placeholders, expected=num_features: (
                    f"The prompts hold {int(got)} {kind} placeholder tokens (<{kind}>, <row>, <frame>), but the {kind}s "
                    f"given have {expected} features. A prompt that was truncated, or one with more or fewer {kind}s "
                    "than were given, does this"
                ),
            )
        return masks[0].unsqueeze(-1), masks[1].unsqueeze(-1)

    def locate_visual_tokens(self, input_ids: torch.LongTensor) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """(B, L) masks of the images' and of the videos' tokens, contexts and row ends included."""
        masks = []
        for patch_id in (self.config.image_token_id, self.config.video_token_id):
            is_patch = input_ids == patch_id
            opens = (input_ids == self.config.frame_token_id) & nn.functional.pad(is_patch[:, 1:], (0, 1))
            closes = (input_ids == self.config.row_token_id) & nn.functional.pad(is_patch[:, :-1], (1, 0))
            masks.append(is_patch | opens | closes)
        return masks[0], masks[1]

    def find_placeholders(self, inputs_embeds: torch.Tensor) -> torch.LongTensor:
        """(B, L, H) -> (B, L): the id where a position holds exactly a placeholder's embedding, -1 elsewhere."""
        found = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        embed = self.get_input_embeddings()
        for token_id in self.config.placeholder_token_ids:
            embedding_H = embed(torch.tensor(token_id, device=inputs_embeds.device)).to(inputs_embeds.dtype)
            found = torch.where((inputs_embeds == embedding_H).all(-1), token_id, found)
        return found

    def _insert_visual_tokens(self, input_ids, inputs_embeds, encoded: dict) -> tuple[torch.Tensor, dict]:
        """Put the features of `encoded` ("image", "video": `BaseModelOutputWithPooling`) at their placeholders."""
        features = {
            kind: join_sequences(output.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            for kind, output in encoded.items()
            if output is not None
        }
        image_mask, video_mask = self.get_placeholder_mask(
            input_ids, inputs_embeds, features.get("image"), features.get("video")
        )
        if input_ids is None:
            input_ids = self.find_placeholders(inputs_embeds)
        for mask, kind in ((image_mask, "image"), (video_mask, "video")):
            if kind in features:
                self._check_layout(kind, input_ids, mask.squeeze(-1), [len(own) for own in encoded[kind].pooler_output])
                inputs_embeds = inputs_embeds.masked_scatter(mask, features[kind])
        return inputs_embeds, features

    def _check_layout(self, kind: str, input_ids, mask_BL: torch.BoolTensor, lengths: list[int]) -> None:
        """Each visual's features must begin at a `<frame>`: equal totals alone would hide visuals in another order."""
        starts = torch.tensor([0, *lengths[:-1]], device=mask_BL.device).cumsum(0)
        rank_BL = (mask_BL.flatten().cumsum(0) - 1).view_as(mask_BL)
        is_start_BL = mask_BL & torch.isin(rank_BL, starts)
        torch_compilable_check(
            (~is_start_BL | (input_ids == self.config.frame_token_id)).all(),
            f"The {kind} placeholders of the prompts are laid out for other {kind}s than those given: their number agrees, "
            f"their frames or grids, or their order, do not",
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_chunk_batch: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoPandaModelOutputWithPast:
        """The language model over the prompts with the visual tokens in place.

        Args:
            input_ids: (B, L); or `inputs_embeds` (B, L, H), in which placeholders are found by their embedding.
            attention_mask, position_ids, past_key_values, use_cache: as the language model takes them.
            pixel_values_videos, video_grid_thw, vision_chunk_batch: see `get_video_features`.
            pixel_values, image_grid_thw: see `get_image_features`.
            mm_encoder_outputs: what `get_image_features` / `get_video_features` returned earlier, under "image" /
                "video", in the place of pixels.

        Raises:
            ValueError: if placeholders and features do not match, naming both counts.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds")
        has_pixels = pixel_values is not None or pixel_values_videos is not None
        if has_pixels and mm_encoder_outputs is not None:
            raise ValueError("Give pixel values or mm_encoder_outputs, not both")
        encoded = dict(mm_encoder_outputs or {})
        # A single new token of a decoding step is never a placeholder (their logits are masked): nothing to insert.
        may_hold_visuals = (
            has_pixels or bool(encoded) or (inputs_embeds if input_ids is None else input_ids).shape[1] > 1
        )
        # Before the visuals are encoded: gradients arrive in an order that trainers/distillation.py relies on.
        if inputs_embeds is None and may_hold_visuals:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(
                pixel_values, image_grid_thw, vision_chunk_batch, return_dict=True
            )
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(
                pixel_values_videos, video_grid_thw, vision_chunk_batch, return_dict=True
            )
        features = {}
        if may_hold_visuals:
            inputs_embeds, features = self._insert_visual_tokens(input_ids, inputs_embeds, encoded)

        outputs = self.language_model(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        return VideoPandaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features.get("image"),
            video_hidden_states=features.get("video"),
        )


class VideoPandaForConditionalGeneration(VideoPandaPreTrainedModel, VideoPandaGenerationMixin):
    """Video-Panda with its language modelling head: loss, `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: VideoPandaConfig):
        super().__init__(config)
        self.model = VideoPandaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._num_text_tokens = config.num_text_tokens  # looked up at every step of decoding
        # Not every language model calls its embedding `embed_tokens` (GPT-2: `wte`).
        embedding = self.model.language_model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_video_features(self, pixel_values_videos, video_grid_thw, **kwargs):
        """See `VideoPandaModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def get_image_features(self, pixel_values, image_grid_thw, **kwargs):
        """See `VideoPandaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_chunk_batch: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoPandaCausalLMOutputWithPast:
        """As `VideoPandaModel.forward`, and on to logits.

        Args:
            labels: (B, L) ids to predict, -100 where there is no loss (questions, padding). Placeholders have none either.
            logits_to_keep: how many positions at the end (0: all), or which positions, to compute logits for.

        Returns:
            `logits` (B, kept, vocab_size), with the dtype's minimum at the placeholder and padding ids: loss and sampling
            are those of the language model's own vocabulary.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_chunk_batch=vision_chunk_batch,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: all of them
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self._tp_size is not None:
            # Gathered from all ranks: a view, which must not be written to while it has a gradient.
            logits = logits.clone()
        logits[..., self._num_text_tokens :] = torch.finfo(logits.dtype).min
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels >= self.config.num_text_tokens, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return VideoPandaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As in transformers; the placeholders must keep their rows.

        Rows beyond the placeholders are padding: their logits stay masked, so that a token added here is never generated.
        Add tokens to the language model's own vocabulary instead, before Video-Panda is put on top of it.

        Raises:
            ValueError: if a placeholder would lose its row.
        """
        fewest = max(self.config.placeholder_token_ids) + 1
        if new_num_tokens is not None and new_num_tokens < fewest:
            raise ValueError(f"resize_token_embeddings({new_num_tokens}): the placeholders need at least {fewest} rows")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


VideoPandaForConditionalGeneration.register_for_auto_class("AutoModel")
# `generate` asks for it several times: it need not be worked out each time.
VideoPandaForConditionalGeneration.forward.__signature__ = inspect.signature(VideoPandaForConditionalGeneration.forward)

__all__ = ["VideoPandaForConditionalGeneration", "VideoPandaModel", "VideoPandaPreTrainedModel"]
