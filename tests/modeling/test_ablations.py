"""The ablations of the paper's Tables 4, 8 and 9, every combination; and STAB written out again, slowly, to compare with."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration

FIELDS = ("use_row_token", "use_fsra", "use_lste", "use_gstra", "downsampling", "downsampling_position")
VALUES = (
    *[(True, False)] * 4,
    ("lsd", "avg_pool", "half_resolution", "perceiver_resampler"),
    ("after_lste", "before_lste"),
)
COMBINATIONS = [dict(zip(FIELDS, values)) for values in itertools.product(*VALUES)]
PUBLISHED = COMBINATIONS[0]
DOCS_PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def reasons_to_refuse(fields: dict) -> list[str]:
    """Said independently of the configuration: what makes a combination meaningless, in words its message must hold."""
    before = fields["downsampling_position"] == "before_lste"
    reasons = {
        "context": not fields["use_fsra"] and not fields["use_gstra"],
        "no LSTE to stand before": before and not fields["use_lste"],
        "keeps the grid": before and fields["downsampling"] in ("half_resolution", "perceiver_resampler"),
    }
    return [reason for reason, applies in reasons.items() if applies]


def short_name(fields: dict) -> str:
    changed = [str(value) if value is not False else f"no_{name[4:]}" for name, value in fields.items()]
    return "-".join(part for part in changed if part != "True")


MEANINGLESS = [fields for fields in COMBINATIONS if reasons_to_refuse(fields)]
SENSIBLE = [fields for fields in COMBINATIONS if not reasons_to_refuse(fields)]


def num_tokens(fields: dict, height: int, width: int) -> int:
    """What docs/configuration.md says: the context, the patches, and the row ends where there are any."""
    return 1 + height * width + (height if fields["use_row_token"] else 0)


# Every combination is refused or works


def test_the_number_of_combinations():
    assert (len(COMBINATIONS), len(MEANINGLESS), len(SENSIBLE)) == (128, 68, 60)


@pytest.mark.parametrize("fields", MEANINGLESS, ids=short_name)
def test_a_meaningless_combination_is_refused_with_a_reason(fields):
    with pytest.raises(ValueError, match="|".join(reasons_to_refuse(fields))):
        tiny_config(vision=fields)


def training_batch(config: VideoPandaConfig) -> dict:
    """A prompt with a video of six frames (a chunk of four and one of two) and, where FSRA is there, a still image."""
    vision = config.vision_config
    side, generator = vision.canvas_size, torch.Generator().manual_seed(5)

    def tokens(patch_id, height, width):
        row = [patch_id] * width + [config.row_token_id] * vision.use_row_token
        return [config.frame_token_id, *row * height]

    ids = [1, 5, *tokens(config.video_token_id, 2, 3) * 6, 7, 8]
    batch = {
        "pixel_values_videos": torch.randn(1, 6, 3, side, side, generator=generator),
        "video_grid_thw": torch.tensor([[6, 2, 3]]),
    }
    if vision.use_fsra:
        ids += [9, *tokens(config.image_token_id, 3, 2), 10]
        batch["pixel_values"] = torch.randn(1, 3, side, side, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 3, 2]])
    input_ids = torch.tensor([[*ids, 11, 12, 2]])
    labels = torch.full_like(input_ids, -100)
    labels[:, -3:] = input_ids[:, -3:]
    return {**batch, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


@pytest.mark.parametrize("fields", SENSIBLE, ids=short_name)
def test_a_sensible_combination_trains_a_step_and_is_saved_and_loaded(fields, tmp_path):
    config = tiny_config(vision=fields)
    model = tiny_model(config)
    stab = model.model.stab
    assert (stab.lste is not None) == fields["use_lste"]
    assert (stab.gstra is not None) == (stab.fusion is not None) == fields["use_gstra"]
    assert (stab.fsra is not None) == fields["use_fsra"]
    assert (stab.lsd is not None) == (fields["downsampling"] == "lsd")
    assert (stab.perceiver_resampler is not None) == (fields["downsampling"] == "perceiver_resampler")
    assert ("row_embedding" in dict(stab.named_parameters())) == fields["use_row_token"]

    batch = training_batch(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss = model.train()(**batch).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
        # A bias on all keys alike drops out of the softmax: what is left of its gradient is rounding.
        assert parameter.grad.any() or name.endswith("gstra.k_proj.bias"), f"{name} gets no gradient"
    optimizer.step()
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    assert output.loss.isfinite()
    assert len(output.video_hidden_states) == 6 * num_tokens(fields, 2, 3)
    if fields["use_fsra"]:
        assert len(output.image_hidden_states) == num_tokens(fields, 3, 2)

    model.save_pretrained(tmp_path)
    loaded, report = VideoPandaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert {name: getattr(loaded.config.vision_config, name) for name in FIELDS} == fields
    again = loaded.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, output.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [each for each in SENSIBLE if each["use_row_token"]], ids=short_name)
def test_a_fresh_model_learns_with_its_zero_initialisation(fields):
    """Zero-initialised projections let nothing through at the first step; after three, every parameter has moved."""
    torch.manual_seed(0)
    config = tiny_config(vision={**fields, "gstra_dropout": 0.0, "fusion_dropout": 0.0})
    model = VideoPandaForConditionalGeneration(config).train()
    before = {name: parameter.detach().clone() for name, parameter in model.model.stab.named_parameters()}
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-3), training_batch(config)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    still = [name for name, parameter in model.model.stab.named_parameters() if torch.equal(parameter, before[name])]
    assert still in ([], ["gstra.k_proj.bias"])


def test_initialisation():
    """LSTE's branch and GSTRA start as nothing, as in the release; whatever else is learned and no bias is drawn."""
    stab = VideoPandaForConditionalGeneration(tiny_config(vision={"downsampling": "perceiver_resampler"})).model.stab
    with torch.no_grad():
        for parameter in stab.parameters():
            parameter.fill_(7.0)
        for module in stab.modules():
            stab._init_weights(module)
        patches = torch.randn(1, 4, 6, 6, 32)
        assert (stab.gstra(patches.flatten(1, 3)) == 0).all()
        stab.lste.position_encoding.weight.zero_()
        torch.testing.assert_close(stab.lste(patches), patches, rtol=0, atol=0)
    assert (stab.fusion.balance == 0).all()
    drawn = {"latents": stab.perceiver_resampler.latents, "class": stab.fsra.class_embedding, "row": stab.row_embedding}
    for name, parameter in {**drawn, "patch": stab.patch_embedding.weight, "q": stab.gstra.q_proj.weight}.items():
        assert 0.01 < parameter.detach().std() < 0.03, name
        assert parameter.detach().mean().abs() < 0.015, name


def test_a_still_image_without_fsra_is_refused():
    config = tiny_config(vision={"use_fsra": False})
    model, side = tiny_model(config), config.vision_config.canvas_size
    with pytest.raises(ValueError, match="use_fsra=False"):
        model.get_image_features(torch.randn(1, 3, side, side), torch.tensor([[1, 3, 3]]))
    with pytest.raises(ValueError, match="use_fsra=False"):
        model.get_video_features(torch.randn(1, 1, 3, side, side), torch.tensor([[1, 3, 3]]))


@pytest.mark.parametrize(("fields", "wrong_side"), [({}, 42), ({"downsampling": "half_resolution"}, 84)])
def test_pixels_of_the_other_resolution_are_refused(fields, wrong_side):
    model = tiny_model(tiny_config(vision=fields))
    side = 84 + 42 - wrong_side
    pixels = torch.randn(1, 4, 3, wrong_side, wrong_side)
    with pytest.raises(ValueError, match=rf"shape \(1, 4, 3, {wrong_side}, {wrong_side}\).*3, {side}, {side}\)"):
        model.get_video_features(pixels, torch.tensor([[4, 3, 3]]))


# STAB once more, to be read: one frame, one window, one head at a time, in the words of the paper's section 3.
# `weights` is a state dict of STAB; D is its width.


def layer_norm(weights, name, states):
    return F.layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def linear(weights, name, states):
    return F.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def embed_patches(weights, frames):
    """(K, 3, S, S) -> E (D, K, P, P): channels first, as convolutions want it."""
    kernel = weights["patch_embedding.weight"]
    return F.conv2d(frames, kernel, stride=kernel.shape[-1]).transpose(0, 1)


def local_encoding(weights, embedded, use_batch_statistics):
    """LSTE of chunks (M, D, K, P, P): Y = E + A(E), Z = Y + DPE(Y)."""
    mean, variance = weights["lste.norm.running_mean"].clone(), weights["lste.norm.running_var"].clone()
    normed = F.batch_norm(
        embedded, mean, variance, weights["lste.norm.weight"], weights["lste.norm.bias"], use_batch_statistics, eps=1e-5
    )
    reduced = F.conv3d(normed, weights["lste.reduce.weight"][:, :, None, None, None], weights["lste.reduce.bias"])
    over_time = weights["lste.temporal.weight"][:, :, :, None, None]
    mixed = F.conv3d(reduced, over_time, weights["lste.temporal.bias"], padding=(1, 0, 0), groups=len(over_time))
    expand = weights["lste.expand.weight"][:, :, None, None, None]
    encoded = embedded + F.conv3d(mixed, expand, weights["lste.expand.bias"])
    kernel = weights["lste.position_encoding.weight"]
    return encoded + F.conv3d(encoded, kernel, weights["lste.position_encoding.bias"], padding=1, groups=len(kernel))


def chunk_context(weights, num_heads, positions):
    """GSTRA: V (D) of all positions (N, D) of a chunk."""
    query, keys = weights["gstra.query"], layer_norm(weights, "gstra.norm_context", positions)[:, None]
    projections = [f"gstra.{name}_proj" for name in "qkv"]
    attended, _ = F.multi_head_attention_forward(
        layer_norm(weights, "gstra.norm_query", query)[None, None],
        keys,
        keys,
        len(query),
        num_heads,
        in_proj_weight=torch.cat([weights[f"{name}.weight"] for name in projections]),
        in_proj_bias=torch.cat([weights[f"{name}.bias"] for name in projections]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weights["gstra.out_proj.weight"],
        out_proj_bias=weights["gstra.out_proj.bias"],
        need_weights=False,
    )
    updated = query + attended[0, 0]
    hidden = linear(weights, "gstra.fc1", layer_norm(weights, "gstra.norm_mlp", updated))
    return updated + linear(weights, "gstra.fc2", hidden * torch.sigmoid(1.702 * hidden))


def pool(weights, name, num_heads, query, context):
    """A query (D) over a context (N, D), as in LSD and FSRA: query + W_o(sum p v) + b_o, scale D^-1/2."""
    width, head_width = len(query), len(query) // num_heads
    normed = layer_norm(weights, f"{name}.norm_context", context)
    q = linear(weights, f"{name}.q_proj", layer_norm(weights, f"{name}.norm_query", query))
    k, v = linear(weights, f"{name}.k_proj", normed), linear(weights, f"{name}.v_proj", normed)
    heads = []
    for head in range(num_heads):
        own = slice(head * head_width, (head + 1) * head_width)
        probabilities = torch.softmax(k[:, own] @ q[own] / width**0.5, dim=0)
        heads.append(probabilities @ v[:, own])
    return query + linear(weights, f"{name}.out_proj", torch.cat(heads))


def downsample(weights, config, patches, height, width):
    """One frame's patches (rows, columns, D) -> its tokens (height, width, D)."""
    if config.downsampling == "half_resolution":
        return patches
    if config.downsampling == "perceiver_resampler":
        return resample(weights, config, patches, height, width)
    tokens = torch.empty(height, width, patches.shape[-1], dtype=patches.dtype)
    for row, column in itertools.product(range(height), range(width)):
        window = patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1)
        mean = sum(window) / len(window)
        use_lsd = config.downsampling == "lsd"
        tokens[row, column] = pool(weights, "lsd", config.num_attention_heads, mean, window) if use_lsd else mean
    return tokens


def resample(weights, config, patches, height, width):
    """Perceiver Resampler: each cell's latent asks all patches of the frame, and passes an MLP, `num_layers` times."""
    side, name = config.num_tokens_per_side, "perceiver_resampler"
    top, left = (side - height) // 2, (side - width) // 2
    tokens = torch.empty(height, width, patches.shape[-1], dtype=patches.dtype)
    for row, column in itertools.product(range(height), range(width)):
        state = weights[f"{name}.latents"][top + row, left + column]
        for layer in range(config.num_perceiver_layers):
            attention, mlp = f"{name}.attentions.{layer}", f"{name}.mlps.{layer}"
            state = pool(weights, attention, config.num_attention_heads, state, patches.flatten(0, 1))
            hidden = linear(weights, f"{mlp}.1", layer_norm(weights, f"{mlp}.0", state))
            state = state + linear(weights, f"{mlp}.3", F.gelu(hidden))
        tokens[row, column] = state
    return tokens


def fuse(weights, chunk_context_D, frame_context_D):
    mixed = chunk_context_D
    if frame_context_D is not None:
        alpha = torch.sigmoid(weights["fusion.balance"])
        mixed = (1 - alpha) * chunk_context_D + alpha * frame_context_D
    return linear(weights, "fusion.linear", layer_norm(weights, "fusion.norm", mixed))


def reference_stab(weights, config, chunks, grid, still=False, use_batch_statistics=False):
    """Chunks (M, K, 3, S, S) of one (h, w) grid -> (M, K, tokens, D)."""
    height, width = grid
    canvas = torch.stack([embed_patches(weights, frames) for frames in chunks])
    window = 1 if config.downsampling == "half_resolution" else 2
    before = config.downsampling_position == "before_lste"
    if before:  # Table 8: the whole canvas becomes tokens first
        side, window = config.num_tokens_per_side, 1
        per_frame = [
            [downsample(weights, config, frame.permute(1, 2, 0), side, side) for frame in chunk.unbind(1)]
            for chunk in canvas
        ]
        canvas = torch.stack([torch.stack(frames) for frames in per_frame]).permute(0, 4, 1, 2, 3)
    local = dense = canvas
    if config.use_lste and not still:
        local = local_encoding(weights, canvas, use_batch_statistics)
        dense = local + canvas

    top, left = (config.num_tokens_per_side - height) // 2 * window, (config.num_tokens_per_side - width) // 2 * window
    sequences = []
    for m, k in itertools.product(range(len(chunks)), range(chunks.shape[1])):
        frame = dense[m, :, k].permute(1, 2, 0)[top : top + height * window, left : left + width * window]
        tokens = frame if before else downsample(weights, config, frame, height, width)
        context = None
        if config.use_fsra:
            every = tokens.flatten(0, 1)
            context = pool(
                weights, "fsra.attention", config.num_attention_heads, weights["fsra.class_embedding"], every
            )
        if config.use_gstra and not still:
            positions = local[m].flatten(1).t()
            context = fuse(weights, chunk_context(weights, config.num_attention_heads, positions), context)
        sequence = [context]
        for row in tokens:
            sequence += [*row, weights["row_embedding"]] if config.use_row_token else list(row)
        sequences.append(torch.stack(sequence))
    return torch.stack(sequences).unflatten(0, chunks.shape[:2])


def stab_in_double(fields: dict, **more):
    stab = tiny_model(tiny_config(vision={**fields, **more})).model.stab.double()
    return stab, stab.config


def random_chunks(config, num_chunks: int, num_frames: int) -> torch.Tensor:
    side, generator = config.canvas_size, torch.Generator().manual_seed(3)
    return torch.randn(num_chunks, num_frames, 3, side, side, generator=generator, dtype=torch.float64)


def assert_equal_to_reference(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == torch.float64
    assert float((got - expected).norm() / expected.norm()) <= 1e-10


@pytest.mark.parametrize(("grid", "num_frames"), [((3, 3), 4), ((2, 3), 4), ((3, 1), 4), ((1, 2), 3), ((2, 2), 1)])
def test_stab_equals_the_reference(grid, num_frames):
    stab, config = stab_in_double(PUBLISHED)
    chunks = random_chunks(config, 2, num_frames)
    with torch.no_grad():
        expected = reference_stab(stab.state_dict(), config, chunks, grid)
        assert expected.shape == (2, num_frames, num_tokens(PUBLISHED, *grid), 32)
        assert_equal_to_reference(stab(chunks, grid), expected)


def test_stab_in_training_equals_the_reference():
    """Statistics over all positions of all chunks of the batch, background included."""
    stab, config = stab_in_double(PUBLISHED, gstra_dropout=0.0, fusion_dropout=0.0)
    chunks = random_chunks(config, 3, 4)
    before = {name: tensor.clone() for name, tensor in stab.state_dict().items()}
    with torch.no_grad():
        expected = reference_stab(before, config, chunks, (2, 3), use_batch_statistics=True)
        assert_equal_to_reference(stab.train()(chunks, (2, 3)), expected)
        with_running_statistics = reference_stab(before, config, chunks, (2, 3))
        assert not torch.allclose(expected, with_running_statistics)
        embedded = torch.stack([embed_patches(before, frames) for frames in chunks])
        mean = 0.9 * before["lste.norm.running_mean"] + 0.1 * embedded.mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(stab.lste.norm.running_mean, mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_stab_trains_in_every_dtype(dtype, kept):
    """torch refuses a batch normalisation whose weights and statistics differ in dtype."""
    stab = tiny_model().model.stab.to(dtype).train()
    tokens = stab(random_chunks(stab.config, 2, 4).to(dtype), (2, 3))
    tokens.square().mean().backward()
    assert tokens.dtype == dtype
    assert stab.lste.norm.running_var.dtype == kept
    assert all(parameter.grad.isfinite().all() for parameter in stab.parameters())


def test_dropout_acts_in_training_only():
    stab, config = stab_in_double(PUBLISHED)
    chunks = random_chunks(config, 1, 4)
    with torch.no_grad():
        assert torch.equal(stab(chunks, (3, 3)), stab(chunks, (3, 3)))
        first, second = stab.train()(chunks, (3, 3)), stab(chunks, (3, 3))
    assert not torch.allclose(first[:, :, 0], second[:, :, 0])
    torch.testing.assert_close(first[:, :, 1:], second[:, :, 1:])  # only the context passes a dropout


@pytest.mark.parametrize("fields", SENSIBLE, ids=short_name)
def test_every_combination_equals_the_reference(fields):
    stab, config = stab_in_double(fields)
    chunks = random_chunks(config, 1, 2)
    with torch.no_grad():
        assert_equal_to_reference(stab(chunks, (2, 3)), reference_stab(stab.state_dict(), config, chunks, (2, 3)))
        if fields["use_fsra"]:
            still = chunks[:, :1]
            expected = reference_stab(stab.state_dict(), config, still, (2, 3), still=True)
            assert_equal_to_reference(stab(still, (2, 3), still=True), expected)


def test_the_model_cuts_a_video_into_chunks_and_projects_every_token():
    model = tiny_model().double()
    config, weights = model.config.vision_config, model.model.stab.state_dict()
    frames = random_chunks(config, 1, 10)  # chunks of 4, 4 and 2
    with torch.no_grad():
        output = model.get_video_features(frames, torch.tensor([[10, 3, 2]]))
        chunks = [reference_stab(weights, config, frames[:, at : at + 4], (3, 2)).flatten(0, 2) for at in (0, 4, 8)]
        expected = torch.cat(chunks)
        assert_equal_to_reference(output.last_hidden_state, expected)
        projector = model.model.projector
        hidden = F.gelu(F.linear(expected, projector.linear_1.weight, projector.linear_1.bias))
        projected = F.linear(hidden, projector.linear_2.weight, projector.linear_2.bias)
        assert_equal_to_reference(output.pooler_output[0], projected)


# What single ablations mean


def test_average_pooling_is_the_mean_of_each_window():
    stab, config = stab_in_double({**PUBLISHED, "downsampling": "avg_pool"})
    chunks = random_chunks(config, 1, 4)
    with torch.no_grad():
        embedded = torch.stack([embed_patches(stab.state_dict(), frames) for frames in chunks])
        dense = local_encoding(stab.state_dict(), embedded, False) + embedded
        tokens = F.avg_pool2d(dense[0].transpose(0, 1), 2).permute(0, 2, 3, 1)  # (K, 3, 3, D): the whole canvas
        got = stab(chunks, (3, 3))[0, :, 1:].unflatten(1, (3, 4))[:, :, :3]
    assert_equal_to_reference(got, tokens)


def test_half_resolution_makes_every_patch_a_token():
    config = tiny_config(vision={"downsampling": "half_resolution", "use_lste": False}).vision_config
    assert (config.canvas_size, config.num_patches_per_side, config.num_tokens_per_side) == (42, 3, 3)
    stab, config = stab_in_double({"downsampling": "half_resolution", "use_lste": False})
    chunks = random_chunks(config, 1, 4)
    with torch.no_grad():
        tokens = embed_patches(stab.state_dict(), chunks[0]).permute(1, 2, 3, 0)
        got = stab(chunks, (3, 3))[0, :, 1:].unflatten(1, (3, 4))[:, :, :3]
    assert_equal_to_reference(got, tokens)


def test_without_row_the_sequence_is_the_full_one_less_the_row_ends():
    full, config = stab_in_double(PUBLISHED)
    without, _ = stab_in_double({**PUBLISHED, "use_row_token": False})
    missing, unexpected = without.load_state_dict(full.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["row_embedding"])
    chunks = random_chunks(config, 2, 4)
    with torch.no_grad():
        sequence = full(chunks, (2, 3))
        keep = [0, 1, 2, 3, 5, 6, 7]
        torch.testing.assert_close(without(chunks, (2, 3)), sequence[:, :, keep], rtol=0, atol=1e-14)
        assert (sequence[:, :, [4, 8]] == full.row_embedding).all()


def test_without_lste_and_gstra_a_video_is_a_row_of_still_images():
    """EVE* of Table 1: nothing looks across frames, and the context is S itself."""
    stab, config = stab_in_double({**PUBLISHED, "use_lste": False, "use_gstra": False})
    chunks = random_chunks(config, 1, 4)
    with torch.no_grad():
        video = stab(chunks, (2, 3))
        stills = stab(chunks.transpose(0, 1), (2, 3), still=True)
        torch.testing.assert_close(video, stills.transpose(0, 1), rtol=0, atol=1e-13)
        tokens = video[0, 2, 1:].unflatten(0, (2, 4))[:, :3].flatten(0, 1)
        weights = stab.state_dict()
        expected = pool(weights, "fsra.attention", config.num_attention_heads, stab.fsra.class_embedding, tokens)
        assert_equal_to_reference(video[0, 2, 0], expected)


def test_before_lste_a_frame_has_as_many_tokens_as_after_it():
    counts = set()
    for position in ("after_lste", "before_lste"):
        stab, config = stab_in_double({**PUBLISHED, "downsampling_position": position})
        with torch.no_grad():
            counts.add(stab(random_chunks(config, 1, 4), (2, 3)).shape)
    assert counts == {(1, 4, 9, 32)}


def test_the_background_counts_for_gstra_and_for_nothing_else():
    stab, config = stab_in_double({**PUBLISHED, "use_lste": False})
    chunks = random_chunks(config, 1, 4)
    changed = chunks.clone()
    changed[..., 56:, :] += 1.0  # a 2 x 3 frame stands in the upper two of the canvas's three rows of tokens
    with torch.no_grad():
        before, after = stab(chunks, (2, 3)), stab(changed, (2, 3))
    torch.testing.assert_close(before[:, :, 1:], after[:, :, 1:], rtol=0, atol=1e-14)
    assert not torch.allclose(before[:, :, 0], after[:, :, 0])


# The published size: parameters and tokens, on the meta device


def published_size(fields: dict) -> dict:
    """Counts of the 7B configuration: parameters of STAB and of the projector, tokens of a frame and of a video."""
    config = VideoPandaConfig(vision_config=fields)
    config.text_config.num_hidden_layers = 1  # the language model does not count
    side = config.vision_config.canvas_size
    with torch.device("meta"):
        model = VideoPandaForConditionalGeneration(config).eval()
        pixels = torch.empty(2, 8, 3, side, side)
    videos = model.get_video_features(pixels, torch.tensor([[8, 16, 16], [8, 9, 16]])).pooler_output
    assert all(video.shape[1] == 4096 for video in videos)
    square, wide = (len(video) for video in videos)
    parts = {"STAB": model.model.stab, "projector": model.model.projector}
    counts = {name: sum(map(torch.numel, part.parameters())) for name, part in parts.items()}
    return {**counts, "total": sum(counts.values()), "square": square / 8, "16:9": wide / 8}


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def test_the_7b_model_has_the_published_size():
    size = published_size({})
    assert [millions(size[name]) for name in ("STAB", "projector", "total")] == ["24.09 M", "20.98 M", "45.07 M"]
    assert (size["square"], size["16:9"], 8 * size["square"], 8 * size["16:9"]) == (273, 154, 2184, 1232)


def test_eve_has_the_published_size():
    assert round(published_size({"use_lste": False, "use_gstra": False})["total"] / 1e6) == 30


def documented_variants() -> list[tuple[str, dict, list[str]]]:
    """Rows of the table of docs/configuration.md: name, fields, and the cells that are numbers."""
    rows = []
    for line in DOCS_PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 7 and cells[2].endswith(" M"):
            fields = dict(re.findall(r"`(\w+)=([^`]+)`", cells[1]))
            rows.append((cells[0], {name: ast.literal_eval(value) for name, value in fields.items()}, cells[2:]))
    return rows


def test_the_table_of_the_docs_holds_every_ablation_of_the_paper():
    variants = {tuple(fields.items()) for _, fields, _ in documented_variants()}
    assert variants == {
        (),
        (("use_row_token", False),),
        (("use_fsra", False),),
        (("use_lste", False),),
        (("use_gstra", False),),
        (("use_lste", False), ("use_gstra", False)),
        (("downsampling", "avg_pool"),),
        (("downsampling", "half_resolution"),),
        (("downsampling", "perceiver_resampler"),),
        (("downsampling_position", "before_lste"),),
    }


@pytest.mark.parametrize(("name", "fields", "cells"), documented_variants(), ids=lambda value: str(value)[:40])
def test_the_numbers_of_the_docs(name, fields, cells):
    size = published_size(fields)
    expected = [millions(size[part]) for part in ("STAB", "projector", "total")]
    assert cells == [*expected, f"{size['square']:g}", f"{size['16:9']:g}"], name
