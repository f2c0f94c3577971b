"""What is in a clip of ShapesQA, drawn from its seed; no pixels here.

A clip belongs to one of four families, each with its own questions:

- "single": one object, still or moving, over a plain, a noisy or a drifting background, in steady or flickering light;
- "count": one to four still objects;
- "relation": two still objects, one left of, right of, above or below the other;
- "order": two objects, each of which jumps once, one before the other.

No frame by itself may tell an answer about time. Hence whatever a single frame shows is, at each frame number, equally
likely under each answer: a moving object starts anywhere on its path and goes on at the other end when it reaches one
end; the drifting background is a chequer of waves along both axes with a phase drawn evenly; a steady light is bright
or dim as often as a flickering one in any of its frames; an object that jumps has two places and starts at either.

Centres lie on a grid of 4 px: a patch of the model, which looks at it by linear filters only, then meets a shape at few
offsets, and a tiny model finds out about shapes within minutes.

Legend: px of a 64 x 64 clip, x to the right and y downwards; T = 8 frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE_PX = 64
NUM_FRAMES = 8

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
TEXTURES = ("plain", "striped", "checked")
SIZES = ("small", "large")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "centre")
DIRECTIONS = ("left", "right", "up", "down")
RELATIONS = ("left", "right", "above", "below")
BACKGROUNDS = ("plain", "noisy", "drifting")
COUNTS = (1, 2, 3, 4)

FAMILIES = ("single", "count", "relation", "order")
_FAMILY_OF_SIXTH = ("single", "single", "single", "count", "relation", "order")

RADIUS_PX = {"small": 7, "large": 12}
GRID_PX = 4  # of the centres; a moving object goes one step of the grid a frame
DRIFT_PX = 2  # of a background, px a frame: below half of each period, so that its direction is unambiguous
PERIODS_PX = (6, 8)  # of a drifting background: fine, about one patch of the model
MIN_JUMP_GAP = 2  # frames between two jumps
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Half the width of each shape over the radius of the circle of about the same area.
_EXTENTS = {"circle": 1.0, "square": 0.9, "triangle": 1.15, "cross": 1.15}


class Draws:
    """Choices that depend on the seed alone.

    Only the raw numbers of PCG64 are used: numpy guarantees those for every version and machine, which it does not for
    the methods of its `Generator`.

    Args:
        key: whole numbers, at least 0; different keys give independent choices.
    """

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, limit: int) -> int:
        """A whole number, 0 <= number < limit, each equally likely."""
        return int(self._bits.random_raw()) % limit  # 2**64 is so large that the remainder is even enough

    def between(self, first: int, last: int) -> int:
        """A whole number, first <= number <= last."""
        return first + self.below(last - first + 1)

    def choice(self, options: Sequence):
        """One of the options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence) -> list:
        """All options in any order."""
        options = list(options)
        for last in range(len(options) - 1, 0, -1):
            other = self.below(last + 1)
            options[last], options[other] = options[other], options[last]
        return options

    def bytes(self, num_bytes: int) -> np.ndarray:
        """uint8 (num_bytes,), each value equally likely."""
        return self._bits.random_raw(-(-num_bytes // 8)).astype("<u8").view(np.uint8)[:num_bytes]


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape, colour, texture, size: words.
        radius_px: of the circle of about the same area.
        centres: (x, y) of its centre in each frame, px.
        is_bright: whether it is shown in full light, for each frame.
    """

    shape: str
    colour: str
    texture: str
    size: str
    radius_px: int
    centres: tuple[tuple[int, int], ...]
    is_bright: tuple[bool, ...] = (True,) * NUM_FRAMES

    @property
    def extent_px(self) -> int:
        """Its pixels lie within centre - extent_px ... centre + extent_px, both included."""
        return extent_px(self.shape, self.radius_px)


@dataclass(frozen=True)
class Background:
    """What lies behind the objects, in shades of grey.

    Attributes:
        kind: one of `BACKGROUNDS`.
        grey: mean brightness, 0 ... 255.
        noise_seed: of a noisy one.
        period_px: of the waves of a drifting one.
        phases_px: by how far its waves are shifted to the right and downwards in the first frame, px.
        drift: where to a drifting one moves, or None.
    """

    kind: str
    grey: int
    noise_seed: int = 0
    period_px: int = 0
    phases_px: tuple[int, int] = (0, 0)
    drift: str | None = None


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about a clip; a fact that has no meaning in it is None.

    Attributes:
        seed: from which it was drawn.
        family: one of `FAMILIES`.
        objects: later ones cover earlier ones.
        background: behind them.
        direction: where to the only object moves.
        position: where the only object rests.
        flickers: whether the light on the only object changes from frame to frame.
        relation: where the first object is, seen from the second.
        first_to_jump: the number of the object that jumps first.
    """

    seed: int
    family: str
    objects: tuple[SceneObject, ...]
    background: Background
    direction: str | None = None
    position: str | None = None
    flickers: bool | None = None
    relation: str | None = None
    first_to_jump: int | None = None


def extent_px(shape: str, radius_px: int) -> int:
    """How far a shape reaches from its centre along each axis, px."""
    return math.ceil(_EXTENTS[shape] * radius_px)


def half_width_px(shape: str, radius_px: int) -> float:
    """Half the width of a shape, px."""
    return _EXTENTS[shape] * radius_px


def draw_family(seed: int) -> str:
    """The family of the clip of a seed: half are "single", a sixth each the others."""
    return Draws(seed, 0).choice(_FAMILY_OF_SIXTH)


def draw_scene(seed: int) -> Scene:
    """The clip of a seed.

    Args:
        seed: a whole number, at least 0.

    Returns:
        The scene: the same on every machine.

    Raises:
        ValueError: the seed is no such number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"a seed must be a whole number of at least 0, got {seed!r}")
    family = draw_family(seed)
    draws = Draws(seed, 1)
    draw = {"single": _draw_single, "count": _draw_count, "relation": _draw_relation, "order": _draw_order}[family]
    return draw(seed, draws)


# ---------------------------------------------------------------------------------------------------- the families


def _draw_single(seed: int, draws: Draws) -> Scene:
    look = _draw_look(draws, draws.choice(SIZES))
    # Half of the backgrounds drift: it is the hardest to learn and there is nothing else to ask about the others.
    background = _draw_background(draws, draws.choice(("plain", "noisy", "drifting", "drifting")))
    extent = extent_px(look["shape"], look["radius_px"])
    direction = position = None
    if draws.below(2):
        direction = draws.choice(DIRECTIONS)
        num_places = len(grid_places(extent))
        centres = moving_centres((draws.below(num_places), draws.below(num_places)), direction, extent)
    else:
        position = draws.choice(POSITIONS)
        centres = (_draw_centre(draws, position, extent),) * NUM_FRAMES
    flickers, is_bright = _draw_light(draws)
    only = SceneObject(**look, centres=centres, is_bright=is_bright)
    return Scene(seed, "single", (only,), background, direction=direction, position=position, flickers=flickers)


def grid_places(extent: int, first: int = 0, last: int = SIDE_PX - 1) -> range:
    """Where on the grid a centre may lie along an axis, so that the object is wholly in the picture.

    Args:
        extent: how far the object reaches from its centre, px.
        first, last: of the places wanted, px.
    """
    first, last = max(first, extent), min(last, SIDE_PX - 1 - extent)
    return range(math.ceil(first / GRID_PX) * GRID_PX, last + 1, GRID_PX)


def moving_centres(start: tuple[int, int], direction: str, extent: int) -> tuple[tuple[int, int], ...]:
    """The path of a moving object, which is always wholly in the picture.

    Args:
        start: numbers of the places along both axes where it begins, as `grid_places` counts them.
        direction: one of `DIRECTIONS`; where its path ends it goes on at the other end.
        extent: how far it reaches from its centre, px.

    Returns:
        (x, y) of its centre in each frame, px.
    """
    places = grid_places(extent)
    return tuple(
        tuple(places[(begin + frame * step) % len(places)] for begin, step in zip(start, STEPS[direction]))
        for frame in range(NUM_FRAMES)
    )


def _draw_centre(draws: Draws, position: str, extent: int) -> tuple[int, int]:
    """A place that nobody would call by another name: at least 8 px from both middle lines, or where they meet."""
    if position == "centre":
        return (SIDE_PX // 2,) * 2
    low, high = grid_places(extent, last=24), grid_places(extent, first=40)
    vertical, horizontal = position.split()
    return draws.choice(low if horizontal == "left" else high), draws.choice(low if vertical == "top" else high)


def _draw_light(draws: Draws) -> tuple[bool | None, tuple[bool, ...]]:
    """Half of the objects are in full light and nobody asks; of the others half flicker, half are steady."""
    if draws.below(2):
        return None, (True,) * NUM_FRAMES
    flickers, begins_bright = bool(draws.below(2)), bool(draws.below(2))
    return flickers, tuple(begins_bright ^ bool(flickers and frame % 2) for frame in range(NUM_FRAMES))


def _draw_count(seed: int, draws: Draws) -> Scene:
    background = _draw_background(draws, draws.choice(("plain", "plain", "noisy", "drifting")))
    # Nine places 20 px from each other: small objects never touch.
    cells = draws.shuffled([(x, y) for y in (12, 32, 52) for x in (12, 32, 52)])
    objects = []
    for centre in cells[: draws.choice(COUNTS)]:
        objects.append(SceneObject(**_draw_look(draws, "small"), centres=(centre,) * NUM_FRAMES))
    return Scene(seed, "count", tuple(objects), background)


def _draw_relation(seed: int, draws: Draws) -> Scene:
    background = _draw_background(draws, draws.choice(("plain", "plain", "noisy", "drifting")))
    looks = _draw_two_looks(draws)
    relation = draws.choice(RELATIONS)
    extent = max(extent_px(look["shape"], look["radius_px"]) for look in looks)
    distance = draws.choice([step for step in (20, 24, 28) if step > 2 * extent])
    along = draws.choice(grid_places(extent, last=SIDE_PX - 1 - extent - distance))
    across = draws.choice(grid_places(extent + GRID_PX))
    # Nearer to the left or upper border, and farther from it.
    near, far = (along, across), (along + distance, across + GRID_PX * draws.between(-1, 1))
    centres = (near, far) if relation in ("left", "above") else (far, near)
    if relation in ("above", "below"):
        centres = tuple((x, y) for y, x in centres)
    objects = [SceneObject(**look, centres=(centre,) * NUM_FRAMES) for look, centre in zip(looks, centres)]
    return Scene(seed, "relation", tuple(objects), background, relation=relation)


def _draw_order(seed: int, draws: Draws) -> Scene:
    background = _draw_background(draws, draws.choice(("plain", "plain", "noisy", "drifting")))
    looks = _draw_two_looks(draws)
    first, is_vertical = draws.below(2), bool(draws.below(2))
    early = draws.between(1, NUM_FRAMES - 1 - MIN_JUMP_GAP)
    late = draws.between(early + MIN_JUMP_GAP, NUM_FRAMES - 1)
    objects = []
    lanes = draws.shuffled([(12, 16, 20), (44, 48, 52)])
    for number, (look, lane) in enumerate(zip(looks, lanes)):
        across = draws.choice(lane)
        places = draws.shuffled([draws.choice((12, 16, 20)), draws.choice((44, 48, 52))])
        along = jumping(places, early if number == first else late)
        centres = tuple((across, place) if is_vertical else (place, across) for place in along)
        objects.append(SceneObject(**look, centres=centres))
    return Scene(seed, "order", tuple(objects), background, first_to_jump=first)


def jumping(places: Sequence, jump_frame: int) -> list:
    """Where an object is in each frame: at the first place before frame `jump_frame`, at the second from then on."""
    return [places[int(frame >= jump_frame)] for frame in range(NUM_FRAMES)]


# ------------------------------------------------------------------------------------------------------- their parts


def _draw_look(draws: Draws, size: str) -> dict:
    return {
        "shape": draws.choice(SHAPES),
        "colour": draws.choice(COLOURS),
        "texture": draws.choice(TEXTURES),
        "size": size,
        "radius_px": RADIUS_PX[size],
    }


def _draw_two_looks(draws: Draws) -> list[dict]:
    """Two small objects of different colours, by which the questions name them."""
    colours = draws.shuffled(COLOURS)[:2]
    return [_draw_look(draws, "small") | {"colour": colour} for colour in colours]


def _draw_background(draws: Draws, kind: str) -> Background:
    grey = draws.between(80, 140)
    if kind == "noisy":
        return Background(kind, grey, noise_seed=draws.below(2**32))
    if kind == "drifting":
        period = draws.choice(PERIODS_PX)
        phases = (draws.below(period), draws.below(period))
        return Background(kind, grey, period_px=period, phases_px=phases, drift=draws.choice(DIRECTIONS))
    return Background(kind, grey)
