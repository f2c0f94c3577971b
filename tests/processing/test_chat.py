"""The chat template, the training masks over it, and user text that looks like control tokens."""

import copy
import functools
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_processor
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

from video_panda import VideoPandaProcessor
from video_panda.processing import chat_video_panda, processing_video_panda
from video_panda.processing.chat_video_panda import VICUNA_CHAT_TEMPLATE, check_conversations, count_placeholders

KINDS = ("byte_bpe", "metaspace_bpe", "words")
CONTROL_TOKENS = ("<s>", "</s>", "<unk>", "<video>", "<row>", "<frame>", "<image>")
ASKS = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
TRAINS = ASKS.replace("human", "user")
CLIP = np.zeros((2, 20, 30, 3), dtype=np.uint8)
VIDEO, IMAGE = {"type": "video", "video": CLIP}, {"type": "image", "image": CLIP[0]}


shared_processor = functools.cache(tiny_processor)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def turn(role: str, *content) -> dict:
    return {"role": role, "content": content[0] if content and isinstance(content[0], str) else list(content)}


def encode(kind: str, conversation, **options):
    return shared_processor(kind).apply_chat_template(conversation, tokenize=True, return_dict=True, **options)


def encode_with_masks(kind: str, conversation, **options):
    return encode(kind, conversation, return_assistant_tokens_mask=True, **options)


# --------------------------------------------------------------------------------------------------------- the template


ONE_TURN = [turn("user", VIDEO, text("Who threw it?"))]
TWO_TURNS = [*ONE_TURN, turn("assistant", "The child."), turn("user", "Why?"), turn("assistant", text("For fun."))]


@pytest.mark.parametrize(
    ("conversation", "prompt"),
    [
        (ONE_TURN, f"{TRAINS} USER: <video>\nWho threw it? "),
        (TWO_TURNS[:2], f"{TRAINS} USER: <video>\nWho threw it? ASSISTANT: The child.</s>"),
        (
            TWO_TURNS,
            f"{TRAINS} USER: <video>\nWho threw it? ASSISTANT: The child.</s>USER: Why? ASSISTANT: For fun.</s>",
        ),
        ([turn("system", "Be brief."), *ONE_TURN], "Be brief. USER: <video>\nWho threw it? "),
        ([turn("system", text("Be brief.")), *ONE_TURN], "Be brief. USER: <video>\nWho threw it? "),
        ([turn("user", "Who?")], f"{TRAINS} USER: Who? "),
        ([turn("user", text("Who?"))], f"{TRAINS} USER: Who? "),
        ([turn("user", text("Who"), text(" is it?"))], f"{TRAINS} USER: Who is it? "),
        (
            [turn("user", VIDEO, IMAGE, text("Same?")), turn("assistant", "No."), turn("user", VIDEO, text("Now?"))],
            f"{TRAINS} USER: <video>\n<image>\nSame? ASSISTANT: No.</s>USER: <video>\nNow? ",
        ),
        ([turn("user", text("Before "), VIDEO, text("after"))], f"{TRAINS} USER: Before <video>\nafter "),
    ],
)
def test_the_prompts_of_the_release(conversation, prompt):
    untouched = copy.deepcopy(conversation)
    for processor in map(shared_processor, KINDS):
        assert processor.apply_chat_template(conversation) == "<s>" + prompt
        asks = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert asks == "<s>" + prompt.replace(TRAINS, ASKS) + "ASSISTANT:"
        assert processor.apply_chat_template([conversation, conversation]) == ["<s>" + prompt] * 2
    assert str(conversation) == str(untouched), "the caller's own stays as it was"


def test_the_answer_can_be_continued():
    conversation = [turn("user", "Who?"), turn("assistant", "The ch")]
    processor = shared_processor("byte_bpe")
    prompt = processor.apply_chat_template(conversation, continue_final_message=True)
    assert prompt == f"<s>{ASKS} USER: Who? ASSISTANT: The ch", "as the release asks, since the model is to go on"
    inputs = encode("byte_bpe", [conversation, [*TWO_TURNS[:1], turn("assistant", "A")]], continue_final_message=True)
    assert processor.decode(inputs["input_ids"][0]).endswith(prompt)
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1], "padded on the left"
    with pytest.raises(ValueError, match="continue_final_message"):
        encode_with_masks("byte_bpe", conversation, continue_final_message=True)


def test_the_template_works_without_this_processor_and_others_with_it():
    conversation = [turn("user", "Who?"), turn("assistant", "The ch")]
    tokenizer = shared_processor("byte_bpe").tokenizer
    alone = tokenizer.apply_chat_template(
        conversation, chat_template=VICUNA_CHAT_TEMPLATE, continue_final_message=True, tokenize=False
    )
    assert alone == f"<s>{TRAINS} USER: Who? ASSISTANT: The ch"
    other = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert encode("byte_bpe", conversation, chat_template=other, continue_final_message=True)["input_ids"].numel()


def test_variables_that_our_template_does_not_know_and_options_that_nobody_knows():
    conversation = [turn("user", "Who?")]
    expected = encode("byte_bpe", conversation)
    for known in ({"tools": None}, {"enable_thinking": False}):
        assert torch.equal(encode("byte_bpe", conversation, **known)["input_ids"], expected["input_ids"])
    for wrong in ({"num_frame": 4}, {"processor_kwargs": {"num_frame": 4}}):
        with pytest.raises(ValueError, match="no option `num_frame`; did you mean `num_frames`"):
            encode("byte_bpe", conversation, **wrong)


def test_the_page_shows_the_true_format():
    page = (Path(__file__).resolve().parents[2] / "docs" / "processor.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"```text\n(.*?)\n```", page, flags=re.DOTALL)
    conversation = [
        turn("user", VIDEO, text("What happens?")),
        turn("assistant", "A ball rolls."),
        turn("user", "What colour is it?"),
    ]
    assert shared_processor("byte_bpe").apply_chat_template(conversation, add_generation_prompt=True) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_prompt(kind):
    processor = shared_processor(kind)
    for options in ({}, {"add_generation_prompt": True}):
        prompt = processor.apply_chat_template(TWO_TURNS, **options)
        assert processor.apply_chat_template(TWO_TURNS, tokenize=True, **options).tolist() == (
            processor(text=prompt, videos=[CLIP], add_special_tokens=False)["input_ids"].tolist()
        )


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([turn("tool", "x")], "role tool, expected system"),
        ([turn("user", "x"), turn("system", "y")], "role system, expected system \\(first\\)"),
        ([turn("user", {"type": "pdf", "path": "x.pdf"})], "content of type pdf, expected video, image or text"),
        ([turn("user", {"type": "audio", "url": "http://example.invalid/x.wav"})], "message 0, item 0 is audio"),
        ([turn("user", {"path": "x.mp4"})], "item 0 has no `type`"),
        ([turn("user", "x"), turn("user", VIDEO, "words")], "message 1, item 1"),  # a plain string in the list
        ([turn("user", {"type": "text"})], "expected a string as `text`, got NoneType"),
        ([turn("user", text(5))], "expected a string as `text`, got int"),
        ([{"role": "user"}], "message 0 has no `content`"),
        ([{"role": "user", "contents": "x"}], "message 0 has no `content`"),
        ([{"content": "x"}], "message 0 has no `role`"),
        ([{"role": "user", "content": 5}], "`content` is a int"),
        ([[turn("user", "x")], [{"role": "user"}]], "conversation 1, message 0 has no `content`"),
        ([[turn("user", "x")], []], "empty"),
        ([], "empty"),
        ("words", "is a str"),
        (turn("user", "x"), "is a dict"),
        (["words"], "message 0 is a str"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(conversation, message):
    processor = shared_processor("byte_bpe")
    for options in ({}, {"tokenize": True, "return_dict": True}, {"add_generation_prompt": True}):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation, **options)
    with pytest.raises(ValueError, match=message):
        encode_with_masks("byte_bpe", conversation)


def test_an_item_without_its_file_is_counted():
    with pytest.raises(ValueError, match="1 <video> placeholders, but 0 videos"):
        encode("byte_bpe", [turn("user", {"type": "video"})])
    with pytest.raises(ValueError, match="1 <video> placeholders, but 2 videos"):
        encode("byte_bpe", [turn("user", {"type": "video", "path": "a.mp4", "url": "a.mp4"})])
    with pytest.raises(FileNotFoundError, match=r"no/such\.mp4"):
        encode("byte_bpe", [turn("user", {"type": "video", "path": "no/such.mp4"})])
    with pytest.raises(ValueError, match="load_audio_from_video"):
        encode("byte_bpe", ONE_TURN, load_audio_from_video=True)


def test_openai_image_items_work():
    as_url = {"type": "image_url", "image_url": {"url": "http://example.invalid/a.png"}}
    assert "<image>\nx" in shared_processor("byte_bpe").apply_chat_template([turn("user", as_url, text("x"))])
    with pytest.raises(ValueError, match="allow_urls=True"):
        encode("byte_bpe", [turn("user", as_url)])


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({}, "right"),
        ({"add_generation_prompt": True}, "left"),
        ({"return_assistant_tokens_mask": True}, "right"),
        ({"add_generation_prompt": True, "processor_kwargs": {"padding_side": "right"}}, "right"),
        ({"processor_kwargs": {"padding_side": "left"}}, "left"),
        ({"processor_kwargs": {"text_kwargs": {"padding_side": "left"}}}, "left"),
        ({"return_assistant_tokens_mask": True, "processor_kwargs": {"padding_side": "left"}}, "left"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_to_continue_are_padded_left_and_others_right(kind, options, side):
    conversations = [ONE_TURN, [turn("user", "Hi")], TWO_TURNS]
    given = copy.deepcopy(options)
    inputs = encode(kind, conversations, **options)
    assert options == given, "the caller's options stay as they were"
    for row, mask, conversation in zip(inputs["input_ids"], inputs["attention_mask"], conversations):
        # Only the template's variable decides on the words, so compare with the same one.
        chosen = {key: options[key] for key in ("add_generation_prompt",) if key in options}
        alone = encode(kind, conversation, **chosen)["input_ids"][0].tolist()
        num_padding = len(row) - len(alone)
        padding = [shared_processor(kind).tokenizer.pad_token_id] * num_padding
        assert row.tolist() == (padding + alone if side == "left" else alone + padding)
        zeros, ones = [0] * num_padding, [1] * len(alone)
        assert mask.tolist() == (zeros + ones if side == "left" else ones + zeros)


# ------------------------------------------------------------------------------------------------------- training masks


def answer_ids(kind: str, answer: str) -> list[int]:
    """An answer as it stands behind `ASSISTANT:`, and the end token."""
    tokenizer = shared_processor(kind).tokenizer
    answer = f" {answer}" if kind == "byte_bpe" else answer  # the others see to the space themselves
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def masked_runs(ids, mask) -> list[list[int]]:
    """The token ids of each run of ones."""
    runs, inside = [], False
    for token, value in zip(ids, mask):
        if value and not inside:
            runs.append([])
        if value:
            runs[-1].append(int(token))
        inside = bool(value)
    return runs


CONVERSATIONS_AND_ANSWERS = [
    (TWO_TURNS, ["The child.", "For fun."]),
    ([turn("user", "What is red?"), turn("assistant", "A ball.")], ["A ball."]),
    ([turn("system", "Be brief."), turn("user", IMAGE, VIDEO), turn("assistant", "A red table")], ["A red table"]),
    (ONE_TURN, []),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("question", ["plain", "a </s> <video> <s>?"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_cover_exactly_the_answers_and_their_end(kind, question, side):
    conversations = [conversation for conversation, _ in CONVERSATIONS_AND_ANSWERS]
    conversations = [*conversations, [turn("user", question), turn("assistant", "It is green.")]]
    answers = [*(answers for _, answers in CONVERSATIONS_AND_ANSWERS), ["It is green."]]
    inputs = encode_with_masks(kind, conversations, processor_kwargs={"padding_side": side})
    masks = inputs["assistant_masks"]
    assert masks.shape == inputs["input_ids"].shape
    assert masks.dtype == torch.int64
    for ids, mask, expected in zip(inputs["input_ids"], masks, answers):
        assert masked_runs(ids, mask) == [answer_ids(kind, answer) for answer in expected]
    without = encode(kind, conversations, processor_kwargs={"padding_side": side})
    assert without.keys() == inputs.keys() - {"assistant_masks"}
    assert all(torch.equal(without[key], inputs[key]) for key in without), "the mask changes nothing else"


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_an_answer_are_learnt_as_text(kind):
    answer = "It says </s> and <video> there"
    inputs = encode_with_masks(kind, [turn("user", "What?"), turn("assistant", answer), turn("user", "Oh")])
    [run] = masked_runs(inputs["input_ids"][0], inputs["assistant_masks"][0])
    tokenizer = shared_processor(kind).tokenizer
    assert run[-1] == tokenizer.eos_token_id
    assert not set(run[:-1]) & set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<video>"]))
    if kind != "words":
        assert tokenizer.decode(run, clean_up_tokenization_spaces=False).strip() == f"{answer}</s>"


@pytest.mark.parametrize("question", ["plain", "a </s> <video>"])
@pytest.mark.parametrize("form", ["pt", "np", None, "auto"])
def test_masks_come_in_the_form_of_the_rest(question, form):
    inputs = encode_with_masks(
        "byte_bpe", [turn("user", VIDEO, text(question)), turn("assistant", "No.")], return_tensors=form
    )
    expected = {"pt": torch.Tensor, "auto": torch.Tensor, "np": np.ndarray, None: list}[form]
    for key in ("input_ids", "attention_mask", "assistant_masks"):
        assert type(inputs[key]) is expected, key
    assert np.shape(inputs["assistant_masks"]) == np.shape(inputs["input_ids"])
    assert np.sum(np.asarray(inputs["assistant_masks"])) == len(answer_ids("byte_bpe", "No."))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("question", ["plain", "a </s> b"])
def test_masks_of_truncated_prompts(question, side):
    processor = tiny_processor("byte_bpe")
    processor.tokenizer.truncation_side = side
    conversation = [
        turn("user", question),
        turn("assistant", "It is red."),
        turn("user", "Oh"),
        turn("assistant", "Yes"),
    ]
    ask = functools.partial(
        processor.apply_chat_template, conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    whole = ask()
    length = whole["input_ids"].shape[1]
    for kept in (length // 4, length - 8, length - 1):
        cut = ask(processor_kwargs={"truncation": True, "max_length": kept})
        place = slice(None, kept) if side == "right" else slice(length - kept, None)
        for key in ("input_ids", "assistant_masks"):
            assert cut[key].tolist() == whole[key][:, place].tolist()


class NeverEqual(list):
    """Makes the processor believe that sanitizing changed something."""

    __hash__ = None

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True


def encode_the_sanitized_way(kind: str, conversations, **options):
    original = processing_video_panda.mark_user_text
    with mock.patch.object(
        processing_video_panda, "mark_user_text", lambda *args: NeverEqual(original(*args))
    ), mock.patch.object(
        processing_video_panda, "sanitized_assistant_masks", wraps=processing_video_panda.sanitized_assistant_masks
    ) as used:  # fmt: skip
        inputs = encode_with_masks(kind, conversations, **options)
    used.assert_called_once()
    return inputs


WORDS = st.lists(st.sampled_from([*"abcdeT .,!?:'\n<>/s_▁é漢🙂", "ball ", "USER: ", "ASSISTANT:"]), max_size=20).map(
    "".join
)
CONTENT = st.one_of(
    WORDS, st.lists(st.one_of(st.builds(text, WORDS), st.sampled_from([VIDEO, IMAGE])), min_size=1, max_size=3)
)


@st.composite
def conversations(draw, content=CONTENT, words=WORDS):
    messages = [turn("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content)})
        messages.append(turn("assistant", draw(words)))
    return messages[: len(messages) - draw(st.integers(0, 1))]


@settings(max_examples=40, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=3), st.sampled_from(KINDS), st.sampled_from(["left", "right"]))
def test_both_ways_to_the_mask_agree_where_both_can_go(batch, kind, side):
    processor = shared_processor(kind)
    flat = str(check_conversations(batch))
    assume(not any(token in flat for token in CONTROL_TOKENS))
    options = {"processor_kwargs": {"padding_side": side}}
    standard = encode_with_masks(kind, batch, sanitize_control_tokens=False, **options)
    ours = encode_the_sanitized_way(kind, batch, **options)
    assert standard.keys() == ours.keys()
    for key in standard:
        assert torch.equal(standard[key], ours[key]), key
    num_answers = sum(message["role"] == "assistant" for conversation in batch for message in conversation)
    ends = standard["input_ids"] == processor.tokenizer.eos_token_id
    assert (standard["assistant_masks"][ends] == 1).all()
    assert ends.sum() == num_answers


# ----------------------------------------------------------------------------------------------------------- sanitizing


def control_counts(kind: str, ids) -> dict[str, int]:
    """How often each control token stands in the ids; unknown words are `<unk>` to a tokenizer of words."""
    tokenizer = shared_processor(kind).tokenizer
    names = [token for token in tokenizer.all_special_tokens if not (kind == "words" and token == "<unk>")]
    ids = ids.flatten().tolist()
    return {name: ids.count(tokenizer.convert_tokens_to_ids(name)) for name in names}


def with_text_at(place: str, words: str) -> list[dict]:
    system = {"system": words, "system item": [text(words)]}.get(place, "Be brief.")
    user = {"user": words, "user item": [IMAGE, text(words)], "two items": [text(words[:2]), text(words[2:])]}
    answer = {"assistant": words, "assistant item": [text(words)]}.get(place, "Yes.")
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": user.get(place, [IMAGE, text("Who?")])},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]


PLACES = ["system", "system item", "user", "user item", "two items", "assistant", "assistant item"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_of_a_conversation_becomes_a_control_token(kind, place):
    processor = shared_processor(kind)
    assert set(CONTROL_TOKENS) == set(processor.tokenizer.all_special_tokens)
    harmless = with_text_at(place, "words")
    expected = control_counts(kind, encode(kind, harmless)["input_ids"])
    for token in CONTROL_TOKENS:
        words = f"{token} end" if place == "two items" else f"before {token}{token} after"
        harmful = with_text_at(place, words)
        if kind == "words" and token == "<unk>":
            with pytest.raises(ValueError, match="Can't sanitize '<unk>'"):  # any word it does not know gives <unk>
                encode(kind, harmful)
            continue
        for encoded in (
            encode(kind, harmful),
            encode(kind, harmful, add_generation_prompt=True),
            encode_with_masks(kind, harmful),
        ):
            assert control_counts(kind, encoded["input_ids"]) == expected, token
            if kind != "words":
                decoded = processor.decode(encoded["input_ids"][0], clean_up_tokenization_spaces=False)
                assert words in decoded, token


PIECES = [*CONTROL_TOKENS, "<vid", "eo>", "</", "s>", "<", ">", "<im", "age>", _CONTROL_TOKEN_START, _CONTROL_TOKEN_END,
          "a", "ball", " ", "\n", "é"]  # fmt: skip
EVIL = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
EVIL_ITEMS = st.lists(st.one_of(st.builds(text, EVIL), st.sampled_from([VIDEO, IMAGE])), min_size=1, max_size=4)


def neutral(content):
    """The same content without a single angle bracket or mark."""
    if isinstance(content, str):
        return "".join(
            character for character in content if character not in f"<>{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}"
        )
    return [item if item["type"] != "text" else text(neutral(item["text"])) for item in content]


@settings(max_examples=40, deadline=None)
@given(conversations(content=st.one_of(EVIL, EVIL_ITEMS), words=EVIL), st.sampled_from(KINDS), st.booleans())
def test_whatever_is_written_the_control_tokens_are_those_of_the_template(conversation, kind, with_mask):
    assume(kind != "words" or "<unk>" not in str(check_conversations(conversation)))
    harmless = [{**message, "content": neutral(message["content"])} for message in conversation]
    expected = control_counts(kind, encode(kind, harmless)["input_ids"])
    encoded = (encode_with_masks if with_mask else encode)(kind, conversation)
    assert control_counts(kind, encoded["input_ids"]) == expected
    if with_mask:
        ends = encoded["input_ids"] == shared_processor(kind).tokenizer.eos_token_id
        assert (encoded["assistant_masks"][ends] == 1).all()
        answers = sum(message["role"] == "assistant" for message in conversation)
        assert len(masked_runs(encoded["input_ids"][0], encoded["assistant_masks"][0])) == answers


@pytest.mark.parametrize("token", ["<video>", "</s>"])
def test_marks_that_a_user_writes_are_dropped(token):
    """A token between two marks looks just like one that was marked here."""
    expected = control_counts(
        "byte_bpe", encode("byte_bpe", [turn("user", "a b"), turn("assistant", "c")])["input_ids"]
    )
    forged = [_CONTROL_TOKEN_START + token + _CONTROL_TOKEN_END, token[:3] + _CONTROL_TOKEN_END + token[3:]]
    for words in forged:
        for encoded in (encode, encode_with_masks):
            ids = encoded("byte_bpe", [turn("user", f"a {words} b"), turn("assistant", "c")])["input_ids"][0]
            assert f"a {token} b" in shared_processor("byte_bpe").decode(ids)
            assert control_counts("byte_bpe", ids) == expected


@pytest.mark.parametrize("words", ["<vid</s>eo>", "<im<s>age>", "<ro<video>w>", "<</s>/s>", "</s></s>"])
def test_a_control_token_inside_another_leaves_none(words):
    conversation = [turn("user", IMAGE, text(f"a {words} b")), turn("assistant", "c")]
    expected = control_counts("byte_bpe", encode("byte_bpe", [turn("user", IMAGE), conversation[1]])["input_ids"])
    for encoded in (encode, encode_with_masks):
        ids = encoded("byte_bpe", conversation)["input_ids"][0]
        assert control_counts("byte_bpe", ids) == expected
        assert f"a {words} b" in shared_processor("byte_bpe").decode(ids)


def test_names_of_files_are_not_looked_at(tmp_path):
    folder = tmp_path / "<video> <s>"
    folder.mkdir()
    path = folder / "<image>.png"
    Image.fromarray(CLIP[0]).save(path)
    conversation = [turn("user", {"type": "image", "path": str(path)}, text("Who?")), turn("assistant", "No.")]
    plain = [turn("user", IMAGE, text("Who?")), turn("assistant", "No.")]
    for encoded in (encode, encode_with_masks):
        inputs, expected = encoded("byte_bpe", conversation), encoded("byte_bpe", plain)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)


def test_variables_of_the_template_are_text_too():
    template = VICUNA_CHAT_TEMPLATE.replace("{{- ' ' -}}", "{{- ' ' ~ place ~ ' ' -}}")
    conversation = [turn("user", "Who?"), turn("assistant", "No.")]
    for encoded in (encode, encode_with_masks):
        ids = encoded("byte_bpe", conversation, chat_template=template, place="</s><video>")["input_ids"]
        assert control_counts("byte_bpe", ids)["</s>"] == 1
        assert control_counts("byte_bpe", ids)["<video>"] == 0
    inputs = encode_with_masks("byte_bpe", conversation, chat_template=template, place="</s><video>")
    [run] = masked_runs(inputs["input_ids"][0], inputs["assistant_masks"][0])
    assert run == answer_ids("byte_bpe", "No.")


@pytest.mark.parametrize(("question", "answer"), [("red", " b"), ("red b", "a"), ("red", " ba")])
def test_a_token_that_reaches_over_an_end_of_the_answer_belongs_to_it(question, answer):
    """Only another template can do this: ours ends an answer with a control token."""
    rest = " ball".removeprefix(question[3:] + answer)
    template = (
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{- message['content'] -}}{%- else -%}"
        "{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}{{- '"
        + rest
        + "' -}}{%- endif -%}{%- endfor -%}"
    )
    conversation = [turn("user", question), turn("assistant", answer)]
    standard = encode_with_masks("byte_bpe", conversation, chat_template=template)
    ours = encode_the_sanitized_way("byte_bpe", conversation, chat_template=template)
    assert shared_processor("byte_bpe").tokenizer.convert_ids_to_tokens(ours["input_ids"][0])[-1] == "Ġball"
    assert ours["assistant_masks"].tolist() == standard["assistant_masks"].tolist()
    assert ours["assistant_masks"][0, -1] == 1
    assert ours["assistant_masks"].sum() == 1


def test_a_template_without_bos_gets_none():
    template = VICUNA_CHAT_TEMPLATE.replace("{{- bos_token -}}", "")
    for words in ("Who?", "Who </s>?"):
        for encoded in (encode, encode_with_masks):
            ids = encoded("metaspace_bpe", [turn("user", words), turn("assistant", "No.")], chat_template=template)
            assert control_counts("metaspace_bpe", ids["input_ids"])["<s>"] == 0


def test_sanitizing_can_be_switched_off():
    conversation = [turn("user", "a </s> b"), turn("assistant", "c")]
    for encoded in (encode, encode_with_masks):
        ids = encoded("byte_bpe", conversation, sanitize_control_tokens=False)["input_ids"]
        assert control_counts("byte_bpe", ids)["</s>"] == 2
    with pytest.raises(ValueError, match="1 <video> placeholders, but 0 videos"):
        encode("byte_bpe", [turn("user", "<video>")], sanitize_control_tokens=False)


def test_marked_placeholders_do_not_count():
    marked = f"{_CONTROL_TOKEN_START}<video>{_CONTROL_TOKEN_END}"
    assert count_placeholders(f"<video> {marked} <video><image>", "<video>") == 2
    assert count_placeholders(marked, "<video>") == 0


# -------------------------------------------------------------------------------------------------- transformers' hooks


@pytest.mark.parametrize(
    "name", ["encode_marked_chat", "mark_control_tokens", "render_jinja_template", "_get_control_token_patterns"]
)
def test_the_private_functions_of_transformers_are_still_there_and_used(name):
    with mock.patch.object(chat_video_panda, name, wraps=getattr(chat_video_panda, name)) as used:
        encode_with_masks("byte_bpe", [turn("user", "a </s> b"), turn("assistant", "c")])
    used.assert_called()


def test_the_tokenizer_says_what_a_control_token_is():
    tokenizer = shared_processor("byte_bpe").tokenizer
    assert set(tokenizer._get_control_tokens(VICUNA_CHAT_TEMPLATE)) == set(CONTROL_TOKENS)
    assert "_get_control_tokens" in vars(PreTrainedTokenizerBase)
    assert issubclass(VideoPandaProcessor, ProcessorMixin)
