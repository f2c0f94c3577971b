"""Raw samples of every format, and what each wrong one is told."""

import json
import pickle

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_panda.trainers.samples import (
    IndexedDataset,
    Sample,
    SampleError,
    check_samples,
    load_samples,
    parse_sample,
    split_indexed,
    visual_path,
)


def turns(*values):
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def video_sample(**changes):
    return {"id": "v_7", "video": "a/b.mp4", "conversations": turns("<video>\nWhat?", "A ball."), **changes}


def text(words):
    return {"type": "text", "text": words}


# ------------------------------------------------------------------------------------------------------- formats


def test_a_valley_sample():
    sample = parse_sample(video_sample(), 3)
    assert sample == Sample(
        3,
        "v_7",
        [
            {"role": "user", "content": [{"type": "video", "path": "a/b.mp4"}, text("What?")]},
            {"role": "assistant", "content": [text("A ball.")]},
        ],
        ("a/b.mp4",),
        (),
    )
    assert sample.name == "sample 3 (id 'v_7')"
    assert parse_sample(sample, 9) is sample
    assert pickle.loads(pickle.dumps(sample)) == sample


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("<video>\nWhat?", "What?"),
        ("What?\n<video>", "What?"),
        ("  <video>  What?", "What?"),
        ("See <video> there", "See there"),
        ("See\n<video>\nthere", "See\nthere"),
        ("See <video>, then", "See , then"),
        (" kept  as it is \n<video>", " kept  as it is"),
        ("<VIDEO> is text <video>", "<VIDEO> is text"),
    ],
)
def test_the_marker_is_taken_out_and_the_video_goes_first(value, expected):
    sample = parse_sample(video_sample(conversations=turns(value, "Yes.")))
    assert sample.messages[0]["content"] == [{"type": "video", "path": "a/b.mp4"}, text(expected)]


def test_a_turn_of_the_marker_alone_has_no_text():
    sample = parse_sample(video_sample(conversations=turns("<video>", "Yes.")))
    assert sample.messages[0]["content"] == [{"type": "video", "path": "a/b.mp4"}]


def test_several_visuals_go_to_their_own_turns_in_order():
    raw = {
        "id": 4,
        "video": ["one.mp4", "two.mp4", "three.mp4"],
        "image": "p.png",
        "conversations": turns("<image> <video>\n<video> Differ?", "Yes.", "And <video>", "No."),
    }
    sample = parse_sample(raw)
    assert [item.get("path") or item["text"] for item in sample.messages[0]["content"]] == [
        *("p.png", "one.mp4", "two.mp4", "Differ?"),
    ]
    assert [item.get("path") or item["text"] for item in sample.messages[2]["content"]] == ["three.mp4", "And"]
    assert (sample.videos, sample.images) == (("one.mp4", "two.mp4", "three.mp4"), ("p.png",))
    assert [item["path"] for item in sample.visuals] == ["p.png", "one.mp4", "two.mp4", "three.mp4"]


def test_text_only_and_a_marker_in_an_answer():
    raw = {"id": None, "video": None, "image": None, "conversations": turns("Name a tag.", "<video> is one.")}
    sample = parse_sample(raw)
    assert sample.messages[1]["content"] == [text("<video> is one.")]
    assert not sample.visuals
    assert sample.name == "a sample"


@pytest.mark.parametrize("question", ["What?", "<video>\nWhat?", "What?\n<video>"])
def test_a_video_chatgpt_sample_finds_its_file(tmp_path, question):
    sample = parse_sample({"q": question, "a": "A ball.", "video_id": "sub/v_1.x"}, 0)
    assert sample.id == "sub/v_1.x"
    assert sample.messages[0]["content"][1] == text("What?")
    (item,) = sample.visuals
    with pytest.raises(FileNotFoundError, match=r"v_1\.x with any of the suffixes \.mp4, \.mkv"):
        visual_path(item, tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "v_1.x.mkv").touch()
    assert visual_path(item, tmp_path) == tmp_path / "sub" / "v_1.x.mkv"
    (tmp_path / "sub" / "v_1.x").touch()
    assert visual_path(item, tmp_path) == tmp_path / "sub" / "v_1.x"


def test_a_path_is_relative_to_the_root_or_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    item = parse_sample(video_sample(video="http://host/b.mp4")).visuals[0]
    assert visual_path(item, None) == tmp_path / "http:" / "host" / "b.mp4"  # never an address
    assert visual_path(item, "data") == tmp_path / "data" / "http:" / "host" / "b.mp4"


def test_a_chat_sample_with_a_system_message():
    raw = {
        "id": "c",
        "video": None,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{**text("What?"), "path": None}, {"type": "video", "path": "b.mp4", "text": None}],
            },
            {"role": "assistant", "content": "A ball, as in <video>."},
            {"role": "user", "content": [{"type": "image", "image": "p.png"}]},
            {"role": "assistant", "content": [text("A photo.")]},
        ],
    }
    sample = parse_sample(raw)
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.messages[1]["content"] == [{"type": "video", "path": "b.mp4"}, text("What?")]
    assert sample.messages[3]["content"] == [{"type": "image", "path": "p.png"}]
    assert (sample.videos, sample.images) == (("b.mp4",), ("p.png",))


# -------------------------------------------------------------------------------------------------------- errors


def chat(*messages, **fields):
    return {"id": "v_7", "messages": [{"role": role, "content": content} for role, content in messages], **fields}


WRONG = {
    "not a mapping": ("text", r"sample 5 is a str, expected a mapping"),
    "nothing in it": ({"id": "v_7", "text": "x"}, r"`conversations` is missing; got the fields \['id', 'text'\]"),
    "none": (video_sample(conversations=None), r"`conversations` is missing"),
    "no list": (video_sample(conversations="Hi"), r"`conversations` is a str, expected a list of turns"),
    "empty": (video_sample(conversations=[]), r"`conversations` is empty"),
    "turn is no mapping": (video_sample(conversations=["Hi"]), r"`conversations\[0\]` is a str, expected a mapping"),
    "gpt first": (
        video_sample(conversations=turns("<video>", "A.")[::-1]),
        r"`conversations\[0\]` is a turn of 'gpt', expected 'human' first",
    ),
    "two human turns": (
        video_sample(conversations=turns("<video>", "A.")[:1] * 2),
        r"`conversations\[1\]` is a turn of 'human', expected 'gpt' after a turn of 'human'",
    ),
    "two answers": (
        video_sample(conversations=[*turns("<video>", "A."), *turns("Q", "A.")[1:]]),
        r"`conversations\[2\]` is a turn of 'gpt', expected 'human' after",
    ),
    "no answer": (video_sample(conversations=turns("<video>", "A.", "B?")), r"`conversations` must end with .*'gpt'"),
    "role": (
        video_sample(conversations=[{"from": "user", "value": "<video>"}]),
        r"`conversations\[0\]\.from` is 'user', expected 'human' or 'gpt'",
    ),
    "value": (
        video_sample(conversations=turns("<video>", None)),
        r"`conversations\[1\]\.value` is a NoneType, expected a string",
    ),
    "marker without video": (
        video_sample(video=None),
        r"`video` names 0 videos, but the questions hold 1 <video> markers",
    ),
    "video without marker": (
        video_sample(conversations=turns("What?", "<video>")),
        r"`video` names 1 videos, but the questions hold 0 <video> markers",
    ),
    "marker of the other kind": (
        {"id": "v_7", "image": "p.png", "conversations": turns("<video>", "A.")},
        r"`video` names 0 videos, but the questions hold 1",
    ),
    "two markers": (video_sample(conversations=turns("<video><video>", "A.")), r"names 1 videos, .* hold 2"),
    "empty path": (video_sample(video=""), r"`video` is '', expected the path of a file"),
    "no path": (video_sample(video=[3]), r"`video` is 3, expected the path of a file"),
    "null byte": (video_sample(video="a\0b"), r"`video` is 'a\\x00b', expected the path"),
    "absolute": (video_sample(video="/etc/passwd"), r"`video` is the absolute path '/etc/passwd'"),
    "escape": (video_sample(video="a/../../b.mp4"), r"`video` leads out of the root folder: 'a/\.\./\.\./b\.mp4'"),
    "escape of an id": ({"q": "Q", "a": "A", "video_id": "../v"}, r"`video_id` leads out of the root folder"),
    "question": ({"q": 1, "a": "A", "video_id": "v"}, r"\(id 'v'\): `q` is a int, expected a string"),
    "two markers in a question": ({"q": "<video><video>", "a": "A", "video_id": "v"}, r"`video_id` names 1 videos"),
    "chat role": (chat(("human", "Q"), ("assistant", "A")), r"`messages\[0\]\.role` is 'human', expected 'user' or"),
    "late system": (chat(("user", "Q"), ("system", "S")), r"`messages\[1\]\.role` is 'system', expected 'user'"),
    "system alone": (chat(("system", "S")), r"`messages` must end with an answer \('assistant'\)"),
    "chat order": (chat(("assistant", "A")), r"`messages\[0\]` is a turn of 'assistant', expected 'user' first"),
    "chat content": (chat(("user", None), ("assistant", "A")), r"`messages\[0\]\.content` is None, expected a string"),
    "chat empty content": (chat(("user", []), ("assistant", "A")), r"`messages\[0\]\.content` is \[\], expected"),
    "chat item": (
        chat(("user", [{"type": "audio"}])),
        r"`messages\[0\]\.content\[0\]` is \{'type': 'audio'\}, expected",
    ),
    "chat text": (chat(("user", [{"type": "text", "text": 3}])), r"content\[0\]\.text` is a int, expected a string"),
    "chat no path": (chat(("user", [{"type": "video"}])), r"content\[0\]\.path` is None, expected the path of a file"),
    "chat escape": (chat(("user", [{"type": "video", "path": ".."}])), r"content\[0\]\.path` leads out of the root"),
    "chat video in answer": (
        chat(("user", "Q"), ("assistant", [{"type": "video", "path": "a.mp4"}])),
        r"`messages\[1\]\.content\[0\]` is a video in a message of role 'assistant'",
    ),
    "chat marker": (
        chat(("user", "<video>\nQ"), ("assistant", "A")),
        r"holds a <video> without a video; in `messages`",
    ),
    "chat beside video": (
        chat(("user", "Q"), ("assistant", "A"), video="a.mp4"),
        r"`video` stands beside `messages`, in which a video is an item",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sample_is_told_what_and_where(name):
    raw, message = WRONG[name]
    with pytest.raises(SampleError, match=message) as caught:
        parse_sample(raw, 5)
    assert str(caught.value).startswith("sample 5")
    assert caught.value.index == 5
    if isinstance(raw, dict):
        assert caught.value.id == raw.get("id", raw.get("video_id"))
        assert repr(caught.value.id) in str(caught.value)


def test_the_error_passes_through_a_worker():
    error = SampleError("is wrong", index=3, id="x", field="video")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.index, copy.id, copy.field) == ("sample 3 (id 'x'): `video` is wrong", 3, "x", "video")
    assert str(SampleError(str(error))) == str(error)  # as a DataLoader raises it again


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["human", "gpt", "<video>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text", "path"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["id", "video", "image", "conversations", "messages", "q", "a", "video_id"]), json_values
    )
)
def test_whatever_is_given_is_a_sample_or_a_sample_error(raw):
    try:
        sample = parse_sample(raw, 0)
    except SampleError:
        return
    assert sample.messages[-1]["role"] == "assistant"


# ------------------------------------------------------------------------------------------------------- loading


def test_json_and_jsonl_files_give_the_same(tmp_path):
    samples = [video_sample(), video_sample(id="ü\u2028x")]
    listed, lined, misnamed = tmp_path / "a.json", tmp_path / "a.jsonl", tmp_path / "b.json"
    listed.write_text("\ufeff " + json.dumps(samples, indent=1), encoding="utf-8")
    lines = "\n\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples) + "\r\n"
    lined.write_text(lines, encoding="utf-8")
    misnamed.write_text(lines, encoding="utf-8")
    for path in (listed, lined, misnamed):
        assert load_samples(path) == samples
        assert load_samples(str(path)) == samples
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(samples[0]), encoding="utf-8")
    assert load_samples(one) == samples[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n\n{"id": 2\n', r"a\.jsonl, line 3: not JSON: "),
        ("a.jsonl", b'{"id": 1}\n[2]\n', r"a\.jsonl, line 2: got a list, expected an object"),
        ("a.json", b'{"id": 1}', r"a\.json: got one object, expected a JSON list"),
        ("a.json", b"null", r"a\.json: got one null, expected a JSON list"),
        ("a.json", b'[{"id": 1},\n{"id" 2}]', r"a\.json, line 2: not JSON"),
        ("a.json", b'[\n"\xff"]', r"a\.json, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b" \n", r"a\.jsonl: the file is empty"),
    ],
)
def test_a_file_that_is_none_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_samples(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_samples(tmp_path / "none.json")
    with pytest.raises(IsADirectoryError):
        load_samples(tmp_path)


def test_lists_and_datasets_pass_through():
    samples = [video_sample(), {"id": "t", "conversations": turns("Q", "A")}]
    assert load_samples(samples) is samples
    dataset = datasets.Dataset.from_list(samples)
    assert load_samples(dataset) is dataset
    assert parse_sample(dataset[1]).videos == ()  # its `video` is None
    assert parse_sample(dataset[0]).videos == ("a/b.mp4",)
    streaming = dataset.to_iterable_dataset()
    assert load_samples(streaming) is streaming
    with pytest.raises(ValueError, match=r"DatasetDict with \['train'\]; choose one"):
        load_samples(datasets.DatasetDict(train=dataset))
    with pytest.raises(ValueError, match="expected a path, a list or a dataset, got int"):
        load_samples(3)


def test_all_samples_are_checked_before_training():
    good, bad = video_sample(), video_sample(video=None)
    check_samples([good, good])
    with pytest.raises(SampleError, match=r"^sample 1 .*`video` names 0 .*\(2 of 4 samples are bad") as caught:
        check_samples([good, bad, good, bad])
    assert (caught.value.index, caught.value.id, caught.value.field) == (1, "v_7", "video")
    with pytest.raises(SampleError, match=r"^sample 2 .*markers$"):
        check_samples(IndexedDataset([good, good, bad], [0, 2]))
    with pytest.raises(ValueError, match="empty"):
        check_samples([])
    with pytest.raises(ValueError, match="streaming"):
        check_samples(iter([good]))


# ------------------------------------------------------------------------------------------------- IndexedDataset


def test_indexed_dataset_names_the_place_in_the_data():
    samples = [{"id": number} for number in range(5)]
    for base in (samples, datasets.Dataset.from_list(samples)):
        whole, part = IndexedDataset(base), IndexedDataset(base, [4, 1])
        assert (len(whole), len(part)) == (5, 2)
        assert whole[3] == (3, {"id": 3})
        assert part[0] == (4, {"id": 4})
        assert part.__getitems__([1, 0]) == [(1, {"id": 1}), (4, {"id": 4})]
        assert list(whole)[-1] == (4, {"id": 4})
    assert split_indexed(part[0]) == (4, {"id": 4})
    assert split_indexed({"id": 1}) == (None, {"id": 1})
    with pytest.raises(ValueError, match=r"indices \[5, -1\] are out of range: the dataset has 5"):
        IndexedDataset(samples, [0, 5, -1])
    with pytest.raises(ValueError, match="map-style"):
        IndexedDataset(iter(samples))


def test_indexed_dataset_reads_a_batch_at_once():
    class Batched(list):
        def __getitems__(self, places):
            return [("at once", place) for place in places]

    assert IndexedDataset(Batched("abc"), [2, 0]).__getitems__([0, 1]) == [(2, ("at once", 2)), (0, ("at once", 0))]
