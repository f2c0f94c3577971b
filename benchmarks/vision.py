"""The vision part of Video-Panda against those of its peers, at the same frames.

    python benchmarks/vision.py [--device cuda] [--dtype float32 bfloat16] [--peers Video-LLaVA ...] [--compile off default]

All have random weights at the sizes of published checkpoints (`benchmarks/peers.py`) and get normalised pixels; a pass goes
from there to the tokens that the language model is given. The machine's rate is that of a product of two 4096 x 4096
matrices in the same precision; the floor of a system is its operations, as torch counts them, at that rate. The product
and Video-Panda have their turn right before each of the others, and ratios are medians over those pairs. Peak memory comes on
top of weights and pixels.
"""

import sys
from statistics import median

from measure import (
    Setting,
    count,
    machine,
    make_parser,
    mib,
    milliseconds,
    number,
    parse,
    ratio,
    start_workers,
    write_results,
)
from peers import PEERS
from report import RESULTS, markdown_table

NUM_FRAMES = 8
PRODUCT, PANDA, WIDE = "matrix product", PEERS[0].name, f"{PEERS[0].name}, 16:9"
LANGUAGE_BIND = "Video-LLaVA"
MAX_OVER_FLOOR = {"float32": 1.20, "bfloat16": 1.5}
MIN_TIMES_FASTER = {"cpu": 12, "cuda": 4}
MAX_CUDA_MS = 41
HEADER = [
    "system",
    "parameters, M",
    "GFLOP",
    "ms",
    "ms / Video-Panda's",
    "tokens to the LLM",
    "peak memory, MiB",
    "ms / floor",
]


def settings_of(options, dtype: str) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """Those that have a turn before each of the others, and the others; with `torch.compile`, all but the product again."""
    common = {"num_frames": NUM_FRAMES, "dtype": dtype, "device": options.device}
    light = {PRODUCT: Setting(options.product, **common)}
    others = {}
    for mode in options.compile:
        suffix = "" if mode == "off" else f", compiled ({mode})"
        own = {**common, "compile_mode": None if mode == "off" else mode}
        light[PANDA + suffix] = Setting(options.peer(PEERS[0]), **own)
        light[WIDE + suffix] = Setting(options.peer(PEERS[0]), is_wide=True, **own)
        for peer in PEERS[1:]:
            if peer.name in options.peers:
                # Seconds a pass on a CPU, where a quarter of the frames warms up as well; compiled code is for one shape.
                few = NUM_FRAMES // 4 if options.device == "cpu" and mode == "off" else None
                others[peer.name + suffix] = Setting(options.peer(peer), warm_up_frames=few, **own)
    return light, others


def measure(options, dtype: str) -> dict:
    """What was found in one precision: a dict for each system, the product's rate, and the steps they were taken in."""
    light, others = settings_of(options, dtype)
    steps = []
    with start_workers({**light, **others}) as workers:
        for _ in range(options.rounds):
            for other in others or [None]:
                names = [*light, *([] if other is None else [other])]
                steps.append({name: workers[name].take_turn(options.seconds) for name in names})
                print(dtype, {name: f"{1000 * seconds:.0f} ms" for name, seconds in steps[-1].items()}, file=sys.stderr)
        product_operations = workers[PRODUCT].facts.num_operations
        systems = {}
        for name, worker in workers.items():
            if name == PRODUCT:
                continue
            facts = worker.facts
            systems[name] = {
                "parameters": facts.num_parameters,
                "operations": facts.num_operations,
                "milliseconds": milliseconds(steps, name),
                "times_video_panda": ratio(steps, name, PANDA if PANDA in light else next(iter([*light][1:]))),
                "tokens": facts.num_tokens,
                "peak_bytes": worker.peak_bytes,
                "over_floor": ratio(steps, name, PRODUCT) * product_operations / facts.num_operations,
            }
    rate = product_operations / median(step[PRODUCT] for step in steps)
    return {"product_flops": rate, "systems": systems, "steps": steps}


def check(options, found: dict) -> list[tuple[str, float, float, bool]]:
    """Each target: what, limit, found, and whether it holds; for compiled systems too, where there are any."""
    targets = []
    for dtype, own in found.items():
        for name, system in own["systems"].items():
            if name.startswith(PANDA) and options.device == "cpu":
                over, limit = system["over_floor"], MAX_OVER_FLOOR[dtype]
                targets.append((f"{dtype}: {name}, ms / floor, at most", limit, over, over <= limit))
            if name.startswith(PANDA) and options.device == "cuda" and not name.startswith(WIDE):
                ms = system["milliseconds"]
                targets.append((f"{dtype}: {name}, ms, at most", MAX_CUDA_MS, ms, ms <= MAX_CUDA_MS))
            if name.startswith(LANGUAGE_BIND):
                times, limit = system["times_video_panda"], MIN_TIMES_FASTER[options.device]
                targets.append((f"{dtype}: ms of {name} / Video-Panda's, at least", limit, times, times >= limit))
    return targets


def rows_of(own: dict) -> list[list[str]]:
    return [
        [
            name,
            f"{system['parameters'] / 1e6:.2f}",
            number(system["operations"] / 1e9),
            number(system["milliseconds"]),
            f"{system['times_video_panda']:.2f}",
            str(system["tokens"]),
            mib(system["peak_bytes"]),
            f"{system['over_floor']:.2f}",
        ]
        for name, system in own["systems"].items()
    ]


def describe_wide(options) -> str:
    """What 16:9 frames change for the peers; counted."""
    changes = []
    for peer in PEERS[1:]:
        if peer.name in options.peers:
            square, wide = (
                count(Setting(options.peer(peer), NUM_FRAMES, is_wide=is_wide)) for is_wide in (False, True)
            )
            if wide != square:
                changes.append(
                    f"{peer.name} takes {number(wide.num_operations / 1e9)} GFLOP for {wide.num_tokens} tokens"
                )
    return "; ".join([*changes, "the others make a square of any frame"])


def write_page(options, found: dict, targets: list) -> str:
    tables = [
        f"## {dtype}\n\nThe matrix product ran at {own['product_flops'] / 1e9:.0f} GFLOP/s. Rounds: {options.rounds}.\n\n"
        + markdown_table(HEADER, rows_of(own))
        for dtype, own in found.items()
    ]
    peers = [
        f"- **{peer.name}**, as `{peer.checkpoint}`, frames of {peer.frame_px} px: {peer.what}."
        for peer in PEERS
        if peer.name in (PANDA, *options.peers)
    ]
    held = [[what, f"{limit:g}", f"{value:.2f}", "yes" if holds else "**no**"] for what, limit, value, holds in targets]
    cuda = RESULTS / "vision_cuda.md"
    elsewhere = (
        "On CUDA: [vision_cuda.md](vision_cuda.md)."
        if cuda.exists()
        else "The CUDA column is not measured yet: no GPU was at hand."
    )
    return f"""# The vision part, against its peers

{NUM_FRAMES} frames, from normalised pixels to the tokens that the language model is given, one video at a time, on {options.device}.
{elsewhere if options.device == "cpu" else ""}

{(chr(10) * 2).join(tables)}

At 16:9 {describe_wide(options)}.

## Targets

{markdown_table(["target", "limit", "found", "holds"], held)}

The paper gives 41 ms for Video-Panda, 125 for Video-LLaVA and 171 for Video-ChatGPT, on a GPU.

## What they are

{chr(10).join(peers)}

Towers run all their layers, as the published code does, also where the last one's result is not used. Weights are random.

## How

{__doc__.split(chr(10) * 2, 2)[2].strip()}

{machine(options.device)}.
By `python benchmarks/vision.py`.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    names = [peer.name for peer in PEERS[1:]]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="default: all")
    modes = ("off", "default", "reduce-overhead")
    parser.add_argument(
        "--compile", nargs="+", choices=modes, help="default: off, on CUDA also default (reduce-overhead: CUDA graphs)"
    )
    options = parse(parser, arguments)
    options.compile = options.compile or (["off", "default"] if options.device == "cuda" else ["off"])
    found = {dtype: measure(options, dtype) for dtype in options.dtype}
    targets = check(options, found)
    write_results(options, "vision", {"found": found}, write_page(options, found, targets))
    return 0 if options.quick else int(not all(holds for *_, holds in targets))


if __name__ == "__main__":
    sys.exit(main())
