"""Video-Panda as a chat model of lmms-eval; `lmms_eval_plugin` registers it. Imports lmms-eval."""

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import PreTrainedConfig

from ..modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
from ..processing.processing_video_panda import VideoPandaProcessor
from .lmms_eval_requests import Clip, conversation_of, cut_at, generation_options
from .preparing import inputs_of

MODEL_ARGS = ("pretrained", "num_frames", "dtype", "device", "revision", "batch_size")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Batches that are read while the model answers one.
_NUM_BATCHES_AHEAD = 2
# Several questions are asked about a clip, mostly one after the other. A few: a clip of full HD is 50 MB.
_NUM_REMEMBERED_CLIPS = 8


class VideoPandaChat(lmms):
    """Answers the questions of lmms-eval's tasks about clips, pictures or text alone.

    Started by `accelerate launch`, each process has a model of its own and answers its share of the questions.

    Args:
        pretrained: checkpoint, a folder or a Hub id.
        num_frames: frames of a clip to look at; default: the processor's own.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: such as "cpu" or "cuda:0"; default: the process' own GPU if there is one.
        revision: branch, tag or commit of a Hub repository.
        batch_size: questions that are answered at once.

    Raises:
        ValueError: an argument that is unknown or does not fit, or a checkpoint of another model.
        OSError: no such checkpoint.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        num_frames: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"video_panda does not know {', '.join(sorted(unknown))}; it takes {', '.join(MODEL_ARGS)}"
            )
        if pretrained is None:
            raise ValueError("video_panda needs a checkpoint: --model_args pretrained=FOLDER_OR_HUB_ID")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.batch_size = _whole("batch_size", batch_size)
        self._frames = {} if num_frames is None else {"num_frames": _whole("num_frames", num_frames)}
        self.device = self._place(device)
        # lmms-eval makes numbers of what looks like one.
        pinned = {} if revision is None else {"revision": str(revision)}
        _check_checkpoint(str(pretrained), pinned)
        self.processor = VideoPandaProcessor.from_pretrained(str(pretrained), **pinned)
        self._model = VideoPandaForConditionalGeneration.from_pretrained(
            str(pretrained), dtype=dtype, device_map=self.device, **pinned
        ).eval()
        self._read_clip = lru_cache(_NUM_REMEMBERED_CLIPS)(self._decode)

    def _place(self, device: str | None) -> torch.device:
        """Where the model goes; joins the other processes, if there are some."""
        # accelerate's state is one for the whole program: not where one process does it all.
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.accelerator = Accelerator()  # where lmms-eval looks for it
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = self.accelerator.device
        if device is not None and torch.device(device).type != own.type:
            raise ValueError(f"device is {device!r}, but accelerate gave this process {str(own)!r}; leave `device` out")
        return own

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, in their order; those with the same options are answered in batches.

        Raises:
            ValueError: something cannot be read or shown; task, document and file are named.
        """
        answers: list = [None] * len(requests)
        label = "video_panda" if self.world_size == 1 else f"video_panda (1 of {self.world_size} processes)"
        with tqdm(total=len(requests), desc=label, unit="request", disable=self.rank != 0) as bar:
            for places, inputs in self._prepare_all(_batches(requests, self.batch_size), requests):
                first = requests[places[0]]
                with _naming(first):
                    options, until = generation_options(first.args[2])
                for place, answer in zip(places, self._generate(inputs, options, until)):
                    answers[place] = answer
                    self.cache_hook.add_partial("generate_until", (requests[place].args[0], first.args[2]), answer.text)
                bar.update(len(places))
        return answers

    def _prepare_all(self, batches, requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict]]:
        """Each batch with its inputs; the next ones are read in a thread before one is given."""
        waiting: deque = deque()
        with ThreadPoolExecutor(1, "video_panda") as reading:
            try:
                for places in batches:
                    waiting.append((places, reading.submit(self._prepare, [requests[place] for place in places])))
                    if len(waiting) > _NUM_BATCHES_AHEAD:
                        places, inputs = waiting.popleft()
                        yield places, inputs.result()
                while waiting:
                    places, inputs = waiting.popleft()
                    yield places, inputs.result()
            finally:
                reading.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, requests: Sequence[Instance]):
        """The model's inputs: a conversation a request, padded to the longest."""
        conversations = [self._conversation(request) for request in requests]
        with _naming(*requests):
            return inputs_of(self.processor, conversations)

    def _conversation(self, request: Instance) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        with _naming(request):
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            return conversation_of(messages, self._read_clip, self.processor.image_processor.fetch_images)

    def _decode(self, clip: Clip) -> torch.Tensor:
        """The frames that are looked at, uint8 (T, H, W, 3)."""
        video_processor = self.processor.video_processor
        part = {name: value for name, value in (("start", clip.start), ("end", clip.end)) if value is not None}
        frames, _ = video_processor.fetch_videos(
            clip.source, lambda metadata: video_processor.sample_frames(metadata, **self._frames, **part)
        )
        return frames

    def _generate(self, inputs, options: dict, until: Sequence[str]) -> list[GenerationResult]:
        inputs = inputs.to(self.device)
        output = self._model.generate(**inputs, **options)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        num_given = inputs["attention_mask"].sum(dim=1).tolist()
        num_new = _lengths(new_tokens, self._model.generation_config.eos_token_id)
        return [
            GenerationResult(cut_at(text, until), TokenCounts(input_tokens=given, output_tokens=new))
            for text, given, new in zip(texts, num_given, num_new)
        ]

    def loglikelihood(self, requests: Sequence[Instance]):
        """Not there: tasks that compare the likelihood of answers are for models without a chat format."""
        raise NotImplementedError("video_panda answers in words: tasks that need `loglikelihood` cannot be run with it")

    def generate_until_multi_round(self, requests: Sequence[Instance]):
        """Not there: no task of several rounds has been tried."""
        raise NotImplementedError("video_panda answers one question at a time: tasks of several rounds cannot be run")


def _batches(requests: Sequence[Instance], batch_size: int) -> list[list[int]]:
    """The places of requests that are answered at once: in their order, so that questions about a clip stay together."""
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


@contextmanager
def _naming(*requests: Instance):
    """Says of which documents of which task an error tells."""
    try:
        yield
    except (ValueError, OSError) as error:
        names = [f"{request.args[4]}, document {request.args[3]}" for request in requests]
        raise ValueError(f"{'; '.join(names)}: {error}") from error


def _lengths(new_tokens: torch.Tensor, eos_token_id: int | list[int] | None) -> list[int]:
    """How many tokens each answer has, its end token counted and what was padded after it not."""
    ends = torch.tensor([] if eos_token_id is None else eos_token_id, device=new_tokens.device).reshape(-1)
    is_end = torch.isin(new_tokens, ends.to(new_tokens.dtype))
    return [row.index(True) + 1 if True in row else len(row) for row in is_end.tolist()]


def _whole(name: str, value) -> int:
    """A whole number of at least 1; the command line gives some as text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return number


def _check_checkpoint(pretrained: str, pinned: dict) -> None:
    found, _ = PreTrainedConfig.get_config_dict(pretrained, **pinned)
    if found.get("model_type") != "video_panda":
        raise ValueError(f"{pretrained} holds a model of type {found.get('model_type')!r}, expected 'video_panda'")
