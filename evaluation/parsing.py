"""Reads the answer that a model's text states. What it does not state is never guessed: it stays unparsed.

Rules go from the most explicit to the least. The first that finds a letter decides. A text that names two letters
where one is due, as in "A or B", is unparsed.
"""

import re
import unicodedata
from collections.abc import Mapping
from string import ascii_uppercase
from typing import NamedTuple


UNPARSED = "unparsed"


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a model's text chooses, or None. See `parse_choice_with_rule`."""
    return parse_choice_with_rule(text, options)[0]


def parse_choice_with_rule(text: str, options: Mapping[str, str]) -> tuple[str | None, str]:
    """The letter that a model's text chooses, and the rule that found it.

    Thinking is cut off first; a text that ends while still thinking is unparsed. If there is an `<answer>` tag, its
    last content alone is read by the rules below, and likewise that of the last `\\boxed{}`. These are named
    `answer_tag` and `boxed`, whichever rule then reads them. The others, in order:

    - `whole_letter`: nothing but a letter: "C", "(C)", "C.", "**C**".
    - `whole_option`: nothing but one option's text.
    - `leading_letter`: "C. text", "(C) text", "C: text", "C) text". Not "A man runs", and not a list of the options;
      unparsed if a later "answer is" names another letter.
    - `answer_statement`: the last "answer is C", "answer: C", "C is the answer", "I choose C" or "Therefore, C." Not
      "the answer is A man".
    - `option_statement`: "option C", where all such mentions agree, apart from those like "option B is wrong".
    - `option_text`: the only option whose text occurs, word by word, case and punctuation aside. A text that occurs
      only within a longer option's text does not count, nor one that follows "not".

    Args:
        text (`str`): what the model wrote.
        options (`Mapping[str, str]`): from capital letter to option text.

    Returns:
        `tuple`: a key of `options`, or None; and the rule's name, or `"unparsed"`.

    Raises:
        ValueError: if a key of `options` is not one capital letter, as no rule could find it.
    """
    for key in options:
        if len(key) != 1 or key not in ascii_uppercase:
            raise ValueError(f"Saw options under {list(options)}, expected keys that are one capital letter each.")
    options = {letter: option.translate(_PLAIN_MARKS) for letter, option in options.items()}
    content, container = _read_containers(_without_thinking(text.translate(_PLAIN_MARKS)))
    try:
        for rule, read in _RULES.items():
            letter = read(content, options)
            if letter is not None:
                return letter, container or rule
    except _Contradiction:
        pass
    return None, UNPARSED


def parse_free_form(text: str) -> str:
    """What a model's text answers to a free-form question: the text without thinking, or the content of its last
    `<answer>` tag or `\\boxed{}`; empty if it ends while still thinking."""
    return _read_containers(_without_thinking(text))[0].strip("$ \t\n")


def matches_free_form(text: str, answer: str) -> bool:
    """Whether a model's text gives the answer: equal apart from case, whitespace and punctuation, numbers by value.

    Args:
        text (`str`): what the model wrote, read by `parse_free_form`. An empty one matches nothing.
        answer (`str`): the right answer.
    """
    seen, expected = parse_free_form(text), answer.strip()
    seen_words, expected_words = _words(seen), _words(expected)
    if seen_words or expected_words:
        return seen_words == expected_words
    return seen != "" and _folded(seen) == _folded(expected)  # punctuation is all there is


class Score(NamedTuple):
    """What came of an answer: the letter that it chooses, if any, the rule that found it, and whether it is right."""

    choice: str | None
    rule: str
    is_parsed: bool
    is_correct: bool


def score_answer(text: str, options: Mapping[str, str], answer: str) -> Score:
    """Read a model's text and compare it with the right answer. What can't be read is wrong.

    Args:
        text (`str`): what the model wrote.
        options (`Mapping[str, str]`): from capital letter to option text; empty for a free-form question.
        answer (`str`): the right letter, or a free-form answer.
    """
    if options:
        choice, rule = parse_choice_with_rule(text, options)
        return Score(choice, rule, choice is not None, choice == answer)
    is_parsed = parse_free_form(text) != ""
    return Score(None, "free_form", is_parsed, is_parsed and matches_free_form(text, answer))


class _Contradiction(Exception):
    """The rule that should decide found two letters, or one that is no option."""


# -- where to read

_PLAIN_MARKS = str.maketrans(
    {
        **dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "'"),
        **dict.fromkeys("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
        **dict.fromkeys("\N{EN DASH}\N{MINUS SIGN}", "-"),
        "\N{EM DASH}": " - ",
    }
)
_THINKING = re.compile(r"<(/?)\s*think(?:ing)?\s*>", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)(</answer>|\Z)", re.IGNORECASE | re.DOTALL)
_STRAY_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_LATEX_TEXT = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}")


def _without_thinking(text: str) -> str:
    """The text outside of thinking; empty if it is never closed."""
    kept, *pieces = _THINKING.split(text)
    is_thinking = has_thought = False
    for slash, piece in zip(pieces[::2], pieces[1::2]):
        if not slash:
            is_thinking = True
        elif is_thinking:
            is_thinking, has_thought = False, True
            kept += f"\n{piece}"
        elif piece.strip() or not has_thought:
            kept = piece  # thinking that the prompt opened ends here; a second closing tag at the end is only noise
    return "" if is_thinking else kept.strip()


def _read_containers(text: str) -> tuple[str, str | None]:
    """What stands in the last answer tag or box that is not blank, else the text; and which of these it was."""
    container = None
    tags = [tag for tag in _ANSWER_TAG.finditer(text) if tag[1].strip()]
    if tags:
        # One that is not closed was cut off, or ended by a stop string.
        text, container = ([tag for tag in tags if tag[2]] or tags)[-1][1], "answer_tag"
    text = _LATEX_TEXT.sub(r"\1", _STRAY_ANSWER_TAG.sub(" ", text))
    for match in reversed(list(_BOXED.finditer(text))):
        boxed = _up_to_closing_brace(text, match.end())
        if boxed.strip():
            return boxed.strip(), container or "boxed"
    return text.strip(), container


def _up_to_closing_brace(text: str, start: int) -> str:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    return text[start:]


# -- letters

_MARKS = r"[\s*_`\"'$]*"
_WHOLE_LETTER = re.compile(r"[\s*_`\"'$(\[{#>]*([A-Za-z])[\s*_`\"'$)\]}.,:;!]*")
# In brackets, or by itself: not the start of "T-shirt", "A's", "C++" or "A.M."
_LETTER = re.compile(
    rf"{_MARKS}(?P<open>[(\[{{])?{_MARKS}(?P<letter>[A-Za-z])"
    rf"(?(open){_MARKS}[)\]}}]|(?![^\W_]|[-'][^\W_]|[+#]|\.[^\W_](?:[\W_]|$)))"
)
# "(C)"; or "C." or "C:" (not "A.M."), "C)", "C - ", "C" alone on its line; or "**C**"
_LEADING_LETTER = re.compile(
    r"^[ \t>#*_`\"'-]*(?P<open>[(\[{])?[ \t]*(?P<letter>[A-Za-z])(?(open)[ \t]*[)\]}]"
    r"|(?:[*_`\"']*(?:[.:](?![^\W_](?:[\W_]|$))|\)|[ \t]+-(?=\s)|[ \t\r]*$)|(?<=[*_].)[*_]))[*_.:]*",
    re.MULTILINE,
)
_NEXT_WORD = re.compile(r"[ \t]+[\"']?([^\W_]+)")
# Words that may follow the name of an option, but hardly the article "A" or the pronoun "I".
_AFTER_OPTION = frozenset(["according", "and", "as", "because", "but", "for", "from", "in", "or", "since", "which"])
_JOINT = re.compile(
    rf"{_MARKS}[)\]}}]?(?P<joint>,[ \t]*(?:or|and)\b|(?:and/or|or|and|OR|AND)\b|[,/&])"
    r"[ \t]*(?:(?:option|choice|letter)[ \t]+)?"
)
_NAMES_NO_MORE = re.compile(r"[*_)\]} \t]*(?:$|[\n.,;/&]|(?:or|and)\b)")
_ANSWER_IS = re.compile(
    r"(?:\b(?:answer|option|choice|(?:best|correct|right)[ \t]+one)(?:[ \t]+(?:choice|option|letter))?"
    r"(?:[ \t]+to[ \t]+(?:the|this)[ \t]+question)?"
    r"[\s*_\"']*(?:\b(?:is|(?:would|should|must|will)[ \t]+(?:(?:clearly|likely|most[ \t]+likely|then)[ \t]+)?be)\b"
    r"|[:=]|[ \t]-(?=[ \t]))|\b(?:correct|selected)[*_]*[:=])[\s*_:,]*"
    r"(?:not[ \t]+[*_(]*[A-Z][*_)]*,?[ \t]+but[ \t]+(?:rather[ \t]+)?)?"
    r"(?:(?:clearly|definitely|indeed|likely|most[ \t]+likely|probably|simply|therefore|thus)\b[\s,]*)*"
    r"(?P<noun>(?:the[ \t]+)?(?:letter|option|choice)\b[\s:]*)?",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"(?:^|[.!?:;,(]|\b(?:[Ss]o|[Tt]hus|[Tt]herefore|[Hh]ence|that|[Oo]ption|[Cc]hoice|[Ll]etter)\b)"
    r"[ \t*_\"'(\[]{0,6}(?P<letter>[A-Z])[)\]}*_\"']{0,6}[ \t]+is[ \t]+(?:(?:clearly[ \t]+)?(?:correct|right)\b"
    r"|(?:the|my)[ \t]+(?:(?:accurate|appropriate|best|correct|final|likely|most|only|right)[ \t]+)*"
    r"(?:answer|option|choice)\b)",
    re.MULTILINE,
)
# "Therefore, B." and "It's (B)", at a line's end: elsewhere a capital begins what follows, as in "So, A man runs".
_CONCLUDES = re.compile(
    r"\b(?i:so|thus|therefore|hence|it[ \t]+is|it's)[,:]?[ \t*_\"'(\[]{1,6}(?P<letter>[A-Z])[)\]}*_\"']{0,6}"
    r"(?=[.!]?[ \t*_]*$)",
    re.MULTILINE,
)
_CHOOSES = re.compile(
    r"\b(?:choose|go[ \t]+with|opt[ \t]+for|pick|select)[ \t]+(?:the[ \t]+)?"
    r"(?P<noun>(?:answer|choice|letter|option)\b[\s:]*)?",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|suppose|unless|whether)\s+(?:that\s+)?(?:the\s+)?(?:\w+\s+)?[*_(\[]*$", re.IGNORECASE)
_OPTION = re.compile(r"\b(?P<noun>option|choice|answer)[ \t]+", re.IGNORECASE)
_REFUSED_BEFORE = re.compile(
    r"\b(?:not|than|unlike|discard|eliminate|exclude|reject|rul(?:e|ed|es|ing)[ \t]+out)[ \t]+(?:the[ \t]+)?$",
    re.IGNORECASE,
)
_REFUSED_AFTER = re.compile(
    r"[*_\"' \t)\]}]*(?:\([^()\n]*\)[ \t]*)?(?:[\w']+[ \t]+){0,3}"
    r"(?:not|cannot|\w+n't|eliminated|excluded|false|incorrect|irrelevant|ruled[ \t]+out|unlikely|wrong)\b",
    re.IGNORECASE,
)


def _whole_letter(text: str, options: Mapping[str, str]) -> str | None:
    match = _WHOLE_LETTER.fullmatch(text)
    return match[1].upper() if match and match[1].upper() in options else None


def _leading_letter(text: str, options: Mapping[str, str]) -> str | None:
    lines = list(_LEADING_LETTER.finditer(text))
    if not lines or lines[0].start() > 0:
        return None
    letter, *others = [line["letter"].upper() for line in lines]
    if letter not in options or _is_option_text(text, lines[0].start("letter"), options):
        return None
    if any(other != letter and other in options for other in others):
        return None  # the options, listed or discussed one by one
    end = lines[0].end()
    if not _begins_with(text, end, options[letter]):
        _refuse_second_letter(text, end, letter, options)
        second = _WHOLE_LETTER.fullmatch(text, end)
        if second and second[1].upper() in options.keys() - {letter}:
            raise _Contradiction
    if _answer_statement(text, options) not in (None, letter):
        raise _Contradiction
    return letter


def _answer_statement(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the last statement that gives one."""
    statements = [
        *((match.start(), match.end(), match["noun"] is not None) for match in _ANSWER_IS.finditer(text)),
        *((match.start("letter"), match.start("letter"), True) for match in _IS_THE_ANSWER.finditer(text)),
        *((match.start(), match.start("letter"), True) for match in _CONCLUDES.finditer(text)),
        *(
            (match.start(), match.end(), match["noun"] is not None)
            for match in _CHOOSES.finditer(text)
            if not _REFUSED_BEFORE.search(text[max(0, match.start() - 40) : match.start()])
        ),
    ]
    for start, letter_start, follows_noun in sorted(statements, reverse=True):
        if _SUPPOSED.search(text[max(0, start - 40) : start]):
            continue
        found = _letter_at(text, letter_start, options, follows_noun)
        if found is not None:
            letter, end = found
            _refuse_second_letter(text, end, letter, options)
            if letter not in options:
                raise _Contradiction
            return letter
    return None


def _option_statement(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of all mentions of the form "option C" that are not refusals."""
    letters = set()
    for match in _OPTION.finditer(text):
        found = _letter_at(text, match.end(), options, match["noun"].lower() != "answer")
        if found is None or _REFUSED_BEFORE.search(text[max(0, match.start() - 40) : match.start()]):
            continue
        letter, end = found
        if not _REFUSED_AFTER.match(text, end):
            _refuse_second_letter(text, end, letter, options)
            letters.add(letter)
    if len(letters) > 1 or letters - options.keys():
        raise _Contradiction
    return letters.pop() if letters else None


def _letter_at(
    text: str, start: int, options: Mapping[str, str], follows_noun: bool = False
) -> tuple[str, int] | None:
    """The letter that names an option at `start`, and where it ends; None if it is a word ("A man") or absent."""
    match = _LETTER.match(text, start)
    if match is None:
        return None
    letter = match["letter"]
    if match["open"] is None:
        word = _NEXT_WORD.match(text, match.end())
        is_word = (
            word is not None
            and letter in ("ai" if follows_noun else "aiAI")
            and word[1].lower() not in _AFTER_OPTION
            and not _begins_with(text, word.start(1), options.get(letter.upper(), ""))
        )
        if is_word or _is_option_text(text, match.start("letter"), options):
            return None
    return letter.upper(), match.end()


def _refuse_second_letter(text: str, end: int, letter: str, options: Mapping[str, str]) -> None:
    """Raise if a letter is followed by another that is named along with it: "A or B", "A, B and C", "A/B"."""
    match = _JOINT.match(text, end)
    second = _letter_at(text, match.end(), options) if match else None
    if match and second and second[0] != letter and (match["joint"] != "," or _NAMES_NO_MORE.match(text, second[1])):
        raise _Contradiction


def _is_option_text(text: str, start: int, options: Mapping[str, str]) -> bool:
    """Whether an option of several words, as "C major" or "A man", stands at `start`: then its letter is a word."""
    return any(len(option.split()) > 1 and _begins_with(text, start, option) for option in options.values())


def _begins_with(text: str, start: int, option: str) -> bool:
    """Whether an option's text stands at `start`, apart from space before it and case."""
    words = r"\s+".join(map(re.escape, option.split()))
    return words != "" and re.compile(rf"\s*{words}(?!\w)", re.IGNORECASE).match(text, start) is not None


# -- option texts

_WORD = re.compile(
    r"(?<!\w)(?P<number>[+-]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+))(?P<percent>\s?%)?(?!\w)"
    r"|[^\W_]+(?:'[^\W_]+)*"
    r"|[+<=>\u00b1\u00d7\u00f7\u2260\u2264\u2265]"  # plus-minus, times, divided by, unequal, at most, at least
)
_NEGATIONS = frozenset(["cannot", "neither", "never", "nor", "not"])


def _whole_option(text: str, options: Mapping[str, str]) -> str | None:
    for same in (str.strip, _folded):  # so that options may differ in case alone
        letters = [letter for letter, option in options.items() if same(option) == same(text) != ""]
        if letters:
            return letters[0] if len(letters) == 1 else None
    return None


def _option_text(text: str, options: Mapping[str, str]) -> str | None:
    words = _words(text)
    places = {
        letter: _occurrences(words, _words(option))
        for letter, option in options.items()
        if len(option.strip()) > 1 or not option.strip().isalpha()  # "a" and "I" occur in any text
    }

    def counts(letter: str, start: int, end: int) -> bool:
        for other, others in places.items():
            if other != letter and any(a <= start and end <= b and b - a > end - start for a, b in others):
                return False
        before = words[max(0, start - 2) : start]
        while before and before[-1] in ("a", "an", "the"):
            before.pop()
        return not (before and (before[-1] in _NEGATIONS or before[-1].endswith("n't")))

    mentioned = [letter for letter, spans in places.items() if any(counts(letter, *span) for span in spans)]
    return mentioned[0] if len(mentioned) == 1 else None


def _occurrences(words: list[str], phrase: list[str]) -> list[tuple[int, int]]:
    size = len(phrase)
    if not phrase:
        return []
    return [(start, start + size) for start in range(len(words) - size + 1) if words[start : start + size] == phrase]


def _words(text: str) -> list[str]:
    """Words, numbers and signs of arithmetic, folded; a number in one form, whether written 3, 3.0 or +3."""
    words = []
    for match in _WORD.finditer(_folded(text)):
        number = match["number"]
        if number is None:
            words.append(match[0])
            continue
        whole, _, decimals = number.lstrip("+-").replace(",", "").partition(".")
        value = f"{whole.lstrip('0') or '0'}.{decimals}".rstrip("0").rstrip(".")
        sign = "-" if number[0] == "-" and value != "0" else ""
        words.append(sign + value + ("%" if match["percent"] else ""))
    return words


def _folded(text: str) -> str:
    """One way to write what differs in case, whitespace, width or the kind of apostrophe and minus."""
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS).casefold()
    return " ".join(text.split())


_RULES = {
    "whole_letter": _whole_letter,
    "whole_option": _whole_option,
    "leading_letter": _leading_letter,
    "answer_statement": _answer_statement,
    "option_statement": _option_statement,
    "option_text": _option_text,
}
