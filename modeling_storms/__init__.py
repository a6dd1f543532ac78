"""STORMS as an installed package. Importing it registers the classes, so that checkpoints load by `AutoModel`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)

from .configuration_storms import StormsConfig
from .latent_storms import LatentReasoningMixin, StormsGenerateOutput, StormsOutput
from .modeling_storms import StormsForConditionalGeneration
from .processing_storms import StormsProcessor, StormsVideoProcessor
from .video_storms import VideoDecodeError, decode_video


AutoConfig.register("storms", StormsConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(StormsConfig, StormsForConditionalGeneration, exist_ok=True)
AutoProcessor.register(StormsConfig, StormsProcessor, exist_ok=True)
AutoVideoProcessor.register(StormsConfig, StormsVideoProcessor, exist_ok=True)

__all__ = [
    "LatentReasoningMixin",
    "StormsConfig",
    "StormsForConditionalGeneration",
    "StormsGenerateOutput",
    "StormsOutput",
    "StormsProcessor",
    "StormsVideoProcessor",
    "VideoDecodeError",
    "decode_video",
]
