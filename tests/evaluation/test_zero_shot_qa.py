"""The paper's benchmarks as users have them on disk: what is read, and what is wrong with bad data."""

import json

import pytest
from miniatures import write_video_chatgpt, write_zero_shot_qa

from video_panda.evaluation.benchmarks import BENCHMARKS, open_benchmark
from video_panda.evaluation.folder_benchmark import FolderBenchmark
from video_panda.evaluation.video_files import VideoFiles
from video_panda.evaluation.zero_shot_qa import MSVDQA, ActivityNetQA

QA_NAMES = ("msvd-qa", "msrvtt-qa", "tgif-qa", "activitynet-qa")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


def write(folder, questions, answers, videos=("a.mp4",)):
    """A data set of empty clips."""
    (folder / "videos").mkdir(parents=True)
    for name in videos:
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "videos" / name).touch()
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))
    return folder


def ask(video="a", question="What is it?", own=0):
    return {"video_name": video, "question": question, "question_id": own}


def tell(answer="a cat", own=0, **more):
    return {"answer": answer, "question_id": own, **more}


@pytest.mark.parametrize("name", QA_NAMES)
def test_a_miniature_is_read(name, clips, tmp_path):
    formats = ("gif",) if name == "tgif-qa" else ("mp4", "avi", "mkv")
    folder = write_zero_shot_qa(tmp_path / name, clips, num_clips=4, formats=formats)
    benchmark = open_benchmark(name, folder)
    asked = json.loads((folder / "test_q.json").read_text())
    assert [question.question for question in benchmark.questions] == [entry["question"] for entry in asked]
    assert {question.video.split(".")[-1] for question in benchmark.questions} == set(formats)
    assert all(benchmark.video_path(question).is_file() for question in benchmark.questions)
    assert benchmark.missing_videos() == []
    kinds = {"motion", "spatial relation", "colour", "object"} if name == "activitynet-qa" else {"0", "1", "4", "5"}
    assert set(benchmark.kinds) <= kinds
    assert len(benchmark.kinds) > 2
    first = open_benchmark(name, folder, num_clips=1)
    assert {question.video for question in first.questions} == {benchmark.questions[0].video}


def test_video_chatgpt_is_read(clips, tmp_path):
    benchmark = open_benchmark("video-chatgpt", write_video_chatgpt(tmp_path / "data", clips, num_clips=2))
    assert [question.kind for question in benchmark.questions] == ["generic"] * 2 + ["temporal"] * 2 + [
        "consistency"
    ] * 4
    answers = {question.id: question.id for question in benchmark.questions}
    items = benchmark.judge_items(answers)
    assert [item.criterion for item in items].count("consistency") == 2
    assert {item.criterion for item in items} == {"correctness", "detail", "context", "temporal", "consistency"}
    pair = items[-1]
    assert pair.answers == ("consistency-1-1", "consistency-1-2")
    assert pair.second_question == benchmark.questions[-1].question
    # Of a pair that is answered by half nothing can be said.
    del answers["consistency-1-2"]
    assert len(benchmark.judge_items(answers)) == len(items) - 1


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a", "videos/a.mp4"),
        ("a.avi", "videos/a.avi"),
        ("a.mkv", "videos/a.mp4"),
        ("b", "videos/deep/v_b.webm"),
        ("v_b", "videos/deep/v_b.webm"),
        ("dot.in.name", "videos/dot.in.name.mp4"),
        ("c", None),
        ("notes", None),
    ],
)
def test_clips_are_found_whatever_their_suffix(tmp_path, name, found):
    names = ("a.avi", "a.mp4", "deep/v_b.webm", "notes.txt", "dot.in.name.mp4")
    write(tmp_path / "data", [ask()], [tell()], names)
    assert VideoFiles(tmp_path / "data").find(name) == found


def test_two_clips_of_a_name_are_not_chosen_between(tmp_path):
    write(tmp_path / "data", [ask()], [tell()], ("one/a.mp4", "two/a.mp4"))
    with pytest.raises(ValueError, match=r"clips named 'a' lie in several folders: videos/one/a.mp4, videos/two/a.mp4"):
        MSVDQA(tmp_path / "data")


def test_answers_are_found_by_id_not_by_place(tmp_path):
    folder = write(tmp_path / "data", [ask(own=1), ask(own=2)], [tell("two", 2), tell("one", 1)])
    assert [question.answer for question in MSVDQA(folder).questions] == ["one", "two"]
    (folder / "test_a.json").write_text(json.dumps([{"answer": "first"}, {"answer": 2}]))
    assert [question.answer for question in MSVDQA(folder).questions] == ["first", "2"], "without ids the place counts"


def test_kinds_are_types_or_first_words(tmp_path):
    texts = ["What is it?", "who's there", "How many?", "Is it?"]
    questions = [ask(question=text, own=place) for place, text in enumerate(texts)]
    untyped = write(tmp_path / "a", questions, [tell(own=place) for place in range(4)])
    assert MSVDQA(untyped).kinds == ("what", "who", "how", "other")
    typed = write(tmp_path / "b", questions, [tell(own=place, type=place + 5) for place in range(4)])
    assert ActivityNetQA(typed).kinds == ("object", "location", "number", "other")


def test_what_is_missing_is_listed(tmp_path):
    folder = write(
        tmp_path / "data", [ask("a", own=0), ask("gone", own=1), ask("gone", own=2)], [tell(own=n) for n in range(3)]
    )
    benchmark = MSVDQA(folder)
    assert benchmark.missing_videos() == ["gone"]
    with pytest.raises(FileNotFoundError, match=r"gone.*question 1"):
        benchmark.video_path(benchmark.questions[1])


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ([ask()], [tell(), tell(own=1)], "test_a.json: 2 answers to 1 questions of test_q.json"),
        ([ask(own=7), ask(own=7)], [tell(own=7), tell(own=8)], "test_q.json: the id '7' stands at entries 0 and 1"),
        ([ask(own=7), ask(own=8)], [tell(own=7), tell(own=7)], "test_a.json: the id '7' stands at entries 0 and 1"),
        ([ask(own=7)], [tell(own=8)], "test_a.json: no answer to the question '7'"),
        ([ask(own="../7")], [tell(own="../7")], "'question_id' is '../7', expected a name without path separators"),
        ([ask(own="a\\b")], [tell()], "without path separators"),
        ([ask("../a")], [tell()], r"entry 0 \(id 0\): 'video_name' is '../a', expected a name without path"),
        ([ask("/etc/passwd")], [tell()], "without path separators"),
        ([ask("")], [tell()], "'video_name' is '', expected a name"),
        ([ask(None)], [tell()], "'video_name' is None"),
        ([ask(own=True)], [tell()], "'question_id' is True"),
        ([ask(question=" ")], [tell()], r"'question' is ' ', expected a text"),
        ([ask()], [tell(None)], r"test_a.json \(id 0\): 'answer' is None, expected a text"),
        ([{"question": "What?", "question_id": 0}], [tell()], "entry 0: 'video_name' is missing"),
        (["a"], [tell()], "entry 0: expected an object, got a str"),
        ({"a": 1}, [tell()], "expected a list of objects, got a dict"),
        ([], [tell()], "got an empty list"),
        ([ask(), ask(own=1)], [tell(), {"answer": "x"}], "entry 1: 'question_id' is missing"),
    ],
)
def test_bad_data_is_named(tmp_path, questions, answers, message):
    with pytest.raises(ValueError, match=message):
        MSVDQA(write(tmp_path / "data", questions, answers))


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        MSVDQA(tmp_path / "nowhere")
    folder = write(tmp_path / "data", [ask()], [tell()])
    (folder / "test_a.json").write_text("[{")
    with pytest.raises(ValueError, match=r"test_a.json: not JSON"):
        MSVDQA(folder)
    (folder / "test_a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_a.json: there is no such file"):
        MSVDQA(folder)
    with pytest.raises(FileNotFoundError, match=r"generic_qa.json"):
        open_benchmark("video-chatgpt", folder)
    with pytest.raises(ValueError, match="`num_clips` must be a whole number of at least 1, got 0"):
        MSVDQA(folder, num_clips=0)


def test_benchmarks_of_a_folder_have_one_split(tmp_path):
    folder = write(tmp_path / "data", [ask()], [tell()])
    assert open_benchmark("msvd-qa", folder, "test").split == "test"
    with pytest.raises(ValueError, match="msvd-qa has only the split 'test', got 'validation'"):
        open_benchmark("msvd-qa", folder, "validation")
    assert {own.name for own in BENCHMARKS if issubclass(own, FolderBenchmark)} == {*QA_NAMES, "video-chatgpt"}
