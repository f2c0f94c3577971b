"""The account of skipped samples."""

import json
import logging

import pytest

from video_panda.trainers.skipped import SkippedSamples, TooManySkippedError, manifest_name


def record(index=1, kind="unreadable", reason="cut off"):
    return {"index": index, "id": f"v_{index}", "reason_kind": kind, "path": f"{index}.mp4", "reason": reason}


def test_records_go_to_the_manifest_and_are_counted(tmp_path):
    account = SkippedSamples(tmp_path / "run" / manifest_name(3))
    account.add([], 8)
    assert not account.path.exists()
    account.add([record(1, reason="ü"), record(2, kind="too_long")], 8)
    account.add([record(3)], 4)
    assert account.path.name == "skipped-rank00003.jsonl"
    lines = account.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [record(1, reason="ü"), record(2, kind="too_long"), record(3)]
    assert (account.num_seen, account.num_skipped, account.num_unreadable) == (20, 3, 2)


def test_skipped_samples_are_logged_up_to_ten(tmp_path, caplog):
    account = SkippedSamples(tmp_path / "m.jsonl")
    with caplog.at_level(logging.WARNING):
        account.add([record(number) for number in range(30)], 3000)
    assert len(caplog.records) == 10
    assert "sample 0 (id 'v_0'): cut off" in caplog.text
    assert "m.jsonl; further ones are listed there only" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("max_share", "num_total", "num_skipped", "num_seen", "stops"),
    [
        (0.01, None, 10, 10, False),  # reckoned among 1000
        (0.01, None, 11, 11, True),
        (0.01, 100_000, 10, 20, False),
        (0.01, 100_000, 11, 20, True),
        (0.01, 100_000, 20, 2000, False),
        (0.01, 100_000, 21, 2000, True),
        (0.01, 200, 2, 10, False),  # reckoned among all 200
        (0.01, 200, 3, 10, True),
        (0.01, 8, 1, 8, True),
        (0, None, 0, 10**6, False),
        (0, None, 1, 10**6, True),
        (1, 8, 8, 8, False),
    ],
)
def test_more_than_the_share_stops(tmp_path, max_share, num_total, num_skipped, num_seen, stops):
    account = SkippedSamples(tmp_path / "m.jsonl", max_share, num_total)
    if not stops:
        account.check(num_skipped, num_seen)
        return
    with pytest.raises(TooManySkippedError, match=rf"^{num_skipped} of {num_seen} samples .*m\.jsonl"):
        account.check(num_skipped, num_seen)


def test_the_error_names_the_last_reasons_and_long_samples_do_not_count(tmp_path):
    account = SkippedSamples(tmp_path / "m.jsonl", num_total=100)
    account.add([record(number, kind="too_long", reason="very long") for number in range(50)], 100)
    account.check()
    account.add([record(number, reason=f"cut at {number}") for number in range(5)], 4)
    account.add([record(9, kind="too_long", reason="very long")], 1)
    with pytest.raises(
        TooManySkippedError, match=r"^5 of 105 .*more than 1\.00% of 105; .*cut at 2; .*cut at 4$"
    ) as error:
        account.check()
    assert "cut at 1" not in str(error.value)
    assert "very long" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_the_count_goes_on_after_a_checkpoint(tmp_path):
    account = SkippedSamples(tmp_path / "m.jsonl", num_total=100)
    account.add([record(1), record(2, kind="too_long")], 50)
    state = json.loads(json.dumps(account.state_dict()))
    account.add([record(3)], 1)
    resumed = SkippedSamples(tmp_path / "m.jsonl", num_total=100)
    resumed.load_state_dict(state)
    assert (resumed.num_seen, resumed.num_skipped, resumed.num_unreadable) == (50, 2, 1)
    resumed.check()
    resumed.add([record(3)], 1)
    with pytest.raises(TooManySkippedError, match=r"sample 1 .*sample 3 "):
        resumed.check()


@pytest.mark.parametrize("max_share", [-0.1, 1.5, float("nan"), "1%", True, None])
def test_a_share_that_is_none(tmp_path, max_share):
    with pytest.raises(ValueError, match="`max_share` must be a share from 0 to 1"):
        SkippedSamples(tmp_path / "m.jsonl", max_share)
