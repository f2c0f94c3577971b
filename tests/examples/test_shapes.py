"""The parts of examples/shapes/: words, clips in memory, the teacher, the recipe's folders, the report."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_panda
from video_panda import (
    ShapesQA,
    VideoPandaDataCollator,
    VideoPandaForConditionalGeneration,
    cell_labels,
    draw_scene,
    training_samples,
    write_split,
)
from video_panda.evaluation.shapes_qa import SPLITS

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from shapes import optimizer, phases, recipe, report, teacher, words  # noqa: E402
from shapes.clips import ClipMemory  # noqa: E402
from shapes.patches import whitening_filters  # noqa: E402
from shapes.pointing import with_pointing  # noqa: E402


@pytest.fixture(scope="module")
def processor():
    return words.make_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_split(folder, "train", 6, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def samples(folder):
    return json.loads((folder / "train.json").read_text())


@pytest.fixture(scope="module")
def fresh_teacher():
    torch.manual_seed(0)
    return teacher.ShapesTeacher(teacher.ShapesTeacherModel(teacher.ShapesTeacherConfig()))


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_examples_use_public_names_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("video_panda"):
            assert node.module == "video_panda"
            assert {name.name for name in node.names} <= set(video_panda.__all__)


@pytest.mark.parametrize("content", ["captions", "questions"])
def test_the_tokenizer_knows_every_word(content, processor):
    tokenizer = processor.tokenizer
    for words_seed in (0, 5):
        for split in (range(1000, 1300), range(10**9, 10**9 + 300)):
            for sample in training_samples(split, content, words_seed):
                for turn in sample["conversations"]:
                    text = turn["value"].removeprefix("<video>\n")
                    ids = tokenizer(text)["input_ids"]
                    assert tokenizer.unk_token_id not in ids, text
                    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_the_system_prompt_is_one_word_when_training_and_when_asking(processor):
    chat = [{"role": "user", "content": [{"type": "text", "text": "What colour is the object?"}]}]
    asked = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    taught = processor.apply_chat_template(
        [*chat, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}], tokenize=True, return_dict=True
    )
    shown = [processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) for inputs in (asked, taught)]
    assert shown[0] == ["<s>", "SYSTEM", "USER:", "What", "colour", "is", "the", "object", "?", "ASSISTANT:"]
    assert shown[1] == [*shown[0], "red", "</s>"]


def test_a_batch_from_memory_is_the_collators(processor, folder, samples, fresh_teacher):
    items = list(enumerate(samples))
    memory = ClipMemory(processor, folder, fresh_teacher)
    expected = VideoPandaDataCollator(processor, folder)(items)
    for _ in range(2):  # the second time nothing is decoded
        batch = memory(items)
        for name in ("input_ids", "attention_mask", "labels", "video_grid_thw"):
            assert torch.equal(batch[name], expected[name]), name
        torch.testing.assert_close(batch["pixel_values_videos"], expected["pixel_values_videos"], atol=2e-3, rtol=1e-3)
        features = fresh_teacher(expected["pixel_values_videos"])
        torch.testing.assert_close(torch.stack(batch["teacher_features"]), features, atol=4e-3, rtol=4e-3)
        memory.collator = None


def test_clips_read_in_other_processes_are_the_same(processor, folder, samples):
    filled, own = ClipMemory(processor, folder), ClipMemory(processor, folder)
    filled.fill(samples)
    filled.collator = None  # nothing is read any more
    items = list(enumerate(samples))
    one, other = filled(items), own(items)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if torch.is_tensor(one[name]))
    assert not any(
        value.is_shared() for sample in filled.samples.values() for value in sample.values() if torch.is_tensor(value)
    )


def test_the_teacher_sees_clips_in_full_where_the_student_does_not(folder, samples, fresh_teacher):
    config = recipe.make_config(recipe.Recipe(vision={"downsampling": "half_resolution", "use_row_token": False}))
    full, half = ClipMemory(words.make_processor(), folder), recipe.processor_of(config)
    memory = ClipMemory(half, folder, fresh_teacher, seen_by_teacher=full)
    batch, whole = memory([(0, samples[0])]), full([(0, samples[0])])
    assert batch["pixel_values_videos"].shape[-2:] == (32, 32)
    assert whole["pixel_values_videos"].shape[-2:] == (64, 64)
    assert (whole["input_ids"] != -1).sum() - (batch["input_ids"] != -1).sum() == 8 * 4  # 4 rows a frame
    expected = fresh_teacher(whole["pixel_values_videos"])[0]
    torch.testing.assert_close(batch["teacher_features"][0], expected, atol=4e-3, rtol=4e-3)


def test_the_teachers_canvas_is_the_students(processor, fresh_teacher):
    names = ("image_size", "patch_size", "image_mean", "image_std")
    own, theirs = processor.video_processor, fresh_teacher.video_processor()
    assert all(np.allclose(getattr(own, name), getattr(theirs, name)) for name in names)


def test_what_the_teacher_is_to_believe():
    seeds = [seed for seed in range(200) if draw_scene(seed).family == "single"][:40]
    for seed in seeds:
        scene, beliefs = draw_scene(seed), teacher.attributes_of(seed)
        assert beliefs.shape == (8, teacher.SIDE, teacher.SIDE, teacher.NUM_ATTRIBUTES)
        assert 0 <= beliefs.min() <= beliefs.max() <= 1
        starts = np.cumsum([0, *teacher.ATTRIBUTES.values()])
        colour = dict(zip(teacher.ATTRIBUTES, starts))["colour"]
        x, y = scene.objects[0].centres[3]
        cell = beliefs[3, y // words.PATCH_SIZE, x // words.PATCH_SIZE]
        colours = ("red", "green", "blue", "yellow", "purple", "cyan")
        assert colours[cell[colour : colour + 6].argmax()] == scene.objects[0].colour
        place = cell[starts[-1] :][: 2 * teacher.NUM_BINS].reshape(2, teacher.NUM_BINS)
        centres = np.arange(teacher.NUM_BINS) * 8 + 4
        assert (place @ centres).tolist() == [x, y]  # between two bins both know of it
        assert (place > 0).sum(axis=1).max() <= 2
        past = cell[starts[-1] :][2 * teacher.NUM_BINS : 4 * teacher.NUM_BINS].reshape(2, teacher.NUM_BINS)
        assert (past @ centres).tolist() == list(scene.objects[0].centres[3 - teacher.LAG])
        assert not beliefs[teacher.LAG - 1, ..., starts[-1] :][..., 2 * teacher.NUM_BINS : 4 * teacher.NUM_BINS].any()


def events_of(wanted) -> tuple:
    """The first clip of which something holds, and what the teacher is to believe of its events."""
    scene = next(scene for scene in map(draw_scene, range(500)) if wanted(scene))
    last = -teacher.NUM_QUARTERS
    return scene, teacher.attributes_of(scene.seed)[..., last - len(teacher.EVENTS) : last]


def test_what_happens_is_seen_where_it_happens():
    scene, events = events_of(lambda scene: scene.flickers)
    x, y = (place // words.PATCH_SIZE for place in scene.objects[0].centres[2])
    assert events[2, y, x, 0] == 1
    scene, events = events_of(lambda scene: scene.flickers is False)
    assert not events[..., 0].any()

    scene, events = events_of(lambda scene: scene.family == "order")
    jumps = [next(t for t in range(1, 8) if own.centres[t] != own.centres[t - 1]) for own in scene.objects]
    assert [frame for frame in range(8) if events[frame, ..., 1].any()] == sorted(jumps)

    scene, events = events_of(lambda scene: scene.direction == "right" and scene.objects[0].centres[0][0] == 12)
    comes, goes = ((events[1:4, ..., kind] * np.arange(8)).sum() / events[1:4, ..., kind].sum() for kind in (2, 3))
    assert comes > goes + 1


def test_the_teacher_sees_neighbouring_frames_and_no_others(fresh_teacher):
    pixels = torch.randn(1, 8, 3, 64, 64)
    changed = pixels.clone()
    changed[:, 7] += 1
    before, after = fresh_teacher(pixels), fresh_teacher(changed)
    differs = (before != after).flatten(2).any(-1)[0]
    reach = 2 + fresh_teacher.encoder.config.num_hidden_layers
    assert differs.tolist() == [frame >= 7 - reach for frame in range(8)]


def test_a_saved_teacher_is_the_same(tmp_path, fresh_teacher):
    fresh_teacher.encoder.save_pretrained(tmp_path)
    loaded = teacher.ShapesTeacher(teacher.ShapesTeacherModel.from_pretrained(tmp_path).eval())
    pixels = torch.randn(1, 8, 3, 64, 64)
    assert torch.equal(loaded(pixels), fresh_teacher(pixels))
    assert loaded.fingerprint == fresh_teacher.fingerprint


def test_the_features_hold_each_cells_place_and_frame(fresh_teacher):
    features = fresh_teacher(torch.zeros(1, 8, 3, 64, 64))[0]
    start = teacher.NUM_ATTRIBUTES + 3 * teacher.NUM_FINE
    places = features[..., start : start + 24]
    assert [int(own.argmax()) for own in places[6, 2, 5].split(8)] == [2, 5, 6]
    assert (places.sum(-1) == 3).all()
    assert features.shape[-1] == teacher.FEATURE_WIDTH


def test_the_outline_is_that_of_the_clip():
    scene = next(scene for scene in map(draw_scene, range(100)) if scene.family == "count")
    quarters = teacher.attributes_of(scene.seed)[..., -teacher.NUM_QUARTERS :]
    expected = cell_labels(scene, words.PATCH_SIZE // 2).cover
    found = quarters.reshape(8, 8, 8, 2, 2).transpose(0, 1, 3, 2, 4).reshape(8, 16, 16)
    assert np.array_equal(found, expected.astype(np.float32))
    assert 0 < found.mean() < 1


def test_a_mean_over_a_token_keeps_its_cells_outlines_apart():
    beliefs = torch.rand(1, 2, 8, 8, teacher.NUM_ATTRIBUTES)
    coarse, fine = beliefs[..., : -teacher.NUM_FINE], beliefs[..., -teacher.NUM_FINE :]
    token = teacher._cell_by_cell(beliefs)[0, 1, 2:4, 6:8].mean((0, 1))
    torch.testing.assert_close(token[: coarse.shape[-1]], coarse[0, 1, 2:4, 6:8].mean((0, 1)))
    apart = token[coarse.shape[-1] :].view(2, 2, teacher.NUM_FINE) * 4
    torch.testing.assert_close(apart, fine[0, 1, 2:4, 6:8])


@pytest.mark.parametrize("num_filters", [12, 48])
def test_the_first_filters_answer_alike_and_independently(num_filters):
    draws = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=draws)
    patches = torch.randn(4000, 48, generator=draws) @ mixing
    frames = patches.view(1000, 2, 2, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(1000, 3, 8, 8)
    filters = whitening_filters(frames, 4, num_filters)
    assert filters.shape == (num_filters, 3, 4, 4)
    answers = torch.nn.functional.conv2d(frames, filters, stride=4).transpose(0, 1).flatten(1)
    torch.testing.assert_close(answers @ answers.T / 4000, torch.eye(num_filters), atol=1e-2, rtol=0)
    # What is left out is what differs least.
    assert num_filters == 48 or torch.equal(filters, whitening_filters(frames, 4, 48)[:num_filters])
    with pytest.raises(ValueError, match="a patch of 4 px has 48 numbers"):
        whitening_filters(frames, 4, 49)


def test_pointing_asks_where_each_of_two_objects_is(processor):
    seeds = ShapesQA("nowhere", "train", 20, families="relation").seeds
    for seed, sample in zip(seeds, training_samples(seeds)):
        scene, pointing = draw_scene(seed), with_pointing(sample, seed)
        turns = [turn["value"] for turn in pointing["conversations"]]
        assert turns[0].startswith("<video>\n")
        assert not any("<video>" in turn for turn in turns[1:])
        asked = dict(zip([turn.removeprefix("<video>\n") for turn in turns[::2]], turns[1::2]))
        original = [turn["value"].removeprefix("<video>\n") for turn in sample["conversations"]]
        assert asked.pop(original[0]) == original[1]
        for item in scene.objects:
            x, y = item.centres[0]
            expected = f"{('top', 'bottom')[y >= 32]} {('left', 'right')[x >= 32]}"
            assert asked.pop(f"Where is the {item.colour} object?") == expected
        assert not asked
        ids = processor.tokenizer(" ".join(turns).replace("<video>", ""))["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids
    single = ShapesQA("nowhere", "train", 1, families="single").seeds
    assert with_pointing(training_samples(single)[0], single[0]) == training_samples(single)[0]


def test_the_training_clips_are_of_the_families_asked_for(tmp_path):
    own = recipe.Recipe(num_clips=300, num_relation_clips=20)
    seeds = recipe.clip_seeds(tmp_path, own)
    assert len(set(seeds)) == len(seeds) == 320
    assert all(seed in SPLITS["train"] for seed in seeds)
    scenes = [draw_scene(seed) for seed in seeds]
    assert [scene.family for scene in scenes[300:]] == ["relation"] * 20
    assert {scene.family for scene in scenes[:300]} == {"single", "count", "order"}


def small_network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def take_steps(network, optimizers, num_steps, seed):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        network.zero_grad()
        network(torch.randn(5, 8, generator=draws)).square().sum().backward()
        for own in optimizers:
            own.step()


def test_muon_and_adamw_in_one_are_the_two():
    one, other = small_network(), small_network()
    matrices = [[network[0].weight, network[2].weight] for network in (one, other)]
    biases = [other[0].bias, other[2].bias]
    both = optimizer.MuonAdamW(one.parameters(), lr=1e-2, muon=matrices[0])
    take_steps(one, [both], 5, seed=0)
    muon = torch.optim.Muon(matrices[1], lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    take_steps(other, [muon, torch.optim.AdamW(biases, lr=1e-2, betas=(0.9, 0.98), weight_decay=0)], 5, seed=0)
    for name, parameter in one.named_parameters():
        # PyTorch's Muon rounds to bfloat16 on the way.
        torch.testing.assert_close(parameter, dict(other.named_parameters())[name], atol=2e-3, rtol=0, msg=name)
    assert {group["lr"] for group in both.param_groups} == {1e-2}


def test_a_resumed_optimizer_goes_on_as_it_was():
    one, other = small_network(), small_network()
    make = lambda network: optimizer.MuonAdamW(network.parameters(), lr=1e-2, muon=[network[0].weight])  # noqa: E731
    first = make(one)
    take_steps(one, [first], 3, seed=0)
    other.load_state_dict(one.state_dict())
    second = make(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(one, [first], 3, seed=5)
    take_steps(other, [second], 3, seed=5)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters()))


def test_muon_takes_the_linear_layers_that_train(processor):
    model = VideoPandaForConditionalGeneration(recipe.make_config(recipe.Recipe()))
    model.model.projector.requires_grad_(False)
    groups = optimizer.optimizer_factory()(model, lr=1e-3).param_groups
    by_kind = {group["is_muon"]: {id(parameter) for parameter in group["params"]} for group in groups}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[own] for own in by_kind[is_muon]} for is_muon in (True, False))
    assert muon | adamw == {name for name, own in model.named_parameters() if own.requires_grad}
    assert not muon & adamw
    assert "model.language_model.layers.0.mlp.up_proj.weight" in muon
    assert "model.stab.lsd.q_proj.weight" in muon
    assert "model.language_model.embed_tokens.weight" in adamw
    assert not any("projector" in name for name in muon | adamw)


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    phases.claim(tmp_path, recipe.Recipe())
    phases.claim(tmp_path, recipe.Recipe())
    with pytest.raises(ValueError, match="another recipe \\(it differs in seed, distillation_loss\\)"):
        phases.claim(tmp_path, recipe.Recipe(seed=1, distillation_loss="mse"))


def test_a_phase_that_was_killed_while_it_saved_is_done_again(tmp_path, processor, folder, samples):
    memory = ClipMemory(processor, folder)
    memory.fill(samples, num_workers=0)
    config, language, begun = recipe.make_config(recipe.Recipe()), tmp_path / "language", tmp_path / "start"
    VideoPandaForConditionalGeneration(config).save_pretrained(language)
    config.save_pretrained(begun)  # and then the power failed
    recipe.start_model(begun, config, 0, language, memory)
    (begun / "model.safetensors").unlink()
    assert not list(begun.glob("*.safetensors"))
    recipe.start_model(begun, config, 0, language, memory)  # complete: left alone
    assert not list(begun.glob("*.safetensors"))
    (begun / "complete").unlink()
    recipe.start_model(begun, config, 0, language, memory)
    assert VideoPandaForConditionalGeneration.from_pretrained(begun).num_parameters() > 0


def test_reading_samples_hold_no_video():
    samples = recipe.reading_samples(range(3))
    assert not any("video" in sample for sample in samples)
    assert "<video>" not in json.dumps(samples)
    assert [turn["from"] for turn in samples[0]["conversations"][:4]] == ["human", "gpt", "human", "gpt"]


def test_the_contact_sheet_shows_what_the_model_saw(tmp_path, folder, processor):
    benchmark = ShapesQA(folder, "train", 2)
    question = benchmark.questions[0]
    clip = benchmark.video_path(question)
    rows = [(clip, question.question, "red", question.answer), (clip, question.question, question.answer, "x")]
    report.write_contact_sheet(tmp_path / "sheet.png", rows, processor)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4 + 2 * 120, 4 + 8 * 100, 3)
    frames, _ = processor.video_processor.fetch_videos(clip)
    assert np.array_equal(sheet[24, 4], frames[0, 0, 0].numpy())
    assert np.array_equal(sheet[24 + 95, 4 + 7 * 100 + 95], frames[7, 63, 63].numpy())


@pytest.mark.slow
def test_a_failing_fresh_process_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="the fresh process failed:\n"):
        report.ask_in_fresh_process(tmp_path, [])


@pytest.mark.slow
def test_the_quickstart_in_miniature_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(tmp_path / "out"), "--split", "validation"]
    options = ["--scale", "0.02", "--clips", "32", "--test-clips", "20"]
    first, second = (
        subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    tables = [[line for line in output.splitlines() if line.startswith("|")] for output in (first, second)]
    assert len(tables[0]) == 2 + 11 + 1
    assert tables[0] == tables[1]
    assert "train_runtime" in first
    assert "train_runtime" not in second
    checkpoint = tmp_path / "out" / "checkpoint"
    for name in (
        "README.md",
        "model.safetensors",
        "processor_config.json",
        "modeling_video_panda.py",
        "evaluation.json",
    ):
        assert (checkpoint / name).is_file(), name
    assert (tmp_path / "out" / "questions.png").stat().st_size > 1000
