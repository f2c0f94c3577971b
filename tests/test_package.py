"""The rules of the house, read from the syntax trees: what may import what, and what a wheel must hold."""

import ast
import configparser
import re
import subprocess
import sys
import textwrap
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import video_panda

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = {"build", "dist", "default_model"}  # links to shipped files; and every hidden folder but .ci
MAX_LINES = 600
MAX_FUNCTION_LINES = 60

# Third-party packages each shipped folder may import at all. `av`: decisions.md lets a guard probe streams with PyAV.
ALLOWED = {
    "modeling_video_panda": {"torch", "transformers", "huggingface_hub"},
    "processing": {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "decord", "av"},
}
SHIPPED = sorted(path for folder in ALLOWED for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
# Import name -> name in install_requires, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "decord": "decord2"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def source_files() -> list[Path]:
    """Every Python file of the repository, generated ones left out."""
    files = []
    for path in ROOT.rglob("*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(part in NOT_SOURCE or (part.startswith(".") and part != ".ci") for part in folders):
            files.append(path)
    return sorted(files)


def imports_of(tree: ast.AST) -> list[tuple[int, str, ast.AST]]:
    """(level, module, node) of each import statement; level 0 is absolute, 1 is `from .x`, and so on."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", node))
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines_of(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip() and not line.strip().startswith("#")]


def shipped_violations(source: str, folder: str, siblings: set[str]) -> list[str]:
    """What in the text of a shipped file breaks remote code or its rules, one line each.

    Args:
        source: the text.
        folder: "modeling_video_panda" or "processing".
        siblings: module names in the same folder.
    """
    found = []
    for level, module, node in imports_of(ast.parse(source)):
        top = module.split(".")[0]
        if level > 1 or (level == 1 and module not in siblings):
            found.append(f"line {node.lineno}: only `from .module_of_this_folder import name`: {ast.unparse(node)}")
        elif level == 0 and top not in sys.stdlib_module_names and top not in ALLOWED[folder]:
            found.append(f"line {node.lineno}: {top} may not be imported here: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_a_shipped_file_imports_only_what_it_may(path):
    siblings = {other.stem for other in path.parent.glob("*.py")} - {"__init__"}
    assert shipped_violations(path.read_text(encoding="utf-8"), path.parent.name, siblings) == []


@pytest.mark.parametrize(
    ("line", "is_fine"),
    [
        ("from .stab_video_panda import Stab", True),
        ("import os, json", True),
        ("from torch import nn", True),
        ("from . import stab_video_panda", False),
        ("from ..version import __version__", False),
        ("from .sub.stab_video_panda import Stab", False),
        ("from .not_there import Stab", False),
        ("import video_panda", False),
        ("try:\n    from torchvision import io\nexcept ImportError:\n    io = None", False),
        ("def f():\n    import requests", False),
        ("import av", False),
    ],
)
def test_the_check_of_imports_tells_them_apart(line, is_fine):
    assert (shipped_violations(line, "modeling_video_panda", {"stab_video_panda"}) == []) is is_fine


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_transformers_sees_the_same_imports_as_python(path):
    # transformers finds relative imports by a regular expression: an example at the start of a docstring line would
    # make it look for a file, and an import it does not see is a file that is not copied.
    relative = {module for level, module, _ in imports_of(parse(path)) if level == 1}
    assert set(get_relative_imports(path)) == relative


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_what_a_shipped_file_requires_is_installed_with_the_package(path):
    # get_imports: what transformers demands of everyone who loads the checkpoint.
    requirements = lines_of(setup_cfg()["options"]["install_requires"])
    installed = {re.split(r"[<>=!~ \[]", line, maxsplit=1)[0].lower() for line in requirements}
    required = {DISTRIBUTIONS.get(name, name) for name in get_imports(path) if name not in sys.stdlib_module_names}
    assert required <= installed


def test_shipped_files_have_names_of_their_own():
    # One file may stand in both folders, which cannot import from each other.
    counts = Counter(name for name, _ in {(path.name, path.read_bytes()) for path in SHIPPED})
    assert [name for name, count in counts.items() if count > 1] == []
    assert [name for name in counts if not name.endswith("_video_panda.py")] == []


def test_shipped_folders_are_flat():
    nested = [path for folder in ALLOWED for path in (ROOT / folder).glob("*/**/*.py")]
    assert nested == []


@pytest.mark.parametrize("folder", ["trainers", "evaluation", "hub"])
def test_the_other_folders_import_the_two_shipped_ones_only(folder):
    allowed = {"modeling_video_panda", "processing", "version", "weights"}
    # The trainer's `create_model_card` makes the same card as everybody; what it gives are plain values.
    exceptions = {("trainers/checkpoint_saving.py", "from ..hub.card import write_model_card")}
    found = []
    for path in sorted((ROOT / folder).glob("*.py")):
        for level, module, node in imports_of(parse(path)):
            names = [module] if module else [alias.name for alias in node.names]
            is_foreign = level > 2 or (level == 2 and not {name.split(".")[0] for name in names} <= allowed)
            if is_foreign and (name_of(path), ast.unparse(node)) not in exceptions:
                found.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_examples_use_the_public_names_only():
    found = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        for level, module, node in imports_of(parse(path)):
            if level or module.startswith("video_panda."):
                found.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_no_file_is_too_long():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert "tests/test_package.py" in lengths
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_is_too_long():
    """Counted without the docstring: what one has to read to follow it."""
    too_long = {}
    for path in source_files():
        if "tests" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = node.body[0] if ast.get_docstring(node) else None
                length = node.end_lineno - node.lineno + 1
                length -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                if length > MAX_FUNCTION_LINES:
                    too_long[f"{name_of(path)}:{node.name}"] = length
    assert too_long == {}


def test_no_eval_or_exec():
    # The tests run the documentation's snippets, which is what exec is for.
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in source_files()
        if "tests" not in path.relative_to(ROOT).parts
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
    ]
    assert found == []


def test_every_package_is_listed_in_setup_cfg():
    # Packages are listed by name, so a forgotten folder works in the checkout and is missing from the wheel.
    folders = {path.parent.relative_to(ROOT).as_posix() for path in source_files() if path.name == "__init__.py"}
    expected = {"video_panda" if folder == "." else "video_panda." + folder.replace("/", ".") for folder in folders}
    assert set(lines_of(setup_cfg()["options"]["packages"])) == expected


def test_package_data_is_there():
    patterns = lines_of(setup_cfg()["options.package_data"]["video_panda"])
    assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []


def test_version_is_the_installed_one():
    assert video_panda.__version__ == metadata.version("video-panda")


def test_importing_the_package_does_not_import_torch():
    program = "import sys, video_panda; print([name for name in ('torch', 'decord', 'av') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", getattr(video_panda, "__all__", []))
def test_every_public_name_resolves(name):
    assert getattr(video_panda, name) is not None
    assert name in dir(video_panda)


@pytest.mark.parametrize(
    "name",
    [
        "VideoPandaProcessor",
        pytest.param("VideoPandaConfig", marks=pytest.mark.slow),
        pytest.param("VideoPandaForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
def test_a_public_name_can_be_the_first_thing_used(name):
    # In a fresh process: a circular import between a module and its registration hides once transformers is loaded.
    program = f"from video_panda import {name} as first; print(first.__name__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == name


@pytest.mark.parametrize(
    "module",
    ["modeling_video_panda.stab_video_panda", pytest.param("processing.sources_video_panda", marks=pytest.mark.slow)],
)
def test_a_module_can_be_imported_first_and_all_is_registered_in_the_end(module):
    program = f"""
        import video_panda.{module}
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMultimodalLM, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_MAPPING
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
        from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
        config = type(AutoConfig.for_model("video_panda"))
        mappings = MODEL_MAPPING, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING
        assert all(config in mapping for mapping in mappings)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_names_other_people_rely_on_are_public():
    stem = "VideoPanda"
    expected = {"Config", "VisionConfig", "Model", "ForConditionalGeneration"}
    expected |= {"Processor", "VideoProcessor", "ImageProcessor"}
    assert {stem + name for name in expected} <= set(video_panda.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = video_panda.no_such_name
