"""Rows, trainers of a tiny model, and what a short run of one computes; in this process and in ranks of others."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import ModelConfig

from dataset_builder.thought_video import encode_video
from recipes.arguments import DataArguments, StormsTrainingArguments
from recipes.checkpoints import load_model, lora_config
from recipes.collator import StormsCollator
from recipes.trainer import StormsTrainer

from ..conftest import moving_disc


# Tokens of the answers and frames of the thought videos differ: 2 frames are one step of the grid, 4 tokens.
ANSWERS = ("A", "the ball rolls to the right before the light changes", "B", "the cup stops")
THOUGHT_FRAMES = (2, 6, 4, 2)


def make_rows(count: int = 4, thoughts: bool = True) -> list[dict[str, Any]]:
    """Rows of the dataset contract's columns that training reads, each with a video and a thought video of its own."""
    rows = []
    for index in range(count):
        answer = ANSWERS[index % 4]
        video = moving_disc(num_frames=8, height=64, width=64, seed=index)
        thought = moving_disc(num_frames=THOUGHT_FRAMES[index % 4], height=64, width=64, seed=100 + index)
        row = {
            "id": f"row-{index}",
            "question": ("Which cup moves?", "What happens after two seconds, and why?")[index % 2] + f" ({index})",
            "options": ["left", "right", "none of them"][: 3 - index % 2] if len(answer) == 1 else [],
            "answer": answer,
            "video": {"bytes": encode_video(video, 4), "path": None},
        }
        if thoughts:
            row["thought_video"] = {"bytes": encode_video(thought, 4), "path": None}
        rows.append(row)
    return rows


def make_trainer(
    checkpoint: Path,
    output: Path,
    stage: str,
    rows: list[dict[str, Any]],
    eval_rows: list[dict[str, Any]] | None = None,
    model_options: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> StormsTrainer:
    """What `recipes.trainer.run` puts together, on rows in memory, in an order that is kept."""
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4,
        "latent_size": 3,
        "eval_answers": 0,
    }
    training = StormsTrainingArguments(output_dir=str(output), **{**defaults, **options})
    chosen = ModelConfig(model_name_or_path=str(checkpoint), **(model_options or {}))
    model, processor = load_model(chosen, training, DataArguments(dataset_name="in memory", num_frames=4))
    collator = StormsCollator(
        processor,
        stage,
        latent_size=training.latent_size,
        padding_side=training.padding_side,
        target_source=training.target_source,
        num_target_frames=training.num_target_frames,
        cache={},
    )
    return StormsTrainer(
        model,
        training,
        collator,
        Dataset.from_list(rows),
        None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=processor,
        peft_config=lora_config(chosen, model),
        callbacks=callbacks,
        stage=stage,
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is not sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of the first step, as the optimizer gets them."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            named = (model.module if hasattr(model, "module") else model).named_parameters()
            self.gradients = {name: whole(one.grad) for name, one in named if one.grad is not None}


def train(trainer: StormsTrainer) -> dict[str, Any]:
    """Train, and tell what came of it: what was logged at each step, the first step's gradients, the weights."""
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    return {"logs": logs, "gradients": recorder.gradients, "weights": weights}


def worst_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference between two sets of tensors, each relative to its own norm, or to a thousandth of the
    largest norm: gradients that are nothing but rounding (keys' biases) have no relative error."""
    assert one.keys() == other.keys()
    floor = 1e-3 * max(float(tensor.norm()) for tensor in other.values())
    return max(float((one[name] - other[name]).norm()) / max(float(other[name].norm()), floor) for name in other)
