"""Write the accepted rows as a dataset folder: Parquet with embedded media, a card, the ledger. And push it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from tqdm.auto import tqdm

from model_card.push import HubError, explain, upload, write_whole
from model_card.render import render_dataset_card
from modeling_storms.video_storms import VideoDecodeError, decode_video

from .pipeline import Outcome
from .schema import FEATURES, SPLITS, SchemaError, check_row
from .sources.questions import file_stat
from .stages import Stage
from .staging import MEDIA_COLUMNS, Staging, StagingError


# Licences under which a source's clip may be passed on.
OPEN_LICENSES = frozenset(
    (
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "pddl", "odc-by", "odbl", "public-domain"),
        *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    )
)
PUBLISHED = ("README.md", "ledger.json", "data/*.parquet")


def publish(
    staging: Staging,
    outcomes: Sequence[Outcome],
    stages: Sequence[Stage],
    ledger: dict[str, Any],
    video_root: str | None = None,
    embed_video: bool = False,
    max_shard_bytes: int = 500_000_000,
) -> Path:
    """Write `data/{split}-00000-of-0000N.parquet`, `ledger.json` and `README.md`, all or nothing.

    The same rows and settings give the same bytes.

    Args:
        staging (`Staging`): holds the rows' media; the folder is its parent.
        outcomes, stages, ledger: see `pipeline`.
        video_root (`str`, *optional*), embed_video (`bool`): embed real source clips from there whose licence is in
            `OPEN_LICENSES`. Simulated ones always are.
        max_shard_bytes (`int`): media in one file, about.

    Returns:
        The folder, which `load_dataset(folder)` loads. Without an accepted row only the ledger is written, and the
        data of an earlier build stay as they are.

    Raises:
        SchemaError: if a row breaks the contract: nothing is published then.
    """
    accepted = [one for one in outcomes if one.rejection is None]
    output = staging.folder.parent
    new = staging.folder / "tmp" / "publish"
    shutil.rmtree(new, ignore_errors=True)
    (new / "data").mkdir(parents=True)
    sizes = {}
    for split in SPLITS:
        rows = [one for one in accepted if one.columns["split"] == split]
        shards = _shards(rows, max_shard_bytes, embed_video)
        for index, shard in enumerate(shards):
            path = new / "data" / f"{split}-{index:05d}-of-{len(shards):05d}.parquet"
            _write_parquet(path, _published_rows(staging, shard, stages, video_root, embed_video))
        if rows:
            sizes[split] = {
                "num_examples": len(rows),
                "num_bytes": sum(_media_bytes(row, embed_video) for row in rows),
            }
    (new / "ledger.json").write_text(json.dumps(ledger, indent=2) + "\n")
    if accepted:
        files = sorted((new / "data").iterdir())
        content_hash = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                content_hash.update(hashlib.file_digest(file, "sha256").digest())
        download_size = sum(path.stat().st_size for path in files)
        card = render_dataset_card(ledger, FEATURES, sizes, download_size, content_hash.hexdigest())
        (new / "README.md").write_text(card, encoding="utf-8")
        _replace(new, output, staging.folder / "tmp" / "replaced")
    else:
        os.replace(new / "ledger.json", output / "ledger.json")
    return output


def _replace(new: Path, output: Path, old: Path) -> None:
    """Move a published folder's parts into place; a kill in between is repaired by the next run, which repeats it."""
    shutil.rmtree(old, ignore_errors=True)
    (output / "README.md").unlink(missing_ok=True)  # it names the data files: without it nothing loads half a dataset
    if (output / "data").exists():
        os.replace(output / "data", old)
    for name in ("data", "ledger.json", "README.md"):
        os.replace(new / name, output / name)
    shutil.rmtree(old, ignore_errors=True)
    new.rmdir()


def _is_embedded(columns: Mapping[str, Any], embed_video: bool) -> bool:
    """Whether a real source clip goes into the row."""
    return embed_video and columns["video"] is None and columns["license"] in OPEN_LICENSES


def _media_bytes(outcome: Outcome, embed_video: bool) -> int:
    embedded = int(outcome.columns["video_stat"].split("-")[0]) if _is_embedded(outcome.columns, embed_video) else 0
    values = [outcome.columns[name] for name in MEDIA_COLUMNS if outcome.columns[name] is not None]
    return embedded + sum(one["size"] for value in values for one in (value if isinstance(value, list) else [value]))


def _shards(rows: Sequence[Outcome], max_bytes: int, embed_video: bool) -> list[list[Outcome]]:
    shards: list[list[Outcome]] = []
    filled = max_bytes
    for row in rows:
        if filled >= max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += _media_bytes(row, embed_video)
    return shards


def _published_rows(
    staging: Staging, outcomes: Sequence[Outcome], stages: Sequence[Stage], video_root: str | None, embed_video: bool
) -> Iterator[dict[str, Any]]:
    settings = {stage.name: stage.settings() for stage in stages if stage.name != "quality"}
    for one in tqdm(outcomes, desc="publish", unit="row", disable=None):
        columns = dict(one.columns)
        made_by = {
            name: {**own, **{key: value for key, value in one.details[name].items() if key != "usage"}}
            for name, own in settings.items()
        }
        columns["generator"] = json.dumps(made_by, sort_keys=True)
        columns["quality"] = json.dumps(one.scores, sort_keys=True)
        row = staging.load({name: columns[name] for name in FEATURES})
        if _is_embedded(row, embed_video):
            root = Path(video_root or ".")
            if file_stat(root, row["video_path"]) != columns["video_stat"]:
                raise StagingError(f"{row['video_path']} changed since its row was built: build again.")
            row["video"] = {"bytes": (root / row["video_path"]).read_bytes(), "path": None}
        check_row(row)
        yield row


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], rows_in_group: int = 32) -> None:
    """Small row groups, of 64 MB at most: a reader that streams fetches one at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = FEATURES.arrow_schema
    with pq.ParquetWriter(path, schema, use_content_defined_chunking=True, write_page_index=True) as writer:
        group: list[dict[str, Any]] = []
        num_bytes = 0
        for row in rows:
            group.append(FEATURES.encode_example(row))
            num_bytes += sum(len(row[name]["bytes"]) for name in ("video", "thought_video") if row[name] is not None)
            if len(group) == rows_in_group or num_bytes > 64_000_000:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, num_bytes = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def check_login() -> None:
    """Ask the Hub who we are.

    Raises:
        HubError: if it can't be reached, or knows no such token.
    """
    try:
        HfApi().whoami()
    except Exception as error:
        raise HubError(f"The Hub does not let us in: {explain(error)[0]}") from error


def push(output: Path, repo_id: str, private: bool = False) -> str:
    """Push a published folder in one commit; data files of an earlier version are deleted with it.

    Args:
        output (`Path`): the folder.
        repo_id (`str`): dataset on the Hub, `name` or `organization/name`, made if missing.
        private (`bool`): whether a new one is private.

    Returns:
        The commit's address.

    Raises:
        ValueError: if the folder has not been published.
        HubError: if the Hub refuses it or can't be reached. The folder stays as it is.
    """
    if not (output / "README.md").is_file():
        raise ValueError(f"{output} is not published yet: run `python -m dataset_builder publish --output {output}`.")
    again = f"To push it again, run `python -m dataset_builder publish --output {output} --push_to_hub {repo_id}`."
    try:
        repo_id = HfApi().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    except Exception as error:
        raise HubError(f"Can't make {repo_id} on the Hub: {explain(error)[0]} {again}") from error
    card = (output / "README.md").read_text(encoding="utf-8")
    write_whole(output / "README.md", card.replace('"path/or/name"', f'"{repo_id}"'))
    return upload(
        output,
        repo_id,
        "Publish dataset",
        again,
        repo_type="dataset",
        patterns=PUBLISHED,
        ignored=(),
        delete_patterns=["data/*.parquet"],
    ).commit_url


def check_published(folder: Path) -> tuple[int, list[str]]:
    """Read a published folder as a stranger would: every row meets the contract, every thought video decodes.

    Returns:
        The number of rows, and what is wrong with which.

    Raises:
        ValueError: if there are no data files.
    """
    import pyarrow.parquet as pq

    files = sorted((folder / "data").glob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no data/*.parquet: build or publish it first.")
    faults: list[str] = []
    seen: set[str] = set()
    num_rows = 0
    for path in tqdm(files, desc="check", unit="file", disable=None):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                num_rows += 1
                try:
                    check_row(row)
                    if row["id"] in seen:
                        raise SchemaError(f"Row {row['id']!r} occurs twice, expected each id once.")
                    frames, metadata = decode_video(row["thought_video"]["bytes"])
                    decoded = (len(frames), metadata.fps)
                    recorded = (row["thought_video_num_frames"], row["thought_video_fps"])
                    if decoded[0] != recorded[0] or abs(decoded[1] / recorded[1] - 1) > 0.01:
                        raise SchemaError(f"Row {row['id']!r}: decoded {decoded} frames and fps, recorded {recorded}.")
                except (SchemaError, VideoDecodeError) as error:
                    faults.append(f"{path.name}: {error}")
                seen.add(row.get("id"))
    return num_rows, faults
