"""A build: the source's rows through the stages, and what became of each."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .engines import ENGINES
from .schema import SPLITS
from .sources.questions import Refused
from .stages import Stage
from .staging import Staging, StagingError
from .validate import find_near_duplicates


USAGE = ("calls", "input_tokens", "output_tokens")


@dataclass
class Outcome:
    """What became of one row: its columns (media as references) or why it was refused."""

    id: str
    columns: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage
    rejection: dict[str, Any] | None = None

    @property
    def scores(self) -> dict[str, float]:
        return self.details.get("quality", {}).get("scores", {})

    @property
    def is_undecodable(self) -> bool:
        return self.rejection is not None and self.rejection["reason"] == "thought_video_undecodable"


def run(
    staging: Staging,
    stages: Sequence[Stage],
    rows: Sequence[dict[str, Any]],
    refused: Sequence[Refused],
    target: int,
    engine: str = "local",
    num_workers: int | None = None,
    retry_rejected: bool = False,
    max_duplicate_distance: float | None = None,
) -> None:
    """Take rows through stages until `target` have passed or there are no more, and write down which were taken.

    A row that is refused for good is replaced by the source's next one; one that may pass another time is not, so that
    a server that is down does not use up the source.

    Args:
        staging (`Staging`): where results are and go.
        stages (`Sequence[Stage]`): the first ones, in order.
        rows, refused: what the source listed.
        target (`int`): rows wanted.
        engine (`str`): a key of `ENGINES`.
        num_workers (`int`, *optional*): see `run_local`.
        retry_rejected (`bool`): try again the rows that were refused for a passing reason or by the teacher.
        max_duplicate_distance (`float`, *optional*): see `collect`.
    """
    taken = min(target, len(rows))
    if retry_rejected:
        for row in rows:
            staging.forget_rejection(row, stages)
    while True:
        _write_rows(staging, rows[:taken], refused)
        pending = [row for row in rows[:taken] if staging.progress(row, stages).missing is not None]
        if pending:
            texts = [json.dumps(row, sort_keys=True) for row in pending]
            ENGINES[engine](str(staging.folder.parent), stages, texts, num_workers)
        outcomes = collect(staging, stages, rows[:taken], (), max_duplicate_distance)
        replaced = sum(one.rejection is not None and not one.rejection["transient"] for one in outcomes)
        wanted = min(len(rows), target + replaced)
        if wanted <= taken:
            return
        taken = wanted


def _write_rows(staging: Staging, rows: Sequence[dict[str, Any]], refused: Sequence[Refused]) -> None:
    lines = [*({"row": row} for row in rows), *({"refused": vars(one)} for one in refused)]
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    staging.write_atomically(staging.folder / "rows.jsonl", text.encode())


def read_rows(staging: Staging) -> tuple[list[dict[str, Any]], list[Refused]]:
    """The rows that the last `run` took, and those the source refused.

    Raises:
        StagingError: if there was none.
    """
    path = staging.folder / "rows.jsonl"
    if not path.is_file():
        raise StagingError(f"{staging.folder.parent} holds no build yet: run `python -m dataset_builder build` first.")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [line["row"] for line in lines if "row" in line]
    return rows, [Refused(**line["refused"]) for line in lines if "refused" in line]


def collect(
    staging: Staging,
    stages: Sequence[Stage],
    rows: Iterable[dict[str, Any]],
    refused: Iterable[Refused],
    max_duplicate_distance: float | None = None,
) -> list[Outcome]:
    """What became of every row, in the source's order, refused ones last.

    Args:
        max_duplicate_distance (`float`, *optional*): refuse a row whose thought video is this near to an earlier row's
            with the same question; only where the stages include the one that makes signatures.

    Raises:
        StagingError: if a row has not been through all stages.
    """
    outcomes = []
    for row in rows:
        progress = staging.progress(row, stages)
        if progress.missing is not None:
            raise StagingError(
                f"Row {row['id']!r} has no result of stage {progress.missing!r} with these settings: "
                "run `python -m dataset_builder build` with them first."
            )
        outcomes.append(Outcome(row["id"], progress.columns, progress.details, progress.rejection))
    if max_duplicate_distance is not None:
        passed = [one for one in outcomes if one.rejection is None]
        keys = [(one.id, json.dumps([one.columns["question"], one.columns["options"]])) for one in passed]
        signatures = [(*key, one.columns["signature"]) for key, one in zip(keys, passed)]
        repeats = find_near_duplicates(signatures, max_duplicate_distance)
        for one in passed:
            if one.id in repeats:
                detail = f"its question and thought video repeat row {repeats[one.id]!r}"
                one.rejection = _rejection("quality", "near_duplicate", detail)
    outcomes += [Outcome(one.id, rejection=_rejection("source", one.reason, one.detail)) for one in refused]
    return outcomes


def _rejection(stage: str, reason: str, detail: str) -> dict[str, Any]:
    return {"stage": stage, "reason": reason, "detail": detail, "transient": False}


def make_ledger(
    outcomes: Sequence[Outcome],
    stages: Sequence[Stage],
    source: Mapping[str, Any],
    input_price: float,
    output_price: float,
) -> dict[str, Any]:
    """Counts, every refused row with its reason and scores, and what the teacher cost.

    Holds nothing that changes from run to run: no times, no machine.

    Args:
        source (`Mapping`): what the source was asked for, without paths.
        input_price, output_price (`float`): US dollars per million tokens.
    """
    accepted = [one for one in outcomes if one.rejection is None]
    rejected = [(one, one.rejection) for one in outcomes if one.rejection is not None]
    usage = Counter(dict.fromkeys(USAGE, 0))
    for outcome in outcomes:
        for details in outcome.details.values():
            usage.update(details.get("usage", {}))
    cost = (usage["input_tokens"] * input_price + usage["output_tokens"] * output_price) / 1e6
    return {
        "storms_version": _version(),
        "accepted": len(accepted),
        "rejected": len(rejected),
        "splits": {split: count for split in SPLITS if (count := sum(o.columns["split"] == split for o in accepted))},
        "reasons": dict(sorted(Counter(rejection["reason"] for _, rejection in rejected).items())),
        "licenses": _count(accepted, "source", "license"),
        "answers": _count(accepted, "problem_type", "answer", only="multiple choice"),
        "usage": {**usage, "cost_usd": round(cost, 4)},
        "source": dict(source),
        "stages": {stage.name: stage.settings() for stage in stages},
        "scores": _summary([one.scores for one in accepted]),
        "rejected_rows": [
            {"id": one.id, **{name: rejection[name] for name in ("stage", "reason", "detail")}, "scores": one.scores}
            for one, rejection in rejected
        ],
    }


def _version() -> str:
    try:
        return version("storms")
    except PackageNotFoundError:
        return "not installed"


def _count(outcomes: Sequence[Outcome], first: str, second: str, only: str | None = None) -> dict[str, dict[str, int]]:
    pairs = Counter(
        (one.columns[first], one.columns[second]) for one in outcomes if only in (None, one.columns[first])
    )
    return {key: {b: n for (a, b), n in sorted(pairs.items()) if a == key} for key in sorted({a for a, _ in pairs})}


def _summary(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Lowest, median and highest of each score."""
    names = sorted({name for one in scores for name in one})
    columns = {name: sorted(one[name] for one in scores if name in one) for name in names}
    return {
        name: {"min": round(column[0], 4), "median": round(column[len(column) // 2], 4), "max": round(column[-1], 4)}
        for name, column in columns.items()
    }


def ledger_line(ledger: dict[str, Any]) -> str:
    """`accepted=912 rejected=88 (no_motion=51, bad_json=37)`, and what the teacher used."""
    reasons = ", ".join(f"{reason}={count}" for reason, count in ledger["reasons"].items())
    line = f"accepted={ledger['accepted']} rejected={ledger['rejected']}" + (f" ({reasons})" if reasons else "")
    usage = ledger["usage"]
    if usage["calls"]:
        line += f" calls={usage['calls']} tokens={usage['input_tokens']}+{usage['output_tokens']}"
        line += f" cost=${usage['cost_usd']:.2f}"
    return line
