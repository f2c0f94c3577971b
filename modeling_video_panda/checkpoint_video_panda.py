"""Loading and saving without silent substitutes: a checkpoint that does not fit is refused, not filled up at random."""

import json
import os
from pathlib import Path

from transformers import PreTrainedModel

from .saved_files_video_panda import check_saved_files, saving_aside


def check_weight_files(folder: Path) -> None:
    """Compare the size of each safetensors file of weights in a folder with what its own header announces.

    The library's error for a file that was cut off does not say which file it is.

    Raises:
        OSError: naming the file, its size and the expected one.
    """
    for path in sorted(folder.glob("*model*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(header_size) if 8 + header_size <= size else b""
        try:
            entries = json.loads(header)
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise OSError(
                f"{path} ({size} bytes) has no readable safetensors header: cut off, or another format"
            ) from None
        expected = 8 + header_size + max(ends, default=0)
        if size != expected:
            raise OSError(f"{path} holds {size} bytes, but its header announces {expected}: the file was cut off")


def check_everything_loaded(model: PreTrainedModel, source, info: dict, with_mismatches: bool) -> None:
    """Raise a ValueError that names the weights which the checkpoint lacks, has too many, or holds in another shape."""
    config, kind = model.config, type(model).__name__
    # The model without a head takes a full checkpoint.
    unexpected = [name for name in info["unexpected_keys"] if name != "lm_head.weight"]
    for verb, names in (("lacks", info["missing_keys"]), ("holds, beyond its configuration,", unexpected)):
        names = sorted(names)
        if names == ["lm_head.weight"]:
            raise ValueError(f"{source} has no lm_head.weight: it was saved from VideoPandaModel, without the head")
        if names:
            named = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"{source} {verb} {len(names)} weights of a {kind}: {named}. It is a checkpoint of another model, or of "
                "another ablation or size than its config.json says"
            )
    if with_mismatches and info["mismatched_keys"]:
        name, got, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {len(info['mismatched_keys'])} weights have another shape than the configuration says. {name}: "
            f"got {tuple(got)}, expected {tuple(expected)} (text_config.vocab_size is {config.text_config.vocab_size}, "
            f"text_config.hidden_size {config.text_config.hidden_size}, vision_config.hidden_size "
            f"{config.vision_config.hidden_size})"
        )


class VideoPandaCheckpoint(PreTrainedModel):
    """`from_pretrained` and `save_pretrained`, stricter than those of transformers."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, which draws weights at random where a checkpoint has none; here that is an error.

        Args:
            pretrained_model_name_or_path: a folder or a repo id.
            ignore_mismatched_sizes: draw weights of another shape than the configuration's at random.
            output_loading_info: also return the report of what was missing or left over; nothing is then refused for that.
            args, kwargs: as in transformers.

        Raises:
            ValueError: if weights are missing, left over or of another shape; they are named.
            OSError: if a file is missing, damaged or of another checkpoint; it is named.
        """
        source = pretrained_model_name_or_path
        if source is not None and os.path.isdir(source):
            folder = Path(source, kwargs.get("subfolder") or "")
            check_weight_files(folder)
            if not output_loading_info:
                check_saved_files(folder, cls.__module__, "model")
        model, info = super().from_pretrained(
            source, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        # A quantizer renames weights; what it reports as missing says nothing.
        if not hasattr(model, "hf_quantizer"):
            allowed = {**info, "missing_keys": (), "unexpected_keys": ()} if output_loading_info else info
            check_everything_loaded(model, source, allowed, with_mismatches=not ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        """As in transformers, but whole or not at all, and no weights of an earlier save in the folder stay.

        Raises:
            NotADirectoryError: if `save_directory` is a file; transformers only logs that, and saves nothing.
            OSError: if a file cannot be written (full disk); what was in the folder is still there.
        """
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"Cannot save to {save_directory}: it is a file, expected a folder")
        # Processes that only help to gather the weights write nothing, and a checkpoint in the manner of torch.distributed
        # is written by all of them.
        is_saved_here = self.should_save_on_this_rank(kwargs.get("is_main_process", True))
        if kwargs.get("distributed_checkpoint") or not is_saved_here:
            super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
            return
        with saving_aside(save_directory, "model") as aside:
            super().save_pretrained(aside, *args, **kwargs)
        if push_to_hub:  # transformers uploads what it has just written
            super().save_pretrained(save_directory, *args, push_to_hub=True, **kwargs)
