"""What came out: accuracy by kind of question, with one frame repeated for comparison, a model card, a contact sheet."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from video_panda import (
    ShapesQA,
    VideoPandaForConditionalGeneration,
    VideoPandaProcessor,
    evaluate,
    write_model_card,
)

# Loads the folder as anybody would who has it from the Hub: with its own code, without this package.
ASK = """
import json, sys
from transformers import AutoModel, AutoProcessor

folder, *asked = json.loads(sys.stdin.read())
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert "video_panda" not in sys.modules
answers = []
for clip, question in asked:
    content = [{"type": "video", "path": clip}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


def write_checkpoint(source: Path, folder: Path) -> None:
    """The model in bfloat16 with its processor and code: what the Hub gets."""
    model = VideoPandaForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 32
    model.save_pretrained(folder)
    VideoPandaProcessor.from_pretrained(source).save_pretrained(folder)


def measure(checkpoint: Path, clips: Path, output_dir: Path, split: str, num_clips: int, first: int = 0) -> dict:
    """Ask about the clips of a split; then about time again, of one frame that is shown eight times.

    Returns:
        `scores` and `one_frame`, score tables.
    """
    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = VideoPandaProcessor.from_pretrained(checkpoint)
    everything = ShapesQA(clips, split, num_clips, first)
    everything.prepare(num_workers=2)
    about_time = ShapesQA(clips, split, num_clips, first, kinds=ShapesQA.time_kinds)
    options = {"batch_size": 32, "max_new_tokens": 16}
    return {
        "scores": evaluate(model, everything, processor, output_dir=output_dir / split, **options).scores,
        "one_frame": evaluate(
            model, about_time, processor, output_dir=output_dir / f"{split}-one-frame", repeat_frame=4, **options
        ).scores,
    }


def basic_accuracy(scores) -> float:
    """Mean accuracy over the kinds about single objects, each weighing the same."""
    return sum(scores[kind].accuracy for kind in ShapesQA.basic_kinds) / len(ShapesQA.basic_kinds)


def table(measured: dict) -> str:
    """Accuracy by kind beside chance, with intervals, and from one repeated frame."""
    lines = [
        "| kind | questions | accuracy % | 95% interval | chance % | from one frame % |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    one_frame = {row.kind: row for row in measured["one_frame"].rows}
    for row in (*measured["scores"].rows, measured["scores"].total):
        blind = one_frame.get(row.kind)
        lines.append(
            f"| {row.kind} | {row.num_questions} | {100 * row.accuracy:.1f} | {100 * row.low:.1f} to {100 * row.high:.1f} "
            f"| {100 * row.chance:.1f} | {'' if blind is None else f'{100 * blind.accuracy:.1f}'} |"
        )
    return "\n".join(lines)


def write_card(checkpoint: Path, measured: dict, split: str, name: str, words: str) -> None:
    """`README.md` of the checkpoint, with the scores in its metadata."""
    results = {row.kind: row.accuracy for row in measured["scores"].rows} | {
        "single objects": basic_accuracy(measured["scores"])
    }
    write_model_card(
        checkpoint,
        name=name,
        description=words,
        evaluation=f"ShapesQA, {split} split, bfloat16 weights computed in float32:\n\n{table(measured)}",
        results=results,
        dataset="shapes-qa",
        split=split,
    )
    scores = {kind: row.to_dict() for kind, row in measured.items()}
    (checkpoint / "evaluation.json").write_text(json.dumps(scores, indent=1))


def ask_in_fresh_process(checkpoint: Path, asked: list[tuple[Path, str]]) -> list[str]:
    """Answers of the checkpoint, loaded with `trust_remote_code=True` by a process that has not this package."""
    message = json.dumps([str(checkpoint.resolve()), *((str(clip), question) for clip, question in asked)])
    process = subprocess.run(
        [sys.executable, "-c", ASK], input=message, capture_output=True, text=True, cwd=checkpoint.resolve()
    )
    if process.returncode:
        raise RuntimeError(f"the fresh process failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def write_contact_sheet(path: Path, rows: list[tuple[Path, str, str, str]], processor: VideoPandaProcessor) -> None:
    """A picture of the frames that the model saw, row by row, with question, answer and truth.

    Args:
        path: the PNG.
        rows: clip, question, answer, truth.
        processor: takes the frames as it does for the model.
    """
    side, gap, text_height = 96, 4, 20
    num_frames = processor.video_processor.num_frames
    size = (num_frames * (side + gap) + gap, len(rows) * (side + text_height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (clip, question, answer, truth) in enumerate(rows):
        top = gap + number * (side + text_height + gap)
        draw.text(
            (gap, top), f"{question}  answer: {answer}  truth: {truth}", fill="black" if answer == truth else "red"
        )
        frames, _ = processor.video_processor.fetch_videos(clip)
        for place, frame_HWC in enumerate(frames):
            picture = Image.fromarray(frame_HWC.numpy()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + place * (side + gap), top + text_height))
    sheet.save(path)
