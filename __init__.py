"""Video-Panda for the Hugging Face ecosystem: a video-language model without a video encoder (arXiv 2412.18609).

Importing this costs next to nothing: each public name is loaded at its first use, and the Auto classes of transformers
learn about Video-Panda at the moment they themselves are imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

from .version import __version__

_MODULE_OF_NAME = {
    "VideoPandaConfig": "modeling_video_panda.configuration_video_panda",
    "VideoPandaVisionConfig": "modeling_video_panda.configuration_video_panda",
    "VideoPandaModel": "modeling_video_panda.modeling_video_panda",
    "VideoPandaForConditionalGeneration": "modeling_video_panda.modeling_video_panda",
    "VideoPandaProcessor": "processing.processing_video_panda",
    "VideoPandaVideoProcessor": "processing.video_processing_video_panda",
    "VideoPandaImageProcessor": "processing.image_processing_video_panda",
    "VideoDecodeError": "processing.video_decoding_video_panda",
    "convert_checkpoint": "hub.convert",
    "write_model_card": "hub.card",
    "check_folder": "hub.check_folder",
    "push_checkpoint": "hub.push",
    **dict.fromkeys(
        (
            "VideoPandaTrainingArguments",
            "InitialAlignmentArguments",
            "VisualLanguageIntegrationArguments",
            "InstructionTuningArguments",
        ),
        "trainers.arguments",
    ),
    "VideoPandaTrainer": "trainers.trainer",
    **dict.fromkeys(
        ("InitialAlignmentTrainer", "VisualLanguageIntegrationTrainer", "InstructionTuningTrainer"), "trainers.stages"
    ),
    "VideoPandaDataCollator": "trainers.collator",
    "Teacher": "trainers.teachers",
    "load_teacher": "trainers.teachers",
    "lora_config": "trainers.lora",
    "quantization_config": "trainers.lora",
    "check_data": "trainers.check_data",
    "train": "trainers.train",
    **dict.fromkeys(("ShapesQA", "render_clips", "training_samples", "write_split"), "evaluation.shapes_qa"),
    "cell_labels": "evaluation.shapes_render",
    "draw_scene": "evaluation.shapes_scenes",
    "evaluate": "evaluation.runner",
    **dict.fromkeys(("MSVDQA", "MSRVTTQA", "TGIFQA", "ActivityNetQA"), "evaluation.zero_shot_qa"),
    "VideoChatGPTBenchmark": "evaluation.video_chatgpt",
    "judge_run": "evaluation.judging",
    **dict.fromkeys(("OpenAIJudge", "TransformersJudge"), "evaluation.judges"),
    "write_report": "evaluation.report",
    "ask": "cli",
    "info": "cli",
}

__all__ = ["__version__", *_MODULE_OF_NAME]


def __getattr__(name: str):
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_config(auto_module, config) -> None:
    auto_module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(auto_module, config, model) -> None:
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        getattr(auto_module, name).register(config, model, exist_ok=True)


def _register_processor(auto_module, config, processor) -> None:
    auto_module.AutoProcessor.register(config, processor, exist_ok=True)


def _register_image_processor(auto_module, config, processor) -> None:
    classes = {"pil": processor, "torchvision": processor}
    auto_module.AutoImageProcessor.register(config, image_processor_classes=classes, exist_ok=True)


def _register_video_processor(auto_module, config, processor) -> None:
    auto_module.AutoVideoProcessor.register(config, processor, exist_ok=True)


# Auto module of transformers -> the function that registers there, and the classes it registers.
_AUTO = "transformers.models.auto."
_REGISTRATIONS = {
    f"{_AUTO}configuration_auto": (_register_config, ("VideoPandaConfig",)),
    f"{_AUTO}modeling_auto": (_register_models, ("VideoPandaConfig", "VideoPandaForConditionalGeneration")),
    f"{_AUTO}processing_auto": (_register_processor, ("VideoPandaConfig", "VideoPandaProcessor")),
    f"{_AUTO}image_processing_auto": (_register_image_processor, ("VideoPandaConfig", "VideoPandaImageProcessor")),
    f"{_AUTO}video_processing_auto": (_register_video_processor, ("VideoPandaConfig", "VideoPandaVideoProcessor")),
}
_OWN_MODULES = (f"{__name__}.modeling_video_panda.", f"{__name__}.processing.")


def _is_being_imported(module_name: str) -> bool:
    module = sys.modules.get(module_name)
    return module is not None and getattr(module.__spec__, "_initializing", False)


def _register_where_possible() -> None:
    """Register with each Auto module that is loaded; not while a module of our own is being imported, whose end comes
    here too: what is registered imports that one again."""
    if any(_is_being_imported(name) for name in list(sys.modules) if name.startswith(_OWN_MODULES)):
        return
    for auto_name, (register, names) in _REGISTRATIONS.items():
        if auto_name in sys.modules and not _is_being_imported(auto_name):
            register(sys.modules[auto_name], *map(__getattr__, names))


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Registers Video-Panda right after an Auto module of transformers, or one of our own, was imported.

    Registering at once would import torch and most of transformers (over 2 s) for everyone who imports this package.
    """

    def find_spec(self, fullname, path=None, target=None):
        watched = fullname in _REGISTRATIONS or fullname.startswith(_OWN_MODULES)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if watched else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            spec._initializing = False  # importlib itself says so only after this function
            _register_where_possible()

        spec.loader.exec_module = execute_and_register
        return spec


# The repository root can be imported under its folder's name as well (pytest does): only the package itself registers.
if __name__ == "video_panda" and not any(type(finder).__name__ == "_RegisterAfterImport" for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfterImport())
    _register_where_possible()
