"""Step time of stage 1 without the teacher, against the frozen language model alone.

    python benchmarks/stage1_step.py [ROUNDS]

Three steps over the same token count take turns, on two threads:

- *stage 1*: `InitialAlignmentTrainer.train()` with `distillation_loss="none"`, over batches that lie ready in memory: all of
  the Trainer's loop from the end of one step to the end of the next, with forward and backward of the whole model, clipping,
  AdamW, schedule and `zero_grad`. One optimizer step a batch; accumulation would only make it cheaper.
- *LLM*: `LlamaForCausalLM` over the same weights, frozen: forward and backward from `inputs_embeds` that require a gradient,
  with `labels`: logits of all positions, as transformers computes them.
- *LLM, logits of answers*: the same with logits only at those positions where there is something to predict, as the trainer
  asks for. The stricter comparison: what is left is STAB, projector, optimizer and the Trainer itself.

What matters is that the proportions are those of the 7B model, whose floating-point operations are counted on the meta
device. Small models make the comparison harder: STAB's narrow layers are bound by memory, which counts for more there.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would count as processor time

import torch
from report import describe_machine, markdown_table, write_result
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import tiny_processor
from training_runs import stage_arguments

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration
from video_panda.trainers.stages import InitialAlignmentTrainer

LIMIT = 1.15
NUM_VIDEOS, NUM_FRAMES, SIDE = 2, 8, 8
NUM_QUESTION_TOKENS, NUM_ANSWER_TOKENS = 60, 40
NUM_WARM_UP = 2
# The 7B model with every width divided by 16; the tokenizer of the tests has few tokens, which keeps the output layer small.
TEXT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32, "num_attention_heads": 4}
VISION = {"hidden_size": 64, "image_size": 28 * SIDE}
WAYS = ("stage 1", "LLM", "LLM, logits of answers")


def build_prompt(config: VideoPandaConfig, side: int) -> list[int]:
    """A question with a video of square frames."""
    row = [config.video_token_id] * side + [config.row_token_id]
    return [1, *range(100, 99 + NUM_QUESTION_TOKENS), *[config.frame_token_id, *row * side] * NUM_FRAMES]


def build_batch(config: VideoPandaConfig, num_videos: int, side: int) -> dict:
    """One video a prompt; pixels, prompts and labels as the collator gives them."""
    prompt = build_prompt(config, side)
    input_ids = torch.tensor([[*prompt, *range(200, 199 + NUM_ANSWER_TOKENS), 2]] * num_videos)
    size = config.vision_config.canvas_size
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(torch.arange(input_ids.shape[1]) < len(prompt), -100),
        "pixel_values_videos": torch.randn(num_videos, NUM_FRAMES, 3, size, size),
        "video_grid_thw": torch.tensor([[NUM_FRAMES, side, side]] * num_videos),
        "num_samples": num_videos,
        "skipped": [],
    }


def llm_step(llm: LlamaForCausalLM, batch: dict, only_answers: bool = False) -> None:
    """Forward and backward of the language model alone; its weights are frozen."""
    shape = (*batch["input_ids"].shape, llm.config.hidden_size)
    embeds = torch.full(shape, 0.02, dtype=llm.dtype, device=llm.device, requires_grad=True)
    options = {}
    if only_answers:
        kept = (batch["labels"][:, 1:] != -100).any(dim=0).nonzero().squeeze(1)
        options = {"logits_to_keep": kept, "shift_labels": batch["labels"][:, kept + 1]}
    mask = batch["attention_mask"]
    llm(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"], use_cache=False, **options).loss.backward()


class TakeTurns(TrainerCallback):
    """Times the trainer's steps, and between them those of the language model alone."""

    def __init__(self, llm: LlamaForCausalLM, batch: dict):
        self.seconds = {way: [] for way in WAYS}  # (wall clock, processor) of each step
        self.llm, self.batch = llm, batch
        self.start = None

    def on_step_end(self, args, state, control, **kwargs):
        self._note(WAYS[0], state.global_step)
        for way in WAYS[1:]:
            self.start = clocks()
            llm_step(self.llm, self.batch, only_answers=way == WAYS[2])
            self._note(way, state.global_step)
        assert all(parameter.grad is None for parameter in self.llm.parameters())
        self.start = clocks()

    def _note(self, way: str, step: int) -> None:
        if step > NUM_WARM_UP:
            self.seconds[way].append([now - then for now, then in zip(clocks(), self.start)])


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of processor time of this process and its threads."""
    return time.perf_counter(), time.process_time()


def measure(num_rounds: int) -> tuple[dict, dict, dict]:
    """Seconds of each step by way; operations by way; parameters by part."""
    torch.manual_seed(0)
    processor = tiny_processor()
    text = LlamaConfig(vocab_size=processor.video_token_id, **TEXT)
    config = VideoPandaConfig.from_text_config(text, vision_config=VISION)
    model = VideoPandaForConditionalGeneration(config)
    llm = llm_of(model, torch.device("meta"))
    batch = build_batch(config, NUM_VIDEOS, SIDE)
    turns = TakeTurns(llm, batch)
    conversation = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A red ball."}]
    samples = [{"id": "never read", "video": "0.mp4", "conversations": conversation}] * NUM_VIDEOS
    with tempfile.TemporaryDirectory() as folder:
        args = stage_arguments(
            "initial_alignment",
            folder,
            distillation_loss="none",
            per_device_train_batch_size=NUM_VIDEOS,
            global_batch_size=NUM_VIDEOS,
            max_steps=num_rounds + NUM_WARM_UP,
            logging_steps=10,
        )
        trainer = InitialAlignmentTrainer(
            model=model,
            args=args,
            processing_class=processor,
            data_collator=lambda samples: dict(batch),
            train_dataset=samples,
            callbacks=[turns],
        )
        trainer.train()
        operations = {}
        for way in WAYS[1:]:
            with FlopCounterMode(display=False) as counter:
                llm_step(llm, batch, only_answers=way == WAYS[2])
            operations[way] = counter.get_total_flops()
        operations["vision"] = vision_operations(model, batch["pixel_values_videos"], SIDE)
        operations[WAYS[0]] = operations[WAYS[2]] + operations["vision"]
    return turns.seconds, operations, num_parameters(model)


def llm_of(model: VideoPandaForConditionalGeneration, device: torch.device) -> LlamaForCausalLM:
    """The language model inside, as a model of its own over the same weights."""
    with device:
        llm = LlamaForCausalLM(model.config.text_config)
    llm.model, llm.lm_head = model.model.language_model, model.lm_head
    return llm


def num_parameters(model) -> dict[str, int]:
    core = model.model
    parts = {"STAB": core.stab, "projector": core.projector, "LLM": llm_of(model, torch.device("meta"))}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def vision_operations(model, pixels_VTCSS: torch.Tensor, side: int) -> int:
    """Operations of STAB and projector, forward and backward.

    Three times the forward's: torch counts the backward of depthwise convolutions as if they were dense.
    """
    grids = torch.tensor([[pixels_VTCSS.shape[1], side, side]] * len(pixels_VTCSS))
    with FlopCounterMode(display=False) as counter:
        model.get_video_features(pixels_VTCSS, grids)
    return 3 * counter.get_total_flops()


def count_7b() -> tuple[int, int, dict]:
    """Operations of the 7B model's forward and backward over one square video: vision's, and the frozen LLM's."""
    with torch.device("meta"):
        model = VideoPandaForConditionalGeneration(VideoPandaConfig())
    llm = llm_of(model, torch.device("meta")).requires_grad_(False)
    side = model.config.vision_config.num_tokens_per_side
    batch = build_batch(model.config, 1, side)
    batch = {name: batch[name].to("meta") for name in ("input_ids", "labels", "pixel_values_videos")}
    length = batch["input_ids"].shape[1]
    # A mask of two dimensions would be looked into.
    batch["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    vision = vision_operations(model, batch["pixel_values_videos"], side)
    with FlopCounterMode(display=False) as counter:
        llm_step(llm, batch)
    return vision, counter.get_total_flops(), num_parameters(model)


def main() -> int:
    torch.set_num_threads(2)
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    vision_7b, llm_7b, parameters_7b = count_7b()
    seconds, operations, parameters = measure(num_rounds)
    walls, processor = ({way: [pair[own] for pair in seconds[way]] for way in WAYS} for own in (0, 1))
    rows, own = [], WAYS[0]
    for way in WAYS:
        rounds = median(mine / base for mine, base in zip(walls[own], walls[way]))
        numbers = [median(walls[way]), min(walls[way]), median(processor[way])]
        numbers += [median(walls[own]) / median(walls[way]), min(walls[own]) / min(walls[way]), rounds]
        numbers += [median(processor[own]) / median(processor[way]), operations[own] / operations[way]]
        rows.append([way, *(f"{number:.3f}" for number in numbers)])
    ratio = median(walls[own]) / median(walls[WAYS[1]])
    header = ["step", "median, s", "minimum, s", "processor time, s", "stage 1 / this: medians", "minima"]
    header += ["median of rounds", "processor time", "operations"]
    parts = [
        [name, *(f"{part / 1e6:.2f}" for part in counts.values()), f"{100 * share:.2f}%"]
        for name, counts, share in (
            ("7B", parameters_7b, vision_7b / llm_7b),
            ("measured", parameters, operations["vision"] / operations[WAYS[1]]),
        )
    ]
    num_tokens = len(build_prompt(VideoPandaConfig(), SIDE)) + NUM_ANSWER_TOKENS
    text = f"""# Step time of stage 1 without the teacher

Limit: {LIMIT} x forward and backward of the language model alone; found: {ratio:.3f} on the wall clock,
{median(processor[own]) / median(processor[WAYS[1]]):.3f} in processor time. {num_rounds} rounds of {NUM_VIDEOS} prompts of {num_tokens} tokens, each with a video of {NUM_FRAMES} frames of {SIDE} x {SIDE} tokens; float32.

{markdown_table(header, rows)}

The 7B model (counted: one square video of {NUM_FRAMES} frames) and the one measured:

{markdown_table(["model", "STAB, M", "projector, M", "LLM, M", "vision's operations / LLM's"], parts)}

{__doc__.split(chr(10) + chr(10), 2)[2].strip()}

The machine was shared with other work, which is why the steps take turns. Other work stretches the wall clock of single steps
at random; the processor time that they took (median) does not know it. {describe_machine("torch", "transformers")}.
By `python benchmarks/stage1_step.py`.
"""
    write_result("stage1_step", text)
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
