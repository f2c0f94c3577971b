"""Adapters for the language model, and which layers a quantized base leaves in full precision."""

import json
import re

import pytest
import torch
from hub_server import USER, HubServer, run_client
from model_inputs import canvases, relative_error, visual_ids
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import IMAGE_SIZE, PATCH_SIZE, tiny_config, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaModel
from video_panda.trainers.lora import lora_config, quantization_config

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE_MODELS = {
    "llama": LlamaConfig(vocab_size=400, num_key_value_heads=2, **SIZES),
    "qwen3": Qwen3Config(vocab_size=400, num_key_value_heads=2, head_dim=12, **SIZES),
    "gpt2": GPT2Config(vocab_size=400, n_embd=48, n_layer=2, n_head=4),
    "opt": OPTConfig(
        vocab_size=400, hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=48
    ),
}


def config_on(kind: str) -> VideoPandaConfig:
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_size": 32}
    return VideoPandaConfig.from_text_config(LANGUAGE_MODELS[kind], vision_config=vision)


def inputs_for(config) -> dict:
    ids = torch.tensor([[1, 5, 6, *visual_ids(config, 8, 2, 3), 7, 8, 9]])
    videos = {"pixel_values_videos": canvases(1, 8), "video_grid_thw": torch.tensor([[8, 2, 3]])}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **videos}


def text_logits(model, config) -> torch.Tensor:
    """(L, text tokens), in eval mode: without the placeholders' columns, whose -3e38 would drown differences."""
    model.eval()
    with torch.no_grad():
        return model(**inputs_for(config)).logits[0, :, : config.num_text_tokens]


def trained_adapter(model, **kwargs) -> PeftModel:
    """Wrapped, with nonzero LoRA matrices, after a step of training."""
    adapted = get_peft_model(model, lora_config(model, r=4, lora_alpha=8, **kwargs))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    adapted.train()
    inputs = inputs_for(model.config)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in trained)
    optimizer.step()
    return adapted


def check_loads_as(model, folder) -> None:
    """The weights to the last bit, the answers to rounding: loaded weights lie otherwise aligned in memory."""
    loaded = VideoPandaForConditionalGeneration.from_pretrained(folder)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, state[name])] == []
    assert relative_error(text_logits(loaded, model.config), text_logits(model, model.config)) < 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Read-only: the folder of an adapter on `base`, and what the model with it answers."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapted = trained_adapter(VideoPandaForConditionalGeneration.from_pretrained(base))
    adapted.save_pretrained(folder)
    return folder, adapted, text_logits(adapted, tiny_config())


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_only_the_language_model_is_adapted_and_the_visual_parts_train_whole(kind):
    model = tiny_model(config_on(kind))
    linear = {
        name
        for name, module in model.model.language_model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    assert len(linear) >= 8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, lora_config(model, r=4))
    prefix = "base_model.model.model."
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    matrices = {f"{prefix}language_model.{name}.lora_{side}.default.weight" for name in linear for side in "AB"}
    assert {name for name in trained if "lora_" in name} == matrices
    whole = {name.removeprefix(prefix) for name in trained - matrices}
    parts = {"stab": model.model.stab, "projector": model.model.projector}
    expected = {
        f"{part}.modules_to_save.default.{name}"
        for part, module in parts.items()
        for name, _ in module.modules_to_save["default"].named_parameters()
    }
    assert whole == expected
    assert len(expected) == sum(
        name.startswith(("model.stab.", "model.projector."))
        for name, _ in tiny_model(config_on(kind)).named_parameters()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.unload().state_dict().items())


def test_the_pattern_is_one_for_all_layers_and_matches_no_other_name():
    model = tiny_model()
    config = lora_config(model)
    names = [name for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)]
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert len(config.target_modules.split("|")) == 7
    assert config.modules_to_save == ["model.stab", "model.projector"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.fan_in_fan_out) == (64, 128, 0.05, False)
    assert lora_config(model, use_rslora=True, modules_to_save=None).use_rslora
    assert lora_config(tiny_model(config_on("gpt2"))).fan_in_fan_out


def test_layers_that_differ_are_named_one_by_one():
    model = tiny_model()
    model.model.language_model.layers[1].mlp.up_proj = nn.Identity()
    names = {name for name, _ in model.named_modules() if re.fullmatch(lora_config(model).target_modules, name)}
    assert "model.language_model.layers.0.mlp.up_proj" in names
    assert "model.language_model.layers.1.mlp.up_proj" not in names
    assert len(names) == 13


def test_a_quantizers_layer_that_is_no_linear_is_found():
    class Packed(nn.Module):
        in_features, out_features = 48, 96

    model = tiny_model()
    model.model.language_model.layers[0].mlp.up_proj = Packed()
    assert re.fullmatch(lora_config(model).target_modules, "model.language_model.layers.0.mlp.up_proj")


def test_the_model_without_a_head_is_adapted_too():
    model = VideoPandaModel(tiny_config())
    config = lora_config(model)
    assert config.modules_to_save == ["stab", "projector"]
    names = [name for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)]
    assert len(names) == 14


def test_what_cannot_be_adapted_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="got model_type 'llama'"):
        lora_config(model.model.language_model)
    with pytest.raises(ValueError, match="holds an adapter already"):
        lora_config(get_peft_model(model, lora_config(model)))


def test_only_the_copies_change_in_training(base, adapter):
    _, adapted, _ = adapter
    saved = VideoPandaForConditionalGeneration.from_pretrained(base).state_dict()
    prefix = "base_model.model."
    changed = set()
    for name, tensor in adapted.state_dict().items():
        plain = name.removeprefix(prefix).replace(".base_layer", "")
        if plain.replace(".original_module", "") in saved:
            assert torch.equal(tensor, saved[plain.replace(".original_module", "")]), name
        elif ".modules_to_save.default" in plain and not torch.equal(
            tensor, saved[plain.replace(".modules_to_save.default", "")]
        ):
            changed.add(plain.replace(".modules_to_save.default", ""))
    assert "model.stab.lste.norm.running_mean" in changed
    assert "model.projector.linear_1.weight" in changed


def test_a_saved_adapter_gives_the_same_answers_running_statistics_included(base, adapter):
    folder, adapted, expected = adapter
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    loaded = PeftModel.from_pretrained(VideoPandaForConditionalGeneration.from_pretrained(base), folder)
    assert torch.equal(text_logits(loaded, tiny_config()), expected)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        statistic = getattr(loaded.base_model.model.model.stab.lste.norm, name)
        assert torch.equal(statistic, getattr(adapted.base_model.model.model.stab.lste.norm, name)), name
    assert int(loaded.base_model.model.model.stab.lste.norm.num_batches_tracked) == 1
    plain = VideoPandaForConditionalGeneration.from_pretrained(base)
    assert relative_error(text_logits(plain, tiny_config()), expected) > 0.05
    with loaded.disable_adapter():
        assert torch.equal(text_logits(loaded, tiny_config()), text_logits(plain, tiny_config()))


def test_an_adapter_finds_its_base_and_trains_on(base, adapter):
    folder, _, expected = adapter
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    assert torch.equal(text_logits(loaded, tiny_config()), expected)
    trained = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("stab.modules_to_save" in name for name in trained)
    assert not any("original_module" in name or "base_layer" in name for name in trained)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_merged_equals_unmerged_and_is_a_plain_checkpoint(kind, tmp_path):
    config = config_on(kind)
    adapted = trained_adapter(tiny_model(config))
    expected = text_logits(adapted, config)
    before = {name for name, _ in tiny_model(config).state_dict().items()}
    merged = adapted.merge_and_unload()
    assert type(merged) is VideoPandaForConditionalGeneration
    assert set(merged.state_dict()) == before
    assert relative_error(text_logits(merged, config), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "modeling_video_panda.py"}
    assert not (tmp_path / "adapter_config.json").exists()
    check_loads_as(merged, tmp_path)


def test_tied_embeddings_stay_tied_and_untouched(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    model = tiny_model(config)
    embedding = model.get_input_embeddings().weight.clone()
    merged = trained_adapter(model).merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.lm_head.weight, embedding)
    merged.save_pretrained(tmp_path)
    check_loads_as(merged, tmp_path)


# Everything from folders and the Hub, as remote code: the base, the adapter on it, the merged model.
WITHOUT_THE_PACKAGE = """
    import json, os, torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModel

    flag = {"trust_remote_code": True}
    inputs, num_text_tokens = torch.load(os.environ["INPUTS"]), int(os.environ["NUM_TEXT_TOKENS"])

    def logits(model):
        with torch.no_grad():
            return model.eval()(**inputs).logits[0, :, :num_text_tokens]

    base = AutoModel.from_pretrained(os.environ["BASE"], **flag)
    base.push_to_hub(os.environ["BASE_ID"])
    adapted = PeftModel.from_pretrained(base, os.environ["ADAPTER"])
    results = {"folder": logits(adapted)}
    adapted.peft_config["default"].base_model_name_or_path = os.environ["BASE_ID"]
    adapted.push_to_hub(os.environ["ADAPTER_ID"])
    from_hub = AutoPeftModelForCausalLM.from_pretrained(os.environ["ADAPTER_ID"], **flag)
    results["hub"] = logits(from_hub)
    results["generated"] = from_hub.generate(**inputs, max_new_tokens=3, do_sample=False)
    results["merged"] = logits(AutoModel.from_pretrained(os.environ["MERGED"], **flag))
    torch.save(results, os.environ["RESULTS"])
    print(type(from_hub.get_base_model()).__module__)
"""


def test_adapters_and_merged_models_load_without_the_package_and_from_the_hub(base, adapter, tmp_path):
    folder, adapted, expected = adapter
    config = tiny_config()
    merged = PeftModel.from_pretrained(
        VideoPandaForConditionalGeneration.from_pretrained(base), folder
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.save(inputs_for(config), tmp_path / "inputs.pt")
    environment = {"BASE": str(base), "ADAPTER": str(folder), "MERGED": str(tmp_path / "merged")}
    environment |= {"INPUTS": str(tmp_path / "inputs.pt"), "RESULTS": str(tmp_path / "results.pt")}
    environment |= {"BASE_ID": f"{USER}/panda", "ADAPTER_ID": f"{USER}/panda-lora"}
    environment["NUM_TEXT_TOKENS"] = str(config.num_text_tokens)
    with HubServer() as server:
        process = run_client(WITHOUT_THE_PACKAGE, server, tmp_path / "home", blocked=["video_panda"], **environment)
        pushed = server.repositories[f"{USER}/panda-lora"].files()
    assert server.unknown_requests == []
    assert server.internal_errors == []
    assert process.stdout.splitlines()[-1].startswith(f"transformers_modules.{USER}.panda.")
    assert set(pushed) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(pushed["adapter_config.json"].content)["base_model_name_or_path"] == f"{USER}/panda"
    results = torch.load(tmp_path / "results.pt")
    assert torch.equal(results["folder"], expected)
    assert torch.equal(results["hub"], expected)
    assert relative_error(results["merged"], expected) <= 1e-5
    generated = adapted.eval().generate(**inputs_for(config), max_new_tokens=3, do_sample=False)
    assert torch.equal(results["generated"], generated)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantizer_would_convert_the_language_model_and_nothing_else(bits):
    config = quantization_config(bits)
    assert type(config) is BitsAndBytesConfig
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    for kind in LANGUAGE_MODELS:
        with torch.device("meta"):
            models = VideoPandaForConditionalGeneration(config_on(kind)), VideoPandaModel(config_on(kind))
        for model in models:
            skipped = HfQuantizer.get_modules_to_not_convert(model, list(config.llm_int8_skip_modules))
            linear = {
                name: should_convert_module(name, skipped)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            }
            converted = {name for name, convert in linear.items() if convert}
            assert converted == {name for name in linear if "language_model." in name}
            assert len(converted) >= 8
            assert len(linear) - len(converted) >= 18


def test_quantization_settings():
    config = quantization_config()
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert quantization_config(bnb_4bit_compute_dtype="float16").bnb_4bit_compute_dtype is torch.float16
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantization_config(3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_loads_and_is_adapted(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = tiny_config(text={"hidden_size": 64, "intermediate_size": 128})  # 4-bit blocks are of 64 weights
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "base")
    quantized = VideoPandaForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=quantization_config(bits), dtype=torch.bfloat16
    )
    kinds = {name: type(module).__name__ for name, module in quantized.named_modules()}
    language = {kind for name, kind in kinds.items() if ".language_model." in name and "Linear" in kind}
    assert language == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    others = {kind for name, kind in kinds.items() if ".language_model." not in name and "Linear" in kind}
    assert others == {"Linear", "VideoPandaZeroLinear"}
    assert quantized.model.stab.gstra.q_proj.weight.dtype == torch.bfloat16
    assert quantized.model.stab.lste.norm.running_var.dtype == torch.float32
    assert relative_error(text_logits(quantized, config), text_logits(model, config)) < 0.2
    adapted = trained_adapter(quantized)
    adapted.save_pretrained(tmp_path / "adapter")
    again = VideoPandaForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=quantization_config(bits), dtype=torch.bfloat16
    )
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    saved, restored = get_peft_model_state_dict(adapted), get_peft_model_state_dict(loaded)
    assert [name for name, tensor in saved.items() if not torch.equal(tensor, restored[name])] == []
    assert relative_error(text_logits(loaded, config), text_logits(adapted, config)) < 0.02  # bfloat16
