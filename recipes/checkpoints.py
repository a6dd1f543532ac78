"""Checkpoints of a training run: where one begins, which one it resumes from, and what each must carry."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import cached_file
from trl import ModelConfig

from modeling_storms import StormsForConditionalGeneration, StormsProcessor

from .arguments import DataArguments, StormsTrainingArguments


LLM_LINEAR_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def load_model(
    model_arguments: ModelConfig, training: StormsTrainingArguments, data: DataArguments
) -> tuple[StormsForConditionalGeneration, StormsProcessor]:
    """The checkpoint that a run starts from, with the run's K, frames and pixels, and with what trains unfrozen.

    Raises:
        ValueError: if there is none, or it is no STORMS checkpoint.
    """
    name = model_arguments.model_name_or_path
    if not name:
        raise ValueError("--model_name_or_path is missing: a STORMS checkpoint, from `recipes.init_checkpoint` on.")
    model_type = PreTrainedConfig.get_config_dict(name, revision=model_arguments.model_revision)[0].get("model_type")
    if model_type != "storms":
        raise ValueError(
            f"{name} is a {model_type!r} model, expected a STORMS checkpoint. Make one by `python -m "
            f"recipes.init_checkpoint --base {name} --output DIR`."
        )
    dtype = model_arguments.dtype
    options: dict[str, Any] = {"dtype": dtype if dtype in (None, "auto") else getattr(torch, dtype)}
    options |= {"attn_implementation": model_arguments.attn_implementation, "revision": model_arguments.model_revision}
    options |= training.model_init_kwargs if isinstance(training.model_init_kwargs, dict) else {}
    # Saved with the checkpoint, so that inference does what training did.
    reduction = {name: getattr(training, name) for name in ("temporal_projector", "temporal_pool", "spatial_pool")}
    options |= {name: value for name, value in reduction.items() if value is not None}
    model = StormsForConditionalGeneration.from_pretrained(name, **options)
    processor = StormsProcessor.from_pretrained(name, revision=model_arguments.model_revision)
    for field in fields(model.model.reducer):
        setattr(processor.video_processor, field.name, getattr(model.model.reducer, field.name))
    training.model_init_kwargs = None  # used up
    if training.trainable == "projector":
        if model.model.temporal_projector is None:
            raise ValueError(
                f"{name} has no temporal projector, so nothing would train. Give it one: --temporal_projector "
                "'{\"num_layers\": 2}'."
            )
        model.requires_grad_(False)
        model.model.temporal_projector.requires_grad_(True)
    else:
        model.model.visual.requires_grad_(training.trainable == "all")
    if training.latent_size is not None:
        model.config.latent_size = model.generation_config.latent_size = training.latent_size
    if data.num_frames is not None:
        processor.video_processor.num_frames, processor.video_processor.fps = data.num_frames, None
    if data.max_frame_pixels is not None:
        size = processor.video_processor.size
        lowest = min(size["shortest_edge"], data.max_frame_pixels)
        processor.video_processor.size = {"shortest_edge": lowest, "longest_edge": data.max_frame_pixels}
    return model, processor


def list_runs(name: str | None, revision: str | None = None) -> list[dict[str, Any]]:
    """Records (`training.json`) of the runs that made a checkpoint, first to last; as far as it has any."""
    if name is None:
        return []
    path = cached_file(name, "training.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return []
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    return [*record.pop("earlier", []), record]


def lora_config(model_arguments: ModelConfig, model: StormsForConditionalGeneration) -> Any:
    """LoRA on the language model's linear layers, with the latent tokens' embedding and head rows trained in full;
    None without `--use_peft`.

    Raises:
        ValueError: if peft is not installed.
    """
    if not model_arguments.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('--use_peft needs peft: pip install "storms[lora]".') from error
    tokens = model.latent_tokens
    rows = [tokens.start, tokens.pad, tokens.end]
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    modules = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    return LoraConfig(
        task_type=model_arguments.lora_task_type,
        revision=model_arguments.model_revision,  # of the base, for whoever merges
        r=model_arguments.lora_r,
        lora_alpha=model_arguments.lora_alpha,
        lora_dropout=model_arguments.lora_dropout,
        target_modules=model_arguments.lora_target_modules or LLM_LINEAR_LAYERS,
        modules_to_save=model_arguments.lora_modules_to_save,
        use_rslora=model_arguments.use_rslora,
        use_dora=model_arguments.use_dora,
        trainable_token_indices=dict.fromkeys(modules, rows),
    )


def save_static_files(model: StormsForConditionalGeneration, processor: StormsProcessor, output: Path) -> None:
    """Everything of a checkpoint but the weights: code, processor, chat template, configs.

    TRL pushes in mid-training what stands in the output folder, and copies only weights and config into it.
    """
    output.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(output)
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    custom_object_save(model, output, config=model.config)


def last_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint of a run; None if there is none.

    A run that is killed while it saves leaves a folder without its last file, which is skipped.
    """
    found = []
    for folder in output.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            continue
        if number is not None:
            found.append((int(number[1]), folder))
    return max(found)[1] if found else None
