"""A cache of keys and values that knows which prompt it holds: the next prompt pays only for what it does not share.

Shape suffixes as in `modeling_video_panda.py`: B prompts, L prompt length.
"""

import copy
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


@dataclass
class VideoPandaVisual:
    """A video or image of a prompt: whose positions `start` to `end` are its tokens.

    Attributes:
        kind, index: "video" or "image", and which of those given.
        start, end: its first position in the prompt, and the one after its last.
        content: its pixels or its features.
    """

    kind: str
    index: int
    start: int
    end: int
    content: torch.Tensor

    def is_same(self, other: "VideoPandaVisual") -> bool:
        """Whether the other has the same place and the same content."""
        return (
            (self.kind, self.start, self.end) == (other.kind, other.start, other.end)
            and self.content.shape == other.content.shape
            and self.content.dtype == other.content.dtype
            and self.content.device == other.content.device
            and torch.equal(self.content, other.content)
        )


@dataclass
class VideoPandaPrompt:
    """A prompt without padding.

    Attributes:
        ids: (L) token ids, on the CPU.
        visuals: of those given with the prompt, the ones that stand in it, in order.
        kinds: of which kinds ("image", "video") visuals were given at all; where none were, placeholders that a cache
            holds are taken for the same.
    """

    ids: torch.Tensor
    visuals: list[VideoPandaVisual] = field(default_factory=list)
    kinds: frozenset[str] = frozenset()

    def num_shared(self, other: "VideoPandaPrompt") -> int:
        """How many positions from the start both have in common, up to a visual that differs."""
        shortest = min(len(self.ids), len(other.ids))
        differing = (self.ids[:shortest] != other.ids[:shortest]).nonzero()
        num_shared = int(differing[0]) if len(differing) else shortest
        others = {visual.start: visual for visual in other.visuals}
        for visual in self.visuals:
            is_given = visual.kind in other.kinds
            if visual.start < num_shared and is_given:
                found = others.get(visual.start)
                if found is None or not visual.is_same(found):
                    return visual.start
        return num_shared

    def before_visual(self, position: int) -> int:
        """The position, or the start of the visual that it would cut."""
        return next((own.start for own in self.visuals if own.start < position < own.end), position)

    def up_to(self, position: int) -> "VideoPandaPrompt":
        """The first positions, and the visuals that are whole in them."""
        return VideoPandaPrompt(self.ids[:position], [own for own in self.visuals if own.end <= position], self.kinds)


class VideoPandaPrefixCache(DynamicCache):
    """`past_key_values` for several calls of `generate` about the same visuals, one prompt after the other.

    Each call keeps what the cache holds of its prompt, from the start up to the first difference in text or pixels, and
    computes the rest: neither encoding nor prefill of a clip is done twice, and a prompt that shares nothing is merely
    computed whole. Belongs to one model with one set of weights.

    Args:
        config: the model's.

    Raises:
        ValueError: the language model has layers from which the last positions cannot be taken away again.
    """

    def __init__(self, config):
        super().__init__(config=config.get_text_config(decoder=True))
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                raise ValueError(
                    f"A prefix cache needs a language model with attention in all layers; {config.text_config.model_type} "
                    f"has a recurrent state ({type(layer).__name__}), which cannot be shortened"
                )
        # A window forgets what is before it, so that it cannot be shortened either: all positions are kept, and the masks
        # of the model leave out those that a window would have forgotten.
        self.had_windows = any(self.is_sliding)
        self.layers = [DynamicLayer() if layer.is_sliding else layer for layer in self.layers]
        self.prompt = VideoPandaPrompt(torch.empty(0, dtype=torch.long))

    def keep(self, prompt: VideoPandaPrompt, at_most: int) -> int:
        """Forget all but the first positions that the prompt shares, and return their number."""
        num_held = self.get_seq_length()
        # Less than is recorded if it was cropped by hand; more if `generate` did not come to its end.
        held = self.prompt.up_to(self.prompt.before_visual(num_held))
        num_shared = held.before_visual(prompt.before_visual(min(held.num_shared(prompt), at_most)))
        if num_held > num_shared:
            self.crop(num_shared - num_held)
        self.prompt = held.up_to(num_shared)
        return num_shared

    def record(self, ids: torch.Tensor, prompt: VideoPandaPrompt) -> None:
        """Note what the cache holds now: the prompt and the tokens (`ids`, all of them) that followed."""
        known = len(self.prompt.ids)
        new = [
            VideoPandaVisual(
                own.kind, own.index, own.start, own.end, own.content.clone()
            )  # a caller may reuse its memory
            for own in prompt.visuals
            if own.start >= known
        ]
        whole = VideoPandaPrompt(ids.cpu(), self.prompt.visuals + new)
        self.prompt = whole.up_to(self.get_seq_length())

    def branches(self, count: int) -> DynamicCache:
        """A cache with a batch of `count`, at least 2, of what this one holds; this one stays as it is."""
        branch = DynamicCache()
        branch.layer_class_to_replicate = None
        branch.layers = [copy.copy(layer) for layer in self.layers]
        branch.batch_repeat_interleave(count)
        return branch
