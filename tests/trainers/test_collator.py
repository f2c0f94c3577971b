"""A batch is what the processor makes of its chats; what cannot be in it is left out whole and said to be."""

import random

import pytest
import torch
from clips import barcode_frame, truncate, write_clip
from PIL import Image
from tiny import tiny_processor
from torch.utils.data import DataLoader

from video_panda import VideoPandaVideoProcessor
from video_panda.trainers import collator as collator_module
from video_panda.trainers.collator import TooLongSampleError, UnreadableSampleError, VideoPandaDataCollator
from video_panda.trainers.samples import IndexedDataset, SampleError, parse_sample


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "wide.mp4", num_frames=48, fps=12, width=96, height=64)
    write_clip(folder / "tall.mp4", num_frames=24, fps=12, width=64, height=96)
    write_clip(folder / "single.mp4", num_frames=1, fps=12)
    truncate(folder / "wide.mp4", folder / "cut.mp4")
    (folder / "text.mp4").write_text("not a clip")
    Image.fromarray(barcode_frame(1, width=96, height=64)).save(folder / "photo.png")
    truncate(folder / "photo.png", folder / "cut.png")
    return folder


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def by_rate():
    """One frame a second: videos differ in their number of frames."""
    processor = tiny_processor()
    processor.video_processor.fps = 1
    return processor


def sample(question, *answers, **visuals):
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": answers[0]}]
    for answer in answers[1:]:
        conversations += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": answer}]
    return {"id": question.split("\n")[-1], "conversations": conversations, **visuals}


WIDE = sample("<video>\nWhat happens?", "A ball rolls.", "The child did.", video="wide.mp4")
TALL = sample("<video>\nWhat is red?", "It </s> is <video> red.", video="tall.mp4")
SINGLE = sample("<video>\nWhat is it?", "Red.", video="single.mp4")
PHOTO = sample("What is on <image> the table?", "A red ball.", image="photo.png")
BOTH = sample(
    "<image><video>\nDo they differ?", "It is red, and so is the green table.", image="photo.png", video="wide.mp4"
)
TEXT = sample("Who threw it?", "The child.")


def reference(processor, root, raw_samples, **processor_kwargs):
    """What the processor gives for the chats, their files named by path."""
    chats = []
    for raw in raw_samples:
        messages = parse_sample(raw).messages
        chats.append(
            [
                {
                    **message,
                    "content": [
                        {**item, "path": str(root / item["path"])} if "path" in item else item
                        for item in message["content"]
                    ],
                }
                for message in messages
            ]
        )
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs=processor_kwargs,
    )
    masks = inputs.pop("assistant_masks")
    return {**inputs, "labels": torch.where(masks == 1, inputs["input_ids"], -100)}


def assert_same(batch, expected):
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize(
    "raw_samples",
    [[WIDE], [TALL, WIDE], [WIDE, SINGLE, TEXT, PHOTO], [BOTH, TEXT, TALL, BOTH], [TEXT], [PHOTO, TEXT]],
    ids=["one", "tall and wide", "mixed, one frame", "mixed", "text", "photo"],
)
def test_a_batch_is_what_the_processor_gives(processor, root, raw_samples):
    batch = VideoPandaDataCollator(processor, root)(raw_samples)
    assert_same(batch, reference(processor, root, raw_samples))
    assert batch["num_samples"] == len(raw_samples)
    assert batch["skipped"] == []
    assert not any(name.startswith("teacher") for name in batch)


def test_videos_of_different_length_are_padded_at_the_end(by_rate, root):
    batch = VideoPandaDataCollator(by_rate, root, teacher_video_processor=teacher())([TALL, WIDE])
    assert_same({k: v for k, v in batch.items() if "teacher" not in k}, reference(by_rate, root, [TALL, WIDE]))
    for prefix in ("", "teacher_"):
        pixels = batch[f"{prefix}pixel_values" + ("" if prefix else "_videos")]
        assert batch[f"{prefix}grid_thw" if prefix else "video_grid_thw"][:, 0].tolist() == [2, 4]
        assert pixels.shape[:2] == (2, 4)
        assert not pixels[0, 2:].any()
        assert pixels[0, :2].flatten(1).any(dim=1).all()


def test_labels_are_the_answers_and_their_end(processor, root):
    batch = VideoPandaDataCollator(processor, root)([WIDE, TALL, TEXT])
    answers = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert answers[0] == " A ball rolls.</s> The child did.</s>"
    assert answers[1] == " It </s> is <video> red.</s>"
    assert (batch["labels"][1] == processor.tokenizer.eos_token_id).sum() == 1  # the answer's own is text
    assert answers[2] == " The child.</s>"
    assert "a curious user and" in processor.decode(batch["input_ids"][0])
    for row, mask in zip(batch["input_ids"], batch["attention_mask"]):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (row[length:] == processor.tokenizer.pad_token_id).all()


def test_options_reach_the_processor(processor, root):
    collate = VideoPandaDataCollator(processor, root, num_frames=5, pad_to_multiple_of=64)
    expected = reference(processor, root, [WIDE, TEXT], num_frames=5, pad_to_multiple_of=64)
    batch = collate([WIDE, TEXT])
    assert_same(batch, expected)
    assert batch["input_ids"].shape[1] % 64 == 0
    assert batch["pixel_values_videos"].shape[1] == 5


def test_every_form_of_a_sample_is_taken(processor, root):
    collate = VideoPandaDataCollator(processor, root)
    expected = collate([WIDE, TEXT])
    for given in ([(3, WIDE), (1, TEXT)], [parse_sample(WIDE, 3), (1, parse_sample(TEXT, 1))]):
        assert_same(collate(given), {name: value for name, value in expected.items() if torch.is_tensor(value)})


def test_a_clip_is_decoded_once_for_all_who_see_it(processor, root, monkeypatch):
    decoded = []
    fetch = type(processor.video_processor).fetch_videos

    def counting(self, path, *arguments, **options):
        decoded.append(path.name)
        return fetch(self, path, *arguments, **options)

    monkeypatch.setattr(type(processor.video_processor), "fetch_videos", counting)
    VideoPandaDataCollator(processor, root, teacher_video_processor=teacher())([WIDE, TALL, BOTH, WIDE])
    assert sorted(decoded) == ["tall.mp4", "wide.mp4"]


# ------------------------------------------------------------------------------------------------------ left out


@pytest.mark.parametrize(
    ("raw", "name", "reason"),
    [
        (sample("<video>\nQ", "A", video="cut.mp4"), "cut.mp4", "is not a video that can be read"),
        (sample("<video>\nQ", "A", video="text.mp4"), "text.mp4", "is a text, expected a video"),
        (sample("<video>\nQ", "A", video="none.mp4"), "none.mp4", "no such file"),
        (sample("<video>\nQ", "A", video="."), "", "got a directory"),
        (sample("<image>\nQ", "A", image="cut.png"), "cut.png", "cannot be decoded"),
        (sample("<image>\nQ", "A", image="A" * 80), "A" * 80, "no such file"),
        ({"id": "Q", "q": "Q", "a": "A", "video_id": "none"}, None, "no such video"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_told(processor, root, raw, name, reason):
    batch = VideoPandaDataCollator(processor, root)([WIDE, (7, raw), TEXT])
    assert_same(batch, reference(processor, root, [WIDE, TEXT]))
    assert batch["num_samples"] == 3
    (record,) = batch["skipped"]
    assert reason in record.pop("reason")
    path = "none" if name is None else str(root / name) if name else str(root)
    assert record == {"index": 7, "id": "Q", "reason_kind": "unreadable", "path": path}
    with pytest.raises(UnreadableSampleError, match=rf"^sample 7 \(id 'Q'\): .* cannot be read: .*{reason}"):
        VideoPandaDataCollator(processor, root, unreadable="error")([WIDE, (7, raw)])


def test_a_sample_with_one_broken_visual_is_left_out_whole(processor, root):
    broken = sample("<image><video>\n<video>", "A", image="photo.png", video=["wide.mp4", "cut.mp4"])
    batch = VideoPandaDataCollator(processor, root, teacher_video_processor=teacher())([broken, broken, TALL])
    expected = VideoPandaDataCollator(processor, root, teacher_video_processor=teacher())([TALL])
    assert_same(batch, {name: value for name, value in expected.items() if torch.is_tensor(value)})
    assert [record["path"] for record in batch["skipped"]] == [str(root / "cut.mp4")] * 2


def test_mistakes_of_the_program_are_not_taken_for_broken_clips(processor, root, monkeypatch):
    def broken(self, *arguments, **options):
        raise TypeError("a mistake")

    collate = VideoPandaDataCollator(processor, root)
    monkeypatch.setattr(type(processor.video_processor), "fetch_videos", broken)
    with pytest.raises(TypeError, match="a mistake"):
        collate([WIDE])
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(type(processor.video_processor), "preprocess", lambda *_, **__: int("no number"))
        with pytest.raises(ValueError, match=r"sample 4 \(id 'What happens\?'\).*invalid literal"):
            collate([(4, WIDE)])
    with pytest.raises(SampleError, match=r"^sample 2 .*`video`"):
        collate([(2, sample("<video>", "A"))])


def lengths(processor, root, raw_samples):
    return reference(processor, root, raw_samples)["attention_mask"].sum(dim=1).tolist()


@pytest.mark.parametrize("pad_to_multiple_of", [None, 32])
def test_a_sample_that_is_too_long_is_left_out_whole(by_rate, root, pad_to_multiple_of):
    raw_samples = [PHOTO, BOTH, WIDE, TEXT, TALL]
    of_photo, of_both, of_wide, of_text, of_tall = lengths(by_rate, root, raw_samples)
    assert max(of_photo, of_text, of_tall) < of_wide < of_both
    collate = VideoPandaDataCollator(by_rate, root, max_length=of_wide, pad_to_multiple_of=pad_to_multiple_of)
    batch = collate(list(enumerate(raw_samples)))
    assert_same(batch, reference(by_rate, root, [PHOTO, WIDE, TEXT, TALL], pad_to_multiple_of=pad_to_multiple_of))
    reason = f"{of_both} tokens, more than max_length={of_wide}"
    assert batch["skipped"] == [
        {"index": 1, "id": "Do they differ?", "reason_kind": "too_long", "path": None, "reason": reason}
    ]
    # The padding that only the left out ones needed goes with them, that of frames too.
    batch = VideoPandaDataCollator(by_rate, root, max_length=of_wide - 1)(raw_samples)
    assert_same(batch, reference(by_rate, root, [PHOTO, TEXT, TALL]))
    assert batch["pixel_values_videos"].shape[1] == 2
    batch = VideoPandaDataCollator(by_rate, root, max_length=of_text)(raw_samples)
    assert_same(batch, reference(by_rate, root, [TEXT]))


def test_a_sample_that_is_too_long_is_an_error_by_choice(processor, root):
    (length,) = lengths(processor, root, [WIDE])
    VideoPandaDataCollator(processor, root, max_length=length, too_long="error")([WIDE])
    collate = VideoPandaDataCollator(processor, root, max_length=length - 1, too_long="error")
    message = rf"^sample 5 \(id 'What happens\?'\): {length} tokens, more than max_length={length - 1}$"
    with pytest.raises(TooLongSampleError, match=message):
        collate([TEXT, (5, WIDE)])


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 8}, {"max_length": 3}])
def test_nothing_left_is_a_row_with_nothing_to_learn(processor, root, options):
    raw = TEXT if "max_length" in options else sample("<video>\nQ", "A", video="cut.mp4")
    batch = VideoPandaDataCollator(processor, root, teacher_video_processor=teacher(), **options)([raw])
    assert set(batch) == {
        *("input_ids", "attention_mask", "labels", "num_samples", "skipped", "teacher_keys", "teacher_features")
    }
    width = options.get("pad_to_multiple_of", 2)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, width)
    assert batch["input_ids"][0, :2].tolist() == [1, 2]
    assert batch["attention_mask"].sum() == 2
    assert (batch["labels"] == -100).all()
    assert (batch["num_samples"], len(batch["skipped"]), batch["teacher_keys"]) == (1, 1, [])


# ------------------------------------------------------------------------------------------------------- teacher


def teacher():
    return VideoPandaVideoProcessor(image_size=56, patch_size=14, downsample_window=1, image_mean=0.5, image_std=0.25)


class Cache:
    """As a `TeacherCache`, in a dictionary."""

    def __init__(self):
        self.features = {}

    def key(self, digest, frame_indices, grid):
        return f"{digest}/{','.join(map(str, frame_indices))}/{grid[0]}x{grid[1]}"

    def get(self, key):
        return self.features.get(key)


def test_a_teacher_sees_the_same_frames_on_its_own_canvas(processor, root):
    collate = VideoPandaDataCollator(processor, root, num_frames=4, teacher_video_processor=teacher())
    batch = collate([WIDE, PHOTO, SINGLE, TALL])
    paths = [root / name for name in ("wide.mp4", "single.mp4", "tall.mp4")]
    expected = teacher()(paths, num_frames=4)
    assert torch.equal(batch["teacher_pixel_values"], expected["pixel_values_videos"])
    assert torch.equal(batch["teacher_grid_thw"], expected["video_grid_thw"])
    assert batch["teacher_keys"] == batch["teacher_features"] == [None] * 3
    assert batch["pixel_values_videos"].shape[:2] == (3, 4)


def test_cached_features_spare_the_teacher(processor, root, monkeypatch):
    from video_panda.processing.sources_video_panda import regular_file

    monkeypatch.setattr(collator_module, "clip_digest", lambda path: regular_file(path).rsplit("/", 1)[1])
    cache = Cache()
    collate = VideoPandaDataCollator(
        processor, root, num_frames=3, teacher_video_processor=teacher(), teacher_cache=cache
    )
    raw_samples = [WIDE, TEXT, SINGLE, TALL]
    batch = collate(raw_samples)
    keys = ["wide.mp4/0,12,36/3x4", "single.mp4/0,0,0/3x4", "tall.mp4/0,11,22/4x3"]
    assert batch["teacher_keys"] == keys
    assert batch["teacher_features"] == [None] * 3
    grids = [tuple(grid) for grid in batch["teacher_grid_thw"].tolist()]
    assert [f"{h}x{w}" for _, h, w in grids] == [key.rsplit("/", 1)[1] for key in keys]

    cache.features[keys[1]] = torch.ones(1, 3, 4, 5)
    again = collate(raw_samples)
    assert again["teacher_features"][1] is cache.features[keys[1]]
    assert (again["teacher_features"][0], again["teacher_features"][2]) == (None, None)
    assert torch.equal(again["teacher_pixel_values"], batch["teacher_pixel_values"][[0, 2]])
    assert torch.equal(again["teacher_grid_thw"], batch["teacher_grid_thw"][[0, 2]])
    for key in keys:
        cache.features[key] = torch.ones(1)
    assert "teacher_pixel_values" not in collate(raw_samples)


# ----------------------------------------------------------------------------------------------------- in workers


def test_workers_collate_and_name_what_is_left_out(processor, root):
    broken = sample("<video>\nQ", "A", video="none.mp4")
    dataset = IndexedDataset([WIDE, broken, TEXT, TEXT])
    collate = VideoPandaDataCollator(processor, root)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=1))
    assert_same(batches[0], reference(processor, root, [WIDE]))
    assert batches[0]["skipped"][0]["index"] == 1
    assert_same(batches[1], reference(processor, root, [TEXT, TEXT]))


def test_the_order_of_a_batch_does_not_matter(processor, root):
    raw_samples = [WIDE, TALL, SINGLE, PHOTO, BOTH, TEXT]
    random.Random(0).shuffle(raw_samples)
    collate = VideoPandaDataCollator(processor, root, max_length=110)
    batch = collate(raw_samples)
    of_each = [collate([raw]) for raw in raw_samples]
    num_skipped = sum(len(each["skipped"]) for each in of_each)
    assert 0 < num_skipped < len(raw_samples)
    assert [record["id"] for record in batch["skipped"]] == [r["id"] for each in of_each for r in each["skipped"]]
    rows = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert rows == [each["input_ids"][0].tolist() for each in of_each if not each["skipped"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "cut"}, "`too_long` must be 'drop' or 'error', got 'cut'"),
        ({"unreadable": "replace"}, "`unreadable` must be 'skip' or 'error', got 'replace'"),
        ({"max_length": 0}, "`max_length` must be a whole number of at least 1, got 0"),
        ({"num_frames": 2.5}, "`num_frames` must be a whole number"),
        ({"pad_to_multiple_of": True}, "`pad_to_multiple_of` must be a whole number"),
        ({"teacher_cache": Cache()}, "`teacher_cache` was given without `teacher_video_processor`"),
        ({"root": "no/such/folder"}, "`root` must be the folder of the videos and pictures, got 'no/such/folder'"),
    ],
)
def test_wrong_options(processor, options, message):
    with pytest.raises(ValueError, match=message):
        VideoPandaDataCollator(processor, **options)
