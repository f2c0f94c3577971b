"""Scores by hand: what counts as right, and how sure one can be."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_panda.evaluation.intervals import wilson_interval
from video_panda.evaluation.questions import Question, shuffled_labels
from video_panda.evaluation.scores import score
from video_panda.evaluation.text_scores import normalise_answer


def question(number: int, kind: str = "colour", answer: str = "red") -> Question:
    return Question(str(number), f"{number % 5}.mp4", "What colour?", answer, kind, ("red", "green"))


def test_a_table_by_hand():
    questions = [question(0), question(1), question(2), question(3), question(4, "flicker", "yes")]
    table = score(questions, ["red", " The Red. ", "green", None, "Yes!"], {"colour": 0.5, "flicker": 0.25})
    colour, flicker = table.rows
    assert (colour.kind, colour.num_questions, colour.num_correct, colour.num_unanswered) == ("colour", 4, 2, 1)
    assert (colour.accuracy, colour.chance) == (0.5, 0.5)
    # Wilson's interval of 2 of 4, from the formula with z = 1.96: 0.1500 to 0.8500.
    assert (colour.low, colour.high) == (pytest.approx(0.1500, abs=1e-4), pytest.approx(0.8500, abs=1e-4))
    assert (flicker.accuracy, flicker.high) == (1, 1)
    assert (table.total.accuracy, table.total.chance) == (0.6, pytest.approx(0.45))
    assert table.macro_accuracy == 0.75
    assert table["flicker"] is flicker
    assert table["all"] is table.total
    with pytest.raises(KeyError, match="no questions of kind 'shape'"):
        table["shape"]
    assert json.loads(json.dumps(table.to_dict()))["total"]["num_correct"] == 3
    lines = str(table).splitlines()
    assert lines[2] == "| colour | 4 | 2 | 50.0 | 15.0 to 85.0 | 50.0 | 50.0 | 50.0 |"
    assert len(lines) == 5


def test_the_interval_of_the_whole_knows_that_questions_of_a_clip_hang_together():
    """Ten clips, each all right or all wrong: a hundred questions are worth ten."""
    clips = [replace(question(number), video=f"{number // 10}.mp4") for number in range(100)]
    table = score(clips, ["red" if number < 50 else "green" for number in range(100)])
    low, high = wilson_interval(50, 100)
    assert table.total.high - table.total.low > 2.5 * (high - low)
    assert table.total.chance is None
    assert score(clips, ["red" if number < 50 else "green" for number in range(100)]) == table


@given(st.integers(1, 5000), st.data())
def test_an_interval_holds_the_share_and_is_symmetric(num_questions, data):
    num_correct = data.draw(st.integers(0, num_questions))
    low, high = wilson_interval(num_correct, num_questions)
    assert 0 <= low <= num_correct / num_questions <= high <= 1
    mirrored = wilson_interval(num_questions - num_correct, num_questions)
    assert (1 - high, 1 - low) == (pytest.approx(mirrored[0], abs=1e-9), pytest.approx(mirrored[1], abs=1e-9))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    drawn = np.random.Generator(np.random.PCG64(0)).binomial(200, 0.9, size=2000)
    hits = [low <= 0.9 <= high for low, high in (wilson_interval(int(right), 200) for right in drawn)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("counts", [(1, 0), (-1, 3), (4, 3), (0, 0)])
def test_counts_that_are_none(counts):
    with pytest.raises(ValueError, match="expected 0 <= right <= questions"):
        wilson_interval(*counts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Top  left.", "top left"), ("the RED one", "red one"), ("", ""), ("A", "a"), ("Yes,", "yes"), ("\n", "")],
)
def test_what_answers_are_compared_by(text, expected):
    assert normalise_answer(text) == expected


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@pytest.mark.parametrize("answer", ["", "  ", None, "reddish", "red green", "."])
def test_what_is_not_the_answer_is_wrong(answer):
    assert score([question(0)], [answer])["colour"].num_correct == 0


@pytest.mark.parametrize("answer", ["", None, ".", "?"])
def test_no_word_is_no_answer_even_where_the_truth_has_none(answer):
    row = score([question(0, answer="?")], [answer])["colour"]
    assert (row.num_correct, row.num_unanswered) == (0, 1)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no questions to score"):
        score([], [])
    with pytest.raises(ValueError, match="got 1 answers to 2 questions"):
        score([question(0), question(1)], ["red"])
    with pytest.raises(ValueError, match=r"the kinds \['colour'\] are unknown"):
        score([question(0)], ["red"], kinds=["shape"])
    with pytest.raises(ValueError, match="answer 'blue' is not one of"):
        shuffled_labels([question(0, answer="blue")])


def test_shuffled_labels_keep_how_often_each_is_right():
    questions = [question(number, answer=("red", "green")[number % 3 == 0]) for number in range(60)]
    shuffled = shuffled_labels(questions, seed=3)
    assert sorted(q.answer for q in shuffled) == sorted(q.answer for q in questions)
    assert [q.answer for q in shuffled] != [q.answer for q in questions]
    assert shuffled == shuffled_labels(questions, seed=3) != shuffled_labels(questions, seed=4)
