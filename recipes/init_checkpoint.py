"""Turn a Qwen2.5-VL model into a STORMS checkpoint: weights, three latent tokens, code, processor, generation config.

    python -m recipes.init_checkpoint --base Qwen/Qwen2.5-VL-7B-Instruct --output storms-7b
    python -m recipes.init_checkpoint --base Qwen/Qwen2.5-VL-3B-Instruct --output storms-3b --push_to_hub org/storms-3b
    python -m recipes.init_checkpoint --tiny --output storms-tiny     # random, under 5 MB, downloads nothing

The result loads by `AutoModel.from_pretrained(DIR, trust_remote_code=True)` on a machine without this package.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import (
    AddedToken,
    AutoProcessor,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    set_seed,
)
from transformers.utils import logging

import modeling_storms
from model_card.push import HubError, check_checkpoint, explain, upload
from model_card.render import public_name, render_model_card
from modeling_storms import StormsConfig, StormsForConditionalGeneration, StormsProcessor, StormsVideoProcessor
from modeling_storms.processing_storms import LATENT_TOKENS


logger = logging.get_logger(__name__)

CHAT_TEMPLATE = Path(modeling_storms.__file__).parent / "chat_template.jinja"


@dataclass
class InitArguments:
    output: str = field(metadata={"help": "Folder to write; must not exist yet, or be empty."})
    base: str | None = field(
        default=None, metadata={"help": "Qwen2.5-VL model: a Hub id or a folder. Give this or --tiny."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of --base to pin."})
    tiny: bool = field(default=False, metadata={"help": "Build a small random model and tokenizer on the spot."})
    latent_size: int = field(default=8, metadata={"help": "K, slots per latent block, in training and generation."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the new tokens' embeddings, and of the weights of --tiny."}
    )
    markers_as_newline: bool = field(
        default=False,
        metadata={
            "help": "Embed <|latent_start|> and <|latent_end|> like the newline that ends a prompt, where the base "
            "answers; not for models with tied embeddings."
        },
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Also upload the folder to this Hub repository."})
    private: bool = field(default=False, metadata={"help": "Create the Hub repository as private."})


def build_tiny_base(
    seed: int = 0,
    num_hidden_layers: int = 3,
    hidden_size: int = 64,
    initializer_range: float = 0.02,
    rope_theta: float = 10000.0,
    texts: Sequence[str] = (),
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """A random Qwen2.5-VL of every real part but small (0.2M weights), with a BPE tokenizer trained on the spot.

    One that is to learn needs weights about `hidden_size ** -0.5`, and a small `rope_theta`: with few dimensions a
    head, 10000 makes neighbouring columns of a picture look alike. With `texts` like those it will read, the tokenizer
    needs fewer tokens for them.
    """
    set_seed(seed)
    subjects = ("the ball", "the cup on the left", "the red car", "a person", "the camera")
    motions = ("moves", "rolls", "turns", "stops", "falls", "swaps places", "bounces")
    places = ("to the right", "behind the box", "before the light changes", "after two seconds", "faster than before")
    sentences = [f"{subject} {motion} {place}." for subject in subjects for motion in motions for place in places]
    sentences += ["system user assistant You are a helpful assistant.", "Which happens first? Answer A, B, C or D."]
    sentences += texts
    special = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"]
    special += ["quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        sentences, vocab_size=600 if texts else 400, show_progress=False
    )
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in special], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in special}

    sections = [share * hidden_size // 64 for share in (2, 3, 3)]  # of half a head, for time, height and width
    config = Qwen2_5_VLConfig(
        text_config={
            # Like the released models, the vocabulary is padded beyond the tokenizer's: room for the latent tokens.
            "vocab_size": -(-(len(tokenizer) + 8) // 64) * 64,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "initializer_range": initializer_range,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": sections},
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
            "initializer_range": initializer_range,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["im_end"], ids["endoftext"]], pad_token_id=ids["endoftext"], do_sample=False
    )
    image_size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    video_size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 84}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=image_size),
        tokenizer,
        Qwen2VLVideoProcessor(size=video_size, cap_pixels_per_frame=True),
    )
    return model, processor


def convert(
    base: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, latent_size: int = 8, seed: int = 0
) -> tuple[StormsForConditionalGeneration, StormsProcessor]:
    """A STORMS model that shares the base model's weights, and its processor.

    The latent tokens' input and output embeddings start as the mean over the tokenizer's own tokens plus 1% of their
    standard deviation in noise: an average logit, so that an untrained model opens no block by accident, and three
    vectors that training can tell apart.

    Args:
        base (`Qwen2_5_VLForConditionalGeneration`): natively loaded, so that old checkpoints' weight names are mapped
            right; its embeddings are changed in place.
        processor (`Qwen2_5_VLProcessor`): its tokenizer gets the latent tokens, in place.
        latent_size (`int`, *optional*, defaults to 8): slots per block.
        seed (`int`, *optional*, defaults to 0): seed of the noise.
    """
    # 1. Tokens. The released vocabularies are padded past the tokenizer's length, so rows usually exist already.
    tokenizer = processor.tokenizer
    # Generation continues at the right end. Only what stands in init_kwargs is saved with the tokenizer.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    num_known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in LATENT_TOKENS], special_tokens=True)
    token_ids = tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
    if max(token_ids) >= base.config.get_text_config().vocab_size:
        base.resize_token_embeddings(max(token_ids) + 1, pad_to_multiple_of=64, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tables = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
    for table in tables[:1] if tables[0] is tables[1] else tables:  # tied or not, in an order that repeats
        known = table.data[:num_known].float()
        noise = torch.randn(len(token_ids), table.shape[1], generator=generator).to(known.device)
        table.data[token_ids] = (known.mean(0) + 0.01 * known.std(0) * noise).to(table.dtype)

    # 2. Weights: same names, strictly.
    inherited = base.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        inherited.pop(name, None)
    names = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
    config = StormsConfig(**inherited, **dict(zip(names, token_ids)), latent_size=latent_size)
    config.dtype = base.dtype
    with torch.device("meta"):
        model = StormsForConditionalGeneration(config)
    model.load_state_dict(base.state_dict(), strict=True, assign=True)
    for name, buffer in base.named_buffers():  # not part of a state dict, and on meta they have no values
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    model.tie_weights()
    options = {"latent_mode": "auto", "latent_size": latent_size, "latent_stop": "budget"}
    options |= {"max_latent_blocks": 1, "latent_bottleneck": False}
    options |= {"latent_solver": "sequential", "jacobi_iterations": 3}
    inherited = base.generation_config.to_diff_dict()
    inherited.pop("_from_model_config", None)  # else options that the library doesn't know are dropped
    model.generation_config = GenerationConfig(**{**inherited, **options})

    # 3. Processor. Sampling is ours (32 frames), pixels are the base model's.
    #    A released repository has pixel limits for images only, and the library then takes them for frames of videos,
    #    at 12.8 million pixels each: those give way to the defaults for videos.
    video_options = processor.video_processor.to_dict()
    if video_options["size"] == processor.image_processor.to_dict()["size"]:
        video_options.pop("size")
        logger.warning(f"The base has no pixel limits of its own for videos; using {StormsVideoProcessor.size}.")
    for name in ("video_processor_type", "do_sample_frames", "num_frames", "fps", "auto_map", "cap_pixels_per_frame"):
        video_options.pop(name, None)
    storms_processor = StormsProcessor(
        processor.image_processor,
        tokenizer,
        StormsVideoProcessor(**video_options),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
    return model.eval(), storms_processor


def embed_markers_as_newline(model: StormsForConditionalGeneration, processor: StormsProcessor) -> None:
    """Give `<|latent_start|>` and `<|latent_end|>` the input embedding of the newline that ends a prompt, in place.

    What the base would answer, it predicts at that newline. Embedded like it, the first position of a block comes to
    much the same state, and that fills the first slot; embedded as an average, it must learn to see once more
    (LOG.md, the gate).

    Raises:
        ValueError: if input and output embeddings are tied: each newline of a text would be as likely to open a block.
    """
    embeddings = model.get_input_embeddings().weight
    if embeddings is model.get_output_embeddings().weight:
        raise ValueError(
            "The model ties its input and output embeddings, so that markers embedded as a newline would also be "
            "emitted like one. Leave --markers_as_newline out."
        )
    newline = processor.tokenizer("\n")["input_ids"][-1]
    tokens = model.latent_tokens
    with torch.no_grad():
        embeddings[[tokens.start, tokens.end]] = embeddings[newline].clone()


def init_checkpoint(arguments: InitArguments) -> Path:
    """Write the checkpoint folder; nothing half-written is left behind.

    Raises:
        ValueError: if not exactly one of `base` and `tiny` is given, `output` is taken, or `base` is no Qwen2.5-VL.
    """
    if (arguments.base is None) == (not arguments.tiny):
        raise ValueError(
            f"Got base={arguments.base!r} and tiny={arguments.tiny}: give exactly one of --base and --tiny."
        )
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Choose another --output, or remove it.")
    if arguments.base is not None:
        if arguments.base.startswith(("/", ".")) and not Path(arguments.base).is_dir():
            raise ValueError(f"--base {arguments.base} is no folder. Give a folder or a Hub id.")
        model_type = PreTrainedConfig.get_config_dict(arguments.base, revision=arguments.revision)[0].get("model_type")
        if model_type != "qwen2_5_vl":
            raise ValueError(f"{arguments.base} is a {model_type!r} model, but --base must be a plain Qwen2.5-VL one.")
    if arguments.push_to_hub is not None:  # before the work: a wrong token or name should not cost a conversion
        try:
            repo_id = HfApi().create_repo(arguments.push_to_hub, private=arguments.private, exist_ok=True).repo_id
        except Exception as error:
            raise HubError(f"Can't make {arguments.push_to_hub} on the Hub: {explain(error)[0]}") from error
    if arguments.base is None:
        base, processor = build_tiny_base(arguments.seed)
    else:
        base, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            arguments.base, revision=arguments.revision, dtype="auto", output_loading_info=True
        )
        wrong = {
            kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys") if loading[kind]
        }
        if wrong:
            raise ValueError(
                f"{arguments.base} does not load as Qwen2.5-VL: {wrong}. Give a Qwen2.5-VL model as --base."
            )
        processor = AutoProcessor.from_pretrained(arguments.base, revision=arguments.revision)
    model, processor = convert(base, processor, arguments.latent_size, arguments.seed)
    if arguments.markers_as_newline:
        embed_markers_as_newline(model, processor)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.{os.getpid()}"
    try:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        record = {"stage": "init", "base_model": arguments.base and public_name(arguments.base)}
        record |= {"revision": arguments.revision} if arguments.revision else {}
        (staging / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        card = render_model_card(arguments.push_to_hub or output.name, record)
        (staging / "README.md").write_text(card, encoding="utf-8")
        staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if arguments.push_to_hub is not None:
        check_checkpoint(output)
        again = f"Push it by `python -m model_card push --checkpoint {output} --repo {repo_id}`."
        upload(output, repo_id, "STORMS checkpoint before training", again)
    return output


def main() -> None:
    parser = HfArgumentParser(InitArguments, description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        output = init_checkpoint(arguments)
    except (HubError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"Wrote {output} ({size:.1f} MB): {', '.join(sorted(file.name for file in output.iterdir()))}")
    if arguments.push_to_hub is not None:
        print(f"Pushed to {arguments.push_to_hub}")


if __name__ == "__main__":
    main()
