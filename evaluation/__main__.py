"""Scores a checkpoint on video benchmarks, and says what was really shown to it.

    python -m evaluation --model org/storms-7b --benchmarks videomme,mvbench --frames 32 --output results
    python -m evaluation --model Qwen/Qwen2.5-VL-7B-Instruct --benchmarks mmvu --thinking --output results
    python -m evaluation --model storms --benchmarks thoughts --latent_mode off,force --latent_size 4,8
    python -m evaluation --model storms --benchmarks mlvu --frames 32,128 --temporal_pool 1,4 --temporal_sampling 1,2
    accelerate launch -m evaluation --model org/storms-7b --benchmarks videomme --output results

The model may be a STORMS or a plain Qwen2.5-VL checkpoint. Benchmarks come from the Hub, or from folders of the same
layout under --data_root; a name with a slash, or that is a folder, is a dataset of `dataset_builder`'s schema. Each
combination of --frames, --temporal_pool, --spatial_pool, --temporal_sampling, --latent_mode and --latent_size is a run
of its own, with a JSON file of all its answers. The same command goes on where a killed one stopped: an answer that is
there is not asked for again, and what failed is tried again. A model, prompt or protocol of its own needs an --output
of its own.
"""

import json
import re
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
from modeling_storms.temporal_storms import REDUCTIONS, TokenReducer

from .answering import Answerer, checkpoint_stamp, load_model
from .benchmarks import BENCHMARKS, load_benchmark
from .benchmarks.base import Benchmark
from .judge import Judge, JudgeError, judge_answers
from .prompts import PROMPTS
from .protocols import Protocol
from .report import print_sweep, print_table, public_command, reduction_text, summarise
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
    frames: str | None = _option(None, "Short for --protocol uniformN; or several numbers with commas.")
    protocol: str | None = _option(None, "Which frames: uniform32 (default), fps2_max32, with any numbers.")
    temporal_pool: str | None = _option(
        None, "Average so many grid steps of a video, or several numbers with commas; the checkpoint's by default."
    )
    spatial_pool: str | None = _option(None, "Average squares of so many tokens (1, 4, 9, ...), likewise.")
    temporal_sampling: str | None = _option(None, "Keep each so many-th step that is left, likewise.")
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
    compile: bool | None = _option(
        None,
        "Decode by compiled steps: the first answers wait, long. By default on NVIDIA GPUs.",
    )
    share_prefix: bool = _option(True, "Encode a video once for all questions about it.")
    dtype: str = _option("auto", "Type of the weights: auto, float32, bfloat16.")
    attention: str | None = _option(None, "sdpa, eager or flash_attention_2; transformers' choice by default.")

    def __post_init__(self):
        if self.frames is not None and self.protocol is not None:
            raise ValueError(f"--frames {self.frames} and --protocol {self.protocol} both say which frames: give one.")
        self.protocols()
        if self.prompt not in PROMPTS:
            raise ValueError(f"--prompt: saw {self.prompt!r}, expected one of {', '.join(PROMPTS)}.")
        if self.benchmark_revision is not None and len(_names(self.benchmarks)) > 1:
            raise ValueError(f"--benchmark_revision {self.benchmark_revision}: give one benchmark, each has its own.")
        for options in self.latent_settings():
            LatentOptions(**options)
        for numbers in self.reductions():
            TokenReducer(**numbers)
        if self.open_ended and self.judge_model is None:
            raise ValueError("--open_ended asks questions that a judge must score. Name one by --judge_model.")
        for name in ("max_questions", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name}: saw {value}, expected 1 or more.")
        if self.max_new_tokens is None:
            self.max_new_tokens = 1024 if self.thinking else 32

    def protocols(self) -> list[Protocol]:
        """Which frames, for each run of the sweep.

        Raises:
            ValueError: if there is no such protocol.
        """
        pixels = {"min_frame_pixels": self.min_frame_pixels, "max_frame_pixels": self.max_frame_pixels}
        names = [self.protocol or f"uniform{32 if number is None else number}" for number in self._numbers("frames")]
        return [Protocol.named(name, **pixels) for name in dict.fromkeys(names)]

    def reductions(self) -> list[dict[str, int]]:
        """Token reductions of each run of the sweep; only what was given.

        Raises:
            ValueError: if one is no number.
        """
        found = product(*(self._numbers(name) for name in REDUCTIONS))
        return [{name: one for name, one in zip(REDUCTIONS, given) if one is not None} for given in found]

    def latent_settings(self) -> list[dict[str, Any]]:
        """Options of `generate` for each run of the sweep; only what was given.

        Raises:
            ValueError: if a size is no number.
        """
        modes: list[str | None] = [None] if self.latent_mode is None else list(_names(self.latent_mode))
        sizes = self._numbers("latent_size")
        settings: list[dict[str, Any]] = []
        for mode, size in product(modes, sizes):
            options: dict[str, Any] = {"latent_mode": mode}
            options |= {} if mode == "off" else {"latent_size": size, "latent_stop": self.latent_stop}
            options = {name: value for name, value in options.items() if value is not None}
            if options not in settings:  # off has no sizes
                settings.append(options)
        return settings

    def _numbers(self, name: str) -> list[int | None]:
        """The numbers of an option, each once; of one that was not given, None."""
        if (text := getattr(self, name)) is None:
            return [None]
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
            raise ValueError(f"--{name}: saw {text!r}, expected numbers like 4,8.")
        return list(dict.fromkeys(int(number) for number in text.split(",")))


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


def label(options: dict[str, Any], frames: str = "") -> str:
    """A run's name by what was asked for: `force-k8`, `uniform128-pool4`, `off`, `default`."""
    named = {"temporal_pool": "pool", "spatial_pool": "spatial", "temporal_sampling": "sampling"}
    named |= {"latent_mode": "", "latent_size": "k", "latent_stop": ""}
    parts = [frames, *(f"{short}{options[name]}" for name, short in named.items() if name in options)]
    return "-".join(part for part in parts if part) or "default"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(EvaluationArguments, description=__doc__, formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses(given)
    protocols, reductions = arguments.protocols(), arguments.reductions()
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
    totals: list[tuple[str, dict[str, Any]]] = []
    sweep: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []
    for protocol, reduction, options in product(protocols, reductions, arguments.latent_settings()):
        options = reduction | options
        is_compiled = model.device.type == "cuda" if arguments.compile is None else arguments.compile
        answerer = Answerer(model, processor, arguments.max_new_tokens, arguments.batch_size, is_compiled, **options)
        latent, reduced = answerer.latent_options(), reduction_text(answerer.reducer)
        settings = {
            "model": public_name(arguments.model),
            "revision": arguments.revision,
            "stamp": stamp,
            "protocol": asdict(protocol),
            "frame_pixels": protocol.frame_size(processor.video_processor.size),
            "reduction": asdict(answerer.reducer),
            "prompt": prompt,
            "max_new_tokens": arguments.max_new_tokens,
            "latent": latent,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        path = output / f"{label(options, protocol.name if len(protocols) > 1 else '')}.json"
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
        shown = protocol.name + ("" if reduced == "none" else f", {reduced}")
        entries, scored = [], []
        for benchmark in benchmarks:
            own = [answer for answer in answers if answer["benchmark"] == benchmark.name]
            verdicts = None
            if arguments.judge_model is not None:
                judge = Judge(arguments.judge_model, output / ".answers" / "judge.jsonl", arguments.judge_base_url)
                own, verdicts = judge_answers(judge, benchmark, own)
            entries.append(summarise(benchmark, own, shown, prompt, mode, command, verdicts))
            sweep.append((protocol.name, reduced, entries[-1], costs(own)))
            scored += own
        body = {"results": entries, "settings": settings, "costs": costs(scored), "answers": scored}
        write_whole(path, json.dumps(body, indent=2) + "\n")
        results += entries
        totals.append((str(path), costs(scored)))
    if state.is_main_process:
        print_table(results)
        if len(protocols) * len(reductions) > 1:
            print_sweep(sweep)
        else:
            _print_costs(totals)
    return results


def _print_costs(totals: Sequence[tuple[str, dict[str, Any]]]) -> None:
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
