"""From raw samples to one batch, in the workers of the DataLoader: parse, decode, tokenise, mask, pad.

A clip that cannot be read is left out and said to be, never replaced by another; a sample that is too long is left out
whole, never cut.

Legend of the shapes: B samples that are left, L tokens, V videos of them, V' videos whose teacher features are not
cached, T frames, S px a side of the student's canvas, S' of the teacher's, H and W px of a clip.
"""

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..processing.geometry_video_panda import token_grid
from .samples import Sample, parse_sample, split_indexed, visual_path
from .teacher_cache import clip_digest

IGNORED_LABEL = -100
UNREADABLE, TOO_LONG = "unreadable", "too_long"


class UnreadableSampleError(ValueError):
    """A file of a sample is missing or damaged, and the collator was told to stop then."""


class TooLongSampleError(ValueError):
    """A sample has more tokens than the limit, and the collator was told to stop then."""


@dataclass
class _Clip:
    """A decoded video.

    Attributes:
        path: where it lies.
        frames: uint8 (T, H, W, 3).
        frame_indices: which frames of the file these are.
        digest: hash of the file's content, where a cache asks for it.
    """

    path: Path
    frames: torch.Tensor
    frame_indices: list[int]
    digest: str | None = None


@dataclass
class _Read:
    """A sample whose files have been read: what is put into its chat, and its videos, in order."""

    sample: Sample
    messages: list[dict]
    clips: list[_Clip] = field(default_factory=list)
    num_images: int = 0


class VideoPandaDataCollator:
    """Makes a training batch of raw samples, as `processor.apply_chat_template` would, with labels on the answers.

    Each video is decoded once, also if several samples of the batch speak about it and a teacher sees it too.

    Args:
        processor: a `VideoPandaProcessor`.
        root: the folder that the samples' paths are relative to; default: the current folder.
        max_length: the most tokens of a sample, those of its visuals included; default: no limit.
        too_long: what becomes of longer samples: "drop" (left out, and said in `skipped`) or "error".
        unreadable: what becomes of samples with a missing or damaged file: "skip" (left out, and said) or "error".
        teacher_video_processor: draws the same frames for a teacher; default: no teacher.
        teacher_cache: a `TeacherCache` whose features spare the teacher those videos.
        num_frames: frames of a video; the processor's own number unless given.
        isolate: whether videos are decoded in a process of its own, so that a clip that crashes or blocks a decoder is
            an unreadable one and not the end of the training.
        pad_to_multiple_of: L becomes a multiple of this.

    Raises:
        ValueError: an option is none of these.
    """

    def __init__(
        self,
        processor,
        root: str | os.PathLike | None = None,
        *,
        max_length: int | None = None,
        too_long: str = "drop",
        unreadable: str = "skip",
        teacher_video_processor=None,
        teacher_cache=None,
        num_frames: int | None = None,
        isolate: bool = True,
        pad_to_multiple_of: int | None = None,
    ):
        _check_choice("too_long", too_long, ("drop", "error"))
        _check_choice("unreadable", unreadable, ("skip", "error"))
        limits = {"max_length": max_length, "num_frames": num_frames, "pad_to_multiple_of": pad_to_multiple_of}
        for name, value in limits.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        if teacher_cache is not None and teacher_video_processor is None:
            raise ValueError(
                "`teacher_cache` was given without `teacher_video_processor`, whose grid names the features"
            )
        if root is not None and not os.path.isdir(root):
            raise ValueError(f"`root` must be the folder of the videos and pictures, got {os.fspath(root)!r}")
        self.processor = processor
        self.root = root
        self.max_length, self.too_long, self.unreadable = max_length, too_long, unreadable
        self.teacher_video_processor, self.teacher_cache = teacher_video_processor, teacher_cache
        self.num_frames, self.pad_to_multiple_of, self.isolate = num_frames, pad_to_multiple_of, isolate

    def __call__(self, raw_samples: list) -> dict:
        """One batch.

        Args:
            raw_samples: raw samples of any format of `samples.py`, `Sample` objects, or pairs (index, one of these).

        Returns:
            `input_ids`, `attention_mask`, `labels` (-100 but on answers and their end token): int64 (B, L), padded on
            the right; `pixel_values_videos` float32 (V, T, 3, S, S) and `video_grid_thw` int64 (V, 3) if there are
            videos; `pixel_values` (N, 3, S, S) and `image_grid_thw` (N, 3) if there are pictures.
            With a teacher `teacher_keys` and `teacher_features`, lists of V: the key in the cache (None without one)
            and the cached features (T, h, w, C) or None; and for the videos of these None, in order,
            `teacher_pixel_values` float32 (V', T, 3, S', S') and `teacher_grid_thw` int64 (V', 3), if there are any.
            Always `num_samples`, how many were tried, and `skipped`, a list of dictionaries with `index`, `id`,
            `reason_kind` ("unreadable" or "too_long"), `path` (None if too long) and `reason`.
            If no sample is left, one row of two tokens and nothing to learn, so that every process has a step to do.

        Raises:
            SampleError: a sample is not one.
            UnreadableSampleError, TooLongSampleError: as the options say.
            ValueError: the tokenizer or the processor refuses the samples.
        """
        skipped: list[dict] = []
        kept = self._read_all(raw_samples, skipped)
        batch = self._tokenize(kept) if kept else {}
        if kept and self.max_length is not None:
            kept, batch = self._drop_too_long(kept, batch, skipped)
        if not kept:
            batch = self._empty_batch()
        if self.teacher_video_processor is not None:
            batch.update(self._teacher_inputs([clip for read in kept for clip in read.clips]))
        return {**batch, "num_samples": len(raw_samples), "skipped": skipped}

    # ------------------------------------------------------------------------------------------------- reading

    def _read_all(self, raw_samples: list, skipped: list[dict]) -> list[_Read]:
        memory: dict[tuple[str, Path], _Clip | torch.Tensor | _ReadError] = {}
        kept = []
        for item in raw_samples:
            index, raw = split_indexed(item)
            sample = parse_sample(raw, index)
            read = _Read(sample, [])
            try:
                for message in sample.messages:
                    content = [self._read_item(item, read, memory) for item in message["content"]]
                    read.messages.append({"role": message["role"], "content": content})
            except _ReadError as error:
                message = f"{sample.name}: {error.path} cannot be read: {error.reason}"
                if self.unreadable == "error":
                    raise UnreadableSampleError(message) from error.__cause__
                skipped.append(_skip_record(sample, UNREADABLE, error.path, error.reason))
            else:
                kept.append(read)
        return kept

    def _read_item(self, item: dict, read: _Read, memory: dict) -> dict:
        """The item as it goes into the chat: a visual's pixels in place of its path."""
        if item["type"] == "text":
            return item
        # Only what finds and decodes the file may fail; everything else that goes wrong is a mistake of ours.
        try:
            path = visual_path(item, self.root)
        except OSError as error:
            raise _ReadError(item["path"], str(error)) from error
        key = item["type"], path
        if key not in memory:
            try:
                memory[key] = self._decode(path) if item["type"] == "video" else self._load_picture(path)
            except (OSError, ValueError) as error:
                memory[key] = _ReadError(os.fspath(path), str(error))
                memory[key].__cause__ = error
        found = memory[key]
        if isinstance(found, _ReadError):
            raise found
        if item["type"] == "image":
            read.num_images += 1
            return {"type": "image", "image": found}
        read.clips.append(found)
        return {"type": "video", "video": found.frames}

    def _load_picture(self, path: Path) -> torch.Tensor:
        return self.processor.image_processor.fetch_images(path)

    def _decode(self, path: Path) -> _Clip:
        video_processor = self.processor.video_processor
        choose = None
        if self.num_frames is not None:
            choose = functools.partial(video_processor.sample_frames, num_frames=self.num_frames)
        frames, metadata = video_processor.fetch_videos(path, choose, isolate=self.isolate)
        digest = None
        if self.teacher_cache is not None:
            digest = clip_digest(path)
        return _Clip(path, frames, [int(index) for index in metadata.frames_indices], digest)

    # --------------------------------------------------------------------------------------------- tokenising

    def _tokenize(self, kept: list[_Read]) -> dict[str, torch.Tensor]:
        options = {
            # The frames are chosen already, and their channels are where the decoders put them.
            "videos_kwargs": {"do_sample_frames": False, "input_data_format": "channels_last"},
            "images_kwargs": {"input_data_format": "channels_first"},
            "text_kwargs": {
                "padding": True,
                "padding_side": "right",
                "return_tensors": "pt",
                "pad_to_multiple_of": self.pad_to_multiple_of,
            },
        }
        try:
            batch = self.processor.apply_chat_template(
                [read.messages for read in kept],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                processor_kwargs=options,
            )
        except ValueError as error:
            names = ", ".join(read.sample.name for read in kept)
            raise ValueError(f"the processor refuses one of the samples of a batch ({names}): {error}") from error
        batch = dict(batch)
        is_answer = batch.pop("assistant_masks").bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, IGNORED_LABEL)
        return batch

    def _drop_too_long(self, kept: list[_Read], batch: dict, skipped: list[dict]) -> tuple[list[_Read], dict]:
        """Leave out whole samples, with their visuals, and the padding that was there for them alone."""
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        fits = [length <= self.max_length for length in lengths]
        if all(fits):
            return kept, batch
        for read, length in zip(kept, lengths):
            if length > self.max_length:
                reason = f"{length} tokens, more than max_length={self.max_length}"
                if self.too_long == "error":
                    raise TooLongSampleError(f"{read.sample.name}: {reason}")
                skipped.append(_skip_record(read.sample, TOO_LONG, None, reason))
        num_tokens = max((length for length, fit in zip(lengths, fits) if fit), default=0)
        multiple = self.pad_to_multiple_of or 1
        num_tokens = -(-num_tokens // multiple) * multiple
        of_videos = [fit for read, fit in zip(kept, fits) for _ in read.clips]
        of_images = [fit for read, fit in zip(kept, fits) for _ in range(read.num_images)]
        smaller = {}
        for name, tensor in batch.items():
            if name in ("pixel_values_videos", "video_grid_thw"):
                smaller[name] = tensor[torch.tensor(of_videos)]
            elif name in ("pixel_values", "image_grid_thw"):
                smaller[name] = tensor[torch.tensor(of_images)]
            else:
                smaller[name] = tensor[torch.tensor(fits), :num_tokens]
        smaller = {name: tensor for name, tensor in smaller.items() if len(tensor)}
        if "video_grid_thw" in smaller:
            num_frames = int(smaller["video_grid_thw"][:, 0].max())
            smaller["pixel_values_videos"] = smaller["pixel_values_videos"][:, :num_frames].contiguous()
        return [read for read, fit in zip(kept, fits) if fit], smaller

    def _empty_batch(self) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[first, tokenizer.eos_token_id]])
        if self.pad_to_multiple_of is not None:
            padding = -ids.shape[1] % self.pad_to_multiple_of
            ids = torch.nn.functional.pad(ids, (0, padding), value=tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        mask[:, :2] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, IGNORED_LABEL)}

    # ------------------------------------------------------------------------------------------------ teacher

    def _teacher_inputs(self, clips: list[_Clip]) -> dict:
        """The teacher's cached features, and its pixels for the videos that have none."""
        keys, features = [], []
        for clip in clips:
            key = self._teacher_key(clip) if self.teacher_cache is not None else None
            keys.append(key)
            features.append(None if key is None else self.teacher_cache.get(key))
        inputs = {"teacher_keys": keys, "teacher_features": features}
        missing = [clip.frames for clip, cached in zip(clips, features) if cached is None]
        if missing:
            drawn = self.teacher_video_processor(missing, do_sample_frames=False, input_data_format="channels_last")
            inputs["teacher_pixel_values"] = drawn["pixel_values_videos"]
            inputs["teacher_grid_thw"] = drawn["video_grid_thw"]
        return inputs

    def _teacher_key(self, clip: _Clip) -> str:
        height, width = clip.frames.shape[1:3]
        grid = token_grid(width, height, self.teacher_video_processor.tokens_per_side)
        return self.teacher_cache.key(clip.digest, clip.frame_indices, grid)


class _ReadError(Exception):
    """A file of a sample cannot be read."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def _skip_record(sample: Sample, reason_kind: str, path: str | None, reason: str) -> dict:
    return {"index": sample.index, "id": sample.id, "reason_kind": reason_kind, "path": path, "reason": reason}


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}")
