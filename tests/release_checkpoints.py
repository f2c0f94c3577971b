"""Small checkpoints in the format of the authors' release, of random weights, for the tests of the conversion."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

VOCABULARY = 60


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def tower_shapes(width: int, inner: int, temporal: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes below `model.video_tower.`, as the release writes them."""
    shapes = {"patch_embedding.weight": (width, 3, 14, 14), "class_embedding": (width,), "split_embedding": (width,)}
    for attention in ("local_attention", "global_attention"):
        shapes |= {f"{attention}.{norm}.{part}": (width,) for norm in ("q.0", "kv.0") for part in ("weight", "bias")}
        shapes |= {f"{attention}.q.1.weight": (width, width), f"{attention}.kv.1.weight": (2 * width, width)}
        shapes |= {f"{attention}.proj.weight": (width, width), f"{attention}.proj.bias": (width,)}
    if not temporal:
        return shapes
    shapes |= {"temporal_cls_token": (1, 1, width), "balance": (width,)}
    for twin in ("lmhra1", "lmhra2"):
        block = f"{twin}.pos_embed"
        shapes |= {f"{block}.0.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {f"{block}.0.num_batches_tracked": ()}
        shapes |= {f"{block}.1.weight": (inner, width, 1, 1, 1), f"{block}.1.bias": (inner,)}
        shapes |= {f"{block}.2.weight": (inner, 1, 3, 1, 1), f"{block}.2.bias": (inner,)}
        shapes |= {f"{block}.3.weight": (width, inner, 1, 1, 1), f"{block}.3.bias": (width,)}
    shapes |= {"dpe.weight": (width, 1, 3, 3, 3), "dpe.bias": (width,)}
    shapes |= {"dec.attn.in_proj_weight": (3 * width, width), "dec.attn.in_proj_bias": (3 * width,)}
    shapes |= {"dec.attn.out_proj.weight": (width, width), "dec.attn.out_proj.bias": (width,)}
    shapes |= {"dec.mlp.c_fc.weight": (4 * width, width), "dec.mlp.c_fc.bias": (4 * width,)}
    shapes |= {"dec.mlp.c_proj.weight": (width, 4 * width), "dec.mlp.c_proj.bias": (width,)}
    norms = ("dec.ln_1", "dec.ln_2", "dec.ln_3", "proj.0")
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    return shapes | {"proj.2.weight": (width, width), "proj.2.bias": (width,)}


def release_shapes(config: dict, kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole checkpoint of `kind`, those that are dropped included."""
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    of_keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden), "lm_head.weight": (rows, hidden)}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows_out in (("q", hidden), ("k", of_keys), ("v", of_keys), ("o", hidden)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows_out, hidden)
        shapes[f"{layer}.self_attn.rotary_emb.inv_freq"] = (hidden // config["num_attention_heads"] // 2,)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    names = {"videopanda": ("video_tower", "video_projector"), "eve": ("vision_tower", "mm_projector")}[kind]
    twins = [names, ("vision_tower", "mm_projector")] if kind == "videopanda" else [names]
    for tower, projector in twins:
        temporal = tower_shapes(width, int(width / 1.5), temporal=kind == "videopanda")
        shapes |= {f"model.{tower}.{name}": shape for name, shape in temporal.items()}
        shapes |= {f"model.{projector}.0.weight": (hidden, width), f"model.{projector}.0.bias": (hidden,)}
        shapes |= {f"model.{projector}.2.weight": (hidden, hidden), f"model.{projector}.2.bias": (hidden,)}
    head = f"model.{names[0]}_compressor"
    for number in range(config["num_hidden_layers"] // 4 + 1):
        shapes |= {f"{head}.norm_layer.{number}.0.{part}": (hidden,) for part in ("weight", "bias")}
        shapes[f"{head}.norm_layer.{number}.1.weight"] = (1024, hidden)
    shapes |= {f"{head}.input_layer.weight": (1024, hidden), f"{head}.input_layer.bias": (1024,)}
    shapes |= {f"{head}.output_layer.weight": (1024, 1024), f"{head}.output_layer.bias": (1024,)}
    teacher = f"{head}.teacher_layer.x" if kind == "videopanda" else f"{head}.clip_layer.x"
    return shapes | {
        teacher: (2, 2),
        ("model.video_teacher.x" if kind == "videopanda" else "model.vision_clip.x"): (2,),
    }


def release_config_of(kind: str, width: int, **text) -> dict:
    config = {
        **{"model_type": kind, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": width},
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 50000.0},
        **{"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    if kind == "videopanda":
        config |= {"image_size": 56, "patch_stride": 14, "conv_stride": 2, "num_frames": 4, "all_num_frames": 8}
        config["video_hidden_size"] = width
    return config | text


def save_sharded(folder: Path, tensors: dict, num_shards: int = 3, suffix: str = "bin") -> None:
    stem = "pytorch_model" if suffix == "bin" else "model"
    groups = [dict(list(tensors.items())[number::num_shards]) for number in range(num_shards)]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05d}-of-{num_shards:05d}.{suffix}"
        torch.save(group, folder / name) if suffix == "bin" else save_file(group, folder / name)
        weight_map |= dict.fromkeys(group, name)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_release(folder: Path, kind: str = "videopanda", width: int = 16, **text) -> dict[str, torch.Tensor]:
    """A checkpoint of random float16 weights in the release's format (three pickle shards). Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = release_config_of(kind, width, **text)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in release_shapes(config, kind, width).items():
        values = 0.1 * torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            values = values.square() + 0.5
        tensors[name] = torch.tensor(7) if name.endswith("num_batches_tracked") else values.half()
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    write_json(folder / "generation_config.json", generation)
    save_sharded(folder, tensors)
    return tensors


def word_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(num_tokens - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}


def assert_same_weights(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def spoil(folder: Path, change) -> None:
    """Apply `change` to the tensors of a sharded checkpoint."""
    tensors = {}
    for shard in sorted(folder.glob("*.bin")):
        tensors |= torch.load(shard, weights_only=True)
        shard.unlink()
    change(tensors)
    save_sharded(folder, tensors)
