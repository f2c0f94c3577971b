"""A whole request, from the file to the answer, and what each of its parts costs.

    python benchmarks/pipeline.py [--device cuda] [--rounds 5]

- **Preprocessing**: 8 decoded frames to pixels, against the way over PIL (each frame by itself: bicubic resize, paste, to a
  tensor, normalise), and to uint8 canvases, which the model normalises where it runs.
- **Decoding**: the 8 frames of a clip that the processor chooses, against all of its frames converted to RGB.
- **Request**: STAB of the published size before a Llama of 24 layers of width 512, random weights, one clip. The first token and
  the further ones against those of the bare language model on a prompt of the same length, the vision part added.
- **Start**: the import, in processes of its own, and loading that model from the page cache.

What is compared takes turns, after a round that warms up; ratios are medians of those of the rounds.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from import_time import PROGRAMS, seconds_of
from measure import machine, make_parser, parse, write_results
from PIL import Image
from report import markdown_table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import initialization as init

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from clips import write_clip
from model_inputs import visual_ids

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaVideoProcessor
from video_panda.processing.geometry_video_panda import canvas_offset, token_grid

NUM_FRAMES, NUM_TEXT_TOKENS = 8, 50
SOURCES = {"1280 x 720": (1280, 720), "640 x 360": (640, 360), "480 x 480": (480, 480)}
CLIP = {"num_frames": 250, "fps": 25, "width": 640, "height": 360}
TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24, "num_attention_heads": 8}
QUICK_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK_VISION = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 112}
MIN_TIMES_PIL, MAX_FLOAT_CANVASES, MAX_OVER_BARE, MAX_IMPORT_S = 3.0, 2.0, 1.05, 0.3
IMPORTS = ("transformers", "transformers, video_panda", "a model", "a model, video_panda")


def take_turns(ways: dict[str, Callable], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round; a round before them warms up."""
    seconds = {name: [] for name in ways}
    for _ in range(num_rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: own[1:] for name, own in seconds.items()}


def ratio(numerators: list[float], denominators: list[float]) -> float:
    return median(above / below for above, below in zip(numerators, denominators))


# --- preprocessing and decoding -----------------------------------------------------------------------------------------


def over_pil(frames_THWC: np.ndarray, processor: VideoPandaVideoProcessor) -> torch.Tensor:
    """What a straightforward preprocessing does: (T, 3, S, S) float32."""
    token_px = processor.patch_size * processor.downsample_window
    side = processor.image_size // token_px
    mean, std = (torch.tensor(own)[:, None, None] for own in (processor.image_mean, processor.image_std))
    background = tuple(int(255 * own) for own in processor.image_mean)
    h, w = token_grid(frames_THWC.shape[2], frames_THWC.shape[1], side)
    top, left = canvas_offset(h, w, side)
    pixels = []
    for frame in frames_THWC:
        canvas = Image.new("RGB", (processor.image_size, processor.image_size), background)
        picture = Image.fromarray(frame).resize((w * token_px, h * token_px), Image.Resampling.BICUBIC)
        canvas.paste(picture, (left * token_px, top * token_px))
        pixels.append((torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255 - mean) / std)
    return torch.stack(pixels)


def measure_preprocessing(processor: VideoPandaVideoProcessor, num_rounds: int, sources: dict) -> dict[str, dict]:
    """For each size of the source: seconds, the difference to PIL's pixels, and the peak in copies of the float canvases."""
    from distillation_memory import peak_bytes

    found = {}
    for name, (width, height) in sources.items():
        # Smooth pictures with edges, as frames are; noise is no harder to resize.
        waves = np.add.outer(np.arange(height), np.arange(width)) % 256
        frames_THWC = np.stack(
            [np.stack([np.roll(waves, 9 * t + 5 * c) for c in range(3)], -1) for t in range(NUM_FRAMES)]
        )
        frames_THWC = frames_THWC.astype(np.uint8)
        as_tensor = torch.from_numpy(frames_THWC)
        ways = {
            "PIL": lambda frames=frames_THWC: over_pil(frames, processor),
            "float32": lambda frames=as_tensor: processor.preprocess(frames)["pixel_values_videos"][0],
            "uint8": lambda frames=as_tensor: processor.preprocess(frames, do_rescale=False, do_normalize=False),
        }
        std = torch.tensor(processor.image_std)[:, None, None]
        levels = ((ways["float32"]() - ways["PIL"]()) * std * 255).abs()
        canvas_bytes = levels.numel() * levels.element_size()
        found[name] = {
            "seconds": take_turns(ways, num_rounds),
            "most_levels_apart": float(levels.max()),
            "float_canvases": peak_bytes(ways["float32"]) / canvas_bytes,
        }
    return found


def all_frames(path: Path) -> np.ndarray:
    """Every frame of a clip, converted to RGB."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# --- the request --------------------------------------------------------------------------------------------------------


class TokenTimes:
    """A streamer that notes when each token came; the prompt comes first."""

    def __init__(self):
        self.times = []

    def put(self, token_ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the ids were brought from the device: they are there

    def end(self) -> None:
        pass


def build_models(options) -> tuple[VideoPandaForConditionalGeneration, LlamaForCausalLM]:
    """Video-Panda, and the language model inside as a model of its own."""
    text = LlamaConfig(vocab_size=300 if options.quick else 32000, **(QUICK_TEXT if options.quick else TEXT))
    config = VideoPandaConfig.from_text_config(text, vision_config=QUICK_VISION if options.quick else {})
    with init.no_init_weights():
        model = VideoPandaForConditionalGeneration(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model = model.to(options.device, getattr(torch, options.dtype[0])).eval()
    with torch.device("meta"):
        bare = LlamaForCausalLM(model.config.text_config)
    bare.model, bare.lm_head = model.model.language_model, model.lm_head
    for own in (model, bare.eval()):
        own.generation_config.eos_token_id = None  # every answer takes all its tokens
        own.generation_config.pad_token_id = 0
    return model, bare


def timed_answer(model, num_tokens: int, inputs: dict) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    streamer, start = TokenTimes(), time.perf_counter()
    model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, streamer=streamer)
    _, first, *_, last = streamer.times
    return first - start, (last - first) / (num_tokens - 1)


def measure_request(options, processor: VideoPandaVideoProcessor, clip: Path) -> dict[str, list[float]]:
    """Seconds of each part of a request, round by round; the first warms up."""
    model, bare = build_models(options)
    num_tokens, dtype = 4 if options.quick else 32, getattr(torch, options.dtype[0])

    def prepare(frames_THWC) -> dict:
        inputs = processor.preprocess(frames_THWC, do_sample_frames=False)
        return {
            "pixel_values_videos": inputs["pixel_values_videos"].to(options.device, dtype),
            "video_grid_thw": inputs["video_grid_thw"],
        }

    def synchronised(way: Callable):
        start = time.perf_counter()
        result = way()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):
        now = {}
        now["decode"], (frames_THWC, _) = synchronised(lambda: processor.fetch_videos(clip))
        now["every frame to RGB"], _ = synchronised(lambda: all_frames(clip))
        now["preprocess"], video = synchronised(lambda frames=frames_THWC: prepare(frames))
        with torch.no_grad():
            now["vision"], _ = synchronised(lambda own=video: model.get_video_features(**own))
        ids = [1, *range(5, 4 + NUM_TEXT_TOKENS), *visual_ids(model.config, *video["video_grid_thw"][0].tolist())]
        input_ids = torch.tensor([ids], device=options.device)
        now["bare first"], now["bare token"] = timed_answer(bare, num_tokens, {"input_ids": input_ids.clamp(max=100)})
        now["whole first"], now["whole token"] = timed_answer(model, num_tokens, {"input_ids": input_ids, **video})
        for name, own in now.items():
            seconds.setdefault(name, []).append(own)
    found = {name: own[1:] for name, own in seconds.items()}
    found["prompt tokens"] = len(ids)
    found["loading"] = measure_loading(model, bare, options)
    return found


def measure_loading(model, bare, options) -> dict:
    """Seconds to load the model and the bare language model, and MiB of their weights."""
    with tempfile.TemporaryDirectory() as folder:
        ways, mib = {}, {}
        for name, own in (("Video-Panda", model), ("LLM alone", bare)):
            own.save_pretrained(Path(folder, name))
            load = type(own).from_pretrained
            ways[name] = lambda load=load, path=Path(folder, name): load(path, dtype=options.dtype[0])
            mib[name] = sum(file.stat().st_size for file in Path(folder, name).glob("*.safetensors")) / 2**20
        return {"seconds": take_turns(ways, options.rounds), "mib": mib}


# --- the page -----------------------------------------------------------------------------------------------------------


def check(found: dict) -> list[tuple[str, float, float, bool]]:
    """Each target: what, limit, found, and whether it holds."""
    targets = []
    for name, own in found["preprocessing"].items():
        times = ratio(own["seconds"]["PIL"], own["seconds"]["float32"])
        targets.append(
            (f"{name}: the PIL route / preprocessing, at least", MIN_TIMES_PIL, times, times >= MIN_TIMES_PIL)
        )
        copies = own["float_canvases"]
        targets.append(
            (
                f"{name}: peak in float copies of the canvases, below",
                MAX_FLOAT_CANVASES,
                copies,
                copies < MAX_FLOAT_CANVASES,
            )
        )
    request = found["request"]
    floor = [sum(pair) for pair in zip(request["bare first"], request["vision"])]
    for what, value in (
        ("time to first token / (bare LLM + vision part), at most", ratio(request["whole first"], floor)),
        ("time a further token / bare LLM's, at most", ratio(request["whole token"], request["bare token"])),
    ):
        targets.append((what, MAX_OVER_BARE, value, value <= MAX_OVER_BARE))
    extra = median(b - a for a, b in zip(found["import"]["transformers"], found["import"]["transformers, video_panda"]))
    targets.append(
        ("`import video_panda` on top of `import transformers`, s, at most", MAX_IMPORT_S, extra, extra <= MAX_IMPORT_S)
    )
    return targets


def preprocessing_table(found: dict) -> str:
    rows = []
    for name, own in found["preprocessing"].items():
        times = own["seconds"]
        ms = [f"{1000 * median(times[way]):.1f}" for way in ("PIL", "float32", "uint8")]
        ratios = [f"{ratio(times['PIL'], times[way]):.2f}" for way in ("float32", "uint8")]
        rows.append([name, *ms, *ratios, f"{own['most_levels_apart']:.2f}", f"{own['float_canvases']:.2f}"])
    return markdown_table(
        [
            "source, px",
            "PIL, ms",
            "float32, ms",
            "uint8, ms",
            "PIL / float32",
            "PIL / uint8",
            "levels (of 255) apart, most",
            "peak, float copies",
        ],
        rows,
    )


def write_page(options, found: dict, targets: list) -> str:
    request = found["request"]
    ms = {name: f"{1000 * median(own):.1f}" for name, own in request.items() if isinstance(own, list)}
    stages = [
        ["decode: the frames chosen", ms["decode"]],
        ["(every frame to RGB)", ms["every frame to RGB"]],
        ["preprocess", ms["preprocess"]],
        ["vision part", ms["vision"]],
        ["first token: bare LLM", ms["bare first"]],
        ["first token: Video-Panda, vision part included", ms["whole first"]],
        ["a further token: bare LLM", ms["bare token"]],
        ["a further token: Video-Panda", ms["whole token"]],
    ]
    total = median(map(sum, zip(*(request[name] for name in ("decode", "preprocess", "whole first")))))
    loading = request["loading"]
    start = [[f"`{PROGRAMS[name]}`", f"{median(own):.2f}"] for name, own in found["import"].items()]
    start += [
        [f"loading {name}, {loading['mib'][name]:.0f} MiB", f"{median(own):.2f}"]
        for name, own in loading["seconds"].items()
    ]
    held = [[what, f"{limit:g}", f"{value:.2f}", "yes" if holds else "**no**"] for what, limit, value, holds in targets]
    return f"""# A request, part by part

Rounds: {options.rounds}, of preprocessing four times as many; on {options.device}, {options.dtype[0]}.

## Preprocessing, {NUM_FRAMES} frames

{preprocessing_table(found)}

## Request

A clip of {CLIP["num_frames"]} frames, {CLIP["width"]} x {CLIP["height"]} px; a prompt of {request["prompt tokens"]} tokens. From the file to the first token: {1000 * total:.0f} ms;
then {1 / median(request["whole token"]):.1f} tokens a second, the bare language model {1 / median(request["bare token"]):.1f}.

{markdown_table(["part", "ms"], stages)}

## Start

{markdown_table(["what", "s"], start)}

## Targets

{markdown_table(["target", "limit", "found", "holds"], held)}

## How

{__doc__.split(chr(10) * 2, 2)[2].strip()}

{machine(options.device)}.
By `python benchmarks/pipeline.py`.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.set_defaults(rounds=5)
    options = parse(parser, arguments)
    sizes = {"image_size": QUICK_VISION["image_size"]} if options.quick else {}
    processor = VideoPandaVideoProcessor(**sizes)
    sources = {"128 x 72": (128, 72)} if options.quick else SOURCES
    num_rounds = 1 if options.quick else 4 * options.rounds
    found = {"preprocessing": measure_preprocessing(processor, num_rounds, sources)}
    with tempfile.TemporaryDirectory() as folder:
        clip = write_clip(Path(folder, "clip.mp4"), **({"num_frames": 30} if options.quick else CLIP))
        found["request"] = measure_request(options, processor, clip)
    imports = {name: [] for name in IMPORTS[: 2 if options.quick else None]}
    for _ in range(options.rounds):
        for name, own in imports.items():
            own.append(seconds_of(PROGRAMS[name]))
    found["import"] = imports
    targets = check(found)
    write_results(options, "pipeline", found, write_page(options, found, targets))
    return 0 if options.quick else int(not all(holds for *_, holds in targets))


if __name__ == "__main__":
    sys.exit(main())
