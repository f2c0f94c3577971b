"""The comparison of runs: what stands in it, what it refuses, and that the same folders give the same bytes."""

import html.parser
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from video_panda.evaluation import published, report, report_plots
from video_panda.evaluation.judging import JudgeRow, JudgeTable
from video_panda.evaluation.published import parse_count, published_answers, published_conversations, published_mark
from video_panda.evaluation.questions import Question
from video_panda.evaluation.report import write_report
from video_panda.evaluation.report_runs import read_runs, short_names
from video_panda.evaluation.run_folder import RunFolder
from video_panda.evaluation.scores import Estimate, score

SHARED_FIGURES = Path(__file__).resolve().parents[2].parent / "shared" / "design" / "published_results.json"
GPT, QWEN = "gpt-3.5-turbo", "Qwen/Qwen2.5-7B-Instruct"
CRITERIA = ("correctness", "detail", "context", "temporal", "consistency")
EVIL = "</td><script>alert('$x_{$')</script>|`*_[a](javascript:b)&lt;"


def write_run(folder, benchmark="msvd-qa", kinds=("what", "who"), num_each=5, chance=None, num_left_out=0, **settings):
    """A run as `evaluate` leaves it, every third answer wrong; the settings are those of run.json, `about` in parts."""
    about = {
        "date": "2026-11-20",
        "num_parameters": 6_780_000_000,
        "num_visual_parameters": 45_070_000,
        "dtype": "bfloat16",
        "device": "cpu",
        "dataset_name": benchmark,
        "split": "test",
        "num_questions_full": None,
    } | settings.pop("about", {})
    questions = [
        Question(f"{kind}-{place}", f"{place}.mp4", "?", "red", kind) for kind in kinds for place in range(num_each)
    ]
    answers = ["blue" if place % 3 == 2 else "red" for place in range(len(questions))]
    found = {"model": "you/panda", "model_digest": "ab12cd34ef", "benchmark": benchmark, "questions_digest": "q1"}
    found |= {"num_questions": len(questions) + num_left_out, "max_new_tokens": 32, **settings, "about": about}
    run = RunFolder(folder, found)
    run.write_scores(score(questions, answers, chance, None, num_left_out))
    run.close()
    return folder


def add_judge(folder, judge=GPT, accuracy=0.646, kinds=("what", "who"), scores=3.75, num_judged=9, place="a", **about):
    """What a judge leaves in a run's folder; `scores`: one for all kinds, or one each."""
    scores = [scores] * len(kinds) if isinstance(scores, float) else scores
    share = None if accuracy is None else Estimate(accuracy, accuracy - 0.03, accuracy + 0.02)

    def row(kind, value):
        return JudgeRow(kind, num_judged, 1, 0, share, value and Estimate(value, value - 0.1, value + 0.1))

    own = folder / "judges" / place
    own.mkdir(parents=True)
    described = {
        "judge": judge,
        "backend": "openai",
        "base_url": "https://me:secret@judge.example/v1",
        "temperature": 0,
    }
    described |= {"templates": {"qa": "qa-1"}, "date": "2026-11-25", **about}
    table = JudgeTable(tuple(map(row, kinds, scores)), row("all", scores[0]), 1, 0, described)
    (own / "judge.json").write_text(json.dumps(described))
    (own / "scores.json").write_text(json.dumps(table.to_dict()))
    return folder


def write_all(folder) -> list[Path]:
    """Runs of every sort: judged once and twice, not judged, a part of a benchmark, five criteria, with chance."""
    first = add_judge(write_run(folder / "a" / "msvd", num_left_out=2, about={"num_questions_full": 13157}))
    add_judge(first, QWEN, 0.60, place="b", base_url=None, backend="transformers")
    second = write_run(folder / "b" / "msvd", model="runs/stage3/checkpoint-500", model_digest="ffee", num_each=4)
    chat = write_run(folder / "chat", "video-chatgpt", ("generic", "temporal", "consistency"))
    add_judge(chat, kinds=CRITERIA, accuracy=None, scores=[2.7, 2.4, 3.0, 2.2, 2.3])
    shapes = write_run(folder / "shapes", "shapes-qa", ("colour", "size"), chance={"colour": 1 / 6, "size": 0.5})
    return [first, second, chat, shapes]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report about `write_all`, and the figures that were drawn."""
    folder = tmp_path_factory.mktemp("report")
    figures, patch = [], pytest.MonkeyPatch()
    png = report_plots._png
    patch.setattr(report_plots, "_png", lambda figure: (figures.append(figure), png(figure))[1])
    paths = write_report(write_all(folder), folder / "report")
    patch.undo()
    return paths[0].parent, figures


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown text by title, a dict a row."""
    found, lines = {}, text.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("| ---"):
            names = lines[place - 1].strip("| ").split(" | ")
            rows = []
            for row in lines[place + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(names, row.removeprefix("| ").removesuffix(" |").split(" | "), strict=True)))
            found[lines[place - 3].removesuffix(":")] = rows
    return found


# --- published figures --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED_FIGURES.is_file(), reason=f"the published figures are not at {SHARED_FIGURES}")
def test_the_published_figures_are_those_of_the_paper():
    shared, own = json.loads(SHARED_FIGURES.read_text()), published.published_results()
    table = "table_1_open_ended_video_qa"
    assert own[table] == [{name: row[name] for name in own[table][0]} for row in shared[table]]
    assert own["table_2_video_chatgpt_benchmark"] == shared["table_2_video_chatgpt_benchmark"]
    assert own["paper"] in shared["source"]
    assert own["judge"] in shared["source"]


def test_published_figures_are_read():
    own = published_answers("MSVD-QA")[-1]
    assert (own.model, own.num_visual_parameters, own.accuracy, own.score) == (
        "Video-Panda (the paper's)",
        45_000_000,
        64.7,
        3.8,
    )
    assert published_answers("TGIF-QA")[0].accuracy is None
    assert published_answers("ShapesQA") == []
    for row in published_conversations():
        assert tuple(row.scores) == CRITERIA
        # One row of the paper does not add up; the report says so.
        if row.model != "Video-LLaVA":
            assert row.average == pytest.approx(sum(row.scores.values()) / 5, abs=0.0051)
    assert [parse_count(text) for text in ("404.3M", "1.2B", "52K")] == [404_300_000, 1_200_000_000, 52_000]
    with pytest.raises(ValueError, match="got the count '45'"):
        parse_count("45")


# --- what stands in it --------------------------------------------------------------------------------------------------


def test_every_row_says_whether_it_was_measured(written):
    found = tables((written[0] / "report.md").read_text())
    rows = [row for rows in found.values() for row in rows if "source" in row]
    assert {row["source"] for row in rows} == {"**measured**", published_mark()}
    assert published_mark() == "published (GPT-3.5 judged, arXiv 2412.18609)"
    for row in rows:
        assert (row["run"] != "") == (row["source"] == "**measured**")
    without = [rows for title, rows in found.items() if title.endswith("without a judge")]
    assert len(without) == 3
    assert {row["source"] for rows in without for row in rows} == {"**measured**"}, (
        "GPT-3.5's accuracies are no matches"
    )


def test_measured_rows_hold_model_dates_judge_counts_and_intervals(written):
    found = tables((written[0] / "report.md").read_text())
    judged = found["MSVD-QA, accuracy and score of a judge"]
    measured = [row for row in judged if row["source"] == "**measured**"]
    assert [row["judge"] for row in measured] == [f"{QWEN} (2026-11-25)", f"{GPT} (2026-11-25)"]
    row = measured[1]
    assert (row["model"], row["date"], row["visual parameters"]) == ("you/panda", "2026-11-20", "45.07 M")
    assert (row["questions"], row["left out"], row["unparsed"], row["no reply"]) == ("10 of 13157", "2", "1", "0")
    assert row["judged accuracy % (95%)"] == "64.6 (61.6 to 66.6)"
    assert row["score 0 to 5 (95%)"] == "3.75 (3.65 to 3.85)"
    assert [row["judged accuracy % (95%)"] for row in judged[2:]] == [
        f"{own.accuracy:.1f}" for own in published_answers("MSVD-QA")
    ]
    first, second = found["MSVD-QA, accuracy without a judge"]
    assert first["exact match % (95%)"].startswith("70.0 (")
    assert (first["contains the truth % (95%)"], first["token F1 % (95%)"]) == (first["exact match % (95%)"],) * 2
    assert (second["model"], second["questions"]) == ("stage3/checkpoint-500", "8 of 13157"), "as the benchmark knows"


def test_conversations_stand_beside_table_2(written):
    rows = tables((written[0] / "report.md").read_text())["Scores of a judge, 0 to 5 (95%)"]
    assert [rows[0][name] for name in ("correctness", "average")] == ["2.70 (2.60 to 2.80)", "2.52"]
    assert [row["average"] for row in rows[1:]] == [f"{row.average:.2f}" for row in published_conversations()]
    text = (written[0] / "report.md").read_text()
    assert "That of Video-LLaVA is copied as it is, 2.81; the mean of its five scores is 2.83." in text
    assert text.count("is copied as it is") == 1


def test_kinds_stand_beside_chance(written):
    found = tables((written[0] / "report.md").read_text())
    (title,) = [title for title in found if title.startswith("ShapesQA, exact match by kind")]
    assert [(row["kind"], row["chance %"]) for row in found[title]] == [
        ("colour", "16.7"),
        ("size", "50.0"),
        ("all", "33.3"),
    ]
    assert found[title][2]["measured: run 4, you/panda"].endswith(", n = 10")


def test_what_is_not_in_the_plot_and_what_does_not_compare_is_said(written):
    text = (written[0] / "report.md").read_text()
    assert "- Run 2 (stage3/checkpoint-500, MSVD-QA) is not in the plot: no judge has judged it" in text
    assert "Not all of these runs were asked, or have answered, the same questions" in text
    assert "secret" not in text, "an address may hold a password"
    assert "judge.example" in text


def test_judges_that_are_not_done_are_said(tmp_path):
    run = add_judge(write_run(tmp_path / "run"), num_judged=7)
    (run / "judges" / "z").mkdir()
    (run / "judges" / "z" / "judge.json").write_text(json.dumps({"judge": "slow"}))
    text = write_report([run], tmp_path / "report", draw_plots=False)[0].read_text()
    assert f"- Run 1: {GPT} was asked about 8 answers of 10; run the evaluate command with that judge again." in text
    assert "- Run 1: slow has not finished judging" in text


def test_folders_of_older_versions(tmp_path):
    run = write_run(tmp_path / "run", "shapes-qa")
    settings, scores = (json.loads((run / f"{name}.json").read_text()) for name in ("run", "scores"))
    for name in ("about", "model_digest", "questions_digest"):
        del settings[name]
    del scores["num_left_out"]
    for row in (*scores["rows"], scores["total"]):
        del row["containment"], row["token_f1"]
    (run / "run.json").write_text(json.dumps(settings))
    (run / "scores.json").write_text(json.dumps(scores))
    found = tables(write_report([run], tmp_path / "report", draw_plots=False)[0].read_text())
    assert found["What was measured"][0]["visual parameters"] == "unknown"
    row = found["ShapesQA, accuracy without a judge"][0]
    assert (row["date"], row["token F1 % (95%)"], row["left out"]) == ("unknown", "", "0")


def test_names_are_as_short_as_they_can_be():
    assert short_names(["/x/a/run", "/x/b/run", "/x/c"]) == ["a/run", "b/run", "c"]
    assert short_names(["./checkpoint", "you/panda", "/long/way/runs/3"], 2) == ["checkpoint", "you/panda", "runs/3"]
    assert short_names(["a", "./a"]) == ["a", "./a"]


def test_other_weights_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / digest, model_digest=digest) for digest in ("aaaa0000ff", "bbbb0000ff")]
    assert [run.model for run in read_runs(runs)] == ["you/panda (aaaa0000)", "you/panda (bbbb0000)"]


# --- plots --------------------------------------------------------------------------------------------------------------


def test_published_marks_are_hollow_and_measured_ones_are_stars(written):
    (axes,) = written[1][0].axes
    marks = [line for line in axes.lines if line.get_marker() not in ("None", None, "", "_", "|")]
    published_ones = [line for line in marks if line.get_marker() in ("o", "s")]
    measured = [line for line in marks if line not in published_ones]
    assert len(published_ones) == len(published_answers("MSVD-QA"))
    assert {line.get_markerfacecolor() for line in published_ones} == {"white"}
    assert sorted(line.get_ydata()[0] for line in measured) == pytest.approx([60.0, 64.6])
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in measured}) == 2
    assert min(line.get_zorder() for line in published_ones) > max(line.get_zorder() for line in measured)
    texts = [text.get_text() for text in written[1][0].legends[0].get_texts()]
    assert [text.split(" ")[0] for text in texts] == ["published", "published", "measured:", "measured:"]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("accuracies", [(0.646, 0.647), (0.60, 0.605, 0.7, 0.55, 0.62)], ids=str)
def test_labels_do_not_touch(accuracies, monkeypatch):
    figures = []
    monkeypatch.setattr(report_plots, "_png", figures.append)
    points = [
        report_plots.Measured(45_000_000, Estimate(share, share - 0.01, share + 0.01), f"run {n}", f"model {n}")
        for n, share in enumerate(accuracies)
    ]
    titles = ("MSVD-QA", "MSRVTT-QA", "TGIF-QA", "ActivityNet-QA")
    report_plots.draw_accuracy([report_plots.Panel(title, published_answers(title), points) for title in titles])
    renderer = figures[0].canvas.get_renderer()
    assert len(figures[0].axes) == len(titles)
    for axes, title in zip(figures[0].axes, titles):
        texts = [text for text in axes.texts if text.get_text()]
        num_published = sum(row.accuracy is not None for row in published_answers(title))
        assert len(texts) == num_published + len(points)
        boxes = [text.get_window_extent(renderer) for text in texts]
        for place, box in enumerate(boxes):
            assert not [texts[n].get_text() for n, other in enumerate(boxes[:place]) if box.overlaps(other)]
            assert axes.get_window_extent(renderer).contains(box.x0, box.y0)
            assert axes.get_window_extent(renderer).contains(box.x1, box.y1)


def test_pictures_are_fit_for_print(written):
    pictures = sorted(path.name for path in written[0].glob("*.png"))
    assert pictures == [
        "accuracy-by-visual-parameters.png",
        "msvd-qa-judged-kinds.png",
        "msvd-qa-kinds.png",
        "shapes-qa-kinds.png",
        "video-chatgpt-criteria.png",
    ]
    for name in pictures:
        with Image.open(written[0] / name) as image:
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert "Software" not in image.info, "another version of matplotlib is no other report"
        assert f"]({name})" in (written[0] / "report.md").read_text()


def test_bars_differ_in_hatching_and_stand_beside_chance(written):
    axes = next(f.axes[0] for f in written[1] if f.axes[0].get_title(loc="left").startswith("MSVD-QA: exact match"))
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    shapes = next(f.axes[0] for f in written[1] if f.axes[0].get_title(loc="left").startswith("ShapesQA"))
    chances = next(own for own in reversed(shapes.collections) if own.get_label() == "chance")
    assert [float(own[0, 0]) for own in chances.get_segments()] == pytest.approx([100 / 6, 50, 100 / 3])


def test_a_chart_needs_all_five_scores(tmp_path):
    chat = write_run(tmp_path / "chat", "video-chatgpt", ("generic", "temporal", "consistency"))
    add_judge(chat, kinds=CRITERIA, accuracy=None, scores=[2.7, 2.4, 3.0, None, 2.3])
    paths = write_report([chat], tmp_path / "report")
    assert [path.name for path in paths] == ["report.md", "report.html"]
    text = paths[0].read_text()
    assert f"- Run 1 is not in the chart: {GPT} has no score of temporal." in text
    assert "Nothing is drawn: no plot applies to these runs." in text


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'video-panda\[report\]'"):
        write_report([run], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    text = write_report([run], tmp_path / "report", draw_plots=False)[0].read_text()
    assert "Nothing is drawn: plots were not asked for." in text


# --- the files ----------------------------------------------------------------------------------------------------------


def test_the_same_folders_give_the_same_bytes(written, tmp_path, monkeypatch):
    import matplotlib

    # Neither the user's settings nor the current folder, nor an earlier report, make a difference.
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    runs = write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        paths = write_report([run.relative_to(tmp_path) for run in runs], "report")
    assert sorted(os.listdir("report")) == sorted(os.listdir(written[0])) == sorted(path.name for path in paths)
    for path in paths:
        assert path.read_bytes() == (written[0] / path.name).read_bytes(), path.name
    assert matplotlib.rcParams["font.size"] == 20


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text, of an HTML page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_html_file_holds_everything_and_loads_nothing(written):
    page = Page((written[0] / "report.html").read_text())
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "a")]
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert [source.split(",")[0] for source in sources] == ["data:image/png;base64"] * 5
    assert all(attrs["alt"] and int(attrs["width"]) > 300 for tag, attrs in page.tags if tag == "img")
    assert not [attrs for _, attrs in page.tags if "href" in attrs or "onload" in attrs]
    num_rows = sum(len(rows) for rows in tables((written[0] / "report.md").read_text()).values())
    num_tables = sum(tag == "table" for tag, _ in page.tags)
    assert sum(tag == "tr" for tag, _ in page.tags) == num_rows + num_tables
    assert "64.6 (61.6 to 66.6)" in page.text


def test_what_comes_from_files_stays_text(tmp_path):
    kinds = (EVIL, "who\nx")
    run = write_run(tmp_path / "run", "own <b>", kinds, model=EVIL, prompt=f"{EVIL} {{question}}\ud800")
    add_judge(run, EVIL, kinds=kinds)
    markdown, page, *pictures = write_report([run], tmp_path / "report")
    assert [path.name for path in pictures] == ["own-b-kinds.png", "own-b-judged-kinds.png"]
    clean = Page(write_report([write_run(tmp_path / "clean")], tmp_path / "other", draw_plots=False)[1].read_text())
    found = Page(page.read_text())
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in clean.tags} | {"figure", "img", "figcaption"}
    assert EVIL in found.text
    markdown_it = pytest.importorskip("markdown_it")
    rendered = Page(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown.read_text()))
    assert EVIL in rendered.text
    assert not {tag for tag, _ in rendered.tags} & {"script", "a", "code", "em", "b"}
    assert len(
        {len(line.replace(r"\|", "").split("|")) for line in markdown.read_text().splitlines() if EVIL[:3] in line}
    )


def test_nothing_is_half_written(written, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in write_report([run], tmp_path / "report", draw_plots=False)}
    whole, count = report.write_whole, iter(range(9))

    def full_disk(*args):
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        whole(*args)

    monkeypatch.setattr(report, "write_whole", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report([add_judge(run)], tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_a_destination_that_cannot_be(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is a file; expected a folder for the report"):
        write_report([run], tmp_path / "file", draw_plots=False)
    (tmp_path / "report" / "report.md").mkdir(parents=True)
    with pytest.raises(OSError, match=r"report\.md is a folder"):
        write_report([run], tmp_path / "report", draw_plots=False)
    with pytest.raises(OSError, match="Not a directory"):
        write_report([run], tmp_path / "file" / "report", draw_plots=False)


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_folders_that_are_no_complete_run(tmp_path):
    run = write_run(tmp_path / "results" / "run")
    with pytest.raises(ValueError, match="there are no folders of runs"):
        read_runs([])
    with pytest.raises(
        ValueError, match=r"nothing: there is no such folder; expected the output of `video-panda evaluate`"
    ):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(
        ValueError, match=r"results is no folder of a run: it has no run\.json.*there are runs in it: .*run$"
    ):
        read_runs([run, tmp_path / "results"])
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ValueError, match=r"link and .*run are the same folder; give each run once"):
        read_runs([run, tmp_path / "link"])
    (run / "scores.json").unlink()
    with pytest.raises(ValueError, match=r"run has no scores\.json: the run is not finished\. Run the same"):
        read_runs([run])


BROKEN = {
    "not json": ("run.json", None, "{", r"run\.json: not JSON"),
    "not utf-8": ("scores.json", None, "\udcff", r"scores\.json: not JSON"),
    "a list": ("judges/a/scores.json", None, "[]", r"a/scores\.json: expected a JSON object, got list"),
    "no model": ("run.json", ("model",), None, r"run\.json: model is None, expected a text"),
    "about": ("run.json", ("about",), 3, r"run\.json: about is 3, expected an object"),
    "parameters": (
        "run.json",
        ("about", "num_visual_parameters"),
        1.5,
        r"num_visual_parameters is 1\.5, expected a whole",
    ),
    "too many": (
        "run.json",
        ("about", "num_visual_parameters"),
        10**400,
        r"num_visual_parameters is 10+, expected a whole",
    ),
    "counts": ("run.json", ("num_questions",), 11, r"scores\.json: 10 questions are scored or left out, .* 11"),
    "no rows": ("scores.json", ("rows",), None, r"scores\.json: expected `rows`, a list of objects"),
    "share": (
        "scores.json",
        ("total", "accuracy"),
        64.7,
        r"scores\.json, total: accuracy is 64\.7, expected a number from 0",
    ),
    "nan": ("scores.json", ("total", "high"), float("nan"), r"total: high is nan, expected a number"),
    "true": ("scores.json", ("rows", 0, "low"), True, r"row 'what': low is True, expected a number"),
    "right": (
        "scores.json",
        ("rows", 1, "num_correct"),
        6,
        r"row 'who': num_correct is 6, expected a whole number from 0 to 5",
    ),
    "order": (
        "scores.json",
        ("total", "low"),
        1,
        r"the interval of accuracy is 1\.0 to .*, expected the lower end first",
    ),
    "part": ("scores.json", ("total", "token_f1", "value"), -1, r"total, token_f1: value is -1, expected"),
    "twice": ("scores.json", ("rows", 1, "kind"), "what", r"several rows of the kind 'what', expected one"),
    "score": (
        "judges/a/scores.json",
        ("total", "score", "high"),
        5.5,
        r"a/scores\.json, total, score: high is 5\.5, .* to 5",
    ),
    "judge": ("judges/a/judge.json", ("judge",), 7, r"a/judge\.json: judge is 7, expected a text"),
    "templates": ("judges/a/judge.json", ("templates",), "qa", r"templates is 'qa', expected an object"),
}


@pytest.mark.parametrize(("name", "path", "value", "message"), BROKEN.values(), ids=BROKEN)
def test_files_that_cannot_be_are_named(name, path, value, message, tmp_path):
    run = add_judge(write_run(tmp_path / "run"))
    if path is None:
        (run / name).write_bytes(value.encode(errors="surrogateescape"))
    else:
        content = place = json.loads((run / name).read_text())
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        (run / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        write_report([run], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_scores_of_an_unknown_judge(tmp_path):
    run = add_judge(write_run(tmp_path / "run"))
    (run / "judges" / "a" / "judge.json").unlink()
    with pytest.raises(ValueError, match=r"judges/a has scores and no judge\.json: it is not known who judged"):
        read_runs([run])
