"""Loading and saving a processor: whole or not at all, and only where its files are those of the model beside it."""

import json
import os
from pathlib import Path

from transformers.processing_utils import ProcessorMixin

from .saved_files_video_panda import check_saved_files, saving_aside

# Where the model's configuration says the same as the processor's two parts.
_SHARED_FIELDS = ("patch_size", "image_mean", "image_std")


class VideoPandaSavedProcessor(ProcessorMixin):
    """`from_pretrained` and `save_pretrained`, stricter than those of transformers.

    They stand in a file of their own: if the processor's own file was cut off, they are still there to notice.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, after a look at the files of a folder.

        Raises:
            OSError: a file is missing, damaged or of another checkpoint; it is named.
            ValueError: the processor and the `config.json` beside it contradict each other.
        """
        source = pretrained_model_name_or_path
        if source is None or not os.path.isdir(source):
            return super().from_pretrained(source, *args, **kwargs)
        folder = Path(source, kwargs.get("subfolder") or "")
        check_saved_files(folder, cls.__module__, "processor")
        processor = super().from_pretrained(source, *args, **kwargs)
        if "tokenizer" not in kwargs:
            _check_fits(processor, folder)
        return processor

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers, but whole or not at all.

        Raises:
            OSError: `save_directory` is a file, or a file cannot be written (full disk); what was there still is.
        """
        with saving_aside(save_directory, "processor") as aside:
            files = super().save_pretrained(str(aside), **kwargs)
        if push_to_hub:  # transformers uploads what it has just written
            return super().save_pretrained(str(save_directory), push_to_hub=True, **kwargs)
        return [str(Path(save_directory, Path(file).relative_to(aside))) for file in files or ()]


def _check_fits(processor: VideoPandaSavedProcessor, folder: Path) -> None:
    """Compare a processor with the model's configuration beside it. Raises: ValueError, naming both files."""
    path, own = folder / "config.json", folder / "processor_config.json"
    if not path.is_file() or not own.is_file():
        return
    try:
        config, saved = (json.loads(file.read_text(encoding="utf-8")) for file in (path, own))
    except ValueError as error:
        raise OSError(f"{path} or {own} is not JSON: damaged or cut off ({error})") from error
    if config.get("model_type") != "video_panda":
        return
    names = ("video_token_id", "row_token_id", "frame_token_id", "image_token_id")
    pairs = [(name, getattr(processor, name), config.get(name), "tokenizer.json") for name in names]
    vision = config.get("vision_config") or {}
    pairs.append(("use_row_token", saved.get("use_row_token"), vision.get("use_row_token"), own.name))
    for part in ("image_processor", "video_processor"):
        values = saved.get(part) or {}
        pairs += [(name, values.get(name), vision.get(name), f"{own.name} ({part})") for name in _SHARED_FIELDS]
    for name, got, expected, place in pairs:
        if None not in (got, expected) and got != expected:
            raise ValueError(
                f"{folder / place} and {path} are not of the same checkpoint: {name} is {got} in the first, {expected} in "
                "the second"
            )
