"""Render cards: every number in them comes from a JSON file that one of the project's commands wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData


TEMPLATES = Path(__file__).parent
TITLE = "STORMS thought videos"
CITATION = """\
@misc{storms2026,
  title = {Internalized Modeling for Spatial-Temporal Reasoning in Video-Language Models},
  year = {2026},
  eprint = {2605.26014},
  archivePrefix = {arXiv},
}
@misc{storm2025,
  title = {Token-Efficient Long Video Understanding for Multimodal LLMs},
  year = {2025},
  eprint = {2503.04130},
  archivePrefix = {arXiv},
}"""
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
        citation=CITATION,
        is_simulated=set(ledger["licenses"]) == {"simulated"},
    )
    return str(card)


STAGES = {
    "init": "No training yet: the base model's weights, three latent tokens, the latent mode's code.",
    "align": "Alignment of a new temporal projector, everything else frozen.",
    "sft": "Supervised fine-tuning on answers, without latent blocks.",
    "stage1": "Stage I: answers, and a regression of the latent states to features of thought videos.",
    "stage2": "Stage II: answers only, with gradients through the model's own latent states.",
}
# What a result must say of itself to stand on a card.
RESULT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "benchmark": str,
    "dataset": str,
    "split": str,
    "metric": str,
    "value": (int, float),
    "num_rows": int,
    "protocol": str,
    "prompt": str,
    "latent_mode": str,
    "command": str,
}


def check_results(results: Any, name: str) -> list[dict[str, Any]]:
    """The entries of an evaluation's JSON, each fit for a card.

    Args:
        results (`dict`): the JSON. Its key `results` holds a list, each entry with the fields of `RESULT_FIELDS`
            (`value` from 0 to 1) and, if known, `config`, `revision`, `standard_error`, `chance`,
            `parse_failure_rate` and `decode_failure_rate`.
        name (`str`): of the file, for errors.

    Raises:
        ValueError: if an entry lacks a field, for a number without its circumstances says nothing.
    """
    entries = results.get("results") if isinstance(results, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name} has no list `results`, expected a JSON file that `python -m evaluation` wrote.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: result {number} is {entry!r}, expected an object.")
        wrong = [one for one, kind in RESULT_FIELDS.items() if not isinstance(entry.get(one), kind)]
        if wrong or not 0 <= entry["value"] <= 1 or entry["num_rows"] < 1:
            raise ValueError(
                f"{name}: result {number} ({entry.get('benchmark')!r}) has no usable {', '.join(wrong) or 'value'}, "
                f"expected {', '.join(RESULT_FIELDS)}, with a value from 0 to 1 over at least one row."
            )
    return entries


def render_model_card(
    repo_id: str,
    training: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> str:
    """The README.md of a checkpoint.

    Args:
        repo_id (`str`): its name on the Hub, or its folder's.
        training (`Mapping`): the checkpoint's `training.json`: what was trained, on what, its last logged metrics,
            and the same of `earlier` runs; may be empty.
        results (`Sequence[Mapping]`): what the evaluation measured, see `check_results`.
        license (`str`, *optional*): of the weights.
    """
    runs = [
        {
            **run,
            "base_model": run.get("base_model") and public_name(run["base_model"]),
            "datasets": [public_name(name) for name in run.get("datasets", ())],
        }
        for run in _runs(training)
    ]
    stage = runs[-1]["stage"] if runs else None
    names = {name for run in runs for name in run["datasets"]}
    card_license = license if license is None or license in HUB_LICENSES else "other"
    data = ModelCardData(
        base_model=hub_base(training),
        datasets=sorted(name for name in names if not is_local(name)) or None,
        license=card_license,
        license_name=license if card_license == "other" and license != "other" else None,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["storms", "latent-reasoning", "video", "custom_code", "trl", *([stage] if stage else [])],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=[_eval_result(one) for one in results] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md.jinja"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        runs=runs,
        stage=stage,
        stages=STAGES,
        results=results,
        citation=CITATION,
    )
    return str(card)


def _runs(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All runs that led to a checkpoint, first to last."""
    return [*training.get("earlier", ()), training] if training else []


def hub_base(training: Mapping[str, Any]) -> str | None:
    """The nearest model on the Hub that a checkpoint was made from."""
    bases = [run.get("base_model") for run in _runs(training)]
    return next((base for base in reversed(bases) if base and not is_local(base)), None)


def _eval_result(result: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="video-text-to-text",
        dataset_type=public_name(result["dataset"]),
        dataset_name=result["benchmark"],
        dataset_config=result.get("config"),
        dataset_split=result["split"],
        dataset_revision=result.get("revision"),
        metric_type=result["metric"],
        metric_value=round(result["value"], 4),
        metric_args={name: result[name] for name in ("protocol", "prompt", "latent_mode", "num_rows")},
    )


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
