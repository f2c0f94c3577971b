"""What Video-Panda adds to `generate` of the language model alone.

    python benchmarks/generation.py [ROUNDS]

Models with random weights. Two ways take turns, each answering one prompt greedily:

- *bare*: transformers' `LlamaForCausalLM` with the same weights, on a prompt of text of the same length;
- *whole*: Video-Panda, on a prompt with one video of 8 frames.

The encoding of the video by itself (`get_video_features`) is timed in the same turns. The time to the first token of the
whole is compared with that of the bare model and the encoding together, and the seconds of each further token with those of
the bare model. The smaller the model, the harder the comparison: a step of a tiny one is mostly Python, of which
Video-Panda adds the same few lines to any.

Then questions about one clip are asked with a prefix cache that they share and without one, each answered by one token: what
is left is what a question costs beside its answer.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from report import describe_machine, markdown_table, write_result
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from model_inputs import visual_ids
from tiny import tiny_config, tiny_model

LIMIT = 1.05
NUM_NEW_TOKENS, NUM_FRAMES, NUM_QUESTIONS = 32, 8, 8

# Of the language model: layers and width; of STAB: side of the canvas in px and width. The limit is for the larger.
SIZES = {"tiny": ((2, 48), (84, 32)), "small": ((24, 512), (224, 256))}


class TokenTimes:
    """A streamer that notes when each token came."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def put(self, token_ids) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def build(size: str):
    """Video-Panda and the bare language model, of the same weights."""
    (num_layers, width), (image_size, stab_width) = SIZES[size]
    heads = max(4, width // 64)
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000 if size == "small" else 400,
    }
    vision = {"image_size": image_size, "hidden_size": stab_width}
    model = tiny_model(tiny_config(text["vocab_size"], text=text, vision=vision))
    bare = LlamaForCausalLM(model.config.text_config).eval()
    bare.model.load_state_dict(model.model.language_model.state_dict())
    bare.lm_head.load_state_dict(model.lm_head.state_dict())
    for own in (model, bare):
        own.generation_config.eos_token_id = None  # every answer takes all its tokens
        own.generation_config.pad_token_id = 0
    return model, bare


def prompt(model) -> dict:
    """One video in the middle of some text."""
    vision = model.config.vision_config
    side = vision.num_tokens_per_side
    ids = [1, *range(5, 35), *visual_ids(model.config, NUM_FRAMES, side, side), *range(35, 55)]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": torch.randn(1, NUM_FRAMES, 3, vision.canvas_size, vision.canvas_size),
        "video_grid_thw": torch.tensor([[NUM_FRAMES, side, side]]),
    }


def timed_answer(model, inputs: dict, num_new_tokens: int = NUM_NEW_TOKENS) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    streamer = TokenTimes()
    model.generate(**inputs, do_sample=False, max_new_tokens=num_new_tokens, streamer=streamer)
    start, _, first, *_, last = streamer.times  # the second is the prompt
    return first - start, (last - first) / (num_new_tokens - 1)


def compare(model, bare, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each part and round."""
    inputs = prompt(model)
    text = {"input_ids": inputs["input_ids"] % 300 + 5, "attention_mask": inputs["attention_mask"]}
    video = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    times: dict[str, list[float]] = {
        name: [] for name in ("vision", "bare first", "bare token", "whole first", "whole token")
    }
    for number in range(num_rounds + 1):
        ways = [("bare", bare, text), ("whole", model, inputs)]
        for name, own, given in ways if number % 2 else reversed(ways):
            first, token = timed_answer(own, given)
            times[f"{name} first"].append(first)
            times[f"{name} token"].append(token)
        begin = time.perf_counter()
        with torch.no_grad():
            model.get_video_features(**video)
        times["vision"].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def ratio_of_rounds(numerators, denominators) -> float:
    return median(above / below for above, below in zip(numerators, denominators))


def ask_questions(model, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of all questions, each answered by one token, by way and round."""
    inputs = prompt(model)
    questions = [
        {**inputs, "input_ids": torch.cat([inputs["input_ids"][:, :-10], torch.randint(5, 300, (1, 10))], 1)}
        for _ in range(NUM_QUESTIONS)
    ]
    times: dict[str, list[float]] = {"one by one": [], "in turn": [], "in a batch": []}
    together = {name: torch.cat([own[name] for own in questions]) for name in inputs}
    for _ in range(num_rounds + 1):
        for way, batches in (("one by one", questions), ("in turn", questions), ("in a batch", [together])):
            cache = None if way == "one by one" else model.prefix_cache()
            begin = time.perf_counter()
            for batch in batches:
                model.generate(**batch, past_key_values=cache, do_sample=False, max_new_tokens=1)
            times[way].append(time.perf_counter() - begin)
    return {way: values[1:] for way, values in times.items()}


def main(num_rounds: int) -> int:
    rows, question_rows, holds = [], [], True
    for size in SIZES:
        model, bare = build(size)
        times = compare(model, bare, num_rounds)
        floor = [sum(pair) for pair in zip(times["bare first"], times["vision"])]
        ratios = (
            ratio_of_rounds(times["whole first"], floor),
            ratio_of_rounds(times["whole token"], times["bare token"]),
        )
        holds = max(ratios) <= LIMIT
        ms = {name: 1000 * median(values) for name, values in times.items()}
        name = f"{size}, {model.num_parameters() / 1e6:.1f} M, {prompt(model)['input_ids'].shape[1]} tokens"
        rows.append(
            [
                name,
                *(f"{ms[own]:.1f}" for own in ("bare first", "vision", "whole first")),
                f"{ratios[0]:.3f}",
                *(f"{ms[own]:.2f}" for own in ("bare token", "whole token")),
                f"{ratios[1]:.3f}",
            ]
        )
        asked = ask_questions(model, max(1, num_rounds // 4))
        one = median(asked["one by one"]) / NUM_QUESTIONS
        question_rows.append([name, *(f"{median(values) / one:.2f}" for values in asked.values())])
    first = ["model, prompt", "bare, first token, ms", "vision, ms", "whole, first token, ms", "ratio"]
    text = f"""# What Video-Panda adds to the language model's `generate`

Random weights, float32, {torch.get_num_threads()} threads, one prompt with one video of {NUM_FRAMES} frames; *bare* is
`LlamaForCausalLM` of the same weights at the same prompt length. {num_rounds} rounds that take turns; ratios are medians of the
rounds': the first token against bare and vision together, each further token against bare. The limit for the larger
model, {LIMIT:.2f}, {"holds" if holds else "does not hold"}.

{markdown_table([*first, "bare, a token, ms", "whole, a token, ms", "ratio"], rows)}

{NUM_QUESTIONS} questions about one clip, up to the first token of each answer, in units of one question alone:

{markdown_table(["model, prompt", "each by itself", "prefix cache, in turn", "prefix cache, in a batch"], question_rows)}

{describe_machine("torch", "transformers")}.
By `python benchmarks/generation.py`.
"""
    write_result("generation", text)
    return 0 if holds else 1


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 12))
