"""Clips in memory: each is decoded once, through the real video processor, however often it is trained on."""

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from video_panda import VideoPandaDataCollator, VideoPandaProcessor


class ClipMemory:
    """A data collator that remembers samples as `VideoPandaDataCollator` made them, and what the teacher sees in them.

    0.2 MB a clip (pixels in half precision): right for some ten thousand tiny clips, wrong for real ones.

    Args:
        processor: the model's.
        root: folder of the clips.
        teacher: whose features go with the samples; None: without. It may come later.
        seen_by_teacher: the memory of the clips as the teacher sees them; default: it sees what the student sees.
    """

    def __init__(self, processor: VideoPandaProcessor, root, teacher=None, seen_by_teacher: "ClipMemory | None" = None):
        self.processor = processor
        self.collator = VideoPandaDataCollator(processor, root, unreadable="error")
        self.padding = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        self.teacher = teacher
        self.seen_by_teacher = seen_by_teacher or self
        self.samples: dict[int, dict] = {}

    def __call__(self, items: list[tuple[int, dict]]) -> dict:
        """A batch of pairs (index, raw sample)."""
        samples = [self._remember(*item) for item in items]
        batch = {
            name: pad_sequence([sample[name][0] for sample in samples], batch_first=True, padding_value=value)
            for name, value in self.padding.items()
        }
        if "pixel_values_videos" in samples[0]:
            for name in ("pixel_values_videos", "video_grid_thw"):
                batch[name] = torch.cat([sample[name] for sample in samples])
            batch["pixel_values_videos"] = batch["pixel_values_videos"].float()
        if self.teacher is not None:
            batch["teacher_features"] = [features.float() for sample in samples for features in sample["features"]]
            batch["teacher_keys"] = [None] * len(batch["teacher_features"])
        return {**batch, "num_samples": len(samples), "skipped": []}

    def frames(self, most: int = 2400) -> torch.Tensor:
        """Some of the frames it remembers: float32 (N, 3, S, S)."""
        clips = [
            sample["pixel_values_videos"][0] for sample in self.samples.values() if "pixel_values_videos" in sample
        ]
        return torch.cat(clips[: max(1, most // len(clips[0]))]).float()

    def fill(self, samples: list[dict], num_workers: int = 2) -> None:
        """Read all clips now, in processes of their own."""
        items = [item for item in enumerate(samples) if item[0] not in self.samples]
        loader = DataLoader(items, batch_size=8, collate_fn=self._read_all, num_workers=num_workers)
        with tqdm(total=len(items), desc="reading clips", unit="clip") as bar:
            for batch in loader:
                for index, sample in batch:
                    # A copy: what another process sends lies in shared memory, an open file each.
                    self.samples[index] = {
                        name: value.clone() if torch.is_tensor(value) else value for name, value in sample.items()
                    }
                bar.update(len(batch))

    def _read_all(self, items: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
        return [(index, self._read(index, raw)) for index, raw in items]

    def _read(self, index: int, raw: dict) -> dict:
        sample = self.collator([(index, raw)])
        if "pixel_values_videos" in sample:
            sample["pixel_values_videos"] = sample["pixel_values_videos"].half()
        return sample

    def _remember(self, index: int, raw: dict) -> dict:
        sample = self._sample(index, raw)
        if self.teacher is not None and "features" not in sample:
            sample["features"] = self.seen_by_teacher.features(index, raw, self.teacher)
        return sample

    def _sample(self, index: int, raw: dict) -> dict:
        if index not in self.samples:
            self.samples[index] = self._read(index, raw)
        return self.samples[index]

    def features(self, index: int, raw: dict, teacher) -> list[torch.Tensor]:
        """What a teacher sees in a sample: (T, h, w, W) a video, half precision."""
        pixels = self._sample(index, raw).get("pixel_values_videos")
        return [] if pixels is None else list(teacher(pixels.float()).half())
