"""Judges: what gives a reply to a prompt. One asks a server, the other is a model of transformers on this machine."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property

Messages = list[dict[str, str]]
_API_KEY = "OPENAI_API_KEY"
# After so many requests in a row without an answer, each tried several times, the server is taken to be down.
_NUM_FAILURES_IN_A_ROW = 8


@dataclass(frozen=True)
class Reply:
    """What came back for a prompt.

    Attributes:
        text: the reply; None where none came.
        model: as the server calls what replied.
        error: why none came. It may come another time.
    """

    text: str | None
    model: str
    error: str | None = None


class JudgeUnreachableError(OSError):
    """A judge that does not answer at all, or refuses everything; verdicts that are there are kept."""


class Judge(ABC):
    """Replies to prompts, decoded greedily.

    Attributes:
        model: which one.
        backend: "openai" or "transformers".
        base_url: of the server, if it is one.
    """

    model: str
    backend: str
    base_url: str | None = None

    @abstractmethod
    def reply_all(self, prompts: Sequence[Messages]) -> Iterator[list[tuple[int, Reply]]]:
        """Replies as they come, in groups of (place of the prompt, reply).

        Raises:
            JudgeUnreachableError: it is of no use to go on.
        """

    @property
    def identity(self) -> dict:
        """What a verdict depends on, beside its prompt."""
        return {"judge": self.model, "backend": self.backend, "base_url": self.base_url, "temperature": 0}


class OpenAIJudge(Judge):
    """Any server that speaks OpenAI's chat completions.

    Args:
        model: its id there.
        base_url: such as https://api.openai.com/v1 or http://localhost:8000/v1. Questions, true answers and the model's
            answers go there.
        api_key: default: the environment variable OPENAI_API_KEY; many servers of one's own need none.
        num_at_once: requests that wait for an answer at the same time.
        timeout_s: of one request, seconds.
        max_retries: further tries of a request that ends in 429, 5xx, a time-out or a closed connection, with growing
            pauses.
        max_tokens: longest reply.

    Raises:
        ImportError: the package `openai` is not installed (extra `judge`).
    """

    backend = "openai"

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        num_at_once: int = 8,
        timeout_s: float = 60.0,
        max_retries: int = 5,
        max_tokens: int = 256,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("asking a judge over HTTP needs openai: pip install 'video-panda[judge]'") from error
        self.model, self.base_url = model, base_url.rstrip("/")
        self.num_at_once, self.max_tokens = num_at_once, max_tokens
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=api_key or os.environ.get(_API_KEY) or "none",
            timeout=timeout_s,
            max_retries=max_retries,
        )

    def reply_all(self, prompts: Sequence[Messages]) -> Iterator[list[tuple[int, Reply]]]:
        """See `Judge`; several requests wait at once."""
        num_failures = 0
        places = iter(range(len(prompts)))
        with ThreadPoolExecutor(self.num_at_once, "judge") as pool:
            running = {}
            try:
                while True:
                    # Few at a time: an interrupted or failing run should not have to wait for all that was queued.
                    for place in places:
                        running[pool.submit(self._ask, prompts[place])] = place
                        if len(running) >= 2 * self.num_at_once:
                            break
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    group = [(running.pop(future), future.result()) for future in done]
                    for _, reply in group:
                        num_failures = num_failures + 1 if reply.error else 0
                    yield group
                    if num_failures >= min(_NUM_FAILURES_IN_A_ROW, len(prompts)):
                        raise JudgeUnreachableError(
                            f"{self.base_url} gave no answer to {num_failures} requests in a row: {group[-1][1].error}"
                        )
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, messages: Messages) -> Reply:
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=self.max_tokens
            )
            return Reply(completion.choices[0].message.content or "", completion.model or self.model)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeUnreachableError(f"{self.base_url} refuses to ask {self.model}: {_reason(error)}") from error
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
            # A reply that is no completion ends in one of the latter: the client does not check what it is given.
            return Reply(None, self.model, _reason(error))


def _reason(error: Exception) -> str:
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{cause}"


class TransformersJudge(Judge):
    """A language model on this machine; its weights are loaded when it is asked first.

    Args:
        model: folder or Hub id of a model with a chat template.
        device: such as "cuda:0"; default: a GPU if there is one.
        dtype: as `from_pretrained` takes it.
        batch_size: prompts at once.
        max_tokens: longest reply.

    Raises:
        ValueError: it has no chat template.
        OSError: there is no such model.
    """

    backend = "transformers"

    def __init__(
        self, model: str, device: str | None = None, dtype: str = "auto", batch_size: int = 8, max_tokens: int = 256
    ):
        from transformers import AutoTokenizer

        self.model, self.batch_size, self.max_tokens = str(model), batch_size, max_tokens
        self._device, self._dtype = device, dtype
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{model} has no chat template: it was not trained to be talked to")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @cached_property
    def _model(self):
        import torch
        from transformers import AutoModelForCausalLM

        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self._dtype, device_map=device).eval()

    def reply_all(self, prompts: Sequence[Messages]) -> Iterator[list[tuple[int, Reply]]]:
        """See `Judge`; in batches."""
        # Sanitized: an answer that holds a control token of the judge, such as "[/INST]", must not speak as its template does.
        ids = [
            self._tokenizer.apply_chat_template(
                own, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
            for own in prompts
        ]
        # Long ones beside long ones: less padding.
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            inputs = self._tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt").to(
                self._model.device
            )
            output = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.max_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            replies = self._tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            yield [(place, Reply(reply, self.model)) for place, reply in zip(places, replies)]


def open_judge(model: str | None, base_url: str | None = None) -> Judge | None:
    """The judge that a command names.

    Args:
        model: an id at the server, or, without one, a folder or Hub id; None: no judge.
        base_url: of the server.

    Raises:
        ValueError: a server without a model, or an address that is none.
        ImportError, OSError: as the judges.
    """
    if model is None:
        if base_url is not None:
            raise ValueError(f"{base_url} is asked for a judge, but none is named: give --judge")
        return None
    if base_url is None:
        return TransformersJudge(model)
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"the judge's address is {base_url!r}, expected one that begins with http:// or https://")
    return OpenAIJudge(model, base_url)
