"""Two processes give what one gives: losses, gradients, weights, checkpoints; with DDP, FSDP2 and DeepSpeed ZeRO-2.

One process takes two micro-batches a step, two processes one each: the same micro-batches, so that BatchNorm, which sees
micro-batches, is no excuse. The accelerate files of examples/train are those that are launched.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from distributed_run import exact_model, run_job
from PIL import Image
from safetensors.torch import load_file
from training_runs import make_trainer, tiny_teacher, write_colour_clip, write_samples

from video_panda import VideoPandaForConditionalGeneration

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples" / "train"
TIMEOUT = 240  # seconds; a launch takes about ten
ENGINES = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPVideoPandaForConditionalGeneration",
    "deepspeed_zero2": "DeepSpeedEngine",
}
LOSSES = ("loss", "lm_loss", "distillation_loss")
# BatchNorm's running statistics follow the micro-batches that a process sees; a checkpoint has their mean.
LOCAL_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or not all(map(shutil.which, ("g++", "ninja"))),
    reason="needs deepspeed, and g++ and ninja, with which it builds its communication on CPU",
)


def turn(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen samples, in steps of four: the first two are the first process', the others the second one's."""
    folder = tmp_path_factory.mktemp("distributed") / "data"
    videos = json.loads(write_samples(folder).read_text())
    Image.new("RGB", (40, 60), (200, 30, 30)).save(folder / "picture.png")
    write_colour_clip(folder / "clips" / "short.mp4", np.array([9, 99, 200], dtype=np.uint8), (48, 64), num_frames=3)
    (folder / "clips" / "broken.mp4").write_bytes(b"no video at all" * 40)
    short = {"id": "short", "video": "clips/short.mp4", "conversations": turn("<video>\nWhat is it?", "It is red.")}
    broken = {**short, "id": "broken", "video": "clips/broken.mp4"}
    picture = {"id": "picture", "image": "picture.png", "conversations": turn("<image>\nWhat colour?", "red")}
    text = {"id": "text", "conversations": turn("Who threw it?", "The child did.")}
    steps = [
        [videos[0], videos[1], text, text],
        [videos[2], videos[3], broken, broken],
        [picture, picture, videos[4], short],
        [text, videos[5], short, broken],
    ]
    (folder / "samples.json").write_text(json.dumps([sample for step in steps for sample in step]))
    tiny_teacher(folder / "teacher")
    return folder


def job(stage: str, output_dir: Path, **job_options) -> dict:
    """Four steps, saved after two and four."""
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2, **job_options.pop("options", {})}
    return {"stage": stage, "output_dir": str(output_dir), "options": options, **job_options}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Run a job in this process, once: (report, folder of the run)."""
    memory = {}

    def run(stage: str, **job_options):
        key = json.dumps([stage, job_options], sort_keys=True)
        if key not in memory:
            folder = tmp_path_factory.mktemp("alone")
            memory[key] = run_job(job(stage, folder, **job_options), data), folder
        return memory[key]

    return run


def write_accelerate_file(kind: str, path: Path, **changes) -> None:
    """The example's file, for two processes on a CPU."""
    config = yaml.safe_load((EXAMPLES / f"accelerate_{kind}.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True, "main_process_port": 0}
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name] = {key: own for key, own in (config[name] | value).items() if own is not None}
        else:
            config[name] = value
    config = {name: value for name, value in config.items() if value is not None}
    path.write_text(yaml.safe_dump(config))


def launch(kind: str, data: Path, folder: Path, jobs: dict[str, dict], **changes) -> list[dict]:
    """Run jobs in two processes; returns what each reports."""
    write_accelerate_file(kind, folder / "accelerate.yaml", **changes)
    (folder / "plan.json").write_text(json.dumps({"folder": str(data), "jobs": jobs}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += [str(TESTS / "distributed_run.py"), str(folder / "plan.json")]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / "log.txt", "w") as log:
        process = psutil.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(TIMEOUT)
        except psutil.TimeoutExpired:
            code = f"none after {TIMEOUT} s"
        finally:
            # The launcher puts each process into a session of its own.
            for own in [*(process.children(recursive=True) if process.is_running() else ()), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    own.kill()
    assert code == 0, f"exit code {code}:\n{(folder / 'log.txt').read_text()[-4000:]}"
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


def check_same_run(
    kind: str, single: dict, reports: list[dict], zero_stage: int | None = None, tolerance: float = 1e-5
) -> None:
    for report in reports:
        assert report["engine"] == ENGINES[kind]
        assert report["zero_stage"] == zero_stage
        assert report["num_processes"] == 2
        assert report["untouched"] == []
        assert report["num_unreadable"] == single["num_unreadable"]
        for name in LOSSES:
            torch.testing.assert_close(
                torch.tensor(report[name]), torch.tensor(single[name]), rtol=0, atol=tolerance, msg=name
            )
        torch.testing.assert_close(
            torch.tensor(report["grad_norm"]), torch.tensor(single["grad_norm"]), rtol=1e-5, atol=0
        )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    weights = VideoPandaForConditionalGeneration.from_pretrained(folder).state_dict()
    return {name: own for name, own in weights.items() if not name.endswith(LOCAL_STATISTICS)}


def check_same_weights(folder: Path, expected: Path, tolerance: float) -> None:
    """Model and head of two folders."""
    head = "alignment_head.safetensors"
    pairs = [
        (weights_in(folder), weights_in(expected)),
        (load_file(folder / head), load_file(expected / head)),
    ]
    for own, others in pairs:
        assert own.keys() == others.keys()
        for name in others:
            torch.testing.assert_close(own[name], others[name], rtol=0, atol=tolerance, msg=name)


def names_in(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def check_stage(kind: str, stage: str, data: Path, alone, folder: Path, with_resume: bool = True, **changes) -> None:
    """Losses, checkpoints, resuming and export of one stage."""
    job_options = changes.pop("job_options", {})
    zero_stage = changes.pop("zero_stage", 2 if kind == "deepspeed_zero2" else None)
    single, single_folder = alone(stage, **job_options)
    run, again, export = folder / "run", folder / "again", folder / "export"
    jobs = {"run": job(stage, run, **job_options)}
    if with_resume:
        resume = {"resume_from": str(run / "checkpoint-2"), "export": str(export)}
        jobs["again"] = job(stage, again, **job_options, **resume)
    reports = launch(kind, data, folder, jobs, **changes)
    check_same_run(kind, single, [report["run"] for report in reports], zero_stage)
    # Averaged when the last checkpoint was saved.
    statistics = [torch.tensor(report["run"]["statistics"]) for report in reports]
    torch.testing.assert_close(*statistics, rtol=0, atol=1e-6)

    checkpoint, single_checkpoint = run / "checkpoint-4", single_folder / "checkpoint-4"
    check_same_weights(checkpoint, single_checkpoint, 1e-5)
    code = names_in(checkpoint, "*video_panda.py")
    assert code == names_in(single_checkpoint, "*video_panda.py")
    assert not names_in(checkpoint, "_fsdp*")
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads(
        (single_checkpoint / "config.json").read_text()
    )
    if not with_resume:
        return
    for name in LOSSES:
        first, second = (torch.tensor(reports[0][part][name]) for part in ("run", "again"))
        torch.testing.assert_close(second[-2:], first[-2:], rtol=0, atol=1e-6, msg=name)
    check_same_weights(again / "checkpoint-4", checkpoint, 1e-6)
    assert "alignment_head.safetensors" not in names_in(export, "*")
    assert names_in(export, "*video_panda.py") == code
    exported, expected = weights_in(export), weights_in(again / "checkpoint-4")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_ddp(data, alone, tmp_path):
    """No process waits for another, whatever its samples are: no parameter is without a gradient."""
    check_stage("ddp", "instruction_tuning", data, alone, tmp_path)


def test_fsdp2(data, alone, tmp_path):
    """Of a frozen language model too, which a batch of texts alone would not send a gradient through."""
    check_stage("fsdp2", "initial_alignment", data, alone, tmp_path)


BATCHES = (
    ["clip-0", "clip-1"],
    ["text", "text"],
    ["picture", "picture"],
    ["clip-0", "short"],
    ["still", "clip-0"],
    ["clip-0", "still"],
    ["picture", "clip-0"],
    ["broken"],
)


@pytest.mark.parametrize("stage", ["initial_alignment", "instruction_tuning"])
def test_gradients_come_in_one_order(stage, data, tmp_path):
    """ZeRO-2 adds up what arrives on the ranks in the order of arrival: it has to be one, whatever the batches hold."""
    by_id = {sample["id"]: sample for sample in json.loads((data / "samples.json").read_text())}
    write_colour_clip(data / "clips" / "still.mp4", np.array([9, 99, 20], dtype=np.uint8), (48, 64), num_frames=1)
    by_id["still"] = {**by_id["short"], "id": "still", "video": "clips/still.mp4"}
    trainer = make_trainer(stage, data / "samples.json", tmp_path, tiny_teacher(data / "teacher"), exact_model())
    trainer._attach_losses()
    model = trainer.model.train()
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    arrived: list[str] = []
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    orders = []
    for ids in BATCHES:
        arrived.clear()
        before = {name: own.clone() for name, own in model.named_buffers()}
        batch = trainer.data_collator([by_id[own] for own in ids])
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(8)).backward()
        orders.append(list(arrived))
        sees_video = any(own.startswith("clip") for own in ids)
        assert sees_video != all(torch.equal(own, before[name]) for name, own in model.named_buffers()), ids
    assert set(orders[0]) == set(trained)
    for ids, order in zip(BATCHES, orders):
        assert order == orders[0], ids


@pytest.mark.parametrize("kind", ENGINES)
def test_accelerate_files_load(kind):
    config = load_config_from_file(str(EXAMPLES / f"accelerate_{kind}.yaml"))
    assert config.num_processes == 8
    names = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert str(config.distributed_type.value) == names[kind]
    if kind == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config  # any language model
    if kind == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2
        # Then the stage's own values are taken; numbers here would have to be the same.
        for name in ("gradient_accumulation_steps", "gradient_clipping"):
            assert config.deepspeed_config.get(name, "auto") == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["visual_language_integration", "instruction_tuning"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_stages_that_train_everything(kind, stage, data, alone, tmp_path):
    check_stage(kind, stage, data, alone, tmp_path)


@pytest.mark.slow
def test_ddp_of_a_frozen_language_model(data, alone, tmp_path):
    check_stage("ddp", "initial_alignment", data, alone, tmp_path)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["initial_alignment", "visual_language_integration", "instruction_tuning"])
def test_deepspeed_zero2(stage, data, alone, tmp_path):
    check_stage("deepspeed_zero2", stage, data, alone, tmp_path)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["initial_alignment", "visual_language_integration"])
def test_deepspeed_zero3(stage, data, alone, tmp_path):
    """Not one parameter is so small that every process keeps it, and none is kept for its next use."""
    keys = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, **{f"stage3_{key}": 0 for key in keys}}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(names, "auto")}))
    example = yaml.safe_load((EXAMPLES / "accelerate_deepspeed_zero2.yaml").read_text())["deepspeed_config"]
    replaced = {**dict.fromkeys(example), "deepspeed_config_file": str(file), "zero3_init_flag": False}
    changes = {"deepspeed_config": replaced, "mixed_precision": None}
    check_stage("deepspeed_zero2", stage, data, alone, tmp_path, zero_stage=3, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["initial_alignment", "instruction_tuning"])
def test_fsdp2_that_saves_in_shards(stage, data, alone, tmp_path):
    """Its checkpoints hold the whole model as well."""
    shards = {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    check_stage("fsdp2", stage, data, alone, tmp_path, fsdp_config=shards)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "job_options",
    [
        {"options": {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2, "save_steps": 4}},
        {"options": {"activation_checkpointing": True}},
        {"options": {"distillation_loss": "mse"}, "vision": {"use_lste": False}},
        {"options": {"max_steps": 4}, "streaming": True},
    ],
    ids=["grouped", "activation_checkpointing", "without_lste", "streaming"],
)
def test_options(kind, job_options, data, alone, tmp_path):
    check_stage(kind, "instruction_tuning", data, alone, tmp_path, with_resume=False, job_options=job_options)
