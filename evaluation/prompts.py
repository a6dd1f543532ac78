"""How a question reads, in training and in evaluation alike."""

from collections.abc import Sequence

from dataset_builder.schema import LETTERS


def storms_prompt(question: str, options: Sequence[str]) -> str:
    """The text of a question: the question, a line for each option, and how to answer.

    Args:
        question (`str`): without options.
        options (`Sequence[str]`): texts without letters, in order A, B, ...; empty for a free-form question.

    Raises:
        ValueError: if there is one option only, or more than `LETTERS` names: no letter would stand for it.
    """
    if not options:
        return f"{question.strip()}\nAnswer with a word or a short phrase."
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(
            f"Saw {len(options)} options for the question {question[:80]!r}, expected 2 to {len(LETTERS)}, or none "
            "for a free-form question."
        )
    lines = [f"{letter}. {' '.join(option.split())}" for letter, option in zip(LETTERS, options)]
    return "\n".join([question.strip(), *lines, "Answer with the letter of the right option."])
