"""Stand-in for a file that the source distribution lacks: what `generate` must do, for any model that the testers bring.

Ours, written for what these tests are about: prompts with pictures and clips through every way of decoding. Each test
compares with another way to the same tokens, or with the contract of `generate`; tokens are counted, never looked at.
"""

import copy

import torch
from transformers import set_seed

NEW_TOKENS = 5


class GenerationTesterMixin:
    """Tests of `generate`, for the classes of `all_generative_model_classes`."""

    def _models_and_inputs(self):
        for model_class in self.all_generative_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # far from uniform, so that ties are no excuse
                    parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
            yield model, inputs

    def _generate(self, model, inputs, **options):
        defaults = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return model.generate(**copy.deepcopy(inputs), **{**defaults, **options})

    def _new(self, tokens, inputs):
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
        return tokens[:, inputs["input_ids"].shape[1] :]

    def test_greedy_generate_is_argmax(self):
        for model, inputs in self._models_and_inputs():
            got = self._new(self._generate(model, inputs), inputs)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            for step in range(NEW_TOKENS):
                with torch.no_grad():
                    logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1].float()
                logits[:, model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens
                ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
                mask = torch.cat((mask, torch.ones_like(ids[:, :1])), dim=1)
                assert got[:, step].tolist() == ids[:, -1].tolist()

    def test_generate_without_cache(self):
        for model, inputs in self._models_and_inputs():
            assert torch.equal(self._generate(model, inputs), self._generate(model, inputs, use_cache=False))

    def test_generate_with_static_cache(self):
        for model, inputs in self._models_and_inputs():
            static = self._generate(model, inputs, cache_implementation="static", disable_compile=True)
            assert torch.equal(self._generate(model, inputs), static)

    def test_generate_from_inputs_embeds(self):
        for model, inputs in self._models_and_inputs():
            embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
            others = {name: value for name, value in inputs.items() if name != "input_ids"}
            got = self._generate(model, {**others, "inputs_embeds": embeds})
            assert torch.equal(got, self._new(self._generate(model, inputs), inputs))

    def test_generate_one_by_one(self):
        for model, inputs in self._models_and_inputs():
            together = self._generate(model, inputs)
            for row in range(len(together)):
                alone = self._generate(model, {name: value[row : row + 1] for name, value in inputs.items()})
                assert alone[0].tolist() == together[row].tolist()

    def test_generate_left_padded(self):
        for model, inputs in self._models_and_inputs():
            padding = torch.zeros_like(inputs["input_ids"][:, :3])
            padded = {name: torch.cat((padding, inputs[name]), dim=1) for name in ("input_ids", "attention_mask")}
            got = self._generate(model, {**inputs, **padded})[:, padding.shape[1] :]
            assert torch.equal(got, self._generate(model, inputs))

    def test_sample_generate_is_seeded(self):
        for model, inputs in self._models_and_inputs():
            draws = []
            for seed in (0, 0, 1):
                set_seed(seed)
                draws.append(self._generate(model, inputs, do_sample=True, temperature=5.0))
            assert torch.equal(draws[0], draws[1])
            assert not torch.equal(draws[0], draws[2])

    def test_sample_generate_several(self):
        for model, inputs in self._models_and_inputs():
            # From one candidate a sample is the greedy answer, for each of a prompt's answers.
            several = self._generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
            assert torch.equal(several, self._generate(model, inputs).repeat_interleave(2, dim=0))

    def test_beam_search_generate(self):
        for model, inputs in self._models_and_inputs():
            assert torch.equal(
                self._generate(model, inputs, num_beams=2, num_return_sequences=2).unflatten(0, (-1, 2))[:, 0],
                self._generate(model, inputs, num_beams=2),
            )
            # With a beam for every first token, the search over two tokens is complete: nothing greedy is likelier.
            two = {name: value[:2] for name, value in inputs.items()}
            options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 2, "min_new_tokens": 2}
            every = model.config.num_text_tokens
            beams = self._generate(model, two, num_beams=every, length_penalty=0.0, **options).sequences_scores
            greedy = self._generate(model, two, **options)
            likelihood = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True).sum(-1)
            assert bool((beams >= likelihood - 0.0001).all()), f"{beams} {likelihood}"

    def test_assisted_generate(self):
        for model, inputs in self._models_and_inputs():
            one = {name: value[:1] for name, value in inputs.items()}  # transformers assists one prompt at a time
            assistant = copy.deepcopy(model)
            assisted = self._generate(model, one, assistant_model=assistant)
            assert torch.equal(assisted, self._generate(model, one))

    def test_prompt_lookup_generate(self):
        for model, inputs in self._models_and_inputs():
            one = {name: value[:1] for name, value in inputs.items()}
            assert torch.equal(self._generate(model, one, prompt_lookup_num_tokens=2), self._generate(model, one))

    def test_generate_returns_what_is_asked_for(self):
        for model, inputs in self._models_and_inputs():
            model.set_attn_implementation("eager")
            asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
            output = self._generate(model, inputs, return_dict_in_generate=True, **dict.fromkeys(asked, True))
            text, batch, length = model.config.get_text_config(), *inputs["input_ids"].shape
            for name in ("scores", "logits", "attentions", "hidden_states"):
                assert len(output[name]) == NEW_TOKENS
            for step in range(NEW_TOKENS):
                past, now = length + step, 1 if step else length
                assert tuple(output.logits[step].shape) == (batch, text.vocab_size)
                assert len(output.attentions[step]) == text.num_hidden_layers
                shape = (batch, text.num_attention_heads, now, past if step else length)
                assert tuple(output.attentions[step][0].shape) == shape
                assert len(output.hidden_states[step]) == text.num_hidden_layers + 1
                assert tuple(output.hidden_states[step][-1].shape) == (batch, now, text.hidden_size)

    def test_generate_continues_from_a_cache(self):
        for model, inputs in self._models_and_inputs():
            first = self._generate(model, inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
            mask = torch.cat((inputs["attention_mask"], torch.ones_like(first.sequences[:, :2])), dim=1)
            rest = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
            tokens = model.generate(
                **rest, max_new_tokens=NEW_TOKENS - 2, min_new_tokens=NEW_TOKENS - 2, do_sample=False, pad_token_id=0
            )
            assert torch.equal(tokens, self._generate(model, inputs))

    def test_left_out_placeholders_are_never_generated(self):
        for model, inputs in self._models_and_inputs():
            set_seed(0)
            tokens = self._new(self._generate(model, inputs, do_sample=True, temperature=100.0), inputs)
            assert int(tokens.max()) < model.config.num_text_tokens
