"""Makes the model's inputs of questions, ahead of the model: decodes their clips, and pads a batch of conversations.

Where processes can be forked it is done in some: in a thread, whatever is Python would hold up the model, whose every operator
lets go of Python's lock.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

import torch
from transformers import BatchFeature

from .benchmark import Benchmark
from .questions import Question
from .shared_buffer import Contents, SharedBuffer

logger = logging.getLogger(__name__)

_MAX_WORKERS = 4
# Beside the batches that the workers have in hand: one that lies ready.
_NUM_BATCHES_READY = 1
# Several questions are asked about a clip, mostly one after the other. A few: a clip of full HD is 50 MB.
_NUM_REMEMBERED_CLIPS = 8


@dataclass(frozen=True)
class Prepared:
    """A batch of questions, ready for the model.

    Attributes:
        questions: all of it.
        errors: by id, why the clip of a question cannot be read.
        inputs: the model's, by name, for the others; None where there are none.
    """

    questions: Sequence[Question]
    errors: dict[str, str]
    inputs: dict[str, torch.Tensor] | None


class Preparation:
    """How questions become a model's inputs.

    Args:
        processor: the model's.
        benchmark: knows the clips.
        frames: which frames are looked at; arguments of the video processor's `sample_frames`.
        prompt: the words around a question, which stands for `{question}`.
    """

    def __init__(self, processor, benchmark: Benchmark, frames: dict, prompt: str):
        self.processor, self.benchmark, self.prompt = processor, benchmark, prompt
        self.frames = {name: value for name, value in frames.items() if value is not None}
        # The frames of the last clips, or why there are none.
        self._clips: OrderedDict[str, torch.Tensor | str] = OrderedDict()

    def prepare(self, questions: Sequence[Question], isolate: bool | None = None) -> Prepared:
        """A batch, with what can be read of it.

        Args:
            questions: all of it.
            isolate: whether each clip is decoded in a process of its own; default: the processor's own setting.
        """
        clips = [self._clip(question, isolate) for question in questions]
        readable = [(question, clip) for question, clip in zip(questions, clips) if not isinstance(clip, str)]
        errors = {question.id: clip for question, clip in zip(questions, clips) if isinstance(clip, str)}
        return Prepared(questions, errors, self.make_inputs(*zip(*readable)) if readable else None)

    def decode(self, question: Question, isolate: bool | None = None) -> torch.Tensor:
        """The frames that are looked at, uint8 (T, H, W, 3).

        Raises:
            ValueError, OSError: the clip cannot be read; it is named.
        """
        video_processor = self.processor.video_processor
        frames, _ = video_processor.fetch_videos(
            self.benchmark.video_path(question),
            lambda metadata: video_processor.sample_frames(metadata, **self.frames),
            isolate=isolate,
        )
        return frames

    def make_inputs(self, questions: Sequence[Question], frames_THWC: Sequence[torch.Tensor]) -> dict:
        """The model's inputs: one conversation a question, padded to the longest."""
        chats = []
        for question, frames in zip(questions, frames_THWC):
            text = self.prompt.replace("{question}", question.question)
            content = [{"type": "video", "video": frames}, {"type": "text", "text": text}]
            chats.append([{"role": "user", "content": content}])
        return inputs_of(self.processor, chats)

    def _clip(self, question: Question, isolate: bool | None) -> torch.Tensor | str:
        """The frames of a clip, or why it cannot be read."""
        if question.video not in self._clips:
            try:
                clip = self.decode(question, isolate)
            except (ValueError, OSError) as error:
                clip = f"{type(error).__name__}: {error}"
            self._clips[question.video] = clip
            if len(self._clips) > _NUM_REMEMBERED_CLIPS:
                self._clips.popitem(last=False)
        return self._clips[question.video]


def inputs_of(processor, conversations: Sequence[list[dict]]) -> BatchFeature:
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


def prepare_all(preparation: Preparation, batches: Sequence[Sequence[Question]]) -> Iterator[Prepared]:
    """Each batch, prepared, in order; the next ones are in hand before one is given.

    Its inputs are there until the next is asked for, whose place they may be in.

    A clip that ends the process which reads it costs that process: from there on each clip is decoded in a process of its own,
    and is one that cannot be read.

    Raises:
        RuntimeError: processes end all the same.
    """
    done = 0
    try:
        for prepared in _prepare_ahead(preparation, batches, None):
            done += 1
            yield prepared
        return
    except BrokenProcessPool:
        logger.warning("A process that reads clips was ended; from here on each clip is read in one of its own")
    try:
        yield from _prepare_ahead(preparation, batches[done:], True)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "the processes that prepare questions are ended again and again: is there memory?"
        ) from error


def _prepare_ahead(
    preparation: Preparation, batches: Sequence[Sequence[Question]], isolate: bool | None
) -> Iterator[Prepared]:
    crew = _Processes(preparation) if _may_fork() else _Thread(preparation)
    waiting: deque[Future] = deque()
    num_threads = torch.get_num_threads()
    try:
        for number, batch in enumerate(batches):
            waiting.append(crew.submit(number, batch, isolate))
            if len(waiting) > crew.num_workers + _NUM_BATCHES_READY:
                yield crew.receive(waiting.popleft())
        while waiting:
            yield crew.receive(waiting.popleft())
    except BaseException:
        crew.kill()  # one may hang in a clip, and nothing that they are doing is wanted
        raise
    finally:
        crew.close()
        torch.set_num_threads(num_threads)  # for threads that begin later, too, where a thread prepared


def _may_fork() -> bool:
    # Linux only: elsewhere forking is not safe, or not there, and another Python takes seconds to load transformers. A daemon
    # of `multiprocessing` may have no processes.
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


class _Thread:
    """Prepares batches beside the model's own thread."""

    num_workers = 1

    def __init__(self, preparation: Preparation):
        self._preparation = preparation
        self._executor = ThreadPoolExecutor(1, "prepare", torch.set_num_threads, (1,))

    def submit(self, number: int, batch: Sequence[Question], isolate: bool | None) -> Future:
        return self._executor.submit(self._preparation.prepare, batch, isolate)

    def receive(self, future: Future) -> Prepared:
        return future.result()

    def kill(self) -> None:
        """Nobody can end a thread."""

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Processes:
    """Prepare batches in processes that are forked from this one; what they make comes back in shared memory."""

    def __init__(self, preparation: Preparation):
        self.num_workers = max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) - 1))
        # One for each batch in hand, and for the one that was given: the next one after them is begun when that one is done.
        self._buffers = [SharedBuffer() for _ in range(self.num_workers + _NUM_BATCHES_READY + 1)]
        context = multiprocessing.get_context("fork")
        self._executor = ProcessPoolExecutor(self.num_workers, context, _begin_process, (preparation, self._buffers))

    def submit(self, number: int, batch: Sequence[Question], isolate: bool | None) -> Future:
        return self._executor.submit(_prepare_into, number % len(self._buffers), batch, isolate)

    def receive(self, future: Future) -> Prepared:
        prepared, buffer, contents = future.result()
        return prepared if contents is None else replace(prepared, inputs=self._buffers[buffer].look(contents))

    def kill(self) -> None:
        # Private: before Python 3.14 (`kill_workers`) an executor can only be waited for. None where it is at its end.
        for process in list((self._executor._processes or {}).values()):
            process.kill()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []


# --- in a worker process ------------------------------------------------------------------------------------------------

_own: Preparation | None = None
_own_buffers: Sequence[SharedBuffer] = ()


def _begin_process(preparation: Preparation, buffers: Sequence[SharedBuffer]) -> None:
    global _own, _own_buffers
    _own, _own_buffers = preparation, buffers
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    """Killed, the caller can end nobody; a worker would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _prepare_into(
    buffer: int, questions: Sequence[Question], isolate: bool | None
) -> tuple[Prepared, int, Contents | None]:
    """A batch, prepared, without its inputs; in which buffer they are instead, and what is there."""
    prepared = _own.prepare(questions, isolate)
    contents = None if prepared.inputs is None else _own_buffers[buffer].fill(prepared.inputs)
    return replace(prepared, inputs=None), buffer, contents
