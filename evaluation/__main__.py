"""Scores a checkpoint on video benchmarks, and says what was really shown to it.

    python -m evaluation --model org/storms-7b --benchmarks videomme,mvbench --frames 32 --output results
    python -m evaluation --model Qwen/Qwen2.5-VL-7B-Instruct --benchmarks mmvu --thinking --output results
    python -m evaluation --model storms --benchmarks thoughts --latent_mode off,force --latent_size 4,8
    accelerate launch -m evaluation --model org/storms-7b --benchmarks videomme --output results

The model may be a STORMS or a plain Qwen2.5-VL checkpoint. Benchmarks come from the Hub, or from folders of the same
layout under --data_root; a name with a slash, or that is a folder, is a dataset of `dataset_builder`'s schema. Each
combination of --latent_mode and --latent_size is a run of its own, with a JSON file of all its answers. The same
command goes on where a killed one stopped: an answer that is there is not asked for again, and what failed is tried
again. A model, prompt or protocol of its own needs an --output of its own.
"""

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from model_card.push import write_whole
from model_card.render import public_name
from modeling_storms.latent_storms import LatentOptions

from .answering import Answerer, checkpoint_stamp, load_model
from .benchmarks import BENCHMARKS, load_benchmark
from .benchmarks.base import Benchmark
from .judge import Judge, JudgeError, judge_answers
from .prompts import PROMPTS
from .protocols import Protocol
from .report import print_table, public_command, summarise
from .runner import Item, Journal, costs, run


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a STORMS or Qwen2.5-VL checkpoint."})
    benchmarks: str = field(
        metadata={
            "help": "Names, separated by commas: "
            f"{', '.join(BENCHMARKS)}; a dataset's folder or Hub id, also as simulated=FOLDER."
        }
    )
    output: str = _option("results", "Folder of the JSON files, and of what a killed run goes on from.")
    revision: str | None = _option(None, "Commit, tag or branch of --model on the Hub.")
    data_root: str | None = _option(None, "Folder that holds a folder for each benchmark; the Hub by default.")
    benchmark_revision: str | None = _option(
        None, "Commit, tag or branch of the benchmark on the Hub; with it, ask one benchmark at a time."
    )
    split: str | None = _option(None, "Split of datasets of the builder's schema (test).")
    video_root: str | None = _option(None, "Folder of the videos that such a dataset names by path.")
    max_questions: int | None = _option(None, "Draw so many of each benchmark, the same in every run.")
    allow_subset: bool = _option(False, "Accept a folder with fewer or more questions than the benchmark has.")
    subtitles: bool = _option(False, "Show subtitles, where a benchmark has them.")
    open_ended: bool = _option(False, "Also ask what only a judge can score. Needs --judge_model.")
    judge_model: str | None = _option(None, "Model that judges free-form answers, instead of comparing texts.")
    judge_base_url: str | None = _option(
        None, "OpenAI-compatible server of the judge, with /v1. Its key is read from OPENAI_API_KEY."
    )
    frames: int | None = _option(None, "Short for --protocol uniformN.")
    protocol: str | None = _option(None, "Which frames: uniform32 (default), fps2_max32, with any numbers.")
    min_frame_pixels: int | None = _option(None, "Least area of a frame; the checkpoint's own by default.")
    max_frame_pixels: int | None = _option(None, "Largest area of a frame; the checkpoint's own by default.")
    prompt: str = _option("storms", f"How questions are put: {', '.join(PROMPTS)}.")
    thinking: bool = _option(False, "Let the model write its reasoning before the answer (chain of thought).")
    max_new_tokens: int | None = _option(None, "Longest answer; blocks come on top (32; 1024 with --thinking).")
    latent_mode: str | None = _option(None, "off, force, auto, or several with commas; the checkpoint's by default.")
    latent_size: str | None = _option(None, "Slots of a block, or several with commas; the checkpoint's by default.")
    latent_stop: str | None = _option(None, "budget or token; the checkpoint's by default.")
    batch_size: int = _option(8, "Questions at once.")
    num_workers: int = _option(4, "Processes that decode videos; 0 decodes between batches.")
    share_prefix: bool = _option(True, "Encode a video once for all questions about it.")
    dtype: str = _option("auto", "Type of the weights: auto, float32, bfloat16.")
    attention: str | None = _option(None, "sdpa, eager or flash_attention_2; transformers' choice by default.")

    def __post_init__(self):
        if self.frames is not None and self.protocol is not None:
            raise ValueError(f"--frames {self.frames} and --protocol {self.protocol} both say which frames: give one.")
        self.protocol = self.protocol or f"uniform{32 if self.frames is None else self.frames}"
        if self.prompt not in PROMPTS:
            raise ValueError(f"--prompt: saw {self.prompt!r}, expected one of {', '.join(PROMPTS)}.")
        if self.benchmark_revision is not None and len(_names(self.benchmarks)) > 1:
            raise ValueError(f"--benchmark_revision {self.benchmark_revision}: give one benchmark, each has its own.")
        for options in self.latent_settings():
            LatentOptions(**options)
        if self.open_ended and self.judge_model is None:
            raise ValueError("--open_ended asks questions that a judge must score. Name one by --judge_model.")
        for name in ("max_questions", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name}: saw {value}, expected 1 or more.")
        if self.max_new_tokens is None:
            self.max_new_tokens = 1024 if self.thinking else 32

    def latent_settings(self) -> list[dict[str, Any]]:
        """Options of `generate` for each run of the sweep; only what was given.

        Raises:
            ValueError: if a size is no number.
        """
        modes: list[str | None] = [None] if self.latent_mode is None else list(_names(self.latent_mode))
        sizes: list[int | None] = [None]
        if self.latent_size is not None:
            try:
                sizes = [int(size) for size in _names(self.latent_size)]
            except ValueError:
                raise ValueError(f"--latent_size: saw {self.latent_size!r}, expected numbers like 4,8.") from None
        settings: list[dict[str, Any]] = []
        for mode, size in product(modes, sizes):
            options: dict[str, Any] = {"latent_mode": mode}
            options |= {} if mode == "off" else {"latent_size": size, "latent_stop": self.latent_stop}
            options = {name: value for name, value in options.items() if value is not None}
            if options not in settings:  # off has no sizes
                settings.append(options)
        return settings


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def load_benchmarks(arguments: EvaluationArguments) -> list[Benchmark]:
    """The benchmarks that were asked for.

    Raises:
        ValueError: see `load_benchmark`; or if two have one name, by which answers are kept apart.
    """
    benchmarks = [
        load_benchmark(
            name,
            data_root=arguments.data_root,
            revision=arguments.benchmark_revision,
            subtitles=arguments.subtitles,
            open_ended=arguments.open_ended,
            split=arguments.split,
            video_root=arguments.video_root,
            max_questions=arguments.max_questions,
            allow_subset=arguments.allow_subset,
        )
        for name in _names(arguments.benchmarks)
    ]
    names = [benchmark.name for benchmark in benchmarks]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"--benchmarks {arguments.benchmarks}: saw the names {', '.join(names) or 'of none'}, expected at least "
            "one and each once. Evaluate datasets of one name in runs of their own."
        )
    return benchmarks


def check_output(path: Path, settings: dict[str, Any], names: Sequence[str]) -> None:
    """Whether a run's file may be written.

    Raises:
        ValueError: if another run's results are there, which would be lost.
    """
    if not path.exists():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(settings))
    unlike = [name for name in asked if earlier["settings"].get(name) != asked[name]]
    unlike += sorted({one["benchmark"] for one in earlier["results"]} - set(names))
    if unlike:
        raise ValueError(
            f"{path} holds the results of another run ({', '.join(unlike)}). Give another --output, or remove it."
        )


def label(options: dict[str, Any]) -> str:
    """A run's name by its latent options: `force-k8`, `off`, `default`."""
    size = f"k{options['latent_size']}" if "latent_size" in options else ""
    parts = (options.get("latent_mode"), size, options.get("latent_stop"))
    return "-".join(part for part in parts if part) or "default"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(EvaluationArguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses(given)
    protocol = Protocol.named(
        arguments.protocol, min_frame_pixels=arguments.min_frame_pixels, max_frame_pixels=arguments.max_frame_pixels
    )
    sweep = arguments.latent_settings()
    # Others wait while the main process downloads or a judge judges, and for the one with the longest videos: hours,
    # not NCCL's ten minutes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    with state.main_process_first():  # downloads and unpacks
        benchmarks = load_benchmarks(arguments)
    model, processor = load_model(arguments.model, arguments.revision, arguments.dtype, arguments.attention)
    model.to(state.device)
    stamp = checkpoint_stamp(arguments.model, model)
    prompt = f"{arguments.prompt}{', thinking' * arguments.thinking}{', subtitles' * arguments.subtitles}"
    command = public_command("evaluation", given)
    output = Path(arguments.output)
    results: list[dict[str, Any]] = []
    totals: list[tuple[str, dict[str, float]]] = []
    for options in sweep:
        answerer = Answerer(model, processor, arguments.max_new_tokens, arguments.batch_size, **options)
        latent = answerer.latent_options()
        settings = {
            "model": public_name(arguments.model),
            "revision": arguments.revision,
            "stamp": stamp,
            "protocol": asdict(protocol),
            "frame_pixels": protocol.frame_size(processor.video_processor.size),
            "prompt": prompt,
            "max_new_tokens": arguments.max_new_tokens,
            "latent": latent,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        path = output / f"{label(options)}.json"
        check_output(path, settings, [benchmark.name for benchmark in benchmarks])
        # 1. Answers, all benchmarks together.
        items = [
            Item(benchmark, question, arguments.prompt, arguments.thinking, json.dumps(settings, sort_keys=True))
            for benchmark in benchmarks
            for question in benchmark.questions
        ]
        journal = Journal(output / ".answers", state.process_index)
        answers = run(answerer, items, protocol, journal, arguments.num_workers, arguments.share_prefix, state)
        if not state.is_main_process:
            continue
        # 2. Figures, a benchmark at a time.
        mode = latent.get("latent_mode", "none")
        mode += f" {latent['latent_size']}" if "latent_size" in latent else ""
        entries, scored = [], []
        for benchmark in benchmarks:
            own = [answer for answer in answers if answer["benchmark"] == benchmark.name]
            verdicts = None
            if arguments.judge_model is not None:
                judge = Judge(arguments.judge_model, output / ".answers" / "judge.jsonl", arguments.judge_base_url)
                own, verdicts = judge_answers(judge, benchmark, own)
            entries.append(summarise(benchmark, own, protocol.name, prompt, mode, command, verdicts))
            scored += own
        body = {"results": entries, "settings": settings, "costs": costs(scored), "answers": scored}
        write_whole(path, json.dumps(body, indent=2) + "\n")
        results += entries
        totals.append((str(path), costs(scored)))
    if state.is_main_process:
        print_table(results)
        _print_costs(totals)
    return results


def _print_costs(totals: Sequence[tuple[str, dict[str, float]]]) -> None:
    table = Table("answers in", "questions/s", "s/question", "median latency", "video tokens", "if not shared")
    table.caption = "Seconds of the model alone, on one device."
    for path, one in totals:
        if one:
            figures = [one[name] for name in ("questions_per_second", "seconds_per_question", "latency_median")]
            tokens = [f"{one[name]:.0f}" for name in ("video_tokens", "video_tokens_unshared")]
            table.add_row(path, *(f"{figure:.3g}" for figure in figures), *tokens)
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, JudgeError) as error:
        raise SystemExit(f"Error: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"Error: {error} Lower --batch_size, --frames or --max_frame_pixels. Answers so far are kept: the same "
            "command goes on from there with another --batch_size."
        ) from error
