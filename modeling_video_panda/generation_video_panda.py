"""What `generate` must know of Video-Panda: a visual's tokens are patches, contexts and row ends, of four ids."""

from transformers import GenerationMixin
from transformers.generation.logits_process import SuppressTokensLogitsProcessor


class VideoPandaGenerationMixin(GenerationMixin):
    """`generate` of transformers, with the hooks overridden that take a visual's tokens for one id, or for text."""

    def prepare_inputs_for_generation(
        self, input_ids, *args, is_first_iteration=False, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        # The first call of an assistant model is not marked as one, and its visuals would be left out. A decoding step of
        # one token is not looked at: asking a static cache for its length would wait for the device.
        if not is_first_iteration and input_ids.shape[1] > 1:
            is_first_iteration = past_key_values is None or past_key_values.get_seq_length() == 0
        return super().prepare_inputs_for_generation(
            input_ids,
            *args,
            is_first_iteration=is_first_iteration,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

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
