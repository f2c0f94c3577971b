"""The processor's tokenizer, saving and loading, and the hooks of transformers it hangs on."""

import ast
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_processor, tiny_tokenizer, write_tiny_checkpoint
from transformers import AddedToken, AutoProcessor
from transformers.processing_utils import ProcessorMixin

from video_panda import VideoPandaImageProcessor, VideoPandaProcessor, VideoPandaVideoProcessor
from video_panda.processing import processing_video_panda

KINDS = ("byte_bpe", "metaspace_bpe", "words")
TOKENS = ["<video>", "<row>", "<frame>", "<image>"]
SIDE_PX = 84

shared_processor = functools.cache(tiny_processor)


def black(*shape: int) -> np.ndarray:
    return np.zeros((*shape, 3), dtype=np.uint8)


def chat(*content, answer: str | None = None) -> list[dict]:
    turns = [{"role": "user", "content": list(content)}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


# ------------------------------------------------------------------------------------------------------- the tokenizer


def test_exactly_one_bos_where_the_tokenizer_adds_its_own():
    processor = shared_processor("metaspace_bpe")
    bos = processor.tokenizer.bos_token_id
    assert processor(text="plain")["input_ids"][0].tolist().count(bos) == 1
    turns = chat({"type": "text", "text": "Who?"}, answer="It is red.")
    for options in ({}, {"add_generation_prompt": True}, {"return_assistant_tokens_mask": True}):
        inputs = processor.apply_chat_template([turns, turns], tokenize=True, return_dict=True, **options)
        for row in inputs["input_ids"].tolist():
            assert row[0] == bos
            assert row.count(bos) == 1
    harmful = chat({"type": "text", "text": "Who? </s>"}, answer="It is red.")
    for options in ({}, {"return_assistant_tokens_mask": True}):
        inputs = processor.apply_chat_template(harmful, tokenize=True, return_dict=True, **options)
        assert inputs["input_ids"][0].tolist().count(bos) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_placeholders_are_appended_in_order(kind):
    num_tokens = len(tiny_tokenizer(kind))
    processor = tiny_processor(kind)
    ids = processor.tokenizer.convert_tokens_to_ids(TOKENS)
    assert ids == list(range(num_tokens, num_tokens + 4))
    assert ids == [
        processor.video_token_id, processor.row_token_id, processor.frame_token_id, processor.image_token_id
    ]  # fmt: skip
    assert len(processor.tokenizer) == num_tokens + 4
    again = VideoPandaProcessor(processor.image_processor, processor.video_processor, processor.tokenizer)
    assert len(again.tokenizer) == num_tokens + 4
    assert again.tokenizer.convert_tokens_to_ids(TOKENS) == ids


@pytest.mark.parametrize("special", [True, False])
def test_placeholders_that_the_tokenizer_has_already_keep_their_ids(special):
    tokenizer = tiny_tokenizer()
    num_tokens = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<frame>", special=special), AddedToken("<mine>", special=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<other>"]}, replace_extra_special_tokens=False)
    parts = shared_processor()
    processor = VideoPandaProcessor(parts.image_processor, parts.video_processor, tokenizer)
    assert processor.frame_token_id == num_tokens
    assert [processor.video_token_id, processor.row_token_id, processor.image_token_id] == [
        num_tokens + 3, num_tokens + 4, num_tokens + 5
    ]  # fmt: skip
    assert {*TOKENS, "<other>"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.added_tokens_decoder[num_tokens].special
    inputs = processor(text="a<image>b", images=black(20, 20))
    assert inputs["input_ids"][0].tolist().count(processor.frame_token_id) == 1
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("present", "expected"),
    [({}, "<unk>"), ({"unk_token": None}, "</s>"), ({"pad_token": "<s>"}, "<s>")],
    ids=["unknown token", "end token", "its own"],
)
def test_the_padding_token(present, expected):
    tokenizer = tiny_tokenizer()
    for name, value in present.items():
        setattr(tokenizer, name, value)
    sizes = {"image_size": SIDE_PX, "patch_size": 14}
    VideoPandaProcessor(VideoPandaImageProcessor(**sizes), VideoPandaVideoProcessor(**sizes), tokenizer)
    assert tokenizer.pad_token == expected


# ------------------------------------------------------------------------------------------------------ save and load


def same_outputs(one: VideoPandaProcessor, other: VideoPandaProcessor) -> None:
    conversation = chat({"type": "video", "video": black(9, 20, 30)}, {"type": "text", "text": "Who?"})
    conversation = [conversation, chat({"type": "image", "image": black(30, 20)}, answer="A ball.")]
    for options in ({"add_generation_prompt": True}, {"return_assistant_tokens_mask": True}):
        inputs = [
            processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)
            for processor in (one, other)
        ]
        assert inputs[0].keys() == inputs[1].keys()
        assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_row_token", [True, False])
def test_a_saved_processor_comes_back_the_same(tmp_path, kind, use_row_token):
    processor = tiny_processor(kind, use_row_token=use_row_token)
    processor.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VideoPandaProcessor.from_pretrained(tmp_path)
    assert loaded.use_row_token is use_row_token
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token == processor.tokenizer.pad_token
    assert len(loaded.tokenizer) == len(processor.tokenizer)
    same_outputs(processor, loaded)
    loaded.save_pretrained(tmp_path / "again")
    same_outputs(processor, VideoPandaProcessor.from_pretrained(tmp_path / "again"))


def test_what_was_set_is_saved(tmp_path):
    processor = tiny_processor(chat_template="{{ messages[0]['content'] }}")
    processor.video_processor.num_frames = 3
    processor.save_pretrained(tmp_path)
    loaded = VideoPandaProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "any", "content": "words"}]) == "words"
    assert loaded(text="<video>", videos=black(9, 20, 20))["video_grid_thw"].tolist() == [[3, 3, 3]]


def test_auto_processor_of_a_checkpoint_needs_no_flag(tmp_path):
    write_tiny_checkpoint(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VideoPandaProcessor
    same_outputs(tiny_processor(), loaded)


def test_another_video_processor_is_refused():
    parts = shared_processor()
    with pytest.raises(TypeError, match="VideoPandaVideoProcessor, got str"):
        VideoPandaProcessor(parts.image_processor, "nothing", parts.tokenizer)


def test_the_version_is_checked_before_what_needs_it_is_imported():
    """An older transformers fails at the imports, with words that do not say what to do."""
    tree = ast.parse(Path(processing_video_panda.__file__).read_text(encoding="utf-8"))
    [place] = [number for number, node in enumerate(tree.body) if "id='require_version'" in ast.dump(node)]
    before = [node.module for node in tree.body[:place] if isinstance(node, ast.ImportFrom)]
    assert not [
        name for name in before if name.startswith(("transformers", "huggingface_hub")) and "versions" not in name
    ]
    assert all(node.level == 0 for node in tree.body[:place] if isinstance(node, ast.ImportFrom))


# ----------------------------------------------------------------------------------------------- transformers' hooks


OVERRIDDEN = ["_get_arguments_from_pretrained", "check_argument_for_proper_class", "_process_videos", "_process_images",
              "prepare_inputs_layout", "validate_inputs", "replace_video_token", "replace_image_token",
              "get_text_with_replacements", "_check_special_mm_tokens", "create_mm_token_type_ids",
              "_adjust_assistant_masks_indices"]  # fmt: skip
USED = ["_normalize_conversations", "_resolve_chat_template"]


@pytest.mark.parametrize("name", OVERRIDDEN + USED)
def test_the_hooks_of_transformers_are_still_there_and_called(name, tmp_path, monkeypatch):
    """A hook that transformers renames would be overridden for nothing, and nobody would notice."""
    assert callable(getattr(ProcessorMixin, name))
    if name in OVERRIDDEN:
        assert name in vars(VideoPandaProcessor)
    calls = []
    original = VideoPandaProcessor.__dict__.get(name) or ProcessorMixin.__dict__[name]
    function = original.__func__ if isinstance(original, classmethod) else original

    def recorded(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(VideoPandaProcessor, name, type(original)(recorded) if function is not original else recorded)
    tiny_processor().save_pretrained(tmp_path)
    processor = VideoPandaProcessor.from_pretrained(tmp_path)
    items = [{"type": "video", "video": black(2, 9, 9)}, {"type": "image", "image": black(9, 9)}]
    processor.apply_chat_template(
        chat(*items, answer="yes"), tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        processor_kwargs={"return_mm_token_type_ids": True},
    )  # fmt: skip
    assert calls
