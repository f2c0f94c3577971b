"""Frame choice, token grid, canvas offset and token layout, against independent statements of the same rules."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_panda.processing.geometry_video_panda import (
    canvas_offset,
    check_frame_indices,
    choose_frames,
    choose_frames_at_rate,
    choose_frames_at_times,
    frame_token_sequence,
    frames_in_window,
    num_frame_tokens,
    spread_evenly,
    token_grid,
)

RATES = st.one_of(st.sampled_from([0.5, 1.0, 12.5, 23.976, 24000 / 1001, 25.0, 29.97, 30.0, 60.0]), st.floats(0.1, 240))
SIZES = st.integers(1, 5000)


def release_rule(num_source_frames: int, fps: float) -> list[int]:
    """The rule of the release for files of 8 frames or more, written with numpy as a formula and not as our code."""
    candidates = np.arange(0, num_source_frames, max(1, round(fps)))
    if len(candidates) >= 8:
        return candidates[np.floor(np.linspace(0, len(candidates) - 1, 8)).astype(int)].tolist()
    return (np.arange(8) * max(1, (num_source_frames - 1) // 7)).tolist()


@given(st.integers(8, 100_000), RATES)
def test_enough_frames_follow_the_release(num_source_frames, fps):
    assert choose_frames(num_source_frames, fps) == release_rule(num_source_frames, fps)


@pytest.mark.parametrize(
    ("num_source_frames", "fps", "expected"),
    [
        (243, 25.0, [0, 25, 50, 75, 125, 150, 175, 225]),
        (146, 24000 / 1001, [0, 20, 40, 60, 80, 100, 120, 140]),
        (310, 30.0, [0, 30, 60, 120, 150, 210, 240, 300]),
        (8, 30.0, list(range(8))),
        (3, 30.0, [0, 0, 0, 1, 1, 1, 2, 2]),
        (1, 30.0, [0] * 8),
        (1, None, [0] * 8),
        (100, 12.5, [0, 12, 24, 36, 48, 60, 72, 96]),
    ],
)
def test_known_choices(num_source_frames, fps, expected):
    assert choose_frames(num_source_frames, fps) == expected


@given(st.integers(1, 5000), RATES, st.integers(1, 64))
def test_choices_are_in_range_and_ascend(num_source_frames, fps, num_frames):
    chosen = choose_frames(num_source_frames, fps, num_frames)
    assert len(chosen) == num_frames
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] < num_source_frames
    if num_source_frames >= num_frames:
        assert len(set(chosen)) == num_frames
    else:
        # Every frame there is is shown, and none is shown two times more often than another.
        counts = np.bincount(chosen, minlength=num_source_frames)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


@given(st.integers(1, 5000), RATES, st.floats(0.05, 300), st.one_of(st.none(), st.integers(1, 64)))
def test_choices_at_a_rate(num_source_frames, source_fps, fps, num_frames):
    chosen = choose_frames_at_rate(num_source_frames, source_fps, fps, num_frames)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] < num_source_frames
    if num_frames is None:
        ratio = meant(fps) / meant(source_fps)
        expected = min(num_source_frames, math.ceil(num_source_frames * ratio))
        assert len(chosen) == expected
    else:
        assert len(chosen) <= num_frames


def meant(rate):
    """The fraction a float stands for."""
    return Fraction(rate).limit_denominator(1_000_000)


def test_a_rate_gives_the_frames_at_its_ticks():
    assert choose_frames_at_rate(100, 25, 5) == list(range(0, 100, 5))
    assert choose_frames_at_rate(10, 30, 12) == [0, 2, 5, 7]
    assert choose_frames_at_rate(5, 25, 50) == [0, 1, 2, 3, 4]
    assert choose_frames_at_rate(30, 2, 0.2) == [0, 10, 20]
    assert choose_frames_at_rate(10**6, 24000 / 1001, 1e-9) == [0]
    assert choose_frames_at_rate(100, 25, 5, 3) == [0, 45, 95]


@given(st.integers(1, 500), st.integers(2, 100))
def test_spreading_is_exact(num_candidates, num_frames):
    expected = [math.floor(Fraction(place * (num_candidates - 1), num_frames - 1)) for place in range(num_frames)]
    assert spread_evenly(num_candidates, num_frames) == expected


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 0, -25.0, None, "25"])
def test_a_bad_rate_is_refused(fps):
    with pytest.raises(ValueError, match="fps"):
        choose_frames(100, fps)


@pytest.mark.parametrize(("num_source_frames", "num_frames"), [(0, 8), (-1, 8), (10, 0), (10, 1.5), (10, True)])
def test_bad_counts_are_refused(num_source_frames, num_frames):
    with pytest.raises(ValueError, match=r"num_(source_)?frames"):
        choose_frames(num_source_frames, 25.0, num_frames)


def test_a_window_of_time():
    times = [index / 10 for index in range(50)]
    assert frames_in_window(times, 1.0, 1.5) == [10, 11, 12, 13, 14]
    assert frames_in_window(times, None, 0.25) == [0, 1, 2]
    assert frames_in_window(times, 4.75) == [48, 49]
    for start, end in [(5.0, None), (2.0, 2.0), (3.0, 1.0), (-1.0, None), (float("nan"), None), (0.0, float("inf"))]:
        with pytest.raises(ValueError, match=r"start|end"):
            frames_in_window(times, start, end)


@pytest.mark.parametrize("indices", [[], [10], [-1], [0, 3, 99], [1.5], ["1"], [True]])
def test_bad_indices_are_refused(indices):
    with pytest.raises(ValueError, match="frame_indices"):
        check_frame_indices(indices, 10)


@given(SIZES, SIZES, st.integers(1, 64))
def test_grid(width_px, height_px, tokens):
    h, w = token_grid(width_px, height_px, tokens)
    exact = Fraction(min(width_px, height_px), max(width_px, height_px)) * tokens
    assert max(h, w) == tokens
    assert min(h, w) == math.ceil(exact)
    assert min(h, w) >= 1
    assert (w == tokens) if width_px > height_px else (h == tokens)
    rows, columns = canvas_offset(h, w, tokens)
    # Centred: what is left below and at the right is as much, or one token more.
    assert tokens - h - rows - rows in (0, 1)
    assert tokens - w - columns - columns in (0, 1)


def test_known_grids():
    assert token_grid(640, 360, 16) == (9, 16)
    assert token_grid(426, 240, 16) == (10, 16)
    assert token_grid(320, 568, 16) == (16, 10)
    assert token_grid(100, 100, 16) == (16, 16)
    assert token_grid(5000, 1, 16) == (1, 16)
    assert canvas_offset(9, 16, 16) == (3, 0)
    assert canvas_offset(16, 10, 16) == (0, 3)
    for bad in [(0, 5, 16), (5, 0, 16), (5, 5, 0), (5.0, 5, 16)]:
        with pytest.raises(ValueError, match="must be"):
            token_grid(*bad)
    with pytest.raises(ValueError, match="17 tokens"):
        canvas_offset(17, 16, 16)


def test_tokens_of_the_published_model():
    assert num_frame_tokens(16, 16) == 273
    assert num_frame_tokens(9, 16) == 154
    assert 8 * num_frame_tokens(16, 16) == 2184
    assert num_frame_tokens(16, 16, use_row_token=False) == 257


@given(st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_token_sequence(h, w, use_row_token):
    text = frame_token_sequence(h, w, "p", "r", "f", use_row_token)
    assert len(text) == num_frame_tokens(h, w, use_row_token)
    assert text[0] == "f"
    rows = text[1:].split("r")[:-1] if use_row_token else [text[1:][row * w : (row + 1) * w] for row in range(h)]
    assert rows == ["p" * w] * h


@given(st.integers(1, 60), st.sampled_from([1, 12, 23.976, 25, 29.97, 60, 120]), st.sampled_from([0.3, 1, 2, 7.5, 100]))
def test_evenly_timed_frames_are_chosen_as_without_times(num_frames, source_fps, fps):
    """Also where the container counts in whole milliseconds."""
    for times in (
        [index / source_fps for index in range(num_frames)],
        [7 + round(1000 * index / source_fps) / 1000 for index in range(num_frames)],
    ):
        for most in (None, 3):
            got = choose_frames_at_times(times, source_fps, fps, most)
            assert got == choose_frames_at_rate(num_frames, source_fps, fps, most)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.sampled_from([0.1, 0.5, 1, 2, 5]))
def test_unevenly_timed_frames_are_those_on_the_screen(gaps_ms, fps):
    times = [sum(gaps_ms[:place]) / 1000 for place in range(len(gaps_ms) + 1)]
    source_fps = len(gaps_ms) / times[-1]
    got = choose_frames_at_times(times, source_fps, fps, end=times[-1] + 1)
    tick = min(0.0010001, 0.25 / source_fps)
    shown = {0}
    for number in range(int((times[-1] + 1) * fps) + 2):
        if number / fps < times[-1] + 1 - tick:
            shown.add(max(index for index, time in enumerate(times) if time - tick <= number / fps))
    if any(abs(time - index / source_fps) > 0.0010001 for index, time in enumerate(times)):
        assert got == sorted(shown)
    assert got[0] == 0
    assert got == sorted(set(got))
