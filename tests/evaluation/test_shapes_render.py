"""What is drawn can be read back from the mp4 files by simple rules, and the labels of the cells fit the pixels."""

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from video_panda import VideoPandaVideoProcessor
from video_panda.evaluation import shapes_scenes as scenes
from video_panda.evaluation.shapes_questions import ask_about
from video_panda.evaluation.shapes_render import RGB, cell_labels, encode_clip, render_scene, write_clip
from video_panda.processing.geometry_video_panda import choose_frames
from video_panda.processing.video_decoding_video_panda import decode_video

NUM_CLIPS = 60


@cache
def decoded_clip(seed: int) -> tuple[scenes.Scene, np.ndarray]:
    scene = scenes.draw_scene(seed)
    frames, _ = decode_video(
        encode_clip(render_scene(scene)), lambda facts: choose_frames(facts.total_num_frames, facts.fps)
    )
    return scene, frames.numpy().astype(np.float64)


def object_pixels(frames: np.ndarray, colour: str | None = None) -> np.ndarray:
    """Where there is colour, (T, H, W); of two objects, where it is nearer to the colour's hue."""
    chroma = frames - frames.mean(axis=-1, keepdims=True)
    strength = np.linalg.norm(chroma, axis=-1)
    mask = strength > 40
    if colour is not None:
        mask &= nearest_colour(chroma) == scenes.COLOURS.index(colour)
    return mask


def nearest_colour(chroma: np.ndarray) -> np.ndarray:
    palette = np.array([RGB[name] for name in scenes.COLOURS], np.float64)
    palette -= palette.mean(axis=-1, keepdims=True)
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    return (chroma @ palette.T).argmax(axis=-1)


def centroids(mask: np.ndarray) -> np.ndarray:
    """(T, 2): x, y."""
    return np.array([np.argwhere(frame)[:, ::-1].mean(axis=0) for frame in mask])


def read_colour(frames, question):
    chroma = (frames - frames.mean(axis=-1, keepdims=True))[object_pixels(frames)].mean(axis=0)
    return scenes.COLOURS[nearest_colour(chroma)]


def read_position(frames, question):
    x, y = centroids(object_pixels(frames)).mean(axis=0)
    if max(abs(x - 31.5), abs(y - 31.5)) < 7:
        return "centre"
    return f"{'top' if y < 31.5 else 'bottom'} {'left' if x < 31.5 else 'right'}"


def read_direction(frames, question):
    step = np.median(np.diff(centroids(object_pixels(frames)), axis=0), axis=0)
    return min(scenes.DIRECTIONS, key=lambda name: np.abs(step - 3 * np.array(scenes.STEPS[name])).sum())


def read_drift(frames, question):
    """The shift of 2 px that turns each frame into the next one, away from the object."""
    grey, mask = frames.mean(axis=-1), ~object_pixels(frames)

    def mismatch(name):
        x, y = (2 * step for step in scenes.STEPS[name])
        moved, seen = (np.roll(array[:-1], (y, x), axis=(1, 2)) for array in (grey, mask))
        both = (seen & mask[1:])[:, 4:-4, 4:-4]
        return np.abs(moved - grey[1:])[:, 4:-4, 4:-4][both].mean()

    return min(scenes.DIRECTIONS, key=mismatch)


def read_flicker(frames, question):
    light = np.array([frame[seen].max(axis=-1).mean() for frame, seen in zip(frames, object_pixels(frames))])
    return "yes" if light.max() > 1.3 * light.min() else "no"


def read_size(frames, question):
    # Moderate thresholds lose the dark parts of a texture but not the outline.
    spans = [np.ptp(np.argwhere(frame), axis=0).max() for frame in object_pixels(frames)]
    return "small" if np.median(spans) < 19.5 else "large"


def read_order(frames, question):
    first_jump = {
        colour: np.abs(np.diff(centroids(object_pixels(frames, colour)), axis=0)).max(axis=1).argmax()
        for colour in question.choices
    }
    return min(first_jump, key=first_jump.get)


def read_relation(frames, question):
    words = question.question.replace(",", " ").replace("?", " ").split()
    named = [word for word in words if word in RGB]
    # The one that is placed stands behind "the ... object/one"; which of the two it is depends on the phrasing.
    placed, reference = named if question.question.startswith(("Where is", "Where does")) else reversed(named)
    x, y = (centroids(object_pixels(frames, placed)) - centroids(object_pixels(frames, reference))).mean(axis=0)
    return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("above" if y < 0 else "below")


def read_count(frames, question):
    """Connected patches of colour."""
    left = {tuple(place) for place in np.argwhere(object_pixels(frames)[0])}
    num_patches = 0
    while left:
        num_patches += 1
        waiting = [left.pop()]
        while waiting:
            y, x = waiting.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            waiting += near
    return ("one", "two", "three", "four")[num_patches - 1]


READERS = {
    "colour": read_colour,
    "position": read_position,
    "direction": read_direction,
    "drift": read_drift,
    "flicker": read_flicker,
    "size": read_size,
    "count": read_count,
    "order": read_order,
    "relation": read_relation,
}


@pytest.mark.parametrize("kind", READERS)
def test_the_answer_can_be_read_from_the_decoded_file(kind):
    num_asked, wrong = 0, []
    for seed in range(NUM_CLIPS):
        scene, frames = decoded_clip(seed)
        for question in ask_about(scene):
            if question.kind == kind:
                num_asked += 1
                if (got := READERS[kind](frames, question)) != question.answer:
                    wrong.append((seed, got, question.answer))
    assert num_asked >= 5
    assert wrong == []


@pytest.mark.parametrize("seed", range(15))
def test_shape_texture_and_size_survive_the_coding(seed):
    """Of all objects that could be in its place, the one in the file is nearest to the one that was drawn."""
    scene, frames = decoded_clip(seed)
    (item, *others), mismatch = scene.objects, {}
    radii = list(scenes.RADIUS_PX.items())
    if scene.family != "single":
        radii = [(item.size, item.radius_px)]  # no room for others
    for shape, texture, (size, radius) in itertools.product(scenes.SHAPES, scenes.TEXTURES, radii):
        candidate = replace(item, shape=shape, texture=texture, radius_px=radius, size=size)
        if (
            max(map(max, item.centres)) + candidate.extent_px < 64
            and min(map(min, item.centres)) >= candidate.extent_px
        ):
            pixels = render_scene(replace(scene, objects=(candidate, *others)))
            mismatch[shape, texture, size, radius] = np.square(pixels[0] - frames[0]).sum()
    best = min(mismatch, key=mismatch.get)
    assert best[:3] == (item.shape, item.texture, item.size)


def test_decoded_frames_are_close_to_the_drawn_ones():
    for seed in range(NUM_CLIPS):
        scene, frames = decoded_clip(seed)
        error = np.abs(frames - render_scene(scene))
        assert error.mean() < 5  # edges and textures of colours lose most: files hold a quarter of the colours
        assert np.abs(frames.mean(axis=-1) - render_scene(scene).mean(axis=-1)).mean() < 4


def test_colours_stay_apart_in_the_file_in_full_and_in_dim_light():
    for light in (True, False):
        means = []
        for colour in scenes.COLOURS:
            item = scenes.SceneObject("square", colour, "plain", "large", 12, ((30, 30),) * 8, (light,) * 8)
            scene = scenes.Scene(0, "single", (item,), scenes.Background("plain", 110))
            decoded, _ = decode_video(encode_clip(render_scene(scene)), lambda _: [0])
            means.append(decoded[0, 24:37, 24:37].double().mean(dim=(0, 1)).numpy())
        distances = np.linalg.norm(np.array(means)[:, None] - np.array(means)[None], axis=-1)
        assert distances[~np.eye(len(means), dtype=bool)].min() > 60


def test_the_processor_takes_all_eight_frames_as_they_are(tmp_path):
    write_clip(7, tmp_path / "clip.mp4")
    processor = VideoPandaVideoProcessor(image_size=64, patch_size=8)
    output = processor(
        str(tmp_path / "clip.mp4"), do_normalize=False, do_rescale=False, return_metadata=True, return_tensors="pt"
    )
    assert output["video_grid_thw"].tolist() == [[8, 4, 4]]
    assert output["video_metadata"][0].frames_indices == list(range(8))
    assert output["video_metadata"][0].fps == 1
    decoded, _ = decode_video(tmp_path / "clip.mp4", lambda _: range(8))
    assert torch.equal(output["pixel_values_videos"][0], decoded.permute(0, 3, 1, 2))


def test_a_seed_gives_the_same_file_and_another_seed_another_one(tmp_path):
    write_clip(3, tmp_path / "a.mp4")
    write_clip(3, tmp_path / "b.mp4")
    write_clip(4, tmp_path / "c.mp4")
    contents = [(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")]
    assert contents[0] == contents[1] != contents[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


def test_a_clip_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(OSError, match=r"clip\.mp4"):
        write_clip(0, tmp_path / "clip.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("cell_px", [8, 16])
def test_labels_name_what_the_cell_shows(seed, cell_px):
    scene = scenes.draw_scene(seed)
    labels = cell_labels(scene, cell_px)
    num_cells = 64 // cell_px
    # An object alone on black: its pixels are the ones that are not black.
    seen = []
    for item in scene.objects:
        x, y = np.array(item.centres).T
        canvas = np.zeros((8, 64, 64))
        for frame in range(8):
            window = np.s_[frame, y[frame] - item.extent_px : y[frame] + item.extent_px + 1]
            canvas[window][:, x[frame] - item.extent_px : x[frame] + item.extent_px + 1] = 1
        seen.append(canvas.reshape(8, num_cells, cell_px, num_cells, cell_px).mean(axis=(2, 4)))
    for name in ("object", "shape", "colour", "texture", "size", "is_bright", "direction", "background", "drift"):
        values = getattr(labels, name)
        assert values.shape == (8, num_cells, num_cells)
        assert values.dtype == np.int64
    for number, item in enumerate(scene.objects, start=1):
        own = labels.object == number
        assert own.any(axis=(1, 2)).all()
        # The square around an object holds at least its share.
        assert (seen[number - 1][own] > (0.29 if cell_px == 8 else 0)).all()
        assert set(labels.colour[own]) == {1 + scenes.COLOURS.index(item.colour)}
        assert set(labels.shape[own]) == {1 + scenes.SHAPES.index(item.shape)}
        assert set(labels.texture[own]) == {1 + scenes.TEXTURES.index(item.texture)}
        assert set(labels.size[own]) == {1 + scenes.SIZES.index(item.size)}
        for frame in range(8):
            assert set(labels.is_bright[frame][own[frame]]) <= {1 + item.is_bright[frame]}
    free = labels.object == 0
    for name in ("shape", "colour", "texture", "size", "is_bright", "direction"):
        assert (getattr(labels, name)[free] == 0).all()
    assert (labels.background == scenes.BACKGROUNDS.index(scene.background.kind)).all()
    expected = 0 if scene.background.drift is None else 1 + scenes.DIRECTIONS.index(scene.background.drift)
    assert (labels.drift == expected).all()


def test_the_cover_of_a_cell_by_hand():
    item = scenes.SceneObject("square", "red", "plain", "large", 10, ((16, 16),) * 8)  # 7 ... 25 px, edges full
    labels = cell_labels(scenes.Scene(0, "single", (item,), scenes.Background("plain", 100)))
    assert labels.cover[0, 1:3, 1:3].tolist() == [[1, 1], [1, 1]]
    # Pixel 7 is half covered: one row of eight, at half.
    assert labels.cover[0, 0, 1] == pytest.approx(0.5 / 8)
    assert labels.object[0].tolist()[1][:4] == [0, 1, 1, 0]
    assert labels.cover.dtype == np.float32


@pytest.mark.parametrize("cell_px", [0, 7, 128, 8.0, True])
def test_cells_that_do_not_fill_the_picture(cell_px):
    with pytest.raises(ValueError, match="must divide the side of 64 px"):
        cell_labels(scenes.draw_scene(0), cell_px)
