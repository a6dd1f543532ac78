"""How a question reads, in training and in evaluation alike, and by the names under which others report results."""

from collections.abc import Sequence
from dataclasses import replace

from dataset_builder.schema import LETTERS
from modeling_storms.processing_storms import LATENT_TOKENS

from .benchmarks.base import Benchmark, Prompt, Question


# Tokens that mark turns, media and blocks. In a question's text they would be taken for such.
RESERVED = (
    *LATENT_TOKENS,
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
PROMPTS = ("storms", "official", "lmms_eval", "video_r1")

# Video-R1's `src/eval_bench.py` (arXiv 2503.21776).
VIDEO_R1 = (
    "{question}\n"
    "Please think about this question as if you were a human pondering deeply. "
    "Engage in an internal dialogue using expressions such as 'let me think', 'wait', 'Hmm', 'oh, I see', "
    "'let's break it down', etc, or other natural language thought expressions "
    "It's encouraged to include self-reflection or verification in the reasoning process. "
    "Provide your detailed reasoning between the <think> and </think> tags, and then give your final answer between "
    "the <answer> and </answer> tags."
)
VIDEO_R1_CHOICE = (
    " Please provide only the single option letter (e.g., A, B, C, D, etc.) within the <answer> </answer> tags."
)
VIDEO_R1_TEXT = " Please provide your text answer within the <answer> </answer> tags."

THINK_CHOICE = "Think step by step first. Then end with a line that reads 'Answer: X', where X is that letter."
THINK_TEXT = "Think step by step first. Then end with the answer alone between <answer> and </answer>."


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


def prompt_names(benchmark: Benchmark, thinking: bool = False) -> list[str]:
    """The prompts that a benchmark can be asked with."""
    own = benchmark.thinking_prompts if thinking else benchmark.prompts
    return ["storms", *(["video_r1"] if thinking else []), *own]


def prompt_text(
    benchmark: Benchmark,
    question: Question,
    name: str,
    thinking: bool = False,
    frame_times: Sequence[float] | None = None,
) -> Prompt:
    """What a question is asked with.

    Args:
        benchmark (`Benchmark`): of the question.
        question (`Question`): to ask.
        name (`str`): `"storms"`, as in training; `"official"` or `"lmms_eval"`, the benchmark's own; `"video_r1"`,
            Video-R1's, which always thinks.
        thinking (`bool`): ask for a chain of thought before the answer.
        frame_times (`Sequence[float]`, *optional*): seconds of the frames that the model sees. Of the subtitles, if
            the question has any, those are shown that are spoken then, as Video-MME prescribes; all by default.

    Raises:
        ValueError: if the benchmark has no such prompt. It names those that it has.
    """
    if frame_times is not None:
        shown = (one for one in question.subtitles if any(one.start <= time < one.end for time in frame_times))
        question = replace(question, subtitles=tuple(shown))
    names, others = prompt_names(benchmark, thinking), prompt_names(benchmark, not thinking)
    if name not in names:
        with_it, without_it = ("with", "without") if thinking else ("without", "with")
        hint = f", and {name} {without_it} it" if name in others else ""
        raise ValueError(
            f"{benchmark.name} has no prompt {name!r} {with_it} thinking: there are {', '.join(names)}{hint}."
        )
    if name == "storms":
        return Prompt(_subtitle_lines(question) + _storms_text(question, thinking))
    if name == "video_r1":
        return Prompt(_subtitle_lines(question) + _video_r1_text(question))
    return (benchmark.thinking_prompts if thinking else benchmark.prompts)[name](question)


def _subtitle_lines(question: Question) -> str:
    spoken = "".join(f"{subtitle.text}\n" for subtitle in question.subtitles)
    return f"This video's subtitles are listed below:\n{spoken}" if spoken else ""


def _storms_text(question: Question, thinking: bool) -> str:
    if question.judge_question:
        return question.question  # it says itself what to write, as a caption
    text = storms_prompt(question.question, list(question.options.values()))
    return f"{text}\n{THINK_CHOICE if question.options else THINK_TEXT}" if thinking else text


def _video_r1_text(question: Question) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in question.options.items())
    asked = f"{question.question}Options:\n{options}" if options else question.question
    return VIDEO_R1.format(question=asked) + (VIDEO_R1_CHOICE if options else VIDEO_R1_TEXT)
