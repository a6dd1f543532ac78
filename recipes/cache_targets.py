"""Encode every thought video once, and write a copy of the dataset with the pooled targets as a column.

    python -m recipes.cache_targets --model_name_or_path storms-7b --dataset_name org/storms-thought-videos \\
        --output thoughts-with-targets

Stage I then reads `latent_targets` instead of encoding at each step; the loss is the same. The dataset's card says
which vision tower, K and frames they were made with, and Stage I refuses them for any other.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Array2D, Dataset, Features, Video, concatenate_datasets, get_dataset_split_names
from huggingface_hub import DatasetCard
from transformers import HfArgumentParser
from trl import ModelConfig

from dataset_builder.schema import LATENT_TARGETS
from model_card.render import public_name
from modeling_storms import StormsForConditionalGeneration
from recipes.arguments import TARGET_SOURCES, DataArguments, StormsTrainingArguments
from recipes.checkpoints import load_model
from recipes.collator import RowError, StormsCollator, row_name
from recipes.data import TARGETS_KEY, VIDEO_COLUMNS, load_card, load_split
from recipes.targets import encode_targets, target_settings


# Of which column a row can't do without.
NEEDED = {"thought_video": ("thought_video",), "keyframes": ("keyframes",), "self_distilled": ("video", "video_path")}
SECTION = "\n## Latent targets\n"


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
    bf16: bool = field(default=False, metadata={"help": "As in training: compute in bfloat16 (autocast)."})


class MakeTargets:
    """Makes the column `latent_targets` from a batch of columns."""

    def __init__(self, model: StormsForConditionalGeneration, collator: StormsCollator, bf16: bool = False):
        self.model, self.collator, self.bf16 = model, collator, bf16

    def __call__(self, columns: dict[str, list]) -> dict[str, Any]:
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        media = [self.collator.target_media(row) for row in rows]
        device = next(self.model.model.visual.parameters()).device
        with torch.autocast(device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            targets = encode_targets(
                self.model,
                torch.cat([one["pixels"] for one in media]).to(device),
                torch.cat([one["grid_thw"] for one in media]).to(device),
                torch.tensor([len(one["grid_thw"]) for one in media]),
                self.collator.latent_size,
            )
        return {LATENT_TARGETS: targets.cpu().numpy()}


def cache_targets(arguments: CacheArguments) -> dict[str, int]:
    """Write the copy; nothing half-written is left behind.

    Returns:
        The number of rows of each split.

    Raises:
        ValueError: if `output` is taken, or the dataset lacks the column that targets come from.
        RowError: if a row has no thought video (keyframes, video), or it does not decode.
    """
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Choose another --output, or remove it.")
    training = StormsTrainingArguments(
        output_dir=str(output),
        latent_size=arguments.latent_size,
        target_source=arguments.target_source,
        num_target_frames=arguments.num_target_frames,
        bf16=False,  # asks for a GPU; see `MakeTargets`
    )
    data = DataArguments(
        dataset_name=arguments.dataset_name,
        num_frames=arguments.num_frames,
        max_frame_pixels=arguments.max_frame_pixels,
        video_root=arguments.video_root,
    )
    # 1. Everything that can be refused is looked at before the work.
    card = load_card(arguments.dataset_name, arguments.dataset_revision)
    datasets = {
        split: _load(arguments, split)
        for split in get_dataset_split_names(arguments.dataset_name, revision=arguments.dataset_revision)
    }
    source = ModelConfig(arguments.model_name_or_path, arguments.model_revision, dtype=arguments.dtype)
    model, processor = load_model(source, training, data)
    model.eval()
    model.model.visual.to("cuda" if torch.cuda.is_available() else "cpu")
    collator = StormsCollator(
        processor,
        "stage1",
        latent_size=arguments.latent_size,
        video_root=data.video_root,
        target_source=arguments.target_source,
        num_target_frames=arguments.num_target_frames,
    )
    # 2. All files in a folder beside the output, which becomes it at once.
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.{os.getpid()}"
    make_targets = MakeTargets(model, collator, arguments.bf16)
    try:
        (staging / "data").mkdir(parents=True)
        for split, dataset in datasets.items():
            _write_split(dataset, split, make_targets, staging, arguments.batch_size)
        _write_card(card, arguments, target_settings(model, processor, training), staging)
        if output.exists():
            output.rmdir()
        staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {split: len(dataset) for split, dataset in datasets.items()}


def _load(arguments: CacheArguments, split: str) -> Dataset:
    """A split, all of whose rows have what targets come from."""
    dataset: Any = load_split(arguments.dataset_name, split, revision=arguments.dataset_revision)
    needed = [name for name in NEEDED[arguments.target_source] if name in dataset.column_names]
    if not needed:
        raise ValueError(
            f"Split {split!r} has columns {', '.join(dataset.column_names)}, but targets come from "
            f"{' or '.join(NEEDED[arguments.target_source])}."
        )
    for name in ("video", "thought_video"):
        if isinstance(dataset.features.get(name), Video):
            dataset = dataset.cast_column(name, Video(decode=False))
    is_missing = [all(row) for row in zip(*(dataset.data.column(name).is_null().to_pylist() for name in needed))]
    if any(is_missing):
        names = dataset.select_columns([name for name in ("id", "question") if name in dataset.column_names])
        raise RowError(
            f"Row {row_name(names[is_missing.index(True)])!r} of split {split!r} has no {' or '.join(needed)}, as "
            f"{sum(is_missing)} of {len(dataset)} rows. Leave them out, or choose another --target_source."
        )
    return dataset


def _write_split(dataset: Dataset, split: str, make_targets: MakeTargets, folder: Path, batch_size: int) -> None:
    shape = (make_targets.collator.latent_size, make_targets.model.config.get_text_config().hidden_size)
    table = folder / f"{split}.arrow"  # not in the library's own cache, where it would stay
    wanted = ("id", "question", *NEEDED[make_targets.collator.target_source], *VIDEO_COLUMNS)
    # Targets alone, beside what there is: columns that go through `map` are encoded again, and JPEG loses by that.
    targets = dataset.select_columns([name for name in dataset.column_names if name in wanted]).map(
        make_targets,
        batched=True,
        batch_size=batch_size,
        remove_columns=[name for name in dataset.column_names if name in wanted],
        features=Features({LATENT_TARGETS: Array2D(shape, "float32")}),
        load_from_cache_file=False,
        cache_file_name=str(table),
        new_fingerprint=f"latent-targets-{split}",  # by default a hash of everything at hand, the model included
        desc=f"encode {split}",
    )
    if LATENT_TARGETS in dataset.column_names:
        dataset = dataset.remove_columns(LATENT_TARGETS)
    dataset = concatenate_datasets([dataset, targets], axis=1)
    num_shards = -(-dataset.data.nbytes // 500_000_000) or 1
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"{split}-{index:05d}-of-{num_shards:05d}.parquet", batch_size=32)
    table.unlink()


def _write_card(card: DatasetCard, arguments: CacheArguments, settings: dict[str, Any], folder: Path) -> None:
    """The source's card, with the new files, column and what the targets were made with."""
    files = sorted((folder / "data").iterdir())
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    splits = list(dict.fromkeys(path.name.split("-")[0] for path in files))
    content = card.data.to_dict()
    content.pop("dataset_info", None)  # counts and columns of the copy are read from its files
    made_by = {"model": public_name(arguments.model_name_or_path), "dtype": arguments.dtype, "bf16": arguments.bf16}
    content[TARGETS_KEY] = {**settings, **made_by}
    content["configs"] = [
        {
            "config_name": "default",
            # `load_dataset` caches a local folder by this YAML alone.
            "description": f"sha256 {digest.hexdigest()}",
            "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
        }
    ]
    card.data = type(card.data)(**content)
    told = "".join(f"| {key} | {value} |\n" for key, value in content[TARGETS_KEY].items())
    card.text = (
        f"{card.text.split(SECTION)[0].rstrip()}\n{SECTION}\nColumn `latent_targets`, by `python -m "
        f"recipes.cache_targets`: what Stage I draws a block's slots to.\n\n| | |\n|---|---|\n{told}"
    )
    card.save(folder / "README.md")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(CacheArguments, description=__doc__).parse_args_into_dataclasses(argv)
    counts = ", ".join(f"{count} {split}" for split, count in cache_targets(arguments).items())
    print(f"Wrote {arguments.output}: {counts} rows, {arguments.latent_size} targets each")


if __name__ == "__main__":
    main()
