"""Which samples, and in which order: random parts of the data, and groups of one modality and similar length."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from tqdm import tqdm

from .samples import parse_sample, split_indexed

# Rough numbers: a video of 16:9 takes 154 tokens a frame, a picture the same, and English four letters a token.
TOKENS_PER_FRAME = 154
CHARACTERS_PER_TOKEN = 4
# As many groups are sorted together as in transformers' length-grouped sampler.
GROUPS_SORTED_TOGETHER = 50


def random_subset(num_samples: int, fraction: float, seed: int) -> list[int]:
    """A random part of the data, the same for the same seed.

    Args:
        num_samples: how many there are.
        fraction: the part to take, above 0 and up to 1.
        seed: of the choice.

    Returns:
        Sorted indices, at least one; their number is rounded to the nearest.

    Raises:
        ValueError: no samples, or no such fraction.
    """
    if num_samples < 1:
        raise ValueError(f"expected at least one sample to choose from, got {num_samples}")
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction!r}")
    num_chosen = max(1, math.floor(num_samples * fraction + 0.5))
    order = torch.randperm(num_samples, generator=_generator(seed, 0))
    return sorted(order[:num_chosen].tolist())


def describe_samples(dataset, num_frames: int = 8) -> tuple[list[str], list[int]]:
    """What `ModalityLengthSampler` needs to know, from the raw samples alone: nothing is opened or decoded.

    Args:
        dataset: a list or map-style dataset of raw samples, or an `IndexedDataset`.
        num_frames: frames of a video.

    Returns:
        (modalities, lengths): "video", "image" or "text" of each sample (with both kinds of visuals "video"), and a rough
        number of tokens.

    Raises:
        SampleError: a sample is not one.
    """
    modalities, lengths = [], []
    for place in tqdm(range(len(dataset)), desc="looking at samples", unit="sample", disable=None, leave=False):
        index, raw = split_indexed(dataset[place])
        sample = parse_sample(raw, place if index is None else index)
        modalities.append("video" if sample.videos else "image" if sample.images else "text")
        texts = [item["text"] for message in sample.messages for item in message["content"] if item["type"] == "text"]
        num_text_tokens = sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        num_pictures = num_frames * len(sample.videos) + len(sample.images)
        lengths.append(num_text_tokens + TOKENS_PER_FRAME * num_pictures)
    return modalities, lengths


class ModalityLengthSampler(Sampler[int]):
    """Every run of `group_size` samples has one modality and similar lengths; the order of the runs is random.

    For each modality: shuffle, sort within megabatches of 50 groups, cut into groups. Then the groups are shuffled, the
    one with the longest sample first (what does not fit into memory fails at once). What does not fill a group of its
    own modality comes last: at most one group a modality, the only ones that may be mixed.

    Args:
        modalities: of each sample.
        lengths: of each sample, in tokens; estimates will do.
        group_size: samples of one optimizer step that should be alike: samples of a micro-batch x processes. With x
            accumulation steps as well, the whole step is alike.
        seed: of the order.

    Raises:
        ValueError: no samples, as many modalities as lengths are missing, or no group size.
    """

    def __init__(self, modalities: Sequence[str], lengths: Sequence[int], group_size: int, seed: int = 0):
        if len(modalities) != len(lengths) or not len(lengths):
            raise ValueError(
                f"expected a modality and a length for each sample, got {len(modalities)} and {len(lengths)}"
            )
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"`group_size` must be a whole number of at least 1, got {group_size!r}")
        self.lengths = [int(length) for length in lengths]
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0
        self.members: dict[str, list[int]] = {}
        for index, modality in enumerate(modalities):
            self.members.setdefault(modality, []).append(index)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose another order; the same for the same epoch."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch)
        groups, rest = [], []
        for modality in sorted(self.members):
            whole, own_rest = self._group(self.members[modality], generator)
            groups += whole
            rest += own_rest
        order = torch.randperm(len(groups), generator=generator).tolist()
        groups = [groups[place] for place in order]
        if groups:
            longest = max(range(len(groups)), key=lambda place: max(self.lengths[index] for index in groups[place]))
            groups[0], groups[longest] = groups[longest], groups[0]
        yield from (index for group in groups for index in group)
        yield from rest

    def _group(self, members: list[int], generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
        """(whole groups, what is left) of one modality."""
        shuffled = [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]
        # What is left is chosen before sorting, otherwise it would always be the shortest.
        num_grouped = len(shuffled) - len(shuffled) % self.group_size
        rest, shuffled = shuffled[num_grouped:], shuffled[:num_grouped]
        # Few groups are sorted in quarters, lest every epoch have the same groups.
        num_together = max(1, min(num_grouped // self.group_size // 4, GROUPS_SORTED_TOGETHER)) * self.group_size
        groups = []
        for start in range(0, num_grouped, num_together):
            together = sorted(shuffled[start : start + num_together], key=self.lengths.__getitem__, reverse=True)
            groups += [together[place : place + self.group_size] for place in range(0, len(together), self.group_size)]
        return groups, rest


def _generator(seed: int, epoch: int) -> torch.Generator:
    # A large odd factor: seed 1 in epoch 0 is not seed 0 in epoch 1.
    return torch.Generator().manual_seed((int(seed) * 1_000_003 + int(epoch)) % 2**63)
