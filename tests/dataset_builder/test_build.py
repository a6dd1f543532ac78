"""Builds from end to end: what is published, what is redone, and what survives being killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from dataset_builder import __main__ as cli
from dataset_builder.schema import FEATURES
from dataset_builder.thought_video import encode_video
from modeling_storms import decode_video

from ..conftest import moving_disc
from .conftest import published, staged, start


STRANGER = """
import sys
for package in ("dataset_builder", "modeling_storms", "model_card", "recipes"):
    sys.modules[package] = None
from datasets import Image, List, Video, load_dataset
columns = sys.argv[2].split(",")
rows = 0
for streaming in (False, True):
    splits = load_dataset(sys.argv[1], streaming=streaming)
    assert list(splits) == ["train", "validation", "test"], splits
    for split in splits.values():
        assert list(split.features) == columns, split.features
        assert split.features["thought_video"] == Video(decode=False), split.features
        assert split.features["keyframes"] == List(Image()), split.features
        for row in split:
            rows += 1
            assert all(row[column] is not None for column in columns if not column.startswith("video_")), row
            assert len(row["keyframes"]) == len(row["keyframe_indices"]) == len(row["keyframe_timestamps"])
            assert row["keyframes"][0].size == (168, 112)
            assert row["options"]["ABC".index(row["answer"])]
            import io, decord
            video = decord.VideoReader(io.BytesIO(row["thought_video"]["bytes"]))
            assert len(video) == row["thought_video_num_frames"], (len(video), row["thought_video_num_frames"])
            assert abs(video.get_avg_fps() - row["thought_video_fps"]) < 0.01
print(rows)
"""
SHELL_GAME = ("--source", "simulated", "--world", "shell_game")


def test_64_rows_take_less_than_a_minute_and_load_without_this_package(tmp_path):
    begin = time.monotonic()
    process = start("build", *SHELL_GAME, "--num_rows", 64, "--seed", 7, "--output", tmp_path / "out")
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert time.monotonic() - begin < 60
    assert "accepted=64 rejected=0" in printed
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"README.md", "data", "ledger.json", "report.html", ".staging"}
    assert {path.name for path in (tmp_path / "out" / "data").iterdir()} == {
        f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")
    }
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "out"), ",".join(FEATURES)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "128"


def test_the_same_command_gives_the_same_bytes_with_any_number_of_processes(build, tmp_path):
    flags = ("--world", "all", "--num_rows", 10, "--seed", 3)
    build("build", *flags, "--num_workers", 1, output="one")
    build("build", *flags, "--num_workers", 2, output="two")
    build("build", *flags, output="one")  # and again
    assert published(tmp_path / "one") == published(tmp_path / "two")
    build("build", *flags, "--seed", 4, output="other")
    assert published(tmp_path / "one").keys() == published(tmp_path / "other").keys()
    assert published(tmp_path / "one") != published(tmp_path / "other")


def test_a_simulated_row_is_what_its_scene_says(build, tmp_path):
    build("build", "--world", "bounce", "--num_rows", 2, "--test_fraction", 0, "--validation_fraction", 0)
    for row in load_dataset(str(tmp_path / "out"), split="train"):
        clip, _ = decode_video(row["video"]["bytes"])
        thought, _ = decode_video(row["thought_video"]["bytes"])
        # The thought video goes on where the clip ends; keyframes are frames of the clip.
        assert np.abs(clip[-1].astype(int) - thought[0]).mean() < 2
        for keyframe, index in zip(row["keyframes"], row["keyframe_indices"]):
            assert np.abs(np.asarray(keyframe).astype(int) - clip[index]).mean() < 2
        assert row["keyframe_timestamps"] == pytest.approx([index / 12 for index in row["keyframe_indices"]], abs=1e-3)


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path):
    flags = [*SHELL_GAME, "--num_rows", 200, "--seed", 5]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start("build", *flags, "--output", undisturbed)
    begin = None
    for line in process.stdout:
        begin = begin or (time.monotonic() if line.startswith("Source") else None)
    assert process.wait() == 0
    working = time.monotonic() - begin
    generator = random.Random(0)
    kills = 0
    for attempt in range(60):
        process = start("build", *flags, "--output", killed)
        if kills < 20:
            for line in process.stdout:
                if line.startswith("Source"):
                    break
            # Twenty of these together are about as long as the whole build, so that they fall all over it.
            time.sleep(generator.uniform(0, working / 10))
            if process.poll() is None:
                # By turns the process alone, whose workers live on for a moment, and all of them.
                os.kill(process.pid, signal.SIGKILL) if attempt % 2 else os.killpg(process.pid, signal.SIGKILL)
                process.stdout.close()
                assert process.wait() == -signal.SIGKILL
                kills += 1
                continue
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        if kills == 20:
            break
        # It was done before it could be killed: kill it while it publishes next time.
        shutil.rmtree(killed / "data", ignore_errors=True)
    assert kills == 20
    assert published(killed) == published(undisturbed)
    assert not list((killed / ".staging" / "tmp").glob("*"))
    assert staged(killed) == staged(undisturbed)


def test_a_killed_build_redoes_only_rows_in_flight(tmp_path):
    flags = [*SHELL_GAME, "--num_rows", 60, "--num_workers", 2, "--output", tmp_path / "out"]
    process = start("build", *flags)
    videos = tmp_path / "out" / ".staging" / "videos"
    while len(list(videos.glob("*.json"))) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in videos.glob("*.json")}
    assert 10 <= len(before) < 60
    process = start("build", *flags)
    assert process.wait() == 0, process.communicate()
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert len(list(videos.glob("*.json"))) == 60


def test_the_workers_of_a_killed_build_end_too(tmp_path):
    process = start("build", *SHELL_GAME, "--num_rows", 60, "--num_workers", 2, "--output", tmp_path / "out")
    while not list((tmp_path / "out" / ".staging" / "videos").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # it alone
    process.wait()
    process.stdout.close()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return  # nobody is left in its group
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("workers live on")


def test_two_builds_cannot_write_to_one_folder(tmp_path):
    first = start("build", *SHELL_GAME, "--num_rows", 200, "--output", tmp_path / "out")
    for line in first.stdout:
        if line.startswith("Source"):
            break
    second = start("build", *SHELL_GAME, "--num_rows", 200, "--output", tmp_path / "out")
    assert "Another build is writing to" in second.communicate()[0]
    assert second.returncode != 0
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()


def test_a_changed_option_redoes_the_stages_it_touches_and_no_other(build, tmp_path, disc_videos):
    flags = ("--source", "local_folder", "--video_root", disc_videos)
    build("build", *flags)
    before = staged(tmp_path / "out")
    assert all(len(names) == 6 for names in before.values())

    def redone(*changes):
        build("build", *flags, *changes)
        after = staged(tmp_path / "out")
        return {stage for stage in before if after[stage] != before[stage]}

    assert redone("--clip_margin_seconds", 0.5) == {"thought_videos", "quality"}
    before = staged(tmp_path / "out")
    assert redone("--clip_margin_seconds", 0.5, "--max_brightness", 0.97) == {"quality"}
    before = staged(tmp_path / "out")
    assert redone("--embed_video", True, "--license", "mit") == set()
    assert redone("--max_keyframes", 2) == {"keyframes", "plans", "thought_videos", "quality"}
    before = staged(tmp_path / "out")
    assert redone() == set()  # and back, for nothing


def test_a_build_without_a_good_row_has_its_ledger_and_keeps_the_data_of_before(build, tmp_path, disc_videos):
    flags = ("--source", "local_folder", "--video_root", disc_videos)
    build("build", *flags)
    before = published(tmp_path / "out")
    with pytest.raises(SystemExit, match="No row passed"):
        build("build", *flags, "--min_motion", 0.9)
    data = {
        name: content for name, content in published(tmp_path / "out").items() if not name.endswith(("json", "html"))
    }
    assert data == {name: before[name] for name in data}  # an outage, or a slip, costs no data
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["reasons"] == {"no_motion": 6}
    build("build", *flags)
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 6


def test_a_rebuilt_folder_loads_as_rebuilt(build, tmp_path):
    answers = []
    for seed in (0, 1):
        build(
            "build",
            "--world",
            "order",
            "--num_rows",
            4,
            "--seed",
            seed,
            "--validation_fraction",
            0,
            "--test_fraction",
            0,
        )
        answers.append(load_dataset(str(tmp_path / "out"), split="train")["thought_video"])
    assert answers[0] != answers[1]


def test_a_damaged_record_is_redone(build, tmp_path):
    flags = ("--world", "shell_game", "--num_rows", 3)
    build("build", *flags)
    before = published(tmp_path / "out")
    for path in (tmp_path / "out" / ".staging").rglob("*.json"):
        if path.parent.name in ("keyframes", "plans"):
            path.write_bytes(path.read_bytes()[:20])  # what a crash of the machine may leave
    for path in list((tmp_path / "out" / ".staging" / "media").iterdir())[:2]:
        path.write_bytes(b"")
    build("build", *flags)
    assert published(tmp_path / "out") == before


def test_stages_run_one_by_one_and_remember_their_options(build, tmp_path, disc_videos, capsys):
    build("keyframes", "--source", "local_folder", "--video_root", disc_videos, "--max_keyframes", 2)
    assert {stage: len(names) for stage, names in staged(tmp_path / "out").items()} == {
        **{"videos": 6, "keyframes": 6},
        **{"plans": 0, "thought_videos": 0, "quality": 0},
    }
    with pytest.raises(SystemExit, match="has no result of stage 'plans'"):
        build("publish")
    build("plans")
    build("thought-videos")
    build("validate")
    ledger = build("publish")
    assert ledger["accepted"] == 6
    assert ledger["stages"]["keyframes"]["max_keyframes"] == 2
    build("report")
    assert (tmp_path / "out" / "report.html").is_file()
    build("validate")
    assert "Checked   6 published rows: 0 break the contract" in capsys.readouterr().out
    build("build", "--source", "local_folder", "--video_root", disc_videos, "--max_keyframes", 2, output="at-once")
    assert published(tmp_path / "out") == published(tmp_path / "at-once")


def test_refused_rows_are_replaced_until_there_are_enough(build, tmp_path, videos):
    good = {f"good-{seed}.mp4": encode_video(moving_disc(seed=seed), 12) for seed in range(5)}
    folder = videos({**good, **{f"bad-{n}.mp4": b"not a video" for n in range(15)}})
    ledger = build("build", "--source", "local_folder", "--video_root", folder, "--num_rows", 4)
    assert ledger["accepted"] == 4
    assert set(ledger["reasons"]) == {"undecodable"}
    assert ledger["rejected"] == ledger["reasons"]["undecodable"] > 0
    every = build("build", "--source", "local_folder", "--video_root", folder)
    assert (every["accepted"], every["rejected"]) == (5, 15)


def test_near_duplicates_are_refused_once_each(build, videos):
    frames = moving_disc()
    # The same clip twice, re-encoded the second time, and one with another question about it.
    slightly = np.clip(frames.astype(int) + 1, 0, 255).astype(np.uint8)
    folder = videos({"a.mp4": encode_video(frames, 12), "b.mp4": encode_video(slightly, 12)})
    line = json.loads((folder / "questions.jsonl").read_text().splitlines()[0])
    with (folder / "questions.jsonl").open("a") as file:
        file.write(json.dumps({**line, "id": "c", "question": "What shape is it?"}) + "\n")
    ledger = build("build", "--source", "local_folder", "--video_root", folder)
    assert (ledger["accepted"], ledger["reasons"]) == (2, {"near_duplicate": 1})
    assert ledger["rejected_rows"][0]["id"] == "b"


def test_a_real_clip_is_embedded_only_where_asked_and_allowed(build, tmp_path, videos):
    data = encode_video(moving_disc(), 12)
    for license, embed, embedded in (("mit", False, False), ("mit", True, True), ("unknown", True, False)):
        folder = videos({"a.mp4": data}, license=license)
        build("build", "--source", "local_folder", "--video_root", folder, "--embed_video", embed)
        (row,) = load_dataset(str(tmp_path / "out"), split="train")
        assert (row["video"] is not None) == embedded
        assert row["license"] == license
        if embedded:
            assert row["video"]["bytes"] == data


def test_no_path_of_this_machine_is_published(build, tmp_path, disc_videos):
    (disc_videos / "disc-1.mp4").write_bytes(b"not a video")
    (disc_videos / "disc-2.mp4").write_bytes((disc_videos / "disc-0.mp4").read_bytes()[:900])
    (disc_videos / "disc-3.mp4").unlink()
    ledger = build("build", "--source", "local_folder", "--video_root", disc_videos)
    assert ledger["rejected"] == 3
    for name, data in published(tmp_path / "out").items():
        assert str(tmp_path).encode() not in data, name
        assert str(Path.home()).encode() not in data, name
    (row,) = [row for row in load_dataset(str(tmp_path / "out"), split="train") if row["id"] == "disc-0"]
    assert row["video_path"] == "disc-0.mp4"


@pytest.mark.slow
def test_ray_gives_the_same_bytes_as_processes(tmp_path, disc_videos):
    for flags in (("--world", "all", "--num_rows", 15), ("--source", "local_folder", "--video_root", disc_videos)):
        for engine in ("local", "ray"):
            process = start("build", *flags, "--engine", engine, "--output", tmp_path / engine)
            printed = process.communicate()[0]
            assert process.returncode == 0, printed
        assert published(tmp_path / "local") == published(tmp_path / "ray")
        assert staged(tmp_path / "local") == staged(tmp_path / "ray")
        for engine in ("local", "ray"):
            shutil.rmtree(tmp_path / engine)


def test_validate_finds_what_was_changed_after_publishing(build, tmp_path, capsys):
    build("build", "--world", "shell_game", "--num_rows", 3, "--validation_fraction", 0, "--test_fraction", 0)
    shutil.rmtree(tmp_path / "out" / ".staging")  # as after a download
    build("validate")
    assert "Checked   3 published rows: 0 break the contract" in capsys.readouterr().out
    path = tmp_path / "out" / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["answer"] = "Z"
    rows[2]["thought_video_num_frames"] += 1
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    with pytest.raises(SystemExit, match="SchemaError"):
        build("validate")
    printed = capsys.readouterr().out
    assert "2 break the contract" in printed
    assert "expected one of the letters ABC" in printed
    assert "recorded (" in printed


def test_a_report_shows_rows_as_pictures_and_their_text_as_text(build, tmp_path, disc_videos):
    with (disc_videos / "questions.jsonl").open("a") as file:
        line = {"video": "disc-0.mp4", "question": "<script>alert(1)</script>", "answer": "{{ 7 * 7 }}"}
        file.write(json.dumps(line) + "\n")
        file.write(json.dumps({**line, "id": "lost", "video": "lost.mp4"}) + "\n")
    build("build", "--source", "local_folder", "--video_root", disc_videos)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article>") == 8
    assert page.count('alt="frame of the thought video"') == 70
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "{{ 7 * 7 }}" in page
    assert "refused in videos: video_not_found" in page
    assert "motion 0.0" in page


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--world", "chess"], "chess"),
        (["--source", "webvid"], "expected one of simulated, local_folder, video_r1"),
        (["--source", "local_folder"], "needs --video_root"),
        (["--source", "video_r1", "--video_root", "."], "needs --questions"),
        (["--video_root", "."], "add --source local_folder"),
        (["--num_rows", "0"], "expected 1 or more"),
        (["--validation_fraction", "0.9", "--test_fraction", "0.2"], "1 together at most"),
        (["--dials", "num_cups=4"], "expected world.dial=value"),
        (["--dials", "shell_game.num_cups=1"], "num_cups"),
        (["--generator", "sora"], "expected one of"),
        (["--teacher", "human"], "expected one of"),
        (["--engine", "slurm"], "expected one of"),
        (["--max_keyframes", "0"], "expected 1 or more"),
        (["--generator", "wan", "--wan_num_frames", "80"], "4k \\+ 1"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--push_to_hub", "no name!"], "organization/name"),
        (["--max_shard_mb", "0"], "expected 1 or more"),
    ],
)
def test_options_that_cannot_work_say_what_can(build, tmp_path, flags, expected):
    with pytest.raises(SystemExit, match=expected):
        build("build", *flags)
    assert not (tmp_path / "out" / "README.md").exists()


def test_real_rows_cannot_use_the_simulated_generator(build, disc_videos):
    with pytest.raises(SystemExit, match="needs --source simulated"):
        build("build", "--source", "local_folder", "--video_root", disc_videos, "--generator", "simulated")


def test_an_unknown_key_of_a_config_is_an_error(build, tmp_path):
    (tmp_path / "config.yaml").write_text("source: simulated\nnum_row: 3\n")
    with pytest.raises(SystemExit, match="num_row"):
        build("build", "--config", tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("num_rows: 5.5", "--num_rows: saw 5.5, expected int or null"),
        ("seed: null", "--seed: saw None, expected int"),
        ("max_keyframes: 2.5", "--max_keyframes: saw 2.5, expected int"),
        ("min_motion: [1]", "--min_motion"),
        ("world: {shell_game: 1}", "--world"),
        ("embed_video: 1", "--embed_video: saw 1, expected bool"),
        ("teacher: null", "--teacher"),
    ],
)
def test_a_config_of_wrong_types_is_an_error(build, tmp_path, line, expected):
    (tmp_path / "config.yaml").write_text(line)
    with pytest.raises(SystemExit, match=expected):
        build("build", "--config", tmp_path / "config.yaml")


def test_a_single_world_needs_no_list(build, tmp_path):
    (tmp_path / "config.yaml").write_text("world: order\ndials: order.num_lamps=3\nnum_rows: '2'\nmin_motion: 0\n")
    ledger = build("build", "--config", tmp_path / "config.yaml")
    assert (ledger["accepted"], ledger["source"]["world"]) == (2, ["order"])


def test_a_finished_folder_needs_neither_its_videos_nor_its_place(build, tmp_path, disc_videos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["build", "--source=local_folder", "--video_root=videos", "--output=out", "--license=MIT"])
    before = published(tmp_path / "out")
    assert b"license: mit" in before["README.md"]
    disc_videos.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for command in ("publish", "report", "validate"):
        if command != "validate":
            cli.main(
                [command, f"--output={tmp_path / 'out'}", "--seed", "9"]
            )  # says nothing about rows that are there
    assert published(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="no such folder"):
        cli.main(["plans", f"--output={tmp_path / 'out'}"])  # would have to list the source again
    assert published(tmp_path / "out") == before


def test_flags_override_a_config(build, tmp_path):
    (tmp_path / "config.yaml").write_text("world: [order]\nnum_rows: 5\nvalidation_fraction: 0\ntest_fraction: 0\n")
    ledger = build("build", f"--config={tmp_path / 'config.yaml'}", "--num_rows", 2)
    assert ledger["splits"] == {"train": 2}


@pytest.mark.parametrize("path", sorted((Path(cli.__file__).parent / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_parses_and_says_what_it_takes(path, tmp_path):
    (tmp_path / "questions.json").write_text("[]")
    (tmp_path / "questions.jsonl").write_text("")
    flags = ["--config", str(path), "--output", str(tmp_path)]
    if "source: simulated" not in path.read_text():
        questions = tmp_path / ("questions.json" if "video_r1" in path.read_text() else "questions.jsonl")
        flags += ["--video_root", str(tmp_path), "--questions", str(questions)]
    arguments = cli.parse("build", flags)
    stages = cli.make_stages(*arguments[:4], str(tmp_path))
    assert [stage.name for stage in stages] == ["videos", "keyframes", "plans", "thought_videos", "quality"]
    assert path.read_text().startswith("#")


@pytest.mark.parametrize("arguments", [["--help"], [], ["build", "--help"]])
def test_help_teaches(arguments):
    process = start(*arguments)
    printed = process.communicate()[0]
    assert process.returncode == 0
    for word in ("--num_rows", "teacher", "thought"):
        assert word in printed


def test_an_unknown_command_is_named():
    process = start("bild")
    assert "Unknown command 'bild'. Known: build, keyframes" in process.communicate()[0]
    assert process.returncode != 0


def test_many_shards_hold_every_row_once_and_go_when_there_are_fewer(build, tmp_path, monkeypatch):
    flags = ("--world", "speed", "--num_rows", 12, "--validation_fraction", 0, "--test_fraction", 0)
    build("build", *flags)
    ids = load_dataset(str(tmp_path / "out"), split="train")["id"][:]
    publish = cli.publish
    monkeypatch.setattr(cli, "publish", lambda *args: publish(*args[:-1], max_shard_bytes=100_000))
    build("publish")
    shards = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert len(shards) > 2
    assert shards == [f"train-{n:05d}-of-{len(shards):05d}.parquet" for n in range(len(shards))]
    assert load_dataset(str(tmp_path / "out"), split="train")["id"][:] == ids
    monkeypatch.undo()
    build("publish")
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["train-00000-of-00001.parquet"]
