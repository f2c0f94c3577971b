"""The prompt format of the release (Vicuna v1.1), what a conversation must look like, and the training mask."""

import re
from collections.abc import Mapping

from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_START,
    _get_control_token_patterns,
    encode_marked_chat,
    mark_control_tokens,
    render_jinja_template,
)

from .video_inputs_video_panda import is_frame

# PARITY: the release asks with "a curious human" in the system sentence and trains with "a curious user".
# A visual stands on a line of its own in front of the question; `generation` marks what training learns from.
VICUNA_CHAT_TEMPLATE = """\
{%- set person = 'human' if add_generation_prompt or continues_answer else 'user' -%}
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for item in content -%}
{%- if item['type'] == 'video' -%}{{ '<video>\\n' }}
{%- elif item['type'] == 'image' -%}{{ '<image>\\n' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] }}
{%- else -%}{{ raise_exception('content of type ' ~ item['type'] ~ ', expected video, image or text') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages and messages[0]['role'] == 'system' -%}
{{- render(messages[0]['content']) -}}
{%- set messages = messages[1:] -%}
{%- else -%}
{{- 'A chat between a curious ' ~ person ~ ' and an artificial intelligence assistant. The assistant gives helpful, '
    ~ 'detailed, and polite answers to the ' ~ person ~ '\\'s questions.' -}}
{%- endif -%}
{{- ' ' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' ~ render(message['content']) ~ ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' ~ render(message['content']) ~ eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception('role ' ~ message['role'] ~ ', expected system (first), user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


_NOTHING = re.compile("(?!)")


def check_conversations(conversation) -> list:
    """Check a conversation, or a list of them, before its files are opened; the caller's own stays as it was.

    transformers would stumble over what is misspelt, leave out a question of unknown form in silence, and open audio files,
    from URLs too, before it finds that the template knows no audio. What roles and types there are says the template.

    Args:
        conversation: messages, mappings with `role` and `content` (a string or a list of items); or a list of such lists.

    Returns:
        The same, where the value of a video item that is one picture became a list of this one frame (pictures of
        several items would otherwise be the frames of one video), and texts that follow each other became one.

    Raises:
        ValueError: not a conversation; says which message and what was expected.
    """
    expected = "expected a list of messages, or a list of such lists"
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(f"The conversation is a {type(conversation).__name__}; {expected}")
    if not conversation:
        raise ValueError(f"The conversation is empty; {expected}")
    if all(isinstance(item, (list, tuple)) for item in conversation):
        if not all(conversation):
            raise ValueError("One of the conversations is empty; expected at least one message in each")
        return [
            [_check_message(message, f"conversation {number}, message {place}") for place, message in enumerate(own)]
            for number, own in enumerate(conversation)
        ]
    return [_check_message(message, f"message {place}") for place, message in enumerate(conversation)]


def _check_message(message, name: str) -> dict:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is a {type(message).__name__}; expected a mapping with `role` and `content`")
    missing = [key for key in ("role", "content") if message.get(key) is None]
    if missing:
        raise ValueError(f"{name} has no `{missing[0]}`; expected `role` and `content`, got {sorted(message)}")
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{name}: `content` is a {type(content).__name__}; expected a string or a list of items")
    items = []
    for place, item in enumerate(content):
        item = _check_item(item, f"{name}, item {place}")
        if items and item["type"] == items[-1]["type"] == "text":
            # In one piece, so that "<vid" and "eo>" side by side are seen for what they make together.
            items[-1] = {**items[-1], "text": items[-1]["text"] + item["text"]}
        else:
            items.append(item)
    return {**message, "content": items}


def _check_item(item, name: str) -> dict:
    if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
        raise ValueError(
            f"{name} has no `type`; expected {{'type': 'video' | 'image' | 'text', ...}}, got {item!r:.200}"
        )
    if item["type"] == "audio":
        raise ValueError(f"{name} is audio; Video-Panda sees, it does not hear")
    if item["type"] == "text" and not isinstance(item.get("text"), str):
        raise ValueError(f"{name}: expected a string as `text`, got {type(item.get('text')).__name__}")
    if item["type"] == "video":
        sources = {key: item[key] for key in ("video", "url", "path") if key in item}
        return {**item, **{key: [source] for key, source in sources.items() if is_frame(source)}}
    return dict(item)


def count_placeholders(text: str, token: str) -> int:
    """How often a placeholder stands in a prompt; one that sanitizing marked as user text does not count."""
    return text.count(token) - text.count(_CONTROL_TOKEN_START + token)


def mark_user_text(tokenizer, chat_template: str, conversations: list) -> list:
    """The conversations with every control token inside their strings marked as plain text.

    The marks and the set of tokens are those of transformers' `sanitize_control_tokens`.
    """
    pattern, _ = _get_control_token_patterns(tokenizer._get_control_tokens(chat_template))
    return [mark_control_tokens(conversation, pattern) for conversation in conversations]


def is_plain(content: list, marked: list) -> bool:
    """Whether sanitizing has nothing to do, given the content and what `mark_user_text` makes of it.

    Content that brings marks of its own is not plain: a control token between two of them looks as if it were marked.
    """
    return mark_control_tokens(content, _NOTHING) == content == marked


def sanitized_assistant_masks(
    tokenizer, chat_template: str, marked: list, replacements: list[list[dict]], template_kwargs: dict
) -> list[tuple[list[int], list[int]]]:
    """Token ids and assistant mask of conversations whose user text holds control tokens.

    transformers cannot give both: its mask needs character offsets, and the pieces that sanitizing encodes have none. So
    the ends of each answer are found by encoding the prompt up to there.

    Args:
        tokenizer: the processor's.
        chat_template: has `generation` blocks.
        marked: conversations from `mark_user_text`.
        replacements: for each conversation the placeholders' spans and texts, as the processor reports them.
        template_kwargs: variables of the template.

    Returns:
        For each conversation its ids and, as long, 1 where an assistant's answer stands.
    """
    prompts, spans_of_prompt = render_jinja_template(
        conversations=marked, chat_template=chat_template, return_assistant_tokens_mask=True, **template_kwargs
    )
    results = []
    for prompt, spans, placed in zip(prompts, spans_of_prompt, replacements):
        ids = encode_marked_chat(tokenizer, _expand(prompt, placed))
        mask = [0] * len(ids)
        for start, end in spans:
            first, _ = _shared_prefix(ids, encode_marked_chat(tokenizer, _expand(prompt[:start], placed)))
            last, cut = _shared_prefix(ids, encode_marked_chat(tokenizer, _expand(prompt[:end], placed)))
            last += int(cut)  # a token that reaches over the end belongs to the answer too
            mask[first:last] = [1] * (last - first)
        results.append((ids, mask))
    return results


def lay_out_mask(mask: list[int], attention_row, truncation_side: str) -> list[int]:
    """A prompt's mask at the places where padding and truncation put its tokens."""
    kept = [position for position, attended in enumerate(attention_row) if attended]
    mask = mask[: len(kept)] if truncation_side == "right" else mask[len(mask) - len(kept) :]
    row = [0] * len(attention_row)
    for position, value in zip(kept, mask):
        row[position] = value
    return row


def _expand(prompt: str, placed: list[dict]) -> str:
    """Put each placeholder's tokens in its place; those beyond the end of `prompt` are left out."""
    pieces, position = [], 0
    for replacement in placed:
        start, end = replacement["span"]
        if end > len(prompt):
            break
        pieces += [prompt[position:start], replacement["replacement"]]
        position = end
    return "".join([*pieces, prompt[position:]])


def _shared_prefix(ids: list[int], prefix: list[int]) -> tuple[int, bool]:
    """Length of the common beginning, and whether `prefix` goes on differently after it."""
    length = 0
    while length < min(len(prefix), len(ids)) and ids[length] == prefix[length]:
        length += 1
    return length, length < len(prefix)
