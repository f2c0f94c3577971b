"""Peak memory of the vision part over the number of frames: all chunks at once, as it comes, and one chunk after the other.

    python benchmarks/memory.py [--device cuda] [--dtype float32]

Each point is a process of its own, warmed up. Peak: above weights and pixels, of the process and of tensors alone; an
allocator keeps memory that it may need again, and what the process takes moves with that. A pass returns the tokens
of all frames, before and after the projector, which grow with the video and are wanted; what comes on top of them is what it
needed to get there. Limit: with one chunk after the other (`vision_chunk_batch=1`) what tensors take of that is the same,
within 10 %, for the shortest video and for the longest.
"""

import sys

from measure import Setting, machine, make_parser, mib, parse, start_workers, write_results
from peers import VIDEO_PANDA
from report import markdown_table

FRAMES = (8, 16, 32, 64, 128)
NUM_CHUNK_FRAMES = 4
WAYS = {"all chunks at once": max(FRAMES), "by default": None, "one after the other": 1}
TOLERANCE = 0.10


def measure(options, dtype: str) -> list[dict]:
    """Bytes of the result and the peak of each way, and seconds, for each number of frames."""
    peer, found = options.peer(VIDEO_PANDA), []
    element = {"float32": 4, "bfloat16": 2}[dtype]
    for num_frames in (8, 16) if options.quick else FRAMES:
        point = {"frames": num_frames}
        for way, chunk_batch in WAYS.items():
            setting = Setting(
                peer,
                num_frames,
                dtype=dtype,
                device=options.device,
                chunk_batch=chunk_batch,
                warm_up_frames=NUM_CHUNK_FRAMES,
                counts_tensors=True,
            )
            with start_workers({way: setting}) as workers:
                seconds = workers[way].take_turn(0)
                width = peer.sizes["hidden_size"] + peer.llm_width
                facts = workers[way].facts
                point["result_bytes"] = facts.num_tokens * width * element
                peaks = {"peak_bytes": workers[way].peak_bytes, "peak_tensor_bytes": facts.peak_tensor_bytes}
                point[way] = {**peaks, "seconds": seconds}
        print(dtype, point, file=sys.stderr)
        found.append(point)
    return found


def beyond_result(point: dict, way: str) -> float:
    """Bytes of tensors on top of what is returned."""
    return point[way]["peak_tensor_bytes"] - point["result_bytes"]


def growth(points: list[dict]) -> float:
    """Bytes beyond the result of the longest video over those of the shortest, one chunk after the other."""
    first, last = (beyond_result(point, "one after the other") for point in (points[0], points[-1]))
    return last / first


def write_page(options, found: dict) -> str:
    """The page, in Markdown: a table for each precision."""
    header = [
        "frames",
        "result, MiB",
        *(f"{way}: {what}" for way in WAYS for what in ("process, MiB", "tensors beyond the result, MiB", "s")),
    ]
    tables = []
    for dtype, points in found.items():
        rows = [
            [
                str(point["frames"]),
                mib(point["result_bytes"]),
                *(
                    text
                    for way in WAYS
                    for text in (
                        mib(point[way]["peak_bytes"]),
                        mib(beyond_result(point, way)),
                        f"{point[way]['seconds']:.2f}",
                    )
                ),
            ]
            for point in points
        ]
        tables.append(
            f"## {dtype}\n\n{markdown_table(header, rows)}\n\nOne after the other, from {points[0]['frames']} to {points[-1]['frames']} frames: {growth(points):.2f} x beyond the result."
        )
    return f"""# Memory of the vision part

Square frames of the published size, one video, on {options.device}.

{(chr(10) * 2).join(tables)}

## How

{__doc__.split(chr(10) * 2, 2)[2].strip()} Seconds are of one pass.

{machine(options.device)}.
By `python benchmarks/memory.py`.
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse(make_parser(__doc__), arguments)
    found = {dtype: measure(options, dtype) for dtype in options.dtype}
    write_results(options, "memory", {"found": found}, write_page(options, found))
    return 0 if options.quick else int(any(abs(growth(points) - 1) > TOLERANCE for points in found.values()))


if __name__ == "__main__":
    sys.exit(main())
