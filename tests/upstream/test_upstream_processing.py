"""`ProcessorTesterMixin`, for the processor of prompts, pictures and clips."""

import unittest
from contextlib import nullcontext
from unittest.mock import patch

from transformers import AutoTokenizer
from upstream.source import require_upstream
from upstream.subjects import checkpoint, subjects, trusting

common = require_upstream("test_processing_common")

SIZES = {"image_size": 56, "patch_size": 14}
LOADERS = {
    "image_processor": "VideoPandaImageProcessor",
    "video_processor": "VideoPandaVideoProcessor",
}


class Replacements:
    """Upstream tests and helpers that need something of ours around them; docs/upstream_tests.md lists them."""

    def get_component(self, attribute, **kwargs):
        if attribute not in LOADERS:
            return super().get_component(attribute, **kwargs)
        return getattr(subjects(), LOADERS[attribute]).from_pretrained(self.tmpdirname, **kwargs)

    def _without_auto_map(self):
        """`to_dict` of a processor that was saved holds the `auto_map` that was written, of one that was loaded it does not."""
        to_dict = self.processor_class.to_dict

        def plain(processor, *args, **kwargs):
            return {key: value for key, value in to_dict(processor, *args, **kwargs).items() if key != "auto_map"}

        return patch.object(self.processor_class, "to_dict", plain)

    def test_processor_from_and_save_pretrained(self):
        with self._without_auto_map():
            super().test_processor_from_and_save_pretrained()

    def test_processor_from_and_save_pretrained_as_nested_dict(self):
        loaders = {name: getattr(subjects(), class_name) for name, class_name in LOADERS.items()}
        loaders["tokenizer"] = trusting(AutoTokenizer)
        with self._without_auto_map(), patch.object(common, "MODALITY_TO_AUTOPROCESSOR_MAPPING", loaders):
            super().test_processor_from_and_save_pretrained_as_nested_dict()

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        # The same refusals, in our words.
        expect = self.assertRaisesRegex
        with patch.object(self, "assertRaisesRegex", lambda error, _: expect(error, "placeholders")):
            super().test_if_input_has_mismatching_tokens_and_mm_data()

    def test_apply_chat_template_assistant_mask(self):
        # Upstream gives the placeholder as a variable of the template, which ours takes for text unless told otherwise.
        apply = self.processor_class.apply_chat_template

        def trusting(processor, *args, **kwargs):
            return apply(processor, *args, sanitize_control_tokens=False, **kwargs)

        with patch.object(self.processor_class, "apply_chat_template", trusting):
            super().test_apply_chat_template_assistant_mask()

    def _test_apply_chat_template(self, modality, *args):
        # Upstream takes a `…_grid_thw` for Qwen's, whose pixels are rows of patches; ours are one canvas a visual.
        apply = self.processor_class.apply_chat_template

        def without_grid(processor, *args, **kwargs):
            output = apply(processor, *args, **kwargs)
            if hasattr(output, "keys") and f"{modality}_grid_thw" in output:
                del output[f"{modality}_grid_thw"]
            return output

        with patch.object(self.processor_class, "apply_chat_template", without_grid):
            super()._test_apply_chat_template(modality, *args)

    @property
    def video_sampling_expectations(self):
        return [
            {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
            {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 4},
            {"do_sample_frames": False, "expected_dim": 1, "output_length": 11},
            {"expected_dim": 1, "output_length": 8},
        ]

    def test_apply_chat_template_video_frame_sampling(self):
        # Upstream ends with a list of pictures that must not be sampled; ours samples it if asked to.
        with patch.object(self, "assertRaisesRegex", lambda *_: nullcontext()):
            super().test_apply_chat_template_video_frame_sampling()


class ProcessingTest(Replacements, common.ProcessorTesterMixin, unittest.TestCase):
    """Each upstream test, for VideoPandaProcessor."""

    @classmethod
    def setUpClass(cls):
        cls.processor_class = subjects().VideoPandaProcessor
        super().setUpClass()

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(checkpoint())

    @classmethod
    def _setup_image_processor(cls):
        return subjects().VideoPandaImageProcessor(**SIZES)

    @classmethod
    def _setup_video_processor(cls):
        return subjects().VideoPandaVideoProcessor(**SIZES)
