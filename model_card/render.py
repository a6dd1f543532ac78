"""Render cards: every number in them comes from a JSON file that one of the project's commands wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData


TEMPLATES = Path(__file__).parent
TITLE = "STORMS thought videos"
# Identifiers that the Hub knows, of those that datasets of videos carry; any other becomes "other", with its name.
HUB_LICENSES = frozenset(
    (
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "pddl", "odc-by", "odbl", "cc0-1.0", "unknown"),
        *(
            f"cc-by{kind}-{version}"
            for kind in ("", "-sa", "-nc", "-nd", "-nc-sa", "-nc-nd")
            for version in ("3.0", "4.0")
        ),
    )
)


def render_dataset_card(
    ledger: Mapping[str, Any],
    features: Features,
    sizes: Mapping[str, Mapping[str, int]],
    download_size: int,
    content_hash: str,
) -> str:
    """The README.md of a thought-video dataset, with the YAML that `load_dataset` and the Hub read.

    Args:
        ledger (`Mapping`): a build's `ledger.json`.
        features (`Features`): the dataset's columns.
        sizes (`Mapping`): for each split `num_examples` and `num_bytes` (media).
        download_size (`int`): bytes of all data files.
        content_hash (`str`): of the data files. `load_dataset` caches a local folder by this YAML alone, and would
            otherwise go on giving the rows of an earlier build.
    """
    licenses = sorted({name for counts in ledger["licenses"].values() for name in counts})
    license = licenses[0] if len(licenses) == 1 and licenses[0] in HUB_LICENSES else "other"
    splits = SplitDict({split: SplitInfo(name=split, **size) for split, size in sizes.items()})
    info = DatasetInfo(features=features, splits=splits, download_size=download_size)
    info.dataset_size = sum(size["num_bytes"] for size in sizes.values())
    card_data = DatasetCardData(
        pretty_name=TITLE,
        license=license,
        license_name="see-column-license" if license == "other" else None,
        task_categories=["video-text-to-text", "visual-question-answering"],
        tags=["video", "latent-reasoning", "thought-video", "storms"],
        size_categories=[_size_category(ledger["accepted"])],
        configs=[
            {
                "config_name": "default",
                "description": f"sha256 {content_hash}",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in sizes],
            }
        ],
        dataset_info=info._to_yaml_dict(),
    )
    card = DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "dataset_card.md.jinja"),
        title=TITLE,
        ledger=ledger,
        source=json.dumps(ledger["source"], sort_keys=True),
        sizes=sizes,
        stages={name: json.dumps(settings, sort_keys=True) for name, settings in ledger["stages"].items()},
        is_simulated=set(ledger["licenses"]) == {"simulated"},
    )
    return str(card)


STAGES = {
    "sft": "Supervised fine-tuning on answers, without latent blocks.",
    "stage1": "Stage I: answers, and a regression of the latent states to features of thought videos.",
    "stage2": "Stage II: answers only, with gradients through the model's own latent states.",
}


def render_model_card(repo_id: str, training: Mapping[str, Any]) -> str:
    """The README.md of a checkpoint that a training run saved.

    Args:
        repo_id (`str`): its name on the Hub, or its folder's.
        training (`Mapping`): the run's `training.json`: what was trained, on what, and its last logged metrics.
    """
    base = training["base_model"] and public_name(training["base_model"])
    names = [public_name(name) for name in training["datasets"]]
    data = ModelCardData(
        base_model=base if base and not is_local(base) else None,
        datasets=sorted({name for name in names if not is_local(name)}) or None,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["storms", "latent-reasoning", "video", "custom_code", "trl", training["stage"]],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md.jinja"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        training={**training, "base_model": base, "datasets": names},
        stages=STAGES,
    )
    return str(card)


def is_local(name: str) -> bool:
    """Whether a model's or dataset's name is a folder of this machine rather than a name on the Hub."""
    return Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def public_name(name: str) -> str:
    """A model's or dataset's name without what only this machine knows: of a folder its last part, as `./name`."""
    return f"./{Path(name.replace(chr(92), '/')).expanduser().resolve().name}" if is_local(name) else name


def _size_category(num_rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if num_rows < limit:
            return name
    return "100K<n<1M"
