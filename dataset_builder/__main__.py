"""Build thought-video datasets.

    python -m dataset_builder build --source simulated --world shell_game --num_rows 48 --seed 7 --output DIR
    python -m dataset_builder build --source local_folder --video_root VIDEOS --output DIR --push_to_hub ORG/NAME
    python -m dataset_builder build --config dataset_builder/configs/storms_5k.yaml --output DIR

Commands:
    build           everything below, in order
    keyframes       list the source, check its videos, let the teacher choose keyframes
    plans           ... and write reasoning plans
    thought-videos  ... and make the thought videos
    validate        ... and score and filter them; check a published folder, also one without .staging
    report          write report.html: rows as pictures
    publish         write Parquet, card and ledger; push them with --push_to_hub

Afterwards load_dataset(DIR) works. A killed or repeated command continues: finished rows are kept in DIR/.staging, and
a changed option or prompt redoes only the stages it touches. All but `build` take the options that the folder's last
command was given, unless told a --source or --config. `python -m dataset_builder build --help` lists all options; a
YAML file given by --config may hold any of them, and flags override it.
"""

import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm
from trl import TrlParser

from .arguments import FilterArguments, RunArguments, SourceArguments, TeacherArguments, ThoughtVideoArguments
from .pipeline import collect, ledger_line, make_ledger, read_rows, run
from .publish import check_login, check_published, publish, push
from .report import write_report
from .schema import SchemaError
from .sources import local_folder, video_r1
from .sources.questions import Refused, draw, excluded_videos, open_root
from .sources.simulated import list_rows as list_simulated
from .sources.worlds import WORLDS
from .stages import KeyframeStage, PlanStage, QualityStage, Stage, ThoughtVideoStage, VideoStage
from .staging import Staging, StagingError
from .teacher import LocalTeacher, OpenAITeacher, Teacher, TeacherSetupError
from .thought_video import SimulatedGenerator, SourceClipGenerator, ThoughtVideoGenerator, WanGenerator
from .validate import TowerSimilarity


# Each command and how many of the stages it runs.
COMMANDS = {"build": 5, "keyframes": 2, "plans": 3, "thought-videos": 4, "validate": 5, "report": 5, "publish": 5}
ONCE = ("output", "push_to_hub", "private", "retry_rejected")  # options that a folder does not remember

# What a user can do something about, told without a traceback.
EXPECTED = (
    *(ValueError, OSError, ImportError, EOFError, StagingError, TeacherSetupError),
    *(zipfile.BadZipFile, tarfile.TarError),
)

Arguments = tuple[SourceArguments, TeacherArguments, ThoughtVideoArguments, FilterArguments, RunArguments]


def parse(command: str, argv: Sequence[str]) -> Arguments:
    parts: Any = [SourceArguments, TeacherArguments, ThoughtVideoArguments, FilterArguments, RunArguments]
    parser = TrlParser(
        parts,
        prog=f"python -m dataset_builder {command}",
        description="Flags may also stand in a YAML file, given by --config.",
    )
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    output = next((value for flag, value in pairwise(argv) if flag == "--output"), None)
    if command != "build" and output is not None and not {"--source", "--config"} & set(argv):
        manifest = Staging(output).manifest
        if manifest.is_file():
            parser.set_defaults_with_config(**json.loads(manifest.read_text())["arguments"])
    return cast(Arguments, parser.parse_args_and_config(argv))


def list_source(source: SourceArguments, staging: Staging) -> tuple[list[dict[str, Any]], list[Refused], str]:
    """The source's rows in order, what it refused, and the folder of its videos."""
    if source.source == "simulated":
        assert source.num_rows is not None
        dials: dict[str, dict[str, Any]] = {}
        for text in source.dials:
            try:
                name, value = text.split("=")
                world, dial = name.split(".")
                dials.setdefault(world, {})[dial] = json.loads(value)
            except ValueError as error:
                raise ValueError(
                    f"--dials {text!r}: expected world.dial=value, as in shell_game.num_cups=4."
                ) from error
        worlds = list(WORLDS) if source.world == ["all"] else source.world
        simulated = list_simulated(
            worlds, source.num_rows, source.seed, source.fractions, dials, source.shuffle_options
        )
        return list(simulated), [], "."
    assert source.video_root is not None
    assert source.questions is not None
    lines = Path(source.exclude_videos).read_text(encoding="utf-8-sig").splitlines() if source.exclude_videos else []
    root, refused = open_root(Path(source.video_root), staging.folder / "unpacked")
    module = local_folder if source.source == "local_folder" else video_r1
    rows = []
    listed = module.list_rows(
        Path(source.questions), root, source.license, source.seed, source.fractions, excluded_videos(lines)
    )
    for row in tqdm(listed, desc="source", unit=" rows", disable=None):
        if isinstance(row, Refused):
            refused.append(row)
        else:
            rows.append(row)
    return draw(rows, source.seed) if source.num_rows is not None else rows, refused, str(root)


def make_stages(
    source: SourceArguments,
    teacher: TeacherArguments,
    thought_video: ThoughtVideoArguments,
    filters: FilterArguments,
    video_root: str,
) -> list[Stage]:
    """All stages in order, as the arguments ask."""
    asked: Teacher = LocalTeacher()
    concurrency = 1
    if teacher.teacher == "openai":
        concurrency = teacher.concurrency
        asked = OpenAITeacher(
            teacher.model,
            teacher.base_url,
            teacher.api_key_env,
            teacher.timeout,
            teacher.max_retries,
            teacher.max_image_side,
            teacher.temperature,
            teacher.teacher_seed,
        )
    generator: ThoughtVideoGenerator
    match thought_video.generator or ("simulated" if source.source == "simulated" else "source_clip"):
        case "simulated":
            if source.source != "simulated":
                raise ValueError("--generator simulated needs --source simulated: real videos have no exact one.")
            generator = SimulatedGenerator()
        case "source_clip":
            generator = SourceClipGenerator(
                video_root,
                max_frames=thought_video.clip_max_frames,
                margin_seconds=thought_video.clip_margin_seconds,
                max_side=thought_video.clip_max_side,
            )
        case _:
            options = {k.removeprefix("wan_"): v for k, v in asdict(thought_video).items() if k.startswith("wan_")}
            generator = WanGenerator(**{name: value for name, value in options.items() if value is not None})
    tower = TowerSimilarity(filters.tower, filters.tower_revision) if filters.tower else None
    return [
        VideoStage(video_root, source.max_video_seconds),
        KeyframeStage(
            asked, video_root, teacher.num_candidates, teacher.max_keyframes, teacher.max_attempts, concurrency
        ),
        PlanStage(asked, teacher.max_attempts, concurrency),
        ThoughtVideoStage(generator),
        QualityStage(filters, tower),
    ]


def execute(command: str, arguments: Arguments) -> None:
    source, teacher, thought_video, filters, options = arguments
    staging = Staging(source.output)
    output = Path(source.output)
    if command == "validate" and not staging.folder.exists() and (output / "data").exists():
        return _report_check(output)
    if options.push_to_hub and command in ("build", "publish"):
        check_login()  # a wrong token shows now, not after hours
    with staging.lock():
        if command in ("report", "publish"):
            rows, refused = read_rows(staging)
            public = json.loads(staging.manifest.read_text())["source"]
            video_root = source.video_root or "."
            if source.video_root is not None and options.embed_video:  # otherwise the source itself is not needed
                video_root = str(open_root(Path(video_root), staging.folder / "unpacked")[0])
        else:
            rows, refused, video_root = list_source(source, staging)
            public = source.public
        stages = make_stages(source, teacher, thought_video, filters, video_root)[: COMMANDS[command]]
        distance = filters.max_duplicate_distance if len(stages) == COMMANDS["build"] else None
        if command not in ("report", "publish"):
            _write_manifest(staging, arguments, stages)
            print(f"Source    {source.source}: {len(rows)} rows, {len(refused)} refused")
            run(
                staging,
                stages,
                rows,
                refused,
                source.num_rows or len(rows),
                options.engine,
                options.num_workers,
                options.retry_rejected,
                distance,
            )
            rows, refused = read_rows(staging)
        outcomes = collect(staging, stages, rows, refused, distance)
        ledger = make_ledger(outcomes, stages, public, teacher.input_price, teacher.output_price)
        if command in ("build", "publish"):
            max_shard_bytes = options.max_shard_mb * 1_000_000
            publish(staging, outcomes, stages, ledger, video_root, options.embed_video, max_shard_bytes)
            counts = ", ".join(f"{count} {split}" for split, count in ledger["splits"].items())
            print(f"Dataset   {output}: {counts or 'no rows'}")
        if command in ("build", "report"):
            print(f"Report    {write_report(staging, outcomes, ledger, options.max_report_rows)}")
        if command == "validate" and (output / "data").is_dir():
            _report_check(output)
        print(f"Ledger    {ledger_line(ledger)}")
        if not ledger["accepted"]:
            raise ValueError(
                "No row passed: ledger.json has each one's reason. Data of an earlier build are as they were."
                if outcomes
                else "The source holds no rows."
            )
        if options.push_to_hub and command in ("build", "publish"):
            print(f"Pushed    {push(output, options.push_to_hub, options.private)}")


def _write_manifest(staging: Staging, arguments: Arguments, stages: Sequence[Stage]) -> None:
    remembered = {name: value for part in arguments for name, value in asdict(part).items() if name not in ONCE}
    manifest = {
        "arguments": remembered,
        "source": arguments[0].public,
        "stages": {stage.name: stage.settings() for stage in stages},
    }
    staging.write_atomically(staging.manifest, json.dumps(manifest, indent=2).encode())


def _report_check(output: Path) -> None:
    num_rows, faults = check_published(output)
    print(f"Checked   {num_rows} published rows: {len(faults)} break the contract")
    for fault in faults[:20]:
        print(f"          {fault}")
    if faults:
        raise SchemaError("The published rows are not what the contract says. Publish again.")


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, *flags = argv
    if command not in COMMANDS:
        raise SystemExit(f"Unknown command {command!r}. Known: {', '.join(COMMANDS)}.")
    try:
        execute(command, parse(command, flags))
    except KeyboardInterrupt:
        print("\nInterrupted. Finished rows are kept: the same command goes on.", file=sys.stderr, flush=True)
        os._exit(130)  # now: requests in flight would be waited for
    except EXPECTED as error:
        notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        raise SystemExit(f"{type(error).__name__}: {error}{notes}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
