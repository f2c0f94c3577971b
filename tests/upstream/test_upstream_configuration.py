"""`ConfigTester`, for the configuration of the model and for that of STAB."""

import unittest

from upstream.model_tester import VideoPandaModelTester
from upstream.source import require_upstream
from upstream.subjects import subjects

common = require_upstream("test_configuration_common")


class ConfigTest(unittest.TestCase):
    """All that `ConfigTester` checks, field by field for STAB's and as a composite for the model's."""

    def setUp(self):
        self.model_tester = VideoPandaModelTester(self)

    def test_config(self):
        fields = {"rotary_table_dtype": "float16"}
        kind = subjects().VideoPandaConfig
        tester = common.ConfigTester(self, config_class=kind, has_text_modality=False, **fields)
        tester.run_common_tests()

    def test_vision_config(self):
        fields = {"hidden_size": 24, "num_attention_heads": 4}
        properties = ["hidden_size", "num_attention_heads"]
        tester = common.ConfigTester(
            self,
            config_class=subjects().VideoPandaVisionConfig,
            has_text_modality=False,
            common_properties=properties,
            **fields,
        )
        tester.run_common_tests()
