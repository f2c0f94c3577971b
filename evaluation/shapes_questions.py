"""What can be said and asked about a scene of ShapesQA: captions, questions, answers.

For each kind of question every choice is equally likely whatever the words of the question and whatever else is said
about the clip, because `shapes_scenes` draws the facts independently and evenly: a constant answer, or any rule that
looks at words only, is right as often as `CHANCE` says. Questions about one object do not describe it.
"""

from dataclasses import dataclass

from .shapes_scenes import (
    COLOURS,
    COUNTS,
    DIRECTIONS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Draws,
    Scene,
    SceneObject,
)

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
YES_NO = ("yes", "no")

# The choices of each kind, in the order of the reports; those of "order" are the two colours that the question names.
CHOICES = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "count": tuple(NUMBERS[count] for count in COUNTS),
    "position": POSITIONS,
    "direction": DIRECTIONS,
    "texture": TEXTURES,
    "drift": DIRECTIONS,
    "flicker": YES_NO,
    "order": ("first named", "second named"),
    "relation": RELATIONS,
}
KINDS = tuple(CHOICES)
CHANCE = {kind: 1 / len(choices) for kind, choices in CHOICES.items()}
# No single frame tells these.
TIME_KINDS = ("direction", "drift", "flicker", "order")
# What a model learns within minutes; the others ask it to bind colours to places, or to compare neighbouring frames.
BASIC_KINDS = ("colour", "shape", "size", "count", "position", "direction", "texture", "drift")

_PHRASINGS = {
    "colour": (
        "What colour is the object?",
        "Which colour does the object have?",
        "What is the colour of the object?",
        "Name the colour of the object.",
    ),
    "shape": (
        "What shape is the object?",
        "Which shape does the object have?",
        "What is the shape of the object?",
        "Name the shape of the object.",
    ),
    "size": (
        "How big is the object?",
        "What size is the object?",
        "What is the size of the object?",
        "Is the object small or large?",
    ),
    "count": (
        "How many objects are there?",
        "How many objects do you see?",
        "What is the number of objects?",
        "Count the objects.",
    ),
    "position": (
        "Where is the object?",
        "In which part of the picture is the object?",
        "What is the position of the object?",
        "Where does the object lie?",
    ),
    "direction": (
        "Which way does the object move?",
        "In which direction does the object move?",
        "What is the direction of the object?",
        "Where does the object move to?",
    ),
    "texture": (
        "What texture does the object have?",
        "Which pattern is on the object?",
        "What is the texture of the object?",
        "Is the object plain, striped or checked?",
    ),
    "drift": (
        "Which way does the background drift?",
        "In which direction does the background drift?",
        "What is the direction of the background?",
        "Where does the background drift to?",
    ),
    "flicker": (
        "Does the object flicker?",
        "Is the object flickering?",
        "Does the light on the object flicker?",
        "Is there any flicker on the object?",
    ),
    "order": (
        "Which object jumps first, the {a} one or the {b} one?",
        "Does the {a} object or the {b} object jump first?",
        "Which one is the first to jump, {a} or {b}?",
        "What colour is the object that jumps first, {a} or {b}?",
    ),
    "relation": (
        "Where is the {a} object relative to the {b} one?",
        "Seen from the {b} object, where is the {a} one?",
        "On which side of the {b} object is the {a} one?",
        "Where does the {a} object lie, seen from the {b} one?",
    ),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its answer.

    Attributes:
        kind: one of `KINDS`.
        question: the text.
        answer: one or two words, one of `choices`.
        choices: the possible answers.
    """

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...]


def ask_about(scene: Scene, words_seed: int = 0) -> list[QuestionAnswer]:
    """Every question that a scene answers, one of each kind, in random order and words.

    Args:
        scene: the scene.
        words_seed: another one asks the same in other words.

    Returns:
        One to seven questions.
    """
    draws = Draws(scene.seed, 3, words_seed)
    pairs = []
    for kind, fact in _facts(scene).items():
        if kind == "relation":
            pairs.append(_ask_relation(scene, draws))
        elif kind == "order":
            pairs.append(_ask_order(scene, draws))
        else:
            pairs.append(QuestionAnswer(kind, draws.choice(_PHRASINGS[kind]), fact, CHOICES[kind]))
    return draws.shuffled(pairs)


def _facts(scene: Scene) -> dict[str, str | None]:
    """The kinds of questions that a scene answers, with the answer where it does not depend on the question."""
    if scene.family == "count":
        return {"count": NUMBERS[len(scene.objects)]}
    if scene.family in ("relation", "order"):
        return {scene.family: None}
    (item,) = scene.objects
    facts = {
        "colour": item.colour,
        "shape": item.shape,
        "size": item.size,
        "position": scene.position,
        "direction": scene.direction,
        "texture": item.texture,
        "drift": scene.background.drift,
        "flicker": None if scene.flickers is None else YES_NO[not scene.flickers],
    }
    return {kind: fact for kind, fact in facts.items() if fact is not None}


def _ask_relation(scene: Scene, draws: Draws) -> QuestionAnswer:
    first, second = (item.colour for item in scene.objects)
    relation = scene.relation
    if draws.below(2):
        first, second, relation = second, first, _OPPOSITE[relation]
    question = draws.choice(_PHRASINGS["relation"]).format(a=first, b=second)
    return QuestionAnswer("relation", question, relation, CHOICES["relation"])


def _ask_order(scene: Scene, draws: Draws) -> QuestionAnswer:
    answer = scene.objects[scene.first_to_jump].colour
    named = draws.shuffled([item.colour for item in scene.objects])
    question = draws.choice(_PHRASINGS["order"]).format(a=named[0], b=named[1])
    return QuestionAnswer("order", question, answer, tuple(named))


# ------------------------------------------------------------------------------------------------------------ captions


def describe_object(item: SceneObject) -> str:
    """For example "small red striped circle"; a plain texture is not named."""
    texture = [] if item.texture == "plain" else [item.texture]
    return " ".join([item.size, item.colour, *texture, item.shape])


def describe_scene(scene: Scene, words_seed: int = 0) -> str:
    """A caption that says everything the questions ask.

    Args:
        scene: the scene.
        words_seed: another one may say the same in other words.

    Returns:
        One or two sentences.
    """
    draws = Draws(scene.seed, 4, words_seed)
    sentence = {
        "single": _describe_single,
        "count": _describe_count,
        "relation": _describe_relation,
        "order": _describe_order,
    }[scene.family](scene, draws)
    return f"{sentence[0].upper()}{sentence[1:]} {_describe_background(scene, draws)}"


def _describe_single(scene: Scene, draws: Draws) -> str:
    look = describe_object(scene.objects[0])
    place = "in the centre" if scene.position == "centre" else f"at the {scene.position}"
    if scene.direction is None:
        what = draws.choice((f"a {look} lies {place}", f"there is a {look} {place}"))
    else:
        what = draws.choice((f"a {look} moves {scene.direction}", f"there is a {look} that moves {scene.direction}"))
    return what + {None: ".", True: " and flickers.", False: " in steady light."}[scene.flickers]


def _describe_count(scene: Scene, draws: Draws) -> str:
    number = NUMBERS[len(scene.objects)]
    noun, verb = ("object", "is") if len(scene.objects) == 1 else ("objects", "are")
    looks = [f"a {item.colour} {item.shape}" for item in scene.objects]
    listed = looks[0] if len(looks) == 1 else f"{', '.join(looks[:-1])} and {looks[-1]}"
    return draws.choice((f"there {verb} {number} {noun}: {listed}.", f"{number} {noun} can be seen: {listed}."))


def _describe_relation(scene: Scene, draws: Draws) -> str:
    first, second = (f"a {item.colour} {item.shape}" for item in scene.objects)
    relation = scene.relation
    if draws.below(2):
        first, second, relation = second, first, _OPPOSITE[relation]
    verb = draws.choice(("is", "lies"))
    return f"{first} {verb} {_RELATION_WORDS[relation]} {second}."


def _describe_order(scene: Scene, draws: Draws) -> str:
    looks = [f"{item.colour} {item.shape}" for item in scene.objects]
    first, second = looks[scene.first_to_jump], looks[1 - scene.first_to_jump]
    return draws.choice((f"first a {first} jumps, then a {second}.", f"a {first} jumps before a {second}."))


def _describe_background(scene: Scene, draws: Draws) -> str:
    if scene.background.drift is not None:
        return f"The background drifts {scene.background.drift}."
    return draws.choice(
        (f"The background is {scene.background.kind}.", f"It has a {scene.background.kind} background.")
    )
