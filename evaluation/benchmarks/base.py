"""What every benchmark is read into: questions with their media, options, categories and what may be wrong."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Subtitle:
    """One line of speech, with its seconds from the video's first frame."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id (`str`): unique within its benchmark.
        question (`str`): without options.
        answer (`str`): the letter of the right option, or the text of a free-form answer.
        options (`Mapping[str, str]`): from letter to text, letters from "A" on; empty for a free-form question.
        video_id (`str`): questions about the same video share it; what they have in common is one draw of the dice.
        video (`str`, `bytes` or `tuple[str, ...]`): a file's path, a file's bytes, or frame files in order.
        video_fps (`float`, *optional*): of frame files, which carry none; 0 for a file.
        start, end (`float`, *optional*): the part of the video that is asked about, in seconds.
        categories (`Mapping[str, str]`): by which accuracies are reported, for example `{"duration": "short"}`.
        subtitles (`tuple[Subtitle, ...]`): of the video, if it has any and they were asked for.
        task (`str`): where a benchmark's prompt or score depends on it.
        failure (`str`): why it can't be asked, as a missing file; empty if it can. Such a question stays in every
            count, as wrong, and is never asked without its video.
        full_text (`str`): question and options as the benchmark writes them, where its own prompt shows them so.
        labels (`Mapping[str, str]`): what `full_text` calls an option, where that is no letter: `{"A": "Option 1"}`.
        judge_question (`str`): what a judge asks of the model's text, where that is not `question`: of a caption, what
            is to be read in it.
    """

    id: str
    question: str
    answer: str
    options: Mapping[str, str] = field(default_factory=dict)
    video_id: str = ""
    video: str | bytes | tuple[str, ...] = ""
    video_fps: float = 0.0
    start: float | None = None
    end: float | None = None
    categories: Mapping[str, str] = field(default_factory=dict)
    subtitles: tuple[Subtitle, ...] = ()
    task: str = ""
    failure: str = ""
    full_text: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    judge_question: str = ""

    def with_letters(self, text: str) -> str:
        """A model's text with letters in the place of the benchmark's own labels: "Option 2" -> "Option B"."""
        letters = {label.casefold(): letter for letter, label in self.labels.items()}
        if not letters:
            return text
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, letters))})\b", re.IGNORECASE)
        return pattern.sub(lambda found: f"Option {letters[found[0].casefold()]}", text)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked with.

    Args:
        text (`str`): placed after the video.
        system (`str`): a system message; empty for the chat template's own.
    """

    text: str
    system: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's questions and how its result is named.

    Args:
        name (`str`): as on the command line.
        dataset (`str`): Hub id or folder that the questions came from.
        split (`str`): of it.
        questions (`Sequence[Question]`): all of them, those that can't be asked included.
        revision (`str`, *optional*): commit of the dataset; None for a folder.
        mean_over (`str`, *optional*): category whose values' accuracies are averaged into the headline figure, as
            MVBench's tasks; None for plain accuracy.
        prompts (`Mapping[str, Callable]`): the benchmark's own, by name: `"official"`, `"lmms_eval"`. Each maps a
            `Question` to its `Prompt`.
        thinking_prompts (`Mapping[str, Callable]`): the same, of those that ask for a chain of thought.
        subtitles (`bool`): whether subtitles were asked for; a video may still have none.
        is_subset (`bool`): whether these are not all of the benchmark's questions: no result to compare with others'.
    """

    name: str
    dataset: str
    split: str
    questions: Sequence[Question]
    revision: str | None = None
    mean_over: str | None = None
    prompts: Mapping[str, Callable[[Question], Prompt]] = field(default_factory=dict)
    thinking_prompts: Mapping[str, Callable[[Question], Prompt]] = field(default_factory=dict)
    subtitles: bool = False
    is_subset: bool = False
