"""The Trainer of Video-Panda: transformers' own, with parts that train at rates of their own, distillation, data that may be
unreadable, and checkpoints that survive being killed.

What is overridden of transformers' private methods is named in `OVERRIDDEN`, which a test compares with its Trainer.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import IterableDataset, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler, nested_gather

from .alignment_head import ALIGNMENT_HEAD_FILE, AlignmentHead, distilled_layers, load_alignment_head
from .arguments import VideoPandaTrainingArguments
from .checkpoint_saving import AUTO, CheckpointSaving
from .checkpoints import find_checkpoint
from .collator import VideoPandaDataCollator
from .distillation import HEAD_NAME, DistillationBatch, TrainingLosses, find_core
from .parameters import PartPlan, choose_trainable, format_plan, optimizer_groups
from .run_identity import RunIdentity, new_identity
from .samples import IndexedDataset, check_samples, load_samples
from .sampling import ModalityLengthSampler, describe_samples, random_subset
from .skipped import SkippedSamples
from .teacher_cache import TeacherCache
from .teachers import Teacher, load_teacher, valid_cells
from .training_facts import name_data, read_origin

# Private methods of transformers' Trainer that this one or `CheckpointSaving` overrides.
OVERRIDDEN = (
    "_get_train_sampler",
    "_get_eval_sampler",
    "_get_output_dir",
    "_save_checkpoint",
    "_save",
    "_load_from_checkpoint",
    "_load_best_model",
    "_push_from_checkpoint",
)
# What the collator adds to a batch and the model does not know.
BATCH_EXTRAS = (
    "teacher_pixel_values",
    "teacher_grid_thw",
    "teacher_keys",
    "teacher_features",
    "num_samples",
    "skipped",
)
SKIPPED_FILE = "_skipped_samples.jsonl"  # names with an underscore are never pushed to the Hub


class VideoPandaTrainer(CheckpointSaving, Trainer):
    """Trains a Video-Panda model; the stages are its subclasses.

    Args:
        model: `VideoPandaForConditionalGeneration`, or one wrapped by PEFT (see `lora_config`).
        args: of the stage.
        train_dataset, eval_dataset: raw samples: a JSON or JSONL file, a list, or a dataset (also a streaming one) of
            dictionaries as docs/data.md describes them. Clips are decoded in the loader's workers.
        processing_class: the model's processor.
        teacher: frozen; default: what `args.teacher` names. Ignored with `distillation_loss="none"`.
        alignment_head: file of an earlier stage, or folder of a checkpoint or run, to go on from; default: a fresh head.
        data_collator: default: a `VideoPandaDataCollator` as the arguments say.
        kwargs: as transformers' Trainer takes them.

    Raises:
        ValueError: arguments of another stage, a model of another kind, a bad sample (index and id are named), a teacher
            that does not fit.
    """

    arguments_class = VideoPandaTrainingArguments

    def __init__(
        self,
        model=None,
        args: VideoPandaTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        teacher: Teacher | None = None,
        alignment_head: str | Path | None = None,
        **kwargs,
    ):
        _check_arguments(args, self.arguments_class, type(self).__name__)
        self._check_model(model, processing_class, data_collator)
        self.core_config = find_core(model).config
        self.origin, self.data_names = read_origin(model), name_data(train_dataset)
        self.teacher, self.teacher_cache = self._prepare_teacher(args, teacher)
        self.losses: TrainingLosses | None = None
        self.alignment_head = None if self.teacher is None else self._make_head(args, alignment_head)
        train_dataset = self._prepare_dataset(train_dataset, args, is_training=True)
        eval_dataset = self._prepare_eval(eval_dataset, args)
        if args.accelerator_config.dispatch_batches is None:
            # A stream's batches would be made by the first process and cut into parts of equal numbers of rows; but a batch
            # has more videos than prompts, or fewer. Instead every process reads the stream and takes its own samples.
            args.accelerator_config.dispatch_batches = False
        if data_collator is None:
            data_collator = self._make_collator(processing_class, args, self.teacher)
            self.eval_collator = self._make_collator(processing_class, args, None)
        else:
            self.eval_collator = data_collator
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.teacher is not None:
            self.teacher.to(args.device)
        num_samples = None if _is_stream(train_dataset) or train_dataset is None else len(train_dataset)
        self.skipped = SkippedSamples(
            _of_rank(Path(args.output_dir, SKIPPED_FILE), args.process_index), args.max_skipped_share, num_samples
        )
        self.identity = self._make_identity()
        self._sums: dict[str, torch.Tensor] = {}
        self._frames_in_step: torch.Tensor | int = 1
        self._steps_since_log = 0

    # Set up ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_model(model, processing_class, data_collator) -> None:
        if model is None:
            raise ValueError("The trainer needs a model; model_init is not supported, as the head belongs to one model")
        if find_core(model).config.model_type != "video_panda":
            raise ValueError(f"The model is of type {find_core(model).config.model_type!r}, expected 'video_panda'")
        if processing_class is None:
            if data_collator is None:
                raise ValueError("The trainer needs processing_class, the model's processor, or a data_collator")
            return
        config = find_core(model).config
        for name in ("video_token_id", "row_token_id", "frame_token_id", "image_token_id"):
            if getattr(processing_class, name) != getattr(config, name):
                raise ValueError(
                    f"processing_class has {name} {getattr(processing_class, name)}, the model's configuration "
                    f"{getattr(config, name)}: they belong to different checkpoints"
                )

    def _prepare_teacher(self, args, teacher: Teacher | None) -> tuple[Teacher | None, TeacherCache | None]:
        if args.distillation_loss == "none":
            return None, None
        if teacher is None:
            teacher = load_teacher(
                args.teacher,
                args.teacher_source,
                dtype=args.teacher_dtype,
                temporal_attention=args.teacher_temporal_attention,
            )
        num_frames = args.num_frames or self.core_config.vision_config.num_frames
        if teacher.max_num_frames is not None and num_frames > teacher.max_num_frames:
            raise ValueError(f"The teacher takes at most {teacher.max_num_frames} frames, num_frames is {num_frames}")
        _check_teacher_output(teacher, num_frames)
        cache = TeacherCache(args.teacher_cache_dir, teacher.fingerprint) if args.teacher_cache_dir else None
        return teacher, cache

    def _make_head(self, args, source: str | Path | None) -> AlignmentHead:
        """A head drawn from the seed, or read from an earlier stage's."""
        text = self.core_config.text_config
        num_states = len(distilled_layers(text.num_hidden_layers, args.distillation_layer_step))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            head = AlignmentHead(num_states, text.hidden_size, self.teacher.width)
        if source is not None:
            load_alignment_head(head, find_alignment_head(source))
        return head

    @staticmethod
    def _prepare_dataset(dataset, args, is_training: bool):
        """Raw samples, checked and numbered; of the training data the part that `data_fraction` says."""
        if dataset is None:
            return None
        samples = load_samples(dataset)
        if _is_stream(samples):
            if is_training and args.data_fraction < 1:
                raise ValueError(
                    f"data_fraction={args.data_fraction} of a streaming data set cannot be drawn; give data_fraction=1, "
                    "or a map-style data set"
                )
            return samples
        check_samples(samples)
        part = None
        if is_training and args.data_fraction < 1:
            part = random_subset(len(samples), args.data_fraction, args.data_fraction_seed)
        return IndexedDataset(samples, part)

    def _prepare_eval(self, dataset, args):
        if isinstance(dataset, dict):
            return {name: self._prepare_dataset(own, args, is_training=False) for name, own in dataset.items()}
        return self._prepare_dataset(dataset, args, is_training=False)

    def _make_collator(self, processor, args, teacher: Teacher | None) -> VideoPandaDataCollator:
        return VideoPandaDataCollator(
            processor,
            args.data_root,
            max_length=args.max_length,
            too_long=args.too_long,
            unreadable=args.unreadable,
            teacher_video_processor=None if teacher is None else teacher.video_processor(),
            teacher_cache=None if teacher is None else self.teacher_cache,
            num_frames=args.num_frames,
        )

    def _make_identity(self) -> RunIdentity:
        distillation = {"loss": self.args.distillation_loss}
        if self.teacher is not None:
            distillation |= {"teacher_width": self.teacher.width, "layer_step": self.args.distillation_layer_step}
        return new_identity(self.args.stage, self.core_config, distillation)

    # Training -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in transformers, from a verified checkpoint.

        Args:
            resume_from_checkpoint: True: the newest whole checkpoint of `output_dir`; "auto": the same, or a fresh start
                if there is none; a folder; None: a fresh start.
            kwargs: as in transformers.

        Raises:
            ValueError: no whole checkpoint, one of another stage or architecture, or an `output_dir` of another run.
        """
        checkpoint = self.choose_checkpoint(resume_from_checkpoint)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) are not supported: use accelerate launch"
            )
        self.claim_output_folder(resuming=checkpoint is not None or resume_from_checkpoint == AUTO)
        if checkpoint is not None:
            self.load_skipped_state(checkpoint)
        self._attach_losses()
        try:
            output = super().train(checkpoint, **kwargs)
            # Here and not in `save_model`, which one process may call alone.
            self.average_statistics()
            return output
        finally:
            self.losses.detach(self.model)
            if self.teacher_cache is not None:
                self.teacher_cache.flush()

    def _attach_losses(self) -> None:
        args, head = self.args, self.alignment_head
        if head is not None and self.place_model_on_device:
            head.to(args.device)
        self.losses = TrainingLosses(
            self.model, head, args.distillation_loss, args.distillation_weight, args.distillation_layer_step
        )
        if self.is_fsdp_enabled:
            _shard_language_model_only(self.accelerator.state.fsdp_plugin, self.model)
        self.parameter_plan: list[PartPlan] = choose_trainable(self.model, args.trains(), args.learning_rates())
        if self.is_world_process_zero():
            print(format_plan(self.parameter_plan), flush=True)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in transformers, with a learning rate for each part."""
        model = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            # An optimizer that brings parameters of its own (GaLore, LOMO) is left as it is.
            if not {"params", "model", "optimizer_dict"} & set(options):
                decayed = set(self.get_decay_parameter_names(model))
                rates = self.args.learning_rates()
                options = {**options, "params": optimizer_groups(model, decayed, self.args.weight_decay, rates)}
            self.optimizer_cls_and_kwargs = optimizer_class, options
            try:
                return super().create_optimizer(model)
            finally:
                self.optimizer_cls_and_kwargs = None
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        # Overridden: transformers finds lengths by loading every sample, and knows no modalities.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if isinstance(dataset, IndexedDataset) and strategy == "batch_rebalance":
            return self._balanced_sampler(dataset)
        if not isinstance(dataset, IndexedDataset) or strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(*self._describe(dataset), group_size, seed)

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        # Overridden: transformers groups evaluation by length too, for which it loads every sample.
        is_alone = self.args.world_size <= 1
        return SequentialSampler(eval_dataset) if is_alone and not _is_stream(eval_dataset) else None

    def _describe(self, dataset: IndexedDataset) -> tuple[list[str], list[int]]:
        """Modality and rough length of each sample."""
        return describe_samples(dataset, self.args.num_frames or self.core_config.vision_config.num_frames)

    def _balanced_sampler(self, dataset: IndexedDataset) -> Sampler:
        return BatchRebalanceSampler(
            lengths=self._describe(dataset)[1],
            effective_batch_size=self.get_total_train_batch_size(self.args),
            dp_size=self.args.world_size,
            grad_accum=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            drop_last=self.args.dataloader_drop_last,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, and counts what the losses and the manifest of skipped samples need."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        records = [record for batch in batches for record in batch.get("skipped", ())]
        self.skipped.add(records, sum(batch.get("num_samples", 0) for batch in batches))
        frames = sum(int(batch["video_grid_thw"][:, 0].sum()) for batch in batches if "video_grid_thw" in batch)
        counts = torch.tensor([frames, self.skipped.num_seen, self.skipped.num_unreadable], device=device)
        if self.args.world_size > 1:
            everywhere = self.accelerator.reduce(counts, "sum")
            if not self.args.average_tokens_across_devices:
                everywhere[0] = counts[0]
            counts = everywhere
        self._frames_in_step, seen, unreadable = counts.tolist()
        self.skipped.check(unreadable, seen)
        self._steps_since_log += 1
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """LM loss, and in training the distillation loss; as in transformers otherwise."""
        extras = {name: inputs[name] for name in BATCH_EXTRAS if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in BATCH_EXTRAS}
        if self.is_deepspeed_enabled:
            _gather_all_but_language_model_once(self.model_wrapped, self.model)
        if self.losses is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = None
        if self.teacher is not None and "video_grid_thw" in inputs:
            features = self._teacher_features(extras, inputs["video_grid_thw"])
            batch = DistillationBatch(features, self._frames_in_step)
        self.losses.begin(batch)
        try:
            # The hooks run outside the autocast that accelerate puts around the model's own forward.
            with self.accelerator.autocast():
                loss, outputs = super().compute_loss(model, _keep_answers(inputs), True, num_items_in_batch)
        finally:
            self.losses.end()
        self._note_losses(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_features(self, extras: dict, video_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """The teacher's features of each video, (T, h', w', W): from the cache, or computed and put there."""
        features = list(extras.get("teacher_features", ()))
        if len(features) != len(video_grid_thw):
            raise ValueError(
                f"The batch has {len(video_grid_thw)} videos and {len(features)} entries of teacher_features: the "
                "data_collator was built without a teacher_video_processor"
            )
        missing = [place for place, own in enumerate(features) if own is None]
        if missing:
            grids = extras["teacher_grid_thw"].tolist()
            pixels = extras["teacher_pixel_values"].to(self.args.device)
            computed = self.teacher(pixels, num_frames=[frames for frames, _, _ in grids])
            for place, own, (frames, height, width) in zip(missing, computed, grids, strict=True):
                features[place] = valid_cells(own[:frames], (height, width)).contiguous()
                if self.teacher_cache is not None:
                    self.teacher_cache.put(extras["teacher_keys"][place], features[place].cpu())
        return features

    # Logging --------------------------------------------------------------------------------------------------------

    def _note_losses(self, outputs, num_items_in_batch) -> None:
        """Add up the two losses as the Trainer adds up their sum: over batches, averaged over processes."""
        is_scaled = num_items_in_batch is not None
        scale = 1.0 if is_scaled else 1.0 / self.current_gradient_accumulation_steps
        if is_scaled and self.args.average_tokens_across_devices:
            scale = float(self.accelerator.num_processes)
        for name in ("lm_loss", "distillation_loss"):
            value = getattr(outputs, name)
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value.float() * scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with the LM and the distillation loss beside their sum."""
        if "loss" in logs and self._steps_since_log:
            names = ("lm_loss", "distillation_loss") if self.teacher is not None else ("lm_loss",)
            zero = torch.zeros((), device=self.args.device)
            for name in names:
                total = nested_gather(self._sums.get(name, zero), self.args.parallel_mode).mean().item()
                logs[name] = total / self._steps_since_log
            counts = self.skipped_everywhere()["counts"]
            logs.update({f"num_{kind}": count for kind, count in counts.items()})
            self._sums, self._steps_since_log = {}, 0
        super().log(logs, start_time)

    # Evaluation -----------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, **kwargs):
        """As in transformers, with the statistics of all processes."""
        self.average_statistics()
        return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """As in transformers; the teacher has no part in evaluation."""
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def find_alignment_head(source: str | Path) -> Path:
    """The file of an alignment head: itself, or that of a checkpoint, or of the newest whole checkpoint of a run.

    Raises:
        OSError: there is none.
    """
    source = Path(source)
    if source.is_file():
        return source
    if (source / ALIGNMENT_HEAD_FILE).is_file():
        return source / ALIGNMENT_HEAD_FILE
    found = find_checkpoint(source)[0] if source.is_dir() else None
    if found is None or not (found / ALIGNMENT_HEAD_FILE).is_file():
        raise FileNotFoundError(f"{source} has no {ALIGNMENT_HEAD_FILE}, nor a whole checkpoint with one")
    return found / ALIGNMENT_HEAD_FILE


def _check_arguments(args, expected: type, trainer: str) -> None:
    if not isinstance(args, expected):
        raise ValueError(f"{trainer} takes {expected.__name__}, got {type(args).__name__}")


def _check_teacher_output(teacher: Teacher, num_frames: int) -> None:
    """Run a teacher once on black frames: what it says of itself must be what it does, before hours of training."""
    device = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    pixels = torch.zeros(1, num_frames, 3, teacher.image_size, teacher.image_size, device=device)
    got = tuple(teacher(pixels, num_frames=[num_frames]).shape)
    expected = (1, num_frames, teacher.side, teacher.side, teacher.width)
    if got != expected:
        raise ValueError(
            f"The teacher's features have shape {got}, expected {expected} (videos, frames, rows, columns, width): its grid "
            "cannot be matched with the student's"
        )


def _keep_answers(inputs: dict) -> dict:
    """Ask for logits only where there is something to predict: of a prompt with a video that is a few percent."""
    labels = inputs.get("labels")
    if labels is None or "logits_to_keep" in inputs or torch.compiler.is_compiling():
        return inputs
    kept = (labels[:, 1:] != -100).any(dim=0).nonzero().squeeze(1)
    if not len(kept):
        kept = kept.new_zeros(1)
    return {**inputs, "logits_to_keep": kept, "shift_labels": labels[:, kept + 1]}


def _shard_language_model_only(fsdp_plugin, model) -> None:
    """Leave STAB and projector to FSDP's outermost unit, whose parameters are gathered once a step.

    How often and when they run depends on the batch (videos of several lengths, pictures, none): as units of their own
    they would be gathered at other moments on other ranks, which then wait for each other for ever.
    """
    names = fsdp_plugin.transformer_cls_names_to_wrap
    names = getattr(model, "_no_split_modules", None) if names is None else names
    core = find_core(model)
    whole = {type(module).__name__ for part in (core.stab, core.projector) for module in part.modules()}
    fsdp_plugin.transformer_cls_names_to_wrap = [name for name in names or () if name not in whole]


def _gather_all_but_language_model_once(engine, model) -> None:
    """The same under DeepSpeed ZeRO-3; nothing under its other stages.

    It gathers what a module needs when the module is called, and has every rank call the same ones in the same order.
    Here the model's own call, of which a batch has one, takes over what STAB, projector and head need; and the token
    embeddings, through which a gradient passes on those ranks only where a black clip is added to them.
    """
    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # an engine that only evaluates has it there
    if not hasattr(offload, "get_param_coordinator"):
        return
    from deepspeed.runtime.zero import register_external_parameter

    core = find_core(model)
    parts = [core.stab, core.projector, core.get_input_embeddings(), *filter(None, [model._modules.get(HEAD_NAME)])]
    modules = [module for part in parts for module in part.modules()]
    hooked = {id(hooks) for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)}
    for handles in (offload.forward_hooks, offload.backward_hooks):  # both act in a module's forward
        for handle in [own for own in handles if id(own.hooks_dict_ref()) in hooked]:
            handle.remove()
            handles.remove(handle)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            register_external_parameter(model, parameter)


def _is_stream(dataset) -> bool:
    return isinstance(dataset, IterableDataset) or (dataset is not None and not hasattr(dataset, "__len__"))


def _of_rank(path: Path, rank: int) -> Path:
    """A file that this process alone writes."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
