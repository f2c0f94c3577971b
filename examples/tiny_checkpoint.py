"""Write a complete checkpoint of 0.1 M parameters, and a clip: python examples/tiny_checkpoint.py FOLDER.

Its weights are drawn at random, so its answers are random words; everything else is as in a real checkpoint: the files,
loading with the Auto classes, the processor, generation. Good for trying a pipeline without a download of 15 GB.
"""

import sys
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: What happens in this video? ASSISTANT: A bright square moves from left to right over a dark ground.",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `SENTENCES`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_clip(path: Path, num_frames: int = 48, fps: int = 12, width: int = 320, height: int = 180) -> None:
    """Four seconds of a bright square that moves from left to right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            frame = np.full((height, width, 3), 30, dtype=np.uint8)
            left = (width - 60) * index // (num_frames - 1)
            frame[60:120, left : left + 60] = (230, 200, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main(folder: Path) -> None:
    """Write the checkpoint and `clip.mp4` into `folder`."""
    image_size = 112  # px: 4 x 4 tokens of 2 x 2 patches of 14 px
    processor = VideoPandaProcessor(
        VideoPandaImageProcessor(image_size=image_size),
        VideoPandaVideoProcessor(image_size=image_size),
        make_tokenizer(),
    )
    text = LlamaConfig(
        vocab_size=processor.video_token_id,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config = VideoPandaConfig.from_text_config(text, vision_config={"image_size": image_size, "hidden_size": 32})
    torch.manual_seed(0)
    model = VideoPandaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_clip(folder / "clip.mp4")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
