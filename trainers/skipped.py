"""The account of the samples that training left out: a manifest of them, their number, and when there are too many."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from .collator import UNREADABLE

logger = logging.getLogger(__name__)

# Below so many samples a share says little: one broken clip among the first ten is not a broken dataset.
MIN_SAMPLES_OF_SHARE = 1000
_NUM_LOGGED = 10
_NUM_REASONS = 3


class TooManySkippedError(ValueError):
    """More samples than allowed could not be read; names numbers, share, manifest and the last reasons."""


def manifest_name(rank: int = 0) -> str:
    """The name of a process' own manifest, so that no two processes write into one file."""
    return f"skipped-rank{rank:05d}.jsonl"


class SkippedSamples:
    """Writes down what was skipped, counts it, and says when it is too much.

    Args:
        path: the manifest, one JSON object a line; appended to. Each process needs its own (`manifest_name`).
        max_share: the share of samples that may be unreadable, from 0 (none) to 1 (all).
        num_total: samples of the whole run, if known; small data is judged as a whole.

    Raises:
        ValueError: a share that is none.
    """

    def __init__(self, path: str | os.PathLike, max_share: float = 0.01, num_total: int | None = None):
        if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not 0 <= max_share <= 1:
            raise ValueError(f"`max_share` must be a share from 0 to 1, got {max_share!r}")
        self.path = Path(path)
        self.max_share = max_share
        self.num_total = num_total
        self.num_seen = 0
        self.counts: dict[str, int] = {}
        self._last_reasons: deque[str] = deque(maxlen=_NUM_REASONS)
        self._num_logged = 0

    @property
    def num_skipped(self) -> int:
        """All that this process skipped, for whatever reason."""
        return sum(self.counts.values())

    @property
    def num_unreadable(self) -> int:
        """Those that count against `max_share`: a sample that is too long is no sign of broken data."""
        return self.counts.get(UNREADABLE, 0)

    def add(self, records: Iterable[Mapping], num_seen: int) -> None:
        """Take over what a batch reports.

        Args:
            records: its `skipped`: `index`, `id`, `reason_kind`, `path`, `reason`.
            num_seen: its `num_samples`, the skipped ones included.

        Raises:
            OSError: the manifest cannot be written.
        """
        self.num_seen += int(num_seen)
        records = [dict(record) for record in records]
        if not records:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(lines))
        for record in records:
            self.counts[record["reason_kind"]] = self.counts.get(record["reason_kind"], 0) + 1
            self._note(record)

    def _note(self, record: Mapping) -> None:
        reason = f"sample {record['index']} (id {record['id']!r:.80}): {record['reason']}"
        if record["reason_kind"] == UNREADABLE:
            self._last_reasons.append(reason)
        if self._num_logged < _NUM_LOGGED:
            more = "; further ones are listed there only" if self._num_logged == _NUM_LOGGED - 1 else ""
            logger.warning("skipped (%s), see %s%s: %s", record["reason_kind"], self.path, more, reason)
            self._num_logged += 1

    def check(self, num_skipped: int | None = None, num_seen: int | None = None) -> None:
        """Stop the run if too much of the data cannot be read.

        Args:
            num_skipped: unreadable samples of all processes; this process' own unless given.
            num_seen: samples tried by all processes; this process' own unless given.

        Raises:
            TooManySkippedError: there are more than `max_share` of the samples seen, of which at least 1000 are
                reckoned (or the whole data, where that is less).
        """
        num_skipped = self.num_unreadable if num_skipped is None else int(num_skipped)
        num_seen = self.num_seen if num_seen is None else int(num_seen)
        base = max(num_seen, min(self.num_total or MIN_SAMPLES_OF_SHARE, MIN_SAMPLES_OF_SHARE))
        if num_skipped <= self.max_share * base:
            return
        reasons = "; ".join(self._last_reasons) or "none in this process"
        raise TooManySkippedError(
            f"{num_skipped} of {num_seen} samples so far cannot be read, more than {self.max_share:.2%} of {base}; "
            f"they are listed in {self.path} (and those of other processes beside it). The last ones: {reasons}"
        )

    def state_dict(self) -> dict:
        """What a checkpoint needs to go on counting."""
        return {"num_seen": self.num_seen, "counts": dict(self.counts), "last_reasons": list(self._last_reasons)}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from `state_dict`.

        The manifest is left as it is: samples tried after the checkpoint are tried again, and may stand there twice.
        """
        self.num_seen = int(state["num_seen"])
        self.counts = {str(kind): int(count) for kind, count in state["counts"].items()}
        self._last_reasons = deque(state["last_reasons"], maxlen=_NUM_REASONS)
