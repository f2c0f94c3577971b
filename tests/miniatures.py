"""The paper's benchmarks in miniature, as users have them on disk: real clips of coloured shapes in mixed formats, and
questions that the demonstration model of the package knows the answers to."""

import json
from pathlib import Path

import av

from video_panda import ShapesQA
from video_panda.evaluation.questions import Question

# What that model gets right nearly always.
KINDS = ("colour", "size", "texture", "direction")
FORMATS = {"mp4": "libx264", "avi": "mpeg4", "mkv": "libx264", "gif": "gif"}
NUMBER_OF_KIND = {"colour": 4, "size": 1, "texture": 5, "direction": 0}


def shapes_questions(folder: Path, num_clips: int) -> list[tuple[Path, list[Question]]]:
    """Clips of single objects, each with the questions about it."""
    benchmark = ShapesQA(folder, "validation", num_clips, families="single", kinds=KINDS)
    benchmark.prepare(show_progress=False)
    asked: dict[str, list[Question]] = {}
    for question in benchmark.questions:
        asked.setdefault(question.video, []).append(question)
    return [(folder / video, questions) for video, questions in asked.items()]


def copy_clip(source: Path, target: Path) -> None:
    """The same pictures in the format of the target's suffix."""
    with av.open(str(source)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    suffix = target.suffix[1:].lower()
    with av.open(str(target), "w") as container:
        options = {"qp": "0"} if FORMATS[suffix] == "libx264" else {"qscale": "1"}
        stream = container.add_stream(FORMATS[suffix], rate=8, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = {"gif": "rgb8", "libx264": "yuv444p"}.get(FORMATS[suffix], "yuv420p")
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_zero_shot_qa(
    folder: Path, clips: Path, num_clips: int = 6, formats=("mp4", "avi", "mkv"), typed: bool = True
):
    """`test_q.json`, `test_a.json` and `videos/`."""
    (folder / "videos").mkdir(parents=True)
    asked, answers = [], []
    for place, (source, questions) in enumerate(shapes_questions(clips, num_clips)):
        # Some names in the questions have a suffix, as in the real data, and it is not always the file's.
        suffix = formats[place % len(formats)]
        copy_clip(source, folder / "videos" / f"{source.stem}.{suffix}")
        name = source.stem if place % 2 else f"{source.stem}.{suffix}"
        for question in questions:
            own = f"{question.id}-{len(asked)}"
            asked.append({"video_name": name, "question": question.question, "question_id": own})
            typing = {"type": NUMBER_OF_KIND[question.kind]} if typed else {}
            answers.append({"answer": question.answer, "question_id": own, **typing})
    for name, content in (("test_q.json", asked), ("test_a.json", answers)):
        (folder / name).write_text(json.dumps(content))
    return folder


def write_video_chatgpt(folder: Path, clips: Path, num_clips: int = 4):
    """`generic_qa.json`, `temporal_qa.json`, `consistency_qa.json` and `Test_Videos/`."""
    (folder / "Test_Videos").mkdir(parents=True)
    files: dict[str, list[dict]] = {"generic": [], "temporal": [], "consistency": []}
    for source, questions in shapes_questions(clips, num_clips):
        copy_clip(source, folder / "Test_Videos" / f"v_{source.stem}.mp4")
        by_kind = {question.kind: question for question in questions}
        name = f"v_{source.stem}"
        colour, size = by_kind["colour"], by_kind["size"]
        files["generic"].append({"video_name": name, "Q": colour.question, "A": colour.answer})
        last = by_kind.get("direction", size)
        files["temporal"].append({"video_name": name, "Q": last.question, "A": last.answer})
        files["consistency"].append({"video_name": name, "Q1": size.question, "Q2": size.question, "A": size.answer})
    for name, entries in files.items():
        (folder / f"{name}_qa.json").write_text(json.dumps(entries))
    return folder
