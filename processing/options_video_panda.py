"""Options as users give them (numbers of numpy and torch, lists of any kind, misspelt names) made plain or refused."""

import difflib
import math
import numbers
from collections.abc import Collection, Mapping

import numpy as np
import torch

_SECONDS = ("start", "end")
_KINDS_OF_FRAMES = "whole numbers, or one list of these a video"


def plain_options(options: Mapping) -> dict:
    """The same options, those that choose frames as plain Python numbers and lists.

    Args:
        options: of the video processor or of the whole processor; others than `num_frames`, `fps`, `start`, `end` and
            `frame_indices` stay as they are. None stands for "not given".

    Returns:
        A copy.

    Raises:
        ValueError: not a number, not a whole one, no possible frame rate, or frame indices that are not a list.
    """
    plain = dict(options)
    for name in ("num_frames", "fps", *_SECONDS):
        if plain.get(name) is None:
            continue
        value = _plain(plain[name])
        kind = numbers.Integral if name == "num_frames" else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(
                f"`{name}` must be a {'whole ' if kind is numbers.Integral else ''}number, got {value!r:.80}"
            )
        plain[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
    if plain.get("num_frames") is not None and plain["num_frames"] < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {plain['num_frames']}")
    if plain.get("fps") is not None and not (math.isfinite(plain["fps"]) and plain["fps"] > 0):
        raise ValueError(f"`fps` must be a positive, finite number of frames per second, got {plain['fps']}")
    if plain.get("frame_indices") is not None:
        plain["frame_indices"] = _plain_indices(plain["frame_indices"])
    return plain


def plain_call_options(options: Mapping, typed: type, owner: str) -> dict:
    """The options of a processor's call made plain; a name that nobody knows is refused, not ignored with a warning.

    Args:
        options: flat, and in dictionaries for the parts, such as `videos_kwargs`.
        typed: the typed dictionary of the processor's options.
        owner: how an error message calls the processor.

    Returns:
        A copy, in which `return_metadata` stands where the processor looks for it.

    Raises:
        ValueError: as `plain_options` and `check_names`.
    """
    parts = typed.__annotations__
    known = {name: set(parts[name].__annotations__) for name in parts if name.endswith("_kwargs")}
    check_names(options, {*parts, "common_kwargs"}.union(*known.values()), owner)
    plain = plain_options(options)
    for name, own in known.items():
        # The last two moved to the processor itself, and transformers still takes them here.
        check_names(plain.get(name) or (), {*own, "return_mm_token_type_ids", "return_text_replacement_offsets"}, name)
    if plain.get("videos_kwargs"):
        plain["videos_kwargs"] = plain_options(plain["videos_kwargs"])
        if plain["videos_kwargs"].get("return_metadata"):
            plain["return_metadata"] = plain["videos_kwargs"].pop("return_metadata")
    return plain


def check_names(names: Collection[str], known: Collection[str], owner: str) -> None:
    """Refuse options that are not known, naming what was meant perhaps.

    Raises:
        ValueError: says which, and what there is.
    """
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ";"
            raise ValueError(f"{owner} has no option `{name}`{hint} It knows {', '.join(sorted(known))}")


def _plain(value):
    """Numbers and lists of numpy and torch, at any depth, as Python's."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    return value


def _plain_indices(indices) -> list:
    plain = _plain(indices)
    if not isinstance(plain, list):
        raise ValueError(f"`frame_indices` must be a list of {_KINDS_OF_FRAMES}, got {indices!r:.80}")
    for own in plain if any(isinstance(item, list) for item in plain) else [plain]:
        wrong = own if not isinstance(own, list) else next((item for item in own if not _is_whole(item)), None)
        if not isinstance(own, list) or wrong is not None:
            raise ValueError(f"`frame_indices` must be a list of {_KINDS_OF_FRAMES}, got {wrong!r:.80} in it")
    return plain


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
