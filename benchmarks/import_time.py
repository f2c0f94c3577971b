"""What importing this package costs on top of transformers: fresh processes, interleaved, medians.

python benchmarks/import_time.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import tempfile
import time

from report import describe_machine, markdown_table, write_result

LIMIT = 0.3  # seconds, for `import video_panda` on top of `import transformers`
PROGRAMS = {
    "nothing": "pass",
    "transformers": "import transformers",
    "transformers, video_panda": "import transformers, video_panda",
    "AutoModelForCausalLM": "from transformers import AutoModelForCausalLM",
    "AutoModelForCausalLM, video_panda": "from transformers import AutoModelForCausalLM; import video_panda",
    "a model": "from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM",
    "a model, video_panda": "from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM; import video_panda",
}
PAIRS = [(name, f"{name}, video_panda") for name in ("transformers", "AutoModelForCausalLM", "a model")]


def seconds_of(program: str) -> float:
    start = time.perf_counter()
    # Elsewhere than here: Python puts the working folder on its path.
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    return time.perf_counter() - start


def main(num_rounds: int) -> int:
    times = {name: [] for name in PROGRAMS}
    for _ in range(num_rounds + 1):
        for name, program in PROGRAMS.items():
            times[name].append(seconds_of(program))
    times = {name: values[1:] for name, values in times.items()}  # the first round reads the files from disk
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = [[f"`{PROGRAMS[name]}`", f"{median[name]:.3f}", f"{min(times[name]):.3f}"] for name in PROGRAMS]
    pairs = []
    for without, with_package in PAIRS:
        extra = statistics.median(b - a for a, b in zip(times[without], times[with_package]))
        ratio = median[with_package] / median[without]
        least = min(times[with_package]) - min(times[without])
        pairs.append([f"`{PROGRAMS[with_package]}`", f"{extra:+.3f}", f"{least:+.3f}", f"{ratio:.2f}"])
    text = f"""# Cost of the import

A whole process, start and end included, {num_rounds} interleaved rounds. The limit is {LIMIT} s on top of `import transformers`.
Where an Auto class is imported too, Video-Panda's classes are registered there, so its modules are imported then, and with
them those parts of transformers that whoever loads a model needs anyway: the last pair.

{markdown_table(["process", "median, s", "minimum, s"], rows)}

{markdown_table(["against the same without the package", "median difference, s", "difference of minima, s", "ratio of medians"], pairs)}

{describe_machine("torch", "transformers")}.
By `python benchmarks/import_time.py`.
"""
    write_result("import_time", text)
    return int(median["transformers, video_panda"] - median["transformers"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9))
