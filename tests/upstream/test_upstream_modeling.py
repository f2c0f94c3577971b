"""`ModelTesterMixin`, `GenerationTesterMixin` and their like, for the model with and without head."""

import unittest
from contextlib import ExitStack
from unittest.mock import patch

from upstream.model_tester import FIRST_PLACEHOLDER, VideoPandaModelTester
from upstream.source import require_upstream
from upstream.subjects import subjects

common = require_upstream("test_modeling_common")
generation = require_upstream("generation.test_utils")
training = require_upstream("test_training_mixin")
tensor_parallel = require_upstream("test_tensor_parallel_mixin")

# What a model type of transformers itself has in its tables of names; the mixins look there for what takes labels, and for
# the model without a head.
common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "video_panda": "VideoPandaModel"}
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "video_panda": "VideoPandaForConditionalGeneration",
}
# Distributed tests run for a list of model types, to save time.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = {"video_panda"}


def _set_existing_epsilons(config):
    """Upstream's `set_config_for_less_flaky_test`, without the fields that ours refuses because it has none of the name."""
    for part in (config, config.text_config, config.vision_config):
        for name in ("rms_norm_eps", "layer_norm_eps", "batch_norm_eps"):
            if hasattr(part, name):
                setattr(part, name, 1.0)


def _text_ids(shape, vocab_size, rng=None, name=None):
    """Upstream's `ids_tensor`, without ids that promise a picture."""
    return _ids_tensor(shape, min(vocab_size, FIRST_PLACEHOLDER), rng, name)


_ids_tensor = common.ids_tensor
common.ids_tensor = _text_ids
common.set_config_for_less_flaky_test = _set_existing_epsilons


class Replacements:
    """Upstream tests and helpers that need something of ours around them; docs/upstream_tests.md lists them."""

    def test_can_init_all_missing_weights(self):
        # Upstream loads from an empty state dict, which our `from_pretrained` refuses unless it may report what is missing.
        def lenient(cls, *args, **kwargs):
            return super(cls, cls).from_pretrained(*args, output_loading_info=True, **kwargs)[0]

        with ExitStack() as patches:
            for model_class in self.all_model_classes:
                patches.enter_context(patch.object(model_class, "from_pretrained", classmethod(lenient)))
            super().test_can_init_all_missing_weights()

    def test_get_image_features_hidden_states(self):
        self._check_that_asking_changes_nothing("get_image_features", self._image_features_prepare_config_and_inputs)

    def test_get_video_features_hidden_states(self):
        self._check_that_asking_changes_nothing("get_video_features", self._video_features_prepare_config_and_inputs)

    def _check_that_asking_changes_nothing(self, method, prepare):
        # The part of upstream's test that is about the features; STAB has no stack of layers to give the states of.
        for model_class in self.all_model_classes:
            config, inputs = prepare()
            self._check_features_ignore_output_hidden_states(model_class, config, inputs, method)

    def _get_tp_config(self, tie_word_embeddings=None):
        # Upstream draws ids over the whole vocabulary: here so large a one that no placeholder is drawn (the seed is fixed).
        config = self.model_tester.get_config(vocab_size=20_001, first_placeholder=19_990)
        config.text_config.tie_word_embeddings = config.tie_word_embeddings = bool(tie_word_embeddings)
        return config

    def test_training_overfit(self):
        # Upstream reads `config.vocab_size`, which a configuration of a language model and another model has not.
        make_config = self.model_tester.get_config

        def with_vocabulary():
            config = make_config()
            config.vocab_size = config.text_config.vocab_size
            return config

        with patch.object(self.model_tester, "get_config", with_vocabulary):
            super().test_training_overfit()


class ModelTest(
    Replacements,
    common.ModelTesterMixin,
    generation.GenerationTesterMixin,
    training.TrainingTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
    unittest.TestCase,
):
    """Each upstream test, for the model without and with its head."""

    _is_composite = True
    additional_model_inputs = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None

    def setUp(self):
        self.model_tester = VideoPandaModelTester(self)
        self.all_model_classes = (subjects().VideoPandaModel, subjects().VideoPandaForConditionalGeneration)
