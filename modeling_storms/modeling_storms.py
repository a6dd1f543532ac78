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

from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool1d
from transformers import Qwen2_5_VLForConditionalGeneration

from .configuration_storms import StormsConfig
from .latent_storms import LatentReasoningMixin, StormsGenerateOutput, StormsOutput


class StormsForConditionalGeneration(LatentReasoningMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that can think in a bounded block of hidden states before or while it answers.

    Weight names are those of `Qwen2_5_VLForConditionalGeneration`. `forward` and `generate` are documented in
    `LatentReasoningMixin`.
    """

    config: StormsConfig

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
