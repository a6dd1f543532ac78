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
"""Long video: a Mamba projector between vision tower and language model, and fewer visual tokens after it (STORM)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer


REDUCTIONS = ("temporal_pool", "spatial_pool", "temporal_sampling")
PROJECTOR_OPTIONS = {
    "num_layers": 1,
    "state_size": 64,
    "head_dim": 64,
    "expand": 1,
    "conv_kernel": 4,
    "chunk_size": 64,
}


@dataclass(frozen=True)
class TokenReducer:
    """Fewer visual tokens of a video (STORM, Sec. 3.3). Grids are of merged tokens: steps, rows, columns.

    Args:
        temporal_pool (`int`): k; each k consecutive grid steps become their mean, the last group that of what remains.
        spatial_pool (`int`): p, a square number; each sqrt(p) x sqrt(p) tokens of a step become their mean, at the
            edges that of what remains.
        temporal_sampling (`int`): s; every s-th of the remaining steps is kept, from the first on.
        pool_images (`bool`): whether `spatial_pool` goes for images, too.

    Raises:
        ValueError: if a number is below 1, or `spatial_pool` is no square number.
    """

    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sampling: int = 1
    pool_images: bool = False

    def __post_init__(self):
        for name in REDUCTIONS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1 (1: off).")
        if math.isqrt(self.spatial_pool) ** 2 != self.spatial_pool:
            raise ValueError(
                f"spatial_pool is {self.spatial_pool}, but must be a square number: the area of the squares whose "
                "tokens are averaged."
            )

    @property
    def is_off(self) -> bool:
        return (self.temporal_pool, self.spatial_pool, self.temporal_sampling) == (1, 1, 1)

    @property
    def for_images(self) -> "TokenReducer":
        return TokenReducer(spatial_pool=self.spatial_pool if self.pool_images else 1)

    def grid(self, steps: int, height: int, width: int) -> tuple[int, int, int]:
        """The grid that is left: 10 steps of 3 x 5 tokens with k = 4, p = 4, s = 2 -> 2 steps of 2 x 3."""
        side = math.isqrt(self.spatial_pool)
        steps = math.ceil(math.ceil(steps / self.temporal_pool) / self.temporal_sampling)
        return steps, math.ceil(height / side), math.ceil(width / side)

    def step_times(self, steps: int) -> list[float]:
        """When each step that is left takes place, in grid steps, its group's mean: 5 steps, k = 2 -> 0.5, 2.5, 4."""
        firsts = range(0, steps, self.temporal_pool * self.temporal_sampling)
        return [(first + min(first + self.temporal_pool, steps) - 1) / 2 for first in firsts]

    def __call__(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Reduce the tokens of one video.

        Args:
            tokens (`torch.Tensor` of shape `(steps * height * width, hidden_size)`): in order of step, row, column.
            grid (`tuple`): steps, height and width.

        Returns:
            `torch.Tensor` of shape `(num_left, hidden_size)`, their number the product of `self.grid(*grid)`.
        """
        if self.is_off:
            return tokens
        steps, height, width = grid
        features = tokens.view(steps, height, width, -1)
        # 1. Steps whose group will not be kept need not be averaged.
        groups = features.split(self.temporal_pool)[:: self.temporal_sampling]
        features = torch.stack([group.mean(0) for group in groups]) if self.temporal_pool > 1 else torch.cat(groups)
        # 2. Squares, those at the edges with what they have.
        side = math.isqrt(self.spatial_pool)
        if side > 1:
            features = features.movedim(-1, 1)  # (T, H, W, D) -> (T, D, H, W)
            features = avg_pool2d(features, side, ceil_mode=True, count_include_pad=False).movedim(1, -1)
        return features.reshape(-1, tokens.shape[-1])


class TemporalProjectorLayer(nn.Module):
    """`X + (forward(Norm(X)) + backward(Norm(X)))`, each a Mamba-2 mixer with weights of its own.

    The first scans a video's tokens from the first to the last, frame after frame and each frame row by row from its
    upper left corner; the second scans the same sequence from the last to the first. So each token hears of all.
    """

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.hidden_size)
        self.forward_mixer = Mamba2Mixer(config, layer_idx=0)
        self.backward_mixer = Mamba2Mixer(config, layer_idx=0)

    def forward(self, hidden_states: torch.Tensor, segment_size: int) -> torch.Tensor:
        length = hidden_states.shape[1]
        if length <= segment_size:
            normed = self.norm(hidden_states)
            backward = self.backward_mixer(normed.flip(1)).flip(1)
            return hidden_states + self.forward_mixer(normed) + backward
        # Nothing of a segment is needed any more but the state that it ends in.
        outputs = hidden_states.clone()
        for mixer in (self.forward_mixer, self.backward_mixer):
            cache = DynamicCache(config=self.config)
            for begin in range(0, length, segment_size):
                end = min(begin + segment_size, length)
                if mixer is self.forward_mixer:
                    outputs[:, begin:end] += mixer(self.norm(hidden_states[:, begin:end]), cache_params=cache)
                else:
                    span = slice(length - end, length - begin)
                    outputs[:, span] += mixer(self.norm(hidden_states[:, span]).flip(1), cache_params=cache).flip(1)
        return outputs


class TemporalProjector(nn.Module):
    """Lets the tokens of a video exchange what they know, before some are averaged away (STORM, Sec. 3.2).

    Layers of Mamba-2 that scan both directions over space and time; an image has no time and is scanned over space.
    New, it is the identity: the mixers' last projections are zero.

    Args:
        hidden_size (`int`): of the merged visual tokens, which is the language model's.
        options (`dict`): `num_layers` (1), `state_size` (64), `head_dim` (64), `expand` (1), `conv_kernel` (4) and
            `chunk_size` (64), of Mamba-2.

    Raises:
        ValueError: if an option is unknown, or `expand * hidden_size` is no multiple of `head_dim`.
    """

    def __init__(self, hidden_size: int, options: dict[str, Any]):
        super().__init__()
        if unknown := set(options) - set(PROJECTOR_OPTIONS):
            raise ValueError(f"temporal_projector has {sorted(unknown)}, but knows {', '.join(PROJECTOR_OPTIONS)}.")
        chosen = PROJECTOR_OPTIONS | options
        num_layers = chosen.pop("num_layers")
        num_heads, rest = divmod(chosen["expand"] * hidden_size, chosen["head_dim"])
        if rest or num_layers < 1:
            raise ValueError(
                f"temporal_projector has head_dim {chosen['head_dim']}, expand {chosen['expand']} and num_layers "
                f"{num_layers}, but needs at least one layer, and expand * {hidden_size} to be a multiple of head_dim."
            )
        config = Mamba2Config(hidden_size=hidden_size, num_heads=num_heads, n_groups=1, num_hidden_layers=1, **chosen)
        self.chunk_size = config.chunk_size
        self.layers = nn.ModuleList([TemporalProjectorLayer(config) for _ in range(num_layers)])

    def forward(self, media: Sequence[torch.Tensor], segment_size: int | None = None) -> list[torch.Tensor]:
        """Let the tokens of each video or image exchange what they know.

        Those of one length run together; others can't, as padding would stand before what is scanned backwards.

        Args:
            media (`Sequence[torch.Tensor]`): `(num_tokens, hidden_size)` of each, all its steps in order.
            segment_size (`int`, *optional*): most tokens to scan at once, but at least `chunk_size`, and those of a
                longer video in multiples of it; the result is the same. With gradients, which need all of them, it is
                ignored.

        Returns:
            `list[torch.Tensor]` of the same shapes.
        """
        if segment_size is None or torch.is_grad_enabled():
            segment_size = sum(map(len, media))
        else:
            segment_size = max(segment_size // self.chunk_size, 1) * self.chunk_size
        scanned = list(media)
        for length in {len(tokens) for tokens in media}:
            same = [index for index, tokens in enumerate(media) if len(tokens) == length]
            num_fitting = max(segment_size // length, 1)
            for chosen in (same[begin : begin + num_fitting] for begin in range(0, len(same), num_fitting)):
                hidden_states = torch.stack([media[index] for index in chosen])
                for layer in self.layers:
                    hidden_states = layer(hidden_states, segment_size)
                for index, tokens in zip(chosen, hidden_states):
                    scanned[index] = tokens
        return scanned


__all__ = ["TemporalProjector", "TokenReducer"]
