"""Converting the authors' checkpoints: the golden numbers, the weights, what stands beside them, EVE-7B.

The golden checkpoint lies beside the repository (`../shared`); tests on it are skipped where it is missing. The others
write a small checkpoint in the release's format themselves.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from release_checkpoints import (
    VOCABULARY,
    assert_same_weights,
    save_sharded,
    spoil,
    weights_of,
    word_tokenizer,
    write_json,
    write_release,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from video_panda import VideoPandaProcessor
from video_panda.hub import shards
from video_panda.hub.convert import convert_checkpoint
from video_panda.modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "official_tiny"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden checkpoint is not at {GOLDEN}")
CASES = ("square", "landscape", "portrait", "long", "image")


# --- the golden numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The golden checkpoint's converted folder, the model in float32, and the expected numbers."""
    folder = convert_checkpoint(GOLDEN / "checkpoint", tmp_path_factory.mktemp("golden") / "model", progress=False)
    model = VideoPandaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, model, load_file(GOLDEN / "expected.safetensors")


def golden_inputs(model, expected, case: str) -> dict:
    config, pixels, grid = model.config, expected[f"{case}.pixel_values"].float(), expected[f"{case}.grid_thw"]
    num_frames, height, width = grid.tolist()
    patch = config.image_token_id if case == "image" else config.video_token_id
    frame = [config.frame_token_id] + ([patch] * width + [config.row_token_id]) * height
    ids = [*expected["prompt.before"].tolist(), *frame * num_frames, *expected["prompt.after"].tolist()]
    if case == "image":
        visual = {"pixel_values": pixels, "image_grid_thw": grid[None]}
    else:
        visual = {"pixel_values_videos": pixels[None], "video_grid_thw": grid[None]}
    return {"input_ids": torch.tensor([ids]), **visual}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_golden_features_logits_and_loss(golden, case):
    _, model, expected = golden
    inputs = golden_inputs(model, expected, case)
    labels = inputs["input_ids"].clone()
    labels[:, : -len(expected["prompt.after"])] = -100
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    features = outputs.image_hidden_states if case == "image" else outputs.video_hidden_states
    assert relative_error(features, expected[f"{case}.features"]) <= 1e-5
    assert relative_error(outputs.logits[0, :, : model.config.num_text_tokens], expected[f"{case}.logits"]) <= 1e-5
    assert relative_error(outputs.loss, expected[f"{case}.lm_loss"]) <= 1e-5


@needs_golden
def test_golden_greedy_tokens(golden):
    _, model, expected = golden
    inputs = golden_inputs(model, expected, "square")
    inputs["input_ids"] = inputs["input_ids"][:, :-1]
    attention_mask = torch.ones_like(inputs["input_ids"])
    new = model.generate(
        **inputs, attention_mask=attention_mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert new[0, -12:].tolist() == expected["square.generated"].tolist()


@needs_golden
def test_golden_alignment_head_is_kept_when_asked_for(golden, tmp_path):
    out = convert_checkpoint(GOLDEN / "checkpoint", tmp_path / "out", keep_alignment_head=True, progress=False)
    source = shards.scan_shards(GOLDEN / "checkpoint")
    head = load_file(out / "alignment_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        **{f"norms.{place}.{part}": (48,) for place in range(3) for part in ("weight", "bias")},
        **{f"projections.{place}.weight": (1024, 48) for place in range(3)},
        **{"input.weight": (1024, 48), "input.bias": (1024,), "output.weight": (1024, 1024), "output.bias": (1024,)},
    }
    with shards.open_shard(source["model.video_tower_compressor.norm_layer.1.1.weight"].shard) as tensors:
        assert torch.equal(head["projections.1.weight"], tensors["model.video_tower_compressor.norm_layer.1.1.weight"])
    assert_same_weights(weights_of(out), weights_of(golden[0]))
    assert not (golden[0] / "alignment_head.safetensors").exists()


# --- weights ------------------------------------------------------------------------------------------------------------


def test_tensors_are_those_of_the_release(release, converted):
    theirs = {}
    for shard in sorted(release.glob("*.bin")):
        theirs |= torch.load(shard, weights_only=True)
    ours = weights_of(converted)
    tower = "model.video_tower."
    assert torch.equal(ours["model.stab.gstra.k_proj.weight"], theirs[tower + "dec.attn.in_proj_weight"][16:32])
    assert torch.equal(ours["model.stab.gstra.v_proj.bias"], theirs[tower + "dec.attn.in_proj_bias"][32:])
    assert torch.equal(ours["model.stab.lsd.v_proj.weight"], theirs[tower + "local_attention.kv.1.weight"][16:])
    assert torch.equal(ours["model.stab.lste.temporal.weight"], theirs[tower + "lmhra1.pos_embed.2.weight"][..., 0, 0])
    assert torch.equal(ours["model.stab.row_embedding"], theirs[tower + "split_embedding"])
    assert torch.equal(ours["model.projector.linear_2.weight"], theirs["model.video_projector.2.weight"])
    assert torch.equal(
        ours["model.language_model.layers.3.mlp.up_proj.weight"], theirs["model.layers.3.mlp.up_proj.weight"]
    )


def test_stored_dtypes_are_kept_but_statistics_are_float32(converted):
    ours = weights_of(converted)
    counters = [name for name in ours if ours[name].dtype == torch.int64]
    assert counters == ["model.stab.lste.norm.num_batches_tracked"]
    assert ours[counters[0]] == 0
    statistics = {name for name in ours if ours[name].dtype == torch.float32}
    assert statistics == {f"model.stab.lste.norm.running_{part}" for part in ("mean", "var")}
    assert {ours[name].dtype for name in ours.keys() - statistics - set(counters)} == {torch.float16}
    assert json.loads((converted / "config.json").read_text())["dtype"] == "float16"


def test_every_tensor_of_the_model_is_loaded(converted):
    _, info = VideoPandaForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()), info


def test_new_rows_are_distinct_and_near_the_old_ones(converted):
    ours = weights_of(converted)
    embedding, head = ours["model.language_model.embed_tokens.weight"], ours["lm_head.weight"]
    assert embedding.shape == head.shape == (64, 16)
    assert len(torch.unique(embedding.float(), dim=0)) == 64, "the model finds placeholders by their embedding"
    assert embedding[VOCABULARY:].abs().max() < 6 * embedding[:VOCABULARY].float().std()
    assert not head[VOCABULARY:].any()


def test_casting(release, converted, tmp_path):
    out = convert_checkpoint(release, tmp_path / "out", dtype="bfloat16", progress=False)
    ours, stored = weights_of(out), weights_of(converted)
    for name, tensor in stored.items():
        keeps = "running_" in name or "num_batches" in name
        got, expected = ours[name], tensor if keeps else tensor.bfloat16()
        if "embed_tokens" in name:  # the new rows are drawn, and rounded once only
            got, expected = got[:VOCABULARY], expected[:VOCABULARY]
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert VideoPandaForConditionalGeneration.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["single pickle", "single safetensors", "sharded safetensors"])
def test_other_forms_of_the_source_give_the_same(form, own_release, converted, tmp_path):
    tensors = {}
    for file in sorted(own_release.glob("pytorch_model*")):
        tensors |= torch.load(file, weights_only=True) if file.suffix == ".bin" else {}
        file.unlink()
    if form == "single pickle":
        torch.save(tensors, own_release / "pytorch_model.bin")
    elif form == "single safetensors":
        save_file(tensors, own_release / "model.safetensors")
    else:
        save_sharded(own_release, tensors, suffix="safetensors")
    out = convert_checkpoint(own_release, tmp_path / "out", progress=False)
    assert_same_weights(weights_of(out), weights_of(converted))


def test_several_files_with_an_index(release, converted, tmp_path):
    out = convert_checkpoint(release, tmp_path / "out", max_shard_size="20KB", progress=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    sizes = []
    for file in files:
        with safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = load_file(out / file)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= 20_000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same_weights(weights_of(out), weights_of(converted))
    _, info = VideoPandaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


def test_tied_embeddings(tmp_path):
    write_release(tmp_path / "release", tie_word_embeddings=True)
    out = convert_checkpoint(tmp_path / "release", tmp_path / "out", progress=False)
    assert "lm_head.weight" not in weights_of(out)
    model = VideoPandaForConditionalGeneration.from_pretrained(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight


# --- what stands beside the weights -------------------------------------------------------------------------------------


def test_configuration(converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "video_panda"
    assert config["architectures"] == ["VideoPandaForConditionalGeneration"]
    assert config["rotary_table_dtype"] == "float16"
    ids = [config[f"{name}_token_id"] for name in ("video", "row", "frame", "image")]
    assert ids == list(range(VOCABULARY, VOCABULARY + 4))
    text, vision = config["text_config"], config["vision_config"]
    assert (text["vocab_size"], text["num_key_value_heads"], text["pad_token_id"]) == (64, 1, 0)
    assert text["rope_parameters"]["rope_theta"] == 50000.0
    names = ("image_size", "patch_size", "downsample_window", "num_chunk_frames", "num_frames", "hidden_size")
    assert [vision[name] for name in names] == [56, 14, 2, 4, 8, 16]


def test_generation_config_is_cleaned(converted):
    generation = json.loads((converted / "generation_config.json").read_text())
    del generation["transformers_version"]
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_sampling_settings_stay_where_sampling_is_on(own_release, tmp_path):
    write_json(own_release / "generation_config.json", {"do_sample": True, "temperature": 0.9, "max_length": 99})
    out = convert_checkpoint(own_release, tmp_path / "out", progress=False)
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["max_length"], generation["do_sample"]) == (0.9, 99, True)


@pytest.mark.slow  # tests/test_main_job.py does, too
def test_the_folder_loads_where_the_package_is_not_installed(converted, tmp_path):
    code = """
        import sys
        sys.modules["video_panda"] = None
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        folder = sys.argv[1]
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        print(type(model).__name__, type(processor).__name__, processor.tokenizer.convert_tokens_to_ids("<video>"))
        print(processor.video_processor.image_size, processor.video_processor.num_frames, model.device)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(converted)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        "VideoPandaForConditionalGeneration",
        "VideoPandaProcessor",
        "60",
        "56",
        "8",
        "cpu",
    ]


def test_without_a_tokenizer_the_processors_stand_alone(tmp_path, caplog):
    write_release(tmp_path / "release")
    out = convert_checkpoint(tmp_path / "release", tmp_path / "out", progress=False)
    assert (out / "preprocessor_config.json").is_file()
    assert (out / "video_preprocessor_config.json").is_file()
    assert not (out / "tokenizer.json").exists()
    assert "No tokenizer" in caplog.text


@pytest.mark.parametrize("given_as", ["object", "folder"])
def test_a_tokenizer_can_be_given(given_as, tmp_path):
    write_release(tmp_path / "release")
    tokenizer = word_tokenizer(VOCABULARY)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = tokenizer if given_as == "object" else tmp_path / "tokenizer"
    out = convert_checkpoint(tmp_path / "release", tmp_path / "out", tokenizer=given, progress=False)
    saved = AutoTokenizer.from_pretrained(out)
    assert saved.convert_tokens_to_ids(["<video>", "<row>", "<frame>", "<image>"]) == [60, 61, 62, 63]
    assert len(tokenizer) == VOCABULARY, "the tokenizer that was given is not changed"
    again = convert_checkpoint(tmp_path / "release", tmp_path / "again", tokenizer=saved, progress=False)
    assert len(AutoTokenizer.from_pretrained(again)) == VOCABULARY + 4, "one that has the placeholders already"


@pytest.mark.parametrize("with_config", [True, False])
def test_a_sentencepiece_tokenizer(with_config, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf", reason="transformers reads a tokenizer.model through protobuf")
    write_release(tmp_path / "release")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("the quick brown fox jumps over a lazy dog\nwhat does the panda eat in this video\n" * 20)
    model = tmp_path / "release" / "tokenizer"
    options = {"vocab_size": VOCABULARY, "model_type": "bpe", "pad_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(sentences), model_prefix=str(model), **options)
    expected = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model").encode("the lazy panda")
    if with_config:
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        write_json(tmp_path / "release" / "tokenizer_config.json", config)
    out = convert_checkpoint(tmp_path / "release", tmp_path / "out", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the lazy panda", add_special_tokens=False).input_ids == expected
    assert tokenizer.convert_tokens_to_ids("<video>") == VOCABULARY


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path):
    write_release(tmp_path / "release")
    tokenizer = word_tokenizer(VOCABULARY + 1)
    with pytest.raises(
        ValueError, match=rf"has {VOCABULARY + 1} tokens, but the checkpoint's vocabulary has {VOCABULARY}"
    ):
        convert_checkpoint(tmp_path / "release", tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


def test_placeholders_at_other_ids_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    write_release(tmp_path / "release")
    tokenizer = word_tokenizer(VOCABULARY - 9)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>", "<row>", "<frame>", "<image>"]})
    monkeypatch.setattr("video_panda.hub.convert._write_weights", lambda *args: pytest.fail("weights were written"))
    with pytest.raises(ValueError, match=rf"placeholders begin at id {VOCABULARY - 9}, expected {VOCABULARY}"):
        convert_checkpoint(tmp_path / "release", tmp_path / "out", tokenizer=tokenizer, progress=False)


def test_a_smaller_tokenizer_is_filled_up(tmp_path, caplog):
    """The placeholders must get the ids after the checkpoint's own vocabulary, whatever the tokenizer leaves unused."""
    write_release(tmp_path / "release")
    tokenizer = word_tokenizer(VOCABULARY - 7)
    out = convert_checkpoint(tmp_path / "release", tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert f"has {VOCABULARY - 7} tokens, but the checkpoint's vocabulary has {VOCABULARY}" in caplog.text
    processor = VideoPandaProcessor.from_pretrained(out)
    assert processor.video_token_id == VOCABULARY
    assert len(tokenizer) == VOCABULARY - 7, "the caller's tokenizer was changed"


# --- EVE ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eve")
    return folder, write_release(folder, kind="eve")


SMALL_CANVAS = {"image_size": 56}


def test_eve_gives_the_spatial_parts_and_the_rest_starts_fresh(eve, tmp_path, caplog):
    folder, theirs = eve
    out = convert_checkpoint(folder, tmp_path / "out", vision_config=SMALL_CANVAS, progress=False)
    ours = weights_of(out)
    assert torch.equal(ours["model.stab.patch_embedding.weight"], theirs["model.vision_tower.patch_embedding.weight"])
    keys_and_values = theirs["model.vision_tower.global_attention.kv.1.weight"]
    assert torch.equal(ours["model.stab.fsra.attention.k_proj.weight"], keys_and_values[:16])
    assert torch.equal(ours["model.projector.linear_1.bias"], theirs["model.mm_projector.0.bias"])
    fresh = {name for name in ours if name.startswith(("model.stab.lste", "model.stab.gstra", "model.stab.fusion"))}
    assert len(fresh) == 13 + 19 + 5
    assert all(name in caplog.text for name in fresh - {"model.stab.lste.norm.num_batches_tracked"})
    assert not ours["model.stab.lste.expand.weight"].any(), "as the model's own initialisation has it"
    assert ours["model.stab.gstra.fc1.weight"].float().std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(ours["model.stab.lste.norm.running_var"], torch.ones(16))

    model, info = VideoPandaForConditionalGeneration.from_pretrained(out, dtype="float32", output_loading_info=True)
    assert not any(info.values()), info
    features = model.get_video_features(torch.randn(1, 5, 3, 56, 56), torch.tensor([[5, 2, 1]])).pooler_output[0]
    assert features.shape == (5 * (2 * 2 + 1), 16)
    assert features.isfinite().all()


def test_eve_seed(eve, tmp_path):
    outs = [
        convert_checkpoint(eve[0], tmp_path / name, seed=seed, vision_config=SMALL_CANVAS, progress=False)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    state = torch.random.get_rng_state()
    first, second, third = map(weights_of, outs)
    assert_same_weights(first, second)
    assert not torch.equal(first["model.stab.gstra.fc1.weight"], third["model.stab.gstra.fc1.weight"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_eve_without_temporal_parts(eve, tmp_path):
    ablation = {**SMALL_CANVAS, "use_lste": False, "use_gstra": False, "use_row_token": False}
    out = convert_checkpoint(eve[0], tmp_path / "out", vision_config=ablation, progress=False)
    left_out = tuple(f"model.stab.{part}" for part in ("lste", "gstra", "fusion", "row_embedding"))
    assert not any(name.startswith(left_out) for name in weights_of(out))
    VideoPandaForConditionalGeneration.from_pretrained(out)


def test_eve_alignment_head_where_it_matches(eve, tmp_path):
    folder, theirs = eve
    other = tmp_path / "eve"
    shutil.copytree(folder, other)
    name = "model.vision_tower_compressor.norm_layer.0.1.weight"
    spoil(other, lambda tensors: tensors.update({name: torch.zeros(512, 16, dtype=torch.float16)}))
    out = convert_checkpoint(
        other, tmp_path / "out", keep_alignment_head=True, vision_config=SMALL_CANVAS, progress=False
    )
    head = load_file(out / "alignment_head.safetensors")
    assert "projections.0.weight" not in head
    assert torch.equal(head["output.weight"], theirs["model.vision_tower_compressor.output_layer.weight"])


def test_a_temporal_part_in_an_eve_checkpoint_is_unknown(eve, tmp_path):
    other = tmp_path / "eve"
    shutil.copytree(eve[0], other)
    spoil(other, lambda tensors: tensors.update({"model.vision_tower.balance": torch.zeros(16)}))
    with pytest.raises(ValueError, match=r"unknown \(1\): model\.vision_tower\.balance"):
        convert_checkpoint(other, tmp_path / "out", progress=False)
