"""Registers Video-Panda with lmms-eval, which finds `model_manifest` among the entry points of `lmms_eval.models`.

lmms-eval calls it whenever it starts; torch and the model are imported when someone asks for the model.
"""


def model_manifest():
    """What lmms-eval has to know: `--model video_panda` is a chat model, and where its class is.

    Returns:
        A `lmms_eval.models.registry_v2.ModelManifest`.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="video_panda", chat_class_path="video_panda.evaluation.lmms_eval_model.VideoPandaChat"
    )
