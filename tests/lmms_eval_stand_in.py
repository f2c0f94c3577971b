"""What the plugin uses of lmms-eval, in small: lmms-eval is large and seldom installed.

`test_lmms_eval_plugin.py` compares it with lmms-eval where that is there.
"""

import abc
import dataclasses
import types


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclasses.dataclass
class Instance:
    """One request; of a chat task: (text, doc_to_messages, gen_kwargs, doc_id, task, split)."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = dataclasses.field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attr, req, res: None)

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class ConfigurableMessagesTask:
    def __init__(self, data_dir=None, cache_dir=None, download_mode=None, config=None, model_name=None):
        if "class" in config:
            raise TypeError("TaskConfig.__init__() got an unexpected keyword argument 'class'")
        self.config = types.SimpleNamespace(**config)
        self.download(self.config.dataset_kwargs)

    def doc_to_text(self, doc):
        return doc[self.config.doc_to_text]

    @classmethod
    def _build_user_turn(cls, visuals, text):
        content = [{"type": visual["type"], "url": visual["url"]} for visual in visuals]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


STAND_IN = {
    "lmms_eval.api.instance": (TokenCounts, GenerationResult, Instance),
    "lmms_eval.api.model": (lmms,),
    "lmms_eval.api.task": (ConfigurableMessagesTask,),
    "lmms_eval.models.registry_v2": (ModelManifest,),
}
