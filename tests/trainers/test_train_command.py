"""The `train` command: what its YAML files mean, what it refuses, and real runs of a tiny model through it."""

import os
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model, tiny_processor, write_tiny_checkpoint
from training_runs import losses_of, tiny_teacher, write_samples
from transformers import TrainingArguments

from video_panda import VideoPandaForConditionalGeneration
from video_panda.trainers import train as train_module
from video_panda.trainers.alignment_head import ALIGNMENT_HEAD_FILE
from video_panda.trainers.train import find_model, main, train
from video_panda.trainers.train_config import read_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "train"
# stage, global batch, learning rate, share of warm-up steps, share of the data (paper, Table 6 and section 4.1)
PAPER = {
    "stage1_initial_alignment": ("initial_alignment", 2048, 4e-4, 0.03, 0.5),
    "stage2_visual_language_integration": ("visual_language_integration", 2048, 4e-5, 0.01, 1.0),
    "stage3_instruction_tuning": ("instruction_tuning", 1024, 2e-5, 0.01, 1.0),
    "stage3_lora": ("instruction_tuning", 1024, 2e-5, 0.01, 1.0),
}
SMALL = {
    "stage": "initial_alignment",
    "model": "checkpoint",
    "output_dir": "runs/stage1",
    "train_file": "samples.json",
    "data_root": ".",
    "data_fraction": 1,
    "global_batch_size": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "teacher": "clip",
    "teacher_source": "teacher",
    "use_cpu": True,
    "save_steps": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A tiny checkpoint, four clips with words about them, and a teacher."""
    folder = tmp_path_factory.mktemp("train")
    write_tiny_checkpoint(folder / "checkpoint")
    write_samples(folder, num_clips=4)
    tiny_teacher(folder / "teacher")
    return folder


@pytest.fixture
def workplace(template, tmp_path, monkeypatch):
    """A copy of them, as the current folder."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write_config(name: str = "config.yaml", **fields) -> str:
    Path(name).write_text(yaml.safe_dump({**SMALL, **fields}), encoding="utf-8")
    return name


def write_text(text: str, name: str = "config.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


# The configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_the_examples_hold_the_values_of_the_paper(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    # Otherwise eight processes would be waited for.
    device = cached_property(lambda args: torch.device("cpu"))
    device.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", device)
    run = read_config(EXAMPLES / f"{name}.yaml", ["--use_cpu"])
    args = run.training
    stage, global_batch, learning_rate, warmup, fraction = PAPER[name]
    assert (args.stage, args.global_batch_size, args.learning_rate) == (stage, global_batch, learning_rate)
    assert args.per_device_train_batch_size * 8 * args.gradient_accumulation_steps == global_batch
    assert (args.warmup_steps, args.data_fraction, args.weight_decay, args.num_train_epochs) == (warmup, fraction, 0, 1)
    assert (args.lr_scheduler_type, args.optim) == ("cosine", "adamw_torch_fused")
    assert (args.distillation_loss, args.distillation_weight, args.teacher) == ("cosine", 1, "languagebind")
    assert args.train_language_model == (stage != "initial_alignment")
    assert args.bf16
    assert args.activation_checkpointing
    assert run.resume_from_checkpoint == "auto"
    assert run.model.use_lora == (name == "stage3_lora")
    rates = dict.fromkeys(("stab", "projector", "alignment_head", "language_model"), learning_rate)
    assert args.learning_rates() == rates | ({"language_model": 2e-4} if run.model.use_lora else {})


def test_the_examples_lead_from_stage_to_stage():
    files = [yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()) for name in PAPER]
    assert files[1]["model"] == files[0]["output_dir"]
    assert files[2]["model"] == files[3]["model"] == files[1]["output_dir"]
    assert len({content["output_dir"] for content in files}) == 4


@pytest.mark.parametrize(
    ("name", "kind", "section"),
    [
        ("ddp", "MULTI_GPU", None),
        ("fsdp2", "FSDP", "fsdp_config"),
        ("deepspeed_zero2", "DEEPSPEED", "deepspeed_config"),
    ],
)
def test_accelerate_knows_its_files(name, kind, section):
    config = load_config_from_file(str(EXAMPLES / f"accelerate_{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, 8, 1)
    assert config.mixed_precision == "no", "the stage's file decides"
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert not set(getattr(config, section) if section else {}) - set(options)
    if name == "fsdp2":
        assert (config.fsdp_config["fsdp_version"], config.fsdp_config["fsdp_state_dict_type"]) == (
            2,
            "FULL_STATE_DICT",
        )
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_values_in_yaml_mean_what_they_mean_on_the_command_line(workplace):
    config = write_text(
        "stage: visual_language_integration\nmodel: 12e3\noutput_dir: 1234\ntrain_file: a.json\nuse_cpu: yes\n"
        "learning_rate: 4e-4\nsave_strategy: no\neval_strategy: no\nmax_length: null\ntrain_stab: false\n"
        "lr_scheduler_kwargs: {num_cycles: 0.25}\nlr_scheduler_type: cosine\nreport_to: [none]\nlabel_names: [labels]\n"
        "accelerator_config:\n  even_batches: false\nglobal_batch_size: 8\nresume_from_checkpoint: true\n"
    )
    run = read_config(config)
    args = run.training
    assert (run.model.model, args.output_dir) == ("12e3", "1234")
    assert (args.learning_rate, args.save_strategy, args.eval_strategy, args.max_length) == (4e-4, "no", "no", None)
    assert (args.use_cpu, args.train_stab, args.report_to, args.label_names) == (True, False, [], ["labels"])
    assert args.lr_scheduler_kwargs == {"num_cycles": 0.25}
    assert args.accelerator_config.even_batches is False
    assert run.resume_from_checkpoint is True


def test_the_command_line_wins(workplace):
    config = write_config(bf16=False, resume_from_checkpoint="auto", max_length=7)
    same = read_config(config).training
    assert (same.learning_rate, same.max_length, same.stage) == (1e-3, 7, "initial_alignment")
    options = ["--learning-rate", "5e-6", "--bf16", "--stage", "instruction_tuning", "--resume_from_checkpoint=false"]
    run = read_config(config, [*options, "--no_train_stab", "--lr_scheduler_kwargs", '{"num_cycles": 2}'])
    assert (run.training.learning_rate, run.training.bf16, run.training.stage) == (5e-6, True, "instruction_tuning")
    assert (run.training.train_stab, run.resume_from_checkpoint) == (False, None)
    assert run.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert run.training.train_language_model is True, "the stage's default"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, r"config\.yaml: unknown field `learning_rat`; did you mean `learning_rate`\?"),
        ({"warmup_ratio": 0.1}, r"config\.yaml: unknown field `warmup_ratio`; did you mean `warmup_steps`\?"),
        ({"xyzzy": 1}, r"config\.yaml: unknown field `xyzzy`$"),
        ({"learning_rate": "fast"}, r"config\.yaml: `learning_rate`: invalid float value: 'fast'"),
        ({"save_total_limit": 2.5}, r"config\.yaml: `save_total_limit`: invalid int value: '2\.5'"),
        ({"bf16": "perhaps"}, r"config\.yaml: `bf16`: Truthy value expected"),
        ({"learning_rate": [1, 2]}, r"config\.yaml: `learning_rate`: it is a list, expected a number"),
        ({"train_file": {"a": 1}}, r"config\.yaml: `train_file`: it is a mapping, expected text"),
        ({"learning_rate": None}, r"config\.yaml: `learning_rate`: it is empty, expected a number"),
        ({"stage": "stage4"}, r"config\.yaml: stage is 'stage4', expected one of initial_alignment, visual_"),
        ({"stage": None}, r"config\.yaml: `stage` is missing"),
        ({"model": None}, r"config\.yaml: `model` is missing"),
        ({"output_dir": None}, r"config\.yaml: `output_dir` is missing"),
        ({"train_file": None}, r"config\.yaml: expected one of `train_file` and `dataset`, got neither"),
        ({"dataset": "some/name"}, r"expected one of `train_file` and `dataset`, got 'samples\.json' and 'some/name'"),
        ({"streaming": True}, r"`streaming` is of a `dataset`, and there is none"),
        ({"train_file": None, "dataset": "d", "streaming": True}, r"`streaming` needs max_steps"),
        ({"eval_strategy": "steps"}, r"`eval_strategy` is steps, but there is no `eval_file`"),
        ({"lr_scheduler_type": "cos"}, r"config\.yaml: cos is not a valid SchedulerType"),
        ({"global_batch_size": 3}, r"config\.yaml: global_batch_size=3 is not a multiple"),
        ({"dtype": "int8"}, r"`dtype` must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"dtype": "bfloat16", "stage": "instruction_tuning"}, r"`dtype` is bfloat16, but the language model trains"),
        ({"use_lora": True}, r"`use_lora` adapts the language model, but train_language_model is false"),
        ({"load_in_4bit": True, "stage": "instruction_tuning"}, r"`load_in_4bit` needs use_lora=true"),
        ({"use_lora": True, "lora_r": 0, "stage": "instruction_tuning"}, r"`lora_r` must be at least 1"),
    ],
)
def test_a_bad_field_is_named(workplace, fields, message):
    with pytest.raises(ValueError, match=message):
        read_config(write_config(**fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", r"config\.yaml must hold a mapping \(field: value\), got a list"),
        ("", r"config\.yaml must hold a mapping \(field: value\), got a NoneType"),
        ("stage: [", r"config\.yaml is not YAML: .*line 1"),
        ("stage: initial_alignment\nbf16: true\nbf16: false\n", r"config\.yaml is not YAML: bf16 is given twice.*line"),
        ("stage: initial_alignment\n5: 1\n", r"config\.yaml: unknown field `5`"),
        ("model: checkpoint\n", r"config\.yaml: `stage` is missing"),
    ],
)
def test_a_bad_file_is_named(workplace, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_config(write_text(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat", "1"], r"command line: unknown field `--learning_rat`; did you mean `--learning_rate`\?"),
        (["--learning_rate", "fast"], r"command line: `learning_rate`: invalid float value: 'fast'"),
        (["--learning_rate"], r"command line: `learning_rate`: expected one argument"),
        (["--stage"], r"command line: `stage`: expected one argument"),
        (["other.yaml"], r"command line: unexpected argument 'other\.yaml'"),
    ],
)
def test_a_bad_option_is_named(workplace, options, message):
    with pytest.raises(ValueError, match=message):
        read_config(write_config(), options)


def test_a_missing_package_is_named(workplace, monkeypatch):
    monkeypatch.setattr("video_panda.trainers.train_config.find_spec", lambda name: None)
    config = write_config(stage="instruction_tuning", use_lora=True)
    with pytest.raises(ValueError, match="`use_lora` needs the package peft, which is not installed: pip install peft"):
        read_config(config)


# What is started from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "clips"}, "clips has no config.json, nor a whole checkpoint of a run"),
        ({"model": "teacher"}, "teacher holds a model of type 'clip_vision_model', expected 'video_panda'"),
        ({"train_file": "no.json"}, "no.json"),
        ({"eval_file": "no.json"}, "no.json"),
        ({"alignment_head": "clips"}, "clips has no alignment_head.safetensors"),
    ],
)
def test_what_is_not_there_is_named_before_any_weights_are_read(workplace, monkeypatch, fields, message):
    monkeypatch.setattr(train_module, "load_model", None)
    with pytest.raises((ValueError, OSError), match=message):
        train(write_config(**fields))


def test_a_repository_that_cannot_be_had_is_one_line(workplace, monkeypatch):
    def refuse(source, **kwargs):
        raise OSError(f"{source} is not there\nand much more")

    monkeypatch.setattr(train_module.PreTrainedConfig, "get_config_dict", refuse)
    with pytest.raises(
        OSError, match=r"nobody/it: no such folder, and it cannot be had from the Hub: nobody/it is not there$"
    ):
        train(write_config(model="nobody/it"))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a LoRA adapter, expected a whole model: merge it"):
        find_model(str(tmp_path))


def test_errors_are_one_line_and_the_exit_code_one(workplace, monkeypatch, capsys):
    for argv in (["missing.yaml"], [write_config(learning_rat=1)], ["--bf16", "config.yaml"]):
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert error[0].startswith("video-panda: error: ")
    monkeypatch.setattr(sys, "argv", ["train"])
    main()
    assert "usage: " in capsys.readouterr().out


# Real runs --------------------------------------------------------------------------------------------------------


def test_the_program_trains_and_the_head_goes_on_into_the_next_stage(workplace):
    """Stage 1 as a program of its own, then stage 2 from its folder, then the same command again."""
    result = subprocess.run(
        [sys.executable, "-m", "video_panda.trainers.train", write_config(), "--seed", "5"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "alignment head: fresh" in result.stdout
    stage1 = Path("runs/stage1")
    head_file = stage1 / "checkpoint-2" / ALIGNMENT_HEAD_FILE
    before, after = load_file("checkpoint/model.safetensors"), load_file(stage1 / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".stab." in name or ".projector." in name for name in changed)

    config = write_config("stage2.yaml", stage="visual_language_integration", model=str(stage1), output_dir="runs/2")
    started = []
    trainer = train_and_look(config, started)
    assert started[0].keys() == load_file(head_file).keys()
    for name, weight in load_file(head_file).items():
        torch.testing.assert_close(started[0][name], weight, rtol=0, atol=0)
    assert (trainer.state.global_step, len(losses_of(trainer, "distillation_loss"))) == (2, 2)
    assert all(weight.requires_grad for weight in trainer.model.parameters())

    again = train(config, ["--resume_from_checkpoint", "auto"])
    assert again.state.global_step == 2
    assert len(losses_of(again)) == 2
    results = yaml.safe_load(Path("runs/2/train_results.json").read_text())
    assert results["train_loss"] > 0, "a run that had ended leaves its results alone"
    longer = train(config, ["--resume_from_checkpoint", "true", "--num_train_epochs", "2"])
    assert longer.state.global_step == 4
    with pytest.raises(ValueError, match="belongs to another run"):
        train(config)


def train_and_look(config: str, heads: list):
    """`train`, noting the alignment head as it stands before the first step."""
    own = train_module.find_stage

    def noting(name):
        class Noting(own(name)):
            def train(self, *args, **kwargs):
                heads.append({key: value.clone() for key, value in self.alignment_head.state_dict().items()})
                return super().train(*args, **kwargs)

        return Noting

    train_module.find_stage = noting
    try:
        return train(config)
    finally:
        train_module.find_stage = own


def test_a_run_that_did_not_end_gives_its_newest_whole_checkpoint(workplace):
    train(write_config(), ["--save_steps", "1"])
    run = Path("runs/stage1")
    (run / "config.json").unlink()
    assert find_model(str(run)) == str(run / "checkpoint-2")
    (run / "checkpoint-2" / "model.safetensors").unlink()
    assert find_model(str(run)) == str(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(FileNotFoundError, match=r"nor a whole checkpoint of a run; checkpoint-2: .*is missing"):
        find_model(str(run))


def test_lora_trains_an_adapter_over_a_frozen_model_in_half_precision(workplace):
    config = write_config(stage="instruction_tuning", use_lora=True, lora_r=4, lora_alpha=8, dtype="bfloat16")
    trainer = train(config, ["--eval_file", "samples.json", "--bf16"])
    kinds = {}
    for name, weight in trainer.model.named_parameters():
        part = "lora" if "lora_" in name else "visual" if "stab" in name or "projector" in name else "language model"
        kinds.setdefault((part, weight.requires_grad), set()).add(weight.dtype)
    assert kinds[("lora", True)] == kinds[("visual", True)] == {torch.float32}
    assert kinds[("language model", False)] == {torch.bfloat16}
    assert ("language model", True) not in kinds
    assert trainer.model.peft_config["default"].r == 4
    adapter = load_file("runs/stage1/adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter)
    assert any(".stab." in name for name in adapter)
    assert "eval_loss" in yaml.safe_load(Path("runs/stage1/eval_results.json").read_text())


def test_a_quantized_base_is_asked_for_as_lora_py_says(workplace, monkeypatch):
    """bitsandbytes and its GPU stay out of it: what is handed to transformers and PEFT."""
    asked = {}

    def load(source, quantization_config, device_map, **options):
        asked.update(config=quantization_config, device_map=device_map)
        model = VideoPandaForConditionalGeneration.from_pretrained(source, **options)
        model.is_loaded_in_4bit = True
        return model

    monkeypatch.setattr("video_panda.trainers.train_config.find_spec", lambda name: name)
    monkeypatch.setattr(train_module, "VideoPandaForConditionalGeneration", SimpleNamespace(from_pretrained=load))
    config = write_config(stage="instruction_tuning", use_lora=True, lora_r=4, load_in_4bit=True)
    model = train_module.load_model(read_config(config), "checkpoint", "float32")
    assert asked["config"].load_in_4bit
    assert {"stab", "projector", "lm_head"} <= set(asked["config"].llm_int8_skip_modules)
    assert asked["device_map"] == {"": torch.device("cpu")}
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert any("lora_" in name for name in trainable)


def test_a_frozen_language_model_keeps_its_dtype_and_what_trains_is_float32(workplace):
    processor = tiny_processor()
    tiny_model(tiny_config(processor.video_token_id)).to(torch.bfloat16).save_pretrained("checkpoint")
    trainer = train(write_config(distillation_loss="none", bf16=True))
    dtypes = {name.split(".")[1]: weight.dtype for name, weight in trainer.model.named_parameters()}
    expected = {"stab": torch.float32, "projector": torch.float32, "language_model": torch.bfloat16}
    assert dtypes == expected | {"weight": torch.bfloat16}
    options = ["--model", "runs/stage1", "--output_dir", "runs/2", "--stage", "visual_language_integration"]
    following = train("config.yaml", options)
    assert {weight.dtype for weight in following.model.parameters()} == {torch.float32}


def test_a_dataset_can_be_streamed(workplace):
    options = {"train_file": None, "dataset": "json_data", "streaming": True, "max_steps": 2, "data_fraction": 1}
    Path("json_data").mkdir()
    shutil.copy("samples.json", "json_data/train.json")
    trainer = train(write_config(**options, distillation_loss="none"))
    assert trainer.state.global_step == 2
    assert all(loss > 0 for loss in losses_of(trainer))
