"""Saving and loading: as remote code without the package, as installed classes, in every dtype, and what is refused."""

import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import run_client
from safetensors import safe_open
from tiny import tiny_config, tiny_model, tiny_processor, write_tiny_checkpoint
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import is_torchvision_available

from video_panda import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaImageProcessor,
    VideoPandaModel,
    VideoPandaProcessor,
)

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    path.name: path.read_bytes()
    for folder in ("modeling_video_panda", "processing")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
}
AUTO_MODELS = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
AUTO_MAP_KEYS = {"AutoConfig", "AutoProcessor", "AutoVideoProcessor", "AutoImageProcessor"}
AUTO_MAP_KEYS |= {auto.__name__ for auto in AUTO_MODELS}
STATISTICS = ("running_mean", "running_var")
OFFLINE = SimpleNamespace(url="http://127.0.0.1:9")  # nothing listens there


def answer(model, processor, image_processor) -> dict:
    """What a checkpoint does with one clip and one picture, as tensors. Its source also runs in other processes."""
    import numpy
    import torch

    rng = numpy.random.default_rng(0)
    clip_THWC = rng.integers(0, 256, (6, 60, 100, 3), dtype=numpy.uint8)
    picture_HWC = rng.integers(0, 256, (90, 70, 3), dtype=numpy.uint8)
    text = "USER: <video> and <image> What colour? ASSISTANT:"
    inputs = processor(text=[text], videos=[clip_THWC], images=[picture_HWC])
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    alone = image_processor([picture_HWC], return_tensors="pt")["pixel_values"]
    return {**inputs, "logits": logits, "generated_ids": ids, "pixel_values_alone": alone}


def run_offline(code: str, home: Path, **env: str) -> dict:
    """Runs a snippet in a fresh process in which the package is not installed; `answer` is defined there.

    Returns:
        What the snippet printed last, from JSON.
    """
    code = f"import json, os\n{inspect.getsource(answer)}\n{inspect.cleandoc(code)}"
    process = run_client(code, OFFLINE, home, blocked=("video_panda",), HF_HUB_OFFLINE="1", **env)
    return json.loads(process.stdout.splitlines()[-1])


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "panda"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def weights(checkpoint) -> dict[str, torch.Tensor]:
    """The state dict of the checkpoint, as in memory before it was saved."""
    config = VideoPandaConfig.from_pretrained(checkpoint)
    state = {name: tensor.clone() for name, tensor in tiny_model(config).state_dict().items()}
    assert any(not torch.equal(t, t.bfloat16().float()) for n, t in state.items() if n.endswith(STATISTICS))
    return state


@pytest.fixture(scope="module")
def expected(checkpoint) -> dict[str, torch.Tensor]:
    """The answer of the installed classes."""
    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint)
    image_processor = VideoPandaImageProcessor.from_pretrained(checkpoint)
    return answer(model, VideoPandaProcessor.from_pretrained(checkpoint), image_processor)


@pytest.fixture(scope="module")
def generations(checkpoint, tmp_path_factory) -> SimpleNamespace:
    """The checkpoint loaded as remote code, and saved from there (twice in the same folder)."""
    folder = tmp_path_factory.mktemp("remote")
    first = shutil.copytree(checkpoint, folder / "elsewhere" / "first")  # not where it was saved
    found = run_offline(
        """
        import torch, transformers

        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # without the flag transformers asks, and nobody answers
        source, second = os.environ["SOURCE"], os.environ["SECOND"]
        names = ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
        names += ["AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoVideoProcessor"]
        loaded, errors, refusals = {}, {}, {}
        for name in names:
            auto = getattr(transformers, name)
            try:
                loaded[name] = auto.from_pretrained(source, trust_remote_code=True)
            except ImportError as error:
                errors[name] = str(error)
            try:
                auto.from_pretrained(source)
            except (ValueError, ImportError) as error:
                refusals[name] = f"{type(error).__name__}: {error}"
        answers = {n: answer(loaded[n], loaded["AutoProcessor"], loaded["AutoImageProcessor"]) for n in names[:4]}
        torch.save({n: {k: v.clone() for k, v in a.items()} for n, a in answers.items()}, os.environ["ANSWERS"])
        for _ in range(2):
            loaded["AutoModelForCausalLM"].save_pretrained(second)
            loaded["AutoProcessor"].save_pretrained(second)
        types = {name: f"{type(value).__module__}:{type(value).__name__}" for name, value in loaded.items()}
        ids = loaded["AutoTokenizer"]("A red ball <video></s>").input_ids
        print()
        print(json.dumps({"types": types, "errors": errors, "refusals": refusals, "ids": ids}))
        """,
        folder / "home",
        SOURCE=str(first),
        SECOND=str(folder / "second"),
        ANSWERS=str(folder / "answers.pt"),
    )
    answers = torch.load(folder / "answers.pt")
    return SimpleNamespace(first=first, second=folder / "second", found=found, answers=answers, root=folder)


def test_every_auto_class_loads_without_the_package(generations, checkpoint):
    types = dict(generations.found["types"])
    assert types.pop("AutoTokenizer").startswith("transformers.")
    video_processor = types.pop("AutoVideoProcessor", None)
    if is_torchvision_available():
        assert video_processor.endswith("video_processing_video_panda:VideoPandaVideoProcessor")
    else:
        # A limit of transformers; VideoPandaProcessor loads its video processor by itself.
        assert "requires the Torchvision library" in generations.found["errors"]["AutoVideoProcessor"]
    model = "modeling_video_panda:VideoPandaForConditionalGeneration"
    endings = {auto.__name__: model for auto in AUTO_MODELS}
    endings["AutoConfig"] = "configuration_video_panda:VideoPandaConfig"
    endings["AutoProcessor"] = "processing_video_panda:VideoPandaProcessor"
    endings["AutoImageProcessor"] = "image_processing_video_panda:VideoPandaImageProcessor"
    assert types.keys() == endings.keys()
    for name, ending in endings.items():
        assert types[name].startswith("transformers_modules.")
        assert types[name].endswith(ending)
    assert generations.found["ids"] == tiny_processor().tokenizer("A red ball <video></s>").input_ids


@pytest.mark.parametrize("auto", AUTO_MODELS, ids=lambda auto: auto.__name__)
def test_remote_code_answers_as_the_installed_classes(generations, expected, auto):
    assert_same(generations.answers[auto.__name__], expected)


def test_remote_code_needs_the_flag(generations):
    refusals = dict(generations.found["refusals"])
    if not is_torchvision_available():
        assert "Torchvision" in refusals.pop("AutoVideoProcessor")
    names = {auto.__name__ for auto in (*AUTO_MODELS, AutoConfig, AutoProcessor, AutoImageProcessor)}
    assert refusals.keys() - {"AutoVideoProcessor"} == names  # a tokenizer is no code
    for message in refusals.values():
        assert message.startswith("ValueError: ")
        assert "trust_remote_code=True" in message
        assert str(generations.first) in message


def test_the_second_generation_is_like_the_first(generations, expected):
    first, second = generations.first, generations.second
    assert {path.name for path in second.iterdir()} == {path.name for path in first.iterdir()}
    for path in first.iterdir():
        one, other = path.read_bytes(), (second / path.name).read_bytes()
        if path.name == "config.json":  # what was loaded knows the dtype of its parts, too
            one, other = map(json.loads, (one, other))
            for part in ("text_config", "vision_config"):
                assert other[part].pop("dtype") == one["dtype"]
        # Weights are compared by the answer; a tokenizer also saves where it came from (local or not) and how it padded.
        is_compared = path.suffix != ".safetensors" and not path.name.startswith("tokenizer")
        if is_compared and path.name != "saved_files.json":  # checksums of these, too
            assert other == one, path.name
    # In a fresh process, without the folder it came from.
    hidden = first.rename(first.with_name("hidden"))
    try:
        run_offline(
            """
            import torch
            from transformers import AutoImageProcessor, AutoModel, AutoProcessor

            auto_classes = (AutoModel, AutoProcessor, AutoImageProcessor)
            parts = [auto.from_pretrained(os.environ["SECOND"], trust_remote_code=True) for auto in auto_classes]
            torch.save(dict(answer(*parts)), os.environ["ANSWER"])
            print(json.dumps(True))
            """,
            generations.root / "second_home",
            SECOND=str(second),
            ANSWER=str(generations.root / "answer.pt"),
        )
    finally:
        hidden.rename(first)
    assert_same(torch.load(generations.root / "answer.pt"), expected)


@pytest.mark.parametrize("generation", ["first", "second"])
def test_a_saved_folder_is_complete(generations, generation):
    folder = getattr(generations, generation)
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == SHIPPED
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == AUTO_MAP_KEYS
    for reference in auto_map.values():
        module, name = reference.split(".")  # no `repo--` before it, no folder
        assert f"\nclass {name}(" in SHIPPED[f"{module}.py"].decode()


@pytest.mark.parametrize("generation", ["first", "second"])
def test_a_saved_folder_does_not_name_this_machine(generations, checkpoint, generation):
    here = [checkpoint.parent, generations.root, ROOT, Path.home(), Path(sys.prefix)]
    secrets = [str(path).encode() for path in here if len(path.parts) > 2]
    for path in getattr(generations, generation).iterdir():
        assert [secret for secret in secrets if secret in path.read_bytes()] == [], path.name


def test_config_alone_is_complete(tmp_path):
    tiny_config().save_pretrained(tmp_path / "first")
    AutoConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert first["auto_map"].keys() == AUTO_MAP_KEYS


@pytest.mark.parametrize("flag", [{}, {"trust_remote_code": True}], ids=["no_flag", "flag"])
def test_the_installed_classes_are_used_where_the_package_is(checkpoint, flag):
    for auto in AUTO_MODELS:
        assert type(auto.from_pretrained(checkpoint, **flag)) is VideoPandaForConditionalGeneration
    assert type(AutoConfig.from_pretrained(checkpoint, **flag)) is VideoPandaConfig
    assert type(AutoProcessor.from_pretrained(checkpoint, **flag)) is VideoPandaProcessor
    assert type(AutoImageProcessor.from_pretrained(checkpoint, **flag)) is VideoPandaImageProcessor


def test_saving_twice_in_one_folder_replaces_what_was_there(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    model = tiny_model(seed=2)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    loaded = VideoPandaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert_same(loaded, model.state_dict())


@pytest.mark.parametrize("sizes", [("100KB", "5GB"), ("5GB", "100KB"), ("100KB", "200KB")])
def test_saving_over_a_checkpoint_of_another_number_of_shards(tmp_path, sizes):
    # transformers prefers model.safetensors to shards, and leaves the one of an earlier save where it is.
    for seed, max_shard_size in enumerate(sizes):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = VideoPandaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert_same(loaded, model.state_dict())
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named


def test_saving_into_the_folder_it_was_loaded_from(checkpoint, weights, tmp_path):
    # The loaded weights are mapped from the file that is replaced.
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    model = VideoPandaForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(folder)
    assert_same(model.state_dict(), weights)
    assert_same(VideoPandaForConditionalGeneration.from_pretrained(folder).state_dict(), weights)


def test_names_and_shapes_of_the_weights_stay(checkpoint):
    # Whoever renames a parameter breaks every checkpoint there is.
    committed = json.loads(Path(__file__).with_name("state_dict_keys.json").read_text())
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    assert saved == committed


def test_every_weight_comes_back(checkpoint, weights):
    assert_same(VideoPandaForConditionalGeneration.from_pretrained(checkpoint).state_dict(), weights)


def test_the_model_without_head_loads_from_the_same_folder(checkpoint, weights):
    state = VideoPandaModel.from_pretrained(checkpoint).state_dict()
    assert_same(state, {name.removeprefix("model."): t for name, t in weights.items() if name != "lm_head.weight"})


def test_what_was_saved_answers_as_before(checkpoint, expected):
    processor = tiny_processor()
    config = VideoPandaConfig.from_pretrained(checkpoint)
    before = answer(tiny_model(config), processor, processor.image_processor)
    # Loaded weights are mapped from the file, at other alignments: sums round differently.
    logits = before.pop("logits")
    torch.testing.assert_close(expected["logits"], logits, rtol=1e-5, atol=1e-5)
    assert_same({name: tensor for name, tensor in expected.items() if name != "logits"}, before)


def test_tied_embeddings_are_saved_once_and_tied_again(tmp_path):
    tiny_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict
    model = VideoPandaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def assert_dtype(state: dict, dtype: torch.dtype, weights: dict) -> None:
    """All weights in `dtype`; the BatchNorm statistics float32 and exactly those of the float32 checkpoint."""
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        if name.endswith((*STATISTICS, "num_batches_tracked")):
            assert tensor.dtype == weights[name].dtype, name
            assert torch.equal(tensor, weights[name]), name
        else:
            assert tensor.dtype == dtype, name
            assert torch.equal(tensor, weights[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_leaves_the_statistics_exact(checkpoint, weights, dtype, tmp_path):
    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    assert_dtype(model.state_dict(), dtype, weights)
    model.save_pretrained(tmp_path)
    assert_dtype(VideoPandaForConditionalGeneration.from_pretrained(tmp_path).state_dict(), dtype, weights)
    assert_dtype(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict(), dtype, weights)
    back = VideoPandaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    rounded = {
        n: t if n.endswith(STATISTICS) or t.dtype == torch.int64 else t.to(dtype).float() for n, t in weights.items()
    }
    assert_same(back, rounded)
    converted = VideoPandaForConditionalGeneration.from_pretrained(checkpoint)
    assert_dtype(converted.to(dtype).state_dict(), dtype, weights)
    assert_dtype((converted.half() if dtype == torch.float16 else converted.bfloat16()).state_dict(), dtype, weights)


PARTS = {"model.stab": "cpu", "model.projector": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
DEVICE_MAPS = {
    "cpu": "cpu",
    "auto": "auto",
    "language_model": {**PARTS, "model.language_model": "disk"},
    "visual": {**PARTS, "model.stab": "disk", "model.projector": "disk"},
    "everything": {"": "disk"},
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS.keys())
def test_device_maps_and_disk_offload(checkpoint, expected, device_map, tmp_path):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("chooses the GPU here: not bit for bit the same")
    model = VideoPandaForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    assert is_offloaded == isinstance(device_map, dict)
    processor = VideoPandaProcessor.from_pretrained(checkpoint)
    got = answer(model, processor, processor.image_processor)
    if is_offloaded:  # a layer whose weight is elsewhere until it is called cannot be folded: equal up to rounding
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        got["logits"] = expected["logits"]
    assert_same(got, expected)


def test_disk_offload_in_half_precision(checkpoint, tmp_path):
    options = {"dtype": torch.bfloat16}
    inputs = {
        "pixel_values_videos": torch.rand(1, 6, 3, 84, 84, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[6, 2, 3]]),
    }
    plain = VideoPandaForConditionalGeneration.from_pretrained(checkpoint, **options)
    offloaded = VideoPandaForConditionalGeneration.from_pretrained(
        checkpoint, device_map={"": "disk"}, offload_folder=tmp_path, **options
    )
    plain.model.stab.use_plain_form()  # as offloaded layers compute
    with torch.no_grad():
        one, other = (model.get_video_features(**inputs).pooler_output[0] for model in (plain, offloaded))
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, other)


@pytest.fixture
def sharded(checkpoint, tmp_path) -> Path:
    folder = tmp_path / "sharded"
    VideoPandaForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def test_sharded_checkpoint(sharded, weights):
    assert_same(VideoPandaForConditionalGeneration.from_pretrained(sharded).state_dict(), weights)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        VideoPandaForConditionalGeneration.from_pretrained(sharded)


@pytest.mark.parametrize("num_bytes", [-100, 1000, 4, 0])
def test_a_shard_that_was_cut_off_is_named(sharded, num_bytes):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    with pytest.raises(OSError, match=rf"{shard.name}.*{shard.stat().st_size} bytes"):
        VideoPandaForConditionalGeneration.from_pretrained(sharded)


def test_other_content_in_the_place_of_weights_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", (2).to_bytes(8, "little") + b"[]"):
        shard.write_bytes(content)
        with pytest.raises(OSError, match=rf"{shard.name}.*no readable safetensors header"):
            VideoPandaForConditionalGeneration.from_pretrained(sharded)


def test_no_weights(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(OSError, match=f"model.safetensors.*{tmp_path}"):
        VideoPandaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.fixture
def edited(checkpoint, tmp_path):
    """A function that gives a copy of the checkpoint with other values in its config.json."""

    def edit(part: str | None = None, **values) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text())
        (config[part] if part else config).update(values)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return edit


@pytest.mark.parametrize("load", [AutoConfig, AutoModel, VideoPandaForConditionalGeneration])
@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"use_fsraa": True}, "unknown field use_fsraa"),
        ("vision_config", {"use_fsraa": True}, "unknown field use_fsraa"),
        ("vision_config", {"downsampling": "lsdd"}, "downsampling must be one of .*'lsdd'"),
        ("text_config", {"vocab_size": 100}, "vocab_size is 100.*expected at least 404"),
        (None, {"video_token_id": 7}, r"four consecutive ids.*\(7, 401, 402, 403\)"),
    ],
)
def test_a_wrong_field_in_config_json_is_named(edited, load, part, values, message):
    folder = edited(part, **values)
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(folder)


@pytest.mark.parametrize("vocab_size", [404, 512])
def test_another_vocabulary_size_than_that_of_the_weights(edited, vocab_size):
    folder = edited("text_config", vocab_size=vocab_size)
    with pytest.raises(ValueError, match=rf"edited: 2 weights.*\(448, 48\), expected \({vocab_size}, 48\).*vocab_size"):
        VideoPandaForConditionalGeneration.from_pretrained(folder)
    model = VideoPandaForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert len(model.lm_head.weight) == vocab_size


def test_weights_of_another_ablation(edited):
    # transformers would draw the resampler's weights at random.
    folder = edited("vision_config", downsampling="perceiver_resampler")
    with pytest.raises(ValueError, match=r"edited lacks \d+ weights.*perceiver_resampler"):
        VideoPandaForConditionalGeneration.from_pretrained(folder)
    _, report = VideoPandaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert all("perceiver_resampler" in name for name in report["missing_keys"])


def test_weights_that_the_configuration_leaves_out(edited):
    # transformers would only log them, and the model would answer otherwise.
    for part, values, name in (
        ("vision_config", {"use_lste": False, "use_gstra": False}, "model.stab.fusion.balance"),
        ("text_config", {"num_hidden_layers": 1}, "model.language_model.layers.1"),
    ):
        folder = edited(part, **values)
        with pytest.raises(ValueError, match=rf"edited holds, beyond its configuration, \d+ weights.*{name}"):
            VideoPandaForConditionalGeneration.from_pretrained(folder)
        VideoPandaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        shutil.rmtree(folder)


def test_what_cannot_be_loaded_again_is_not_saved(checkpoint, tmp_path):
    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint)
    model.config.pad_token_id = 0  # as tutorials do
    model.save_pretrained(tmp_path / "fine")
    VideoPandaForConditionalGeneration.from_pretrained(tmp_path / "fine")
    model.config.use_fsrra = False
    with pytest.raises(ValueError, match="unknown field use_fsrra"):
        model.save_pretrained(tmp_path / "refused")
    assert not list((tmp_path / "refused").glob("*.json")) + list((tmp_path / "refused").glob("*.safetensors"))


@pytest.mark.parametrize("first_is_sharded", [True, False])
def test_of_two_saves_with_equal_time_stamps_the_last_stays(
    checkpoint, weights, tmp_path, first_is_sharded, monkeypatch
):
    """File systems of coarse time stamps: only what is in the files may decide."""
    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint)
    sharded = {"max_shard_size": "100KB"}
    model.save_pretrained(tmp_path, **(sharded if first_is_sharded else {}))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save_model, tie = PreTrainedModel.save_pretrained, lambda path: os.utime(path, (0, 0))

    def save_with_equal_times(self, folder, **options):
        save_model(self, folder, **options)
        for path in Path(folder).iterdir():
            tie(path)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_with_equal_times)
    model.save_pretrained(tmp_path, **({} if first_is_sharded else sharded))
    back = VideoPandaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert torch.equal(back["lm_head.weight"], weights["lm_head.weight"] + 1.0)


def test_a_checkpoint_without_head_is_refused_where_one_is_needed(checkpoint, tmp_path):
    VideoPandaModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no lm_head.weight: it was saved from VideoPandaModel"):
        VideoPandaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=448)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [VideoPandaConfig, VideoPandaModel, VideoPandaForConditionalGeneration])
def test_a_checkpoint_of_another_model_is_named(llama, load):
    with pytest.raises(ValueError, match=f"{llama}.*'llama', expected 'video_panda'"):
        load.from_pretrained(llama)


def test_weights_of_another_model_are_not_filled_up(llama):
    with pytest.raises(ValueError, match=f"{llama} lacks .* weights"):
        VideoPandaForConditionalGeneration.from_pretrained(llama, config=tiny_config(400))
    with pytest.raises(OSError, match=str(llama)):
        VideoPandaProcessor.from_pretrained(llama)


def test_a_folder_that_is_not_there(tmp_path):
    for load in (VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor):
        with pytest.raises((OSError, ValueError), match=str(tmp_path / "none")):
            load.from_pretrained(tmp_path / "none")


def test_broken_json_is_named(edited):
    folder = edited()
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(OSError, match=str(folder / "config.json")):
        VideoPandaForConditionalGeneration.from_pretrained(folder)


def test_saving_where_a_file_is(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for part in (tiny_model(), tiny_config(), tiny_processor()):
        with pytest.raises(OSError, match=str(path)):  # transformers alone: the model is not saved, with a log line
            part.save_pretrained(path)
    assert path.read_text() == "mine"
