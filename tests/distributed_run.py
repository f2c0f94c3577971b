"""What `accelerate launch` starts in the distributed tests: the jobs of a JSON file, one training run after the other.

Each process writes what it saw into its own report, `report-<rank>.json` beside the jobs.
"""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import tiny_config, tiny_model, tiny_processor
from training_runs import losses_of, make_trainer, tiny_teacher
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

LOSSES = ("loss", "lm_loss", "distillation_loss", "grad_norm")


def exact_model(vision: dict | None = None):
    """The tiny model without dropout, whose draws would differ between one process and two."""
    vision = {"gstra_dropout": 0.0, "fusion_dropout": 0.0, **(vision or {})}
    return tiny_model(tiny_config(tiny_processor().video_token_id, vision=vision))


class GradientWatch(TrainerCallback):
    """Notes parameters that train and have no gradient when the optimizer steps."""

    def __init__(self):
        self.untouched: set[str] = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.untouched |= {name for name, own in model.named_parameters() if own.requires_grad and own.grad is None}


def run_job(job: dict, folder: Path) -> dict:
    """One training run.

    Args:
        job: `stage`, `output_dir`; and as wanted `options` of the trainer, `vision` (fields of the configuration),
            `streaming`, `resume_from` (a checkpoint), `export` (folder for the trained model).
        folder: of `samples.json` and `teacher`.

    Returns:
        Losses, the wrapped model's class, and what else this process can tell.
    """
    torch.set_num_threads(1)
    unset_hf_deepspeed_config()  # with that of an earlier job, ZeRO-3 would cut up this one's model while it is made
    watch = GradientWatch()
    options = {
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.5,
        # Where a gradient is zero but for rounding, Adam would blow up the rounding.
        "adam_epsilon": 1e-3,
        "max_skipped_share": 0.5,
        "ddp_timeout": 60,
        **job.get("options", {}),
    }
    if job.get("streaming"):
        samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        columns = {name for sample in samples for name in sample}
        rows = [{name: sample.get(name) for name in columns} for sample in samples]  # the first row names the columns
        options["train_dataset"] = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(
        job["stage"],
        folder / "samples.json",
        Path(job["output_dir"]),
        teacher=tiny_teacher(folder / "teacher"),
        model=exact_model(job.get("vision")),
        callbacks=[watch],
        **options,
    )
    trainer.train(job.get("resume_from"))
    # DDP's processes have the whole model: one may save it alone, without the others waiting for it.
    is_ddp = type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if "export" in job and (trainer.is_world_process_zero() or not is_ddp):
        trainer.save_model(job["export"])
    engine = trainer.model_wrapped
    stage = getattr(engine, "zero_optimization_stage", None)
    return {
        **{name: losses_of(trainer, name) for name in LOSSES},
        "num_unreadable": losses_of(trainer, "num_unreadable"),
        "engine": type(engine).__name__,
        "zero_stage": None if stage is None else stage(),
        "num_processes": trainer.args.world_size,
        "statistics": [own.tolist() for name, own in trainer.model.named_buffers() if name.endswith("running_mean")],
        # DeepSpeed takes the gradients away as they come.
        "untouched": sorted(watch.untouched) if stage is None else [],
    }


def allow_fsdp_on_cpu() -> None:
    """accelerate takes FSDP from its config file on accelerators only, and runs DDP on a CPU without a word.

    What is tested here (accelerate's wrapping, torch's sharding and collectives, saving) is the same on both.
    """
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    reports = {name: run_job(job, Path(plan["folder"])) for name, job in plan["jobs"].items()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    report = plan_file.with_name(f"report-{rank}.json")
    report.write_text(json.dumps(reports), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
