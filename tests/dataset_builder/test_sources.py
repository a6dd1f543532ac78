"""Sources of real questions: what they read, and what they refuse and count."""

import json
import os
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builder.schema import LETTERS, Rejected
from dataset_builder.sources import local_folder, video_r1
from dataset_builder.sources.questions import (
    Refused,
    answer_letter,
    draw,
    excluded_videos,
    file_stat,
    open_root,
    split_of,
    strip_letters,
)


ALL_TRAIN = {"train": 1.0, "validation": 0.0, "test": 0.0}


def listed(module, questions, root, excluded=(), fractions=ALL_TRAIN):
    found = list(module.list_rows(questions, root, "mit", 0, fractions, excluded_videos(excluded)))
    rows = [row for row in found if not isinstance(row, Refused)]
    return rows, {row.id: row for row in found if isinstance(row, Refused)}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def r1(problem_id, **changes):
    return {
        "problem_id": problem_id,
        "problem": "Which way does the ball roll?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. left", "B. right"],
        "solution": "<answer>B</answer>",
        "path": "./CLEVRER/train/video_00012.mp4",
        **changes,
    }


@pytest.mark.parametrize(
    "options",
    [["A. red", "B. blue"], ["A) red", "B) blue"], ["(A) red", "(B) blue"], ["A: red", "B: blue"], [" red", "blue "]],
)
def test_option_letters_of_any_style_are_stripped(options):
    assert strip_letters(options) == ["red", "blue"]


def test_options_that_only_begin_like_letters_keep_their_text():
    for options in (["A. Lincoln", "J. Adams"], ["B. red", "A. blue"], ["red", "B. blue"]):
        assert strip_letters(options) == options


@given(st.integers(0, 9), st.sampled_from(["{}", "({})", "{}.", "{})", " {} ", "{}. option {}", "option {1}"]))
def test_answers_are_read_as_letters_or_texts(index, style):
    options = [f"option {letter}" for letter in LETTERS]
    assert answer_letter(style.format(LETTERS[index], LETTERS[index]), options) == LETTERS[index]


def test_an_answer_that_may_be_letter_or_text_is_read_by_the_format_or_refused(tmp_path):
    options = ["A. C", "B. A", "C. B"]
    (tmp_path / "r1.json").write_text(json.dumps([r1(1, options=options, solution="<answer>A</answer>")]))
    (row,), _ = listed(video_r1, tmp_path / "r1.json", tmp_path)
    assert (row["options"], row["answer"]) == (["C", "A", "B"], "A")
    line = {"video": "a.mp4", "question": "Which letter?", "options": options}
    questions = write_lines(tmp_path / "q.jsonl", {**line, "answer": "A"}, {**line, "answer": "(A)"})
    (row,), refused = listed(local_folder, questions, tmp_path)
    assert row["answer"] == "A"
    assert [one.reason for one in refused.values()] == ["bad_answer"]


@pytest.mark.parametrize("answer", ["C", "", "green", "AB", "A. blue", "A or B"])
def test_answers_that_name_no_option_are_refused(answer):
    with pytest.raises(Rejected, match="bad_answer"):
        answer_letter(answer, ["red", "blue"])


def test_video_r1_rows_come_out_right(tmp_path):
    entries = [
        r1(1, process="<think>It rolls to the right.</think>"),
        r1(2, options=["A) left", "B) right", "C) not at all"], solution="<answer> C </answer>"),
        r1(3, problem_type="free-form", options=[], solution="<answer>to the right</answer>"),
        r1(4, data_type="image", path="a.jpg"),
    ]
    (tmp_path / "r1.json").write_text(json.dumps(entries))
    rows, refused = listed(video_r1, tmp_path / "r1.json", tmp_path)
    assert refused == {}
    first, second, third = rows
    assert (first["id"], first["video_id"]) == ("video_r1-1", "CLEVRER/train/video_00012")
    assert first["video_path"] == "CLEVRER/train/video_00012.mp4"
    assert (first["options"], first["answer"], first["problem_type"]) == (["left", "right"], "B", "multiple choice")
    assert first["source_plan"] == "It rolls to the right."
    assert (second["options"][2], second["answer"], second["source_plan"]) == ("not at all", "C", "")
    assert (third["options"], third["answer"], third["problem_type"]) == ([], "to the right", "free-form")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_type": "audio"}, "bad_question"),
        ({"data_type": None}, "bad_question"),
        ({"problem_type": "regression"}, "problem_type"),
        ({"solution": "B"}, "bad_answer"),
        ({"solution": "<answer>F</answer>"}, "bad_answer"),
        ({"options": []}, "bad_question"),
        ({"options": ["A. left"], "solution": "<answer>A</answer>"}, "bad_question"),
        ({"options": "left"}, "bad_question"),
        ({"problem": ""}, "bad_question"),
        ({"path": None}, "bad_question"),
        ({"path": "../../etc/passwd"}, "outside_video_root"),
        ({"path": "/data/a.mp4"}, "outside_video_root"),
        ({"problem_id": 1}, "duplicate_id"),
    ],
)
def test_a_broken_video_r1_row_is_refused_and_the_rest_goes_on(tmp_path, changes, reason):
    (tmp_path / "r1.json").write_text(json.dumps([r1(1), {**r1(2), **changes}, r1(3)]))
    rows, refused = listed(video_r1, tmp_path / "r1.json", tmp_path)
    assert [row["id"] for row in rows] == ["video_r1-1", "video_r1-3"]
    assert [one.reason for one in refused.values()] == [reason]


@pytest.mark.parametrize("text", ["[{", '{"problem_id": 1}', "[1, 2]"])
def test_a_broken_video_r1_file_is_an_error(tmp_path, text):
    (tmp_path / "r1.json").write_text(text)
    with pytest.raises(ValueError, match=r"r1\.json"):
        listed(video_r1, tmp_path / "r1.json", tmp_path)


def test_questions_are_the_same_from_jsonl_and_csv(tmp_path):
    row = {"video": "a b/c.mp4", "question": 'Who says "hi", first?', "answer": "B", "start": 1.5}
    jsonl = write_lines(tmp_path / "q.jsonl", {**row, "options": ["A. Ann", "B. Bo"]}, "", {**row, "answer": "Ann"})
    (tmp_path / "json.csv").write_text(
        "\ufeffvideo,question,answer,start,options\n"
        'a b/c.mp4,"Who says ""hi"", first?",B,1.5,"[""A. Ann"", ""B. Bo""]"\n'
        'a b/c.mp4,"Who says ""hi"", first?",Ann,1.5,\n'
    )
    (tmp_path / "bars.csv").write_text(
        'options,video,question,answer,start\nAnn|Bo,a b/c.mp4,"Who says ""hi"", first?",bo,1.5\n'
    )
    from_jsonl, _ = listed(local_folder, jsonl, tmp_path)
    from_csv, _ = listed(local_folder, tmp_path / "json.csv", tmp_path)
    from_bars, _ = listed(local_folder, tmp_path / "bars.csv", tmp_path)
    for column in ("question", "options", "answer", "video_start", "video_end", "problem_type", "video_id"):
        assert [row[column] for row in from_jsonl] == [row[column] for row in from_csv]
        assert from_jsonl[0][column] == from_bars[0][column]
    assert from_jsonl[0]["options"] == ["Ann", "Bo"]
    assert (from_jsonl[1]["options"], from_jsonl[1]["answer"], from_jsonl[1]["problem_type"]) == (
        *([], "Ann"),
        "free-form",
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "bad_question"),
        ("[1]", "bad_question"),
        ({"video": "a.mp4", "question": "Why?"}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "C", "options": ["x", "y"]}, "bad_answer"),
        ({"video": "a.mp4", "question": "Why?", "answer": "A", "options": {"A": "x"}}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "x", "start": "soon"}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "x", "start": 3, "end": 2}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "x", "split": "dev"}, "bad_question"),
        ({"video": "../a.mp4", "question": "Why?", "answer": "x"}, "outside_video_root"),
        ({"video": "/data/a.mp4", "question": "Why?", "answer": "x"}, "outside_video_root"),
        ({"video": "/", "question": "Why?", "answer": "x"}, "outside_video_root"),
        ({"video": "a.mp4", "question": "Why?", "answer": None}, "bad_question"),
        ({"video": "a.mp4", "question": None, "answer": "x"}, "bad_question"),
        ({"video": "a.mp4", "question": ["Why?"], "answer": "x"}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "A", "options": ["x", None]}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "x", "start": 10**400}, "bad_question"),
        (
            {"video": "a.mp4", "question": "Why?", "answer": "x", "start": 1000.00001, "end": 1000.00002},
            "bad_question",
        ),
        ({"video": "a.mp4", "question": "\ud800", "answer": "x"}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "x", "id": "/home/someone/a"}, "bad_question"),
        ({"video": "a.mp4", "question": "Why?", "answer": "x", "video_id": "/home/someone/a"}, "bad_question"),
        ("[" * 100_000, "bad_question"),
        ({"video": "benchmark.mp4", "question": "Why?", "answer": "x"}, "in_evaluation_set"),
        ({"video": "first.mp4", "question": "Why?", "answer": "x"}, "duplicate_id"),
    ],
)
def test_a_broken_question_is_refused_and_the_rest_goes_on(tmp_path, line, reason):
    first = {"video": "first.mp4", "question": "Why?", "answer": "x"}
    questions = write_lines(tmp_path / "q.jsonl", first, line, {**first, "question": "When?"})
    rows, refused = listed(local_folder, questions, tmp_path, excluded=["benchmark"])
    assert [row["question"] for row in rows] == ["Why?", "When?"]
    assert [one.reason for one in refused.values()] == [reason]
    assert str(tmp_path) not in str(refused)


def test_odd_cells_of_a_csv_are_refused_or_read(tmp_path):
    long = "why? " * 40_000
    text = f"video,question,answer\na.mp4,Why?,x,more\na.mp4,{long},x\na.mp4,Wer?,M\xfcller\nb.mp4,Why?,x\n"
    (tmp_path / "q.csv").write_bytes(text.encode("latin-1"))
    rows, refused = listed(local_folder, tmp_path / "q.csv", tmp_path)
    assert [row["video_id"] for row in rows] == ["a", "b"]
    assert [(one.id, one.reason) for one in refused.values()] == [(f"q.csv:{n}", "bad_question") for n in (2, 4)]


def test_absolute_paths_into_the_video_folder_become_relative(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"video")
    line = {"video": str(tmp_path / "a.mp4"), "question": "Why?", "answer": "x"}
    (row,), _ = listed(local_folder, write_lines(tmp_path / "q.jsonl", line), tmp_path)
    assert (row["video_path"], row["video_id"]) == ("a.mp4", "a")


def test_a_questions_file_without_its_columns_is_an_error(tmp_path):
    (tmp_path / "q.csv").write_text("clip,question\na.mp4,Why?\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['answer', 'video'\]"):
        listed(local_folder, tmp_path / "q.csv", tmp_path)
    for name in ("missing.jsonl", "q.xlsx"):
        (tmp_path / "q.xlsx").write_bytes(b"")
        with pytest.raises(ValueError, match=name):
            listed(local_folder, tmp_path / name, tmp_path)


def test_videos_of_evaluation_sets_are_found_by_name_and_by_path():
    is_excluded = excluded_videos(["VIDEO_10000.mp4", "Art/3", "./mvbench/star/x1.webm", ""])
    assert is_excluded("CLEVRER/train/video_10000.mp4")
    assert is_excluded("mmvu/Art/3.MP4")
    assert is_excluded("mmvu/art/3.flv")
    assert is_excluded("mvbench/star/x1.mp4")
    for path in ("CLEVRER/train/video_1000.mp4", "Music/3.mp4", "3.mp4", "x1.mp4", "a.mp4"):
        assert not is_excluded(path)


def test_all_questions_of_a_video_share_a_split_and_the_parts_are_as_asked():
    fractions = {"train": 0.8, "validation": 0.15, "test": 0.05}
    splits = [split_of(f"video-{index}", 3, fractions) for index in range(4000)]
    assert splits == [split_of(f"video-{index}", 3, fractions) for index in range(4000)]
    for split, fraction in fractions.items():
        assert splits.count(split) / 4000 == pytest.approx(fraction, abs=0.02)
    assert splits != [split_of(f"video-{index}", 4, fractions) for index in range(4000)]


def test_a_draw_keeps_its_rows_when_the_source_grows():
    rows = [{"id": f"row-{index}"} for index in range(200)]
    few, many = draw(rows[:100], 1), draw(rows, 1)
    assert [row for row in many if row in few] == few
    assert few != rows[:100]
    assert few != draw(rows[:100], 2)


def test_a_link_out_of_the_video_folder_is_refused(tmp_path):
    root, secret = tmp_path / "videos", tmp_path / "secret.mp4"
    root.mkdir()
    secret.write_bytes(b"secret")
    (root / "inside.mp4").write_bytes(b"video")
    os.symlink(secret, root / "link.mp4")
    os.symlink(root / "inside.mp4", root / "fine.mp4")
    os.symlink(tmp_path, root / "up")
    assert file_stat(root, "inside.mp4") == file_stat(root, "fine.mp4") != ""
    assert file_stat(root, "missing.mp4") == file_stat(root, "\0") == file_stat(root, "x" * 5000) == ""
    for path in ("link.mp4", "up/secret.mp4"):
        with pytest.raises(Rejected, match="outside_video_root"):
            file_stat(root, path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archives_members_cannot_land_outside(tmp_path, kind):
    (tmp_path / "clip.mp4").write_bytes(b"video")
    os.symlink("/etc/passwd", tmp_path / "link.mp4")
    archive = tmp_path / f"videos.{kind}"
    names = ["clip.mp4", "deep/clip.mp4", "../evil.mp4", "deep/../../evil.mp4", "/evil.mp4"]
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in names:
                file.writestr(zipfile.ZipInfo(name), b"video")
            link = zipfile.ZipInfo("link.mp4")
            link.external_attr = 0o120777 << 16
            file.writestr(link, "/etc/passwd")
    else:
        with tarfile.open(archive, "w") as file:
            for name in names:
                info = file.gettarinfo(tmp_path / "clip.mp4")
                info.name = name
                with (tmp_path / "clip.mp4").open("rb") as data:
                    file.addfile(info, data)
            file.add(tmp_path / "link.mp4", "link.mp4")
    root, refused = open_root(archive, tmp_path / "build" / "unpacked")
    assert {one.id for one in refused} == {"../evil.mp4", "deep/../../evil.mp4", "/evil.mp4", "link.mp4"}
    assert {one.reason for one in refused} == {"unsafe_archive_member"}
    unpacked = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert unpacked == {"clip.mp4", "deep/clip.mp4"}
    assert not list(tmp_path.rglob("evil.mp4"))
    assert open_root(archive, tmp_path / "build" / "unpacked") == (root, refused)


def test_a_video_root_that_is_neither_folder_nor_archive_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("no archive")
    for name in ("missing", "a.txt"):
        with pytest.raises(ValueError, match=name):
            open_root(tmp_path / name, tmp_path / "unpacked")
