"""The processor's call: token layout, outputs, what may be given, padding, errors, saving and loading."""

import functools
import http.server
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import barcode_frame, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config, tiny_model, tiny_processor

from video_panda import VideoPandaProcessor
from video_panda.processing import sources_video_panda
from video_panda.processing.geometry_video_panda import num_frame_tokens, token_grid

KINDS = ("byte_bpe", "metaspace_bpe", "words")
TOKENS = ["<video>", "<row>", "<frame>", "<image>"]
TOKENS_PER_SIDE, SIDE_PX = 3, 84


@functools.cache
def shared_processor(kind: str = "byte_bpe", use_row_token: bool = True) -> VideoPandaProcessor:
    """One for the tests that do not change it."""
    return tiny_processor(kind, use_row_token=use_row_token)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """`clip.mp4` (48 frames, 4 s, 96 x 64 px), `tall.mp4` (24 frames, 2 s, 64 x 96 px), `photo.png`."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4", num_frames=48, fps=12, width=96, height=64)
    write_clip(folder / "tall.mp4", num_frames=24, fps=12, width=64, height=96)
    Image.fromarray(barcode_frame(7, width=96, height=64)).save(folder / "photo.png")
    return folder


def black(*shape: int) -> np.ndarray:
    return np.zeros((*shape, 3), dtype=np.uint8)


def chat(*content, answer: str | None = None) -> list[dict]:
    turns = [{"role": "user", "content": list(content)}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def frame_ids(processor, h: int, w: int, kind: str, use_row_token: bool = True) -> list[int]:
    """The rule, written once more: `<frame>`, then h rows of w patches and a `<row>`."""
    frame, row, patch = processor.tokenizer.convert_tokens_to_ids(["<frame>", "<row>", f"<{kind}>"])
    ids = [frame]
    for _ in range(h):
        ids += [patch] * w
        if use_row_token:
            ids.append(row)
    return ids


# ------------------------------------------------------------------------------------------------------ token layout


VISUALS = st.tuples(st.sampled_from(["video", "image"]), st.integers(1, 3), st.integers(5, 24), st.integers(5, 24))
PROMPTS = st.lists(st.lists(VISUALS, max_size=3), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(PROMPTS, st.sampled_from(KINDS), st.booleans(), st.data())
def test_every_visual_becomes_its_tokens_in_order(prompts, kind, use_row_token, data):
    processor = shared_processor(kind, use_row_token)
    texts, expected, videos, images = [], [], [], []
    for visuals in prompts:
        text, ids = "USER: ", []
        for what, num_frames, height, width in visuals:
            text += f"<{what}>" + data.draw(st.sampled_from(["", "\n", " What happens? ", "é"]))
            num_frames = 1 if what == "image" else num_frames
            (images if what == "image" else videos).append(
                black(height, width) if what == "image" else black(num_frames, height, width)
            )
            grid = token_grid(width, height, TOKENS_PER_SIDE)
            ids.append(num_frames * frame_ids(processor, *grid, what, use_row_token))
            assert len(ids[-1]) == num_frames * num_frame_tokens(*grid, use_row_token)
        texts.append(text + "the end")
        expected.append(ids)
    inputs = processor(text=texts, videos=videos or None, images=images or None)

    control = set(processor.tokenizer.convert_tokens_to_ids(TOKENS))
    for row, mask, visuals in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), expected):
        assert [token for token in row if token in control] == list(itertools.chain(*visuals))
        start = 0
        for ids in visuals:  # each visual in one piece
            start = next(place for place in range(start, len(row)) if row[place] in control)
            assert row[start : start + len(ids)] == ids
            start += len(ids)
        num_padding = mask.count(0)
        assert mask == [0] * num_padding + [1] * (len(mask) - num_padding), "padding is on the left"
    assert ("pixel_values" in inputs, "pixel_values_videos" in inputs) == (bool(images), bool(videos))
    assert len(inputs.get("image_grid_thw", [])) == len(images)
    assert len(inputs.get("video_grid_thw", [])) == len(videos)


@pytest.mark.parametrize("use_row_token", [True, False])
def test_there_are_as_many_placeholder_tokens_as_the_model_has_features(use_row_token):
    processor = shared_processor("byte_bpe", use_row_token)
    model = tiny_model(tiny_config(processor.video_token_id, vision={"use_row_token": use_row_token}))
    inputs = processor(
        text=["<video> and <image>", "<image><video> end", "no picture"],
        videos=[black(8, 20, 30), black(4, 30, 20)],
        images=[black(20, 20), black(10, 30)],
    )
    videos = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    images = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    control = torch.tensor(processor.tokenizer.convert_tokens_to_ids(TOKENS))
    counts = torch.isin(inputs["input_ids"], control).sum(dim=1).tolist()
    assert counts == [len(videos[0]) + len(images[0]), len(images[1]) + len(videos[1]), 0]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_the_layout_in_words():
    processor = shared_processor()
    inputs = processor(text="<video>", videos=black(1, 40, 60))
    one = "<frame><video><video><video><row><video><video><video><row>"
    assert processor.decode(inputs["input_ids"][0]) == one
    inputs = processor(text="<image>", images=black(60, 40))
    assert processor.decode(inputs["input_ids"][0]) == "<frame>" + 3 * "<image><image><row>"
    without = shared_processor("byte_bpe", False)
    assert without.decode(without(text="<image>", images=black(60, 40))["input_ids"][0]) == "<frame>" + 6 * "<image>"


def test_the_picture_in_the_docs_is_true():
    picture = (Path(__file__).resolve().parents[2] / "docs" / "frame_tokens.svg").read_text(encoding="utf-8")
    h, w = token_grid(1920, 1080, 16)
    assert picture.count('<use href="#row"') == h == 9
    assert f"({w} + 1) = {num_frame_tokens(h, w)} tokens" in picture


# ----------------------------------------------------------------------------------------------------- keys and shapes


def test_keys_shapes_and_types(media):
    inputs = shared_processor()(
        text=["<video> a <image>", "<video> b"],
        videos=[media / "clip.mp4", media / "tall.mp4"],
        images=media / "photo.png",
        num_frames=6,
    )
    length = inputs["input_ids"].shape[1]
    assert {key: (tuple(value.shape), value.dtype) for key, value in inputs.items()} == {
        "input_ids": ((2, length), torch.int64),
        "attention_mask": ((2, length), torch.int64),
        "pixel_values_videos": ((2, 6, 3, SIDE_PX, SIDE_PX), torch.float32),
        "video_grid_thw": ((2, 3), torch.int64),
        "pixel_values": ((1, 3, SIDE_PX, SIDE_PX), torch.float32),
        "image_grid_thw": ((1, 3), torch.int64),
    }
    assert inputs["video_grid_thw"].tolist() == [[6, 2, 3], [6, 3, 2]]
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 3]]


def test_the_parts_alone(media):
    processor = shared_processor()
    assert set(processor(text="words")) == {"input_ids", "attention_mask"}
    assert set(processor(videos=media / "clip.mp4")) == {"pixel_values_videos", "video_grid_thw"}
    assert set(processor(images=media / "photo.png")) == {"pixel_values", "image_grid_thw"}


def test_token_types_on_request():
    processor = shared_processor()
    inputs = processor(
        text=["a<image>b<video>", "c"],
        images=black(10, 20),
        videos=black(2, 20, 10),
        return_mm_token_type_ids=True,
    )
    types = inputs["mm_token_type_ids"]
    assert types.shape == inputs["input_ids"].shape
    assert types[0].tolist() == [0, *[1] * 9, 0, *[2] * 20], "<frame> and <row> go with their patches"
    assert types[1].sum() == 0
    unpadded = processor(text=["<video>", "c d"], videos=black(1, 20, 10), padding=False, return_tensors=None,
                         return_mm_token_type_ids=True)  # fmt: skip
    assert [len(row) for row in unpadded["mm_token_type_ids"]] == [len(row) for row in unpadded["input_ids"]]
    assert "mm_token_type_ids" not in processor(text="a")


@pytest.mark.parametrize("options", [{"return_metadata": True}, {"videos_kwargs": {"return_metadata": True}}])
def test_video_metadata_on_request(media, options):
    clip = str(media / "clip.mp4")
    inputs = shared_processor()(text="<video>", videos=clip, num_frames=4, **dict(options))
    [metadata] = inputs["video_metadata"]
    assert metadata.frames_indices == [0, 12, 24, 36]
    assert metadata.timestamps == pytest.approx([0, 1, 2, 3])
    assert metadata.video_backend
    [in_chat] = shared_processor().apply_chat_template(
        chat({"type": "video", "path": clip}), tokenize=True, return_dict=True, processor_kwargs=dict(options)
    )["video_metadata"]
    assert len(in_chat.frames_indices) == 8
    assert "video_metadata" not in shared_processor()(text="<video>", videos=clip)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_frames": 4}, [0, 12, 24, 36]),
        ({"fps": 2}, list(range(0, 48, 6))),
        ({"fps": 2, "num_frames": 2}, None),
        ({"frame_indices": [5, 3, 40]}, [5, 3, 40]),
        ({"frame_indices": (5, 3)}, [5, 3]),
        ({"frame_indices": range(2)}, [0, 1]),
        ({"frame_indices": np.arange(3)}, [0, 1, 2]),
        ({"start": 2, "num_frames": 3}, None),
        ({"start": 1.0, "end": 1.5, "do_sample_frames": False}, list(range(12, 18))),
        ({"do_sample_frames": False}, list(range(48))),
        ({"videos_kwargs": {"num_frames": 4}}, [0, 12, 24, 36]),
    ],
    ids=str,
)
def test_which_frames_are_taken_can_be_said_in_both_ways(media, options, expected):
    processor, clip = shared_processor(), str(media / "clip.mp4")
    options = {**options, "return_metadata": True}
    called = processor(text="<video>\nWho?", videos=clip, **options)
    chatted = processor.apply_chat_template(
        chat({"type": "video", "path": clip}, {"type": "text", "text": "Who?"}),
        tokenize=True, return_dict=True, processor_kwargs=options,
    )  # fmt: skip
    chosen = called["video_metadata"][0].frames_indices
    assert chosen == chatted["video_metadata"][0].frames_indices
    if expected is not None:
        assert chosen == expected
    if "start" in options:
        assert min(chosen) >= 12 * options["start"]
    assert called["video_grid_thw"].tolist() == [[len(chosen), 2, 3]]
    torch.testing.assert_close(called["pixel_values_videos"], chatted["pixel_values_videos"], rtol=0, atol=0)
    num_tokens = (called["input_ids"] == processor.video_token_id).sum().item()
    assert num_tokens == len(chosen) * 6 == (chatted["input_ids"] == processor.video_token_id).sum().item()


# ------------------------------------------------------------------------------------------------- what may be given


@pytest.fixture(scope="module")
def one_video_in_many_forms(media):
    """The frames that the processor takes of `clip.mp4`, as everything that may be given."""
    clip = media / "clip.mp4"
    frames, _ = shared_processor().video_processor.fetch_videos(clip)  # (T, H, W, 3)
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    paths = [media / f"frame{number}.png" for number in range(len(pictures))]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    return {
        "path": str(clip),
        "Path": clip,
        "bytes": clip.read_bytes(),
        "array THWC": frames.numpy(),
        "array TCHW": frames.permute(0, 3, 1, 2).numpy(),
        "tensor": frames,
        "float tensor": frames / 255,
        "PIL images": pictures,
        "picture files": [str(path) for path in paths],
        "picture Paths": paths,
        "frame arrays": [frame.numpy() for frame in frames],
    }


FORMS = ["path", "Path", "bytes", "array THWC", "array TCHW", "tensor", "float tensor", "PIL images", "picture files",
         "picture Paths", "frame arrays"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_video_are_the_same_video(one_video_in_many_forms, form):
    processor, video = shared_processor(), one_video_in_many_forms[form]
    expected = processor(text="<video>", videos=one_video_in_many_forms["path"])
    for inputs in (
        processor(text="<video>", videos=video),
        processor(text=["<video>"], videos=[video]),
        processor(text=["<video>"], videos=[[video]]),
        *(
            processor.apply_chat_template(chat({"type": "video", key: video}), tokenize=True, return_dict=True)
            for key in ("video", "path")
        ),
    ):
        torch.testing.assert_close(inputs["pixel_values_videos"], expected["pixel_values_videos"], rtol=0, atol=0)
        assert inputs["video_grid_thw"].tolist() == [[8, 2, 3]]
        count = (inputs["input_ids"] == processor.video_token_id).sum()
        assert count == (expected["input_ids"] == processor.video_token_id).sum()


@pytest.mark.parametrize("form", ["path", "Path", "bytes", "PIL", "array", "tensor"])
def test_all_forms_of_an_image_are_the_same_image(media, form):
    path = media / "photo.png"
    array = np.array(Image.open(path))
    forms = {"path": str(path), "Path": path, "bytes": path.read_bytes(), "PIL": Image.open(path), "array": array}
    image = {**forms, "tensor": torch.tensor(array).permute(2, 0, 1)}[form]
    processor = shared_processor()
    expected = processor(text="<image>", images=str(path))["pixel_values"]
    for inputs in (
        processor(text="<image>", images=image),
        processor(text=["<image>"], images=[[image]]),
        *(
            processor.apply_chat_template(chat({"type": "image", key: image}), tokenize=True, return_dict=True)
            for key in ("image", "path")
        ),
    ):
        torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0)
        assert inputs["image_grid_thw"].tolist() == [[1, 2, 3]]


@pytest.fixture
def web(media, monkeypatch):
    """(address, list of what was asked for) of a server of the media folder."""
    monkeypatch.setattr(sources_video_panda, "is_public_address", lambda address: address == "127.0.0.1")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=media)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(("kind", "name"), [("video", "clip.mp4"), ("image", "photo.png"), ("video", "photo.png")])
def test_urls_are_fetched_only_where_allowed(media, web, kind, name):
    processor, (address, asked) = shared_processor(), web
    url = f"{address}/{name}"
    conversation = chat({"type": kind, "url": url})
    ask = functools.partial(processor.apply_chat_template, conversation, tokenize=True, return_dict=True)
    with pytest.raises(ValueError, match="allow_urls=True"):
        ask()
    with pytest.raises(ValueError, match="allow_urls=True"):
        processor(text=f"<{kind}>", **{f"{kind}s": url})
    assert asked == []
    local = processor(**{f"{kind}s": str(media / name)})
    for inputs in (ask(processor_kwargs={"allow_urls": True}), processor(**{f"{kind}s": url}, allow_urls=True)):
        key = "pixel_values" if kind == "image" else "pixel_values_videos"
        torch.testing.assert_close(inputs[key], local[key], rtol=0, atol=0)
    assert asked == [f"/{name}"] * 2


def test_batches_in_which_some_prompts_have_no_visuals(media):
    processor, clip, photo = shared_processor(), str(media / "clip.mp4"), str(media / "photo.png")
    texts = ["none", "<video> one", "<image> and <video>", "none again"]
    nested = processor(text=texts, videos=[[], [clip], [clip], []], images=[[], [], [photo], []])
    flat = processor(text=texts, videos=[clip, clip], images=photo)
    assert nested.keys() == flat.keys()
    assert all(torch.equal(nested[key], flat[key]) for key in flat)
    assert set(processor(text=["a", "b"], videos=[[], []], images=[[], []])) == {"input_ids", "attention_mask"}

    conversations = [
        [{"role": "user", "content": "words"}],
        chat({"type": "video", "path": clip}, {"type": "text", "text": "Who?"}),
        chat({"type": "image", "path": photo}, {"type": "video", "path": clip}),
    ]
    together = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    for number, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        kept = together["input_ids"][number][together["attention_mask"][number].bool()]
        assert kept.tolist() == alone["input_ids"][0].tolist()


def test_several_pictures_in_a_chat_are_several_videos(media):
    """Side by side in one list, two pictures would be the two frames of one video."""
    photo, clip = str(media / "photo.png"), str(media / "clip.mp4")
    processor = shared_processor()
    for second in (photo, black(20, 30), Image.open(photo), clip):
        items = [{"type": "video", "path": photo}, {"type": "video", "video": second}]
        inputs = processor.apply_chat_template(chat(*items), tokenize=True, return_dict=True)
        assert inputs["video_grid_thw"].tolist() == [[1, 2, 3], [8 if second is clip else 1, 2, 3]]


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_the_call(kind):
    processor = tiny_processor(kind)
    texts = ["What", "What happens in this video ?"]
    left = processor(text=texts)
    processor.tokenizer.padding_side = "right"
    right = processor(text=texts)
    explicit = processor(text=texts, padding_side="left")
    num_padding = left["attention_mask"][0].tolist().count(0)
    assert num_padding > 0
    assert left["attention_mask"][0, :num_padding].sum() == 0 == right["attention_mask"][0, -num_padding:].sum()
    assert (left["input_ids"][0, :num_padding] == processor.tokenizer.pad_token_id).all()
    assert (right["input_ids"][0, -num_padding:] == processor.tokenizer.pad_token_id).all()
    assert torch.equal(explicit["input_ids"], left["input_ids"])
    assert torch.equal(left["input_ids"][0, num_padding:], right["input_ids"][0, :-num_padding])


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "nothing was given"),
        ({"text": "<video>"}, "1 <video> placeholders, but 0 videos"),
        ({"text": "<video><video>", "videos": "missing.mp4"}, "2 <video> placeholders, but 1 videos"),
        ({"text": "<video>", "videos": ["missing.mp4", "missing.mp4"]}, "1 <video> placeholders, but 2 videos"),
        ({"text": "none", "videos": "missing.mp4"}, "0 <video> placeholders, but 1 videos"),
        ({"text": ["<image>", "<image>"], "images": "missing.png"}, "2 <image> placeholders, but 1 images"),
        ({"text": "<image>"}, "1 <image> placeholders, but 0 images"),
        ({"text": "none", "images": [["missing.png"]]}, "0 <image> placeholders, but 1 images"),
        ({"text": "<image>", "images": black(2, 9, 9)}, "1 <image> placeholders, but 2 images"),
        ({"text": "<image>", "images": "missing.png", "videos": "missing.mp4"}, "0 <video> placeholders, but 1 v"),
        ({"text": "a", "audio": np.zeros(9)}, "audio was given"),
        ({"text": 5}, "got int"),
        ({"text": b"<video>"}, "got bytes"),
        ({"text": {"a": 1}}, "got dict"),
        ({"text": ["a", None]}, "got NoneType at 1"),
        ({"text": [["a"]]}, "got list at 0"),
        ({"text": []}, "empty list"),
        ({"text": "a <row> b"}, "<row>, which the processor alone writes"),
        ({"text": "a <frame> b"}, "<frame>, which the processor alone writes"),
        ({"text": "<video>", "videos": [[]]}, "1 <video> placeholders, but 0 videos"),
        ({"text": "<video>", "videos": {"a": 1}}, "got dict"),
        ({"text": "<video>", "videos": black(2, 9, 9), "num_frames": "x"}, "num_frames"),
        ({"text": "<video>", "videos": black(2, 9, 9), "num_frames": 0}, "num_frames"),
        ({"text": "<video>", "videos": black(2, 9, 9), "frame_indices": [2]}, "out of range"),
        ({"text": "a", "padding": "sideways"}, "sideways"),
    ],
    ids=str,
)
def test_bad_calls_are_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        shared_processor()(**call)


@pytest.mark.parametrize("frame", [np.zeros((3, 9, 9, 3), np.uint8), [black(9, 9)]], ids=["array", "list of frames"])
def test_visuals_given_prompt_by_prompt_belong_to_their_prompt(media, frame):
    processor, clip, photo = shared_processor(), str(media / "clip.mp4"), str(media / "photo.png")
    for texts, videos, message in [
        (["<video> A", "<video> B"], [[clip, frame], []], "Prompt 0 holds 1 <video> .* 2 videos were given for it"),
        (["<video> A", "<video> B"], [[], [clip, frame]], "Prompt 0 holds 1 <video> .* 0 videos were given for it"),
        (["a", "<video><video>"], [[frame], [clip]], "Prompt 0 holds 0 <video> .* 1 videos were given for it"),
        (["<video>"], [[clip], []], "videos holds 2 lists, expected one for each of 1 prompts"),
        (["<video>", "<video>"], [[clip, clip]], "videos holds 1 lists, expected one for each of 2 prompts"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(text=texts, videos=videos)
    with pytest.raises(ValueError, match=r"Prompt 0 holds 2 <image> .* 3 images were given for it"):
        processor(text=["<image><image>", "<image>"], images=[[photo, photo, photo], []])
    with pytest.raises(ValueError, match="images holds 2 lists, expected one for each of 1 prompts"):
        processor(text="<image>", images=[[photo], []])
    two = processor(
        text=["<video><video>", "none", "<image>"], videos=[[clip, frame], [], []], images=[[], [], [photo]]
    )
    assert two["video_grid_thw"].shape == (2, 3)
    # Lists of nothing but pictures may as well be the videos of one prompt.
    videos = [[black(9, 9), black(9, 9)], [black(9, 9)]]
    assert processor(text="<video><video>", videos=videos)["video_grid_thw"].tolist() == [[2, 3, 3], [1, 3, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frame": 4}, "VideoPandaProcessor has no option `num_frame`; did you mean `num_frames`.*knows.*fps"),
        ({"videos_kwargs": {"num_frame": 4}}, "videos_kwargs has no option `num_frame`; did you mean `num_frames`"),
        ({"images_kwargs": {"imagesize": 4}}, "images_kwargs has no option `imagesize`; did you mean `image_size`"),
        ({"text_kwargs": {"paddin": True}}, "text_kwargs has no option `paddin`"),
        ({"common_kwarg": {}}, "common_kwarg"),
        ({"num_frames": 1.5}, "num_frames.*1.5"),
    ],
    ids=str,
)
def test_options_that_nobody_knows(options, message):
    with pytest.raises(ValueError, match=message):
        shared_processor()(text="<video>", videos=black(3, 9, 9), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": np.int64(2)},
        {"num_frames": torch.tensor(2)},
        {"frame_indices": [torch.tensor(0), np.int64(2)]},
        {"videos_kwargs": {"frame_indices": np.array([0, 2])}},
        {"videos_kwargs": {"num_frames": np.int32(2)}},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch(options):
    options = {**options, "return_metadata": True, "common_kwargs": {"return_tensors": "pt"}}
    given, clip = shared_processor(), {"type": "video", "video": black(3, 9, 9)}
    for inputs in (
        given(text="<video>", videos=clip["video"], **options),
        given.apply_chat_template(chat(clip), tokenize=True, return_dict=True, processor_kwargs=options),
    ):
        assert inputs["video_metadata"][0].frames_indices == [0, 2]


def test_a_missing_file_is_named():
    for call in ({"text": "<video>", "videos": "no/such.mp4"}, {"text": "<image>", "images": "no/such.mp4"}):
        with pytest.raises(FileNotFoundError, match=r"no/such\.mp4"):
            shared_processor()(**call)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_cut_in_the_middle_of_a_visual_is_refused(side):
    processor = tiny_processor()
    processor.tokenizer.truncation_side = side
    text = "<video> What happens in this video?" if side == "right" else "What happens in this video? <video>"
    call = functools.partial(processor, text=[text, "short"], videos=black(2, 20, 30), truncation=True)
    num_visual = 2 * num_frame_tokens(2, 3)
    for length in (1, 2, num_visual // 2, num_visual - 2, num_visual - 1):
        with pytest.raises(ValueError, match=r"Prompt 0 needs \d+ <\w+> tokens .*max_length"):
            call(max_length=length)
    assert call(max_length=num_visual)["input_ids"].shape == (2, num_visual)
