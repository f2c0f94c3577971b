"""What lmms-eval asks, in the words of this project: messages with clips and pictures, options of generation, stop words.

It knows the form of lmms-eval's data and imports nothing of it.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 1024
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
# What `generate` knows of what tasks ask for.
_OTHER_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
# lmms-eval puts this stop word into every task that has none, as what separates examples in a prompt; nobody means an
# answer to end with its first paragraph. Its own models leave it out as well.
_DELIMITER_OF_EXAMPLES = "\n\n"
# Where a task gives bare paths, lmms-eval takes the first for sound and the second for a picture.
_VIDEO_SUFFIXES = (".webm", ".gif")


@dataclass(frozen=True)
class Clip:
    """A clip, or a part of it.

    Attributes:
        source: a path, or the bytes of a file.
        start, end: of the part, seconds; None: the clip's.
    """

    source: str | bytes
    start: float | None = None
    end: float | None = None


def generation_options(gen_kwargs: Mapping) -> tuple[dict, tuple[str, ...]]:
    """How an answer is generated.

    Args:
        gen_kwargs: the task's, with what the command line changed. Options of other models are left out, with a line in
            the log.

    Returns:
        (options of `generate`, stop words). Answers are drawn at random if `do_sample` says so, or where it says nothing
        if the temperature is above 0.

    Raises:
        ValueError: stop words that are none.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    until = _stop_words(given.pop("until", ()))
    temperature = given.get("temperature", 0)
    do_sample = bool(given.pop("do_sample", temperature > 0)) and given.get("temperature", 1) > 0
    options = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": do_sample}
    known = (*_OTHER_OPTIONS, *(_SAMPLING_OPTIONS if do_sample else ()))
    options.update((name, given[name]) for name in known if name in given)
    if unused := sorted(set(given) - set(_OTHER_OPTIONS) - set(_SAMPLING_OPTIONS)):
        logger.info("not used, options of other models: %s", ", ".join(unused))
    return options, until


def _stop_words(until) -> tuple[str, ...]:
    words = (until,) if isinstance(until, str) else until
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"`until` must be a text or a list of texts, got {until!r}")
    return tuple(word for word in words if word not in ("", _DELIMITER_OF_EXAMPLES))


def cut_at(text: str, until: Sequence[str]) -> str:
    """An answer without its first stop word, what follows that, and white space around the rest."""
    ends = [place for word in until if (place := text.find(word)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def conversation_of(messages: Sequence[Mapping], read_clip: Callable[[Clip], object], read_image: Callable) -> list:
    """A conversation for the processor, with everything in it read.

    Args:
        messages: as a task's `doc_to_messages` gives them: `{"role": ..., "content": [{"type": "text", "text": ...},
            {"type": "video", "url": ...}, ...]}`.
        read_clip: gives the frames of a clip.
        read_image: gives the pixels of a picture: a PIL image, a path or bytes.

    Raises:
        ValueError: no messages, or something in them that Video-Panda cannot be shown; and as the readers.
        OSError: as the readers.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"expected a list of messages, got {messages!r:.200}")
    conversation = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {place}: expected `role` and `content`, got {message!r:.200}")
        content = message["content"]
        if not isinstance(content, str):
            content = [_item(part, f"message {place}", read_clip, read_image) for part in content]
        conversation.append({"role": message["role"], "content": content})
    return conversation


def _item(part: Mapping, place: str, read_clip: Callable, read_image: Callable) -> dict:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("video", "image", "audio"):
        raise ValueError(f"{place}: content of type {kind!r}, expected text, image or video")
    source = part.get("url")
    if isinstance(source, (str, os.PathLike)) and PurePath(source).suffix.lower() in _VIDEO_SUFFIXES:
        kind = "video"
    if kind == "video":
        return {"type": "video", "video": read_clip(_clip(part, place))}
    if kind == "image":
        return {"type": "image", "image": read_image(_file_of(source))}
    raise ValueError(f"{place}: sound ({source!r:.200}); Video-Panda sees, it does not hear")


def _clip(part: Mapping, place: str) -> Clip:
    """A clip; its part is named beside the file or, in tasks of another manner, within it."""
    source = part.get("url")
    inner = source if isinstance(source, Mapping) else {}
    start, end = part.get("start_time", inner.get("video_start")), part.get("end_time", inner.get("video_end"))
    source = _file_of(source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, (str, bytes)):
        raise ValueError(f"{place}: a video is a {type(source).__name__}, expected a path or the bytes of a file")
    return Clip(source, start, end)


def _file_of(source):
    """What is behind the forms in which tasks and `datasets` name a file."""
    if not isinstance(source, Mapping):
        return source
    return next((source[name] for name in ("bytes", "path", "url", "video") if source.get(name) is not None), None)
