"""The processor: prompts and clips in, model inputs out.

Shape suffixes: B prompts, L prompt length; see the image and video processors for theirs.
"""

from collections.abc import Callable
from functools import partial

from transformers.utils.versions import require_version

# Before 5.23 the processors of transformers cannot tell a control token of the template from one that a user typed. The
# check stands before the imports, some of which an older version would refuse with words that help nobody.
require_version("transformers>=5.23", "This checkpoint's processor needs it: pip install 'transformers>=5.23'")

# ruff: noqa: E402
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils.chat_template_utils import jinja2  # None without it; chats need it, loading does not
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoInput

from .chat_video_panda import (
    VICUNA_CHAT_TEMPLATE,
    check_conversations,
    count_placeholders,
    is_plain,
    lay_out_mask,
    mark_user_text,
    sanitized_assistant_masks,
)
from .geometry_video_panda import frame_token_sequence, num_frame_tokens
from .image_processing_video_panda import (
    VideoPandaImageProcessor,
    VideoPandaImageProcessorKwargs,
    count_images,
    count_images_per_prompt,
)
from .options_video_panda import plain_call_options
from .saved_processor_video_panda import VideoPandaSavedProcessor
from .video_inputs_video_panda import count_videos_per_prompt, flatten_videos, without_empty
from .video_processing_video_panda import VideoPandaVideoProcessor, VideoPandaVideoProcessorKwargs

PLACEHOLDER_TOKENS = ("<video>", "<row>", "<frame>", "<image>")
_COMMON_VARIABLES = ("enable_thinking", "date_string", "add_vision_id")


class VideoPandaProcessorKwargs(ProcessingKwargs, total=False):
    """What `VideoPandaProcessor` takes beside prompts and clips."""

    images_kwargs: VideoPandaImageProcessorKwargs
    videos_kwargs: VideoPandaVideoProcessorKwargs


class VideoPandaProcessor(VideoPandaSavedProcessor):
    """Video and image processor, tokenizer and chat template in one.

    Each `<video>` in a prompt becomes its frames' tokens, a frame `<frame>` and then row by row `<video>` x w and `<row>`;
    an `<image>` one such frame with `<image>` as its patches.

    Args:
        image_processor, video_processor: the two that draw the canvases.
        tokenizer: the language model's. The placeholder tokens are added to it where they are missing, it pads on the left
            (generation needs that), and with its unknown or end token where it has no padding token.
        chat_template: default: the Vicuna format of the release.
        use_row_token: whether a row ends with `<row>`; as in the model's configuration.
        num_text_tokens: size of the language model's own vocabulary; a smaller tokenizer is filled up with unused tokens,
            so that the placeholders get the ids that follow it. Default: the tokenizer's size.

    Raises:
        ValueError: the tokenizer has more tokens than that, or the placeholders at other ids.
    """

    valid_processor_kwargs = VideoPandaProcessorKwargs
    # Defaults, overridden by whatever a call gives: prompts of different lengths make one batch of tensors.
    text_kwargs = {"padding": True, "return_tensors": "pt"}  # noqa: RUF012 - the way transformers declares defaults
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012
    videos_kwargs = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        chat_template=None,
        use_row_token=True,
        num_text_tokens=None,
    ):
        super().__init__(
            image_processor, video_processor, tokenizer, chat_template=chat_template or VICUNA_CHAT_TEMPLATE
        )
        self.use_row_token = use_row_token
        self.num_text_tokens = num_text_tokens
        if num_text_tokens is not None:
            _fill_vocabulary(tokenizer, num_text_tokens)
        missing = [token for token in PLACEHOLDER_TOKENS if token not in tokenizer.get_vocab()]
        if missing or not set(PLACEHOLDER_TOKENS) <= set(tokenizer.all_special_tokens):
            tokenizer.add_special_tokens(
                {"additional_special_tokens": list(PLACEHOLDER_TOKENS)}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        self.video_token, self.row_token, self.frame_token, self.image_token = PLACEHOLDER_TOKENS
        self.video_token_id, self.row_token_id, self.frame_token_id, self.image_token_id = (
            tokenizer.convert_tokens_to_ids(list(PLACEHOLDER_TOKENS))
        )
        first = min(self.video_token_id, self.row_token_id, self.frame_token_id, self.image_token_id)
        if num_text_tokens not in (None, first):
            raise ValueError(f"The tokenizer's placeholders begin at id {first}, expected {num_text_tokens}")

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # A hook of transformers, overridden because its own goes through AutoVideoProcessor, which insists on torchvision.
        given = {name: kwargs.pop(name, None) for name in cls.get_attributes()}
        kwargs_of_parts = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}
        loaders = {
            "image_processor": partial(VideoPandaImageProcessor.from_pretrained, **kwargs_of_parts),
            "video_processor": partial(VideoPandaVideoProcessor.from_pretrained, **kwargs_of_parts),
            "tokenizer": partial(AutoTokenizer.from_pretrained, **kwargs),
        }
        return [
            load(pretrained_model_name_or_path) if given[name] is None else given[name]
            for name, load in loaders.items()
        ]

    def check_argument_for_proper_class(self, argument_name, argument):
        # A hook of transformers, overridden because its own looks the video processor's base class up among the exported
        # names, where it stands only if torchvision is installed.
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VideoProcessorMixin):
            raise TypeError(f"video_processor must be a VideoPandaVideoProcessor, got {type(argument).__name__}")
        return VideoProcessorMixin

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        """As in transformers, with a ValueError for every option that does not fit.

        Args:
            images, videos: as in `VideoPandaImageProcessor.preprocess` and `VideoPandaVideoProcessor.preprocess`; given
                for each prompt (nested) or all in a row, in the order of their placeholders.
            text: a prompt or a list of them, with `<video>` and `<image>` where the visuals belong.
            kwargs: options of the tokenizer and of the two processors, such as `num_frames`, `return_metadata`,
                `return_mm_token_type_ids`; `audio` is refused.

        Returns:
            `input_ids` and `attention_mask` (B, L) if there is text, `pixel_values_videos` and `video_grid_thw` if there
            are videos, `pixel_values` and `image_grid_thw` if there are images, and what was asked for besides.

        Raises:
            ValueError: nothing was given, placeholders and visuals differ in number, an option or a visual does not fit,
                or truncation cuts a visual's tokens.
            OSError: a file is missing or not a regular file.
        """
        audio = kwargs.pop("audio", None)
        kwargs = plain_call_options(kwargs, self.valid_processor_kwargs, type(self).__name__)
        given_images, given_videos = images, videos
        images, text, videos, audio = self.prepare_inputs_layout(images, text, videos, audio)
        self._check_inputs(images, text, videos, audio)
        if text is not None:
            self._check_prompts(text, self.video_token, "videos", count_videos_per_prompt(given_videos))
            self._check_prompts(text, self.image_token, "images", count_images_per_prompt(given_images))
        try:
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"VideoPandaProcessor: {error}") from error

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Prompts as a list; a chat without visuals beside chats with some (an empty list in the batch) adds none.

        Overridden because transformers would fetch the images here, whatever the call says about URLs.
        """
        if isinstance(text, str):
            text = [text]
        elif isinstance(text, (list, tuple)):
            text = list(text)  # placeholders are replaced in it
        return without_empty(images), text, without_empty(videos), audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Nothing is left to check here.

        Overridden because transformers knows neither bytes, paths nor frames as a video, and because it takes the text
        that sanitizing marked out of the prompts first: of "<vid</s>eo>" a placeholder would be left.
        """

    def _check_inputs(self, images, text, videos, audio) -> None:
        """Check what can be checked before anything is decoded."""
        if images is None and text is None and videos is None:
            raise ValueError("VideoPandaProcessor: nothing was given, expected text, images or videos")
        if audio is not None:
            raise ValueError("VideoPandaProcessor: audio was given; Video-Panda sees, it does not hear")
        if text is None:
            return
        if not isinstance(text, list):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        if not text:
            raise ValueError("text is an empty list; expected at least one prompt")
        for place, sample in enumerate(text):
            if not isinstance(sample, str):
                raise ValueError(f"text must be a string or a list of strings, got {type(sample).__name__} at {place}")
            for token in (self.row_token, self.frame_token):
                if count_placeholders(sample, token):
                    raise ValueError(
                        f"The text holds a {token}, which the processor alone writes; expected one {self.video_token} or "
                        f"{self.image_token} for each visual"
                    )
        self._check_count(text, self.video_token, "videos", 0 if videos is None else len(flatten_videos(videos)))
        self._check_count(text, self.image_token, "images", 0 if images is None else count_images(images))

    @staticmethod
    def _check_count(text: list[str], token: str, kind: str, num_given: int) -> None:
        num_placeholders = sum(count_placeholders(sample, token) for sample in text)
        if num_placeholders != num_given:
            raise ValueError(
                f"The text holds {num_placeholders} {token} placeholders, but {num_given} {kind} were given"
            )

    @staticmethod
    def _check_prompts(text: list[str], token: str, kind: str, counts: list[int] | None) -> None:
        """Where the visuals are given prompt by prompt, each prompt must have as many placeholders as visuals."""
        if counts is None:
            return
        if len(counts) != len(text):
            raise ValueError(f"{kind} holds {len(counts)} lists, expected one for each of {len(text)} prompts")
        for place, (sample, num_given) in enumerate(zip(text, counts)):
            num_placeholders = count_placeholders(sample, token)
            if num_placeholders != num_given:
                raise ValueError(
                    f"Prompt {place} holds {num_placeholders} {token} placeholders, but {num_given} {kind} were given for it"
                )

    def _process_videos(self, videos, **kwargs):
        processed = self.video_processor(videos, **kwargs)
        return processed, [
            self.replace_video_token(processed, index) for index in range(len(processed["video_grid_thw"]))
        ]

    def _process_images(self, images, **kwargs):
        processed = self.image_processor(images, **kwargs)
        return processed, [
            self.replace_image_token(processed, index) for index in range(len(processed["image_grid_thw"]))
        ]

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """The tokens that stand for a video: its frames one after the other."""
        frames, height, width = map(int, video_inputs["video_grid_thw"][video_idx])
        return frames * self._frame_tokens(height, width, self.video_token)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The tokens that stand for a still image: one frame."""
        _, height, width = map(int, image_inputs["image_grid_thw"][image_idx])
        return self._frame_tokens(height, width, self.image_token)

    def _frame_tokens(self, height: int, width: int, patch_token: str) -> str:
        return frame_token_sequence(height, width, patch_token, self.row_token, self.frame_token, self.use_row_token)

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        # What vLLM reserves room by, from (height, width) of images and (frames, height, width) of videos, in px.
        counts = {}
        if image_sizes is not None:
            grids = [self.image_processor.token_grid(*size, **kwargs) for size in image_sizes]
            counts["num_image_tokens"] = [num_frame_tokens(*grid, self.use_row_token) for grid in grids]
            window = kwargs.get("downsample_window") or self.image_processor.downsample_window
            counts["num_image_patches"] = [h * w * window**2 for h, w in grids]
        if video_sizes is not None:
            counts["num_video_tokens"] = [
                frames * num_frame_tokens(*self.video_processor.token_grid(*size, **kwargs), self.use_row_token)
                for frames, *size in video_sizes
            ]
        return MultiModalData(**counts)

    def get_text_with_replacements(
        self, text, images_replacements=(), videos_replacements=(), audio_replacements=()
    ) -> tuple[list[str], list[list[dict]]]:
        """As in transformers, after a check that there are as many placeholders as visuals, naming both counts.

        `validate_inputs` has checked it, but serving engines come in here.
        """
        self._check_count(text, self.image_token, "images", len(images_replacements))
        self._check_count(text, self.video_token, "videos", len(videos_replacements))
        return super().get_text_with_replacements(text, images_replacements, videos_replacements, audio_replacements)

    def _check_special_mm_tokens(self, text: list[str], text_inputs, modalities: list[str]) -> None:
        # A hook of transformers, overridden because its own does not see that a frame's first or last token was cut off.
        for place, (sample, ids) in enumerate(zip(text, text_inputs["input_ids"])):
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            for token in PLACEHOLDER_TOKENS:
                expected = count_placeholders(sample, token)
                got = ids.count(self.tokenizer.convert_tokens_to_ids(token))
                if got != expected:
                    raise ValueError(
                        f"Prompt {place} needs {expected} {token} tokens for its visuals and has {got}: it was cut "
                        "there; raise `max_length` or switch `truncation` off"
                    )

    def create_mm_token_type_ids(self, input_ids) -> list[list[int]]:
        """0 text, 1 image, 2 video, for each prompt; `<frame>` and `<row>` are of the kind of the patch beside them."""
        kinds = {self.image_token_id: 1, self.video_token_id: 2}
        type_ids = []
        for ids in input_ids:
            ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
            row = [kinds.get(token_id, 0) for token_id in ids]
            for position, token_id in enumerate(ids):
                if token_id == self.frame_token_id and position + 1 < len(ids):
                    row[position] = kinds.get(ids[position + 1], 0)
                elif token_id == self.row_token_id and position > 0:
                    row[position] = kinds.get(ids[position - 1], 0)
            type_ids.append(row)
        return type_ids

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool | None = None,
        **kwargs,
    ):
        """As in transformers, with two defaults of its own.

        Text of the conversation is text: a `</s>` or `<video>` in it is never a control token (`sanitize_control_tokens`,
        on unless switched off). Prompts to continue are padded on the left, others (training) on the right.

        Args:
            conversation: messages, or a list of conversations. Content items: `{"type": "video", "path" | "url" | "video":
                ...}`, `{"type": "image", "path" | "url" | "image": ...}`, `{"type": "text", "text": ...}`.
            return_assistant_tokens_mask: with `tokenize` and `return_dict`: also `assistant_masks` (B, L), 1 on the
                assistant's answers and their end token.
            processor_kwargs: options of the processors, such as `num_frames`, `start`, `end`, `allow_urls`, `padding`.
            kwargs: variables of the template and the rest of transformers' arguments.

        Raises:
            ValueError: the conversation is not one, or the template refuses it (an unknown role, say); and as the call.
            OSError: as the call.
        """
        if kwargs.get("load_audio_from_video"):
            raise ValueError("load_audio_from_video: Video-Panda sees, it does not hear")
        conversation = check_conversations(conversation)
        side = "left" if add_generation_prompt or continue_final_message else "right"
        # The template writes all special tokens there are.
        defaults = {"padding_side": side, "add_special_tokens": False}
        processor_kwargs = dict(processor_kwargs or {})
        given = {**(processor_kwargs.get("text_kwargs") or {}), **processor_kwargs}
        processor_kwargs.update((key, value) for key, value in defaults.items() if key not in given)
        sanitize = tokenize if sanitize_control_tokens is None else sanitize_control_tokens
        template = self._resolve_chat_template(chat_template)
        # Callers give these to whatever template there is.
        kwargs = {key: value for key, value in kwargs.items() if key not in _COMMON_VARIABLES or key in template}
        if continue_final_message and "continues_answer" in template:
            kwargs["continues_answer"] = True  # transformers does not tell the template
        apply = partial(
            super().apply_chat_template,
            conversation,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            return_dict=return_dict,
            **kwargs,
        )
        try:
            if not (return_assistant_tokens_mask and tokenize and return_dict):
                return apply(processor_kwargs=processor_kwargs, sanitize_control_tokens=sanitize)
            if continue_final_message:
                raise ValueError("return_assistant_tokens_mask does not go with continue_final_message")
            variables = {"add_generation_prompt": add_generation_prompt, **kwargs}
            return self._apply_with_masks(apply, conversation, template, variables, processor_kwargs, sanitize)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template refuses the conversation: {error}") from error

    def _apply_with_masks(
        self, apply: Callable, conversation, template: str, variables: dict, processor_kwargs: dict, sanitize: bool
    ):
        """The inputs with `assistant_masks`: transformers' own, or, where user text holds control tokens, ours."""
        conversations, _ = self._normalize_conversations(conversation)
        marked, marked_variables = (
            mark_user_text(self.tokenizer, template, content) for content in (conversations, [variables])
        )
        if not sanitize or (is_plain(conversations, marked) and is_plain([variables], marked_variables)):
            inputs = apply(processor_kwargs=processor_kwargs, return_assistant_tokens_mask=True)
        else:
            processor_kwargs = {**processor_kwargs, "return_text_replacement_offsets": True}
            inputs = apply(processor_kwargs=processor_kwargs, sanitize_control_tokens=True)
            replacements = inputs.pop("text_replacement_offsets", None) or [[] for _ in marked]
            variables = {**self.tokenizer.special_tokens_map, **marked_variables[0]}
            encoded = sanitized_assistant_masks(self.tokenizer, template, marked, replacements, variables)
            inputs["assistant_masks"] = [
                lay_out_mask(mask, row, self.tokenizer.truncation_side)
                for (_, mask), row in zip(encoded, inputs["attention_mask"])
            ]
        if isinstance(inputs["input_ids"], torch.Tensor):
            inputs["assistant_masks"] = torch.as_tensor(inputs["assistant_masks"])
        elif isinstance(inputs["input_ids"], np.ndarray):
            inputs["assistant_masks"] = np.asarray(inputs["assistant_masks"])
        return inputs

    def _adjust_assistant_masks_indices(self, processed_dict, generation_indices):
        # Overridden for speed alone: transformers walks over the offsets number by number, which takes 50 times as long if
        # they are tensors: for a long chat longer than decoding its video.
        offsets = processed_dict["offset_mapping"]
        processed_dict["offset_mapping"] = offsets if isinstance(offsets, list) else offsets.tolist()
        return super()._adjust_assistant_masks_indices(processed_dict, generation_indices)


def _fill_vocabulary(tokenizer, num_text_tokens: int) -> None:
    """Add unused tokens until the tokenizer, placeholders left out, has `num_text_tokens`."""
    vocabulary = tokenizer.get_vocab()
    if any(token in vocabulary for token in PLACEHOLDER_TOKENS):
        return  # filled before; their ids are checked
    if len(tokenizer) > num_text_tokens:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, more than the vocabulary's {num_text_tokens}")
    unused = [f"<unused_{number}>" for number in range(len(tokenizer), num_text_tokens)]
    tokenizer.add_tokens(unused, special_tokens=True)


VideoPandaProcessor.register_for_auto_class()

__all__ = ["VideoPandaProcessor"]
