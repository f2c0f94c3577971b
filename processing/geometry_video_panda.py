"""The arithmetic between a video file and the token sequence: frame choice, token grid, canvas offset, token layout.

Pure functions of integers and floats, each decision in one place, so that the processor, the collator and the tests
share them. Sources: paper section 3 and the behaviour of the authors' release.

Legend: G tokens a side of the canvas; h, w token rows and columns of one frame; T frames.
"""

import math
import numbers
from fractions import Fraction

NUM_FRAMES = 8
MAX_RATE_DENOMINATOR = 1_000_000
TICK_S = 0.0010001  # the coarsest unit in which common containers (Matroska, FLV) count time, seconds


def _check_count(name: str, value: int, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"`{name}` must be an integer, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")
    return value


def check_fps(fps: float | Fraction | None, name: str = "fps") -> Fraction:
    """A frame rate as a fraction, so that sums of its steps meet whole frames exactly.

    Args:
        fps: frames per second.
        name: how the message calls it.

    Returns:
        The rate that was meant: the float 0.2 is a little more than 1/5, and 23.976023976... stands for 24000/1001.

    Raises:
        ValueError: it is None, NaN, infinite, zero or negative.
    """
    if fps is None or isinstance(fps, (bool, str)) or not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"`{name}` must be a positive, finite number of frames per second, got {fps!r}")
    exact = Fraction(float(fps))
    return exact.limit_denominator(MAX_RATE_DENOMINATOR) or exact


def spread_evenly(num_candidates: int, num_frames: int) -> list[int]:
    """The whole-number part of `num_frames` evenly spaced positions from the first candidate to the last.

    In integers: the floor of a floating-point `linspace` may fall one short where the exact value is whole.

    Args:
        num_candidates: how many there are to choose from, at least 1.
        num_frames: how many to choose, at least 1.

    Returns:
        `num_frames` ascending positions, 0 <= position < num_candidates; the first one only if `num_frames` is 1.
    """
    _check_count("num_candidates", num_candidates)
    _check_count("num_frames", num_frames)
    if num_frames == 1:
        return [0]
    return [place * (num_candidates - 1) // (num_frames - 1) for place in range(num_frames)]


def choose_frames(num_source_frames: int, fps: float | None, num_frames: int = NUM_FRAMES) -> list[int]:
    """Which frames of a video the model sees, when nothing else is asked for.

    One frame a second if that gives enough, thinned out evenly if it gives too many, closer together if too few
    (behaviour of the release). A video with fewer frames than places fills them evenly: place i shows source frame
    i * n // num_frames. The release pads with empty frames there and feeds their noise to the language model, which
    is a defect and not copied.

    Args:
        num_source_frames: number of frames n in the video.
        fps: its frames per second; may be unknown (None) if there are fewer frames than places.
        num_frames: number of frames to choose.

    Returns:
        `num_frames` ascending frame indices, with duplicates only if n < num_frames.

    Raises:
        ValueError: there are no frames, or the rate is not a positive finite number.
    """
    _check_count("num_source_frames", num_source_frames)
    _check_count("num_frames", num_frames)
    if num_source_frames < num_frames:
        if fps is not None:
            check_fps(fps)
        return [place * num_source_frames // num_frames for place in range(num_frames)]
    check_fps(fps)
    # PARITY: Python's round, halves to even, as the release.
    step = max(1, round(float(fps)))
    candidates = range(0, num_source_frames, step)
    if len(candidates) >= num_frames:
        return [candidates[position] for position in spread_evenly(len(candidates), num_frames)]
    # Fewer candidates than places, and at least one: there are two places or more, so nothing divides by zero.
    step = max(1, (num_source_frames - 1) // (num_frames - 1))
    return list(range(0, step * num_frames, step))


def choose_frames_at_rate(
    num_source_frames: int, source_fps: float, fps: float, num_frames: int | None = None
) -> list[int]:
    """Frames at a rate the user asked for.

    Args:
        num_source_frames: number of frames in the video.
        source_fps: its frames per second.
        fps: wanted frames per second; a rate above the source's gives every frame once.
        num_frames: at most so many, evenly thinned out; None for all.

    Returns:
        Ascending frame indices without duplicates, the first frame among them.

    Raises:
        ValueError: there are no frames, or a rate is not a positive finite number.
    """
    _check_count("num_source_frames", num_source_frames)
    step = max(Fraction(1), check_fps(source_fps, "source_fps") / check_fps(fps))
    num_candidates = math.ceil(num_source_frames / step)
    positions = range(num_candidates)
    if num_frames is not None and num_candidates > _check_count("num_frames", num_frames):
        positions = spread_evenly(num_candidates, num_frames)
    return [math.floor(position * step) for position in positions]


def choose_frames_at_times(
    frame_times: list[float], source_fps: float, fps: float, num_frames: int | None = None, end: float | None = None
) -> list[int]:
    """The same where the time of each frame is known: what is on the screen every 1/fps seconds.

    Args:
        frame_times: when each frame begins, seconds, ascending.
        source_fps: their average number per second.
        fps: wanted frames per second, counted from the first frame.
        num_frames: at most so many, evenly thinned out; None for all.
        end: when the last frame makes room for the next one, seconds; None: after 1 / source_fps.

    Returns:
        Ascending positions without duplicates: for k = 0, 1, ... the last frame that has begun after k / fps seconds.

    Raises:
        ValueError: there are no frames, or a rate is not a positive finite number.
    """
    source_rate, rate = check_fps(source_fps, "source_fps"), check_fps(fps)
    starts = [time - frame_times[0] for time in frame_times]
    if all(abs(time - index / source_rate) <= TICK_S for index, time in enumerate(starts)):
        # Evenly spaced but for the container's rounding, which would push a frame just behind its place.
        return choose_frames_at_rate(len(starts), source_fps, fps, num_frames)
    end = starts[-1] + float(1 / source_rate) if end is None else end - frame_times[0]
    tick = min(TICK_S, 0.25 / float(source_rate))
    # The number k of the first moment at which each frame has begun; the last entry is the end of the last frame.
    first_moments = [math.ceil((time - tick) * rate) for time in [*starts, end]]
    shown = [index for index in range(len(starts)) if first_moments[index] < first_moments[index + 1]]
    chosen = shown if shown[:1] == [0] else [0, *shown]
    if num_frames is not None and len(chosen) > _check_count("num_frames", num_frames):
        chosen = [chosen[position] for position in spread_evenly(len(chosen), num_frames)]
    return chosen


def frames_in_window(frame_times: list[float], start: float | None = None, end: float | None = None) -> list[int]:
    """The frames that begin within a stretch of time.

    Args:
        frame_times: when each frame begins, seconds after the first, ascending.
        start: seconds; None for the beginning.
        end: seconds, itself left out; None for the end of the video.

    Returns:
        Frame indices with start <= time < end.

    Raises:
        ValueError: the window is not one (NaN, negative, end not after start), or no frame begins in it.
    """
    for name, value in (("start", start), ("end", end)):
        if value is not None and (not math.isfinite(value) or value < 0):
            raise ValueError(f"`{name}` must be a finite number of seconds, at least 0, got {value!r}")
    first, last = 0.0 if start is None else start, math.inf if end is None else end
    if last <= first:
        raise ValueError(f"`end` must be after `start`, got start={first} s and end={last} s")
    # Half a microsecond of slack: times are sums of a container's ticks, so 2.0 may read 1.9999999.
    slack = 5e-7
    chosen = [index for index, time in enumerate(frame_times) if first - slack <= time < last - slack]
    if not chosen:
        span = f"its frames begin between 0 and {frame_times[-1]:.3f} s" if frame_times else "it has no frames"
        raise ValueError(f"no frame begins between start={first} s and end={last} s of the video: {span}")
    return chosen


def check_frame_indices(indices: list[int], num_source_frames: int) -> list[int]:
    """Frame indices a user gave, as a list of plain integers.

    Args:
        indices: frame numbers from 0, in any order, duplicates allowed.
        num_source_frames: number of frames in the video.

    Returns:
        The same numbers.

    Raises:
        ValueError: none given, not whole numbers, or outside 0 ... num_source_frames - 1.
    """
    numbers = []
    for index in indices:
        if isinstance(index, (bool, str)) or int(index) != index:
            raise ValueError(f"`frame_indices` must be whole numbers, got {index!r}")
        numbers.append(int(index))
    if not numbers:
        raise ValueError("`frame_indices` is empty; expected at least one frame number")
    outside = [index for index in numbers if not 0 <= index < num_source_frames]
    if outside:
        raise ValueError(
            f"`frame_indices` out of range: {outside}; the video has {num_source_frames} frames, "
            f"so indices go from 0 to {num_source_frames - 1}"
        )
    return numbers


def token_grid(width_px: int, height_px: int, tokens_per_side: int) -> tuple[int, int]:
    """How many token rows and columns a picture takes: the longer side fills the canvas, the shorter is rounded up.

    Args:
        width_px: width of the picture, px.
        height_px: height of the picture, px.
        tokens_per_side: G, tokens a side of the square canvas.

    Returns:
        (h, w), each from 1 to G. Source: behaviour of the release.

    Raises:
        ValueError: a size below 1.
    """
    _check_count("width_px", width_px)
    _check_count("height_px", height_px)
    _check_count("tokens_per_side", tokens_per_side)
    # -(-a // b) is the exact ceiling of a / b; both are at least 1, so a side never vanishes.
    if width_px > height_px:
        return -(-tokens_per_side * height_px // width_px), tokens_per_side
    return tokens_per_side, -(-tokens_per_side * width_px // height_px)


def canvas_offset(h: int, w: int, tokens_per_side: int) -> tuple[int, int]:
    """Where the picture's top left corner lies on the canvas.

    Args:
        h: token rows of the picture.
        w: token columns of the picture.
        tokens_per_side: G, tokens a side of the square canvas.

    Returns:
        (rows, columns) in tokens, rounded down.

    Raises:
        ValueError: the picture is empty or larger than the canvas.
    """
    for name, value in (("h", h), ("w", w)):
        if _check_count(name, value) > tokens_per_side:
            raise ValueError(f"`{name}` is {value} tokens, more than the canvas' {tokens_per_side}")
    return (tokens_per_side - h) // 2, (tokens_per_side - w) // 2


def num_frame_tokens(h: int, w: int, use_row_token: bool = True) -> int:
    """Tokens of one frame: its context token, then each row's w tokens and, normally, a `<row>`.

    Args:
        h: token rows.
        w: token columns.
        use_row_token: whether rows end with a `<row>` token (the paper's ablation goes without).

    Returns:
        h * (w + 1) + 1, or h * w + 1.
    """
    _check_count("h", h)
    _check_count("w", w)
    return h * (w + int(use_row_token)) + 1


def frame_token_sequence(
    h: int, w: int, patch_token: str, row_token: str, frame_token: str, use_row_token: bool = True
) -> str:
    """The placeholder text of one frame, in the order in which STAB gives its features.

    Args:
        h: token rows.
        w: token columns.
        patch_token: stands for one patch feature (`<video>` or `<image>`).
        row_token: stands for the end of a row.
        frame_token: stands for the frame's context feature.
        use_row_token: whether rows end with `row_token`.

    Returns:
        `frame_token` followed by h times (w times `patch_token`, then `row_token`): `num_frame_tokens` tokens.
    """
    _check_count("h", h)
    _check_count("w", w)
    return frame_token + (patch_token * w + (row_token if use_row_token else "")) * h
