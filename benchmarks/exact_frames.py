"""Are the frames asked for the ones that come, and what does that cost beside decord's plain random access?

    python benchmarks/exact_frames.py [--rounds 7] [--videos FOLDER]

- **Matrix**: every kind of stream of `tests/frame_matrix.py`, ten seconds of 640 x 360 px, a key frame every two seconds, the
  frame numbers drawn as barcodes over a moving texture. The eight frames that the processor chooses, and all of them in turn.
- **Guard**: H.264 in MP4 with closed groups of pictures, where decord alone is right: what everything around it costs.
- **Short clips**: 64 px, as the shapes of the evaluation are.

Both ways of a comparison take turns, and begin in turns; a ratio is the median of those of the rounds.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import decord
import numpy as np
from report import RESULTS, describe_machine, markdown_table, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from clips import barcode_frame, read_barcodes, write_clip
from frame_matrix import COMBINATIONS, encode

from video_panda.processing import frame_reading_video_panda as frame_reading
from video_panda.processing.geometry_video_panda import choose_frames
from video_panda.processing.pyav_reading_video_panda import num_threads
from video_panda.processing.video_decoding_video_panda import VideoDecodeError, decode_video

NUM_CHOSEN, NUM_FRAMES, SIZE_PX, GROUP, FPS = 8, 250, (640, 360), 50, 25
MAX_GUARD = 1.15
GUARD_TURNS = 4  # so many times the rounds of the matrix
DECORD_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError, AssertionError)
REAL_CLIPS = ("sample_demo_1.mp4", "sample_demo_3.mp4")


class TexturedBarcodes:
    """Draws the pictures: the barcode above, below it a texture that moves, with the noise of a camera."""

    def __init__(self):
        random = np.random.default_rng(0)
        rough = random.normal(size=(1024, 2048))
        for axis in (0, 1) * 3:
            rough = sum(np.roll(rough, shift, axis) for shift in range(-4, 5)) / 9
        self._texture = np.clip(128 + rough / rough.std() * 50, 0, 255)
        self._noise = random.normal(scale=3, size=(1024, 2048))

    def __call__(self, index: int, width: int, height: int) -> np.ndarray:
        frame = barcode_frame(index, width, height)
        rows = slice(height // 2, height - height // 4)
        count = rows.stop - rows.start
        texture = np.roll(self._texture, (2 * index, 5 * index), (0, 1))[:count, :width]
        noise = np.roll(self._noise, (37 * index, 91 * index), (0, 1))[:count, :width]
        frame[rows] = np.clip(texture + noise, 0, 255)[..., None]
        return frame


def by_rule(metadata) -> list[int]:
    """The frames that the processor takes."""
    if metadata.total_num_frames == 1:
        return [0]
    return choose_frames(metadata.total_num_frames, metadata.fps, NUM_CHOSEN)


def plain(path: Path, indices: list[int]) -> np.ndarray:
    """decord's random access as one would write it."""
    return decord.VideoReader(str(path), num_threads=num_threads()).get_batch(indices).asnumpy()


def take_turns(ways: dict[str, Callable], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round; a round before them warms up."""
    seconds = {name: [] for name in ways}
    for turn in range(num_rounds + 1):
        for name in sorted(ways, reverse=bool(turn % 2)):
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
            time.sleep(0.005)  # threads of the decoder are still ending
    return {name: own[1:] for name, own in seconds.items()}


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    return median(own / plain for own, plain in zip(seconds[name], seconds[other]))


def outcome(read: Callable[[], np.ndarray], expected: list[int]) -> tuple[int, int]:
    """(wrong frames, refused) of those that a way gives."""
    try:
        got = read_barcodes(read())
    except (VideoDecodeError, *DECORD_ERRORS):
        return 0, 1
    return sum(have != want for have, want in zip(got, expected, strict=True)), 0


def measure_matrix(folder: Path, num_rounds: int, combinations) -> list[dict]:
    """For each kind: wrong frames of both ways, and times."""
    draw, found = TexturedBarcodes(), []
    for kind in combinations:
        path = folder / kind.file
        numbers = encode(kind, path, NUM_FRAMES, *SIZE_PX, group=GROUP, picture=draw)
        if numbers is None:
            continue
        frames, metadata = decode_video(path, by_rule)
        indices = metadata.frames_indices
        expected = [numbers[index] for index in indices]
        everything = list(range(len(numbers)))
        row = {"file": kind.file, "pictures": kind.pictures, "backend": metadata.video_backend, "chosen": len(indices)}
        row["wrong"] = sum(have != want for have, want in zip(read_barcodes(frames), expected))
        row["wrong_of_all"], _ = outcome(lambda path=path: decode_video(path, lambda _: everything)[0], numbers)  # noqa: B023
        row["plain_wrong"], row["plain_refused"] = outcome(lambda path=path: plain(path, indices), expected)  # noqa: B023
        ways = {"exact": lambda path=path: decode_video(path, by_rule)}
        if not row["plain_refused"]:
            ways["plain"] = lambda path=path, indices=indices: plain(path, indices)
        seconds = take_turns(ways, num_rounds)
        row["milliseconds"] = 1000 * median(seconds["exact"])
        row["cost"] = ratio(seconds, "exact", "plain") if "plain" in seconds else None
        found.append(row)
        path.unlink()
    return found


def guarded_clips(folder: Path, videos: Path, quick: bool) -> dict[str, Path]:
    """H.264 in MP4 with closed groups: ours of ten seconds, one too large for PyAV to keep, real ones where there are."""
    draw, clips = TexturedBarcodes(), {}
    small, large = (640, 360), (1280, 720)
    kinds = [(NUM_FRAMES, small, 25, "23"), (NUM_FRAMES, small, 50, "23"), (NUM_FRAMES, small, 250, "23")]
    kinds += [(NUM_FRAMES, large, 50, "23"), (3 * NUM_FRAMES, large, 50, "6")]
    for num_frames, (width, height), group, crf in kinds[:2] if quick else kinds:
        path = folder / f"{width}_{group}_{crf}.mp4"
        options = {"g": str(group), "preset": "veryfast", "crf": crf}
        write_clip(path, num_frames, FPS, width, height, options=options, picture=draw)
        name = f"{num_frames // FPS} s, {width} x {height} px, key frame every {group}, {path.stat().st_size / 2**20:.1f} MiB"
        clips[name] = path
    return clips | {name: videos / name for name in REAL_CLIPS if (videos / name).exists()}


def measure_guard(clips: dict[str, Path], num_rounds: int) -> list[dict]:
    """For each clip: what all of `decode_video` costs."""
    found = []
    for name, path in clips.items():
        metadata = decode_video(path, by_rule)[1]
        ways = {
            "plain": lambda path=path, indices=metadata.frames_indices: plain(path, indices),
            "exact": lambda path=path: decode_video(path, by_rule),
        }
        seconds = take_turns(ways, num_rounds)
        times = {f"{way}_ms": 1000 * median(own) for way, own in seconds.items()}
        found.append(
            {"clip": name, "backend": metadata.video_backend, **times, "cost": ratio(seconds, "exact", "plain")}
        )
    return found


def measure_short(folder: Path, num_rounds: int) -> list[dict]:
    """Clips of 64 px."""
    found = []
    for num_frames, group in ((8, 250), (12, 4), (100, 12)):
        path = folder / f"short_{num_frames}.mp4"
        write_clip(path, num_frames, 8, 64, 64, options={"g": str(group)})
        indices = decode_video(path, by_rule)[1].frames_indices
        ways = {
            "plain": lambda path=path, indices=indices: plain(path, indices),
            "exact": lambda path=path: decode_video(path, by_rule),
        }
        seconds = take_turns(ways, 10 * num_rounds)
        name = f"{num_frames} frames of 64 x 64 px"
        row = {"clip": name, "plain_ms": 1000 * median(seconds["plain"]), "exact_ms": 1000 * median(seconds["exact"])}
        found.append(row | {"cost": ratio(seconds, "exact", "plain")})
    return found


def write_text(matrix: list[dict], guard: list[dict], short: list[dict], num_rounds: int) -> str:
    """The page of results."""

    def plain_says(row: dict) -> str:
        return "refused" if row["plain_refused"] else f"{row['plain_wrong']} of {row['chosen']}"

    rows = [
        [
            f"`{row['file']}`",
            row["pictures"],
            row["backend"],
            f"{row['wrong']} of {row['chosen']}",
            f"{row['wrong_of_all']}",
            plain_says(row),
            f"{row['milliseconds']:.1f}",
            "-" if row["cost"] is None else f"{row['cost']:.2f}",
        ]
        for row in matrix
    ]
    header = ["clip", "pictures", "read by", "wrong", "wrong of all frames", "wrong, plain", "ms", "cost, of plain"]
    wrong = sum(row["wrong"] + row["wrong_of_all"] for row in matrix)
    plain_wrong = sum(row["plain_wrong"] > 0 for row in matrix)
    guards = [
        [row["clip"], row["backend"], f"{row['plain_ms']:.1f}", f"{row['exact_ms']:.1f}", f"{row['cost']:.2f}"]
        for row in guard
    ]
    shorts = [[row["clip"], f"{row['plain_ms']:.2f}", f"{row['exact_ms']:.2f}", f"{row['cost']:.2f}"] for row in short]
    return f"""# Exact frames

{len(matrix)} kinds of streams, {wrong} wrong frames. decord's plain random access gives wrong ones in {plain_wrong} of them without a
word, and refuses {sum(row["plain_refused"] for row in matrix)}. Clips of {NUM_FRAMES} frames, {SIZE_PX[0]} x {SIZE_PX[1]} px, a key frame every {GROUP};
{num_rounds} rounds that take turns, of the guard {GUARD_TURNS * num_rounds}.

{markdown_table(header, rows)}

## What the guard costs where decord alone is right

Limit: {MAX_GUARD} of plain random access.

{markdown_table(["H.264 in MP4, closed groups", "read by", "plain, ms", "exact, ms", "cost, of plain"], guards)}

## Short clips

{markdown_table(["clip", "plain, ms", "exact, ms", "cost, of plain"], shorts)}

{describe_machine("torch", "av", "decord2")}.
By `python benchmarks/exact_frames.py`.
"""


def update_page(matrix: list[dict], guard: list[dict], short: list[dict]) -> None:
    """Put the figures into the tables of docs/exact_frames.md."""
    page = Path(__file__).parents[1] / "docs" / "exact_frames.md"
    text = page.read_text(encoding="utf-8")
    for row in matrix:
        says = f"{row['plain_wrong']} of {row['chosen']} wrong" if row["plain_wrong"] else "right"
        figures = f"{'refused' if row['plain_refused'] else says} | {'-' if row['cost'] is None else format(row['cost'], '.2f')}"
        text = re.sub(rf"(?m)^(\| `{re.escape(row['file'])}` \|[^|]+\|[^|]+\| ).*( \|)$", rf"\g<1>{figures}\g<2>", text)
    costs = [[row["clip"], row.get("backend", "pyav"), f"{row['cost']:.2f}"] for row in (*guard, *short)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in costs)
    start = "| clip | read by | cost |\n| --- | --- | ---: |\n"
    text = re.sub(re.escape(start) + r"(\|.*\|\n)*", lambda _: f"{start}{table}\n", text)
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often all take their turn")
    parser.add_argument("--quick", action="store_true", help="few clips, one round, nothing is kept: does it run?")
    shared = Path(__file__).resolve().parents[2] / "shared" / "videos"
    parser.add_argument("--videos", type=Path, default=shared, help=f"folder with real clips: {', '.join(REAL_CLIPS)}")
    options = parser.parse_args(arguments)
    num_rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder, frame_reading._VideoPandaQuietDecord(decord):
        guard = measure_guard(guarded_clips(Path(folder), options.videos, options.quick), GUARD_TURNS * num_rounds)
        short = measure_short(Path(folder), num_rounds)
        matrix = measure_matrix(Path(folder), num_rounds, COMBINATIONS[:2] if options.quick else COMBINATIONS)
    text = write_text(matrix, guard, short, num_rounds)
    if options.quick:
        print(text)
        return 0
    write_result("exact_frames", text)
    update_page(matrix, guard, short)
    content = {"machine": describe_machine("torch", "av", "decord2"), "matrix": matrix, "guard": guard, "short": short}
    (RESULTS / "exact_frames.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    is_exact = not any(row["wrong"] or row["wrong_of_all"] for row in matrix)
    return 0 if is_exact and all(row["cost"] <= MAX_GUARD for row in guard) else 1


if __name__ == "__main__":
    raise SystemExit(main())
