"""Prompts show a question and its options as training and evaluation both need them."""

import pytest

from dataset_builder.schema import LETTERS
from evaluation.prompts import storms_prompt


def test_options_stand_on_lettered_lines_between_question_and_instruction():
    lines = storms_prompt("Where is the ball?\n", ["left cup", " right\ncup "]).split("\n")
    assert lines[:3] == ["Where is the ball?", "A. left cup", "B. right cup"]
    assert len(lines) == 4
    assert "letter" in lines[3]


def test_a_free_form_question_has_no_letters():
    lines = storms_prompt("What moves?", []).split("\n")
    assert lines[0] == "What moves?"
    assert len(lines) == 2
    assert "letter" not in lines[1]


@pytest.mark.parametrize("num_options", [1, len(LETTERS) + 1])
def test_numbers_of_options_without_letters_are_refused(num_options):
    with pytest.raises(ValueError, match=f"Saw {num_options} options .* expected 2 to 10"):
        storms_prompt("Why?", [f"reason {number}" for number in range(num_options)])


def test_as_many_options_as_letters_fit():
    prompt = storms_prompt("Why?", [f"reason {number}" for number in range(len(LETTERS))])
    assert all(f"\n{letter}. reason {number}\n" in prompt for number, letter in enumerate(LETTERS))
