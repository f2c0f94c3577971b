"""What `evaluate` costs on top of `generate`: decoding, processing, files and scores, which run beside and after the model.

    python benchmarks/evaluation_overhead.py [ROUNDS]

Models with random weights, from tiny to small, batches of 8 questions, one clip each. Two ways take turns over the same
questions:

- *generate*: `model.generate` alone, on inputs that lie ready in memory;
- *evaluate*: the whole of `evaluate` into an empty folder, clips decoded from mp4 files.

The smaller the model, the harder the comparison: decoding a clip takes as long whatever the model, and what a tiny model
computes is mostly Python, which decoding in threads has to share.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from report import describe_machine, markdown_table, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import tiny_config, tiny_model, tiny_processor

from video_panda import ShapesQA, evaluate
from video_panda.evaluation.asking import Asker
from video_panda.evaluation.runner import PROMPT

LIMIT = 1.10
BATCH_SIZE, NUM_CLIPS, MAX_NEW_TOKENS = 8, 160, 32


# Width and layers of the language model.
SIZES = ((48, 2), (256, 4), (512, 8))


def compare(model, processor, benchmark: ShapesQA, folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each way and round."""
    questions = benchmark.questions
    asker = Asker(model, processor, benchmark, MAX_NEW_TOKENS, {}, PROMPT)
    batches = [questions[start : start + BATCH_SIZE] for start in range(0, len(questions), BATCH_SIZE)]
    inputs = [asker.make_inputs(batch, [asker.decode(question) for question in batch]) for batch in batches]
    times: dict[str, list[float]] = {"generate": [], "evaluate": []}
    for number in range(num_rounds + 1):
        begin = time.perf_counter()
        for batch in inputs:
            model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        times["generate"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        options = {"batch_size": BATCH_SIZE, "max_new_tokens": MAX_NEW_TOKENS, "show_progress": False}
        evaluate(model, benchmark, processor, output_dir=folder / f"run-{number}", **options)
        times["evaluate"].append(time.perf_counter() - begin)
    return {way: values[1:] for way, values in times.items()}  # the first round warms up


def main(num_rounds: int) -> int:
    processor = tiny_processor()
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        benchmark = ShapesQA(Path(name, "clips"), "validation", NUM_CLIPS, kinds="colour", families="single")
        benchmark.prepare(num_workers=2)
        for width, num_layers in SIZES:
            text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": num_layers}
            model = tiny_model(tiny_config(processor.video_token_id, text=text))
            model.generation_config.eos_token_id = None  # every answer takes all its tokens
            times = compare(model, processor, benchmark, Path(name, str(width)), num_rounds)
            ratios.append(median(whole / alone for whole, alone in zip(times["evaluate"], times["generate"])))
            batch_ms = [1000 * median(values) * BATCH_SIZE / NUM_CLIPS for values in times.values()]
            size = f"{model.num_parameters() / 1e6:.2f} M"
            rows.append([size, *(f"{value:.0f}" for value in batch_ms), f"{ratios[-1]:.2f}"])
    held = "holds" if ratios[0] <= LIMIT else "does not hold"
    text = f"""# Cost of an evaluation beside the model's answers

{NUM_CLIPS} questions about as many clips of 64 px, batches of {BATCH_SIZE}, {MAX_NEW_TOKENS} new tokens, float32,
{torch.get_num_threads()} threads, {num_rounds} rounds that take turns. The limit for the smallest model, {LIMIT:.2f}, {held}.

{markdown_table(["parameters", "generate, ms a batch", "evaluate, ms a batch", "ratio, median of the rounds"], rows)}

{describe_machine("torch", "transformers")}.
By `python benchmarks/evaluation_overhead.py`.
"""
    write_result("evaluation_overhead", text)
    return 0 if ratios[0] <= LIMIT else 1


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
