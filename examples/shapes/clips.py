"""Clips in memory: each is decoded once, through the real video processor, however often it is trained on."""

import torch
from torch.nn.utils.rnn import pad_sequence

from video_panda import VideoPandaDataCollator, VideoPandaProcessor


class ClipMemory:
    """A data collator that remembers samples as `VideoPandaDataCollator` made them, and what the teacher sees in them.

    0.2 MB a clip (pixels in half precision): right for some ten thousand tiny clips, wrong for real ones.

    Args:
        processor: the model's.
        root: folder of the clips.
        teacher: whose features go with the samples; None: without. It sees what the student sees, and may come later.
    """

    def __init__(self, processor: VideoPandaProcessor, root, teacher=None):
        self.collator = VideoPandaDataCollator(processor, root, unreadable="error")
        self.padding = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        self.teacher = teacher
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

    def _remember(self, index: int, raw: dict) -> dict:
        if index not in self.samples:
            sample = self.collator([(index, raw)])
            if "pixel_values_videos" in sample:
                sample["pixel_values_videos"] = sample["pixel_values_videos"].half()
            self.samples[index] = sample
        sample = self.samples[index]
        if self.teacher is not None and "features" not in sample:
            pixels = sample.get("pixel_values_videos")
            sample["features"] = [] if pixels is None else list(self.teacher(pixels.float()).half())
        return sample
