"""Answers are read where they are stated, and nothing is made up where they are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.parsing import UNPARSED, matches_free_form, parse_choice, parse_choice_with_rule, parse_free_form


OPTIONS = {"A": "The man runs", "B": "A woman", "C": "the dog", "D": "A woman sings"}
LETTERS = "ABCDEF"
RULES = {"answer_tag", "boxed", "whole_letter", "whole_option", "leading_letter", "answer_statement"}
RULES |= {"option_statement", "option_text"}

# Texts that contain letters, words that look like letters, and each other.
WORDS = ["a", "A", "B", "C", "I", "man", "the man", "A man", "woman", "no", "not", "3", "3.0", "left cup", "C major"]
option_texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
plain_text = st.text(st.characters(exclude_characters="<\\", exclude_categories=["Cs"]), max_size=60)


def lettered(texts):
    return dict(zip(LETTERS, texts))


def some_options(texts=option_texts):
    several = st.lists(texts.filter(str.strip), min_size=2, max_size=6, unique_by=lambda text: text.strip().casefold())
    return several.map(lettered)


FRAGMENTS = [
    *("<think>", "</think>", "<answer>", "</ANSWER>", "\\boxed{", "}", "{", "\\text{", "\n", " ", ".", ",", "(", ")"),
    *("*", ":", "-", "A", "b", "C", "Z", "I", "The answer is ", "answer: ", "option ", "Option C", " is the answer"),
    *(" or ", " and ", "if ", "not ", "man", "a man", "A man runs", "3", "%", "C. ", "(B) ", "is wrong"),
]
any_text = st.text(max_size=80) | st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


# -- rule by rule


@pytest.mark.parametrize("text", ["C", "c", "(C)", "C.", "**C**", " C\n", "'C'", "[C]", "$C$", "# C"])
def test_a_letter_and_nothing_else_is_the_answer(text):
    assert parse_choice_with_rule(text, OPTIONS) == ("C", "whole_letter")


@pytest.mark.parametrize(
    "text",
    [
        *("C. the dog", "(C) the dog", "C: it barks", "C) text", "c) text", "**C.** text", "**C**: text", "C - text"),
        *("**C. the dog**", "C\n\nIt barks.", "C. A man runs", "(C)", "C.", "- C. text", "C.\nOption B is a woman."),
        *("C. the dog\nAnd the answer is C", "C. Text, see the explanation of option B.", "C \N{EN DASH} the dog"),
    ],
)
def test_a_leading_letter_with_its_mark_is_the_answer(text):
    assert parse_choice(text, OPTIONS) == "C"


@pytest.mark.parametrize(
    "text",
    [
        *("A man runs", "A man", "A", "A.M. is the time", "I think so", "A-frame houses", "A's", "A+ for effort", "E"),
        *("E. text", "Apples", "a", "", " ", ".", "An answer", "B woman", "C because it barks"),
    ],
)
def test_a_capital_that_begins_a_word_or_a_phrase_is_no_answer(text):
    assert parse_choice(text, {"B": "x1", "C": "x2"} if text in ("A", "a") else OPTIONS) is None


@pytest.mark.parametrize("text", ["A. Runs.\nB. Sings.\nC. Barks.", "A) no\nB) no", "A\nB\nC\nD"])
def test_a_list_of_letters_is_no_answer(text):
    assert parse_choice(text, OPTIONS) is None


def test_a_list_of_options_does_not_hide_the_statement_after_it():
    assert parse_choice_with_rule("A. Runs.\nB. Sings.\nThe answer is B.", OPTIONS) == ("B", "answer_statement")


@pytest.mark.parametrize(
    "text",
    [
        *("A man runs, so the answer is C", "Answer: C", "The answer is: **C**", "**Final Answer:** (C) the dog"),
        *("The correct option is C.", "the answer is c", "The answer is option C", "The best choice is (C)"),
        *("The answer is C because a woman sings", "The answer is C, not B.", "The answer is clearly C", "Answer:\nC"),
        *(
            "The answer to this question is C.",
            "So C is the correct answer.",
            "I say that (C) is the best option",
            "Answer = C",
        ),
        *("The answer is A. No: the answer is C.", "If the answer is A, he runs. But the answer is C.", "answer: C/"),
        *(
            "The answer is not A. The answer is C",
            "The answer is the letter \N{LEFT DOUBLE QUOTATION MARK}C",
            "Answer: C)",
        ),
        *("The answer would most likely be C", "So C is correct.", "C is correct", "Therefore, C.", "I choose C."),
        *(
            "I would choose C.",
            "I'd go with C",
            "It's C.",
            "Correct: C",
            "**Selected:** C",
            "Answer - C",
            "hence (C).",
        ),
        *("Therefore, the correct one is C.", "The answer is not A but C", "I would not pick A. I pick (C)"),
        *(
            "I select option C",
            "I choose option C.",
            "B is incorrect. C is right.",
            "So, it is C",
            "A man runs. Thus **C**",
        ),
        *("The answer is C. And a man runs.", "Is A the answer? Answer: C", "the answer should be C\nSee option B"),
    ],
)
def test_the_last_statement_of_an_answer_decides(text):
    assert parse_choice_with_rule(text, OPTIONS) == ("C", "answer_statement")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is A man", None),
        ("The answer is a woman", "B"),
        ("The answer is A woman sings", "D"),
        ("The answer is A 5-year-old", None),
        ("The answer is I think unclear", None),
        ("The answer is A.", "A"),
        ("The answer is A because he runs", "A"),
        ("The answer is A the man runs", "A"),
        ("The answer is A (a man)", "A"),
        ("The answer is A, a man", "A"),
        ("The answer is **A** man", "A"),
        ("The answer is (a) man", "A"),
        ("The best option A shows it", "A"),
        ("I choose A man", None),
        ("So, A man runs.", None),
        ("It is A man", None),
        ("I would choose a woman", "B"),
        ("I would not choose A", None),
        ("If A is correct, he runs", None),
    ],
)
def test_an_article_is_no_letter_but_a_named_letter_is(text, answer):
    assert parse_choice(text, OPTIONS) == answer


@pytest.mark.parametrize(
    "text",
    [
        *("A or B", "A, B", "A and C", "A/B", "A, B and C", "The answer is A or B.", "Answer: A, B", "Answer: B & C"),
        *(
            "The answer is either A or B",
            "The answer is (A) or (B)",
            "Between option A and option B",
            "A: B",
            "A. or B.",
        ),
        *("Option A runs. Option B sings.", "The answer is E", "The answer is C. No, the answer is E.", "Option E"),
        *("A. The man runs. So the answer is B.", "<answer>A or C</answer>", "\\boxed{A, B}", "The answer is N/A"),
    ],
)
def test_letters_that_contradict_each_other_or_name_no_option_are_no_answer(text):
    assert parse_choice_with_rule(text, OPTIONS) == (None, UNPARSED)


@pytest.mark.parametrize(
    "text",
    [
        *("Option C", "Option B is wrong, so option C.", "Options A and B are wrong: option C"),
        *(
            "Option C, since option A does not fit",
            "I rule out option A and take option C",
            "Option (C) it is",
            "choice C",
        ),
    ],
)
def test_mentions_of_an_option_decide_if_they_agree(text):
    assert parse_choice_with_rule(text, OPTIONS) == ("C", "option_statement")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is the   DOG!", "C"),
        ("'the dog'", "C"),
        ("the dogs", None),
        ("a woman, I think", "B"),
        ("I see that a woman sings.", "D"),
        ("a woman sings, then a woman", None),
        ("the dog or a woman", None),
        ("not the dog but a woman", "B"),
        ("It isn't the dog", None),
        ("nothing of this", None),
    ],
)
def test_the_only_option_whose_text_occurs_is_the_answer(text, answer):
    assert parse_choice_with_rule(text, OPTIONS) == (answer, "option_text" if answer else UNPARSED)


def test_an_option_text_that_is_a_letter_or_a_number_is_not_found_inside_other_words():
    options = {"A": "3", "B": "13", "C": "I", "D": "3.5"}
    assert [
        parse_choice(text, options) for text in ["13", "I see 3.0 cups", "It is 3.5.", "I see 3rd", "-3", "I"]
    ] == [
        *("B", "A", "D", None, None, "C"),
    ]


def test_a_letter_that_begins_another_options_text_is_a_word():
    options = {"A": "C major", "B": "A minor", "C": "T. rex", "D": "C. elegans"}
    texts = ["The answer is C major", "A minor", "T. rex", "C. elegans", "C. T. rex", "The answer is C."]
    assert [parse_choice(text, options) for text in texts] == ["A", "B", "C", "D", "C", "C"]


# -- thinking, tags and boxes


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>A</think>C", "C"),
        ("<THINKING>the answer is A</thinking>\nThe answer is C", "C"),
        ("<think>a <think> tag</think> C", "C"),
        ("thinking of A </think> C", "C"),
        ("<think>x</think><answer>C</answer></think>", "C"),
        ("<think>A</think> B <think>again</think>", "B"),
        ("<think>The answer is A", None),
        ("<think>x</think> <answer>C</answer> <think>wait", None),
        ("The answer is A</think>", None),
        ("<think></think>", None),
    ],
)
def test_thinking_is_no_answer(text, answer):
    assert parse_choice(text, OPTIONS) == answer


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("The answer is A. <answer>C</answer>", "C", "answer_tag"),
        ("<answer>A</answer> no: <ANSWER> C. the dog </ANSWER>", "C", "answer_tag"),
        ("I use <answer> tags: <answer>The answer is C</answer>", "C", "answer_tag"),
        ("<answer>\\boxed{C}</answer>", "C", "answer_tag"),
        ("The answer is A. <answer>C", "C", "answer_tag"),
        ("<answer>C</answer> I wrote <answer>A wom", "C", "answer_tag"),
        ("C</answer>", "C", "whole_letter"),
        ("<answer></answer> The answer is C", "C", "answer_statement"),
        ("The answer is A. <answer>E</answer>", None, UNPARSED),
        ("The answer is A, or \\boxed{\\text{C}}", "C", "boxed"),
        ("\\boxed{A} or rather $\\boxed{\\mathbf{(C)}}$.", "C", "boxed"),
        ("\\boxed{C", "C", "boxed"),
        ("\\boxed{the dog}", "C", "boxed"),
    ],
)
def test_the_last_tag_or_box_is_all_that_is_read(text, answer, rule):
    assert parse_choice_with_rule(text, OPTIONS) == (answer, rule)


@pytest.mark.parametrize("key", ["a", "AB", "", "1"])
def test_keys_that_are_no_capital_letter_are_refused(key):
    with pytest.raises(ValueError, match="one capital letter"):
        parse_choice("C", {"A": "x", key: "y"})


# -- whatever the options, whatever the text


@settings(max_examples=200, deadline=None)
@given(any_text, some_options() | some_options(st.text(max_size=12)))
def test_any_text_gives_an_option_or_nothing(text, options):
    letter, rule = parse_choice_with_rule(text, options)
    assert (letter in options and rule in RULES) or (letter is None and rule == UNPARSED)
    assert parse_choice(text, options) == letter


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    some_options(),
    st.sampled_from(
        [
            *("The answer is {}.", "the answer is {}", "Answer: {}", "**Answer:** {}", "So the answer is ({}).", "{}"),
            *(
                "The answer is **{}**.",
                "Final answer: {}.",
                "The correct option is {}.",
                "({})",
                "**{}.**",
                "Option {}.",
            ),
            *(
                "A man runs.\nThe answer is {}.",
                "<think>The answer is A.</think> {}",
                "<answer>{}</answer>",
                "\\boxed{{{}}}",
            ),
        ]
    ),
)
def test_every_form_of_a_stated_letter_parses(data, options, form):
    letter = data.draw(st.sampled_from(sorted(options)))
    assert parse_choice(form.format(letter), options) == letter


@settings(max_examples=200, deadline=None)
@given(st.data(), some_options() | some_options(plain_text))
def test_a_text_that_is_exactly_an_options_text_is_that_option(data, options):
    letter, option = data.draw(st.sampled_from(sorted(options.items())))
    bare = parse_choice_with_rule(option, dict.fromkeys(LETTERS, ""))
    if bare[1] != "whole_letter":  # a letter by itself is the name of an option before it is a text
        same = [other for other in options.values() if marks_aside(other) == marks_aside(option)]
        assert parse_choice(option, options) == (letter if len(same) == 1 else None)


def marks_aside(text):
    """Without the difference between straight and typographic quotes and dashes."""
    for kinds in ("'\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "-\N{EN DASH}\N{MINUS SIGN}"):
        for kind in kinds:
            text = text.replace(kind, kinds[0])
    for kind in "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}":
        text = text.replace(kind, '"')
    return text.replace("\N{EM DASH}", " - ").strip()


@settings(max_examples=200, deadline=None)
@given(st.permutations(["blue", "green", "red", "yellow", "black", "white"]), st.integers(1, 5), st.booleans())
def test_an_option_within_a_longer_one_counts_only_on_its_own(words, size, reverse):
    shorter, longer = " ".join(words[:size]), " ".join(words[: size + 1])
    options = dict(zip("BA" if reverse else "AB", [shorter, longer]))
    letters = {text: letter for letter, text in options.items()}
    assert parse_choice(f"I see {longer} here.", options) == letters[longer]
    assert parse_choice(f"I see {shorter} here.", options) == letters[shorter]
    assert parse_choice(f"I see {longer} and {shorter} here.", options) is None


@settings(max_examples=200, deadline=None)
@given(plain_text, any_text.filter(lambda text: "think" not in text.lower()), some_options())
def test_closed_thinking_never_changes_the_answer(thinking, text, options):
    assert parse_choice(f"<think>{thinking}</think>{text}", options) == parse_choice(text, options)


@settings(max_examples=200, deadline=None)
@given(any_text.filter(lambda text: "<" not in text), any_text.filter(lambda text: "<" not in text), some_options())
def test_what_surrounds_an_answer_tag_never_changes_the_answer(before, text, options):
    if text.strip():
        tagged = f"{before}<answer>{text}</answer>{before}"
        assert parse_choice(tagged, options) == parse_choice(text, options)


@pytest.mark.parametrize(
    "text", ["answer is A ", "A ", "\n", "<answer>", "\\boxed{", "option A or ", "(", "*", "a woman "]
)
def test_long_texts_take_no_long_time(text):
    parse_choice(text * (100_000 // len(text)), OPTIONS)  # seconds or minutes if any pattern were quadratic


# -- free form


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>4 or 5</think> 5 ", "5"),
        ("It is <answer> The dog. </answer>", "The dog."),
        ("so $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("\\boxed{\\text{red cup}}", "red cup"),
        ("$5$", "5"),
        ("plain text", "plain text"),
        ("<think>5", ""),
        ("", ""),
    ],
)
def test_a_free_form_answer_is_what_remains_of_the_text(text, answer):
    assert parse_free_form(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("3", "3.0", True),
        ("+3", "3.", True),
        ("1,000 m", "1000 m", True),
        (".5", "0.50", True),
        ("-3", "3", False),
        ("\N{MINUS SIGN}3", "-3", True),
        ("50%", "50", False),
        ("50 %", "50%", True),
        ("30", "3", False),
        ("The  Dog!", "the dog", True),
        ("man\N{RIGHT SINGLE QUOTATION MARK}s", "man's", True),
        ("<answer>Red</answer>", "red", True),
        ("the dog", "dog", False),
        ("C++", "C", False),
        ("+", "-", False),
        ("+", "+", True),
        ("?!", "?!", True),
        ("", "", False),
        ("<think>3", "3", False),
        ("3", "", False),
        (".", "", False),
    ],
)
def test_free_form_answers_match_by_words_and_by_value(text, answer, expected):
    assert matches_free_form(text, answer) is expected


@settings(max_examples=200, deadline=None)
@given(plain_text.filter(lambda text: "$" not in text))
def test_a_free_form_answer_matches_itself_unless_empty(text):
    assert matches_free_form(text, text) == (text.strip() != "")
    assert not matches_free_form("", text)
    assert not matches_free_form(text, "")


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_free_form_numbers_match_by_value_alone(one, other):
    for written in (f"{one}", f"{one:,}", f"{one}.0", f" {one}. "):
        assert matches_free_form(written, f"{one}")
        assert matches_free_form(written, f"{other}") == (one == other)


@settings(max_examples=200, deadline=None)
@given(any_text, any_text)
def test_free_form_reading_never_fails(text, answer):
    assert isinstance(parse_free_form(text), str)
    assert isinstance(matches_free_form(text, answer), bool)
