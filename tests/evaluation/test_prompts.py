"""Prompts show a question and its options as training and evaluation both need them."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builder.schema import LETTERS
from evaluation.benchmarks import BENCHMARKS, Benchmark, Prompt, Question, Subtitle
from evaluation.parsing import matches_free_form, parse_choice_with_rule
from evaluation.prompts import PROMPTS, prompt_text, storms_prompt


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


# -- named prompts, against what the benchmarks' repositories and lmms-eval 0.7.3 print

CHOICES = {"A": "Black.", "B": "Gray.", "C": "Green.", "D": "Brown."}
COLOUR = Question(
    id="q",
    question="What is the color of the clothing worn by the persons in the video?",
    answer="A",
    options=CHOICES,
    full_text="What is the color?\n(A) Black.\n(B) Gray.",
    task="multi-choice",
)
LISTED = "A. Black.\nB. Gray.\nC. Green.\nD. Brown."
IN_BRACKETS = "(A) Black.\n(B) Gray.\n(C) Green.\n(D) Brown."


def asked(name, prompt, question=COLOUR, thinking=False, **options):
    adapter = BENCHMARKS[name]
    benchmark = Benchmark(name, "", "", [question], None, None, adapter.prompts, adapter.thinking_prompts)
    return prompt_text(benchmark, question, prompt, thinking, **options)


@pytest.mark.parametrize(
    ("name", "prompt", "thinking", "expected"),
    [
        (
            *("videomme", "official", False),
            "Select the best answer to the following multiple-choice question based on the video. Respond with only "
            f"the letter (A, B, C, or D) of the correct option.\n{COLOUR.question}\n{LISTED}\nThe best answer is:",
        ),
        (
            *("videomme", "lmms_eval", False),
            "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"{COLOUR.question}\n{LISTED}\n\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            *("mvbench", "lmms_eval", False),
            f"Question:{COLOUR.question}\nOption:\n{IN_BRACKETS}\nOnly give the best option.\n",
        ),
        (
            *("tempcompass", "official", False),
            "What is the color?\n(A) Black.\n(B) Gray.\nPlease directly give the best option:",
        ),
        (
            *("mmvu", "official", False),
            f"\nQuestion: {COLOUR.question}\nA: Black.\nB: Gray.\nC: Green.\nD: Brown.\n\n"
            "Do not generate any intermediate reasoning process. Answer directly with the option letter from the "
            "given choices.\n",
        ),
        (
            *("video_holmes", "official", True),
            "Based on the given video, reason and answer the single-choice question. Provide your reasoning between "
            "the <think> and </think> tags, and then give your final answer between the <answer> and </answer> tags. "
            f"The question is: {COLOUR.question}. The options are: A: Black., B: Gray., C: Green., D: Brown.. "
            "Your answer:",
        ),
        (
            *("video_holmes", "lmms_eval", False),
            f"Question: {COLOUR.question}\n{LISTED}\nSelect the best answer to the following multiple-choice question "
            "based on the video. Respond with only the letter (A, B, C, D, E, or F) of the correct option.",
        ),
        (
            *("videoespresso", "official", False),
            f"Please finish the multi-choice task. Question: {COLOUR.question}. You have the following options: \n"
            f"{IN_BRACKETS}\n. Select the answer and only give the option letters.",
        ),
        (
            *("mlvu", "lmms_eval", False),
            "What is the color?\n(A) Black.\n(B) Gray.\nOnly give the best option.\nBest option: (",
        ),
        (
            *("longvideobench", "lmms_eval", False),
            f"{COLOUR.question}\n{LISTED}\nAnswer with the option's letter from the given choices directly.\n",
        ),
        (
            *("egoschema", "lmms_eval", False),
            f"{COLOUR.question}\n{LISTED}\nAnswer with the option's letter from the given choices directly.",
        ),
    ],
)
def test_a_named_prompt_is_worded_as_its_source_words_it(name, prompt, thinking, expected):
    assert asked(name, prompt, thinking=thinking) == Prompt(expected)


def test_mvbench_is_asked_as_its_notebook_prints_it():
    question = Question(
        id="q",
        question="What happened after the person took the food?",
        answer="A",
        options=dict(
            zip(
                "ABCD",
                ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup/glass/bottle.", "Took the box."],
            )
        ),
    )
    system = (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
        "objects, and the action and pose of persons. Based on your observations, select the best option that "
        "accurately addresses the question."
    )
    assert asked("mvbench", "official", question) == Prompt(
        f"{system}\nQuestion: What happened after the person took the food?\nOptions:\n(A) Ate the medicine.\n"
        "(B) Tidied up the blanket.\n(C) Put down the cup/glass/bottle.\n(D) Took the box.\n"
        "Only give the best option.",
        system,
    )
    assert asked("mlvu", "official", question).system.startswith(
        "Carefully watch this video and pay attention to every"
    )


@pytest.mark.parametrize("name", ["official", "lmms_eval"])
def test_thinking_prompts_of_mmvu_name_the_letter_that_is_expected(name):
    text = asked("mmvu", name, thinking=True).text
    assert "Therefore, the final answer" in text
    assert "is: $LETTER" in text
    free_form = Question(id="q", question="Which law is it?", answer="Lenz's law")
    assert "$ANSWER" in asked("mmvu", name, free_form, thinking=True).text
    assert "option letter" not in asked("mmvu", name, free_form).text
    assert matches_free_form("Therefore, the final answer is: Lenz's law", "Lenz's law") is False  # hence a judge


def test_video_r1_thinks_in_tags_and_says_what_to_put_in_the_answer():
    text = asked("videomme", "video_r1", thinking=True).text
    assert text.startswith(f"{COLOUR.question}Options:\n{LISTED}\n\nPlease think about this question as if you were")
    assert text.endswith(
        "final answer between the <answer> and </answer> tags. Please provide only the single option letter (e.g., A, "
        "B, C, D, etc.) within the <answer> </answer> tags."
    )
    free_form = asked("mmvu", "video_r1", Question(id="q", question="Why?", answer="wind"), thinking=True).text
    assert free_form.startswith("Why?\nPlease think")
    assert free_form.endswith("Please provide your text answer within the <answer> </answer> tags.")


def test_the_storms_prompt_is_the_one_of_training():
    assert asked("videomme", "storms") == Prompt(storms_prompt(COLOUR.question, list(CHOICES.values())))


def test_what_the_storms_prompt_asks_a_thinking_model_to_write_is_what_is_parsed():
    text = asked("videomme", "storms", thinking=True).text
    assert text.startswith(asked("videomme", "storms").text + "\n")
    assert "'Answer: X'" in text
    reply = "The jacket could be gray, as option B says, but in the light it is green.\nAnswer: C"
    assert parse_choice_with_rule(reply, CHOICES) == ("C", "answer_statement")
    free_form = asked("mmvu", "storms", Question(id="q", question="Why?", answer="wind"), thinking=True).text
    assert "<answer> and </answer>" in free_form
    assert matches_free_form("The leaves move. <answer>wind</answer>", "Wind.")


@pytest.mark.parametrize(
    ("name", "prompt", "thinking", "told"),
    [
        (
            "egoschema",
            "official",
            False,
            "egoschema has no prompt 'official' without thinking: there are storms, lmms_eval.",
        ),
        ("videomme", "official", True, "there are storms, video_r1, and official without it."),
        ("video_holmes", "official", False, "there are storms, lmms_eval, and official with it."),
        ("videomme", "video_r1", False, "there are storms, official, lmms_eval, and video_r1 with it."),
        ("videomme", "mine", False, "has no prompt 'mine' without thinking: there are storms, official, lmms_eval."),
    ],
)
def test_a_prompt_that_a_benchmark_lacks_is_refused_with_those_it_has(name, prompt, thinking, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        asked(name, prompt, thinking=thinking)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=6),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_subtitles_are_shown_that_are_spoken_while_a_frame_is_seen(lines, frames):
    spoken = tuple(Subtitle(at, at + length, f"line {place}") for place, (at, length) in enumerate(lines))
    text = asked("videomme", "storms", replace(COLOUR, subtitles=spoken), frame_times=frames).text
    shown = [
        f"line {place}" for place, (at, length) in enumerate(lines) if any(at <= time < at + length for time in frames)
    ]
    assert [line for line in text.split("\n") if line.startswith("line ")] == shown
    assert ("subtitles" in text) == bool(shown)


def test_all_names_of_prompts_are_known():
    for adapter in BENCHMARKS.values():
        assert set(adapter.prompts) | set(adapter.thinking_prompts) | set(adapter.subtitle_prompts) <= set(PROMPTS)
