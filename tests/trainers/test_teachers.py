"""The four teachers, each as a tiny checkpoint: features, frozenness, padding, and loading that never guesses."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
)

from video_panda import VideoPandaVideoProcessor
from video_panda.processing.geometry_video_panda import token_grid
from video_panda.trainers import teachers
from video_panda.trainers.languagebind import LanguageBindVideoConfig, LanguageBindVideoModel
from video_panda.trainers.teachers import DEFAULT_SOURCES, TEACHERS, load_teacher, valid_cells

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {**SIZES, "num_hidden_layers": 1, "vocab_size": 50}
DINO = {**SIZES, "mlp_ratio": 2, "image_size": 70}
VIDEOMAE = {**SIZES, "image_size": 48, "patch_size": 16, "num_frames": 8, "use_mean_pooling": False}
DECODER = {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}


def languagebind_model(**vision):
    config = {**SIZES, "add_time_attn": True, "num_frames": 4, **vision}
    return LanguageBindVideoModel(LanguageBindVideoConfig.from_checkpoint({"vision_config": config}))


def write_languagebind(folder, **vision):
    """The published layout: text tower and projections beside the vision tower, one pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "LanguageBindVideo", "vision_config": {**SIZES, "add_time_attn": True, "num_frames": 4}}
    config["vision_config"].update(vision)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"vision_model.{name}": tensor for name, tensor in randomised(languagebind_model(**vision)).items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    weights["text_model.final_layer_norm.weight"] = torch.ones(16)
    weights["logit_scale"] = torch.tensor(1.0)
    torch.save(weights, folder / "pytorch_model.bin")


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.state_dict()


def write_model(folder, model):
    randomised(model)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One tiny checkpoint of each kind, and of the variants that the same kind takes."""
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    write_languagebind(root / "languagebind")
    write_model(root / "clip", CLIPModel(CLIPConfig(vision_config=SIZES, text_config=TEXT)))
    write_model(root / "clip_vision", CLIPVisionModel(CLIPVisionConfig(**SIZES)))
    write_model(root / "dinov2", Dinov2Model(Dinov2Config(**DINO)))
    write_model(root / "registers", Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)))
    write_model(root / "internvideo", VideoMAEForPreTraining(VideoMAEConfig(**VIDEOMAE, **DECODER)))
    return root


CASES = [
    ("languagebind", "languagebind", 56),
    ("clip", "clip", 56),
    ("clip", "clip_vision", 56),
    ("dinov2", "dinov2", 224),
    ("dinov2", "registers", 224),
    ("internvideo", "internvideo", 48),
]


def pixels_for(teacher, num_videos=2, num_frames=4, seed=1):
    shape = (num_videos, num_frames, 3, teacher.image_size, teacher.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states_of_transformers(name, source, pixels, layer):
    """The same feature through transformers' own models, all layers and all hidden states computed."""
    if name == "internvideo":
        states = VideoMAEModel.from_pretrained(source)(pixels, output_hidden_states=True).hidden_states[layer]
        return states.unflatten(1, (-1, 9)).repeat_interleave(2, dim=1)
    model_class = {"dinov2": Dinov2Model, "registers": Dinov2WithRegistersModel}.get(name, CLIPVisionModel)
    states = model_class.from_pretrained(source)(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[layer]
    return states[:, 4 if name == "registers" else 1 :].unflatten(0, pixels.shape[:2])


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize(("kind", "name", "size"), CASES[1:])
def test_features_are_those_of_transformers(sources, kind, name, size, layer):
    teacher = load_teacher(kind, sources / name, layer=layer)
    assert (teacher.image_size, teacher.width) == (size, 16)
    assert teacher.side == size // teacher.patch_size
    pixels = pixels_for(teacher, num_frames=8 if kind == "internvideo" else 3)
    expected = states_of_transformers(name, sources / name, pixels, layer)
    got = teacher(pixels)
    assert got.shape == (*pixels.shape[:2], teacher.side, teacher.side, 16)
    assert torch.allclose(got.flatten(2, 3), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temporal_attention", [True, False])
def test_languagebind_from_its_published_layout(golden_folder, temporal_attention):
    folder = golden_folder / "languagebind_tiny"
    expected = load_file(folder / "expected.safetensors")
    teacher = load_teacher("languagebind", folder / "checkpoint", temporal_attention=temporal_attention)
    assert teacher.max_num_frames == (8 if temporal_attention else None)
    got, golden = teacher(expected["pixel_values"]).flatten(2, 3), expected["hidden_states_-2"][:, :, 1:]
    assert ((got - golden).norm() / golden.norm() < 1e-5) == temporal_attention
    if not temporal_attention:
        stored = torch.load(folder / "checkpoint/pytorch_model.bin", weights_only=True)
        weights = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
        fields = json.loads((folder / "checkpoint/config.json").read_text())["vision_config"]
        clip = CLIPVisionModel(CLIPVisionConfig(**{key: fields[key] for key in (*SIZES, "hidden_act")})).eval()
        assert not clip.load_state_dict(weights, strict=False).missing_keys
        states = clip(expected["pixel_values"].flatten(0, 1), output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(got.flatten(0, 1), states[:, 1:], atol=1e-6)


@pytest.mark.parametrize(("kind", "name", "size"), CASES)
def test_a_teacher_stays_frozen_and_in_eval_mode(sources, kind, name, size):
    teacher = load_teacher(kind, sources / name)
    model = torch.nn.ModuleDict({"teacher": teacher})
    model.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    features = teacher(pixels_for(teacher).requires_grad_())
    assert not features.requires_grad


@pytest.mark.parametrize(("kind", "name", "size"), CASES)
def test_layers_after_the_wanted_one_are_gone(sources, kind, name, size):
    layers = {len(list(load_teacher(kind, sources / name, layer=layer)._layers())) for layer in (-2, 2)}
    assert layers == {2}
    assert len(list(load_teacher(kind, sources / name, layer=0)._layers())) == 0


@pytest.mark.parametrize(("kind", "name", "size"), CASES)
def test_padding_changes_nothing(sources, kind, name, size, monkeypatch):
    """Videos of 1 to 4 frames in one batch, in several passes: as each alone, and zeros where there is no frame."""
    monkeypatch.setattr(teachers, "FRAMES_PER_PASS", 4)
    teacher = load_teacher(kind, sources / name)
    lengths = [3, 4, 1, 3, 2, 3]
    pixels = pixels_for(teacher, len(lengths))
    for place, length in enumerate(lengths):
        pixels[place, length:] = 1e4
    got = teacher(pixels, lengths)
    for place, length in enumerate(lengths):
        alone = teacher(pixels[place : place + 1, :length])[0]
        assert torch.allclose(got[place, :length], alone, atol=1e-5)
        assert not got[place, length:].any()


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [6, 5, 1])
def test_internvideo_takes_fewer_frames(sources, num_frames):
    """As a VideoMAE of that many frames; the last of an odd number is shown twice."""
    teacher = load_teacher("internvideo", sources / "internvideo")
    pixels = pixels_for(teacher, num_frames=num_frames)
    even = torch.cat([pixels, pixels[:, -1:]], dim=1) if num_frames % 2 else pixels
    reference = VideoMAEModel.from_pretrained(sources / "internvideo", num_frames=even.shape[1])
    states = reference(even, output_hidden_states=True).hidden_states[-2].unflatten(1, (-1, 3, 3))
    expected = torch.stack([states[:, frame // 2] for frame in range(num_frames)], dim=1)
    assert torch.allclose(teacher(pixels), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["internvideo", "languagebind"])
def test_too_many_frames(sources, name):
    teacher = load_teacher(name, sources / name)
    too_many = teacher.max_num_frames + 1
    with pytest.raises(
        ValueError, match=f"{name} teacher takes at most {too_many - 1} frames .* got a video of {too_many}"
    ):
        teacher(pixels_for(teacher, num_frames=too_many))
    # What only pads is not a frame.
    teacher(pixels_for(teacher, num_frames=too_many), [1, 2])


@pytest.mark.parametrize(("kind", "name", "size"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_its_own_dtype_under_autocast(sources, kind, name, size, dtype):
    teacher = load_teacher(kind, sources / name, dtype=dtype)
    pixels = pixels_for(teacher)
    plain = teacher(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = teacher(pixels)
    assert got.dtype == teacher.dtype == getattr(torch, dtype)
    assert torch.equal(got, plain)


def test_auto_keeps_the_stored_dtype(sources, tmp_path):
    write_model(tmp_path, CLIPVisionModel(CLIPVisionConfig(**SIZES)).to(torch.bfloat16))
    assert load_teacher("clip", tmp_path).dtype == torch.bfloat16
    assert load_teacher("languagebind", sources / "languagebind").dtype == torch.float32


@pytest.mark.parametrize("kind", ["clip", "dinov2", "languagebind"])
def test_another_canvas(sources, kind):
    teacher = load_teacher(kind, sources / kind, image_size=84)
    assert teacher(pixels_for(teacher)).shape == (2, 4, 6, 6, 16)
    with pytest.raises(ValueError, match="multiple of the patch of 14 px, got 60"):
        load_teacher(kind, sources / kind, image_size=60)


def test_internvideo_has_one_canvas(sources):
    with pytest.raises(ValueError, match="canvas is of 48 px, got `image_size` 64"):
        load_teacher("internvideo", sources / "internvideo", image_size=64)


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 80), height=st.integers(1, 80), side=st.integers(1, 9), patch=st.sampled_from([2, 3]))
def test_valid_cells_are_where_the_processor_pastes(width, height, side, patch):
    """A white picture on the canvas: the crop is all white, and nothing white is left outside of it."""
    processor = VideoPandaVideoProcessor(
        image_size=side * patch, patch_size=patch, downsample_window=1, image_mean=0.5, image_std=0.5
    )
    picture = torch.full((1, height, width, 3), 255, dtype=torch.uint8).numpy()
    inputs = processor(picture, input_data_format="channels_last", do_normalize=False)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert (t, h, w) == (1, *token_grid(width, height, side))
    pixels = inputs["pixel_values_videos"][0]
    cells = pixels.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    cropped = valid_cells(cells, (h, w))
    assert cropped.shape == (1, h, w, 3 * patch * patch)
    assert cropped.min() == 1
    assert (cells == 1).all(-1).sum() == h * w


def test_valid_cells_of_what_does_not_fit():
    with pytest.raises(ValueError, match="`w` is 5 tokens, more than the canvas' 4"):
        valid_cells(torch.zeros(1, 4, 4, 2), (3, 5))
    with pytest.raises(ValueError, match="square canvas"):
        valid_cells(torch.zeros(1, 4, 3, 2), (3, 3))


@pytest.mark.parametrize(("kind", "name", "size"), CASES)
def test_its_processor_draws_on_its_canvas(sources, kind, name, size):
    teacher = load_teacher(kind, sources / name)
    processor = teacher.video_processor(num_frames=2)
    picture = torch.full((2, 30, 60, 3), 200, dtype=torch.uint8).numpy()
    inputs = processor(picture)
    assert inputs["video_grid_thw"].tolist() == [[2, -(-teacher.side // 2), teacher.side]]
    middle = inputs["pixel_values_videos"][0, 0, :, size // 2, size // 2]
    expected = (200 / 255 - torch.tensor(teacher.image_mean)) / torch.tensor(teacher.image_std)
    assert torch.allclose(middle, expected, atol=1e-5)
    assert teacher(inputs["pixel_values_videos"]).isfinite().all()


def test_every_kind_has_a_default_source():
    assert [teacher.kind for teacher in TEACHERS] == list(DEFAULT_SOURCES)


def test_the_fingerprint_tells_features_apart(sources, tmp_path):
    """Everything that changes the features changes it; moving the folder does not."""
    source = sources / "languagebind"
    original = load_teacher("languagebind", source)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in source.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert load_teacher("languagebind", moved).fingerprint == original.fingerprint
    weights = torch.load(moved / "pytorch_model.bin", weights_only=True)
    weights["vision_model.encoder.layers.0.mlp.fc1.weight"][3, 2] += 1e-4
    torch.save(weights, moved / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 4
    write_languagebind(tmp_path / "heads")
    (tmp_path / "heads/pytorch_model.bin").write_bytes((source / "pytorch_model.bin").read_bytes())
    (tmp_path / "heads/config.json").write_text(json.dumps(config))
    others = [
        load_teacher("languagebind", moved),
        load_teacher("languagebind", tmp_path / "heads"),
        load_teacher("languagebind", source, dtype="bfloat16"),
        load_teacher("languagebind", source, layer=1),
        load_teacher("languagebind", source, layer=-1),
        load_teacher("languagebind", source, temporal_attention=False),
        load_teacher("languagebind", source, image_size=84),
        load_teacher("clip", sources / "clip"),
    ]
    fingerprints = {teacher.fingerprint for teacher in [original, *others]}
    assert len(fingerprints) == 1 + len(others)


@pytest.mark.parametrize(
    ("pixels", "num_frames", "message"),
    [
        (torch.zeros(2, 3, 56, 56), None, r"expects frames \(V, T, 3, 56, 56\).* got \(2, 3, 56, 56\)"),
        (torch.zeros(1, 2, 3, 42, 42), None, r"got \(1, 2, 3, 42, 42\)"),
        (torch.zeros(1, 0, 3, 56, 56), None, r"got \(1, 0, 3, 56, 56\)"),
        (torch.zeros(2, 2, 3, 56, 56), [2], "from 1 to 2 for each of 2 videos, got \\[2\\]"),
        (torch.zeros(1, 2, 3, 56, 56), [3], "got \\[3\\]"),
        (torch.zeros(1, 2, 3, 56, 56), [0], "got \\[0\\]"),
    ],
)
def test_input_that_does_not_fit(sources, pixels, num_frames, message):
    with pytest.raises(ValueError, match=message):
        load_teacher("clip", sources / "clip")(pixels, num_frames)


def test_no_videos_at_all(sources):
    teacher = load_teacher("clip", sources / "clip")
    assert teacher(torch.zeros(0, 2, 3, 56, 56)).shape == (0, 2, 4, 4, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "siglip"}, "Unknown teacher 'siglip'; expected one of languagebind, clip, dinov2, internvideo"),
        ({"kind": "clip", "dtype": "int8"}, "Unknown teacher dtype 'int8'"),
        ({"kind": "clip", "layer": 4}, "from -4 to 3 .* got 4"),
        ({"kind": "clip", "layer": -5}, "got -5"),
        ({"kind": "clip", "layer": 1.5}, "got 1.5"),
        ({"kind": "clip", "layer": True}, "got True"),
        ({"kind": "dinov2"}, "dinov2 teacher .*model_type 'clip', expected 'dinov2' or 'dinov2_with_registers'"),
        ({"kind": "languagebind"}, "languagebind teacher .*expected 'LanguageBindVideo'"),
        ({"kind": "internvideo"}, "expected 'videomae'"),
    ],
)
def test_what_cannot_be_loaded(sources, options, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(source=sources / "clip", **options)


def test_a_source_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"clip teacher .*empty: the folder holds no config.json"):
        load_teacher("clip", tmp_path / "empty")
    with pytest.raises(OSError, match=r"clip teacher .*nowhere"):
        load_teacher("clip", tmp_path / "nowhere")


def test_a_folder_without_weights(sources, tmp_path):
    (tmp_path / "config.json").write_text((sources / "languagebind/config.json").read_text())
    with pytest.raises(OSError, match="no file named"):
        load_teacher("languagebind", tmp_path)


def test_temporal_attention_that_the_checkpoint_lacks(tmp_path):
    write_languagebind(tmp_path, add_time_attn=False)
    with pytest.raises(ValueError, match=r"has no temporal attention .* or temporal_attention=False"):
        load_teacher("languagebind", tmp_path)
    assert load_teacher("languagebind", tmp_path, temporal_attention=False).max_num_frames is None


def rename_weights(folder, target, change):
    """A copy of a LanguageBind folder with other weights."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, target / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("vision_model.pre_layrnorm.bias"),
            "lacks 1 weights of the encoder: pre_layrnorm.bias",
        ),
        (
            lambda weights: weights.pop("vision_model.encoder.layers.2.temporal_embedding"),
            "lacks 1 .*encoder.layers.2.temporal_embedding",
        ),
        (
            lambda weights: weights.update({"vision_model.encoder.layers.3.mlp.fc1.bias": torch.ones(24)}),
            "holds, beyond its configuration, 1 .*encoder.layers.3.mlp.fc1.bias",
        ),
        (
            lambda weights: weights.update({"vision_model.encoder.layers.0.temporal_embedding": torch.ones(1, 8, 16)}),
            r"another shape .*layers.0.temporal_embedding is \(1, 8, 16\), expected \(1, 4, 16\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(sources, tmp_path, change, message):
    rename_weights(sources / "languagebind", tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        load_teacher("languagebind", tmp_path / "changed")


def test_sharded_safetensors(sources, tmp_path):
    """The same features from two shards with an index."""
    source = sources / "languagebind"
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    weight_map = {}
    for place in range(2):
        name = f"model-0000{place + 1}-of-00002.safetensors"
        part = {key: weights[key] for key in sorted(weights)[place::2]}
        save_file(part, tmp_path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expected, got = load_teacher("languagebind", source), load_teacher("languagebind", tmp_path)
    pixels = pixels_for(got)
    assert torch.equal(expected(pixels), got(pixels))
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"model-00002-of-00002.safetensors holds .* cut off"):
        load_teacher("languagebind", tmp_path)


class Dangerous:
    def __reduce__(self):
        return open, ("executed", "w")


def test_a_pickle_with_code_is_not_run(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((sources / "languagebind/config.json").read_text())
    torch.save({"vision_model.pre_layrnorm.bias": Dangerous()}, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match=r"languagebind teacher .*weights cannot be read"):
        load_teacher("languagebind", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_that_was_cut_off(sources, tmp_path):
    (tmp_path / "config.json").write_text((sources / "languagebind/config.json").read_text())
    content = (sources / "languagebind/pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"languagebind teacher .*weights cannot be read"):
        load_teacher("languagebind", tmp_path)


def test_loading_is_silent(sources, capfd):
    """transformers would list every weight of the decoder and of the text tower."""
    for name in ("clip", "internvideo"):
        load_teacher(name, sources / name)
    shown = capfd.readouterr()
    assert "UNEXPECTED" not in shown.out + shown.err
