# Copyright 2026 The STORMS team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""STORMS on Qwen2.5-VL: the plain backbone with the latent mode mixed in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool1d
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers import initialization as init
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from .configuration_storms import StormsConfig
from .latent_storms import LatentReasoningMixin, StormsGenerateOutput, StormsOutput
from .temporal_storms import REDUCTIONS, TemporalProjector, TokenReducer
from .vision_storms import StormsVisionTower


def _init_projector(module: torch.nn.Module) -> None:
    """Mamba-2's own initialisation, but for the last projection: zero makes a new projector the identity."""
    if isinstance(module, Mamba2Mixer):
        module.init_mamba2_weights()
        init.kaiming_uniform_(module.conv1d.weight, a=5**0.5)
        init.zeros_(module.conv1d.bias)
        init.ones_(module.norm.weight)
        init.zeros_(module.out_proj.weight)


class StormsModel(Qwen2_5_VLModel):
    """Qwen2.5-VL's inner model, with a temporal projector and a token reducer behind the vision tower (STORM).

    Attributes:
        reducer (`TokenReducer`): the config's, or for one `generate` call another.
    """

    config: StormsConfig

    def __init__(self, config: StormsConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = StormsVisionTower._from_config(config.vision_config)
        self.language_model = Qwen2_5_VLTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.reducer: TokenReducer = config.token_reducer()
        self.temporal_projector = None
        # CODEPATH: checkpoints for long video have a projector; one made of a base model as it is has none.
        if config.temporal_projector is not None:
            hidden_size = config.get_text_config().hidden_size
            self.temporal_projector = TemporalProjector(hidden_size, config.temporal_projector)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        _init_projector(module)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor | None = None, **kwargs: Any
    ) -> Any:
        """As the plain model's, in passes of at most P = `config.vision_chunk_size` patches, with each video's tokens
        after projector and reducer in `pooler_output`.

        Frames never attend to each other in the vision tower, so passes may end between any two steps. However long
        the videos, memory without gradients (with them all of it is kept) and without eager attention is at most the
        larger of `P * (max((5 * b + 28) * v, (3 * v + 4 * m) * b) + 2 * b * d)` bytes for a pass of the tower and
        `max(P / 16, c) * (16 * c * h + 40 * h * (a + n))` for what the projector scans at once without fused kernels,
        plus `3 * N * H * b` for the N tokens of width H before reduction. b: bytes of a weight; v and m: hidden and
        intermediate size of the tower; d: numbers in a patch; c, h, a, n: `chunk_size`, heads, `head_dim` and
        `state_size` of the projector. A step of more than P patches is a pass of its own. For the 7B model in bfloat16
        these are 3.5 GB, 1.4 GB and 21.5 kB a token.
        """
        return self._encode(super().get_video_features, pixel_values_videos, video_grid_thw, self.reducer, kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor | None = None, **kwargs: Any
    ) -> Any:
        """As the plain model's; the projector scans an image over space, and only `pool_images` reduces it."""
        return self._encode(super().get_image_features, pixel_values, image_grid_thw, self.reducer.for_images, kwargs)

    def _encode(self, encode: Any, pixels: torch.Tensor, grid_thw: Any, reducer: TokenReducer, kwargs: Any) -> Any:
        grids = grid_thw.tolist()
        passes = _plan_passes(grids, self.config.vision_chunk_size)
        kwargs = {name: value for name, value in kwargs.items() if name != "return_dict"}
        if len(passes) == 1:
            outputs = encode(pixels, grid_thw, return_dict=True, **kwargs)
            features = list(outputs.pooler_output)
        else:
            pieces: list[list[torch.Tensor]] = [[] for _ in grids]
            begin = 0
            for parts in passes:
                grid = torch.tensor([part[1:] for part in parts], device=grid_thw.device)
                end = begin + int(grid.prod(-1).sum())
                outputs = encode(pixels[begin:end], grid, return_dict=True, **kwargs)
                for part, tokens in zip(parts, outputs.pooler_output):
                    pieces[part[0]].append(tokens)
                begin = end
            outputs.last_hidden_state = outputs.pooler_output = None  # of the last pass alone
            features = [torch.cat(pieces.pop(0)) for _ in grids]
        merge = self.visual.spatial_merge_size
        if self.temporal_projector is not None:
            features = self.temporal_projector(features, self.config.vision_chunk_size // 16)
        for index, (steps, height, width) in enumerate(grids):
            features[index] = reducer(features[index], (steps, height // merge, width // merge))
        outputs.pooler_output = tuple(features)
        return outputs

    def forward(self, *args: Any, token_reduction: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As the plain model's.

        Args:
            token_reduction (`torch.LongTensor` of shape `(4,)`, *optional*): what the processor wrote the prompt for,
                if it reduces tokens: the fields of `TokenReducer`, in order.
        """
        self.check_reduction(token_reduction)
        return super().forward(*args, **kwargs)

    def check_reduction(self, token_reduction: torch.Tensor | None) -> None:
        """Refuse a prompt that was written for another reduction; its placeholders may be as many by chance."""
        if token_reduction is None:
            return
        temporal_pool, spatial_pool, temporal_sampling, pool_images = token_reduction.tolist()
        theirs = TokenReducer(temporal_pool, spatial_pool, temporal_sampling, bool(pool_images))
        # By value: a checkpoint's config and model load as copies of their modules, with classes of their own.
        if astuple(theirs) != astuple(self.reducer):
            raise ValueError(
                f"The model reduces tokens by {_numbers(self.reducer)}, but the processor by {_numbers(theirs)}. Save "
                "both together; for one call, give `generate` and the processor the same."
            )

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().get_placeholder_mask(*args, **kwargs)
        except ValueError as error:
            numbers = _numbers(self.reducer)
            raise ValueError(
                f"{error} The model reduces tokens by {numbers}, and the processor that wrote the prompt must do the "
                "same. Save both together."
            ) from error

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        mm_token_type_ids: torch.IntTensor,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the plain model's, on the grids that reduction leaves; a pooled token sits at its group's mean time.

        Raises:
            ValueError: if the prompt has another number of placeholders: it was written for another reduction.
        """
        if self.reducer.is_off:
            return super().get_rope_index(
                input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask
            )
        images = None if image_grid_thw is None else self._left_grids(image_grid_thw, self.reducer.for_images)
        videos = None if video_grid_thw is None else self._left_grids(video_grid_thw, self.reducer)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        merged = self.config.vision_config.spatial_merge_size**2
        for name, kind, grids in (("image", 1, images), ("video", 2, videos)):
            left = 0 if grids is None else int(grids.prod(-1).sum()) // merged
            if (found := int(((mm_token_type_ids == kind) & kept.bool()).sum())) != left:
                raise ValueError(
                    f"The prompt has {found} {name} tokens, but {left} are left where the model reduces tokens by "
                    f"{_numbers(self.reducer)}. The processor that wrote the prompt must do the same. Save both "
                    "together."
                )
        positions, deltas = super().get_rope_index(
            input_ids, mm_token_type_ids, images, videos, second_per_grid_ts, attention_mask
        )
        if (
            videos is None
            or video_grid_thw is None
            or (self.reducer.temporal_pool == 1 and self.reducer.temporal_sampling == 1)
        ):
            return positions, deltas
        # The plain model spaces what is left evenly from 0 on. The height of a video's first token is where it begins.
        seconds = [1.0] * len(video_grid_thw) if second_per_grid_ts is None else second_per_grid_ts
        rate = self.config.vision_config.tokens_per_second
        sizes = (videos.prod(-1) // merged).tolist()
        rows, columns = ((mm_token_type_ids == 2) & kept.bool()).nonzero(as_tuple=True)
        begin = 0
        for grid, size, second in zip(video_grid_thw.tolist(), sizes, seconds):
            row, places = rows[begin], columns[begin : begin + size]
            times = torch.tensor(self.reducer.step_times(grid[0]), dtype=torch.float64, device=input_ids.device)
            times = (times * rate * second).floor().long().repeat_interleave(size // len(times))
            positions[0, row, places] = positions[1, row, places[0]] + times
            begin += size
        highest = positions.amax(0).masked_fill(kept == 0, 0).amax(1)
        return positions, (highest + 1 - kept.sum(1))[:, None]

    def _left_grids(self, grid_thw: torch.Tensor, reducer: TokenReducer) -> torch.Tensor:
        """Grids of patches that merge into what a reducer leaves, `(num_media, 3)`."""
        merge = self.config.vision_config.spatial_merge_size
        left = [reducer.grid(steps, height // merge, width // merge) for steps, height, width in grid_thw.tolist()]
        scale = torch.tensor([1, merge, merge], device=grid_thw.device)
        return torch.tensor(left, device=grid_thw.device, dtype=grid_thw.dtype) * scale


def _numbers(reducer: TokenReducer) -> str:
    return ", ".join(f"{name}={value}" for name, value in asdict(reducer).items())


def _plan_passes(grids: list[list[int]], chunk_size: int) -> list[list[tuple[int, int, int, int]]]:
    """Which steps of which videos run together: `(video, steps, height, width)`, at most `chunk_size` patches a pass,
    or one step if that is larger."""
    passes: list[list[tuple[int, int, int, int]]] = [[]]
    room = chunk_size
    for video, (steps, height, width) in enumerate(grids):
        while steps > 0:
            fitting = min(steps, max(room, 0) // (height * width))
            if fitting == 0 and room < chunk_size:
                passes.append([])
                room = chunk_size
                continue
            fitting = max(fitting, 1)
            passes[-1].append((video, fitting, height, width))
            steps, room = steps - fitting, room - fitting * height * width
    return passes


class StormsForConditionalGeneration(LatentReasoningMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that can think in a bounded block of hidden states before or while it answers.

    Weight names are those of `Qwen2_5_VLForConditionalGeneration`. `forward` and `generate` are documented in
    `LatentReasoningMixin`.
    """

    config: StormsConfig

    def __init__(self, config: StormsConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = StormsModel(config)
        text_config = config.get_text_config()
        self.lm_head = torch.nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        _init_projector(module)

    def generate(self, *args: Any, token_reduction: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`LatentReasoningMixin.generate`, which see, with other reductions for one call.

        Args:
            temporal_pool, spatial_pool, temporal_sampling (`int`, *optional*): instead of the config's, see
                `TokenReducer`. The processor must be called with the same.
            token_reduction (`torch.LongTensor` of shape `(4,)`, *optional*): from the processor, to check that.
        """
        reductions: dict[str, Any] = {name: kwargs.pop(name) for name in REDUCTIONS if kwargs.get(name) is not None}
        with self.reduced_by(**reductions):
            self.model.check_reduction(token_reduction)
            return super().generate(*args, **kwargs)

    @contextmanager
    def reduced_by(self, **reductions: Any) -> Iterator[None]:
        """Within it the model reduces tokens by other numbers than the config's, as in `generate`."""
        reducer = self.model.reducer
        self.model.reducer = replace(reducer, **reductions)
        try:
            yield
        finally:
            self.model.reducer = reducer

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, in shards of 5 GB by default (`max_shard_size`): a broken upload is soon made up for."""
        if len(args) < 5:
            kwargs.setdefault("max_shard_size", "5GB")
        return super().save_pretrained(*args, **kwargs)

    def get_target_features(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, tower: Any = None
    ) -> tuple[torch.Tensor, ...]:
        """What the latents of Stage I are to resemble: tokens of the vision tower and its merger, without gradient and
        before anything that reduces them (STORMS, Sec. 3.3).

        Args:
            pixel_values (`torch.Tensor` of shape `(num_patches, patch_dim)`): of videos or images, one after another.
            grid_thw (`torch.LongTensor` of shape `(num_media, 3)`): patches in time, height and width.
            tower (`torch.nn.Module`, *optional*): a vision tower to use instead of the model's own.

        Returns:
            `tuple` of `torch.Tensor` of shape `(num_tokens, hidden_size)`, one for each video or image.
        """
        tower = self.model.visual if tower is None else tower
        with torch.no_grad():
            features = tower(pixel_values.to(tower.dtype), grid_thw=grid_thw, return_dict=True).pooler_output
        num_tokens = grid_thw.prod(-1) // tower.spatial_merge_size**2
        return features.split(num_tokens.tolist())


def pool_thought_video(features: torch.Tensor, latent_size: int | None) -> torch.Tensor:
    """Compress a thought video's visual tokens into one target per latent slot (STORMS, Sec. 3.3).

    Args:
        features (`torch.Tensor` of shape `(num_tokens, hidden_size)`): merged vision-tower tokens, frames in order.
        latent_size (`int`, *optional*): number of targets; may exceed `num_tokens`. None: the tokens themselves.

    Returns:
        `torch.Tensor` of shape `(latent_size, hidden_size)`, float32, without gradient.

    Raises:
        ValueError: if `features` is empty: an average over nothing would train slots towards NaN.
    """
    if len(features) == 0:
        raise ValueError("Got no tokens to pool, expected those of at least one frame. Leave the row out.")
    features = features.detach().float()
    if latent_size is None:
        return features
    return adaptive_avg_pool1d(features.T[None], latent_size)[0].T  # (T, H) -> (K, H)


StormsForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["StormsForConditionalGeneration", "StormsGenerateOutput", "StormsOutput"]
