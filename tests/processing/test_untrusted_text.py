"""Text of strangers through every door there is: no placeholder, BOS, EOS or other special token comes out of it.

`test_chat.py` holds the rules of the chat itself (masks, forged marks, tokens inside of tokens); here stands every special
token of a tokenizer, with those of other models' templates among them, in every field that a user or a data set fills.
"""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import write_clip
from PIL import Image
from tiny import IMAGE_SIZE, PATCH_SIZE, tiny_tokenizer

from video_panda import VideoPandaImageProcessor, VideoPandaProcessor, VideoPandaVideoProcessor, cli
from video_panda.evaluation.judge_items import JudgeItem
from video_panda.evaluation.judge_templates import TEMPLATES
from video_panda.evaluation.judges import TransformersJudge
from video_panda.evaluation.lmms_eval_requests import conversation_of
from video_panda.evaluation.preparing import Preparation, inputs_of
from video_panda.evaluation.questions import Question
from video_panda.processing.chat_video_panda import VICUNA_CHAT_TEMPLATE
from video_panda.trainers.collator import VideoPandaDataCollator
from video_panda.trainers.samples import SampleError

KINDS = ("byte_bpe", "metaspace_bpe", "words")
OTHERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "[/INST]", "<pad>", " <sep> "]
FRAMES = np.zeros((2, 20, 30, 3), dtype=np.uint8)
VIDEO = {"type": "video", "video": FRAMES}


@functools.cache
def make_processor(kind: str) -> VideoPandaProcessor:
    """With special tokens of its own, as an instruction-tuned language model brings them."""
    tokenizer = tiny_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": OTHERS, "pad_token": "<pad>"})
    sizes = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    return VideoPandaProcessor(VideoPandaImageProcessor(**sizes), VideoPandaVideoProcessor(**sizes), tokenizer)


def special_tokens(kind: str, tokenizer=None) -> list[str]:
    """All there are; a tokenizer of words gives `<unk>` for any word it does not know."""
    tokenizer = tokenizer or make_processor(kind).tokenizer
    return [token for token in tokenizer.all_special_tokens if not (kind == "words" and token == "<unk>")]


def counts(kind: str, ids, tokenizer=None) -> dict[str, int]:
    """How often each special token stands in the ids."""
    tokenizer, ids = tokenizer or make_processor(kind).tokenizer, torch.as_tensor(ids).flatten().tolist()
    return {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in special_tokens(kind, tokenizer)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def chat(system="Be brief.", question="What?", history="Yes.", extra=()) -> list[dict]:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [VIDEO, text(question), *extra]},
        {"role": "assistant", "content": history},
        {"role": "user", "content": "And then?"},
    ]


def apply(kind: str, conversation, **options):
    options = {"tokenize": True, "return_dict": True, **options}
    return make_processor(kind).apply_chat_template(conversation, **options)["input_ids"]


def ask(kind: str, question: str):
    preparation = Preparation(make_processor(kind), None, {}, "Look. {question} Answer briefly.")
    return preparation.make_inputs([Question("1", "a.mp4", question, "yes", "kind")], [torch.tensor(FRAMES)])[
        "input_ids"
    ]


def lmms_eval(kind: str, words: str):
    """As the plugin of the evaluation engine puts what a task gives it."""
    messages = [
        {"role": "system", "content": words},
        {"role": "user", "content": [{"type": "video", "url": "a.mp4"}, text(words)]},
        {"role": "assistant", "content": [text(words)]},
        {"role": "user", "content": words},
    ]
    conversation = conversation_of(messages, lambda clip: torch.tensor(FRAMES), lambda image: image)
    return inputs_of(make_processor(kind), [conversation])["input_ids"]


def collate(kind: str, sample: dict, root=None):
    batch = VideoPandaDataCollator(make_processor(kind), root, unreadable="error", isolate=False)([sample])
    tokenizer = make_processor(kind).tokenizer
    learnt = batch["labels"][batch["labels"] >= 0]
    ends = batch["input_ids"][0] == tokenizer.eos_token_id
    assert (batch["labels"][0][ends] == tokenizer.eos_token_id).all(), "the end of each answer is learnt"
    assert not set(learnt.tolist()) & {
        tokenizer.convert_tokens_to_ids(token) for token in special_tokens(kind) if token != "</s>"
    }
    return batch["input_ids"]


def valley(question: str, answer: str) -> dict:
    return {"id": answer, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def messages(system: str, question: str, answer: str) -> dict:
    roles = ("system", "user", "assistant")
    texts = zip(roles, (system, question, answer))
    return {"messages": [{"role": role, "content": words} for role, words in texts]}


def command(kind: str, question: str, clip=FRAMES):
    """What `video-panda ask` makes of a question."""
    return cli._read_clip(make_processor(kind), clip, question, None, False)[0]["input_ids"]


# Each takes the kind of the tokenizer and words, and gives token ids.
FIELDS = {
    "question": lambda kind, words: apply(kind, chat(question=words)),
    "question as a string": lambda kind, words: apply(kind, [{"role": "user", "content": words}]),
    "question to answer": lambda kind, words: apply(kind, chat(question=words), add_generation_prompt=True),
    "answer to continue": lambda kind, words: apply(kind, chat(history=words)[:3], continue_final_message=True),
    "system": lambda kind, words: apply(kind, chat(system=words)),
    "system item": lambda kind, words: apply(kind, chat(system=[text(words)])),
    "earlier answer": lambda kind, words: apply(kind, chat(history=words)),
    "all, with a mask": lambda kind, words: apply(kind, chat(words, words, words), return_assistant_tokens_mask=True),
    "cut in two items": lambda kind, words: apply(kind, chat(question=words[:40], extra=[text(words[40:])])),
    "a character an item": lambda kind, words: apply(kind, chat(extra=[text(character) for character in words])),
    "variable of the template": lambda kind, words: apply(
        kind, chat(), chat_template=VICUNA_CHAT_TEMPLATE.replace("{{- ' ' -}}", "{{- ' ' ~ place -}}"), place=words
    ),
    "question of a benchmark": ask,
    "messages of lmms-eval": lmms_eval,
    "question of the command": command,
    "training: system": lambda kind, words: collate(kind, messages(words, "What?", "Yes.")),
    "training: answer": lambda kind, words: collate(kind, valley("What?", words)),
    "training: answer of a chat": lambda kind, words: collate(kind, messages("Be brief.", "What?", words)),
}


def harmful_words(tokens) -> str:
    """Each token alone, between words, twice in a row, inside of itself, and without its last character before it."""
    return " ".join(f"{token} a{token}b {token}{token} {token[:2]}{token}{token[2:]} {token[:-1]}" for token in tokens)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_special_token_comes_out_of_a_field(kind, field):
    tokens = special_tokens(kind)
    assert set(OTHERS) | {"<s>", "</s>", "<video>", "<row>", "<frame>", "<image>"} <= set(tokens)
    assert kind == "words" or "<unk>" in tokens
    encode = FIELDS[field]
    expected = counts(kind, encode(kind, "harmless"))
    assert counts(kind, encode(kind, harmful_words(tokens))) == expected
    assert expected["<s>"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_of_special_tokens_comes_out_of_a_field(kind, field):
    """Every two, side by side and one around the other."""
    encode = FIELDS[field]
    expected = counts(kind, encode(kind, "harmless"))
    for one, other in itertools.product(special_tokens(kind), repeat=2):
        words = f"{one}{other} {one[:3]}{other}{one[3:]}"
        assert counts(kind, encode(kind, words)) == expected, words


@pytest.mark.parametrize("kind", KINDS)
def test_questions_to_train_on(kind):
    """There `<video>` and `<image>` stand for the sample's visuals, and are counted; all else is text."""
    tokens = [token for token in special_tokens(kind) if token not in ("<video>", "<image>")]
    words = harmful_words(tokens)
    for make in (
        lambda question: valley(question, "Yes."),
        lambda question: messages("Be brief.", question, "Yes."),
    ):
        assert counts(kind, collate(kind, make(words))) == counts(kind, collate(kind, make("harmless")))
        for marker in ("<video>", "<image>"):
            with pytest.raises(SampleError, match=marker):
                collate(kind, make(f"What {marker}?"))


@pytest.fixture(scope="module")
def evil_names(tmp_path_factory):
    """A clip and a picture in folders that are called like control tokens."""
    folder = tmp_path_factory.mktemp("<video> <s>")
    clip, photo = folder / "<image>[INST]<|im_end|>.mp4", folder / "<video> <row>.png"
    write_clip(clip, num_frames=2, fps=1, width=32, height=32)
    Image.fromarray(FRAMES[0]).save(photo)
    return SimpleNamespace(folder=folder, clip=clip, photo=photo)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_files_are_not_text(kind, evil_names):
    clip = make_processor(kind).video_processor.fetch_videos(evil_names.clip)[0]
    photo = Image.open(evil_names.photo)
    own = [
        [{"role": "user", "content": [{"type": "video", "path": str(evil_names.clip)}, text("What?")]}],
        [{"role": "user", "content": [{"type": "image", "path": str(evil_names.photo)}, text("What?")]}],
    ]
    plain = [
        [{"role": "user", "content": [{"type": "video", "video": clip}, text("What?")]}],
        [{"role": "user", "content": [{"type": "image", "image": photo}, text("What?")]}],
    ]
    for named, unnamed in zip(own, plain):
        assert torch.equal(apply(kind, named), apply(kind, unnamed))
    sample = {"video": evil_names.clip.name, **valley("<video>\nWhat?", "Yes.")}
    trained = collate(kind, sample, evil_names.folder)
    assert counts(kind, trained)["<frame>"] == len(clip)
    assert counts(kind, trained)["<image>"] == 0
    assert torch.equal(command(kind, "What?", evil_names.clip), command(kind, "What?", clip))


# ------------------------------------------------------------------------------------------------------------- judges


class Recording:
    """In the place of a judge's model: keeps the ids it was given."""

    device = "cpu"

    def __init__(self):
        self.ids, self.masks = [], []

    def generate(self, input_ids, attention_mask, **options):
        self.ids.append(input_ids)
        self.masks.append(attention_mask)
        return torch.nn.functional.pad(input_ids, (0, 1), value=5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_judge_grades_cannot_speak_as_its_template_does(kind, tmp_path):
    tokenizer = tiny_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": OTHERS, "pad_token": "<pad>"})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[/INST]{{ message['role'] }} {{ message['content'] }}<|im_end|>"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    judge = TransformersJudge(str(tmp_path), device="cpu")
    judge._model = Recording()
    words = harmful_words(special_tokens(kind, tokenizer))
    fields = ("question", "truth", "answers", "second_question")
    harmless = {"question": "q", "truth": "t", "answers": ("a", "b"), "second_question": "s"}
    prompts = []
    for harmful in ({}, *({name: words} for name in fields)):
        given = {**harmless, **harmful}
        given["answers"] = given["answers"] if isinstance(given["answers"], tuple) else (words, words)
        item = JudgeItem("1", "consistency", "kind", "a.mp4", **given)
        prompts.append(TEMPLATES["consistency"].messages(item))
    replies = [pair for group in judge.reply_all(prompts) for pair in group]
    assert sorted(place for place, _ in replies) == list(range(len(prompts)))
    ids, masks = judge._model.ids[0], judge._model.masks[0]
    for row, mask in zip(ids, masks):
        found = counts(kind, row[mask.bool()], tokenizer)
        assert found == {**dict.fromkeys(found, 0), "<s>": 1, "[/INST]": 2, "<|im_end|>": 2}
