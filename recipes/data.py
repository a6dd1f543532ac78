"""Datasets of a training run: from the Hub or a folder, alone or mixed, checked before the first step."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    interleave_datasets,
    load_dataset,
)
from huggingface_hub import DatasetCard, hf_hub_download
from tqdm.auto import tqdm

from dataset_builder.schema import FEATURES

from .arguments import DataArguments, DatasetSource, StormsTrainingArguments
from .collator import RowError, check_texts, row_name


TEXT_COLUMNS = ("id", "question", "options", "answer", "messages", "latent_size")
VIDEO_COLUMNS = ("video", "video_path", "video_start", "video_end")
# Key of a dataset card's YAML under which `recipes.cache_targets` says what its targets were made with.
TARGETS_KEY = "latent_targets"
# What to do about rows that lack a column this run needs.
WITHOUT = {
    "video": "Give video_path with --video_root, use --visual_context keyframes, or leave them out.",
    "keyframes": "Use --visual_context video, another --target_source, or leave them out.",
    "thought_video": "Targets come from there: leave them out, or use --target_source keyframes or self_distilled.",
    "latent_targets": "Run `python -m recipes.cache_targets` for all rows, or leave the column out.",
}


def load_data(
    data: DataArguments, training: StormsTrainingArguments, stage: str, target_settings: Mapping[str, Any] | None
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The rows to train on and, if `--eval_strategy` asks for it, those to evaluate on.

    Args:
        data, training: the run's arguments.
        stage (`str`): `"align"`, `"sft"`, `"stage1"` or `"stage2"`.
        target_settings (`dict`, *optional*): what targets would be made with now; stored ones must agree.

    Raises:
        ValueError: if a dataset, split or column is missing, stored targets were made otherwise, or a row can't be
            trained on in this stage (`RowError`, which names it). Rows of a stream are checked as they come.
    """
    parts = [_load(source, data, training, stage, target_settings) for source in data.sources()]
    weights: Any = [source.weight for source in data.sources()]
    try:
        if weights[0] is not None:
            total = sum(weights)
            train = interleave_datasets(
                parts, [weight / total for weight in weights], seed=training.seed, stopping_strategy="all_exhausted"
            )
        else:
            train = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The datasets of the mixture have columns of different types: {error}") from error
    if data.max_train_rows is not None:
        train = train.take(data.max_train_rows)
    if next(iter(train), None) is None:
        raise ValueError("The datasets have no rows. Check their splits.")
    if training.eval_strategy == "no":
        return train, None
    source = replace(data.sources()[0], split=data.dataset_test_split)
    held_out = _load(source, data, training, stage, target_settings)
    return train, held_out if data.max_eval_rows is None else held_out.take(data.max_eval_rows)


def _load(
    source: DatasetSource,
    data: DataArguments,
    training: StormsTrainingArguments,
    stage: str,
    target_settings: Mapping[str, Any] | None,
) -> Dataset | IterableDataset:
    split = source.split or data.dataset_train_split
    splits = get_dataset_split_names(source.path, source.name, revision=source.revision)
    if split not in splits:
        raise ValueError(
            f"{source.path} has no split {split!r}, but {', '.join(splits)}. Set --dataset_train_split, or "
            "--dataset_test_split and --eval_strategy."
        )
    dataset = load_split(source.path, split, source.name, source.revision, streaming=data.dataset_streaming)
    columns = set(dataset.column_names or [])
    if not {"question", "answer"} <= columns and "messages" not in columns:
        raise ValueError(
            f"{source.path} has columns {', '.join(sorted(columns))}, expected `question` and `answer` (rows of "
            "`dataset_builder`, or plain video questions), or `messages` (conversations, perhaps with `images`)."
        )
    if stage == "stage1" and "messages" in columns:
        raise ValueError(f"{source.path} holds conversations, but Stage I takes questions with a thought video only.")
    # 1. Only what this run reads: the rest would be fetched and decoded for nothing.
    needed = {"keyframes": ["keyframes"], "video": ["video"], "both": ["video", "keyframes"]}[data.visual_context]
    if stage == "stage1" and "latent_targets" in columns:
        _check_stored_targets(source, training, target_settings)
        needed.append("latent_targets")
    elif stage == "stage1" or (stage == "stage2" and training.latent_size is None):
        needed.append("video" if training.target_source == "self_distilled" else training.target_source)
    wanted = {*TEXT_COLUMNS, "images", "image", *needed, *(VIDEO_COLUMNS if "video" in needed else ())}
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    # 2. The contract's types, so that datasets can be mixed. Videos stay bytes: decoding them is the collator's.
    for name, feature in FEATURES.items():
        if name in dataset.column_names and name != "keyframes" and dataset.features[name] != feature:
            try:
                dataset = dataset.cast_column(name, feature)
            except (pa.ArrowException, TypeError, ValueError) as error:
                raise ValueError(
                    f"{source.path}: column {name!r} holds {dataset.features[name]}, expected {feature}: {error}"
                ) from error
    if source.video_root is not None:
        if isinstance(dataset, Dataset):
            dataset = dataset.add_column("video_root", [source.video_root] * len(dataset))
        else:
            features = Features({**dataset.features, "video_root": Value("string")})
            dataset = dataset.map(_AddColumn("video_root", source.video_root), features=features)
    # 3. A row that would stop the run in its middle stops it here.
    if isinstance(dataset, Dataset):
        _check_rows(dataset, needed, source.path, source.video_root or data.video_root)
    elif "question" in columns:
        for name in needed:
            if name not in columns and not (name == "video" and "video_path" in columns):
                raise ValueError(f"{source.path} has no column {name!r}. {WITHOUT[name]}")
    return dataset


def load_split(
    path: str, split: str, name: str | None = None, revision: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """`load_dataset`, but of a folder always what it holds now.

    The library caches a folder with a card by the card alone: with a changed or replaced file beside the same
    README.md, or a copy of the folder, it would give the rows of before.
    """
    options = {}
    if Path(path).is_dir() and not streaming:
        digest = hashlib.sha256()
        for file in sorted(Path(path).rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                digest.update(f"{inside} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        options["description"] = digest.hexdigest()  # part of what it caches by
    return load_dataset(path, name, split=split, revision=revision, streaming=streaming, **options)


def load_card(path: str, revision: str | None = None) -> DatasetCard:
    """The card of a dataset: a folder's README.md, or the Hub's."""
    readme = Path(path) / "README.md"
    if not Path(path).is_dir():
        readme = Path(hf_hub_download(path, "README.md", repo_type="dataset", revision=revision))
    return DatasetCard.load(readme) if readme.is_file() else DatasetCard("")


class _AddColumn:
    def __init__(self, name: str, value: Any):
        self.name, self.value = name, value

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {self.name: self.value}


def _check_rows(dataset: Dataset, needed: list[str], path: str, video_root: str | None) -> None:
    """Look at every row's texts, and whether its media are there, without reading any."""
    named = [*TEXT_COLUMNS, "video_path"]
    texts = dataset.select_columns([name for name in dataset.column_names if name in named])
    is_missing = {name: _is_missing(dataset, name) for name in needed}
    for index, row in enumerate(tqdm(texts, desc="check", unit="row", delay=10, disable=None)):
        check_texts(row)
        if row.get("messages"):
            continue
        for name in needed:
            given = row.get("video_path") if name == "video" else None
            if is_missing[name][index] and not (given and (video_root is not None or Path(given).is_absolute())):
                raise RowError(
                    f"Row {row_name(row)!r} of {path} has no {name.replace('_', ' ')}, as {sum(is_missing[name])} of "
                    f"{len(dataset)} rows. {WITHOUT[name]}"
                )


def _is_missing(dataset: Dataset, name: str) -> list[bool]:
    """For each row whether a column has no value: null, an empty list, or a video without bytes and path."""
    if name not in dataset.column_names:
        return [True] * len(dataset)
    column = dataset.data.column(name)
    if pa.types.is_list(column.type):
        missing = pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0)
    elif pa.types.is_struct(column.type):
        parts = [pc.struct_field(column, part) for part in (("bytes", "path") if name == "video" else ("bytes",))]
        empty = [pc.equal(pc.fill_null(pc.binary_length(part), 0), 0) for part in parts]
        missing = pc.and_(empty[0], empty[-1])
    else:
        missing = column.is_null()
    return missing.to_pylist()


def _check_stored_targets(
    source: DatasetSource, training: StormsTrainingArguments, settings: Mapping[str, Any] | None
) -> None:
    """Stored targets must be those that this run would make."""
    again = "Run `python -m recipes.cache_targets` again for this model and these options."
    if training.trainable == "all":
        raise ValueError(
            f"{source.path} holds stored latent_targets, but --trainable all trains the vision tower, whose features "
            "they would no longer be. Use --trainable llm, or a dataset without stored targets."
        )
    stored = load_card(source.path, source.revision).data.to_dict().get(TARGETS_KEY)
    if stored is None:
        raise ValueError(
            f"{source.path} has a column latent_targets, but its card does not say what they were made with. {again}"
        )
    settings = dict(settings or {})
    if wrong := sorted(name for name in settings if stored.get(name) != settings[name]):
        told = ", ".join(f"{name} {stored.get(name)!r} instead of {settings[name]!r}" for name in wrong)
        raise ValueError(f"{source.path}: its latent_targets were made with {told}. {again}")
