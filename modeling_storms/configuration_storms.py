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
"""Configuration of a STORMS model: Qwen2.5-VL plus a latent mode and optional visual token reduction."""

import transformers
from huggingface_hub.dataclasses import strict
from transformers import Qwen2_5_VLConfig
from transformers.utils import logging

from .temporal_storms import TokenReducer


logger = logging.get_logger(__name__)

OLDEST_TRANSFORMERS = (5, 23)
# The configuration is what every Auto class loads first, so this is said before anything else can fail.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    logger.warning_once(
        f"STORMS needs transformers {OLDEST_TRANSFORMERS[0]}.{OLDEST_TRANSFORMERS[1]} or newer, found "
        f"{transformers.__version__}: it may fail, or answer wrongly. Run `pip install --upgrade transformers`."
    )

AUTO_MAP = {
    "AutoConfig": "configuration_storms.StormsConfig",
    "AutoModel": "modeling_storms.StormsForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_storms.StormsForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_storms.StormsForConditionalGeneration",
    "AutoProcessor": "processing_storms.StormsProcessor",
    "AutoVideoProcessor": "processing_storms.StormsVideoProcessor",
}


# trf-ignore: TRF057 (documented by hand: the decorator knows only the library's own models)
@strict
class StormsConfig(Qwen2_5_VLConfig):
    r"""Everything of `Qwen2_5_VLConfig`, plus what the latent mode and token reduction need.

    Args:
        latent_start_token_id, latent_pad_token_id, latent_end_token_id (`int`, *optional*):
            Vocabulary ids of `<|latent_start|>`, `<|latent_pad|>` and `<|latent_end|>`, read from the tokenizer by
            `recipes/init_checkpoint.py`. Without them only `forward` without latent blocks works.
        latent_size (`int`, *optional*, defaults to 8):
            K, the number of slots of a latent block in training. Checkpoints copy it into `generation_config.json`.
        latent_loss_weight (`float`, *optional*, defaults to 0.1):
            Weight of the Stage I regression to the thought video (STORMS, Sec. 3.3).
        temporal_projector (`dict`, *optional*):
            Options of the Mamba projector between vision tower and language model, see `TemporalProjector`; None for
            none (STORM, Sec. 3.2).
        temporal_pool, spatial_pool, temporal_sampling (`int`, *optional*, defaults to 1), pool_images (`bool`):
            Token reduction of videos, see `TokenReducer`. The processor's must be the same.
        vision_chunk_size (`int`, *optional*, defaults to 65536):
            Patches that run through the vision tower at once; a long video takes several passes, with the same result.
            It bounds memory, see `StormsModel.get_video_features`.

    Raises:
        ValueError: if `latent_size` or `vision_chunk_size` is below 1, if only some of the token ids are given or two
            of them are equal, or if a reduction can't be.
    """

    model_type = "storms"

    latent_start_token_id: int | None = None
    latent_pad_token_id: int | None = None
    latent_end_token_id: int | None = None
    latent_size: int = 8
    latent_loss_weight: float = 0.1
    temporal_projector: dict | None = None
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sampling: int = 1
    pool_images: bool = False
    vision_chunk_size: int = 65536

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Always this folder's own code: a checkpoint fine-tuned from the Hub must not keep pointing at its parent's.
        self.auto_map = dict(AUTO_MAP)
        if self.latent_size < 1:
            raise ValueError(f"latent_size is {self.latent_size}, but a latent block has at least 1 slot.")
        token_ids = [self.latent_start_token_id, self.latent_pad_token_id, self.latent_end_token_id]
        if token_ids != [None] * 3 and (None in token_ids or len(set(token_ids)) != 3):
            raise ValueError(
                f"latent_start_token_id, latent_pad_token_id and latent_end_token_id are {token_ids}, but must be "
                "three different ids of the tokenizer. Run `python -m recipes.init_checkpoint` to set them."
            )
        if self.vision_chunk_size < 1:
            raise ValueError(
                f"vision_chunk_size is {self.vision_chunk_size}, but at least 1 patch has to run at once."
            )
        self.token_reducer()

    def token_reducer(self) -> TokenReducer:
        """What is done to visual tokens between projector and language model."""
        return TokenReducer(self.temporal_pool, self.spatial_pool, self.temporal_sampling, self.pool_images)


__all__ = ["StormsConfig"]
