"""MMVU (arXiv 2501.12380), validation: expert-level questions on 27 subjects, 625 with five options and 375 open.

The open ones are scored by a judge, and so are loaded only if asked for (task `open-ended`).
"""

from .adapter import Adapter, Row, letter_answer, located, option_lines
from .base import Prompt, Question
from .files import Files


def read(row: Row, table: str, row_idx: int, files: Files, subtitles: bool) -> Question:
    task = row["question_type"]
    options = {letter: text.strip() for letter, text in row["choices"].items()} if task == "multiple-choice" else {}
    subject = row.get("subject") or row["metadata"]["subject"]
    # An address on the Hub, or a path: `videos/Art/0.mp4` is what they have in common.
    path = row["video"]
    path = path[path.index("videos/") :] if "videos/" in path else path
    return Question(
        id=row["id"],
        question=row["question"].strip(),
        answer=letter_answer(row["answer"], options) if options else row["answer"].strip(),
        options=options,
        video_id=path,
        task=task,
        categories={"subject": subject},
        **located(files, path),
    )


def official(question: Question) -> Prompt:
    """The repository's prompt for direct output."""
    if not question.options:
        return Prompt(
            f"\nQuestion: {question.question}\n\n"
            "Do not generate any intermediate reasoning process. Directly output the final short answer.\n"
        )
    return Prompt(
        f"\nQuestion: {question.question}\n{option_lines(question, '{letter}: {text}')}\n\n"
        "Do not generate any intermediate reasoning process. Answer directly with the option letter from the given "
        "choices.\n"
    )


def official_thinking(question: Question) -> Prompt:
    """The repository's prompt for a chain of thought."""
    if not question.options:
        return Prompt(
            f"\nQuestion: {question.question}\n\n"
            "Answer the given question step by step. Begin by explaining your reasoning process clearly. Conclude by "
            "stating the final answer using the following format: 'Therefore, the final answer is: 'Answer: $ANSWER' "
            "(without quotes), where $ANSWER is the final answer of the question. Think step by step\n"
            "before answering."
        )
    return Prompt(
        f"\nQuestion: {question.question}\n{option_lines(question, '{letter}: {text}')}\n\n"
        "Answer the given multiple-choice question step by step. Begin by explaining your reasoning process clearly. "
        "Conclude by stating the final answer using the following format: 'Therefore, the final answer is: $LETTER' "
        "(without quotes), where $LETTER is one of the options. Think step by\nstep before answering."
    )


def lmms_eval(question: Question) -> Prompt:
    """Its task `mmvu_val`."""
    if not question.options:
        ask = "Do not generate any intermediate reasoning process. Directly output the final answer.\n"
        return Prompt(f"\nQuestion:{question.question}\nVisual Information: processed video\n{ask}")
    return Prompt(
        f"\nQuestion:{question.question}\n{option_lines(question, '{letter}: {text}')}\n"
        "Visual Information: processed video\n"
        "Do not generate any intermediate reasoning process. Answer directly with the option letter from the\n"
        "given choices.\n"
    )


def lmms_eval_thinking(question: Question) -> Prompt:
    """Its task `mmvu_val_cot`."""
    if not question.options:
        return Prompt(
            f"\nQuestion:{question.question}\nVisual Information: processed video\n"
            "Answer the given question step by step. Begin by explaining your reasoning process clearly. Conclude\n"
            'by stating the final answer using the following format: "Therefore, the final answer is: "Answer:\n'
            '$ANSWER" (without quotes), where $ANSWER is the final answer of the question. Think step by\n'
            "step before answering.\n"
        )
    return Prompt(
        f"\nQuestion:{question.question}\n{option_lines(question, '{letter}: {text}')}\n"
        "Visual Information: processed video\n"
        "Answer the given multiple-choice question step by step. Begin by explaining your reasoning process\n"
        'clearly. Conclude by stating the final answer using the following format: "Therefore, the final answer\n'
        'is: $LETTER" (without quotes), where $LETTER is one of the options. Think step by step before\n'
        "answering.\n"
    )


ADAPTER = Adapter(
    dataset="yale-nlp/MMVU",
    split="validation",
    tables={"": ("validation.json", "validation-*.parquet", "validation.jsonl")},
    read=read,
    counts={"multiple-choice": 625, "open-ended": 375},
    download=("*validation*", "videos/*"),
    num_options=(5, 5),
    judged_tasks=frozenset({"open-ended"}),
    prompts={"official": official, "lmms_eval": lmms_eval},
    thinking_prompts={"official": official_thinking, "lmms_eval": lmms_eval_thinking},
)
