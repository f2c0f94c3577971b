"""`ImageProcessingTestMixin`, for the image processor."""

import unittest
from unittest.mock import patch

from upstream.source import require_upstream
from upstream.subjects import subjects, trusting

common = require_upstream("test_image_processing_common")


class VideoPandaImageProcessingTester(common.ImageProcessingTester):
    """What the mixin asks for: options of the processor, and pictures."""

    def __init__(self, parent):
        super().__init__(
            parent,
            max_resolution=80,
            image_size=56,
            patch_size=14,
            do_convert_rgb=True,
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
        )

    def _get_image_processing_classes(self):
        return {"pil": subjects().VideoPandaImageProcessor}

    def expected_output_image_shape(self, images):
        return 3, self.image_size, self.image_size


class Replacements:
    """Upstream tests that need something else of ours; docs/upstream_tests.md lists them."""

    def test_image_processor_save_load_with_autoimageprocessor(self):
        with patch.object(common, "AutoImageProcessor", trusting(common.AutoImageProcessor)):
            super().test_image_processor_save_load_with_autoimageprocessor()

    def test_call_numpy_4_channels(self):
        # As upstream's, with three numbers for the mean: ours drops the fourth channel before it normalises.
        tester = self.image_processor_tester
        processor = subjects().VideoPandaImageProcessor(**self.image_processor_dict)
        images = tester.prepare_image_inputs(num_channels=4, numpify=True)
        options = {"return_tensors": "pt", "input_data_format": "channels_last", "image_mean": [0.0] * 3}
        for given, count in ((images[0], 1), (images, tester.batch_size)):
            pixels = processor(given, image_std=[1.0] * 3, **options).pixel_values
            assert tuple(pixels.shape) == (count, *tester.expected_output_image_shape(images))


class ImageProcessingTest(Replacements, common.ImageProcessingTestMixin, unittest.TestCase):
    """Each upstream test, for VideoPandaImageProcessor."""

    image_processor_tester_class = VideoPandaImageProcessingTester
    test_cast_dtype = True
