"""The code that travels with a checkpoint: what it could do to the machine that loads it, from its syntax tree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "modeling_video_panda").glob("*_video_panda.py")) + sorted(
    (ROOT / "processing").glob("*_video_panda.py")
)
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_MODULES = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "ctypes", "code", "pty", "runpy", "webbrowser", "shutil"),
    *(
        "requests",
        "httpx",
        "aiohttp",
        "ftplib",
        "smtplib",
        "telnetlib",
        "socketserver",
        "xmlrpc",
        "asyncio",
        "multiprocessing",
    ),
}
# Modules that reach out of the process, and the files that may import them.
LISTED_MODULES = {
    "socket": {"sources_video_panda", "isolated_video_panda", "isolated_worker_video_panda"},
    "urllib": {"sources_video_panda"},
    "http": {"sources_video_panda"},
    "ssl": set(),
    "subprocess": {"isolated_video_panda"},
    "tempfile": {"isolated_video_panda", "isolated_memory_video_panda"},
    "importlib": set(),
}
# What opens files, connections or processes: the names as they are called, and the functions that may call them.
OPENING = {
    "open",
    "read_bytes",
    "read_text",
    "write_bytes",
    "write_text",
    "Popen",
    "socket",
    "getaddrinfo",
    "urlopen",
    "system",
}
OPENING |= {
    "memfd_create",
    "connect",
    "unlink",
    "rmtree",
    "rename",
    "replace_file",
    "mkdir",
    "makedirs",
    "fromfile",
    "from_file",
}
LISTED_CALLS = {
    # the checkpoint's own files
    ("checkpoint_video_panda", "check_weight_files"),
    ("saved_files_video_panda", "saving_aside"),
    ("saved_files_video_panda", "record_saved_files"),
    ("saved_files_video_panda", "_check_json"),
    ("saved_files_video_panda", "_digest"),
    ("saved_files_video_panda", "_delete"),
    ("saved_processor_video_panda", "_check_fits"),
    # the media that are named, and the worker that decodes them
    ("sources_video_panda", "download"),
    ("sources_video_panda", "_connect"),
    ("sources_video_panda", "_look_up.look_up"),
    ("sources_video_panda", "_open_image"),
    ("containers_video_panda", "read_head"),
    ("decode_limits_video_panda", "read_mp4_tracks"),
    ("pyav_reading_video_panda", "_open_container"),
    ("frame_reading_video_panda", "_get_batch"),
    ("frame_reading_video_panda", "_iterate_decord"),
    ("isolated_video_panda", "_VideoPandaWorker.__init__"),
    ("isolated_memory_video_panda", "VideoPandaFrameMemory.frames_in"),
    ("isolated_memory_video_panda", "open_memory"),
    ("isolated_worker_video_panda", "serve"),
    ("isolated_worker_video_panda", "_limit"),
}


def name_called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def calls_of(tree: ast.AST, names=()):
    """(qualified name of the function around it, call) of every call."""
    for node in ast.iter_child_nodes(tree):
        inner = names
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = (*names, node.name)
        if isinstance(node, ast.Call):
            yield ".".join(names), node
        yield from calls_of(node, inner)


def violations(source: str, module: str) -> list[str]:
    """What a shipped file does that it may not, one line each."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for top in {name.split(".")[0] for name in names}:
            if top in FORBIDDEN_MODULES or module not in LISTED_MODULES.get(top, {module}):
                found.append(f"line {node.lineno} imports {top}")
    for function, call in calls_of(tree):
        name = name_called(call)
        is_torch_load = name == "load" and ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load")
        if (name in FORBIDDEN_CALLS and isinstance(call.func, ast.Name)) or is_torch_load:
            found.append(f"line {call.lineno} calls {name}")
        if name in OPENING and ast.unparse(call.func) != "Image.open" and (module, function) not in LISTED_CALLS:
            found.append(f"line {call.lineno}: {function or 'the module'} calls {ast.unparse(call.func)}")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_code_does_only_what_is_listed(path):
    assert violations(path.read_text(encoding="utf-8"), path.stem) == []


def test_the_list_has_nothing_that_is_not_there():
    used = set()
    for path in SHIPPED:
        for function, call in calls_of(ast.parse(path.read_text(encoding="utf-8"))):
            if name_called(call) in OPENING and ast.unparse(call.func) != "Image.open":
                used.add((path.stem, function))
    assert used >= LISTED_CALLS, LISTED_CALLS - used


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from urllib.request import urlopen",
        "import subprocess",
        "def f():\n    import socket",
        "open('/etc/passwd')",
        "class A:\n    def f(self):\n        return Path(x).read_text()",
        "torch.load(path)",
        "os.system('ls')",
        "compile(text, '', 'exec')",
    ],
)
def test_the_check_finds(line):
    assert violations(line, "geometry_video_panda")
