"""Training questions about one of two objects: where is the red one? ShapesQA does not ask them.

Its hardest question, where one object is seen from another, needs two objects found by their colours, and gives no sign of
progress before both are found. Finding one is a step on the way that can be learned by itself.
"""

import random

from video_panda import draw_scene

MIDDLE_PX = 32


def with_pointing(sample: dict, seed: int) -> dict:
    """A clip's training sample with a question about the place of each of its two objects, in any order with its own.

    Args:
        sample: of `training_samples`, and the clip it is about.
        seed: of that clip.

    Returns:
        Another sample of the same form; one of another family is returned as it is.
    """
    scene = draw_scene(seed)
    if scene.family != "relation":
        return sample
    turns = [turn["value"].removeprefix("<video>\n") for turn in sample["conversations"]]
    pairs = list(zip(turns[::2], turns[1::2]))
    pairs += [(f"Where is the {item.colour} object?", quadrant(item.centres[0])) for item in scene.objects]
    random.Random(seed).shuffle(pairs)
    conversation = []
    for number, (question, answer) in enumerate(pairs):
        marker = "<video>\n" if number == 0 else ""
        conversation += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {**sample, "conversations": conversation}


def quadrant(centre_px: tuple[int, int]) -> str:
    """In the words of ShapesQA."""
    x, y = centre_px
    return f"{'top' if y < MIDDLE_PX else 'bottom'} {'left' if x < MIDDLE_PX else 'right'}"
