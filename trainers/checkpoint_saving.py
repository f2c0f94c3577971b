"""How the Trainer saves and resumes: checkpoints appear whole or not at all, and only whole ones are resumed.

transformers writes straight into `checkpoint-N` and resumes from the highest N, whatever is in it.
"""

import contextlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .alignment_head import ALIGNMENT_HEAD_FILE, load_alignment_head, save_alignment_head
from .checkpoints import (
    CheckpointError,
    clear_staging,
    find_checkpoint,
    publish,
    remove_leftovers,
    rotate_checkpoints,
    seal,
    staging_folder,
    verify,
)
from .distillation import HEAD_NAME, find_core
from .run_identity import RunIdentity, check_output_folder, check_same_run, read_identity, write_identity
from .training_facts import TRAINING_FILE, training_facts, write_training_facts

logger = logging.getLogger(__name__)

SKIPPED_STATE_FILE = "skipped_samples.json"
AUTO = "auto"
# How torch.save says that a file could not be written to its end.
_WRITING_FAILED = re.compile(r"inline_container|PytorchStreamWriter")


class CheckpointSaving:
    """Part of `VideoPandaTrainer`: saving, resuming, and the head beside the model."""

    identity: RunIdentity
    _staging: Path | None = None  # where the checkpoint is written that is being saved
    _gathered_head: dict | None = None  # the head's weights, where an engine had them spread over the processes
    _is_pushing = False  # the model that has been trained, not a checkpoint

    # Resuming -------------------------------------------------------------------------------------------------------

    def choose_checkpoint(self, asked: str | bool | None) -> str | None:
        """The checkpoint to resume from; it was verified.

        Args:
            asked: None or False: none; True: the newest whole one of `output_dir`; "auto": the same, or none if there is
                none; otherwise a folder.

        Raises:
            ValueError: there is no whole one, or it belongs to another stage, architecture or distillation.
        """
        if asked is None or asked is False:
            return None
        answer = [None, None]
        if self.accelerator.is_main_process:  # one process reads and hashes
            try:
                answer[0] = self._find_verified(asked)
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def _find_verified(self, asked: str | bool) -> str | None:
        if asked is True or asked == AUTO:
            remove_leftovers(self.args.output_dir)
            found, passed_over = find_checkpoint(self.args.output_dir)
            for folder, reason in passed_over:
                logger.warning("%s is passed over: %s", folder, reason)
            if found is None:
                if asked == AUTO:
                    return None
                reasons = "".join(f"; {folder.name}: {reason}" for folder, reason in passed_over)
                raise ValueError(f"{self.args.output_dir} holds no checkpoint to resume from{reasons}")
        else:
            found = Path(asked)
            try:
                verify(found)
            except CheckpointError as error:
                raise ValueError(f"Cannot resume from {found}: {error}") from error
        check_same_run(read_identity(found), self.identity, found)
        logger.warning("Resuming from %s", found)
        return str(found)

    def claim_output_folder(self, resuming: bool) -> None:
        """Make sure that `output_dir` is this run's, and take away what a killed save left there.

        Args:
            resuming: the run that the folder belongs to goes on, perhaps from its beginning.

        Raises:
            ValueError: it belongs to another run.
        """
        error = [None]
        if self.accelerator.is_main_process:
            try:
                self.identity = check_output_folder(self.args.output_dir, self.identity, resuming)
                remove_leftovers(self.args.output_dir)
                write_identity(self.args.output_dir, self.identity)
            except (ValueError, OSError) as problem:
                error[0] = str(problem)
        broadcast_object_list(error)
        if error[0] is not None:
            raise ValueError(error[0])

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # Overridden: the head's weights lie in a file of their own. FSDP's state holds the head too.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with self.without_head():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        head = self.alignment_head
        if head is not None:
            load_alignment_head(head, Path(resume_from_checkpoint, ALIGNMENT_HEAD_FILE))
        return None

    def _load_best_model(self):
        # Overridden: the best model is loaded for what comes after training, where there is no head.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        with self.without_head():
            return super()._load_best_model()

    def load_skipped_state(self, checkpoint: str) -> None:
        """Go on counting the skipped samples from a checkpoint; it holds the sum of all processes, the first takes it."""
        file = Path(checkpoint, SKIPPED_STATE_FILE)
        if file.exists():
            state = json.loads(file.read_text(encoding="utf-8"))
            if self.args.process_index > 0:
                state = {"num_seen": 0, "counts": {}, "last_reasons": []}
            self.skipped.load_state_dict(state)

    def skipped_everywhere(self) -> dict:
        """What all processes together skipped, as a state of `SkippedSamples`; all of them have to call this."""
        states = gather_object([self.skipped.state_dict()])
        return {
            "num_seen": sum(state["num_seen"] for state in states),
            "counts": dict(sum((Counter(state["counts"]) for state in states), Counter())),
            "last_reasons": [reason for state in states for reason in state["last_reasons"]],
        }

    def average_statistics(self) -> None:
        """Average BatchNorm's running statistics over the processes, of which each has seen its own micro-batches.

        In memory too: a run that goes on from the checkpoint then has the statistics of the run that went on by itself.
        """
        if self.args.world_size == 1:
            return
        for buffer in find_core(self.model).stab.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer.clone(), "mean"))

    # Saving ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def without_head(self) -> Iterator[None]:
        """The model as users know it: for the time of the block it does not carry the alignment head."""
        head = self.model._modules.pop(HEAD_NAME, None)
        try:
            yield
        finally:
            if head is not None:
                self.model._modules[HEAD_NAME] = head

    def _get_output_dir(self, trial):
        # Overridden: while a checkpoint is saved, transformers makes its `checkpoint-N` in the staging folder.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        # Overridden: written to one side, synced and listed in a manifest, and only then renamed.
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = staging_folder(run_folder, self.state.global_step)
        if self.args.should_save:
            clear_staging(run_folder, self.state.global_step)
        self.accelerator.wait_for_everyone()
        self.average_statistics()
        skipped = self.skipped_everywhere()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._complete(staging / name, run_folder, skipped)
        except (RuntimeError, SafetensorError) as error:
            if not isinstance(error, SafetensorError) and not _WRITING_FAILED.search(str(error)):
                raise
            raise OSError(f"{run_folder / name} cannot be written (is the disk full?): {error}") from error
        finally:
            self._staging = self._gathered_head = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(staging / name)
            publish(staging / name, run_folder / name)
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_folder, self.args.save_total_limit, best, newest=run_folder / name)

    def _complete(self, checkpoint: Path, run_folder: Path, skipped: dict) -> None:
        """Add what transformers does not save, and name the best checkpoint by the path that it will have."""
        write_identity(checkpoint, self.identity)
        if self.alignment_head is not None:
            save_alignment_head(self._gathered_head or self.alignment_head.state_dict(), checkpoint)
        Path(checkpoint, SKIPPED_STATE_FILE).write_text(json.dumps(skipped), encoding="utf-8")
        if self.state.best_global_step and Path(self.state.best_model_checkpoint or "").parent == checkpoint.parent:
            self.state.best_model_checkpoint = str(run_folder / checkpoint.name)
            self.state.save_to_json(str(checkpoint / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, and whole weights also where FSDP saves its own state in shards."""
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None):
        # Overridden: an exported model carries no head; a checkpoint has it in a file of its own.
        if state_dict is not None:
            prefix = f"{HEAD_NAME}."
            head = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
            self._gathered_head = head or None
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
        with self.without_head(), _unsharded_class(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_training_facts(folder, self)
            if self._is_pushing:  # a pickle, with the token for the Hub in it if one was given
                Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder):
        # Overridden: pushed when the checkpoint stands at its place, and with the code that its config.json names.
        if self._staging is not None:
            return
        if self.is_world_process_zero():
            for pattern in ("*.py", TRAINING_FILE):
                for file in Path(checkpoint_folder).glob(pattern):
                    shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args, **kwargs):
        """As in transformers, with a card that says how the model was trained, and without the pickled arguments."""
        self._is_pushing = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._is_pushing = False

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`; a card that somebody wrote there is kept.

        Args:
            language, license, tags: of the card's metadata.
            model_name: the title; default: the folder's name.
            finetuned_from: the base model's id on the Hub; default: as recorded.
            dataset_tags: ids of data sets on the Hub; default: as recorded.
            tasks, dataset, dataset_args: for a LoRA adapter's card only, which is that of transformers.
        """
        if not self.is_world_process_zero():
            return
        if hasattr(self.model, "peft_config"):
            rest = {"tasks": tasks, "dataset_tags": dataset_tags, "dataset": dataset, "dataset_args": dataset_args}
            super().create_model_card(language, license, tags, model_name, finetuned_from, **rest)
            return
        from ..hub.card import write_model_card  # the one thing that training takes from there

        write_model_card(
            self.args.output_dir,
            name=model_name or Path(self.args.output_dir).absolute().name,
            repo_id=self.hub_model_id,
            config=self.core_config,
            training=training_facts(self),
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags or (),
            base_model=finetuned_from,
            datasets=dataset_tags,
        )


@contextlib.contextmanager
def _unsharded_class(model) -> Iterator[None]:
    """FSDP2 gives a model a class of torch's own module, whose files transformers would ship as the model's code."""
    sharded = type(model)
    own = [base for base in sharded.__bases__ if base.__name__ != "FSDPModule"]
    if len(own) < len(sharded.__bases__):
        model.__class__ = own[0]
    try:
        yield
    finally:
        model.__class__ = sharded
