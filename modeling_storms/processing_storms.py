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
"""Processor of STORMS: Qwen2.5-VL's, with videos decoded by decord and latent tokens kept out of decoded text."""

import math
from dataclasses import astuple
from functools import partial
from numbers import Integral
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessorInitKwargs
from transformers.utils import logging
from transformers.video_utils import VideoMetadata, make_batched_metadata, make_batched_videos

from .temporal_storms import TokenReducer
from .video_storms import decode_video, fps_frame_indices, uniform_frame_indices


logger = logging.get_logger(__name__)

LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")


def _with_paths_as_text(videos: Any) -> Any:
    """`videos`, nested as it is, with paths as text: the library silently drops what is neither text nor frames."""
    if isinstance(videos, PathLike):
        return fspath(videos)
    if isinstance(videos, bytes):
        raise ValueError(
            "A video was given as bytes. Decode it first: frames, metadata = decode_video(data, ...), and pass "
            "frames as the video and video_metadata=[metadata]."
        )
    return [_with_paths_as_text(video) for video in videos] if isinstance(videos, (list, tuple)) else videos


class StormsVideoProcessorKwargs(Qwen2VLVideoProcessorInitKwargs, total=False):  # type: ignore[call-arg]  # mypy skips transformers
    """What a video processor and its calls take: Qwen2-VL's, and the model's token reduction, see `TokenReducer`."""

    temporal_pool: int
    spatial_pool: int
    temporal_sampling: int
    pool_images: bool


# trf-ignore: TRF057 (documented by hand: the decorator knows only the library's own models)
class StormsVideoProcessor(Qwen2VLVideoProcessor):
    """Samples `num_frames` (32) frames evenly, or `fps` a second up to `max_frames`, and decodes them with decord.

    A clip with fewer frames than asked for uses what it has and says so in the log. Pixel limits are those of
    Qwen2.5-VL (`size`), with the reference implementation's cap over the whole video.

    `temporal_pool`, `spatial_pool`, `temporal_sampling` and `pool_images` are the model's (`TokenReducer`): the
    processor writes as many placeholders as tokens will be left.
    """

    valid_kwargs = StormsVideoProcessorKwargs
    temporal_pool = 1
    spatial_pool = 1
    temporal_sampling = 1
    pool_images = False
    do_sample_frames = True
    num_frames = 32
    cap_pixels_per_frame = True

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        # What is asked for displaces the other one's default; asking for both is an error.
        if kwargs.get("num_frames") is not None:
            kwargs.setdefault("fps", None)
        elif kwargs.get("fps") is not None or self.fps is not None:
            kwargs.setdefault("num_frames", None)
        return super().preprocess(_with_paths_as_text(videos), **kwargs)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        name: str = "A video",
        **kwargs,
    ) -> np.ndarray:
        """Indices of the frames to use.

        Args:
            metadata (`VideoMetadata`): of the video; `fps` is needed to sample by `fps`.
            num_frames (`int`, *optional*): frames wanted, evenly spread over the video.
            fps (`float`, *optional*): frames a second wanted instead, at most `max_frames` in all.
            max_frames (`int`, *optional*): defaults to the processor's own.
            name (`str`, *optional*): what the log calls the video.

        Raises:
            ValueError: if both or neither of `num_frames` and `fps` are given, or it is not positive.
        """
        if (num_frames is None) == (fps is None) or (num_frames or fps or 0) <= 0:
            raise ValueError(f"Got num_frames={num_frames} and fps={fps}, but need exactly one of them, positive.")
        total = metadata.total_num_frames
        if num_frames is not None:
            if total < num_frames:
                logger.warning(f"{name} has {total} frames, fewer than the {num_frames} asked for: using all {total}.")
            return uniform_frame_indices(total, num_frames)
        if not metadata.fps:
            raise ValueError(
                "Sampling by fps needs the video's own fps. Pass video_metadata=[{'fps': ..., 'total_num_frames': "
                "...}], or num_frames."
            )
        return fps_frame_indices(total, metadata.fps, fps or 0.0, max_frames or self.max_frames)

    def _decode_and_sample_videos(self, videos, video_metadata, do_sample_frames=None, sample_indices_fn=None):
        videos = make_batched_videos(videos)
        if len({isinstance(video, str) for video in videos}) > 1:
            raise ValueError("A batch mixes videos given as files and as frames. Pass all of them in one way.")
        if video_metadata is not None and not isinstance(videos[0], str):
            for index, metadata in enumerate(make_batched_metadata(videos, video_metadata)):
                indices = None if do_sample_frames else metadata.frames_indices
                described = metadata.total_num_frames if indices is None else len(indices)
                if described != len(videos[index]):
                    raise ValueError(
                        f"Video {index} has {len(videos[index])} frames, but its video_metadata describes "
                        f"{described}. Give total_num_frames, or, for frames already sampled, frames_indices and "
                        "do_sample_frames=False."
                    )
        return super()._decode_and_sample_videos(videos, video_metadata, do_sample_frames, sample_indices_fn)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        if isinstance(video_url_or_urls, list):
            return list(zip(*[self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls]))
        if sample_indices_fn is not None:
            sample_indices_fn = partial(sample_indices_fn, name=video_url_or_urls)
        return decode_video(video_url_or_urls, sample_indices_fn)


# trf-ignore: TRF057 (documented by hand: the decorator knows only the library's own models)
class StormsProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for a tokenizer that holds the three latent tokens.

    `second_per_grid_ts` comes from the frames really sampled; decoded text never holds a latent token.

    Raises:
        ValueError: if the tokenizer lacks a latent token, or a video given as frames comes without its fps: guessed
            times would shift every temporal position.
    """

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in LATENT_TOKENS if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer lacks {', '.join(missing)}. Make a STORMS checkpoint with "
                "`python -m recipes.init_checkpoint`."
            )
        self.latent_token_ids = [vocabulary[token] for token in LATENT_TOKENS]
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)

    # trf-ignore: TRF057 (documented by the class it extends)
    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        inputs = super().__call__(images=images, text=text, videos=_with_paths_as_text(videos), **kwargs)
        reducer = self._reducer({**(kwargs.get("videos_kwargs") or {}), **kwargs})
        if reducer != TokenReducer():
            inputs["token_reduction"] = torch.tensor([int(number) for number in astuple(reducer)])
        return inputs

    def _process_videos(self, videos, **kwargs):
        processed, replacements = super()._process_videos(videos, **kwargs)
        for index, metadata in enumerate(processed["video_metadata"]):
            if not metadata.fps:
                raise ValueError(
                    f"Video {index} was given as frames without its fps, so the times of its frames are unknown. Pass "
                    "a file, or video_metadata=[{'fps': ..., 'total_num_frames': ...}]."
                )
        return processed, replacements

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        return self.video_token * self._num_left(video_inputs["video_grid_thw"][video_idx], self._reducer(kwargs))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        reducer = self._reducer({}).for_images
        return self.image_token * self._num_left(image_inputs["image_grid_thw"][image_idx], reducer)

    def _reducer(self, given: dict[str, Any]) -> TokenReducer:
        chosen = {name: given.get(name) for name in TokenReducer.__dataclass_fields__}
        own = self.video_processor
        return TokenReducer(**{name: getattr(own, name) if one is None else one for name, one in chosen.items()})

    def _num_left(self, grid_thw: Any, reducer: TokenReducer) -> int:
        steps, height, width = (int(one) for one in grid_thw)
        merge = self.video_processor.merge_size
        return math.prod(reducer.grid(steps, height // merge, width // merge))

    def batch_decode(self, sequences, *args, **kwargs) -> list[str]:
        """`tokenizer.batch_decode` without latent tokens, whatever `skip_special_tokens` says."""
        return self.tokenizer.batch_decode([self._without_latents(row) for row in sequences], *args, **kwargs)

    def decode(self, token_ids, *args, **kwargs) -> str | list[str]:
        """`tokenizer.decode` without latent tokens, whatever `skip_special_tokens` says; rows of ids give a list."""
        if len(token_ids) and not isinstance(token_ids[0], Integral) and torch.as_tensor(token_ids[0]).ndim > 0:
            return self.batch_decode(token_ids, *args, **kwargs)
        return self.tokenizer.decode(self._without_latents(token_ids), *args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def _without_latents(self, token_ids: Any) -> list[int]:
        token_ids = torch.as_tensor(token_ids).reshape(-1).tolist()
        return [token_id for token_id in token_ids if token_id not in self.latent_token_ids]


StormsVideoProcessor.register_for_auto_class("AutoVideoProcessor")
StormsProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["StormsProcessor", "StormsVideoProcessor"]
