"""The plugin for lmms-eval: its model and its tasks.

Most tests put a stand-in in the place of lmms-eval. Where that is installed, the stand-in is compared with it, and its own
evaluator runs the plugin.
"""

import configparser
import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from clips import barcode_frame, read_barcodes, truncate, write_audio, write_clip
from lmms_eval_stand_in import (
    STAND_IN,
    ConfigurableMessagesTask,
    GenerationResult,
    Instance,
    ModelManifest,
    TokenCounts,
    lmms,
)
from miniatures import write_zero_shot_qa
from PIL import Image
from tiny import write_tiny_checkpoint

from video_panda import ask, cli, evaluate
from video_panda.evaluation import lmms_eval_requests, lmms_tasks
from video_panda.evaluation.benchmarks import open_benchmark
from video_panda.evaluation.lmms_eval_requests import Clip, conversation_of, cut_at, generation_options
from video_panda.evaluation.unreadable import TooManyUnreadableError

ROOT = Path(__file__).parents[2]
TASKS_DIR = Path(*lmms_tasks.__path__)
TASKS = {"msvd_qa": "msvd-qa", "msrvtt_qa": "msrvtt-qa", "tgif_qa": "tgif-qa"}
MODEL_MODULE = "video_panda.evaluation.lmms_eval_model"
TASK_MODULE = "video_panda.evaluation.lmms_tasks.zero_shot_qa"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "temperature": 0.0, "until": ["\n\n"]}
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (extra `eval`)"
)


@pytest.fixture(scope="module")
def engine():
    """Modules of the plugin by name, imported beside the stand-in; afterwards everything is as it was."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for name, members in STAND_IN.items():
            module = types.ModuleType(name)
            for member in members:
                setattr(module, member.__name__, member)
            patch.setitem(sys.modules, name, module)
        for name in (MODEL_MODULE, TASK_MODULE):
            patch.delitem(sys.modules, name, raising=False)
        loaded = {name: importlib.import_module(name) for name in (MODEL_MODULE, TASK_MODULE)}
        yield loaded
        for name in loaded:
            patch.delitem(sys.modules, name)


@needs_lmms_eval
def test_the_stand_in_is_like_lmms_eval():
    real = {
        member.__name__: getattr(importlib.import_module(name), member.__name__)
        for name, members in STAND_IN.items()
        for member in members
    }
    for own in (TokenCounts, GenerationResult, ModelManifest):
        assert [field.name for field in dataclasses.fields(real[own.__name__])] == [
            field.name for field in dataclasses.fields(own)
        ]
    assert {field.name for field in dataclasses.fields(Instance)} <= {
        field.name for field in dataclasses.fields(real["Instance"])
    }
    assert real["Instance"]("generate_until", (1, 2), 0, {"task": "t", "doc_id": 0, "repeats": 1}).args == (1, 2)
    assert real["lmms"].__abstractmethods__ == lmms.__abstractmethods__
    assert list(inspect.signature(real["lmms"].__init__).parameters) == ["self"]

    class Real(real["lmms"]):
        loglikelihood = generate_until = generate_until_multi_round = None

    class Own(lmms):
        loglikelihood = generate_until = generate_until_multi_round = None

    assert set(vars(Own())) == set(vars(Real()))
    assert (Real().rank, Real().world_size, Real.is_simple) == (Own().rank, Own().world_size, Own.is_simple)
    task = real["ConfigurableMessagesTask"]
    assert list(inspect.signature(task).parameters) == list(inspect.signature(ConfigurableMessagesTask).parameters)
    visuals = [{"type": "video", "url": "a.gif"}]
    turn = ConfigurableMessagesTask._build_user_turn(visuals, "What?")
    assert task._build_user_turn(visuals, "What?") == turn
    # Why a GIF is called a video by our tasks, and why the model takes some pictures and sounds for videos.
    assert [task._visual_to_content(f"a.{suffix}")["type"] for suffix in ("gif", "webm", "mp4")] == [
        "image",
        "audio",
        "video",
    ]
    from lmms_eval.protocol import ChatMessages

    assert ChatMessages(messages=turn).messages[0].content[0].url == "a.gif"


# What is asked, without a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "until"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}, ()),
        (GREEDY, {"max_new_tokens": 8, "do_sample": False}, ()),
        (
            {"temperature": 0.7, "top_p": 0.9, "until": "USER:"},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
            ("USER:",),
        ),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 1024, "do_sample": False}, ()),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": False}, ()),
        ({"do_sample": True, "top_k": None}, {"max_new_tokens": 1024, "do_sample": True}, ()),
        (
            {"num_beams": 3, "image_aspect_ratio": "original", "until": ["", "a", "b"]},
            {"max_new_tokens": 1024, "do_sample": False, "num_beams": 3},
            ("a", "b"),
        ),
    ],
)
def test_options_of_generation(given, options, until):
    assert generation_options(given) == (options, until)


def test_options_of_other_models_are_logged(caplog):
    with caplog.at_level("INFO", logger=lmms_eval_requests.__name__):
        generation_options({"image_aspect_ratio": "original", "top_p": 1.0})
    assert "image_aspect_ratio" in caplog.text
    assert "top_p" not in caplog.text


def test_an_answer_ends_at_its_first_stop_word():
    assert cut_at(" red ball USER: no ASSISTANT: yes", ("ASSISTANT:", "USER:")) == "red ball"
    assert cut_at(" red\n", ()) == "red"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "text", "text": "<video>"}, {"type": "text", "text": "<video>"}),
        ({"type": "video", "url": "a.mp4"}, {"type": "video", "video": Clip("a.mp4")}),
        ({"type": "video", "url": Path("a.mp4")}, {"type": "video", "video": Clip("a.mp4")}),
        ({"type": "video", "url": "a", "start_time": 1.0, "end_time": 2.5}, {"video": Clip("a", 1.0, 2.5)}),
        ({"type": "video", "url": {"path": "a", "video_start": 1, "video_end": 2}}, {"video": Clip("a", 1, 2)}),
        ({"type": "video", "url": {"bytes": b"x", "path": "a"}}, {"video": Clip(b"x")}),
        ({"type": "audio", "url": "a.webm"}, {"type": "video", "video": Clip("a.webm")}),
        ({"type": "image", "url": "a.GIF"}, {"type": "video", "video": Clip("a.GIF")}),
        ({"type": "image", "url": "a.png"}, {"type": "image", "image": "picture a.png"}),
        ({"type": "image", "url": {"bytes": None, "path": "a.png"}}, {"type": "image", "image": "picture a.png"}),
    ],
)
def test_content(part, expected):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [part]}]
    system, user = conversation_of(messages, lambda clip: clip, lambda source: f"picture {source}")
    assert system == {"role": "system", "content": "Be short."}
    assert {name: user["content"][0][name] for name in expected} == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "expected a list of messages"),
        ([{"content": "a"}], "message 0: expected `role` and `content`"),
        ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "'a.wav'.*does not hear"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "'smell', expected text, image or video"),
        ([{"role": "user", "content": [{"type": "video", "url": [1, 2]}]}], "is a list, expected a path"),
    ],
)
def test_what_cannot_be_shown(messages, expected):
    with pytest.raises(ValueError, match=expected):
        conversation_of(messages, None, None)


# The model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(engine):
    """The demonstration model, which answers sensibly."""
    return make_chat(engine)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "long.mp4", num_frames=100, fps=25)
    write_clip(folder / "short.mp4", num_frames=10, fps=25)
    Image.fromarray(barcode_frame(3)).save(folder / "photo.png")
    truncate(folder / "long.mp4", folder / "cut.mp4", 0.05)
    write_audio(folder / "sound.mp4")
    return folder


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder


def make_chat(engine, **options):
    options = {"pretrained": str(cli.DEFAULT_MODEL), "dtype": "float32", "device": "cpu", "batch_size": "4", **options}
    return engine[MODEL_MODULE].VideoPandaChat(**options)


def answers_of(chat, contents, gen_kwargs=GREEDY):
    """Texts and numbers of tokens for user turns of these contents."""
    chat.task_dict = {"quiz": {"test": list(contents)}}
    requests = [
        Instance("generate_until", ("text", user_turn, gen_kwargs, number, "quiz", "test"), 0)
        for number in range(len(contents))
    ]
    return [(found.text, found.token_counts) for found in chat.generate_until(requests)]


def user_turn(content):
    return [{"role": "user", "content": content}]


def question(text, *media):
    kinds = {".mp4": "video", ".png": "image"}
    return [*({"type": kinds[path.suffix], "url": str(path)} for path in media), {"type": "text", "text": text}]


def test_the_answers_are_those_of_ask(chat, media):
    found = answers_of(chat, [question("Which colour does the object have?", media / "long.mp4")])
    model, processor = (
        cli.load_model(str(cli.DEFAULT_MODEL), "float32", "cpu"),
        cli.load_processor(str(cli.DEFAULT_MODEL)),
    )
    expected = ask(media / "long.mp4", "Which colour does the object have?", model, processor=processor)
    assert found[0][0] == expected["answer"]
    assert len(found[0][0]) > 0


def test_clips_pictures_and_text_in_one_batch(engine, chat, media):
    contents = [
        question("What size is the object?", media / "long.mp4"),
        question("What size is the object?", media / "photo.png"),
        question("What size is it?"),
        question("Which is larger?", media / "short.mp4", media / "photo.png"),
        question("And here?", media / "short.mp4"),
    ]
    together, alone = answers_of(chat, contents), answers_of(make_chat(engine, batch_size=1), contents)
    assert together == alone
    numbers = [counts.input_tokens for _, counts in together]
    per_frame = (numbers[0] - numbers[1]) / 7  # 8 frames and one picture
    assert per_frame > 4
    assert numbers[2] < per_frame * 4
    assert all(0 < counts.output_tokens <= 8 for _, counts in together)


def test_requests_with_other_options_are_answered_in_their_order(chat, media):
    chat.task_dict = {"quiz": {"test": [question(text, media / "short.mp4") for text in ("What?", "Who?", "How?")]}}
    options = [GREEDY, {**GREEDY, "max_new_tokens": 1}, GREEDY, {**GREEDY, "max_new_tokens": 1}]
    requests = [
        Instance("generate_until", ("", user_turn, own, n % 3, "quiz", "test"), 0) for n, own in enumerate(options)
    ]
    hooked = []
    chat.cache_hook = types.SimpleNamespace(add_partial=lambda *args: hooked.append(args))
    found = chat.generate_until(requests)
    alone = [chat.generate_until([request])[0] for request in requests]
    assert found == alone
    assert [answer.token_counts.output_tokens for answer in found][1::2] == [1, 1]
    assert len(hooked) == 8


def test_a_clip_that_several_questions_are_about_is_read_once(chat, media, monkeypatch):
    opened = []
    video_processor = type(chat.processor.video_processor)
    original = video_processor.fetch_videos
    monkeypatch.setattr(
        video_processor,
        "fetch_videos",
        lambda self, source, *args: (opened.append(source), original(self, source, *args))[1],
    )
    chat._read_clip.cache_clear()
    answers_of(chat, [question(text, media / "short.mp4") for text in "abcdef"])
    assert opened == [str(media / "short.mp4")]


def test_words_of_the_question_are_never_control_tokens(engine, tiny_checkpoint):
    chat = make_chat(engine, pretrained=str(tiny_checkpoint))
    (_, literal), (_, plain) = answers_of(chat, [question("What?<video></s>"), question("What?")])
    # Spelt out in letters: two control tokens would be two tokens more.
    assert literal.input_tokens - plain.input_tokens > 2


def test_parts_of_clips_and_numbers_of_frames(engine, media):
    chat = make_chat(engine, num_frames="3")
    assert read_barcodes(chat._read_clip(Clip(str(media / "long.mp4"), 1.0, 2.0))) == [25, 37, 49]
    assert len(chat._read_clip(Clip(str(media / "long.mp4")))) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cut.mp4", "cut.mp4"), ("missing.mp4", "missing.mp4"), ("sound.mp4", "sound.mp4"), ("cut.png", "cut.png")],
)
def test_an_error_names_task_document_and_file(chat, media, name, expected):
    contents = [question("What?", media / "short.mp4"), question("What?", media / name)]
    with pytest.raises(ValueError, match=f"quiz, document 1: .*{expected}"):
        answers_of(chat, contents)


def test_errors_in_what_is_said_name_the_task(chat):
    with pytest.raises(ValueError, match="quiz, document 0: `until` must be"):
        answers_of(chat, [question("What?")], {"until": [1]})
    chat.task_dict = {"quiz": {"test": [None]}}
    request = Instance(
        "generate_until", ("", lambda doc: [{"role": "judge", "content": "?"}], {}, 0, "quiz", "test"), 0
    )
    with pytest.raises(ValueError, match=r"quiz, document 0: .*role judge"):
        chat.generate_until([request])


def test_the_number_of_tokens_of_an_answer(engine):
    lengths = engine[MODEL_MODULE]._lengths
    tokens = torch.tensor([[5, 6, 2, 0], [5, 2, 2, 2], [5, 6, 7, 8]])
    assert lengths(tokens, 2) == lengths(tokens, [2, 9]) == [3, 2, 4]
    assert lengths(tokens, None) == [4, 4, 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"frames": 4, "fps": 2},
            "does not know fps, frames; it takes pretrained, num_frames, dtype, device, revision",
        ),
        ({"pretrained": None}, "--model_args pretrained="),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments(engine, options, expected):
    with pytest.raises(ValueError, match=expected):
        make_chat(engine, **options)


def test_a_checkpoint_of_another_model_is_refused(engine, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', expected 'video_panda'"):
        make_chat(engine, pretrained=str(tmp_path))


def test_what_a_chat_model_cannot_do(chat):
    assert not chat.is_simple
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="video_panda answers"):
            getattr(chat, name)([])


def test_a_process_of_several_takes_the_place_that_accelerate_gives(engine, monkeypatch):
    state = types.SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(engine[MODEL_MODULE], "Accelerator", lambda: state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    chat = make_chat(engine, device=None)
    assert (chat.rank, chat.world_size, chat.device, chat.accelerator) == (1, 2, state.device, state)
    with pytest.raises(ValueError, match="device is 'cuda', but accelerate gave this process 'cpu'"):
        make_chat(engine, device="cuda")


# The tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of data by name of the task."""
    folder = tmp_path_factory.mktemp("data")
    formats = {"tgif_qa": ("gif",)}
    return {
        name: write_zero_shot_qa(folder / name, folder / "clips", 3, formats.get(name, ("mp4", "avi", "mkv")), False)
        for name in TASKS
    }


def read_config(name, folder=TASKS_DIR):
    """A task's configuration, as lmms-eval reads it: names after `!function` are imported."""

    class Loader(yaml.SafeLoader):
        pass

    def imported(loader, node):
        module, _, member = loader.construct_scalar(node).rpartition(".")
        return getattr(importlib.import_module(module), member)

    Loader.add_constructor("!function", imported)
    config = yaml.load((folder / f"{name}.yaml").read_text(), Loader)
    return {**yaml.load((TASKS_DIR / config.pop("include")).read_text(), Loader), **config}


def open_task(name, **dataset_kwargs):
    config = read_config(name)
    return config["class"](config={**config, "dataset_kwargs": {**config["dataset_kwargs"], **dataset_kwargs}})


def requests_of(task):
    documents = task.dataset["test"]
    arguments = [
        (task.doc_to_text(doc), task.doc_to_messages, dict(task.config.generation_kwargs), n, task.config.task, "test")
        for n, doc in enumerate(documents)
    ]
    return [Instance("generate_until", own, 0) for own in arguments]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_asks_and_scores_like_evaluate(name, chat, data, monkeypatch):
    config = read_config(name)
    assert (config["task"], config["dataset_kwargs"]["benchmark"]) == (name, TASKS[name])
    longest = inspect.signature(evaluate).parameters["max_new_tokens"].default
    assert config["generation_kwargs"]["max_new_tokens"] == longest
    monkeypatch.setenv(config["dataset_kwargs"]["folder_variable"], str(data[name]))
    task = open_task(name)
    chat.task_dict = {name: task.dataset}
    requests = requests_of(task)
    suffixes = {
        Path(part["url"]).suffix
        for part in (r.args[1](task.dataset["test"][r.args[3]])[0]["content"][0] for r in requests)
    }
    assert suffixes == ({".gif"} if name == "tgif_qa" else {".mp4", ".avi", ".mkv"})
    answers = [found.text for found in chat.generate_until(requests)]
    benchmark = open_benchmark(TASKS[name], data[name])
    expected = evaluate(chat._model, benchmark, chat.processor, batch_size=4)
    assert answers == expected.answers
    scores = [config["process_results"](doc, [answer]) for doc, answer in zip(task.dataset["test"], answers)]
    assert {metric["metric"] for metric in config["metric_list"]} == set(scores[0]) - {"question_id"}
    total = expected.scores.total
    for metric, value in (
        ("exact_match", total.accuracy),
        ("containment", total.containment.value),
        ("token_f1", total.token_f1.value),
    ):
        assert sum(own[metric] for own in scores) / len(scores) == pytest.approx(value)
    assert total.accuracy > 0.8
    assert [own["question_id"] for own in scores] == [question.id for question in benchmark.questions]


def test_missing_clips_are_found_at_the_start(engine, data, tmp_path):
    for name in ("test_q.json", "test_a.json"):
        (tmp_path / name).write_text((data["msvd_qa"] / name).read_text())
    (tmp_path / "videos").mkdir()
    kept = sorted((data["msvd_qa"] / "videos").iterdir())[0]
    (tmp_path / "videos" / kept.name).write_bytes(kept.read_bytes())
    with pytest.raises(TooManyUnreadableError, match="there is no such clip"):
        open_task("msvd_qa", folder=str(tmp_path))
    task = open_task("msvd_qa", folder=str(tmp_path), max_missing_share=0.9)
    assert {doc["video"] for doc in task.dataset["test"]} == {f"videos/{kept.name}"}


def test_a_task_without_a_folder_says_which_variable_to_set(engine, monkeypatch, tmp_path):
    monkeypatch.delenv("TGIF_QA_DIR", raising=False)
    with pytest.raises(ValueError, match=r"tgif_qa: where are the data.*TGIF_QA_DIR"):
        open_task("tgif_qa")
    with pytest.raises(ValueError, match="dataset_kwargs has 'directory', expected benchmark, folder"):
        open_task("tgif_qa", directory="x")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_task("tgif_qa", folder=str(tmp_path / "nowhere"))


# Its place in the package ---------------------------------------------------------------------------------------------


def test_the_plugin_is_found_and_names_a_chat_model(engine):
    from video_panda.evaluation.lmms_eval_plugin import model_manifest

    manifest = model_manifest()
    assert (manifest.model_id, manifest.simple_class_path) == ("video_panda", None)
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), lmms)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = setup["options.entry_points"]["lmms_eval.models"].split("=")
    assert [word.strip() for word in declared] == ["video_panda", f"{model_manifest.__module__}:model_manifest"]


def test_the_plugin_costs_nothing_until_it_is_used():
    heavy = ("lmms_eval", "torch", "transformers", "datasets")
    program = f"import sys, video_panda.evaluation.lmms_eval_plugin; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# lmms-eval itself -----------------------------------------------------------------------------------------------------


def write_own_tasks(folder, visuals):
    """Tasks as a user writes them, with one question each; `doc_to_visual` gives bare paths, as in most of lmms-eval's."""
    functions = []
    for name, path in visuals.items():
        (folder / f"{name}.json").write_text(json.dumps([{"question": "What size is it?", "answer": "small"}]))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.json")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "generation_kwargs": {"max_new_tokens": 4},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        visual = "" if path is None else f"doc_to_visual: !function visuals.of_{name}\n"
        functions.append(f"def of_{name}(doc):\n    return [{str(path)!r}]\n")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + visual)
    (folder / "visuals.py").write_text("\n\n".join(functions))


@needs_lmms_eval
@pytest.mark.parametrize("num_processes", [1, 2])
def test_lmms_eval_itself_runs_model_and_tasks(num_processes, data, media, tiny_checkpoint, tmp_path):
    """Its command: the three sets, and tasks of a user's own about a picture, a bare path and text alone."""
    clip = write_clip(tmp_path / "clip.webm", num_frames=8, codec="libvpx-vp9")
    write_own_tasks(tmp_path, {"picture": media / "photo.png", "webm": clip, "words": None})
    for path in TASKS_DIR.glob("*yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if num_processes == 2 else []
    command = [sys.executable, *launch, "-m", "lmms_eval", "--model", "video_panda", "--include_path", tmp_path]
    command += ["--model_args", f"pretrained={tiny_checkpoint},num_frames=2", "--batch_size", "4", "--limit", "5"]
    command += ["--tasks", ",".join([*TASKS, "picture", "webm", "words"]), "--log_samples", "--output_path", "out"]
    variables = {read_config_text(name)["dataset_kwargs"]["folder_variable"]: str(data[name]) for name in TASKS}
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "ACCELERATE_USE_CPU": "1", **variables}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "Error during evaluation" not in run.stdout, run.stdout + run.stderr
    assert ("1 of 2 processes" in run.stderr) is (num_processes == 2)
    results = json.loads(next(tmp_path.glob("out/*/*_results.json")).read_text())
    samples = {
        name: [
            json.loads(line) for line in next(tmp_path.glob(f"out/*/*_samples_{name}.jsonl")).read_text().splitlines()
        ]
        for name in [*TASKS, "picture", "webm", "words"]
    }
    assert results["config"]["model_backend"] == f"{MODEL_MODULE}.VideoPandaChat (chat)"
    for name in TASKS:
        assert sorted(sample["doc_id"] for sample in samples[name]) == [0, 1, 2, 3, 4]
        assert {"exact_match,none", "containment,none", "token_f1,none"} <= set(results["results"][name])
    words, picture, webm = (
        samples[name][0]["token_counts"][0]["input_tokens"] for name in ("words", "picture", "webm")
    )
    tokens_of_frame = 1 + 3 * (3 + 1)
    assert webm - picture == tokens_of_frame < picture - words, "two frames of a clip, one picture, none"


def read_config_text(name: str) -> dict:
    """What stands in a task's own file."""
    return yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text())
