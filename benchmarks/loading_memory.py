"""Peak memory of `from_pretrained`, against the size of the weights in the requested dtype.

    python benchmarks/loading_memory.py

Writes a wide model of four layers with random weights (1.1 GiB in float32, several shards) into a temporary folder and
loads it once a case, each in a fresh process. Linux only: memory is read from /proc/self/status.

Two figures, which must not be confused. *Anonymous* memory (RssAnon + RssShmem) belongs to the process; it can only be
swapped out, and is what a second copy of the weights would show in. *Resident* memory (VmRSS) also counts the pages of the
checkpoint file that are mapped: the kernel drops those whenever memory is short, since they can be read again. Both are
given above the baseline, which is taken after all imports and after a tiny model was loaded.
"""

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from report import describe_machine, markdown_table, write_result

LIMIT = 1.1
SAMPLE_EVERY = 0.001  # seconds
# (dtype of the checkpoint, dtype asked for, what else is given to from_pretrained)
CASES = [
    ("float32", "float32", {}),
    ("bfloat16", "bfloat16", {}),
    ("float32", "bfloat16", {}),
    ("bfloat16", "float32", {}),
    ("float32", "bfloat16", {"device_map": "cpu"}),
]
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "wide": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16},
}


def resident_kib() -> dict[str, int]:
    """Anonymous and all resident memory of this process, and the most that was ever resident."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kib = {name: int(status[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem", "VmRSS")}
    return {"anonymous": kib["RssAnon"] + kib["RssShmem"], "resident": kib["VmRSS"]}


class PeakMemory:
    """Samples `resident_kib` in a thread; `peak` holds the largest values seen inside the `with` block."""

    def __enter__(self):
        self.peak = resident_kib()
        self.is_done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self):
        while not self.is_done.wait(SAMPLE_EVERY):
            self._note()

    def _note(self):
        self.peak = {name: max(value, self.peak[name]) for name, value in resident_kib().items()}

    def __exit__(self, *exception):
        self.is_done.set()
        self.thread.join()
        self._note()


def build(folder: Path) -> None:
    """Write both sizes in both dtypes."""
    import torch
    from transformers import LlamaConfig

    from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration

    for size, text in SIZES.items():
        vision = {"hidden_size": 1024 if size == "wide" else 32}
        config = VideoPandaConfig.from_text_config(LlamaConfig(vocab_size=8000, **text), vision_config=vision)
        model = VideoPandaForConditionalGeneration(config)
        for dtype in ("float32", "bfloat16"):
            model.to(getattr(torch, dtype)).save_pretrained(folder / size / dtype, max_shard_size="200MB")


def measure(folder: Path, stored: str, wanted: str, options: dict) -> dict:
    """Load one checkpoint in this process.

    Returns:
        Bytes of the weights, and KiB above the baseline at the peak of loading and after every weight was read once.
    """
    import torch

    from video_panda import VideoPandaForConditionalGeneration

    options = {"dtype": getattr(torch, wanted), **options}
    VideoPandaForConditionalGeneration.from_pretrained(folder / "tiny" / stored, **options)  # the rest of the imports
    before, high_before = resident_kib(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = VideoPandaForConditionalGeneration.from_pretrained(folder / "wide" / stored, **options)
        seconds = time.perf_counter() - start
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    for tensor in state:
        tensor.flatten()[:: 1024 // tensor.element_size()].sum()  # one value a page and more: all pages are resident
    after = resident_kib()
    return {
        "weights": sum(tensor.nbytes for tensor in state),
        "peak": {name: memory.peak[name] - before[name] for name in before},
        "after": {name: after[name] - before[name] for name in before},
        "ru_maxrss": max(high - high_before, 0),
        "seconds": seconds,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "build", folder], check=True, stderr=subprocess.DEVNULL)
        shards = len(list(Path(folder, "wide", "float32").glob("*.safetensors")))
        found = []
        for case in CASES:
            command = [sys.executable, __file__, "measure", folder, json.dumps(case)]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found.append(json.loads(process.stdout.splitlines()[-1]))
    rows = []
    for (stored, wanted, options), got in zip(CASES, found):
        weights = got["weights"] / 1024
        label = f"{stored} → {wanted}" + "".join(f", {name}={value!r}" for name, value in options.items())
        kib = [got["peak"]["anonymous"], got["peak"]["resident"], got["ru_maxrss"]]
        kib += [got["after"]["anonymous"], got["after"]["resident"]]
        ratios = [f"{value / weights:.2f}" for value in kib]
        ratios[0] = f"**{ratios[0]}**"
        rows.append([label, f"{weights / 1024:.0f}", *ratios, f"{got['seconds']:.1f}"])
    header = ["checkpoint → requested", "weights, MiB", "peak anonymous", "peak resident", "ru_maxrss"]
    header += ["anonymous after use", "resident after use", "loading, s"]
    worst = max(got["peak"]["anonymous"] * 1024 / got["weights"] for got in found)
    notes = __doc__.split("\n\n", 3)[3].strip()
    text = f"""# Peak memory of loading

Ratios to the size of the weights in the requested dtype; {shards} shards in float32. Limit: {LIMIT} for anonymous memory;
the worst case here is {worst:.2f}. `ru_maxrss` is what the kernel itself recorded as the most resident memory, above its value
before. "After use": once every page of every weight was read.

{markdown_table(header, rows)}

{notes}

{describe_machine("torch", "transformers", "safetensors", "accelerate")}.
By `python benchmarks/loading_memory.py`.
"""
    write_result("loading_memory", text)
    return int(worst > LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), *json.loads(sys.argv[3]))))
    else:
        sys.exit(main())
