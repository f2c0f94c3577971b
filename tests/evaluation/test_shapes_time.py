"""Questions about time cannot be answered from one frame.

Exactly: for each frame of each clip there is a clip with another answer, drawn with the same probability, that shows
the same pixels in that frame. And each frame is coded by itself.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_panda.evaluation import shapes_scenes as scenes
from video_panda.evaluation.shapes_questions import TIME_KINDS, ask_about
from video_panda.evaluation.shapes_render import encode_clip, render_scene
from video_panda.processing.video_decoding_video_panda import decode_video

frames = st.integers(0, scenes.NUM_FRAMES - 1)


def scene_that_asks(kind: str, seed: int) -> scenes.Scene:
    """The first clip from `seed` on that has such a question."""
    return next(
        scene
        for scene in map(scenes.draw_scene, range(seed, seed + 1000))
        if kind in [p.kind for p in ask_about(scene)]
    )


def answer_of(scene: scenes.Scene, kind: str) -> str:
    return next(pair.answer for pair in ask_about(scene) if pair.kind == kind)


def twin(scene: scenes.Scene, kind: str, frame: int, other: str) -> scenes.Scene:
    """The clip with another answer (`other`: of a direction) that shows the same in one frame.

    Each of these maps is one-to-one between draws of the same probability.
    """
    if kind == "direction":
        only, steps = scene.objects[0], scenes.STEPS[other]
        places = scenes.grid_places(only.extent_px)
        start = tuple(
            (places.index(place) - step * frame) % len(places) for place, step in zip(only.centres[frame], steps)
        )
        moved = replace(only, centres=scenes.moving_centres(start, other, only.extent_px))
        return replace(scene, objects=(moved,), direction=other)
    if kind == "drift":
        behind = scene.background
        steps = zip(behind.phases_px, scenes.STEPS[behind.drift], scenes.STEPS[other])
        phases = tuple((phase + scenes.DRIFT_PX * frame * (a - b)) % behind.period_px for phase, a, b in steps)
        return replace(scene, background=replace(behind, phases_px=phases, drift=other))
    if kind == "flicker":
        only = scene.objects[0]
        light = only.is_bright[frame]
        if scene.flickers:
            is_bright = (light,) * scenes.NUM_FRAMES
        else:
            is_bright = tuple(light ^ bool((number - frame) % 2) for number in range(scenes.NUM_FRAMES))
        return replace(scene, objects=(replace(only, is_bright=is_bright),), flickers=not scene.flickers)
    jumps = [next(t for t in range(1, 8) if item.centres[t] != item.centres[t - 1]) for item in scene.objects]
    items = []
    for item, old, new in zip(scene.objects, jumps, reversed(jumps)):
        places = [item.centres[0], item.centres[-1]]
        if (frame >= old) != (frame >= new):
            places.reverse()
        items.append(replace(item, centres=tuple(scenes.jumping(places, new))))
    return replace(scene, objects=tuple(items), first_to_jump=1 - scene.first_to_jump)


@pytest.mark.parametrize("kind", TIME_KINDS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2 * 10**9), frames, st.sampled_from(scenes.DIRECTIONS))
def test_another_answer_shows_the_same_frame(kind, seed, frame, other):
    scene = scene_that_asks(kind, seed)
    if other in (scene.direction if kind == "direction" else None, scene.background.drift if kind == "drift" else None):
        return
    twin_scene = twin(scene, kind, frame, other)
    pixels, twin_pixels = render_scene(scene), render_scene(twin_scene)
    assert np.array_equal(pixels[frame], twin_pixels[frame])
    assert not np.array_equal(pixels, twin_pixels)
    assert answer_of(scene, kind) != answer_of(twin_scene, kind)
    # Back again: the map is one-to-one.
    back = answer_of(scene, kind) if kind in ("direction", "drift") else other
    assert np.array_equal(render_scene(twin(twin_scene, kind, frame, back)), pixels)


@pytest.mark.parametrize("seed", range(4))
def test_a_coded_frame_holds_nothing_of_its_neighbours(seed):
    pixels = render_scene(scenes.draw_scene(seed))
    decoded, _ = decode_video(encode_clip(pixels), lambda _: range(scenes.NUM_FRAMES))
    for frame in (0, 3, 7):
        alone, _ = decode_video(encode_clip(pixels[[frame] * scenes.NUM_FRAMES]), lambda _: [0, 5])
        assert (alone == decoded[frame]).all()


def fit_and_test(pictures: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the second half of a linear classifier (ridge) of the first."""
    inputs = np.concatenate([pictures.reshape(len(pictures), -1), np.ones((len(pictures), 1))], axis=1)
    half, targets = len(labels) // 2, np.eye(4)[labels]
    gram = inputs[:half] @ inputs[:half].T + 0.1 * np.eye(half)
    weights = inputs[:half].T @ np.linalg.solve(gram, targets[:half])
    return float(((inputs[half:] @ weights).argmax(axis=1) == labels[half:]).mean())


def test_a_classifier_of_first_frames_is_at_chance_and_would_find_a_leak():
    moving = [scene for scene in map(scenes.draw_scene, range(3000)) if scene.direction is not None][:600]
    labels = np.array([scenes.DIRECTIONS.index(scene.direction) for scene in moving])

    def places(scene: scenes.Scene, frame: int) -> np.ndarray:
        # Where the object is, one place in 16 x 16: all that a frame could tell about its direction.
        picture = np.zeros((16, 16))
        x, y = scene.objects[0].centres[frame]
        picture[y // 4, x // 4] = 1
        return picture

    for frame in (0, 4, 7):
        accuracy = fit_and_test(np.array([places(scene, frame) for scene in moving]), labels)
        assert accuracy == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 300))
    # Had all begun in the middle of the picture, the last frame would tell.
    leaky = []
    for scene in moving:
        only = scene.objects[0]
        middle = (len(scenes.grid_places(only.extent_px)) // 2,) * 2
        begun = replace(only, centres=scenes.moving_centres(middle, scene.direction, only.extent_px))
        leaky.append(replace(scene, objects=(begun,)))
    assert fit_and_test(np.array([places(scene, 7) for scene in leaky]), labels) > 0.5
