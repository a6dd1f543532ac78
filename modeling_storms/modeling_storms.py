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

from transformers import Qwen2_5_VLForConditionalGeneration

from .configuration_storms import StormsConfig
from .latent_storms import LatentReasoningMixin, StormsGenerateOutput, StormsOutput


class StormsForConditionalGeneration(LatentReasoningMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that can think in a bounded block of hidden states before or while it answers.

    Weight names are those of `Qwen2_5_VLForConditionalGeneration`. `forward` and `generate` are documented in
    `LatentReasoningMixin`.
    """

    config: StormsConfig


StormsForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["StormsForConditionalGeneration", "StormsGenerateOutput", "StormsOutput"]
