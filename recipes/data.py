"""Datasets of a training run: from the Hub or a folder, alone or mixed, checked before the first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    IterableDataset,
    Value,
    Video,
    concatenate_datasets,
    get_dataset_split_names,
    interleave_datasets,
    load_dataset,
)
from huggingface_hub import DatasetCard, hf_hub_download

from .arguments import DataArguments, DatasetSource, StormsTrainingArguments
from .collator import RowError, row_name


TEXT_COLUMNS = ("id", "question", "options", "answer", "messages")
VIDEO_COLUMNS = ("video", "video_path", "video_start", "video_end", "video_root")
# Key of a dataset card's YAML under which `recipes.cache_targets` says what its targets were made with.
TARGETS_KEY = "latent_targets"


def load_data(
    data: DataArguments, training: StormsTrainingArguments, stage: str, target_settings: Mapping[str, Any] | None
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The rows to train on and, if `--eval_strategy` asks for it, those to evaluate on.

    Args:
        data, training: the run's arguments.
        stage (`str`): `"sft"`, `"stage1"` or `"stage2"`.
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
    if training.eval_strategy == "no":
        return train, None
    path = data.dataset_name or data.sources()[0].path
    source = DatasetSource(path, data.dataset_config, data.dataset_revision, split=data.dataset_test_split)
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
    dataset = load_dataset(
        source.path, source.name, split=split, revision=source.revision, streaming=data.dataset_streaming
    )
    columns = set(dataset.column_names or [])
    if not {"question", "answer"} <= columns and "messages" not in columns:
        raise ValueError(
            f"{source.path} has columns {', '.join(sorted(columns))}, expected `question` and `answer` (rows of "
            "`dataset_builder`, or plain video questions), or `messages` (conversations, perhaps with `images`)."
        )
    if stage == "stage1" and "messages" in columns:
        raise ValueError(f"{source.path} holds conversations, but Stage I takes questions with a thought video only.")
    # 1. Only what this run reads: the rest would be fetched and decoded for nothing.
    wanted = [*TEXT_COLUMNS, "images"]
    if data.visual_context != "keyframes" or training.target_source == "self_distilled":
        wanted += VIDEO_COLUMNS
    if data.visual_context != "video" or training.target_source == "keyframes":
        wanted.append("keyframes")
    if stage == "stage1" or (stage == "stage2" and training.latent_size is None):
        if "latent_targets" in columns:
            if stage == "stage1":
                _check_stored_targets(source, training, target_settings)
            wanted.append("latent_targets")
        else:
            wanted.append("thought_video")
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    # 2. Videos stay bytes: decoding them is the collator's.
    for name in ("video", "thought_video"):
        if isinstance((dataset.features or {}).get(name), Video):
            dataset = dataset.cast_column(name, Video(decode=False))
    if source.video_root is not None:
        if isinstance(dataset, Dataset):
            dataset = dataset.add_column("video_root", [source.video_root] * len(dataset))
        else:
            features = dataset.features and {**dataset.features, "video_root": Value("string")}
            dataset = dataset.map(_AddColumn("video_root", source.video_root), features=features)
    # 3. A row that would stop the run in its middle stops it here.
    if isinstance(dataset, Dataset):
        _check_rows(dataset, stage)
    return dataset


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


def _check_rows(dataset: Dataset, stage: str) -> None:
    """Look at every row's texts, and whether its thought video is there, without reading any media."""
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows. Check its splits.")
    texts = dataset.select_columns([name for name in TEXT_COLUMNS if name in dataset.column_names])
    if "answer" in texts.column_names:
        for row in texts:
            if row.get("messages"):
                continue
            for name in ("question", "answer"):
                if not (row[name] or "").strip():
                    raise RowError(f"Row {row_name(row)!r} has an empty {name}. Correct it, or leave the row out.")
    if stage == "stage1" and "thought_video" in dataset.column_names:
        missing = dataset.data.column("thought_video").is_null().to_pylist()
        if True in missing:
            row = texts[missing.index(True)]
            raise RowError(
                f"Row {row_name(row)!r} has no thought video, as {sum(missing)} of {len(missing)} rows, but Stage I "
                "takes its targets from there. Leave them out, or use --target_source keyframes or self_distilled."
            )


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
