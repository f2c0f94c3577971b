"""A Video-Panda small enough for tests: configuration, tokenizers, processor, and a checkpoint folder."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from video_panda import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaImageProcessor,
    VideoPandaProcessor,
    VideoPandaVideoProcessor,
)

SENTENCES = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What happens in this video? ASSISTANT: A red ball rolls over the green table.",
    "USER: What colour is the ball? ASSISTANT: It is red. USER: Who threw it? ASSISTANT: The child did.",
]
IMAGE_SIZE, PATCH_SIZE = 84, 14  # px: P = 6 patches and G = 3 tokens a side


def tiny_tokenizer(kind: str = "byte_bpe", num_tokens: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `SENTENCES`.

    Args:
        kind: "byte_bpe" (GPT-2 and Llama 3's kind), "metaspace_bpe" (Llama 2's kind: prepended space, byte fallback, a
            post-processor that adds BOS by itself) or "words".
        num_tokens: at most this many.
    """
    special = ["<unk>", "<s>", "</s>"]
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, vocab_size=num_tokens)
    elif kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=num_tokens, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # while training only: no token reaches over a space
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=num_tokens)
    trainer.show_progress = False
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind == "metaspace_bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_config(num_text_tokens: int = 400, vision: dict | None = None, text: dict | None = None, **kwargs):
    """STAB of width 32 on an 84 px canvas in front of a Llama of two layers of width 48."""
    text_config = LlamaConfig(
        **{
            "vocab_size": num_text_tokens,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **(text or {}),
        }
    )
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_size": 32, **(vision or {})}
    return VideoPandaConfig.from_text_config(text_config, vision_config=vision, **kwargs)


def tiny_model(config: VideoPandaConfig | None = None, seed: int = 0) -> VideoPandaForConditionalGeneration:
    """A model in eval mode with every parameter drawn at random: zero initialisation would hide mistakes."""
    torch.manual_seed(seed)
    model = VideoPandaForConditionalGeneration(config or tiny_config()).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "stab" in name and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return model


def tiny_processor(kind: str = "byte_bpe", **kwargs) -> VideoPandaProcessor:
    """The processor that fits `tiny_config(len(tiny_tokenizer(kind)))`."""
    sizes = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    return VideoPandaProcessor(
        VideoPandaImageProcessor(**sizes), VideoPandaVideoProcessor(**sizes), tiny_tokenizer(kind), **kwargs
    )


def write_tiny_checkpoint(folder, kind: str = "byte_bpe") -> None:
    """A complete checkpoint folder, weights drawn at random."""
    processor = tiny_processor(kind)
    model = tiny_model(tiny_config(processor.video_token_id))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
