"""What the mixins ask of a model tester: a tiny configuration, and a batch with one picture and one clip a prompt."""

import torch
from upstream.subjects import subjects

BATCH_SIZE = 7  # as many as the comparison of attention kernels wants; it would fill up with rows without placeholders
IMAGE_SIZE, PATCH_SIZE = 56, 14  # px: P = 4 patches and G = 2 tokens a side
NUM_FRAMES = 3  # a chunk of two frames and one of one
GRID = (1, 2)  # h, w in tokens
FIRST_PLACEHOLDER = 60


class VideoPandaModelTester:
    """Sizes under the names that the mixins look for.

    The placeholders stand amid the vocabulary, so that it can shrink by the 15 rows that the tests of resizing take away.
    """

    batch_size = BATCH_SIZE
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    intermediate_size = 37
    image_size, patch_size = IMAGE_SIZE, PATCH_SIZE

    def __init__(self, parent):
        self.parent = parent
        frame_tokens = GRID[0] * (GRID[1] + 1) + 1
        self.seq_length = 3 + frame_tokens + NUM_FRAMES * frame_tokens + 4

    @property
    def base_model_class(self):
        return subjects().VideoPandaModel

    @property
    def causal_lm_class(self):
        return subjects().VideoPandaForConditionalGeneration

    @property
    def conditional_generation_class(self):
        return subjects().VideoPandaForConditionalGeneration

    def get_config(self, vocab_size: int = vocab_size, first_placeholder: int = FIRST_PLACEHOLDER):
        """A `VideoPandaConfig`."""
        text = {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = {
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_frames": 4,
            "num_chunk_frames": 2,
        }
        names = ("video_token_id", "row_token_id", "frame_token_id", "image_token_id")
        ids = {name: first_placeholder + place for place, name in enumerate(names)}
        return subjects().VideoPandaConfig(text_config=text, vision_config=vision, **ids)

    def prepare_config_and_inputs_for_common(self):
        """The configuration, and the inputs of a forward pass."""
        config = self.get_config()
        height, width = GRID
        picture, clip = (
            frames * ([config.frame_token_id] + height * ([patch_id] * width + [config.row_token_id]))
            for frames, patch_id in ((1, config.image_token_id), (NUM_FRAMES, config.video_token_id))
        )
        text = torch.randint(3, FIRST_PLACEHOLDER, (BATCH_SIZE, 7)).tolist()
        prompts = [[*words[:3], *picture, *clip, *words[3:]] for words in text]
        input_ids = torch.tensor(prompts)
        assert input_ids.shape[1] == self.seq_length
        canvas = (3, IMAGE_SIZE, IMAGE_SIZE)
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randn(BATCH_SIZE, *canvas),
            "image_grid_thw": torch.tensor([[1, *GRID]] * BATCH_SIZE),
            "pixel_values_videos": torch.randn(BATCH_SIZE, NUM_FRAMES, *canvas),
            "video_grid_thw": torch.tensor([[NUM_FRAMES, *GRID]] * BATCH_SIZE),
        }
