"""Whether a checkpoint's folder is fit for others: complete, loadable without this package, nothing in it but the model."""

import ast
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from .fresh_process import load_in_fresh_process
from .leaks import find_leaks, find_secrets, read_text
from .shards import INDEX_NAMES, SINGLE_NAMES, read_json, weight_map_of

MODEL_TYPE = "video_panda"
_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED_FOLDERS = (_PACKAGE / "modeling_video_panda", _PACKAGE / "processing")
# What the Trainer leaves beside a model. It is neither uploaded nor refused: nothing in it is of use to others.
_BOOKKEEPING = (
    *("trainer_state.json", "run.json", "manifest.json", "skipped_samples.json"),
    *("all_results.json", "train_results.json", "eval_results.json"),
)
_HIDDEN_BUT_MEANT = (".eval_results", ".gitattributes")
# What only training needs -> what it is.
_TRAINING_ONLY = {
    "alignment_head*": "the distillation's alignment head",
    "optimizer*": "the optimizer's state",
    "*optim_states*": "the optimizer's state",
    "scheduler*": "the scheduler's state",
    "scaler*": "the gradient scaler's state",
    "rng_state*": "the state of random number generators",
    "training_args.bin": "the pickled training arguments, which may hold a Hub token",
    "pytorch_model_fsdp*": "FSDP's state",
    "global_step*": "DeepSpeed's state",
    "adapter_*": "a LoRA adapter: merge it into the model (merge_and_unload) and push that",
}
_TRAINING_ONLY_TENSORS = {
    "alignment_head": "the distillation's alignment head",
    "teacher": "the teacher",
    "exp_avg": "the optimizer's state",
    "lora_A": "a LoRA adapter that is not merged",
    "base_layer": "a LoRA adapter that is not merged",
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz", ".npy")
_AUTO_CLASSES = {"config.json": ("AutoConfig", "AutoModel"), "processor_config.json": ("AutoProcessor",)}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, or with one that is missing."""

    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


class FolderProblemsError(ValueError):
    """A folder that must not be pushed as it is.

    Attributes:
        problems: all that were found.
    """

    def __init__(self, folder: Path, problems: Sequence[Problem]):
        self.problems = list(problems)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{folder} is not fit to be pushed ({len(self.problems)} problems):{lines}")


@dataclass(frozen=True)
class CheckedFolder:
    """What of a folder would be uploaded.

    Attributes:
        files: name in the repository -> where the file is.
        left_out: names of what is neither uploaded nor a problem: hidden files, checkpoints and notes of the Trainer, and
            what the caller excluded.
    """

    files: dict[str, Path]
    left_out: tuple[str, ...]


def check_folder(
    folder: str | os.PathLike,
    *,
    exclude: Sequence[str] = (),
    loads: bool = True,
    timeout_s: float = 600.0,
    device: str | None = None,
) -> CheckedFolder:
    """Check a checkpoint's folder: all problems are found at once.

    Args:
        folder: of the checkpoint.
        exclude: patterns of files that are neither checked nor uploaded, as in `huggingface_hub`.
        loads: also load it in a fresh process that has not this package, and have it answer a question.
        timeout_s: seconds for that.
        device: for that; default: the first GPU if there is one.

    Returns:
        What would be uploaded.

    Raises:
        FolderProblemsError: a ValueError with every problem, each naming its file.
        OSError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: expected a checkpoint's")
    checked, problems = _list_files(folder, exclude)
    problems += [problem for name, path in checked.files.items() for problem in _problems_of_file(name, path, folder)]
    problems += [*_configuration_problems(folder, checked.files), *_weights_problems(folder, checked.files)]
    # A folder that is not complete cannot be loaded; what else is wrong with it would only be said twice.
    if loads and not problems:
        error = load_in_fresh_process(checked.files, timeout_s=timeout_s, device=device)
        if error is not None:
            problems.append(Problem("the folder", f"does not load in a fresh process: {error}"))
    if problems:
        raise FolderProblemsError(folder, problems)
    return checked


def _list_files(folder: Path, exclude: Sequence[str]) -> tuple[CheckedFolder, list[Problem]]:
    names, left_out, problems = [], [], []
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        for name in sorted(folders):
            place = (inside / name).as_posix()
            if _is_left_out(place):
                left_out.append(f"{place}/")
                folders.remove(name)
            elif Path(root, name).is_symlink():
                problems.append(Problem(place, "is a link to a folder: put the files themselves there"))
        for name in sorted(files):
            place = (inside / name).as_posix()
            (left_out if _is_left_out(place) else names).append(place)
    kept = list(filter_repo_objects(names, ignore_patterns=list(exclude)))
    left_out += [name for name in names if name not in set(kept)]
    kept_files = {}
    for name in sorted(kept):
        problem = _link_problem(folder / name, folder)
        if problem is None:
            kept_files[name] = folder / name
        else:
            problems.append(Problem(name, problem))
    return CheckedFolder(kept_files, tuple(sorted(left_out))), problems


def _is_left_out(place: str) -> bool:
    """Hidden files, what begins with an underscore (as the Trainer has it), its checkpoints and its notes."""
    name = PurePosixPath(place).name
    if name in _HIDDEN_BUT_MEANT:
        return False
    return name.startswith((".", "_")) or name in _BOOKKEEPING or re.fullmatch(r"checkpoint-\d+", name) is not None


def _link_problem(path: Path, folder: Path) -> str | None:
    if path.is_symlink():
        target = path.resolve()
        if not target.exists():
            return "is a link to a file that is not there"
        # The package's own model has links to its own code; what they give is the file.
        is_shipped = target.suffix == ".py" and target.parent in _SHIPPED_FOLDERS
        if folder.resolve() not in target.parents and not is_shipped:
            return "is a link to a file outside the folder: put the file itself there"
    return None if path.is_file() else "is no regular file"


# One file -------------------------------------------------------------------------------------------------------------


def _problems_of_file(name: str, path: Path, folder: Path) -> Iterator[Problem]:
    useless = _training_only(name)
    if useless is not None:
        yield Problem(name, f"only training needs it ({useless}): remove it, or exclude it")
        return
    if (kind := pickle_kind(path)) is not None:
        yield Problem(name, f"{kind}, and loading one can run any code: remove it, or exclude it")
        return
    if path.suffix == ".safetensors":
        yield from _safetensors_problems(name, path, _own_paths(folder))
        return
    text = read_text(path)
    leaks = find_secrets(path) if text is None else find_leaks(text, name, _own_paths(folder))
    yield from (Problem(name, leak) for leak in leaks)


def _own_paths(folder: Path) -> tuple[str, ...]:
    """The user's home and the folder itself, where they are more than the root of a disk."""
    paths = dict.fromkeys((folder.absolute(), folder.resolve(), Path.home()))
    return tuple(str(path) for path in paths if len(path.parts) > 2)


def _training_only(name: str) -> str | None:
    for part in PurePosixPath(name).parts:
        for pattern, what in _TRAINING_ONLY.items():
            if fnmatch(part, pattern):
                return what
    return None


def pickle_kind(path: Path) -> str | None:
    """What kind of pickle a file is, by its content or its name; None for none."""
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05") and _opens_as_pickle(path):
        return "is a pickle"
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith((".pkl", ".npy")) for name in archive.namelist()):
                return "is an archive with a pickle in it"
    return f"is called {path.suffix} as pickles are" if path.suffix.lower() in _PICKLE_SUFFIXES else None


def _opens_as_pickle(path: Path) -> bool:
    """Whether the first operations are a pickle's; nothing is run."""
    with path.open("rb") as file:
        try:
            for number, _ in enumerate(pickletools.genops(file)):
                if number == 3:
                    return True
        except (ValueError, EOFError, UnicodeDecodeError):
            return False
    return True


def _safetensors_problems(name: str, path: Path, own_paths: tuple[str, ...]) -> Iterator[Problem]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, list(file.keys())
    except SafetensorError as error:
        yield Problem(name, f"cannot be read as safetensors, it may be cut off: {error}")
        return
    for key, value in metadata.items():
        yield from (Problem(name, f"its header's {key!r}: {leak}") for leak in find_leaks(value, name, own_paths))
    for word, what in _TRAINING_ONLY_TENSORS.items():
        found = [tensor for tensor in tensors if word in tensor.split(".")]
        if found:
            yield Problem(name, f"holds {len(found)} tensors that only training needs ({what}), such as {found[0]}")


# The whole ------------------------------------------------------------------------------------------------------------


def _configuration_problems(folder: Path, files: Mapping[str, Path]) -> Iterator[Problem]:
    modules: dict[str, str] = {}  # code file -> who names it
    for name, needed in _AUTO_CLASSES.items():
        if name not in files:
            yield Problem(name, "is missing")
            continue
        try:
            content = read_json(folder / name)
        except ValueError as error:
            yield Problem(name, str(error))
            continue
        if name == "config.json" and content.get("model_type") != MODEL_TYPE:
            yield Problem(name, f"model_type is {content.get('model_type')!r}, expected {MODEL_TYPE!r}")
        auto_map = content.get("auto_map") or {}
        for missing in [auto for auto in needed if auto not in auto_map]:
            yield Problem(name, f"auto_map has no {missing}: save the checkpoint again with this package")
        for own_map in _auto_maps(content):
            for auto, value in own_map.items():
                yield from _auto_map_problems(name, auto, value, files, modules)
    yield from _missing_imports(files, modules)
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        yield Problem("tokenizer.json", "is missing, and there is no tokenizer.model either")
    elif "tokenizer_config.json" not in files:
        yield Problem("tokenizer_config.json", "is missing")


def _auto_maps(content: Mapping) -> Iterator[Mapping]:
    for key, value in content.items():
        if key == "auto_map" and isinstance(value, Mapping):
            yield value
        elif isinstance(value, Mapping):
            yield from _auto_maps(value)


def _auto_map_problems(name: str, auto: str, value, files: Mapping[str, Path], modules: dict[str, str]):
    for reference in value if isinstance(value, list) else [value]:
        if reference is None:
            continue
        repository, _, local = str(reference).rpartition("--")
        module, _, class_name = local.rpartition(".")
        code = f"{module}.py"
        if repository:
            yield Problem(name, f"auto_map.{auto} takes its code from another repository, {repository}")
        elif code not in files:
            yield Problem(code, f"is missing: auto_map.{auto} of {name} names it")
        else:
            modules[code] = name
            try:
                tree = ast.parse(files[code].read_bytes())
            except (SyntaxError, ValueError) as error:
                yield Problem(code, f"is no Python: {error}")
                continue
            if class_name not in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}:
                yield Problem(code, f"has no class {class_name}, which auto_map.{auto} of {name} names")


def _missing_imports(files: Mapping[str, Path], modules: Mapping[str, str]) -> Iterator[Problem]:
    waiting, seen = list(modules), set(modules)
    while waiting:
        code = waiting.pop()
        for module in sorted(get_relative_imports(files[code])):
            needed = f"{module}.py"
            if needed in seen:
                continue
            seen.add(needed)
            if needed in files:
                waiting.append(needed)
            else:
                yield Problem(needed, f"is missing: {code} imports it")


def _weights_problems(folder: Path, files: Mapping[str, Path]) -> Iterator[Problem]:
    index_name, single = INDEX_NAMES[0], SINGLE_NAMES[0]
    stored = {name for name in files if name.endswith(".safetensors") and _training_only(name) is None}
    named = {single}
    if index_name in files:
        if single in files:
            yield Problem(single, f"stands beside {index_name}: it is not clear which of the two is the model")
            return
        try:
            weight_map = weight_map_of(folder / index_name)
        except ValueError as error:
            yield Problem(index_name, str(error))
            return
        named = set(weight_map.values())
        yield from (Problem(name, f"is missing: {index_name} names it") for name in sorted(named - set(files)))
        yield from _index_problems(index_name, weight_map, files)
    elif single not in files:
        yield Problem(single, "is missing, and so is an index of several files of weights")
    for name in sorted(stored - named):
        yield Problem(name, "is loaded by nothing: it does not belong to the model's weights")


def _index_problems(index_name: str, weight_map: Mapping[str, str], files: Mapping[str, Path]) -> Iterator[Problem]:
    for shard in sorted(set(weight_map.values()) & set(files)):
        try:
            with safe_open(files[shard], framework="pt") as file:
                found = set(file.keys())
        except SafetensorError:
            continue  # said of the file itself
        expected = {tensor for tensor, place in weight_map.items() if place == shard}
        for tensor in sorted(expected - found)[:3]:
            yield Problem(shard, f"does not hold {tensor}, though {index_name} says so")
