"""How the speed programs measure: systems that take turns, each in a process of its own.

A worker builds one system once, and waits. Only one works at a time, so that what else the machine does falls on all of them
alike, and the memory of its process is its own. Times are of whole passes: the wall clock on a CPU, events on CUDA. The first
turn also tells the peak memory above weights and inputs: on a CPU what the kernel recorded as most resident (after what
earlier passes left was given back), on CUDA what torch's allocator handed out. The bytes of tensors alone, which do not move
with the state of the heap, are counted where a setting asks for them.
"""

import argparse
import ctypes
import datetime
import gc
import itertools
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import peers
import torch
from peers import Peer
from report import RESULTS, describe_machine
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

SECONDS = 0.5  # a turn: one pass, and more as long as they took less than this
MAX_PASSES = 50
PRODUCT_SIDE = 4096
# A server imports these once, and each worker begins as a copy of it: no computing thread and no CUDA has begun there. It
# knows installed packages only, not this folder.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.utils.flop_counter",
        *sorted({own.__module__ for own in vars(peers).values() if isinstance(own, type)} - {"peers"}),
    ]
)


class MatrixProductPart(nn.Module):
    """A product of square matrices, which says what the machine can do."""

    def __init__(self, peer: Peer, num_frames: int, frame_px: int):
        super().__init__()
        self.side = frame_px

    def inputs(self, num_frames: int, is_wide: bool, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: torch.randn(self.side, self.side, device=device, dtype=dtype) for name in ("left", "right")}

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right


MATRIX_PRODUCT = Peer("matrix product", "", "", MatrixProductPart, PRODUCT_SIDE, 1, PRODUCT_SIDE, {})


@dataclass(frozen=True)
class Setting:
    """One system and what it is given.

    Attributes:
        frame_px: px a side; None: the system's own.
        is_wide: 16:9 in the place of square frames.
        compile_mode: of `torch.compile`; None: without.
        chunk_batch: Video-Panda's `vision_chunk_batch`.
        warm_up_frames: frames of the pass that comes before all; None: all of them.
        counts_tensors: whether the facts tell the most bytes of tensors that a pass held; one more pass, before the turns.
    """

    peer: Peer
    num_frames: int
    frame_px: int | None = None
    is_wide: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    compile_mode: str | None = None
    chunk_batch: int | None = None
    warm_up_frames: int | None = None
    counts_tensors: bool = False

    def build(self, device: str | None = None) -> tuple[nn.Module, Callable[[int], dict]]:
        """The system, and what makes its inputs for a number of frames."""
        device, dtype = device or self.device, getattr(torch, self.dtype)
        part = self.peer.build(self.num_frames, self.frame_px, device, dtype)
        options = {} if self.chunk_batch is None else {"vision_chunk_batch": self.chunk_batch}
        return part, lambda num_frames: {**part.inputs(num_frames, self.is_wide, device, dtype), **options}


@dataclass
class Facts:
    """What does not depend on the clock: parameters, operations (2 a multiplication and addition), tokens handed over.

    And, where they are counted, the most bytes of tensors that a pass held, weights and inputs not among them.
    """

    num_parameters: int
    num_operations: int
    num_tokens: int
    peak_tensor_bytes: int | None = None


def _count(part: nn.Module, inputs: dict) -> Facts:
    # The counter of torch knows the attention kernels of CUDA only.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {kernel: lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop_count(query, key, value)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        tokens = part(**inputs)
    num_parameters = sum(parameter.numel() for parameter in part.parameters())
    return Facts(num_parameters, counter.get_total_flops(), len(tokens))


def peak_tensor_bytes(part: nn.Module, inputs: dict) -> int:
    """The most bytes that tensors made in a pass held at a time, by what torch's profiler saw handed out and given back."""
    activity = ProfilerActivity.CUDA if next(part.parameters()).is_cuda else ProfilerActivity.CPU
    with torch.no_grad(), profile(activities={ProfilerActivity.CPU, activity}, profile_memory=True) as profiler:
        part(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    device_type = 1 if activity == ProfilerActivity.CUDA else 0
    events.sort(key=lambda event: event["ts"])
    held = itertools.accumulate(
        event["args"]["Bytes"] for event in events if event["args"]["Device Type"] == device_type
    )
    return max(held)


def count(setting: Setting) -> Facts:
    """The facts, without weights where the system's are not needed for that."""
    part, make_inputs = setting.build("meta" if setting.peer.is_counted_on_meta else "cpu")
    return _count(part, make_inputs(setting.num_frames))


# --- in the worker ------------------------------------------------------------------------------------------------------


def _resident() -> dict[str, int] | None:
    """Bytes that are resident, and the most that were; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "VmHWM:")}


def _peak_bytes(run: Callable[[], float], device: str) -> tuple[float, int | None]:
    """Seconds of a pass, and the most memory it took above what there was before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    if _resident() is None:
        return run(), None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes left would be used again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # begin a new VmHWM
    before = _resident()["VmRSS"]
    return run(), _resident()["VmHWM"] - before


def _timer(part: nn.Module, inputs: dict, device: str) -> Callable[[], float]:
    """A function that does one pass and returns its seconds."""

    def on_cpu() -> float:
        start = time.perf_counter()
        part(**inputs)
        return time.perf_counter() - start

    def on_cuda() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        part(**inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return on_cuda if device == "cuda" else on_cpu


def _serve(connection, setting: Setting) -> None:
    """Build, warm up, tell the facts; then a turn for each number of seconds that arrives, until None does."""
    try:
        part, make_inputs = setting.build()
        inputs = make_inputs(setting.num_frames)
        facts = count(setting) if setting.peer.is_counted_on_meta else _count(part, inputs)
        if setting.compile_mode is not None:
            part.compile(mode=setting.compile_mode)
        run = _timer(part, inputs, setting.device)
        if setting.counts_tensors:
            facts.peak_tensor_bytes = peak_tensor_bytes(part, inputs)
        with torch.no_grad():
            part(**(make_inputs(setting.warm_up_frames) if setting.warm_up_frames else inputs))
            if setting.compile_mode is not None:  # CUDA graphs are recorded at the second and third
                run(), run()
            connection.send(facts)
            peak_bytes, is_first = None, True
            while (budget := connection.recv()) is not None:
                seconds = []
                if is_first:
                    first, peak_bytes = _peak_bytes(run, setting.device)
                    seconds, is_first = [first], False
                while not seconds or (sum(seconds) < budget and len(seconds) < MAX_PASSES):
                    seconds.append(run())
                connection.send((seconds, peak_bytes))
    finally:
        connection.send(None)  # whoever waits is told, also after an error


# --- beside it ----------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A system in a process of its own; see `start_workers`."""

    setting: Setting
    connection: object
    facts: Facts | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def receive(self):
        answer = self.connection.recv()
        if answer is None:
            raise RuntimeError(f"{self.setting.peer.name} ended before its time; its traceback stands above")
        return answer

    def take_turn(self, budget: float = SECONDS) -> float:
        """Median seconds of a pass in this turn."""
        self.connection.send(budget)
        seconds, self.peak_bytes = self.receive()
        self.seconds += seconds
        return median(seconds)


@contextmanager
def start_workers(settings: dict[str, Setting]) -> Iterator[dict[str, Worker]]:
    """A worker a setting, built one after the other, by the same names; they end with the block."""
    workers, processes = {}, []
    try:
        for name, setting in settings.items():
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, setting))
            process.daemon = True
            process.start()
            processes.append(process)
            workers[name] = Worker(setting, ours)
            workers[name].facts = workers[name].receive()
        yield workers
    finally:
        for worker in workers.values():
            with suppress(OSError):  # one that failed is gone
                worker.connection.send(None)
        for process in processes:
            process.join(timeout=30)


def ratio(steps: Sequence[dict[str, float]], name: str, other: str) -> float:
    """Median of the ratios of two systems' times, over the steps in which both had a turn."""
    return median(step[name] / step[other] for step in steps if name in step and other in step)


def milliseconds(steps: Sequence[dict[str, float]], name: str) -> float:
    return 1000 * median(step[name] for step in steps if name in step)


def mib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def number(value: float) -> str:
    """Four digits at least, and no exponent."""
    return f"{value:.4g}" if 1e-3 < abs(value) < 1e4 else f"{value:.0f}"


def make_parser(text: str) -> argparse.ArgumentParser:
    """The options that all programs have; `text`: what the program says about itself."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: both, on CUDA bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="how often all take their turn")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, nothing is kept: does it run?")
    parser.add_argument("--output", type=Path, help="folder for the results (benchmarks/results)")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with the defaults that depend on each other; `peer` gives a system at the size that is asked for."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    options.dtype = options.dtype or (["bfloat16"] if options.device == "cuda" else ["float32", "bfloat16"])
    options.peer = Peer.tiny if options.quick else lambda peer: peer
    options.product = replace(MATRIX_PRODUCT, frame_px=64) if options.quick else MATRIX_PRODUCT
    options.rounds = 1 if options.quick else options.rounds
    options.seconds = 0 if options.quick else SECONDS
    options.output = options.output or (None if options.quick else RESULTS)
    return options


def machine(device: str) -> str:
    """What all was measured on."""
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if device == "cuda" else ""
    return f"{gpu}{describe_machine('torch', 'transformers')}, {torch.get_num_threads()} threads"


def write_results(options: argparse.Namespace, name: str, found: dict, text: str) -> None:
    """Print the page; keep it and the numbers as `NAME.md` and `NAME.json`, on CUDA `NAME_cuda`."""
    print(text)
    if options.output is None:
        return
    name = f"{name}_cuda" if options.device == "cuda" else name
    found = {"date": str(datetime.date.today()), "machine": machine(options.device), **found}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.output / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
