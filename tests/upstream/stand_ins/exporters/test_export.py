"""Stand-in for a folder that the source distribution lacks: `ModelTesterMixin` inherits from this class."""


class ExportTesterMixin:
    """Holds no tests: what transformers checks of ONNX and ExecuTorch exporters stands in files that are not published."""
