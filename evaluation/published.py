"""What the paper publishes about Video-Panda and the models it is compared with: Tables 1 and 2 of arXiv 2412.18609."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RESULTS_FILE = Path(__file__).with_name("published_results.json")
SAME_DATA = "same dataset"
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class PublishedAnswers:
    """A row of Table 1, on one of the four question-answering sets.

    Attributes:
        model: as the paper calls it.
        trained_on: "different datasets", or "same dataset": the one that Video-Panda was trained on.
        num_visual_parameters: of what turns frames into the language model's inputs.
        accuracy: in percent; None where the paper gives none.
        score: 0 to 5; None likewise.
    """

    model: str
    trained_on: str
    num_visual_parameters: int
    accuracy: float | None
    score: float | None


@dataclass(frozen=True)
class PublishedConversation:
    """A row of Table 2, the benchmark of Video-ChatGPT.

    Attributes:
        model: as the paper calls it.
        scores: by criterion.
        average: of the five, as the paper rounds it.
    """

    model: str
    scores: Mapping[str, float]
    average: float


def training_data(trained_on: str) -> str:
    """Whose data a row of Table 1 was trained on, in a word."""
    return "Video-Panda's" if trained_on == SAME_DATA else "different"


@cache
def published_results() -> dict:
    """The file of published figures, as it is."""
    return json.loads(RESULTS_FILE.read_text(encoding="utf-8"))


def published_mark() -> str:
    """What every row that was not measured is marked with."""
    return f"published ({published_results()['judge']} judged, {published_results()['paper']})"


def published_answers(title: str) -> list[PublishedAnswers]:
    """Table 1 for one of its sets, in the paper's order; empty for a set that is not in it.

    Args:
        title: such as "MSVD-QA".
    """
    return [
        PublishedAnswers(
            _name(row["model"]), row["trained_on"], parse_count(row["visual_parameters"]), **row["results"][title]
        )
        for row in published_results()["table_1_open_ended_video_qa"]
        if title in row["results"]
    ]


def published_conversations() -> list[PublishedConversation]:
    """Table 2, in the paper's order."""
    rows = published_results()["table_2_video_chatgpt_benchmark"]["rows"]
    return [
        PublishedConversation(
            _name(row["model"]),
            {name: value for name, value in row.items() if name not in ("model", "average")},
            row["average"],
        )
        for row in rows
    ]


def parse_count(text: str) -> int:
    """The number that "404.3M" or "1.2B" stands for.

    Raises:
        ValueError: it is written in another way.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])", text)
    if match is None:
        raise ValueError(f"got the count {text!r}, expected a number and K, M or B, such as '45M'")
    return round(float(match[1]) * _UNITS[match[2]])


def _name(model: str) -> str:
    # Beside somebody's own runs "ours" would be theirs.
    return model.replace("(ours)", "(the paper's)")
