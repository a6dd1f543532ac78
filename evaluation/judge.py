"""Free-form answers judged by a named model behind an OpenAI-compatible server.

Who judged, by which prompt, and how often it failed is part of the result. A reply without a readable verdict is asked
for again, then counted as a failure: none is guessed. Verdicts are kept in a file, so no answer is judged twice. Needs
the extra `openai` (pip install "storms[openai]").
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from tqdm.auto import tqdm

from dataset_builder.schema import Rejected
from dataset_builder.teacher import OpenAITeacher, Reply, TeacherSetupError, ask_until_valid

from .benchmarks.base import Benchmark
from .parsing import parse_free_form


PROMPT = (Path(__file__).parent / "judge_prompt.txt").read_text(encoding="utf-8")
# Reasons for which the next answer would not be judged either.
STOPPING = ("teacher_unreachable", "teacher_rate_limited")


class JudgeError(RuntimeError):
    """The judge can't work as things are (key, model, address, credit). Verdicts given so far are kept."""


@dataclass(frozen=True)
class JudgedAnswer:
    """What the judge sees of an answer. `correction` says what was wrong with its own last reply."""

    question: str
    reference: str
    answer: str
    correction: str = ""


class _Client(OpenAITeacher):
    """The teacher's client, with its retries and its care for the key, asked for a verdict."""

    def verdict(self, answer: Any) -> Reply:
        return self._ask("verdict", Literal["correct", "incorrect"], PROMPT, answer)

    def _content(self, task: str, request: Any) -> list[dict[str, Any]]:
        data = asdict(request)
        correction = data.pop("correction")
        texts = [json.dumps(data, ensure_ascii=False)]
        if correction:
            texts.append(f"Your last reply could not be used: {correction}. Reply again without this fault.")
        return [{"type": "text", "text": text} for text in texts]


class Judge:
    """A model that says whether free-form answers agree with their references.

    Args:
        model (`str`): model id, as the server knows it.
        cache (`str` or `Path`): JSONL file of verdicts, made if missing. A line cut off by a kill is ignored.
        base_url (`str`, *optional*): the server, with `/v1`; the client's default.
        api_key_env (`str`): name of the environment variable that holds the key, the only place it is read from.
        max_attempts (`int`): replies to ask for until one has a verdict.
        concurrency (`int`): answers that are judged at once.
        client: `timeout`, `max_retries`, `temperature` and `seed` of `OpenAITeacher`.

    Raises:
        ValueError: if an argument can't work.
    """

    def __init__(
        self,
        model: str,
        cache: str | Path,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_attempts: int = 3,
        concurrency: int = 8,
        **client: Any,
    ):
        if max_attempts < 1 or concurrency < 1:
            raise ValueError(f"Saw max_attempts={max_attempts}, concurrency={concurrency}, expected 1 or more.")
        self.cache, self.max_attempts, self.concurrency = Path(cache), max_attempts, concurrency
        self._client = _Client(model, base_url, api_key_env, **client)

    def settings(self) -> dict[str, Any]:
        """What decides its verdicts: no address, no key."""
        client = self._client.settings()
        prompt_hash = hashlib.sha256(PROMPT.encode()).hexdigest()
        return {**{name: client[name] for name in ("model", "temperature", "seed")}, "prompt_sha256": prompt_hash}

    def judge(self, answers: Sequence[JudgedAnswer]) -> tuple[list[bool | None], dict[str, Any]]:
        """Judge answers, asking about those that have no verdict in the cache.

        Args:
            answers (`Sequence[JudgedAnswer]`): blank ones are wrong, and nobody is asked about them.

        Returns:
            `tuple`: for each answer True, False, or None where the judge failed (it is asked again next time); and for
            the run's result `settings()`, `num_judged`, `num_failures` and `failures` by reason.

        Raises:
            JudgeError: if the rest could not be judged either. The same command goes on from there.
        """
        settings = self.settings()
        keys = [_key(settings, answer) for answer in answers]
        verdicts = read_verdicts(self.cache)
        asked = {key: one for key, one in zip(keys, answers) if one.answer.strip() and key not in verdicts}
        failures: dict[str, Rejected] = {}
        lock = Lock()
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("ab") as file, ThreadPoolExecutor(self.concurrency) as pool:
            if self.cache.stat().st_size and not self.cache.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # after a torn line, the next verdict begins on a line of its own

            def ask(key: str) -> None:
                request: Any = asked[key]
                try:
                    verdict, _ = ask_until_valid(self._client.verdict, request, str, self.max_attempts)
                except Rejected as failure:
                    if failure.reason in STOPPING:
                        raise
                    failures[key] = failure
                    return
                record = {"key": key, "verdict": verdict, **settings, **asdict(request)}
                with lock:
                    verdicts[key] = verdict
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    file.flush()

            try:
                for _ in tqdm(pool.map(ask, asked), "judge", len(asked), unit=" answers", disable=None):
                    pass
            except (Rejected, TeacherSetupError) as error:
                raise self._error(str(error)) from None
        if asked and not verdicts.keys() & set(keys) and all(one.transient for one in failures.values()):
            raise self._error(f"no answer got a verdict, the last for {list(failures.values())[-1]}")
        reasons = Counter(failures[key].reason.removeprefix("teacher_") for key in keys if key in failures)
        judged = [_verdict(verdicts.get(key)) if one.answer.strip() else False for key, one in zip(keys, answers)]
        report = {"num_judged": len(answers), "num_failures": judged.count(None), "failures": dict(reasons)}
        return judged, {**settings, **report}

    def _error(self, told: str) -> JudgeError:
        told = told.replace("The teacher's", "The judge's").replace("teacher_", "").rstrip(".")
        return JudgeError(
            f"{self.settings()['model']} can't judge: {told}. Verdicts given so far are in {self.cache}: nothing is "
            "lost, and the same command goes on from there."
        )


def judge_answers(
    judge: Judge, benchmark: Benchmark, answers: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Judge a run's free-form answers.

    Args:
        benchmark (`Benchmark`): with their questions.
        answers (`Sequence[Mapping]`): a run's, as in its file; those with options, and those that failed or could not
            be parsed, stay as they are.

    Returns:
        `tuple`: the answers, with `is_correct` and `rule` ("judge", or "judge_failed", which is wrong) where judged;
        and who judged, for `summarise`, or None if there was nothing to judge.

    Raises:
        JudgeError: see `Judge.judge`.
    """
    questions = {one.id: one.judge_question or one.question for one in benchmark.questions}
    judged = [dict(answer) for answer in answers]
    open_ended = [one for one in judged if not one["num_options"] and one["is_parsed"] and not one["failure"]]
    if not open_ended:
        return judged, None
    verdicts, report = judge.judge(
        [JudgedAnswer(questions[one["id"]], one["answer"], parse_free_form(one["text"])) for one in open_ended]
    )
    for answer, verdict in zip(open_ended, verdicts):
        answer["is_correct"], answer["rule"] = verdict is True, "judge_failed" if verdict is None else "judge"
    return judged, report


def read_verdicts(path: Path) -> dict[str, str]:
    """The verdicts of a cache by key, but for lines that a kill has torn."""
    verdicts = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
            verdicts[record["key"]] = record["verdict"]
        except (ValueError, TypeError, KeyError):
            continue
    return {key: verdict for key, verdict in verdicts.items() if verdict in ("correct", "incorrect")}


def _key(settings: Mapping[str, Any], answer: JudgedAnswer) -> str:
    return hashlib.sha256(json.dumps([settings, asdict(answer)], sort_keys=True).encode()).hexdigest()


def _verdict(verdict: str | None) -> bool | None:
    return None if verdict is None else verdict == "correct"
