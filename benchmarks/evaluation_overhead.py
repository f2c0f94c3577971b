"""What `evaluate` costs on top of `generate`: decoding, processing, files and scores, which run beside and after the model.

    python benchmarks/evaluation_overhead.py [ROUNDS]

Models with random weights, from tiny to small, batches of 8 questions, one clip each. Two ways take turns over the same
questions:

- *generate*: `model.generate` alone, on inputs that lie ready in memory;
- *evaluate*: the whole of `evaluate` into an empty folder, clips decoded from mp4 files.

The smaller the model, the harder the comparison: decoding a clip takes as long whatever the model. The batches are prepared in
processes of their own, which need a core: each size is measured with a core left to them, and with a thread of the model on
every core, where the two works add up.
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
from video_panda.evaluation.preparing import Preparation
from video_panda.evaluation.runner import PROMPT

LIMIT = 1.10
BATCH_SIZE, MAX_NEW_TOKENS = 8, 32

# Width and layers of the language model, and how many clips it is asked about: a smallest part of a benchmark's 8,000 and more,
# but so many that starting the processes, a twentieth of a second, is not what is measured.
SIZES = ((48, 2, 1920), (256, 4, 320), (512, 8, 80))


def compare(model, processor, benchmark: ShapesQA, folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds a batch, of each way and round."""
    questions = benchmark.questions
    preparation = Preparation(processor, benchmark, {}, PROMPT)
    batches = [questions[start : start + BATCH_SIZE] for start in range(0, len(questions), BATCH_SIZE)]
    inputs = [preparation.prepare(batch).inputs for batch in batches]
    times: dict[str, list[float]] = {"generate": [], "evaluate": []}
    for number in range(num_rounds + 1):
        begin = time.perf_counter()
        for batch in inputs:
            model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        times["generate"].append(1000 * (time.perf_counter() - begin) / len(batches))
        begin = time.perf_counter()
        options = {"batch_size": BATCH_SIZE, "max_new_tokens": MAX_NEW_TOKENS, "show_progress": False}
        evaluate(model, benchmark, processor, output_dir=folder / f"run-{number}", **options)
        times["evaluate"].append(1000 * (time.perf_counter() - begin) / len(batches))
    return {way: values[1:] for way, values in times.items()}  # the first round warms up


def main(num_rounds: int) -> int:
    """Measure each size with fewer threads and with all, and keep the page; 1 where the limit does not hold."""
    processor = tiny_processor()
    all_threads = torch.get_num_threads()
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        for width, num_layers, num_clips in SIZES:
            benchmark = ShapesQA(Path(name, "clips"), "validation", num_clips, kinds="colour", families="single")
            benchmark.prepare(num_workers=2)
            text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": num_layers}
            model = tiny_model(tiny_config(processor.video_token_id, text=text))
            model.generation_config.eos_token_id = None  # every answer takes all its tokens
            for num_threads in sorted({max(1, all_threads - 1), all_threads}):
                torch.set_num_threads(num_threads)
                times = compare(model, processor, benchmark, Path(name, f"{width}-{num_threads}"), num_rounds)
                ratios.append(median(whole / alone for whole, alone in zip(times["evaluate"], times["generate"])))
                size = f"{model.num_parameters() / 1e6:.2f} M"
                cells = [f"{median(values):.0f}" for values in times.values()]
                print(size, num_threads, cells, f"{ratios[-1]:.3f}", file=sys.stderr)
                rows.append([size, str(num_threads), *cells, f"{ratios[-1]:.2f}"])
    held = "holds" if ratios[0] <= LIMIT else "does not hold"
    header = ["parameters", "threads", "generate, ms a batch", "evaluate, ms a batch", "ratio, median of the rounds"]
    text = f"""# Cost of an evaluation beside the model's answers

{", ".join(str(num_clips) for *_, num_clips in SIZES)} questions about as many clips of 64 px, batches of {BATCH_SIZE},
{MAX_NEW_TOKENS} new tokens, float32, {num_rounds} rounds that take turns. Batches are prepared in processes of their own. Where
the model leaves them a core, the limit for the smallest model, {LIMIT:.2f}, {held}; where it has a thread on each, its threads
wait for one another while a batch is prepared, and the two works add up.

{markdown_table(header, rows)}

{describe_machine("torch", "transformers")}.
By `python benchmarks/evaluation_overhead.py`.
"""
    write_result("evaluation_overhead", text)
    return 0 if ratios[0] <= LIMIT else 1


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
