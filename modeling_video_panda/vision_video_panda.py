"""Video-Panda's vision part: canvases through STAB and the projector, to the sequence of each video or image.

Shape suffixes: V videos, T frames, C channels, S px a side of the canvas, D width of STAB, H width of the language model;
see `stab_video_panda.py` for M, K, h, w.
"""

import itertools

import torch
from torch import nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .attention_video_panda import in_enough_rows
from .configuration_video_panda import VideoPandaConfig
from .stab_video_panda import VideoPandaFrames

# On a CPU: bytes of the states of the canvases that go through STAB at a time. More leave the caches, and are blocks that the
# allocator gives back each time: a chunk of four frames of 448 px in float32 is faster alone than with a second one.
CPU_CHUNK_BYTES = 2**24

# On a CPU: glibc keeps freed memory for the next tensor up to limits that it raises to the largest block it was ever given
# back, of so many bytes at most (32 MiB with a header); what is beyond them comes from the system, page by page, each time.
GLIBC_LARGEST_KEPT_BYTES = 2**25 - 2**16
NUM_LIVE_STATES = 4  # so many states of the canvases are there at a time


class VideoPandaProjector(nn.Module):
    """Two linear layers from STAB's width to the language model's. Release: `video_projector`."""

    def __init__(self, config: VideoPandaConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.vision_config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., H)."""
        hidden = self.linear_1(tokens)
        is_seen = torch.is_grad_enabled() or self.linear_1._forward_hooks
        if type(self.act) is GELUActivation and not is_seen:
            torch.ops.aten.gelu_(hidden)  # in place: new pages for it cost a CPU more time than the function
        else:
            hidden = self.act(hidden)
        return self.linear_2(hidden)


class VideoPandaVisionMixin:
    """What `VideoPandaModel` does with pixels. Expects `config`, `stab` and `projector`."""

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor,
        vision_chunk_batch: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode videos.

        Args:
            pixel_values_videos: (V, T, C, S, S) canvases; videos of fewer frames are padded at the end. Normalised, or
                uint8 as a processor with `do_rescale=False, do_normalize=False` gives them: a quarter of the bytes, and
                the patch embedding then normalises (by `vision_config.image_mean` and `image_std`).
            video_grid_thw: (V, 3) integers: true frames, h, w in tokens. T = 1 is a still image (paper section 3).
            vision_chunk_batch: so many chunks of frames go through STAB and projector at a time, so that their memory does
                not grow with the number of frames; None: all at once, on a CPU as many as are fastest. Not in training.

        Returns:
            `pooler_output`: a tuple with one (tokens, H) tensor a video, all frames' projected sequences in order;
            `last_hidden_state`: the same before the projector, concatenated (all tokens, D).

        Raises:
            ValueError: for shapes or grids that do not fit the configuration.
        """
        grids = self._checked_grids("video", pixel_values_videos, video_grid_thw, num_dims=5)
        return self._encode(pixel_values_videos, grids, vision_chunk_batch)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
        vision_chunk_batch: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode still images: (I, C, S, S) canvases, (I, 3) grids with T = 1; all else as `get_video_features`."""
        grids = self._checked_grids("image", pixel_values, image_grid_thw, num_dims=4)
        return self._encode(pixel_values.unsqueeze(1), grids, vision_chunk_batch)

    def _checked_grids(self, kind: str, pixels: torch.Tensor, grid_thw, num_dims: int) -> list[list[int]]:
        name = "pixel_values_videos" if kind == "video" else "pixel_values"
        vision = self.config.vision_config
        frame_shape = (vision.num_channels, vision.canvas_size, vision.canvas_size)
        if pixels.ndim != num_dims or tuple(pixels.shape[-3:]) != frame_shape:
            lead = "(num_videos, num_frames, " if kind == "video" else "(num_images, "
            raise ValueError(
                f"{name} has shape {tuple(pixels.shape)}, expected {lead}{', '.join(map(str, frame_shape))})"
            )
        if grid_thw is None:
            raise ValueError(f"{name} was given without {kind}_grid_thw (its frames, rows and columns of tokens)")
        if torch.as_tensor(grid_thw).is_floating_point():
            raise ValueError(f"{kind}_grid_thw must hold integers, got {torch.as_tensor(grid_thw).dtype}")
        if len(pixels) == 0:
            raise ValueError(f"{name} is empty, expected at least one {kind}")
        grids = torch.as_tensor(grid_thw).tolist()
        if len(grids) != len(pixels) or any(not isinstance(grid, list) or len(grid) != 3 for grid in grids):
            raise ValueError(
                f"{kind}_grid_thw has shape {tuple(torch.as_tensor(grid_thw).shape)}, expected ({len(pixels)}, 3): one "
                f"row for each of the {len(pixels)} entries of {name}"
            )
        max_frames = pixels.shape[1] if kind == "video" else 1
        for index, (frames, height, width) in enumerate(grids):
            side = vision.num_tokens_per_side
            if not (1 <= frames <= max_frames and 1 <= height <= side and 1 <= width <= side):
                raise ValueError(
                    f"{kind}_grid_thw[{index}] is {(frames, height, width)}, expected frames in 1..{max_frames} and rows "
                    f"and columns in 1..{side}"
                )
            if frames == 1 and not vision.use_fsra:
                raise ValueError(
                    f"{kind}_grid_thw[{index}] is a single frame: a still image's context is what FSRA computes, and "
                    "this model was built with use_fsra=False"
                )
        return grids

    def _encode(self, pixels_VTCSS: torch.Tensor, grids: list[list[int]], chunk_batch: int | None):
        """All frames' tokens, before and after the projector, as one `BaseModelOutputWithPooling`."""
        if pixels_VTCSS.device.type == "cpu":
            # Given back at once, its pages never touched.
            torch.UntypedStorage(min(GLIBC_LARGEST_KEPT_BYTES, NUM_LIVE_STATES * self._canvas_bytes()))
        if chunk_batch is not None:
            self._check_chunk_batch(chunk_batch)
        else:
            chunk_batch = self._fastest_chunk_batch(pixels_VTCSS.device, grids)
        if chunk_batch is not None:
            return self._encode_in_turn(pixels_VTCSS, grids, chunk_batch)
        encoded, places = [], {}
        for pixels_MKCSS, still, chunks in self._cut_into_chunks(pixels_VTCSS, grids):
            frames = self._encode_chunks(pixels_MKCSS, still, chunks, grids)
            for index, own in enumerate(frames, start=len(encoded)):
                places.update({chunks[chunk]: (index, place) for place, chunk in enumerate(own.chunks)})
            encoded += frames
        chunks_of_each = [[] for _ in grids]
        for chunk in sorted(places):
            chunks_of_each[chunk[0]].append(places[chunk])
        return BaseModelOutputWithPooling(
            last_hidden_state=join_sequences(_sequence_of_each(encoded, chunks_of_each)),
            pooler_output=_sequence_of_each(self._project(encoded), chunks_of_each),
        )

    def _encode_in_turn(self, pixels_VTCSS: torch.Tensor, grids: list[list[int]], chunk_batch: int):
        """The same, a few chunks at a time, each written to its place: nothing but the result grows with the frames."""
        num_frame_tokens = [self.config.vision_config.num_frame_tokens(*grid[1:]) for grid in grids]
        lengths = [grid[0] * num for grid, num in zip(grids, num_frame_tokens)]
        first_token = [0, *itertools.accumulate(lengths)]
        outputs = [None, None]  # before and after the projector
        for pixels_MKCSS, still, chunks in self._cut_into_chunks(pixels_VTCSS, grids, chunk_batch):
            frames = self._encode_chunks(pixels_MKCSS, still, chunks, grids)
            # `<row>` is projected with every chunk, so that each goes through products of one shape: with one chunk at a time
            # the features are bit by bit the same whatever else is in the batch.
            for level, own in [*((0, own) for own in frames), *((1, own) for own in self._project(frames))]:
                if outputs[level] is None:
                    outputs[level] = own.context_MKD.new_empty(first_token[-1], own.context_MKD.shape[-1])
                for place, chunk in enumerate(own.chunks):
                    video, first_frame = chunks[chunk]
                    begin = first_token[video] + first_frame * num_frame_tokens[video]
                    shape = own.context_MKD.shape[1], num_frame_tokens[video]
                    own.write_sequence(place, outputs[level][begin : begin + shape[0] * shape[1]].unflatten(0, shape))
        return BaseModelOutputWithPooling(last_hidden_state=outputs[0], pooler_output=outputs[1].split(lengths))

    def _encode_chunks(self, pixels_MKCSS, still: bool, chunks, grids: list[list[int]]) -> list[VideoPandaFrames]:
        grid_of_chunk = [tuple(grids[video][1:]) for video, _ in chunks]
        return self.stab(pixels_MKCSS, grid_of_chunk, still=still, return_frames=True)

    def _fastest_chunk_batch(self, device: torch.device, grids: list[list[int]]) -> int | None:
        """How many chunks to encode at a time where nobody says so; None: all of them."""
        if (
            device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self._shares_statistics()
        ):
            return None
        chunk_batch = max(1, CPU_CHUNK_BYTES // self._canvas_bytes())
        num_chunk_frames = self.config.vision_config.num_chunk_frames
        num_chunks = sum(-(-num_frames // num_chunk_frames) for num_frames, _, _ in grids)
        return chunk_batch if chunk_batch < num_chunks else None

    def _canvas_bytes(self) -> int:
        """Bytes of the states of one chunk's canvases."""
        vision = self.config.vision_config
        return vision.num_chunk_frames * vision.num_patches_per_side**2 * vision.hidden_size * self.dtype.itemsize

    def _shares_statistics(self) -> bool:
        """Whether all chunks of a batch are normalised by statistics of theirs, as STAB does in training mode."""
        return self.stab.lste is not None and self.stab.lste.norm.training

    def _check_chunk_batch(self, chunk_batch: int) -> None:
        if isinstance(chunk_batch, bool) or not isinstance(chunk_batch, int) or chunk_batch < 1:
            raise ValueError(f"vision_chunk_batch must be a positive integer or None, got {chunk_batch!r}")
        if self._shares_statistics():
            raise ValueError(
                f"vision_chunk_batch is {chunk_batch}, but STAB is in training mode, where all chunks of a batch share "
                "their statistics: expected None"
            )

    def _cut_into_chunks(self, pixels_VTCSS: torch.Tensor, grids: list[list[int]], chunk_batch: int | None = None):
        """What STAB is called with: canvases (M, K, C, S, S), whether they are stills, and whose (video, first frame) each is.

        All chunks of one length go through together, or `chunk_batch` at a time.
        """
        num_chunk_frames = self.config.vision_config.num_chunk_frames
        groups: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for video, (num_frames, _, _) in enumerate(grids):
            for start in range(0, num_frames, num_chunk_frames):
                length = min(num_chunk_frames, num_frames - start)
                groups.setdefault((length, num_frames == 1), []).append((video, start))
        frames_in_order = pixels_VTCSS.flatten(0, 1)
        num_frames_given = pixels_VTCSS.shape[1]
        for (length, still), chunks in groups.items():
            for begin in range(0, len(chunks), chunk_batch or len(chunks)):
                own = chunks[begin : begin + (chunk_batch or len(chunks))]
                firsts = [video * num_frames_given + start for video, start in own]
                if firsts == list(range(firsts[0], firsts[0] + length * len(firsts), length)):
                    pixels_XCSS = frames_in_order[firsts[0] : firsts[-1] + length]  # side by side: no copy
                else:
                    index = torch.tensor(firsts, device=pixels_VTCSS.device)[:, None]
                    index = index + torch.arange(length, device=pixels_VTCSS.device)
                    pixels_XCSS = frames_in_order[index.flatten()]
                yield pixels_XCSS.unflatten(0, (len(own), length)), still, own

    def _project(self, frames: list[VideoPandaFrames]) -> list[VideoPandaFrames]:
        """The projector over all tokens and contexts at once, and over `<row>`."""
        parts = [part for own in frames for part in (own.tokens_MKhwD.flatten(0, 3), own.context_MKD.flatten(0, 1))]
        if frames[0].row_D is not None:
            parts.append(frames[0].row_D[None])
        width = frames[0].context_MKD.shape[-1]
        projected = in_enough_rows(self.projector, torch.cat(parts), width).split([len(part) for part in parts])
        row_H = None if frames[0].row_D is None else projected[-1].squeeze(0)
        return [
            VideoPandaFrames(
                own.chunks,
                tokens.view(*own.tokens_MKhwD.shape[:4], -1),
                context.view(*own.context_MKD.shape[:2], -1),
                row_H,
            )
            for own, tokens, context in zip(frames, projected[::2], projected[1::2])
        ]


def _sequence_of_each(frames: list[VideoPandaFrames], chunks_of_each) -> tuple[torch.Tensor, ...]:
    """The sequence (tokens, D or H) of each video.

    Args:
        frames: encoded frames.
        chunks_of_each: of each video, where its chunks are found, in order: which of `frames`, and which chunk of it.
    """
    sequences = [own.sequences() for own in frames]
    of_each = []
    for chunks in chunks_of_each:
        pieces = []
        for index, found in itertools.groupby(chunks, key=lambda chunk: chunk[0]):
            places = [place for _, place in found]  # side by side, as the video's chunks were given one after the other
            pieces.append(sequences[index][places[0] : places[-1] + 1].flatten(0, 2))
        of_each.append(join_sequences(pieces))
    return tuple(of_each)


def join_sequences(sequences) -> torch.Tensor:
    """One after the other; without a copy where there is but one."""
    return sequences[0] if len(sequences) == 1 else torch.cat(tuple(sequences))
