"""How a benchmark is read: what is particular to each is an `Adapter`, what all have in common is `load`."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from dataset_builder.schema import LETTERS, Rejected
from dataset_builder.sources.questions import answer_letter, strip_letters

from .base import Benchmark, Prompt, Question
from .files import Files, open_files


logger = logging.get_logger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Adapter:
    """What is particular to one benchmark.

    Args:
        dataset (`str`): Hub id.
        split (`str`): of it.
        tables (`Mapping[str, Sequence[str]]`): files of questions by task, "" for a table of all tasks: patterns of
            the end of a path, the first that fits any file is taken.
        read (`Callable`): `(row, table, row_idx, files, subtitles) -> Question`; `table` is a key of `tables`. It
            sets `video` as `Files.find` gives it, or `failure`. A `ValueError` says what is wrong with the row.
        counts (`Mapping[str, int]`): questions of each task, or of all under "".
        download (`Sequence[str]`): patterns of the Hub's files that are needed.
        revision (`str`, *optional*): on the Hub, where it is not the main one.
        num_options (`tuple[int, int]`): fewest and most options of a question.
        judged_tasks (`frozenset[str]`): tasks without options, whose answers a judge must score: loaded only if asked.
        mean_over, prompts, thinking_prompts: see `Benchmark`.
        subtitle_prompts (`Mapping[str, Callable]`): instead of `prompts` if subtitles are asked for; empty where the
            benchmark has no subtitles.
    """

    dataset: str
    split: str
    tables: Mapping[str, Sequence[str]]
    read: Callable[[Row, str, int, Files, bool], Question]
    counts: Mapping[str, int]
    download: Sequence[str]
    revision: str | None = None
    num_options: tuple[int, int] = (2, 6)
    judged_tasks: frozenset[str] = frozenset()
    mean_over: str | None = None
    prompts: Mapping[str, Callable[[Question], Prompt]] = field(default_factory=dict)
    thinking_prompts: Mapping[str, Callable[[Question], Prompt]] = field(default_factory=dict)
    subtitle_prompts: Mapping[str, Callable[[Question], Prompt]] = field(default_factory=dict)


def load(
    name: str,
    adapter: Adapter,
    dataset: str | None = None,
    data_root: str | None = None,
    revision: str | None = None,
    subtitles: bool = False,
    open_ended: bool = False,
    max_questions: int | None = None,
    allow_subset: bool = False,
    cache_dir: str | None = None,
) -> Benchmark:
    """Read a benchmark. See `load_benchmark` for the arguments."""
    # 1. Its files.
    tasks = [task for task in adapter.counts if open_ended or task not in adapter.judged_tasks]
    if subtitles and not adapter.subtitle_prompts:
        raise ValueError(f"{name} has no subtitles. Leave out --subtitles.")
    if dataset is None and data_root is not None:
        own = Path(data_root) / name
        dataset = str(own if own.is_dir() else data_root)
        if not Path(dataset).is_dir():
            raise ValueError(f"{name}: --data_root {data_root}: there is no such folder.")
    dataset = dataset or adapter.dataset
    if revision is None and not Path(dataset).is_dir():
        revision = adapter.revision
    files, commit = open_files(dataset, revision, adapter.download, Path(cache_dir) if cache_dir else None)
    # 2. Its questions, all of them.
    questions = []
    for table, patterns in adapter.tables.items():
        if table and table not in tasks:
            continue
        source, rows = files.table(patterns)
        for row_idx, row in enumerate(tqdm(rows, desc=name, unit="question", delay=10, disable=None)):
            try:
                question = adapter.read(row, table, row_idx, files, subtitles)
                if "" not in adapter.counts and question.task not in adapter.counts:
                    raise ValueError(f"saw task {question.task!r}, expected one of {', '.join(adapter.counts)}")
                _check_options(question, adapter)
            except (ValueError, KeyError, TypeError, AttributeError, Rejected) as error:
                column = f"it has no column {error}, but {', '.join(row)}" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"{name}, row {row_idx} of {source}: {column}. Check that this is the benchmark as published, or "
                    "give another revision."
                ) from error
            if "" in adapter.counts or question.task in tasks:
                questions.append(question)
    is_subset = _check_all(name, adapter, questions, tasks, allow_subset or max_questions is not None)
    if subtitles and not any(one.subtitles for one in questions):
        raise ValueError(f"{name}: --subtitles, but none was found in {files.root}. Download them too.")
    # 3. Those to be asked, and their media.
    if max_questions is not None and max_questions < len(questions):
        questions, is_subset = draw_questions(questions, max_questions), True
    missing = [one.failure for one in questions if one.failure]
    if len(missing) == len(questions):
        raise ValueError(
            f"{name}: none of the videos of {len(questions)} questions is in {files.root}, as {missing[0]!r}. Check "
            "that it is the benchmark's whole folder, its videos or their archives included."
        )
    if missing:
        logger.warning(f"{name}: {len(missing)} of {len(questions)} questions count as wrong, as {missing[0]!r}.")
    videos = [(one.video,) if isinstance(one.video, str) else one.video for one in questions]
    files.extract(str(path) for paths in videos for path in paths)
    return Benchmark(
        name=name,
        dataset=dataset,
        split=adapter.split,
        questions=questions,
        revision=commit,
        mean_over=adapter.mean_over,
        prompts=adapter.subtitle_prompts if subtitles else adapter.prompts,
        thinking_prompts=adapter.thinking_prompts,
        subtitles=subtitles,
        is_subset=is_subset,
    )


def draw_questions(questions: Sequence[Question], max_questions: int) -> list[Question]:
    """As many questions, drawn by their ids: the same in every run, in their own order.

    Raises:
        ValueError: if none is asked for.
    """
    if max_questions < 1:
        raise ValueError(f"--max_questions: saw {max_questions}, expected 1 or more.")
    drawn = sorted(questions, key=lambda one: hashlib.sha256(one.id.encode()).digest())[:max_questions]
    chosen = {one.id for one in drawn}
    return [one for one in questions if one.id in chosen]


def check_ids(name: str, questions: Sequence[Question]) -> None:
    """Each id once: results are kept and compared by it.

    Raises:
        ValueError: if an id repeats.
    """
    if repeated := [f"{one} ({count} times)" for one, count in Counter(q.id for q in questions).items() if count > 1]:
        raise ValueError(
            f"{name}: saw question id {repeated[0]} and {len(repeated) - 1} more like it, expected each once. The "
            "dataset was changed, or two copies of its files are in one folder."
        )


def _check_options(question: Question, adapter: Adapter) -> None:
    fewest, most = adapter.num_options
    assert not question.options or question.answer in question.options  # `read` takes it from there
    if not question.question.strip():
        raise ValueError("the question is empty")
    if question.task in adapter.judged_tasks:
        if not question.answer.strip():
            raise ValueError("the answer is empty")
    elif not fewest <= len(question.options) <= most:
        expected = fewest if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"saw {len(question.options)} options, expected {expected}")
    elif not all(text.strip() for text in question.options.values()):
        raise ValueError(f"saw options {dict(question.options)}, expected none of them empty")


def _check_all(
    name: str, adapter: Adapter, questions: Sequence[Question], tasks: Sequence[str], allow_subset: bool
) -> bool:
    """Whether questions are fewer than they should be, which is an error unless allowed."""
    check_ids(name, questions)
    seen = Counter("" if "" in adapter.counts else one.task for one in questions)
    wrong = {task: seen[task] for task in tasks if seen[task] != adapter.counts[task]}
    if not questions or (wrong and not allow_subset):
        told = ", ".join(
            f"{count}{f' of {task}' if task else ''} instead of {adapter.counts[task]}"
            for task, count in wrong.items()
        )
        raise ValueError(
            f"{name}: saw {told} questions. The dataset was changed, or this is not the whole of it: download it "
            "again, give another revision, or --allow_subset to evaluate what is there."
        )
    return bool(wrong)


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """Options by letter, their own letters stripped: `["A. red", "B. blue"]` -> `{"A": "red", "B": "blue"}`."""
    texts = strip_letters([str(text) for text in texts])
    if not 0 < len(texts) <= len(LETTERS):
        raise ValueError(f"saw {len(texts)} options, expected 1 to {len(LETTERS)}")
    return dict(zip(LETTERS, texts))


def letter_answer(answer: str, options: Mapping[str, str]) -> str:
    """The letter of an answer that is given as "B", "(B)" or "B. text".

    Raises:
        Rejected: if it names no option.
    """
    letter = str(answer).strip().strip("().:")
    # In brackets it can't be an option's text, as where option C is "A".
    return answer_letter(f"({letter})" if len(letter) == 1 else str(answer), list(options.values()))


def text_answer(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the first option whose text is the answer.

    Raises:
        ValueError: if none is.
    """
    for letter, text in options.items():
        if text.strip() == str(answer).strip():
            return letter
    raise ValueError(f"saw answer {str(answer)[:80]!r}, expected one of {list(options.values())}")


def index_answer(index: int | str, options: Mapping[str, str]) -> str:
    """The letter of an option given by its place, from 0.

    Raises:
        ValueError: if there is none in that place.
    """
    if not str(index).strip().isdigit() or int(index) >= len(options):
        raise ValueError(f"saw answer {index!r}, expected an index from 0 to {len(options) - 1}")
    return LETTERS[int(index)]


def located(files: Files, path: str) -> dict[str, Any]:
    """`video`, or `failure`, of a question about a file."""
    found = files.find(path)
    return {"failure": f"missing video: {path}"} if found is None else {"video": found}


def option_lines(question: Question, style: str = "{letter}. {text}") -> str:
    """A line for each option."""
    return "\n".join(style.format(letter=letter, text=text) for letter, text in question.options.items())
