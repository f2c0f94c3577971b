"""The vision parts that are measured against each other, with random weights, at the sizes of published checkpoints.

Each is what its model does between frames and language model: encoder, projector, and the tokens handed over. `PEERS`, at the
end, is the list. Pixels are normalised already; how a model gets them is no part of this.

Shape suffixes: T frames, S px a side of a frame, N positions of a frame (class token first, where there is one), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, SmolVLMConfig, VideoLlavaConfig
from transformers import initialization as init
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer
from transformers.models.video_llava.modeling_video_llava import VideoLlavaMultiModalProjector
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from video_panda import VideoPandaConfig, VideoPandaModel
from video_panda.trainers.languagebind import LanguageBindVideoConfig, LanguageBindVideoModel

CLIP_LARGE = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "patch_size": 14,
}
SIGLIP_SO400M = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    "patch_size": 14,
}
# What `Peer.tiny` puts in the place of the published sizes, where a configuration has a field of the name.
TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_heads": 4},
    **{"num_hidden_layers": 2, "depth": 2, "deepstack_visual_indexes": (0, 1)},
}


class VideoPandaPart(nn.Module):
    """STAB and the projector, in `VideoPandaModel` without its language model."""

    def __init__(self, peer: "Peer", num_frames: int, frame_px: int):
        super().__init__()
        text = LlamaConfig(vocab_size=64, hidden_size=peer.llm_width, num_hidden_layers=0, num_attention_heads=1)
        vision = {**peer.sizes, "image_size": frame_px}
        self.model = VideoPandaModel(VideoPandaConfig.from_text_config(text, vision_config=vision))
        self.model.language_model = None

    def inputs(self, num_frames: int, is_wide: bool, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        vision = self.model.config.vision_config
        size, side = vision.canvas_size, vision.num_tokens_per_side
        return {
            "pixel_values_videos": torch.randn(1, num_frames, 3, size, size, device=device, dtype=dtype),
            "video_grid_thw": torch.tensor([[num_frames, -(-side * 9 // 16) if is_wide else side, side]]),
        }

    def forward(self, **inputs) -> torch.Tensor:
        return self.model.get_video_features(**inputs).pooler_output[0]


class SquareFramesPart(nn.Module):
    """What takes every frame as a square of its own size, whatever the form of the video."""

    frame_px: int

    def inputs(self, num_frames: int, is_wide: bool, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        size = self.frame_px
        return {"pixels_TCSS": torch.randn(num_frames, 3, size, size, device=device, dtype=dtype)}


class VideoLlavaPart(SquareFramesPart):
    """LanguageBind's video tower (CLIP with one more attention, over time, in each layer) and two linear layers."""

    def __init__(self, peer: "Peer", num_frames: int, frame_px: int):
        super().__init__()
        self.frame_px = frame_px
        vision = {**peer.sizes, "image_size": frame_px}
        self.tower = LanguageBindVideoModel(
            LanguageBindVideoConfig(**vision, add_time_attn=True, num_frames=num_frames)
        )
        text = LlamaConfig(hidden_size=peer.llm_width)
        self.projector = VideoLlavaMultiModalProjector(
            VideoLlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=text)
        )

    def forward(self, pixels_TCSS: torch.Tensor) -> torch.Tensor:
        return self.projector(self.tower(pixels_TCSS[None]).last_hidden_state.flatten(0, 2))


class VideoChatGPTPart(SquareFramesPart):
    """CLIP frame by frame; one token a frame and one a position, pooled over the other, and one linear layer."""

    NUM_FRAME_TOKENS = 100  # fewer frames are filled up with zeros

    def __init__(self, peer: "Peer", num_frames: int, frame_px: int):
        super().__init__()
        self.frame_px = frame_px
        self.tower = CLIPVisionModel(CLIPVisionConfig(**peer.sizes, image_size=frame_px))
        self.projector = nn.Linear(peer.sizes["hidden_size"], peer.llm_width)

    def forward(self, pixels_TCSS: torch.Tensor) -> torch.Tensor:
        states_TND = self.tower(pixels_TCSS).last_hidden_state[:, 1:]
        of_frames = nn.functional.pad(states_TND.mean(1), (0, 0, 0, max(0, self.NUM_FRAME_TOKENS - len(states_TND))))
        return self.projector(torch.cat((of_frames, states_TND.mean(0))))


class SmolVLM2Part(SquareFramesPart):
    """SigLIP frame by frame, 3 x 3 patches put side by side into one token, and one linear layer."""

    def __init__(self, peer: "Peer", num_frames: int, frame_px: int):
        super().__init__()
        self.frame_px = frame_px
        text = LlamaConfig(hidden_size=peer.llm_width)
        vision = {**peer.sizes, "image_size": frame_px}
        config = SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=3)
        self.tower = SmolVLMVisionTransformer(config.vision_config)
        self.connector = SmolVLMConnector(config)

    def forward(self, pixels_TCSS: torch.Tensor) -> torch.Tensor:
        # The tower's own steps. Its forward would find out, at every call, that a mask of whole frames hides nothing.
        num_patches = pixels_TCSS.shape[-1] // self.tower.patch_size
        mask = torch.ones(len(pixels_TCSS), num_patches, num_patches, dtype=torch.bool, device=pixels_TCSS.device)
        states_TND = self.tower.embeddings(pixel_values=pixels_TCSS, patch_attention_mask=mask)
        states_TND = self.tower.encoder(inputs_embeds=states_TND, attention_mask=None).last_hidden_state
        return self.connector(self.tower.post_layernorm(states_TND)).flatten(0, 1)


class Qwen3VLPart(nn.Module):
    """A ViT on frames of any form, two at a time; its merger, and three more for what deeper layers of the LLM are given."""

    def __init__(self, peer: "Peer", num_frames: int, frame_px: int):
        super().__init__()
        self.frame_px = frame_px
        self.tower = Qwen3VLVisionModel(Qwen3VLVisionConfig(**peer.sizes, out_hidden_size=peer.llm_width))

    def inputs(self, num_frames: int, is_wide: bool, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        config = self.tower.config
        merged_px = config.patch_size * config.spatial_merge_size
        num_columns = self.frame_px // merged_px
        num_rows = max(1, round(num_columns * 9 / 16)) if is_wide else num_columns
        merge = config.spatial_merge_size
        grid = torch.tensor([[num_frames // config.temporal_patch_size, num_rows * merge, num_columns * merge]])
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        positions = get_vision_interpolation_indices_and_weights(
            grid, self.tower.num_grid_per_side, self.tower.interpolation_mode, True, merge
        )
        # Positions are made once: a server would do the same for its videos of one size.
        return {
            "hidden_states": torch.randn(int(grid.prod()), width, device=device, dtype=dtype),
            "grid_thw": grid,
            "interp_indices": positions[0].to(device),
            "interp_weights": positions[1].to(device),
            "position_ids": get_vision_position_ids(grid, merge).to(device),
        }

    def forward(self, **inputs) -> torch.Tensor:
        return self.tower(**inputs).pooler_output


@dataclass(frozen=True)
class Peer:
    """A system that turns frames into tokens for a language model.

    Attributes:
        name: as it stands in tables and on the command line.
        what: the vision part, in words.
        checkpoint: whose sizes these are; its weights are not needed.
        part: builds it for a number of frames and a size in px.
        frame_px: the side of a frame it is given.
        grid_px: what a side must be a multiple of.
        llm_width: width of the tokens handed over.
        sizes: of the encoder, by the names of its configuration.
        is_counted_on_meta: whether its operations can be counted without weights.
    """

    name: str
    what: str
    checkpoint: str
    part: Callable[["Peer", int, int], nn.Module]
    frame_px: int
    grid_px: int
    llm_width: int
    sizes: dict
    is_counted_on_meta: bool = True

    def build(
        self, num_frames: int, frame_px: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The vision part in eval mode, its weights drawn at random (on "meta": none)."""
        # As models of transformers are built before a checkpoint is loaded: their own way of drawing takes several times longer.
        with init.no_init_weights(), torch.device(device):
            part = self.part(self, num_frames, frame_px or self.frame_px)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.normal_(std=0.02)
        return part.to(dtype).eval().requires_grad_(False)

    def fit(self, frame_px: int) -> int:
        """The largest size up to this one that it can be given, px."""
        return max(1, frame_px // self.grid_px) * self.grid_px

    def tiny(self) -> "Peer":
        """The same in small, to try a program out: its figures mean nothing."""
        sizes = {key: TINY.get(key, value) for key, value in self.sizes.items()}
        return replace(self, frame_px=self.fit(112), llm_width=64, sizes=sizes)


VIDEO_PANDA = Peer(
    "Video-Panda",
    "no encoder: STAB (24.09 M) and a projector of two linear layers (20.98 M); 16 x 16 tokens, 16 `<row>` and a context a frame",
    "jh-yi/Video-Panda-7B",
    VideoPandaPart,
    frame_px=448,
    grid_px=28,
    llm_width=4096,
    sizes={"hidden_size": 1024, "num_attention_heads": 8},
    is_counted_on_meta=False,  # it uses its weights in another order than its layers do, if it has any
)
PEERS = (
    VIDEO_PANDA,
    Peer(
        "Video-LLaVA",
        "LanguageBind's video tower: CLIP ViT-L/14 with one more attention, over time, in each layer; two linear layers; 257 tokens a frame",
        "LanguageBind/Video-LLaVA-7B",
        VideoLlavaPart,
        frame_px=224,
        grid_px=14,
        llm_width=4096,
        sizes=CLIP_LARGE,
    ),
    Peer(
        "Video-ChatGPT",
        "CLIP ViT-L/14 frame by frame; pooled to 100 tokens of frames and 256 of positions a video; one linear layer",
        "openai/clip-vit-large-patch14",
        VideoChatGPTPart,
        frame_px=224,
        grid_px=14,
        llm_width=4096,
        sizes=CLIP_LARGE,
    ),
    Peer(
        "SmolVLM2",
        "SigLIP so400m/14 frame by frame; 3 x 3 patches side by side in one token, one linear layer; 81 tokens a frame",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        SmolVLM2Part,
        frame_px=384,
        grid_px=42,
        llm_width=2048,
        sizes=SIGLIP_SO400M,
    ),
    Peer(
        "Qwen3-VL",
        "ViT with patches of 16 px x 2 frames, frames of any form; 2 x 2 patches merged by an MLP, three more for layers of the LLM",
        "Qwen/Qwen3-VL-8B-Instruct",
        Qwen3VLPart,
        frame_px=448,
        grid_px=32,
        llm_width=4096,
        sizes={
            **{"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16},
            **{"patch_size": 16, "temporal_patch_size": 2, "deepstack_visual_indexes": (8, 16, 24)},
        },
    ),
)
