"""Random parts of the data, and groups of one modality and similar length."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_panda.trainers.sampling import ModalityLengthSampler, describe_samples, random_subset

KINDS = ("image", "text", "video")
samples = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3000)), min_size=1, max_size=300)


@settings(max_examples=100, deadline=None)
@given(samples, st.integers(1, 16), st.integers(0, 2**31), st.integers(0, 5))
def test_each_sample_once_in_groups_of_one_modality(described, group_size, seed, epoch):
    modalities, lengths = zip(*described)
    sampler = ModalityLengthSampler(modalities, lengths, group_size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(described)))
    assert len(sampler) == len(order)
    groups = [order[start : start + group_size] for start in range(0, len(order), group_size)]
    num_whole = sum(modalities.count(kind) // group_size for kind in KINDS)
    assert all(len({modalities[index] for index in group}) == 1 for group in groups[:num_whole])
    assert len(groups) - num_whole <= len(set(modalities))
    again = ModalityLengthSampler(list(modalities), list(lengths), group_size, seed)
    again.set_epoch(epoch)
    assert list(again) == order


def test_epochs_and_seeds_change_the_order_and_the_groups():
    modalities, lengths = ["video"] * 400, list(range(400))
    sampler = ModalityLengthSampler(modalities, lengths, 4, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    orders.append(list(ModalityLengthSampler(modalities, lengths, 4, seed=1)))
    sets_of_groups = [{frozenset(order[start : start + 4]) for start in range(0, 400, 4)} for order in orders]
    for one in range(4):
        for other in range(one):
            assert len(sets_of_groups[one] & sets_of_groups[other]) < 20
    assert list(sampler) == orders[2]


def test_a_group_has_similar_lengths_and_the_longest_comes_first():
    lengths = [(place * 7919) % 1000 for place in range(1000)]
    order = list(ModalityLengthSampler(["video"] * 1000, lengths, 8, seed=3))
    spreads = [
        max(lengths[index] for index in order[start : start + 8])
        - min(lengths[index] for index in order[start : start + 8])
        for start in range(0, 1000, 8)
    ]
    assert sum(spreads) / len(spreads) < 100  # at random it is 780
    assert 999 in [lengths[index] for index in order[:8]]
    firsts = [max(lengths[index] for index in order[start : start + 8]) for start in range(8, 1000, 8)]
    num_rises = sum(later > earlier for earlier, later in itertools.pairwise(firsts))
    assert 40 < num_rises < 84  # sorted megabatches in a row would have four rises


def test_what_is_left_over_is_not_always_the_shortest():
    lengths = list(range(17))
    left = set()
    sampler = ModalityLengthSampler(["text"] * 17, lengths, 8, seed=0)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        left.add(list(sampler)[-1])
    assert len(left) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["text"], [1, 2], 1), "got 1 and 2"),
        (([], [], 1), "got 0 and 0"),
        ((["text"], [1], 0), "`group_size` must be a whole number of at least 1, got 0"),
        ((["text"], [1], 2.0), "got 2.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModalityLengthSampler(*arguments)


def test_samples_are_described_without_their_files():
    def raw(question, answer, **visuals):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **visuals}

    dataset = [
        raw("<video>\n" + "a" * 40, "b" * 40, video="none.mp4"),
        raw("<image>", "b" * 40, image="none.png"),
        raw("a" * 40, "b" * 80),
        raw("<video><image>", "b", video="v.mp4", image="p.png"),
    ]
    modalities, lengths = describe_samples(dataset)
    assert modalities == ["video", "image", "text", "video"]
    assert lengths == [8 * 154 + 20, 154 + 10, 30, 9 * 154]
    assert describe_samples(dataset, num_frames=2)[1][0] == 2 * 154 + 20


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1, exclude_min=True), st.integers(0, 2**31))
def test_a_random_part(num_samples, fraction, seed):
    chosen = random_subset(num_samples, fraction, seed)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(num_samples))
    assert abs(len(chosen) - num_samples * fraction) <= 0.5 or len(chosen) == 1
    assert chosen == random_subset(num_samples, fraction, seed)


def test_a_random_half_is_random_and_exactly_half():
    halves = [random_subset(702, 0.5, seed) for seed in range(3)]
    assert [len(half) for half in halves] == [351] * 3
    assert halves[0] != halves[1] != halves[2]
    assert 120 < sum(index < 351 for index in halves[0]) < 230


@pytest.mark.parametrize(
    ("num_samples", "fraction"), [(0, 0.5), (4, 0), (4, 1.5), (4, float("nan")), (4, True), (4, "1")]
)
def test_a_part_that_is_none(num_samples, fraction):
    with pytest.raises(ValueError, match=r"expected at least one sample|`fraction` must be above 0"):
        random_subset(num_samples, fraction, 0)
