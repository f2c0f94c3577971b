"""Asks a model questions in batches; clips are decoded ahead of it, in threads of their own."""

import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .benchmark import Benchmark
from .questions import Question
from .run_folder import Answer

# Batches that are prepared while the model answers one.
NUM_BATCHES_AHEAD = 2
# A few: a clip of full HD is 50 MB.
_NUM_REMEMBERED_CLIPS = 8
_MAX_DECODERS = 4


@dataclass(frozen=True)
class Prepared:
    """A batch of questions, ready for the model.

    Attributes:
        questions: all of it.
        errors: by id, why the clip of a question cannot be read.
        inputs: the model's, for the others; None where there are none.
    """

    questions: Sequence[Question]
    errors: dict[str, str]
    inputs: dict | None


class Asker:
    """Answers batches of questions.

    Args:
        model: `VideoPandaForConditionalGeneration`, in eval mode.
        processor: the model's.
        benchmark: knows the clips.
        max_new_tokens: longest answer.
        frames: which frames are looked at; arguments of the video processor's `sample_frames`.
        prompt: the words around a question, which stands for `{question}`.
    """

    def __init__(self, model, processor, benchmark: Benchmark, max_new_tokens: int, frames: dict, prompt: str):
        self.model, self.processor, self.benchmark = model, processor, benchmark
        self.max_new_tokens = max_new_tokens
        self.frames = {name: value for name, value in frames.items() if value is not None}
        self.prompt = prompt

    def ask_all(self, batches: Iterable[Sequence[Question]]) -> Iterator[tuple[Sequence[Question], list[Answer]]]:
        """Each batch with its answers, in order."""
        with _Decoders(self) as decoders:
            for prepared in decoders.prepare_all(batches):
                yield prepared.questions, self._answer(prepared)

    def _answer(self, prepared: Prepared) -> list[Answer]:
        texts = iter(() if prepared.inputs is None else self._generate(prepared.inputs))
        return [
            Answer(None, prepared.errors[question.id]) if question.id in prepared.errors else Answer(next(texts))
            for question in prepared.questions
        ]

    def _generate(self, inputs) -> list[str]:
        """One answer a conversation, white space around it removed."""
        inputs = inputs.to(self.model.device)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new_tokens, skip_special_tokens=True)]

    def make_inputs(self, questions: Sequence[Question], frames_THWC: Sequence[torch.Tensor]):
        """The model's inputs: one conversation a question, padded to the longest."""
        chats = []
        for question, frames in zip(questions, frames_THWC):
            text = self.prompt.replace("{question}", question.question)
            content = [{"type": "video", "video": frames}, {"type": "text", "text": text}]
            chats.append([{"role": "user", "content": content}])
        return inputs_of(self.processor, chats)

    def decode(self, question: Question) -> torch.Tensor:
        """The frames that are looked at, uint8 (T, H, W, 3).

        Raises:
            ValueError, OSError: the clip cannot be read; it is named.
        """
        video_processor = self.processor.video_processor
        frames, _ = video_processor.fetch_videos(
            self.benchmark.video_path(question), lambda metadata: video_processor.sample_frames(metadata, **self.frames)
        )
        return frames


def inputs_of(processor, conversations: Sequence[list[dict]]):
    """A model's inputs for a batch of conversations, padded to the longest.

    Their videos are decoded: uint8 (T, H, W, 3), the frames that are looked at; their pictures are (3, H, W).
    """
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        # The frames are chosen already, and the channels are where the decoders put them.
        processor_kwargs={
            "padding": True,
            "return_tensors": "pt",
            "videos_kwargs": {"do_sample_frames": False, "input_data_format": "channels_last"},
            "images_kwargs": {"input_data_format": "channels_first"},
        },
    )


class _Decoders:
    """Threads that decode clips, and one that makes batches of them. Each reads its files with readers of its own.

    A clip that was decoded is remembered for a while: several questions are asked about it, mostly one after the other.
    """

    def __init__(self, asker: Asker):
        self.asker = asker
        self._num_threads = torch.get_num_threads()
        self._clips: OrderedDict[str, Future] = OrderedDict()
        self._decoding = ThreadPoolExecutor(min(_MAX_DECODERS, os.cpu_count() or 1), "decode", _use_one_core)
        self._batching = ThreadPoolExecutor(1, "batch", _use_one_core)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        for pool in (self._batching, self._decoding):
            pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._num_threads)

    def prepare_all(self, batches: Iterable[Sequence[Question]]) -> Iterator[Prepared]:
        """Each batch, prepared; the next ones are begun before one is given."""
        waiting: deque[Future] = deque()
        for batch in batches:
            waiting.append(self._batching.submit(self._prepare, batch, [self._clip(question) for question in batch]))
            if len(waiting) > NUM_BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _clip(self, question: Question) -> Future:
        if question.video not in self._clips:
            self._clips[question.video] = self._decoding.submit(self.asker.decode, question)
            if len(self._clips) > _NUM_REMEMBERED_CLIPS:
                self._clips.popitem(last=False)
        return self._clips[question.video]

    def _prepare(self, questions: Sequence[Question], clips: Sequence[Future]) -> Prepared:
        readable, frames, errors = [], [], {}
        for question, clip in zip(questions, clips):
            try:
                frames.append(clip.result())
                readable.append(question)
            except (ValueError, OSError) as error:
                errors[question.id] = f"{type(error).__name__}: {error}"
        return Prepared(questions, errors, self.asker.make_inputs(readable, frames) if readable else None)


def _use_one_core() -> None:
    """In a new thread: the model needs the others. For threads that begin later `_Decoders` sets the number right again."""
    torch.set_num_threads(1)
