"""How the cost of the vision part grows with frames and with resolution.

    python benchmarks/scaling.py [--device cuda] [--dtype float32 bfloat16] [--rounds 3]

Video-Panda at 8 to 128 square frames of its own size, and 8 frames of 224, 448 and 672 px; all take turns. Limit: a frame
of the longest video costs within 10 % of what a frame of the shortest does (median of the rounds). Of the peers only the
operations are counted, at the nearest size below that their patches allow; `benchmarks/vision.py` measures them.
"""

import sys
from itertools import chain
from pathlib import Path
from statistics import median

from measure import Setting, count, machine, make_parser, milliseconds, number, parse, start_workers, write_results
from peers import PEERS, VIDEO_PANDA
from report import markdown_table

FRAMES = (8, 16, 32, 64, 128)
SIZES_PX = (224, 448, 672)
TOLERANCE = 0.10
MARKERS, DASHES = "osD^v", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def points_of(options) -> dict[str, list[tuple[int, int]]]:
    """What is measured: (frames, px), by what grows."""
    peer = options.peer(VIDEO_PANDA)
    frames, sizes = ((2, 4), (56, 112)) if options.quick else (FRAMES, SIZES_PX)
    return {
        "frames": [(num_frames, peer.frame_px) for num_frames in frames],
        "resolution": [(frames[0], frame_px) for frame_px in sizes],
    }


def measure(options, points: dict) -> dict:
    """Milliseconds of each (dtype, frames, px); and of each round, the cost of a frame of the longest over the shortest."""
    (shortest, px), (longest, _) = points["frames"][0], points["frames"][-1]
    found = {"milliseconds": {}, "growth": {}}
    for dtype in options.dtype:
        common = {"dtype": dtype, "device": options.device}
        settings = {
            point: Setting(options.peer(VIDEO_PANDA), *point, **common)
            for point in dict.fromkeys(chain.from_iterable(points.values()))
        }
        steps = []
        with start_workers(settings) as workers:
            for _ in range(options.rounds):
                steps.append({point: worker.take_turn(options.seconds) for point, worker in workers.items()})
                print(dtype, {point: f"{1000 * own:.0f} ms" for point, own in steps[-1].items()}, file=sys.stderr)
        found["milliseconds"].update({(dtype, *point): milliseconds(steps, point) for point in settings})
        found["growth"][dtype] = [step[longest, px] / longest / (step[shortest, px] / shortest) for step in steps]
    return found


def count_peers(options, points: dict) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of each system and what grows: (frames or px, GFLOP)."""
    counted = {}
    for own in map(options.peer, PEERS):
        counted[own.name] = {}
        for grows, line in points.items():
            counted[own.name][grows] = []
            for num_frames, frame_px in line:
                frame_px = own.frame_px if grows == "frames" else own.fit(frame_px)
                facts = count_frames(own, num_frames, frame_px)
                counted[own.name][grows].append((num_frames if grows == "frames" else frame_px, facts / 1e9))
    return counted


def count_frames(peer, num_frames: int, frame_px: int) -> float:
    """Operations; where counting means computing, of one chunk, times the chunks: nothing crosses their borders."""
    if peer.is_counted_on_meta:
        return count(Setting(peer, num_frames, frame_px)).num_operations
    chunk = min(4, num_frames)
    return count(Setting(peer, chunk, frame_px)).num_operations * num_frames / chunk


def draw(path: Path, found: dict, counted: dict, points: dict) -> None:
    """Milliseconds of Video-Panda above, GFLOP of all below; log-log, told apart by marker and dashes as well as by colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from video_panda.evaluation.report_plots import COLOURS

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9, "legend.frameon": False}):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        for column, (grows, line) in enumerate(points.items()):
            above, below = (figure.add_subplot(2, 2, 1 + column + 2 * row) for row in range(2))
            place = 0 if grows == "frames" else 1
            x = [point[place] for point in line]
            for index, dtype in enumerate(found["growth"]):
                y = [found["milliseconds"][dtype, *point] for point in line]
                above.plot(
                    x, y, marker=MARKERS[index], ls=DASHES[0], color=COLOURS[index], label=f"Video-Panda, {dtype}"
                )
                power = 1 if grows == "frames" else 2
                ideal = [y[0] * (own / x[0]) ** power for own in x]
                above.plot(
                    x,
                    ideal,
                    ls=":",
                    lw=1,
                    color="#555555",
                    label=f"proportional to {'frames' if power == 1 else 'px²'}" if not index else None,
                )
            for index, (name, own) in enumerate(counted.items()):
                below.plot(*zip(*own[grows]), marker=MARKERS[index], ls=DASHES[index], color=COLOURS[index], label=name)
            for axes, label in ((above, "milliseconds, measured"), (below, "GFLOP, counted")):
                axes.set(
                    xscale="log",
                    yscale="log",
                    xlabel="frames" if grows == "frames" else "side of a frame, px",
                    ylabel=label,
                )
                axes.set_xticks(x, [str(own) for own in x])
                axes.minorticks_off()
                axes.grid(color="#e4e4e4", lw=0.6)
                axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend()
        figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(counted))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def write_page(options, found: dict, counted: dict, points: dict, picture: str) -> str:
    tables = []
    for grows, line in points.items():
        header = [
            grows if grows == "frames" else "px",
            *(f"{dtype}, {unit}" for dtype in options.dtype for unit in ("ms", "ms a frame")),
        ]
        rows = []
        for point in line:
            times = [found["milliseconds"][dtype, *point] for dtype in options.dtype]
            rows.append([str(point[grows != "frames"]), *(number(own) for ms in times for own in (ms, ms / point[0]))])
        tables.append(markdown_table(header, rows))
        names = [f"{name}, GFLOP" for name in counted]
        rows = [
            [str(point[grows != "frames"]), *(number(own[grows][index][1]) for own in counted.values())]
            for index, point in enumerate(line)
        ]
        tables.append(markdown_table([header[0], *names], rows))
    growth = ", ".join(f"{median(own):.3f} in {dtype}" for dtype, own in found["growth"].items())
    first, last = points["frames"][0][0], points["frames"][-1][0]
    return f"""# Growth with frames and with resolution

A frame of {last} costs, in proportion to one of {first}: {growth}. The limit is within {TOLERANCE:.0%} of 1.

![growth](scaling{picture}.svg)

## Frames, of each system's own size

{(chr(10) * 2).join(tables[:2])}

## Resolution, {first} frames

{(chr(10) * 2).join(tables[2:])}

## How

{__doc__.split(chr(10) * 2, 2)[2].strip()} Rounds: {options.rounds}.

{machine(options.device)}.
By `python benchmarks/scaling.py`.
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse(make_parser(__doc__), arguments)
    points = points_of(options)
    found, counted = measure(options, points), count_peers(options, points)
    suffix = "_cuda" if options.device == "cuda" else ""
    if options.output is not None:
        draw(options.output / f"scaling{suffix}.svg", found, counted, points)
    times = [
        {"dtype": key[0], "frames": key[1], "px": key[2], "milliseconds": ms}
        for key, ms in found["milliseconds"].items()
    ]
    kept = {"times": times, "cost_of_a_frame_longest_over_shortest": found["growth"], "gflop": counted}
    write_results(options, "scaling", kept, write_page(options, found, counted, points, suffix))
    is_linear = all(abs(median(own) - 1) <= TOLERANCE for own in found["growth"].values())
    return 0 if options.quick else int(not is_linear)


if __name__ == "__main__":
    sys.exit(main())
