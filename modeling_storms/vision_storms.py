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
"""Qwen2.5-VL's vision tower without loops over windows: same weights, same results."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index


@dataclass
class Segments:
    """Frames or windows of patches, each of which attends to itself alone, those of one length to be run as a batch.

    Takes the place of the plain tower's `cu_seqlens`, which it would read back from the device in every layer.
    """

    groups: list[tuple[int, int]]  # how many segments of which length, shortest first
    order: torch.Tensor | None = None  # (num_patches,), the patches in that order; None if all are of one length
    inverse: torch.Tensor | None = None  # (num_patches,), and back

    @classmethod
    def plan(cls, cu_seqlens: torch.Tensor, device: torch.device) -> "Segments":
        """Plan from the bounds of all segments, `(num_segments + 1,)`, on the host."""
        lengths = cu_seqlens.diff()
        found, counts = lengths.unique(return_counts=True)
        groups = list(zip(counts.tolist(), found.tolist()))
        if len(groups) == 1:
            return cls(groups)
        order = lengths.repeat_interleave(lengths).argsort(stable=True)
        return cls(groups, order.to(device), order.argsort().to(device))


class StormsVisionAttention(Qwen2_5_VLVisionAttention):
    """As the plain tower's, with one call for all segments of a length where that loops over them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(cu_seqlens, Segments):
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        assert position_embeddings is not None
        segments, (cos, sin) = cu_seqlens, position_embeddings
        if segments.order is not None:
            hidden_states, cos, sin = (values[segments.order] for values in (hidden_states, cos, sin))
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = qkv.unbind(1)
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, cos, sin)
        attended, begin = [], 0
        for count, length in segments.groups:
            span, begin = slice(begin, begin + count * length), begin + count * length
            # (count * length, num_heads, head_dim) -> (count, num_heads, length, head_dim)
            q, k, v = (part[span].unflatten(0, (count, length)).transpose(1, 2) for part in (queries, keys, values))
            output = scaled_dot_product_attention(q, k, v, scale=self.scaling)
            attended.append(output.transpose(1, 2).flatten(0, 1).flatten(1))
        output = self.proj(torch.cat(attended))
        return output if segments.inverse is None else output[segments.inverse]


class StormsVisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision tower, which under sdpa attention neither loops over windows nor waits for the device in its
    layers. Weight names and results are the plain tower's."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        for block in self.blocks:
            block.attn = StormsVisionAttention(config)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The tower has none. Were it to name one, as the plain tower does, activation checkpointing would make that
        one's output require gradients, and a frozen tower would be differentiated in every step, to no end.

        Raises:
            NotImplementedError: always; transformers then leaves the tower alone.
        """
        raise NotImplementedError("A vision tower reads pixels and has no input embeddings.")

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        """As the plain tower's."""
        if self.config._attn_implementation == "sdpa":
            grids, device = grid_thw.cpu(), hidden_states.device
            window_index, cu_window_seqlens = get_vision_window_index(
                grids,
                spatial_merge_size=self.spatial_merge_size,
                window_size=self.window_size,
                patch_size=self.patch_size,
            )
            kwargs["position_ids"] = get_vision_position_ids(grids, self.spatial_merge_size).to(device)
            kwargs["window_index"] = window_index.to(device)
            kwargs["cu_window_seqlens"] = Segments.plan(cu_window_seqlens, device)
            kwargs["cu_seqlens"] = Segments.plan(get_vision_cu_seqlens(grids), device)
        return super().forward(hidden_states, grid_thw, **kwargs)


__all__ = ["StormsVisionTower"]
