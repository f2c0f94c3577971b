"""Pushing a checkpoint to the Hub: checked first, with its card, in one commit."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .card import CARD_FILE, ComposedCard, compose_card, format_bytes, is_written_by_hand, write_card_file
from .card_results import eval_result_files, read_run
from .check_folder import CheckedFolder, FolderProblemsError, Problem, check_folder
from .leaks import find_leaks

MAIN = "main"
# Weights of an earlier push: of two sets in one repository, transformers would load the wrong one.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Push:
    """What was pushed, or would be.

    Attributes:
        repo_id, revision: where to.
        files: name in the repository -> size in bytes.
        left_out: what of the folder is not among them.
        removed: weights of an earlier push that the same commit removes; unknown, and empty, in a dry run.
        card: what was done about `README.md`.
        commit: id of the commit; None in a dry run.
        url: of the commit; None in a dry run.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    card: str
    commit: str | None = None
    url: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class _Repository:
    """What is on the Hub before the push."""

    exists: bool
    has_revision: bool = False
    head: str | None = None
    files: tuple[str, ...] = ()


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    results: Iterable[str | os.PathLike] = (),
    dataset_ids: Mapping[str, str] | None = None,
    dry_run: bool = False,
    exclude: Sequence[str] = (),
    timeout_s: float = 600.0,
    device: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    report: Callable[[str], None] | None = None,
    **card_options,
) -> Push:
    """Check a checkpoint's folder, write its card, and push both in one commit.

    A card in the folder that a person wrote or edited keeps its text (so does one that is on the Hub, where the folder has
    none); otherwise the card is written, and put into the folder after the push.

    Args:
        folder: of the checkpoint.
        repo_id: on the Hub, such as "you/video-panda-7b"; made if it is not there.
        private: whether a repository that is made is private. One that is there stays as it is; a public one is refused.
        revision: branch to push to, made if it is not there; default: "main".
        results: folders of evaluation runs of this checkpoint.
        dataset_ids: benchmark -> dataset on the Hub; for these, `.eval_results/*.yaml` is pushed too.
        dry_run: check and say what would be pushed; the Hub is not asked anything.
        exclude: patterns of files to leave alone.
        timeout_s: seconds for loading in a fresh process.
        device: for that; default: the first GPU if there is one.
        token: of the Hub; default: the one that you are logged in with.
        commit_message: default: "Push a Video-Panda checkpoint".
        report: called with a line of text at each stage.
        card_options: further ones of `compose_card` (name, description, license, latency, ...).

    Returns:
        What was pushed.

    Raises:
        ValueError: the folder is not fit (`FolderProblemsError` names everything), results of another model, or a public
            repository where a private one was asked for.
        OSError: a file cannot be read, or the Hub refuses; the message says what was done and what was not.
    """
    report = report or (lambda line: None)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id must have an owner, as in you/{repo_id}, got {repo_id!r}")
    folder, revision, runs = Path(folder), revision or MAIN, list(results)
    api = HfApi(token=token)
    there = _Repository(exists=False) if dry_run else _look(api, repo_id, revision, private)
    # First what takes seconds, then reading the weights: for the results, and in a process of their own.
    check_folder(folder, exclude=exclude, loads=False)
    card = _compose(api, folder, repo_id, runs, dataset_ids, there, card_options)
    extra = eval_result_files(map(read_run, runs), dataset_ids) if dataset_ids else {}
    _refuse_leaks(folder, {CARD_FILE: card.content, **extra})
    report("loading the checkpoint in a fresh process, without this package")
    checked = check_folder(folder, exclude=exclude, timeout_s=timeout_s, device=device)
    contents = {CARD_FILE: card.content.encode(), **{name: text.encode() for name, text in extra.items()}}
    plan = _plan(repo_id, revision, checked, contents, there, card)
    for line in describe(plan, there.exists and there.has_revision, dry_run):
        report(line)
    if dry_run:
        return plan
    message = commit_message or "Push a Video-Panda checkpoint"
    done = _commit(api, plan, {**checked.files, **contents}, there, private, message)
    _keep_card(folder / CARD_FILE, card, report)
    report(f"pushed: {done.url}")
    return done


def _look(api: HfApi, repo_id: str, revision: str, private: bool) -> _Repository:
    """What the Hub has. Raises: ValueError, OSError."""
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:
            raise OSError(f"{repo_id}: the Hub does not let you in: log in (hf auth login) with a token") from error
        return _Repository(exists=False)
    except Exception as error:
        raise _one_line(error, f"{repo_id}: the Hub cannot be asked, nothing was pushed") from error
    if private and not info.private:
        raise ValueError(
            f"{repo_id} is there and is public, and a private one was asked for: make it private on the Hub first, or choose "
            "another name"
        )
    try:
        info = api.repo_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return _Repository(exists=True)
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return _Repository(exists=True, has_revision=True, head=info.sha, files=names)


def _compose(api: HfApi, folder: Path, repo_id, runs, dataset_ids, there: _Repository, options) -> ComposedCard:
    path = folder / CARD_FILE
    existing = path.read_text(encoding="utf-8-sig") if path.is_file() else None
    # Somebody may have written the card on the Hub's own pages; the folder's, if it was written here, gives way to it.
    if CARD_FILE in there.files and (existing is None or not is_written_by_hand(existing)):
        with tempfile.TemporaryDirectory() as scratch:
            remote = api.hf_hub_download(repo_id, CARD_FILE, revision=there.head, local_dir=scratch)
            remote_text = Path(remote).read_text(encoding="utf-8-sig")
        if is_written_by_hand(remote_text):
            existing = remote_text
    options = {"name": repo_id.split("/")[-1], "repo_id": repo_id, **options}
    return compose_card(folder, runs=runs, dataset_ids=dataset_ids, existing=existing, **options)


def _refuse_leaks(folder: Path, texts: Mapping[str, str]) -> None:
    own_paths = (str(folder.absolute()), str(Path.home()))
    own_paths = tuple(path for path in own_paths if len(Path(path).parts) > 2)
    problems = [Problem(name, leak) for name, text in texts.items() for leak in find_leaks(text, name, own_paths)]
    if problems:
        raise FolderProblemsError(folder, problems)


def _plan(repo_id, revision, checked: CheckedFolder, contents, there: _Repository, card: ComposedCard) -> Push:
    sizes = {name: path.stat().st_size for name, path in checked.files.items()}
    sizes |= {name: len(content) for name, content in contents.items()}
    stale = [name for name in there.files if any(fnmatch(name, pattern) for pattern in _WEIGHTS) and name not in sizes]
    return Push(repo_id, revision, dict(sorted(sizes.items())), checked.left_out, tuple(sorted(stale)), card.action)


def describe(plan: Push, is_update: bool, dry_run: bool) -> list[str]:
    """What a push is going to do, line by line."""
    width = max(map(len, plan.files), default=0)
    verb = "would go" if dry_run else "go"
    to = f"{plan.repo_id} (revision {plan.revision}{'' if is_update or dry_run else ', new'})"
    lines = [f"{len(plan.files)} files, {format_bytes(plan.num_bytes)}, {verb} to {to}:"]
    lines += [f"  {name:<{width}}  {format_bytes(size):>10}" for name, size in plan.files.items()]
    if plan.left_out:
        lines.append(f"left out: {', '.join(plan.left_out)}")
    if plan.removed:
        lines.append(f"weights of an earlier push, removed by the same commit: {', '.join(plan.removed)}")
    lines.append(f"{CARD_FILE}: {plan.card}")
    return lines


def _commit(api: HfApi, plan: Push, contents: Mapping, there: _Repository, private: bool, message: str) -> Push:
    """Make what is missing, and the one commit; on failure say what was made."""
    made = []
    try:
        if not there.exists:
            api.create_repo(plan.repo_id, private=private or None)  # None: as its owner's settings have it
            made.append(f"the repository {plan.repo_id}, which is empty")
        if not there.has_revision and plan.revision != MAIN:
            api.create_branch(plan.repo_id, branch=plan.revision)
            made.append(f"the branch {plan.revision}, which is a copy of {MAIN}")
        operations = [CommitOperationAdd(name, _source(contents[name])) for name in plan.files]
        operations += [CommitOperationDelete(name) for name in plan.removed]
        info = api.create_commit(
            plan.repo_id,
            operations,
            commit_message=message,
            revision=plan.revision,
            parent_commit=there.head,  # another push in the meantime is refused, not overwritten
        )
    except BaseException as error:
        state = f"; made was {' and '.join(made)}" if made else ""
        words = f"{plan.repo_id}: the Hub confirmed no commit, so that no file was pushed{state}. Give the same command again"
        if isinstance(error, Exception):
            raise _one_line(error, words) from error
        error.add_note(words)
        raise
    return replace(plan, commit=info.oid, url=info.commit_url)


def _source(content):
    return content if isinstance(content, bytes) else str(content)


def _one_line(error: Exception, words: str) -> Exception:
    """An error that the commands show in one line, whatever library raised it."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return OSError(f"{words} ({type(error).__name__}: {reason})")


def _keep_card(path: Path, card: ComposedCard, report: Callable[[str], None]) -> None:
    """Have the folder be what was pushed. What is pushed is pushed: that the disk refuses is no failure of it."""
    if path.is_file() and path.read_text(encoding="utf-8-sig") == card.content:
        return
    try:
        write_card_file(path, card.content)
    except OSError as error:
        report(f"the card is on the Hub, but could not be written to {path}: {error}")


def parse_dataset_ids(texts: Iterable[str]) -> dict[str, str]:
    """{"msvd-qa": "you/msvd-qa"} of ["msvd-qa=you/msvd-qa"]. Raises: ValueError."""
    pairs = [text.partition("=") for text in texts]
    for benchmark, sign, dataset in pairs:
        if not benchmark or dataset.count("/") != 1:
            raise ValueError(
                f"a dataset id must be given as BENCHMARK=OWNER/DATASET, got {benchmark + sign + dataset!r}"
            )
    return {benchmark: dataset for benchmark, _, dataset in pairs}


def read_latency(path: str | os.PathLike) -> list[dict]:
    """Measurements from a JSON file: a list of rows, each of column -> number or text. Raises: ValueError, OSError."""
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    is_table = isinstance(rows, list) and all(isinstance(row, dict) and row for row in rows)
    if not is_table or not all(isinstance(value, (str, int, float)) for row in rows for value in row.values()):
        raise ValueError(f'{path} must hold a list of rows such as {{"device": "H100", "ms": 41}}, got {rows!s:.80}')
    return rows
