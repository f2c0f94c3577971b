"""How sure one can be: 95 % intervals of shares and of means."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
_NUM_RESAMPLES = 1000
_NUM_DRAWN_AT_ONCE = 2**18


def wilson_interval(num_correct: int, num_questions: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927), which is sensible at 0 and 1, too.

    Args:
        num_correct, num_questions: counts, 0 <= num_correct <= num_questions.

    Returns:
        (low, high), within [0, 1].

    Raises:
        ValueError: the counts are not such counts.
    """
    if not 0 <= num_correct <= num_questions or num_questions == 0:
        raise ValueError(
            f"got {num_correct} right of {num_questions}, expected 0 <= right <= questions, and a question"
        )
    share, weight = num_correct / num_questions, Z_95**2 / num_questions
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / num_questions + weight / (4 * num_questions))
    # At the ends rounding may fall a hair beyond what the formula gives exactly.
    low = 0.0 if num_correct == 0 else max(0.0, centre - half)
    return low, 1.0 if num_correct == num_questions else min(1.0, centre + half)


def clip_interval(videos: Sequence[str], values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap 95% interval of a mean over questions, drawing whole clips: the questions about one hang together.

    Args:
        videos: the clip of each question.
        values: what each answer is worth.

    Returns:
        (low, high): the same numbers on every call.

    Raises:
        ValueError: there are no questions, or not as many values.
    """
    if len(videos) != len(values) or not len(videos):
        raise ValueError(f"got {len(values)} values of {len(videos)} questions, expected one each, and a question")
    _, clips = np.unique(np.array(videos), return_inverse=True)
    num_asked = np.bincount(clips)
    summed = np.bincount(clips, weights=np.asarray(values, dtype=float))
    drawn = np.random.Generator(np.random.PCG64(0))
    num_clips = len(num_asked)
    num_at_once = max(1, _NUM_DRAWN_AT_ONCE // num_clips)  # all at once would need clips x resamples numbers
    means = []
    for start in range(0, _NUM_RESAMPLES, num_at_once):
        chosen = drawn.integers(num_clips, size=(min(num_at_once, _NUM_RESAMPLES - start), num_clips))
        means.append(summed[chosen].sum(axis=1) / num_asked[chosen].sum(axis=1))
    means = np.concatenate(means)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
