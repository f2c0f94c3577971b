"""What `generate` must know of Video-Panda: a visual's tokens are patches, contexts and row ends, of four ids.

Shape suffixes: B prompts, L prompt length.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from transformers import Cache, GenerationMixin
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_video_panda import VideoPandaPrefixCache, VideoPandaPrompt, VideoPandaVisual

# Of each kind: its pixels, and its grids.
_PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def _select_visuals(is_kept: Callable[[str, int], bool], kwargs: dict) -> dict:
    """The arguments of `generate` with only those visuals for whose kind and index `is_kept` is true."""
    kwargs = dict(kwargs)
    encoded = dict(kwargs.pop("mm_encoder_outputs", None) or {})
    for kind, names in _PIXELS.items():
        if encoded.get(kind) is not None:
            features = encoded.pop(kind).pooler_output
            kept = tuple(own for index, own in enumerate(features) if is_kept(kind, index))
            if kept:
                encoded[kind] = BaseModelOutputWithPooling(pooler_output=kept)
        elif kwargs.get(names[0]) is not None:
            kept = [index for index in range(len(kwargs[names[0]])) if is_kept(kind, index)]
            for name in names:
                given = torch.as_tensor(kwargs.pop(name))
                if kept:
                    kwargs[name] = given if len(kept) == len(given) else given[kept]
    return {**kwargs, "mm_encoder_outputs": encoded} if encoded else kwargs


def _padding_behind(num_shared: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """The columns (B, L) of each row in the order: what all share, padding, the rest. A single row has no padding left."""
    order = []
    for mask in attention_mask.bool():
        own, padding = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        order.append(
            torch.cat([own[:num_shared], padding[: len(padding) * (len(attention_mask) > 1)], own[num_shared:]])
        )
    return torch.stack(order)


class VideoPandaGenerationMixin(GenerationMixin):
    """`generate` of transformers, with the hooks overridden that take a visual's tokens for one id, or for text."""

    def prefix_cache(self) -> VideoPandaPrefixCache:
        """A cache to hand to several calls of `generate` as `past_key_values`, each with its whole prompt and pixels.

        A call computes what its prompt does not share with the one before: the turns of a conversation, and several questions
        about one clip, in turn or in one batch, cost one encoding and one prefill of the clip. The answers are those
        without a cache. Make a new one when the weights or an adapter change.

        Raises:
            ValueError: for a language model with a recurrent state.
        """
        return VideoPandaPrefixCache(self.config)

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """As in transformers, but visuals whose tokens `past_key_values` holds already are not encoded again.

        Raises:
            ValueError: the cache ends within a visual, or holds no less than the prompt.
        """
        if inputs is not None and inputs.ndim == 2 and not inputs.is_floating_point() and "input_ids" not in kwargs:
            inputs, kwargs = None, {**kwargs, "input_ids": inputs}
        cache = kwargs.get("past_key_values")
        if isinstance(cache, VideoPandaPrefixCache):
            return self._generate_from_prefix(cache, generation_config, *args, **kwargs)
        if isinstance(cache, Cache) and kwargs.get("input_ids") is not None:
            num_held = int(cache.get_seq_length())
            if num_held > 0:
                kwargs = self._without_held_visuals(num_held, **kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _without_held_visuals(self, num_held: int, input_ids, attention_mask=None, **kwargs) -> dict:
        """The arguments without the visuals of the first `num_held` positions."""
        num_given = input_ids.shape[1]
        given = {**kwargs, "input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None and attention_mask.shape[1] > num_given:
            return given  # the prompt's continuation alone
        if num_held >= num_given:
            raise ValueError(
                f"past_key_values holds {num_held} positions and the prompt has {num_given}: expected the whole prompt, those "
                "positions included, or the new tokens with an attention_mask of the whole"
            )
        held = []
        for prompt in self._prompts(input_ids, None, kwargs):
            if prompt.before_visual(num_held) != num_held:
                raise ValueError(f"past_key_values holds {num_held} positions and ends within a video or image")
            held += prompt.up_to(num_held).visuals
        gone = {(visual.kind, visual.index) for visual in held}
        return _select_visuals(lambda *visual: visual not in gone, given)

    def _generate_from_prefix(
        self, cache: VideoPandaPrefixCache, generation_config, *args, input_ids=None, attention_mask=None, **kwargs
    ):
        """`generate` with a prefix cache: in the cache itself for one answer, else in copies of the prefix that all share."""
        defaults = vars(generation_config or self.generation_config)
        use_cache, *counts = (
            kwargs.get(name, defaults.get(name)) for name in ("use_cache", "num_beams", "num_return_sequences")
        )
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("A prefix cache compares token ids: expected input_ids, and no inputs_embeds")
        if use_cache is False:
            raise ValueError("A prefix cache was given with use_cache=False")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}: with a "
                "prefix cache, expected the whole prompt in both"
            )
        prompts = self._prompts(input_ids, attention_mask, kwargs)
        # The last token is computed in any case.
        shortest = min(len(prompt.ids) for prompt in prompts) - 1
        num_shared = min([shortest, *(prompts[0].num_shared(prompt) for prompt in prompts[1:])])
        num_shared = prompts[0].before_visual(num_shared)
        num_held = cache.keep(prompts[0], at_most=num_shared)
        num_rows = len(prompts) * max(count or 1 for count in counts)
        if num_rows > 1:
            self._extend(cache, prompts[0], num_shared, kwargs)
            num_held = num_shared
        gone = {(visual.kind, visual.index) for prompt in prompts for visual in prompt.up_to(num_held).visuals}
        kwargs = _select_visuals(lambda *visual: visual not in gone, kwargs)
        if num_rows == 1:
            kwargs["past_key_values"] = cache
        else:
            kwargs["past_key_values"] = cache.branches(num_rows) if num_held else None
        order_BL = _padding_behind(num_held, attention_mask)
        mask = attention_mask.gather(1, order_BL)
        if cache.had_windows and not mask.all():
            raise ValueError(
                "The language model attends within windows, and the padding of prompts of different lengths would lie in "
                "them: expected one prompt at a time with a prefix cache"
            )
        ids = input_ids.gather(1, order_BL)
        for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].gather(-1, order_BL.to(kwargs[name].device))
        output = super().generate(None, generation_config, *args, input_ids=ids, attention_mask=mask, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if num_rows == 1:
            cache.record(sequences[0], prompts[0])
        given = input_ids.repeat_interleave(len(sequences) // len(prompts), 0)
        sequences = torch.cat([given, sequences[:, ids.shape[1] :]], 1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _extend(self, cache: VideoPandaPrefixCache, prompt: VideoPandaPrompt, end: int, kwargs: dict) -> None:
        """Compute the prompt's positions from where the cache stops up to `end`."""
        start = len(cache.prompt.ids)
        if start == end:
            return
        new = {(visual.kind, visual.index) for visual in prompt.up_to(end).visuals if visual.start >= start}
        names = (*_PIXELS["image"], *_PIXELS["video"], "mm_encoder_outputs", "vision_chunk_batch")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        visuals = _select_visuals(lambda *visual: visual in new, given)
        ids = prompt.ids[None, start:end].to(self.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, **visuals)
        cache.record(prompt.ids[:end], prompt)

    def _given_visuals(self, kind: str, kwargs: dict) -> list[tuple[int, torch.Tensor]]:
        """Number of tokens and content of each video or image given."""
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get(kind)
        if encoded is not None:
            return [(len(features), features) for features in encoded.pooler_output]
        pixels, grid_thw = (kwargs.get(name) for name in _PIXELS[kind])
        if pixels is None:
            return []
        grids = self.model._checked_grids(kind, pixels, grid_thw, num_dims=5 if kind == "video" else 4)
        num_frame_tokens = self.config.vision_config.num_frame_tokens
        return [
            (frames * num_frame_tokens(height, width), own[:frames] if kind == "video" else own)
            for own, (frames, height, width) in zip(pixels, grids)
        ]

    def _prompts(self, input_ids, attention_mask, kwargs: dict) -> list[VideoPandaPrompt]:
        """The rows of a batch without their padding; whatever does not fit together is left to the model to refuse."""
        masks = dict(zip(("image", "video"), self.model.locate_visual_tokens(input_ids)))
        given = {kind: self._given_visuals(kind, kwargs) for kind in _PIXELS}
        kinds = frozenset(kind for kind, own in given.items() if own)
        next_index = dict.fromkeys(given, 0)
        prompts = []
        for row, ids in enumerate(input_ids):
            is_own = slice(None) if attention_mask is None else attention_mask[row].bool()
            visuals = []
            for kind in kinds:
                positions = masks[kind][row][is_own].nonzero().flatten().tolist()
                while positions and next_index[kind] < len(given[kind]):
                    index, start = next_index[kind], positions[0]
                    length, content = given[kind][index]
                    visuals.append(VideoPandaVisual(kind, index, start, start + length, content))
                    positions, next_index[kind] = positions[length:], index + 1
            prompts.append(VideoPandaPrompt(ids[is_own].cpu(), visuals, kinds))
        return prompts

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        # A decoding step of one token is not looked at: asking a static cache for its length would wait for the device.
        if input_ids.shape[1] > 1 and next_sequence_length != 1:
            num_held = 0 if past_key_values is None else past_key_values.get_seq_length()
            # The first call of an assistant model is not marked as one, and its visuals would be left out.
            is_first_iteration = is_first_iteration or num_held == 0
            positions = kwargs.get("position_ids")
            is_whole = positions is not None and positions.shape[-1] == input_ids.shape[1]
            if is_first_iteration and next_sequence_length is None and is_whole and num_held > 0:
                # Assisted decoding would compute all of the prompt a second time, behind what the cache holds of it.
                next_sequence_length = input_ids.shape[1] - num_held
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @contextmanager
    def _optimize_model_for_decode(self):
        # A hook of transformers around the steps after the first, in each of which it would read the signature of the
        # `forward` of a model with code of its own, for an argument that ours does not have: 5% of a tiny model's step.
        self.is_remote_code = lambda: False
        try:
            with super()._optimize_model_for_decode():
                yield
        finally:
            vars(self).pop("is_remote_code", None)

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        # A hook of transformers, overridden for prompt lookup: it copies candidates out of the prompt and asks only the
        # processors, not our masked logits, whether a placeholder may be among them.
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if generation_config.prompt_lookup_num_tokens is not None:
            not_text = range(self.config.num_text_tokens, self.config.text_config.vocab_size)
            processors.append(SuppressTokensLogitsProcessor(list(not_text)))
        return processors

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # A hook of transformers, overridden because it cuts the features of a chunk by one placeholder id, and <frame> and
        # <row> are among ours: the features would land in wrong places.
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("mm_encoder_outputs"):
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} does not go with videos or images, expected None"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # A hook of transformers, overridden because placeholders that a cache holds have no features to be repeated.
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and expand_size > 1:
            cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
            num_held = 0 if cache is None else int(cache.get_seq_length())
            ids, embeds = (None if own is None else own[:, num_held:] for own in (input_ids, embeds))
            encoded = self._expand_multimodal_outputs(ids, encoded, expand_size, embeds)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if encoded is None else {**model_kwargs, "mm_encoder_outputs": encoded}

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        # A hook of transformers' `generate`, for beams and several answers a prompt: the visuals of one prompt are
        # repeated as a block. Overridden because transformers counts a visual's tokens by one placeholder id, and
        # ours have <frame> and <row> among them.
        if input_ids is None or input_ids.numel() == 0:
            input_ids = self.model.find_placeholders(inputs_embeds)
        for kind, mask in zip(("image", "video"), self.model.locate_visual_tokens(input_ids)):
            output = mm_encoder_output.get(kind)
            if output is None:
                continue
            remaining, repeated = list(output.pooler_output), []
            for num_placeholders in mask.sum(1).tolist():
                own = []
                while remaining and sum(map(len, own)) < num_placeholders:
                    own.append(remaining.pop(0))
                repeated += own * expand_size
            output.pooler_output = tuple(repeated)
        return mm_encoder_output
