"""Which run a folder belongs to, and what is refused."""

import copy
import json

import pytest
import torch
from tiny import tiny_config
from transformers import GPT2Config

from video_panda import VideoPandaConfig
from video_panda.trainers.run_identity import (
    RUN_FILE,
    RunIdentity,
    architecture_of,
    check_output_folder,
    check_same_run,
    describe_difference,
    new_identity,
    read_identity,
    write_identity,
)

DISTILLATION = {"teacher_width": 1024, "loss": "cosine"}


@pytest.fixture(scope="module")
def identity():
    return new_identity("initial_alignment", tiny_config(), DISTILLATION)


def differences(changed) -> list[str]:
    return describe_difference(architecture_of(changed), architecture_of(tiny_config()))


def test_it_is_written_and_read_back(identity, tmp_path):
    path = write_identity(tmp_path / "run", identity)
    assert path == tmp_path / "run" / RUN_FILE
    assert [file.name for file in path.parent.iterdir()] == [RUN_FILE]
    assert read_identity(tmp_path / "run") == identity
    assert len(identity.run_id) == 32
    assert new_identity("initial_alignment", tiny_config(), DISTILLATION).run_id != identity.run_id


def test_tuples_and_missing_distillation_survive_json(tmp_path):
    for distillation in ({"layers": (2, 0)}, None):
        identity = new_identity("a", tiny_config(), distillation)
        write_identity(tmp_path, identity)
        assert read_identity(tmp_path) == identity


def test_it_does_not_change_by_saving_loading_or_what_the_trainer_sets(identity, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = VideoPandaConfig.from_pretrained(tmp_path)
    config.use_cache = config.text_config.use_cache = False
    config.text_config.dtype = config.dtype = torch.bfloat16
    config.text_config.pad_token_id = config.text_config.eos_token_id = 7
    config._name_or_path = "elsewhere"
    config.architectures = ["Other"]
    config.auto_map = {"AutoModel": "a.b"}
    assert architecture_of(config) == identity.architecture


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text": {"hidden_size": 64}}, "text_config.hidden_size: got 64, expected 48"),
        ({"text": {"rms_norm_eps": 1e-5}}, "text_config.rms_norm_eps: got 1e-05, expected 1e-06"),
        ({"vision": {"use_lste": False}}, "vision_config.use_lste: got False, expected True"),
        ({"vision": {"num_frames": 16}}, "vision_config.num_frames: got 16, expected 8"),
        ({"rotary_table_dtype": "float16"}, "rotary_table_dtype: got 'float16', expected None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: got True, expected False"),
    ],
)
def test_what_decides_shapes_or_computations_is_in_it(changes, expected):
    assert expected in differences(tiny_config(**changes))


def test_another_language_model_is_another_architecture():
    text = GPT2Config(vocab_size=400, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    vision = {"image_size": 84, "patch_size": 14, "hidden_size": 32}
    config = VideoPandaConfig.from_text_config(text, vision_config=vision)
    assert "text_config.model_type: got 'gpt2', expected 'llama'" in differences(config)
    with pytest.raises(ValueError, match="got model_type 'gpt2'"):
        architecture_of(text)


def test_differences_are_named_with_their_path():
    own = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": False, "n": 0}
    assert describe_difference(own, copy.deepcopy(own)) == []
    assert describe_difference({**own, "a": {"b": 2, "c": [1]}}, own) == [
        "a.b: got 2, expected 1",
        "a.c: got [1], expected [1, 2]",
    ]
    assert describe_difference({"a": own["a"], "n": 0, "new": None}, own) == []  # what is off may be absent
    assert describe_difference({**own, "n": None}, own) == ["n: got None, expected 0"]
    assert describe_difference({**own, "n": False}, own) == ["n: got False, expected 0"]
    assert describe_difference({"x": True}, {"x": 1}) == ["x: got True, expected 1"]
    assert describe_difference({**own, "a": None}, own) == [f"a: got None, expected {own['a']!r}"]
    assert describe_difference({**own, "more": 1}, own, "p.") == ["p.more: got 1, expected None"]


def with_changes(identity, **changes):
    return RunIdentity(**{**vars(identity), **changes})


def test_another_stage_is_refused(identity):
    with pytest.raises(ValueError, match="out belongs to the stage instruction_tuning, expected initial_alignment"):
        check_same_run(with_changes(identity, stage="instruction_tuning"), identity, "out")


def test_another_model_or_teacher_is_refused(identity):
    with pytest.raises(ValueError, match=r"another model: .*text_config\.hidden_size: got 64, expected 48"):
        check_same_run(
            new_identity("initial_alignment", tiny_config(text={"hidden_size": 64}), DISTILLATION), identity, "f"
        )
    with pytest.raises(ValueError, match=r"distillation\.teacher_width: got 768, expected 1024"):
        check_same_run(with_changes(identity, distillation={**DISTILLATION, "teacher_width": 768}), identity, "f")
    many = with_changes(identity, distillation={str(number): number for number in range(1, 8)})
    with pytest.raises(ValueError, match=r"and 4 more$"):
        check_same_run(many, identity, "f")


def test_another_run_id_is_no_hindrance(identity):
    check_same_run(with_changes(identity, run_id="0" * 32), identity, "f")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bytes(50), "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b'{"run_id": "a', "is damaged"),
        (b"[]", r"run_id must be a str, got \[\]"),
        (b'{"run_id": "a", "stage": 1}', "stage must be a str, got 1"),
        (b'{"run_id": "a", "stage": "b", "architecture": {}}', "distillation must be a dict, got None"),
    ],
)
def test_a_damaged_file_is_named(content, reason, tmp_path):
    (tmp_path / RUN_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"run.json is damaged.*{reason.removeprefix('is damaged')}"):
        read_identity(tmp_path)


def test_fields_of_a_later_version_are_ignored(identity, tmp_path):
    write_identity(tmp_path, identity)
    content = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps({**content, "later": 1}))
    assert read_identity(tmp_path) == identity
    with pytest.raises(FileNotFoundError):
        read_identity(tmp_path / "missing")


@pytest.mark.parametrize("resuming", [False, True])
def test_a_new_or_empty_folder_is_free(identity, resuming, tmp_path):
    assert check_output_folder(tmp_path / "new", identity, resuming) is identity
    (tmp_path / "runs").mkdir()
    (tmp_path / "_staging-checkpoint-3").mkdir()
    assert check_output_folder(tmp_path, identity, resuming) is identity


def test_a_folder_of_another_run_is_refused_with_advice(identity, tmp_path):
    earlier = with_changes(identity, run_id="e" * 32)
    write_identity(tmp_path, earlier)
    with pytest.raises(
        ValueError, match=r"no checkpoint yet\). Choose another output_dir, or .*resume_from_checkpoint='auto'"
    ):
        check_output_folder(tmp_path, identity, resuming=False)
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(ValueError, match=r"eeee; 1 checkpoints, the last checkpoint-10\).*=True"):
        check_output_folder(tmp_path, identity, resuming=False)
    assert check_output_folder(tmp_path, identity, resuming=True) == earlier
    assert check_output_folder(tmp_path, earlier, resuming=False) == earlier  # trained on in the same process


def test_a_folder_that_cannot_be_resumed_is_not_proposed_for_it(identity, tmp_path):
    write_identity(tmp_path, with_changes(identity, run_id="e" * 32, stage="instruction_tuning"))
    for resuming, advice in (
        (False, r"\. Choose another output_dir$"),
        (True, "belongs to the stage instruction_tuning"),
    ):
        with pytest.raises(ValueError, match=advice) as caught:
            check_output_folder(tmp_path, identity, resuming)
        assert "resume_from_checkpoint" not in str(caught.value)


@pytest.mark.parametrize("resuming", [False, True])
def test_a_folder_of_another_program_is_refused(identity, resuming, tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoint-10 without run\.json.*Choose another output_dir"):
        check_output_folder(tmp_path, identity, resuming)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        check_output_folder(file, identity, resuming)


def test_the_identity_in_a_checkpoint_stands_in_for_a_lost_one(identity, tmp_path):
    write_identity(tmp_path / "checkpoint-10", identity)
    (tmp_path / "checkpoint-20").mkdir()
    assert check_output_folder(tmp_path, with_changes(identity, run_id="0" * 32), resuming=True) == identity
