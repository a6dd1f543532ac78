"""A checkpoint's card says what was trained on what and how it went, and nothing about this machine."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from model_card.render import STAGES, is_local, public_name, render_model_card


RECORD = {
    "stage": "stage2",
    "base_model": "org/storms-7b-stage1",
    "datasets": ["org/thoughts", "other/questions"],
    "steps": 1225,
    "rows": 4900,
    "num_processes": 4,
    "arguments": {"learning_rate": 1e-05, "latent_size": 8, "stop_supervision": "none"},
    "metrics": {"loss/lm": 0.123456, "eval_accuracy": 0.75},
}


def rows_of(card: ModelCard) -> dict[str, str]:
    """Names and values of all tables."""
    return dict(re.findall(r"^\| (\S[^|]*) \| ([^|]*) \|$", card.text, re.MULTILINE))


def test_it_names_stage_data_and_metrics():
    card = ModelCard(render_model_card("org/storms-7b", RECORD))
    assert card.data.base_model == "org/storms-7b-stage1"
    assert card.data.datasets == ["org/thoughts", "other/questions"]
    assert card.data.library_name == "transformers"
    assert "stage2" in card.data.tags
    assert rows_of(card) == {
        "started from": "org/storms-7b-stage1",
        "datasets": "org/thoughts, other/questions",
        "optimiser steps": "1225",
        "rows seen": "4900",
        "processes": "4",
        "learning_rate": "1e-05",
        "latent_size": "8",
        "stop_supervision": "none",
        "loss/lm, last logged": "0.1235",
        "eval_accuracy, last logged": "0.75",
    }
    assert card.text.lstrip().startswith("# storms-7b\n")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_explained(stage):
    assert STAGES[stage] in render_model_card("org/storms-7b", {**RECORD, "stage": stage})


def test_a_baseline_is_not_said_to_reason():
    assert "that reasons" in render_model_card("org/storms-7b", RECORD)
    text = render_model_card("org/storms-7b", {**RECORD, "stage": "sft"})
    assert "that reasons" not in text
    assert "\n\n```python" in text


def test_what_was_not_measured_is_not_explained():
    assert "no benchmark result" in render_model_card("org/storms-7b", RECORD)
    assert "no benchmark result" not in render_model_card("org/storms-7b", {**RECORD, "metrics": {"loss/lm": 1.0}})


def test_its_code_loads_the_repository_by_its_whole_name():
    text = ModelCard(render_model_card("org/storms-7b", RECORD)).text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.count('from_pretrained("org/storms-7b", trust_remote_code=True') == 2


def test_tables_are_tables():
    """A blank line within one, or text right behind it, and a reader sees its bars instead."""
    lines = ModelCard(render_model_card("org/storms-7b", RECORD)).text.splitlines()
    for above, line, below in zip(["", *lines], lines, [*lines[1:], ""]):
        if line == "|---|---|":
            assert above.startswith("|")
            assert below.startswith("|")
        if line.startswith("|") and not below.startswith("|"):
            assert below == ""


def test_without_metrics_or_base_there_are_no_rows_for_them():
    card = ModelCard(render_model_card("storms", {**RECORD, "metrics": {}, "base_model": None}))
    assert card.data.base_model is None
    assert "started from" not in rows_of(card)
    assert "eval_accuracy" not in card.text


class TestFolders:
    def test_a_folder_is_named_by_its_last_part(self, tmp_path):
        (tmp_path / "thoughts").mkdir()
        local = [str(tmp_path / "thoughts"), "/data/of/mine", "~/thoughts", "../thoughts", "C:\\Users\\me\\thoughts"]
        record = {**RECORD, "base_model": str(tmp_path / "storms-init"), "datasets": ["org/thoughts", *local]}
        text = render_model_card("storms-tiny", record)
        card = ModelCard(text)
        assert card.data.base_model is None
        assert card.data.datasets == ["org/thoughts"]
        assert rows_of(card)["started from"] == "./storms-init"
        assert rows_of(card)["datasets"] == ("org/thoughts, ./thoughts, ./mine, ./thoughts, ./thoughts, ./thoughts")
        for private in (str(tmp_path), "/data", "Users", str(Path.home())):
            assert private not in text

    def test_this_folder_has_a_name(self, tmp_path, monkeypatch):
        (tmp_path / "thoughts").mkdir()
        monkeypatch.chdir(tmp_path / "thoughts")
        assert [public_name(name) for name in (".", "./", "../thoughts")] == ["./thoughts"] * 3

    def test_a_folder_beside_is_no_name_on_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert public_name("org/thoughts") == "org/thoughts"
        (tmp_path / "org" / "thoughts").mkdir(parents=True)
        assert public_name("org/thoughts") == "./thoughts"

    @given(st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True), min_size=3, max_size=6))
    def test_what_is_public_stays_so(self, parts):
        name = public_name("/" + "/".join(parts))
        assert name == f"./{parts[-1]}"
        assert is_local(name)
        assert public_name(name) == name
