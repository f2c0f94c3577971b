"""What distillation adds to the peak memory of a training step, and what a frozen language model saves.

    python benchmarks/distillation_memory.py

**Distillation.** One step (forward and backward) of the same model, batch, alignment head and teacher features: without
distillation; with `TrainingLosses`, as the trainers have it; and the naive way: `output_hidden_states=True`, a
`torch.stack` of all of them, the patch tokens out of the stack, head, loss. *Extra* is a step's peak minus that of the step
without distillation. The teacher's features (made inside the step) and the head's gradients count as extra. Each way runs
in a process of its own.

**Stages.** One step of the real trainers of stages 1 and 2 on two tiny clips: bytes of gradients before the optimizer step
and of optimizer state after it, by part, and the peak of the whole step.

Peaks are exact: the largest of the running totals that torch's CPU allocator gives the profiler at every allocation (kernels'
workspaces are among them; Python objects and oneDNN's scratch buffers are not). Nothing is sampled, so that
other work on the machine does not matter. Weights and pixels lie in memory before and are not counted.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import RESULTS, describe_machine, markdown_table, write_result

LIMIT = 1 / 3
NUM_FRAMES, HIDDEN, NUM_ANSWER_TOKENS = 8, 128, 20
WAYS = ("none", "ours", "naive")
# (layers, videos, tokens a side of a frame, is the language model frozen)
BASE = (32, 2, 12, False)
BY_LAYERS = [(8, *BASE[1:]), (16, *BASE[1:]), BASE]
BY_TOKENS = [(32, 1, 8, False), (32, 1, 12, False), BASE, (32, 2, 16, False)]
FROZEN = (*BASE[:3], True)
POINTS = {"float32": [*BY_LAYERS[:2], *BY_TOKENS, FROZEN], "bfloat16": [BY_TOKENS[0], BASE, FROZEN]}
TESTS = Path(__file__).parents[1] / "tests"


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had handed out during `step` and not got back, above the beginning."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what an earlier measurement left must not be released during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    return peak_of(profiler)


def peak_of(profiler) -> int:
    """As `peak_bytes`, of a profile that is finished."""
    from torch._C._profiler import _EventType

    events, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append(event)
    first = min(events, key=lambda event: event.start_time_ns).extra_fields
    return max(event.extra_fields.total_allocated for event in events) - (first.total_allocated - first.alloc_size)


def build_model(num_layers: int, side: int, dtype: str, is_checkpointed: bool, is_frozen: bool):
    """A Video-Panda of small width and its alignment head, in training mode."""
    import torch
    from transformers import LlamaConfig

    from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration
    from video_panda.trainers.alignment_head import AlignmentHead, distilled_layers

    text = LlamaConfig(
        vocab_size=2000,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11008 // 4096,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
    )
    # No dropout, so that the ways can be seen to compute the same loss.
    vision = {"image_size": 28 * side, "hidden_size": 32, "gstra_dropout": 0.0, "fusion_dropout": 0.0}
    torch.manual_seed(0)
    model = VideoPandaForConditionalGeneration(VideoPandaConfig.from_text_config(text, vision_config=vision))
    head = AlignmentHead(len(distilled_layers(num_layers)), HIDDEN, HIDDEN)
    model.model.language_model.requires_grad_(not is_frozen)
    model.lm_head.requires_grad_(not is_frozen)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(getattr(torch, dtype)).train(), head.to(getattr(torch, dtype))


def build_inputs(config, num_videos: int, side: int) -> dict:
    """One video a prompt, a question and an answer; logits for the answer only, as the trainers ask for them."""
    import torch

    row = [config.video_token_id] * side + [config.row_token_id]
    prompt = [1, *range(100, 120), *[config.frame_token_id, *row * side] * NUM_FRAMES]
    answer = [*range(200, 199 + NUM_ANSWER_TOKENS), 2]
    input_ids = torch.tensor([prompt + answer] * num_videos)
    kept = torch.arange(len(prompt) - 1, input_ids.shape[1] - 1)
    size = config.vision_config.canvas_size
    torch.manual_seed(1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(torch.arange(input_ids.shape[1]) < len(prompt), -100),
        "logits_to_keep": kept,
        "shift_labels": input_ids[:, kept + 1],
        "pixel_values_videos": torch.randn(num_videos, NUM_FRAMES, 3, size, size),
        "video_grid_thw": torch.tensor([[NUM_FRAMES, side, side]] * num_videos),
    }


def teacher_features(num_videos: int, side: int, dtype) -> list:
    """What a teacher would give for each video."""
    import torch

    torch.manual_seed(2)
    return [torch.randn(NUM_FRAMES, side, side, HIDDEN, dtype=dtype) for _ in range(num_videos)]


def naive_losses(model, head, inputs: dict, features: list):
    """LM loss and distillation loss by way of all hidden states."""
    import torch

    from video_panda.trainers.alignment_head import distillation_loss, distilled_layers

    output = model(**inputs, output_hidden_states=True)
    states = torch.stack(output.hidden_states)
    is_patch = inputs["input_ids"] == model.config.video_token_id
    of_patches = states[:, is_patch]
    layers = distilled_layers(model.config.text_config.num_hidden_layers)
    prediction = head([of_patches[layer] for layer in layers])
    teacher = torch.cat(features)
    return output.loss, distillation_loss(prediction.view_as(teacher), teacher).mean()


def measure_step(way: str, dtype: str, is_checkpointed: bool, point: tuple) -> dict:
    """Peak and distillation loss of one step."""
    from video_panda.trainers.distillation import DistillationBatch, TrainingLosses

    num_layers, num_videos, side, is_frozen = point
    model, head = build_model(num_layers, side, dtype, is_checkpointed, is_frozen)
    inputs = build_inputs(model.config, num_videos, side)
    losses = TrainingLosses(model, head) if way == "ours" else None
    found = {}

    def step():
        if way == "none":
            model(**inputs).loss.backward()
            return
        features = teacher_features(num_videos, side, model.dtype)
        if way == "naive":
            lm_loss, distilled = naive_losses(model, head, inputs, features)
            (lm_loss + distilled).backward()
        else:
            losses.begin(DistillationBatch(features, num_videos * NUM_FRAMES))
            try:
                output = model(**inputs)
            finally:
                losses.end()
            distilled = output.distillation_loss
            output.loss.backward()
        found["loss"] = float(distilled.detach())

    return {"peak": peak_bytes(step), **found}


def measure_stage(stage: str) -> dict:
    """Bytes by part of weights, gradients and optimizer state, and the peak of the first step of a real trainer."""
    sys.path.insert(0, str(TESTS))
    from tiny import tiny_config, tiny_model, tiny_processor
    from torch.profiler import ProfilerActivity, profile
    from training_runs import make_trainer, tiny_teacher, write_samples
    from transformers import TrainerCallback

    from video_panda.trainers.parameters import PARTS, part_of

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    names = {}
    found = {kind: dict.fromkeys(PARTS, 0) for kind in ("weights", "gradients", "optimizer state")}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            profiler.start()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                found["weights"][part_of(name)] += parameter.nbytes
                found["gradients"][part_of(name)] += 0 if parameter.grad is None else parameter.grad.nbytes
                names[parameter] = name  # while the model still carries the head

        def on_optimizer_step(self, args, state, control, **kwargs):
            profiler.stop()  # before the gradients are let go of

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processor = tiny_processor()
        text = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 16}
        trainer = make_trainer(
            stage,
            write_samples(folder / "data", num_clips=2),
            folder / "run",
            tiny_teacher(folder / "teacher"),
            model=tiny_model(tiny_config(processor.video_token_id, text=text)),
            processor=processor,
            per_device_train_batch_size=2,
            global_batch_size=2,
            max_steps=1,
            callbacks=[Watch()],
        )
        trainer.train()
        for parameter, state in trainer.optimizer.state.items():
            nbytes = sum(value.nbytes for value in state.values() if hasattr(value, "nbytes"))
            found["optimizer state"][part_of(names[parameter])] += nbytes
    return {**found, "peak": peak_of(profiler)}


def run_apart(*task) -> dict | list:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "measure", json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def plot(panels: list[tuple[str, str, list[tuple[str, list[tuple[float, float]]]]]], path: Path) -> None:
    """Line charts side by side as an SVG file; a panel: title, label of the abscissa, named lines of (x, MiB)."""
    width, height, margin = 380, 260, 56
    colours = {"naive": "#c0392b", "ours": "#2471a3"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" height="{height + 20}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, (title, label, lines) in enumerate(panels):
        left, right, top, bottom = place * width + margin, (place + 1) * width - 12, 34, height - 36
        most_x = max(x for _, line in lines for x, _ in line)
        most_y = max(y for _, line in lines for _, y in line) * 1.05

        def to_px(x, y, left=left, right=right, top=top, bottom=bottom, most_x=most_x, most_y=most_y):
            return left + (right - left) * x / most_x, bottom - (bottom - top) * y / most_y

        parts.append(f'<text x="{(left + right) / 2}" y="18" text-anchor="middle" font-weight="bold">{title}</text>')
        parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>')
        parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 32}" text-anchor="middle">{label}</text>')
        for share in (0, 0.25, 0.5, 0.75, 1):
            _, y = to_px(0, most_y * share)
            parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{most_y * share:.0f}</text>')
        for x in sorted({x for _, line in lines for x, _ in line}):
            parts.append(f'<text x="{to_px(x, 0)[0]:.1f}" y="{bottom + 15}" text-anchor="middle">{x:g}</text>')
        for row, (name, line) in enumerate(lines):
            colour = colours[name.split(",")[0]]
            dashes = ' stroke-dasharray="5 3"' if "checkpointing" in name else ""
            points = " ".join("{:.1f},{:.1f}".format(*to_px(*point)) for point in line)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
            y = top + 8 + 14 * row
            parts.append(
                f'<path d="M{left + 10} {y}h24" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
                f'<text x="{left + 40}" y="{y + 4}">{name}</text>'
            )
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f}" if num_bytes else "0"


def num_patches(point: tuple) -> int:
    return point[1] * NUM_FRAMES * point[2] ** 2


def report_stages(stages: dict[str, dict]) -> str:
    rows = []
    for stage, found in stages.items():
        for kind in ("weights", "gradients", "optimizer state"):
            rows.append([f"{stage}: {kind}", *(mib(own) for own in found[kind].values())])
    peaks = ", ".join(f"{stage} {mib(found['peak'])} MiB" for stage, found in stages.items())
    parts = list(next(iter(stages.values()))["weights"])
    return f"{markdown_table(['MiB', *parts], rows)}\n\nPeak of the whole step, weights not counted: {peaks}."


def plot_growth(found: dict) -> None:
    """Extra peak memory over layers and over tokens; `found`: (dtype, is checkpointed, point) -> bytes of each way."""
    panels = []
    for title, label, series, axis in (
        (f"{num_patches(BASE)} patch tokens", "layers", BY_LAYERS, lambda point: point[0]),
        ("32 layers", "patch tokens in the batch", BY_TOKENS, num_patches),
    ):
        lines = [
            (f"{way}{', checkpointing' * own}", [(axis(p), found["float32", own, p][way] / 2**20) for p in series])
            for way in ("naive", "ours")
            for own in (False, True)
        ]
        panels.append((f"Extra peak, MiB (float32, {title})", label, lines))
    plot(panels, RESULTS / "distillation_memory.svg")


def main() -> int:
    found, rows, worst = {}, [], 0.0
    for dtype, points in POINTS.items():
        for is_checkpointed in (False, True):
            tasks = [("steps", way, dtype, is_checkpointed, points) for way in WAYS]
            with ThreadPoolExecutor() as pool:
                of_way = pool.map(lambda task: run_apart(*task), tasks)
            for point, none, ours, naive in zip(points, *of_way):
                extra = {name: own["peak"] - none["peak"] for name, own in (("ours", ours), ("naive", naive))}
                found[dtype, is_checkpointed, point] = extra
                close = 1e-4 if dtype == "float32" else 2e-2
                assert abs(ours["loss"] - naive["loss"]) < close, f"{ours['loss']} and {naive['loss']} are not one loss"
                ratio = extra["ours"] / extra["naive"]
                assert extra["ours"] > 0, f"{point}: distillation cannot cost {extra['ours']} bytes"
                worst = max(worst, ratio) if point[0] == BASE[0] else worst
                numbers = [mib(none["peak"]), mib(extra["naive"]), mib(extra["ours"]), f"**{ratio:.2f}**"]
                trains = "frozen" if point[3] else "trains"
                label = f"{dtype}, {'with' if is_checkpointed else 'without'} checkpointing, LLM {trains}"
                rows.append([label, str(point[0]), str(num_patches(point)), *numbers])
                print(rows[-1], file=sys.stderr, flush=True)  # it takes a while
    plot_growth(found)
    stages = {name: run_apart("stage", full) for name, full in (("stage 1", STAGES[0]), ("stage 2", STAGES[1]))}
    header = ["step", "layers", "patch tokens", "LM step, MiB", "naive extra, MiB", "ours extra, MiB", "ours / naive"]
    notes = __doc__.split("\n\n", 2)[2].strip()
    text = f"""# Memory of a training step

## Distillation

Limit: extra peak memory at most 1/3 of the naive way's at {BASE[0]} layers; the worst case here is {worst:.2f}. Llama of width {HIDDEN},
teacher of width {HIDDEN}; 1, 1, 2 and 2 prompts, each with a video of {NUM_FRAMES} frames, of 8 x 8, 12 x 12, 12 x 12 and
16 x 16 tokens a frame.

{markdown_table(header, rows)}

![growth](distillation_memory.svg)

## Stages

A Llama of 16 layers of width 256 behind a tiny STAB, AdamW, two clips; float32.

{report_stages(stages)}

## How

{notes}

{describe_machine("torch", "transformers")}.
By `python benchmarks/distillation_memory.py`.
"""
    write_result("distillation_memory", text)
    frozen = stages["stage 1"]
    is_clean = not frozen["gradients"]["language_model"] and not frozen["optimizer state"]["language_model"]
    return int(worst > LIMIT or not is_clean)


STAGES = ("initial_alignment", "visual_language_integration")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        kind, *rest = json.loads(sys.argv[2])
        if kind == "stage":
            print("\n" + json.dumps(measure_stage(*rest)))
        else:
            print("\n" + json.dumps([measure_step(*rest[:3], tuple(point)) for point in rest[3]]))
    else:
        sys.exit(main())
