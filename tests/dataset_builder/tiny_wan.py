"""Tiny random Wan pipelines, saved in the layout of the real ones. Nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)


CHARACTERS = [chr(code) for code in range(33, 127)]


def save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_wan(folder: Path, conditioning: str) -> Path:
    """Save a random pipeline that `WanGenerator(conditioning=...)` loads. 16 x 16 pixels suit it; 32 x 32 where
    the result is decoded again, as decord can't read so narrow a file.

    Args:
        folder (`Path`): where to.
        conditioning (`str`): `"first"`, `"first_last"` or `"vace"`.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vocabulary = ["<pad>", "</s>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: idx for idx, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    components: dict[str, Any] = {
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
    }
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    if conditioning == "vace":
        components["transformer"] = WanVACETransformer3DModel(
            **transformer, in_channels=16, vace_layers=[0], vace_in_channels=96
        )
        return save(WanVACEPipeline(**components), folder)
    vision = CLIPVisionConfig(
        hidden_size=4, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    num_image_tokens = (32 // 16) ** 2 + 1
    components["transformer"] = WanTransformer3DModel(
        **transformer,
        in_channels=36,
        image_dim=4,
        added_kv_proj_dim=24,
        pos_embed_seq_len=2 * num_image_tokens if conditioning == "first_last" else None,
    )
    components["image_encoder"] = CLIPVisionModel(vision)
    components["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return save(WanImageToVideoPipeline(**components), folder)
