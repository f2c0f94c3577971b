"""Has answers judged. Every verdict is kept, with prompt and raw reply, in a folder of the run:

judges/NAME/judge.json       which judge, templates and date
judges/NAME/verdicts.jsonl   one line a verdict; asked once for the same content, so that an interrupted judge goes on
judges/NAME/scores.json      accuracies, scores and intervals by kind, and what could not be judged
judges/NAME/scores.md        the same as a table
"""

import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from .benchmark import Benchmark
from .files import append_synced, lock, read_object, read_objects, write_whole
from .judge_items import JudgeItem, Verdict
from .judge_replies import UnparsedReplyError, parse_reply
from .judge_templates import TEMPLATES
from .judges import Judge, Reply
from .run_folder import ANSWERS_FILE, RUN_FILE, read_answers
from .scores import Estimate

JUDGES_FOLDER = "judges"
JUDGE_FILE, VERDICTS_FILE, SCORES_FILE, TABLE_FILE = "judge.json", "verdicts.jsonl", "scores.json", "scores.md"


@dataclass(frozen=True)
class JudgeRow:
    """What a judge found about one kind of answers.

    Attributes:
        kind: of question or criterion; "all" for the whole.
        num_judged: answers with a verdict; only these count below.
        num_unparsed: replies from which no verdict could be read.
        num_failed: requests that got no reply; the next call tries them again.
        accuracy: share of answers that mean the truth; None where there is no such verdict.
        score: mean, 0 to 5; None where nothing was judged.
    """

    kind: str
    num_judged: int
    num_unparsed: int
    num_failed: int
    accuracy: Estimate | None
    score: Estimate | None


@dataclass(frozen=True)
class JudgeTable:
    """What a judge found.

    Attributes:
        rows: one for each kind.
        total: over all; for scores on different criteria, their mean.
        num_unparsed, num_failed: over all.
        judge: which one, with templates and date.
    """

    rows: tuple[JudgeRow, ...]
    total: JudgeRow
    num_unparsed: int
    num_failed: int
    judge: dict

    def __getitem__(self, kind: str) -> JudgeRow:
        for row in (*self.rows, self.total):
            if row.kind == kind:
                return row
        raise KeyError(f"nothing of kind {kind!r} was judged; there are {[row.kind for row in self.rows]}")

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "judge"}

    def to_markdown(self) -> str:
        """A table by kind: accuracy in percent and score from 0 to 5 with their 95% intervals, and what is not in them."""
        lines = [
            "| kind | judged | accuracy % | 95% interval | score (0-5) | 95% interval | unparsed | no reply |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in (*self.rows, self.total):
            cells = [*_cells(row.accuracy, 100, 1), *_cells(row.score, 1, 2)]
            lines.append(
                f"| {row.kind} | {row.num_judged} | {' | '.join(cells)} | {row.num_unparsed} | {row.num_failed} |"
            )
        return "\n".join([*lines, "", f"Judge: {describe_judge(self.judge)}"])

    def __str__(self) -> str:
        return self.to_markdown()


def _cells(estimate: Estimate | None, factor: int, digits: int) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    value, low, high = (f"{factor * number:.{digits}f}" for number in (estimate.value, estimate.low, estimate.high))
    return value, f"{low} to {high}"


def describe_judge(judge: dict) -> str:
    """A judge in a line: scores by another one, or asked in other words, are not to be compared with these."""
    place = f" at {judge['base_url']}" if judge["base_url"] else ""
    return f"{judge['judge']}{place}, templates {', '.join(judge['templates'].values())}, {judge['date']}"


def judge_run(
    run_folder: str | os.PathLike, benchmark: Benchmark, judge: Judge, *, show_progress: bool | None = None
) -> JudgeTable:
    """Have the answers of a run judged; verdicts that are there are not asked for again.

    Args:
        run_folder: where `evaluate` has put all answers.
        benchmark: the one of the run.
        judge: `OpenAIJudge` or `TransformersJudge`.
        show_progress: whether to show a bar; None: on a terminal.

    Returns:
        Accuracies and scores; replies that say nothing are counted, and in no mean.

    Raises:
        ValueError: the run is another benchmark's, or not complete; another process judges it.
        JudgeUnreachableError: the judge does not answer. Verdicts so far are kept: call again.
    """
    run_folder = Path(run_folder)
    items = benchmark.judge_items(_texts(run_folder, benchmark))
    if not items:
        raise ValueError(f"{run_folder} has no answers to judge")
    identity = judge.identity
    folder = run_folder / JUDGES_FOLDER / _folder_name(identity)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        about = {
            **identity,
            "templates": {item.criterion: TEMPLATES[item.criterion].version for item in items},
            "date": datetime.date.today().isoformat(),
        }
        if (folder / JUDGE_FILE).exists():
            about["date"] = read_object(folder / JUDGE_FILE).get("date", about["date"])
        write_whole(folder / JUDGE_FILE, json.dumps(about, indent=2))
        verdicts = _Verdicts(folder / VERDICTS_FILE, identity)
        verdicts.ask(items, judge, show_progress)
        table = _table(items, verdicts, benchmark.criteria or benchmark.kinds, about)
        write_whole(folder / SCORES_FILE, json.dumps(table.to_dict(), indent=2))
        write_whole(folder / TABLE_FILE, table.to_markdown() + "\n")
    return table


def _texts(run_folder: Path, benchmark: Benchmark) -> dict[str, str]:
    """The answers of a run by question, those without one left out."""
    if not (run_folder / RUN_FILE).exists():
        raise ValueError(f"{run_folder} is no folder of a run: it has no {RUN_FILE}")
    name = read_object(run_folder / RUN_FILE).get("benchmark")
    if name != benchmark.name:
        raise ValueError(f"{run_folder} holds a run of {name!r}, not of {benchmark.name!r}")
    answers = read_answers([run_folder / ANSWERS_FILE])
    missing = set(benchmark.missing_videos())
    open_ids = [q.id for q in benchmark.questions if q.id not in answers and q.video not in missing]
    if open_ids:
        raise ValueError(
            f"{run_folder}: {len(open_ids)} questions are not answered yet, the first is {open_ids[0]}: evaluate first"
        )
    return {name: answer.text for name, answer in answers.items() if answer.text is not None}


def _folder_name(identity: dict) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9.]+', '-', identity['judge']).strip('-.')[-60:]}-{digest[:6]}"


class _Verdicts:
    """The verdicts that are there, by content: what was asked, in which words, of which judge."""

    def __init__(self, path: Path, identity: dict):
        self.path, self.identity = path, identity
        self.by_key: dict[str, Verdict | None] = {}
        for number, line in read_objects(path):
            if not {"key", "verdict"} <= set(line):
                raise ValueError(f"{path}, line {number}: expected `key` and `verdict`, got {list(line)}")
            self.by_key[line["key"]] = None if line["verdict"] is None else Verdict(**line["verdict"])

    def key_of(self, item: JudgeItem) -> str:
        template = TEMPLATES[item.criterion]
        content = [self.identity, template.version, template.messages(item)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def ask(self, items: Iterable[JudgeItem], judge: Judge, show_progress: bool | None) -> None:
        """Have those judged that are not; each group of replies is on the disk before the next."""
        missing = {key: item for item in items if (key := self.key_of(item)) not in self.by_key}
        keys, asked = list(missing), list(missing.values())
        prompts = [TEMPLATES[item.criterion].messages(item) for item in asked]
        disable = None if show_progress is None else not show_progress
        with tqdm(total=len(asked), desc="verdicts", unit="verdict", disable=disable, leave=False) as bar:
            for group in judge.reply_all(prompts):
                lines = []
                for place, reply in group:
                    if reply.text is not None:
                        self.by_key[keys[place]], line = _read(asked[place], reply)
                        lines.append({"key": keys[place], **line, "messages": prompts[place]})
                append_synced(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                bar.update(len(group))


def _read(item: JudgeItem, reply: Reply) -> tuple[Verdict | None, dict]:
    """The verdict in a reply, and what is kept of it."""
    template = TEMPLATES[item.criterion]
    line = {"id": item.id, "criterion": item.criterion, "template": template.version, "model": reply.model}
    line |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "reply": reply.text}
    try:
        verdict = parse_reply(reply.text, template.has_verdict)
    except UnparsedReplyError as error:
        return None, {**line, "verdict": None, "unparsed": str(error)}
    return verdict, {**line, "verdict": asdict(verdict)}


def _table(items: Sequence[JudgeItem], verdicts: _Verdicts, kinds: Sequence[str], about: dict) -> JudgeTable:
    keys = [verdicts.key_of(item) for item in items]
    asked = list(dict.fromkeys(item.kind for item in items))
    groups = {kind: [(i, k) for i, k in zip(items, keys) if i.kind == kind] for kind in kinds or asked if kind in asked}
    rows = tuple(_row(kind, group, verdicts) for kind, group in groups.items())
    total = _row("all", list(zip(items, keys)), verdicts)
    return JudgeTable(rows, total, total.num_unparsed, total.num_failed, about)


def _row(kind: str, group: Sequence[tuple[JudgeItem, str]], verdicts: _Verdicts) -> JudgeRow:
    found = [(item.video, verdicts.by_key.get(key)) for item, key in group]
    judged = [(video, verdict) for video, verdict in found if verdict is not None]
    num_failed = sum(key not in verdicts.by_key for _, key in group)
    videos = [video for video, _ in judged]
    has_verdict = bool(judged) and all(verdict.is_correct is not None for _, verdict in judged)
    return JudgeRow(
        kind,
        len(judged),
        len(found) - len(judged) - num_failed,
        num_failed,
        Estimate.of(videos, [float(verdict.is_correct) for _, verdict in judged]) if has_verdict else None,
        Estimate.of(videos, [verdict.score for _, verdict in judged]) if judged else None,
    )
