"""Training samples: from the files and datasets people have to one form, checked, with nothing decoded yet.

Formats, one sample each:

- Valley and LLaVA: `{"id", "video" | "image": path or list of paths, "conversations": [{"from": "human" | "gpt",
  "value": "<video>\\nWhat happens?"}, ...]}`, with one `<video>` or `<image>` for each visual, or none of either;
- Video-ChatGPT: `{"q", "a", "video_id"}`, the name of a file without its suffix;
- chats of transformers: `{"id", "messages": [{"role", "content"}, ...]}` with items that name a `path`.

Source of the order "visual first, then the question": the behaviour of the authors' release.
"""

import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from ..processing.sources_video_panda import regular_file

# Tried in this order where a sample names its video without a suffix.
_SUFFIXES = "mp4 mkv webm avi mov m4v mpg mpeg wmv flv ts 3gp gif"
VIDEO_SUFFIXES = tuple(f".{name}" for name in _SUFFIXES.split())
ROLES = {"human": "user", "gpt": "assistant"}
_MARKER = re.compile(r"\s*<(video|image)>\s*")
_FORMATS = "`conversations` (Valley, LLaVA), `messages` (chats), or `q`, `a` and `video_id` (Video-ChatGPT)"


class SampleError(ValueError):
    """A sample that cannot be trained on, whatever its files hold; names its index, its id and the field.

    Args:
        message: what was got and what was expected; with a `field`, the sample and the field are put in front of it.
        index: the sample's place in the data, if known.
        id: the sample's own id, if it has one.
        field: which part is wrong, for example `conversations[1].value`.
    """

    def __init__(self, message: str, *, index: int | None = None, id: object = None, field: str | None = None):
        # One positional argument only: workers of a DataLoader build the error again from its message.
        super().__init__(message if field is None else f"{describe_sample(index, id)}: `{field}` {message}")
        self.index, self.id, self.field = index, id, field


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from.

    Attributes:
        index: its place in the data, if known.
        id: its own id, if it has one.
        messages: `{"role": "system" | "user" | "assistant", "content": items}`, the visual items first in their turn:
            `{"type": "video" | "image", "path": relative path}` (`"any_suffix": True` where the suffix is to be found),
            then `{"type": "text", "text": ...}`.
        videos: relative paths of the videos in their order.
        images: relative paths of the pictures in their order.
    """

    index: int | None
    id: object
    messages: list[dict] = field(repr=False)
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How messages call it."""
        return describe_sample(self.index, self.id)

    @property
    def visuals(self) -> list[dict]:
        """The visual items in their order."""
        return [item for message in self.messages for item in message["content"] if item["type"] != "text"]


class IndexedDataset(Dataset):
    """A map-style dataset that gives (index, raw sample), so that whatever goes wrong later can name the sample.

    Args:
        dataset: map-style: with a length and items.
        indices: the samples to take, in this order; all of them unless given.

    Raises:
        ValueError: the dataset is not map-style, or an index is out of range.
    """

    def __init__(self, dataset, indices: Iterable[int] | None = None):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"expected a map-style dataset (with a length), got {type(dataset).__name__}")
        self.dataset = dataset
        num_samples = len(dataset)
        self.indices = range(num_samples) if indices is None else [int(index) for index in indices]
        outside = [index for index in self.indices if not 0 <= index < num_samples] if indices is not None else []
        if outside:
            raise ValueError(f"indices {outside[:5]} are out of range: the dataset has {num_samples} samples")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Mapping]:
        index = self.indices[place]
        return index, self.dataset[index]

    def __getitems__(self, places: list[int]) -> list[tuple[int, Mapping]]:
        indices = [self.indices[place] for place in places]
        if callable(getattr(self.dataset, "__getitems__", None)):
            return list(zip(indices, self.dataset.__getitems__(indices)))
        return [(index, self.dataset[index]) for index in indices]


def describe_sample(index: int | None, id: object) -> str:
    """How messages call a sample: `sample 3 (id 'v_7')`."""
    name = "a sample" if index is None else f"sample {index}"
    return name if id is None else f"{name} (id {id!r:.80})"


def split_indexed(item) -> tuple[int | None, object]:
    """(index, raw sample) of what a dataset gave: such a pair already, or a raw sample alone."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int):
        return item
    return None, item


# --------------------------------------------------------------------------------------------------------- loading


def load_samples(source):
    """The raw samples of a file; lists and datasets pass through.

    Args:
        source: path of a JSON file (one list) or of a JSONL file (one object a line; under the name of a JSON file,
            too), a list, or a dataset of `datasets` or torch, map-style or streaming.

    Returns:
        A list of dictionaries, or the dataset that was given.

    Raises:
        OSError: the file is missing, a folder, or not a regular file.
        ValueError: not UTF-8, not JSON (names the line), not a list of objects, or several splits in one.
    """
    if isinstance(source, (str, os.PathLike)):
        return _load_file(Path(regular_file(source)), os.fspath(source))
    if isinstance(source, Mapping):
        raise ValueError(
            f"expected one dataset, got {type(source).__name__} with {sorted(map(str, source))}; choose one"
        )
    if isinstance(source, tuple):
        return list(source)
    if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise ValueError(f"expected a path, a list or a dataset, got {type(source).__name__}")
    return source


def _load_file(path: Path, name: str) -> list[dict]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8 (byte {content[error.start]:#04x})") from error
    if not text.strip():
        raise ValueError(f"{name}: the file is empty, expected a JSON list or JSON lines of samples")
    is_list = text.lstrip().startswith("[")
    if not is_list and (path.suffix.lower() in (".jsonl", ".ndjson") or "\n{" in text.strip()):
        # Files of lines are often called .json; an object printed over several lines has no line that begins with "{"
        # and is the one thing that looks like them.
        return _load_lines(text, name)
    try:
        samples = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(samples, list):
        raise ValueError(f"{name}: got one {_json_name(samples)}, expected a JSON list of samples")
    return samples


def _load_lines(text: str, name: str) -> list[dict]:
    samples = []
    # Not splitlines(): it also splits at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(sample, dict):
            raise ValueError(
                f"{name}, line {number}: got a {_json_name(sample)}, expected an object, one sample a line"
            )
        samples.append(sample)
    return samples


def _json_name(value) -> str:
    return {dict: "object", list: "list", str: "string", type(None): "null", bool: "boolean"}.get(type(value), "number")


def check_samples(samples) -> None:
    """Look at every sample before training starts; files are not opened.

    Args:
        samples: a list or map-style dataset of raw samples, or an `IndexedDataset`.

    Raises:
        SampleError: for the first bad sample, with the number of bad ones.
        ValueError: there are no samples, or the dataset is streaming and cannot be looked at beforehand.
    """
    if not hasattr(samples, "__len__"):
        raise ValueError(f"a streaming dataset cannot be checked beforehand, got {type(samples).__name__}")
    if len(samples) == 0:
        raise ValueError("the dataset is empty, expected at least one sample")
    first, num_bad = None, 0
    for place in tqdm(range(len(samples)), desc="checking samples", unit="sample", disable=None, leave=False):
        index, raw = split_indexed(samples[place])
        try:
            parse_sample(raw, place if index is None else index)
        except SampleError as error:
            first = first or error
            num_bad += 1
    if first is not None:
        others = f" ({num_bad} of {len(samples)} samples are bad; this is the first)" if num_bad > 1 else ""
        error = SampleError(f"{first}{others}")
        error.index, error.id, error.field = first.index, first.id, first.field
        raise error


# --------------------------------------------------------------------------------------------------------- parsing


def parse_sample(raw: Mapping, index: int | None = None) -> Sample:
    """One raw sample of any format as a `Sample`.

    Args:
        raw: see the top of this file; a value of None stands for "absent" (streaming datasets fill columns up). A
            `Sample` is returned as it is.
        index: its place in the data.

    Returns:
        The sample.

    Raises:
        SampleError: says which sample, which field, what was got and what was expected.
    """
    if isinstance(raw, Sample):
        return raw
    if not isinstance(raw, Mapping):
        message = f"{describe_sample(index, None)} is a {type(raw).__name__}, expected a mapping with {_FORMATS}"
        raise SampleError(message, index=index)
    present = {key: value for key, value in raw.items() if value is not None}
    parser = _SampleParser(index, present.get("id", present.get("video_id")))
    if "conversations" in present:
        messages = parser.parse_conversations(present)
    elif "messages" in present:
        messages = parser.parse_messages(present)
    elif {"q", "a", "video_id"} <= set(present):
        messages = parser.parse_question(present)
    else:
        raise parser.error(
            "conversations", f"is missing; got the fields {sorted(map(str, present))}, expected {_FORMATS}"
        )
    paths = {
        kind: tuple(item["path"] for message in messages for item in message["content"] if item["type"] == kind)
        for kind in ("video", "image")
    }
    return Sample(index, parser.id, messages, paths["video"], paths["image"])


@dataclass
class _SampleParser:
    """The parsers of the formats, which share how an error names the sample."""

    index: int | None
    id: object
    turns_field: str = "conversations"

    def error(self, field: str, message: str) -> SampleError:
        return SampleError(message, index=self.index, id=self.id, field=field)

    def parse_conversations(self, present: dict) -> list[dict]:
        """Messages of the Valley and LLaVA format."""
        turns = self._turns(present["conversations"], "conversations")
        waiting = {
            kind: [{"type": kind, "path": path} for path in self._paths(present.get(kind), kind)]
            for kind in ("video", "image")
        }
        return self._place_visuals(turns, waiting, "conversations", names=("from", "value"))

    def parse_question(self, present: dict) -> list[dict]:
        """Messages of the Video-ChatGPT format."""
        for name in ("q", "a"):
            if not isinstance(present[name], str):
                raise self.error(name, f"is a {type(present[name]).__name__}, expected a string")
        # The file does without the marker that the others have.
        question = present["q"] if "<video>" in present["q"] else f"<video>\n{present['q']}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": present["a"]}]
        paths = self._paths(present["video_id"], "video_id")
        waiting = {"video": [{"type": "video", "path": path, "any_suffix": True} for path in paths], "image": []}
        return self._place_visuals(turns, waiting, "conversations", names=("from", "value"))

    def parse_messages(self, present: dict) -> list[dict]:
        """Messages of transformers' chat format."""
        self.turns_field = "messages"
        for kind in ("video", "image"):
            if present.get(kind):
                raise self.error(kind, f"stands beside `messages`, in which a {kind} is an item of the question")
        parsed = []
        for place, message in enumerate(self._turns(present["messages"], "messages")):
            role, name = message.get("role"), f"messages[{place}]"
            roles = ("user", "assistant", "system") if place == 0 else ("user", "assistant")
            if role not in roles:
                raise self.error(f"{name}.role", f"is {role!r:.80}, expected {' or '.join(map(repr, roles))}")
            content = message.get("content")
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(items, (list, tuple)) or not items:
                raise self.error(f"{name}.content", f"is {content!r:.80}, expected a string or a list of items")
            items = [self._item(item, role, f"{name}.content[{number}]") for number, item in enumerate(items)]
            # Visuals first; the sort keeps the order otherwise.
            parsed.append({"role": role, "content": sorted(items, key=lambda item: item["type"] == "text")})
        self._check_turns(parsed)
        return parsed

    def _item(self, item, role: str, name: str) -> dict:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            if not isinstance(item.get("text"), str):
                raise self.error(f"{name}.text", f"is a {type(item.get('text')).__name__}, expected a string")
            if role == "user" and (marker := _MARKER.search(item["text"])):
                found = marker[0].strip()
                raise self.error(name, f"holds a {found} without a {marker[1]}; in `messages` visuals are items")
            return {"type": "text", "text": item["text"]}
        if kind not in ("video", "image"):
            raise self.error(name, f"is {item!r:.80}, expected an item of type 'video', 'image' or 'text'")
        if role != "user":
            raise self.error(name, f"is a {kind} in a message of role {role!r}; expected visuals in questions only")
        source = next((item[key] for key in ("path", kind) if item.get(key) is not None), None)
        return {"type": kind, "path": self._path(source, f"{name}.path")}

    def _place_visuals(self, turns: list, waiting: dict[str, list], field: str, names: tuple[str, str]) -> list[dict]:
        """Turn each marker of the questions into the next visual of its kind, in front of its turn."""
        num_given = {kind: len(items) for kind, items in waiting.items()}
        num_markers = dict.fromkeys(waiting, 0)
        parsed = []
        for place, turn in enumerate(turns):
            role, text = turn.get(names[0]), turn.get(names[1])
            if role not in ROLES:
                raise self.error(f"{field}[{place}].{names[0]}", f"is {role!r:.80}, expected 'human' or 'gpt'")
            if not isinstance(text, str):
                raise self.error(f"{field}[{place}].{names[1]}", f"is a {type(text).__name__}, expected a string")
            items = []
            if role == "human":  # in an answer a marker is text like any other
                for marker in _MARKER.finditer(text):
                    num_markers[marker[1]] += 1
                    items += waiting[marker[1]][num_markers[marker[1]] - 1 :][:1]
                text = _without_markers(text)
            items += [{"type": "text", "text": text}] if text or not items else []
            parsed.append({"role": ROLES[role], "content": items})
        self._check_turns(parsed)
        for kind, num_found in num_markers.items():
            if num_found != num_given[kind]:
                own_field = "video_id" if waiting[kind] and waiting[kind][0].get("any_suffix") else kind
                raise self.error(
                    own_field, f"names {num_given[kind]} {kind}s, but the questions hold {num_found} <{kind}> markers"
                )
        return parsed

    def _check_turns(self, messages: list[dict]) -> None:
        """Questions and answers must alternate, the question first and the answer last."""
        field = self.turns_field
        names = {"user": "user", "assistant": "assistant"} if field == "messages" else {v: k for k, v in ROLES.items()}
        offset = int(messages[0]["role"] == "system")
        roles = [message["role"] for message in messages[offset:]]
        for place, role in enumerate(roles):
            expected = ("user", "assistant")[place % 2]
            if role != expected:
                place_of_turn = "first" if place == 0 else f"after a turn of {names[role]!r}"
                message = f"is a turn of {names[role]!r}, expected {names[expected]!r} {place_of_turn}"
                raise self.error(f"{field}[{place + offset}]", message)
        if not roles or roles[-1] != "assistant":
            raise self.error(
                field, f"must end with an answer ({names['assistant']!r}): there is nothing to learn from otherwise"
            )

    def _turns(self, turns, field: str) -> list:
        if not isinstance(turns, (list, tuple)):
            raise self.error(field, f"is a {type(turns).__name__}, expected a list of turns")
        if not turns:
            raise self.error(field, "is empty, expected at least a question and an answer")
        for place, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise self.error(f"{field}[{place}]", f"is a {type(turn).__name__}, expected a mapping")
        return list(turns)

    def _paths(self, value, field: str) -> list[str]:
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [self._path(path, field) for path in values]

    def _path(self, path, field: str) -> str:
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise self.error(field, f"is {path!r:.80}, expected the path of a file")
        if os.path.isabs(path):
            raise self.error(field, f"is the absolute path {path!r}, expected one relative to the root folder")
        if posixpath.normpath(path.replace(os.sep, "/")).split("/")[0] == "..":
            raise self.error(field, f"leads out of the root folder: {path!r}")
        return path


def _without_markers(text: str) -> str:
    """The text without its markers and the white space around them; a line break or a space is left between words."""
    pieces, joints, position = [], [], 0
    for marker in _MARKER.finditer(text):
        pieces.append(text[position : marker.start()])
        joints.append("\n" if "\n" in marker[0] else " ")
        position = marker.end()
    result = text[position:]
    for piece, joint in zip(reversed(pieces), reversed(joints)):
        result = f"{piece}{joint}{result}" if piece and result else piece + result
    return result


def visual_path(item: Mapping, root: str | os.PathLike | None) -> Path:
    """Where the file of a visual item lies.

    Args:
        item: of `Sample.visuals`.
        root: the folder that its path is relative to; default: the current folder.

    Returns:
        The path; it need not exist, unless the item leaves the suffix open.

    Raises:
        FileNotFoundError: there is no video of this name with any suffix.
    """
    # Absolute, so that no path can look like an address.
    path = Path(os.path.abspath(os.path.join(root or ".", item["path"])))
    if not item.get("any_suffix") or path.is_file():
        return path
    for suffix in VIDEO_SUFFIXES:
        if (candidate := path.with_name(path.name + suffix)).is_file():
            return candidate
    raise FileNotFoundError(f"no such video: {path} with any of the suffixes {', '.join(VIDEO_SUFFIXES)}")
