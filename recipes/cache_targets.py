"""Encode every thought video once, and write a copy of the dataset with the pooled targets as a column.

    python -m recipes.cache_targets --model_name_or_path storms-7b --dataset_name org/storms-thought-videos \
        --output thoughts-with-targets

Stage I then reads `latent_targets` instead of encoding at each step; the loss is the same. The dataset's card says
which vision tower, K and frames they were made with, and Stage I refuses them for any other.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Array2D, Dataset, Features, Video, get_dataset_split_names, load_dataset
from transformers import HfArgumentParser
from trl import ModelConfig

from modeling_storms import StormsForConditionalGeneration
from recipes.arguments import TARGET_SOURCES, DataArguments, StormsTrainingArguments
from recipes.checkpoints import load_model
from recipes.collator import StormsCollator
from recipes.data import TARGETS_KEY, load_card
from recipes.targets import encode_targets, target_settings


@dataclass
class CacheArguments:
    model_name_or_path: str = field(metadata={"help": "STORMS checkpoint whose vision tower encodes."})
    dataset_name: str = field(metadata={"help": "Dataset: a Hub name or a folder."})
    output: str = field(metadata={"help": "Folder to write; must not exist yet, or be empty."})
    model_revision: str = field(default="main", metadata={"help": "Revision of the checkpoint."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset."})
    latent_size: int = field(default=8, metadata={"help": "K, targets a row; as in training."})
    target_source: str = field(default="thought_video", metadata={"help": f"One of {', '.join(TARGET_SOURCES)}."})
    num_target_frames: int = field(default=16, metadata={"help": "Frames sampled from a thought video."})
    max_frame_pixels: int | None = field(default=None, metadata={"help": "As in training: most pixels of a frame."})
    num_frames: int | None = field(default=None, metadata={"help": "As in training; self_distilled only."})
    video_root: str | None = field(default=None, metadata={"help": "Folder of the rows' videos; self_distilled only."})
    batch_size: int = field(default=4, metadata={"help": "Rows encoded at once."})
    dtype: str = field(default="float32", metadata={"help": "As in training: float32, bfloat16, auto."})


class AddTargets:
    """Adds `latent_targets` to a batch of columns."""

    def __init__(self, model: StormsForConditionalGeneration, collator: StormsCollator):
        self.model, self.collator = model, collator

    def __call__(self, columns: dict[str, list]) -> dict[str, Any]:
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        media = [self.collator.target_media(row) for row in rows]
        device = self.model.device
        targets = encode_targets(
            self.model,
            torch.cat([one["pixels"] for one in media]).to(device),
            torch.cat([one["grid_thw"] for one in media]).to(device),
            torch.tensor([len(one["grid_thw"]) for one in media]),
            self.collator.latent_size,
        )
        return {"latent_targets": targets.cpu().numpy()}


def cache_targets(arguments: CacheArguments) -> Path:
    """Write the copy; nothing half-written is left behind.

    Raises:
        ValueError: if `output` is taken, the dataset has no thought videos, or a row's does not decode.
    """
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Choose another --output, or remove it.")
    training = StormsTrainingArguments(
        output_dir=str(output),
        latent_size=arguments.latent_size,
        target_source=arguments.target_source,
        num_target_frames=arguments.num_target_frames,
        bf16=False,
    )
    data = DataArguments(
        dataset_name=arguments.dataset_name,
        num_frames=arguments.num_frames,
        max_frame_pixels=arguments.max_frame_pixels,
    )
    source = ModelConfig(arguments.model_name_or_path, arguments.model_revision, dtype=arguments.dtype)
    model, processor = load_model(source, training, data)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    collator = StormsCollator(
        processor,
        "stage1",
        latent_size=arguments.latent_size,
        video_root=arguments.video_root,
        target_source=arguments.target_source,
        num_target_frames=arguments.num_target_frames,
    )
    staging = output.parent / f".{output.name}.{os.getpid()}"
    try:
        (staging / "data").mkdir(parents=True)
        for split in get_dataset_split_names(arguments.dataset_name, revision=arguments.dataset_revision):
            dataset = load_dataset(arguments.dataset_name, split=split, revision=arguments.dataset_revision)
            _write_split(dataset, split, AddTargets(model, collator), staging, arguments.batch_size)
        _write_card(arguments, target_settings(model, processor, training), staging)
        if output.exists():
            output.rmdir()
        staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _write_split(dataset: Dataset, split: str, add_targets: AddTargets, folder: Path, batch_size: int) -> None:
    needed = {"thought_video": "thought_video", "keyframes": "keyframes", "self_distilled": "video_path"}
    column = needed[add_targets.collator.target_source]
    if column not in dataset.column_names:
        raise ValueError(
            f"Split {split!r} has columns {', '.join(dataset.column_names)}, but targets come from {column!r}."
        )
    for name in ("video", "thought_video"):
        if isinstance(dataset.features.get(name), Video):
            dataset = dataset.cast_column(name, Video(decode=False))
    model = add_targets.model
    shape = (add_targets.collator.latent_size, model.config.get_text_config().hidden_size)
    dataset = dataset.map(
        add_targets,
        batched=True,
        batch_size=batch_size,
        features=Features({**dataset.features, "latent_targets": Array2D(shape, "float32")}),
        load_from_cache_file=False,
        desc=f"encode {split}",
    )
    num_shards = -(-dataset.data.nbytes // 500_000_000) or 1
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"{split}-{index:05d}-of-{num_shards:05d}.parquet", batch_size=32)


def _write_card(arguments: CacheArguments, settings: dict[str, Any], folder: Path) -> None:
    """The source's card, with the new files, column and what the targets were made with."""
    card = load_card(arguments.dataset_name, arguments.dataset_revision)
    files = sorted((folder / "data").iterdir())
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    splits = list(dict.fromkeys(path.name.split("-")[0] for path in files))
    content = card.data.to_dict()
    content.pop("dataset_info", None)  # counts and columns of the copy are read from its files
    content[TARGETS_KEY] = settings
    content["configs"] = [
        {
            "config_name": "default",
            # `load_dataset` caches a local folder by this YAML alone.
            "description": f"sha256 {digest.hexdigest()}",
            "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
        }
    ]
    card.data = type(card.data)(**content)
    card.save(folder / "README.md")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(CacheArguments, description=__doc__).parse_args_into_dataclasses(argv)
    print(f"Wrote {cache_targets(arguments)}")


if __name__ == "__main__":
    main()
