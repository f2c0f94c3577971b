"""Loading and saving without silent substitutes: a checkpoint that does not fit is refused, not filled up at random."""

import json
import os
from pathlib import Path

from transformers import PreTrainedModel


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


def remove_older_weights(folder: Path) -> None:
    """Of a single file of weights and an index of shards in one folder keep the newer.

    transformers removes older shards only, and when loading prefers the single file: one of an earlier save would hide the
    shards just written.
    """
    both = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    if all(path.exists() for path in both):
        min(both, key=lambda path: path.stat().st_mtime_ns).unlink(missing_ok=True)


def check_everything_loaded(model: PreTrainedModel, source, info: dict, with_mismatches: bool) -> None:
    """Raise a ValueError that names the weights which the checkpoint lacks, or holds in another shape."""
    missing = sorted(info["missing_keys"])
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__} of this configuration: {named}. It is a "
            "checkpoint of another model, or of another ablation than its config.json says"
        )
    if with_mismatches and info["mismatched_keys"]:
        name, got, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {len(info['mismatched_keys'])} weights have another shape than the configuration says. {name}: "
            f"got {tuple(got)}, expected {tuple(expected)} (text_config.vocab_size is "
            f"{model.config.text_config.vocab_size}, text_config.hidden_size {model.config.text_config.hidden_size}, "
            f"vision_config.hidden_size {model.config.vision_config.hidden_size})"
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
            output_loading_info: also return the report of what was missing; nothing is then refused for that.
            args, kwargs: as in transformers.

        Raises:
            ValueError: if weights are missing or have another shape; they are named.
            OSError: if a file is missing or was cut off; it is named.
        """
        source = pretrained_model_name_or_path
        if source is not None and os.path.isdir(source):
            check_weight_files(Path(source, kwargs.get("subfolder") or ""))
        model, info = super().from_pretrained(
            source, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        # A quantizer renames weights; what it reports as missing says nothing.
        if not hasattr(model, "hf_quantizer"):
            allowed = {**info, "missing_keys": ()} if output_loading_info else info
            check_everything_loaded(model, source, allowed, with_mismatches=not ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, but an error where it cannot, and no weights of an earlier save in the folder stay.

        Raises:
            NotADirectoryError: if `save_directory` is a file; transformers only logs that, and saves nothing.
        """
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"Cannot save to {save_directory}: it is a file, expected a folder")
        super().save_pretrained(save_directory, *args, **kwargs)
        remove_older_weights(Path(save_directory))
