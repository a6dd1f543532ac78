"""What does pooling cost, and does a temporal projector save it? 128 frames, four steps pooled, with it and without.

    python -m recipes.experiments.long_video --output long_video_output

Clips of the world `color_swap`, 128 frames each: signals show two of three colours, and the question is which colour
a certain signal leaves out. In `slow` there are 6 signals of 16 frames: events are far apart, and a pooled token (8
frames) shows one signal. In `fast` there are 30 of 4 frames, so that a pooled token shows two, and without a projector
their order is averaged away. A tiny random model is first taught to see (the lamp at the start, in clips of `slow`,
without a projector); from there, all arms train by `recipes/sft.py` for equally many steps on equal data: without
pooling, pooled, and pooled behind a projector. Then `python -m evaluation` asks the models of the first seed about
other numbers of frames and with other reductions than they were trained with. What is in the output folder already is
not repeated; delete the folder to start afresh.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Features
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

from dataset_builder import schema
from dataset_builder.schema import FREE_FORM
from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.thought_video import encode_video
from evaluation.__main__ import main as evaluate
from evaluation.prompts import storms_prompt
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes import sft
from recipes.answers import answer_rows
from recipes.collator import StormsCollator
from recipes.data import load_split
from recipes.experiments.gate import wilson
from recipes.experiments.perception import FEATURES, write_splits
from recipes.init_checkpoint import build_tiny_base, convert


CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "sft.yaml"
# By world: number of signals, frames that each takes, and signals that are asked about.
WORLDS = {"slow": (6, 16, range(1, 7)), "fast": (30, 4, (5, 10, 15, 20, 25, 30))}
ARMS: dict[str, list[str]] = {
    "not pooled": ["--temporal_pool", "1"],
    "pooled": [],
    "pooled, projector": ["--temporal_projector", json.dumps({"state_size": 32, "head_dim": 32})],
}
SWEEP = {"frames": "32,64,128", "temporal_pool": "1,4", "temporal_sampling": "1,2"}
# What `python -m evaluation` reads beside what training does.
COLUMNS = ("source", "video_id", "video_path", "video_start", "video_end")
START = "Which colour does the lamp have at the start?"
MISSING = "Signals show two colours each. Which colour is missing in signal {}?"


@dataclass
class LongVideoArguments:
    output: str = field(default="long_video_output", metadata={"help": "Folder of data and checkpoints."})
    results: str | None = field(default=None, metadata={"help": "Write the figures to this file."})
    worlds: list[str] = field(default_factory=lambda: list(WORLDS), metadata={"help": "slow, fast."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of weights and of training."})
    data_seed: int = field(default=0, metadata={"help": "Of the clips, which all seeds share."})
    num_rows: int = field(default=1000, metadata={"help": "Clips of each world to train on."})
    num_answers: int = field(default=200, metadata={"help": "Held-out clips of each world to answer."})
    see_steps: int = field(default=100, metadata={"help": "Steps in which the model learns to see."})
    max_steps: int = field(default=300, metadata={"help": "Steps of each arm."})


def write_world(output: Path, world: str, num_rows: int, num_answers: int, seed: int) -> None:
    """Clips of one world, each with a question: about a signal (`train`, `validation`) or the start (`see`)."""
    num_swaps, frames_per_swap, asked = WORLDS[world]
    dials = {"color_swap": {"num_swaps": num_swaps, "frames_per_swap": frames_per_swap}}
    total = num_rows + num_answers
    fractions = {"train": num_rows / total, "validation": num_answers / total}
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "see": []}
    for index, source in enumerate(
        track(list_rows(["color_swap"], total, seed, fractions, dials), f"clips of {world}", total)
    ):
        scene: Any = scene_of(source["scene"])
        signal = asked[index % len(asked)]
        (missing,) = set(range(3)) - set(scene.swaps[signal - 1])
        row = {**dict.fromkeys(FEATURES), "id": source["id"], "options": [], "problem_type": FREE_FORM}
        row |= dict.fromkeys(COLUMNS) | {name: source[name] for name in ("source", "video_id", "video_path")}
        # Half the size: they are seen at a quarter of it.
        row["video"] = {"bytes": encode_video(scene.frames()[:, ::2, ::2].copy(), scene.fps), "path": None}
        row |= {"question": MISSING.format(signal), "answer": scene.options[missing]}
        rows[source["split"]].append(row)
        if source["split"] == "train":
            rows["see"].append({**row, "question": START, "answer": scene.options[scene.start]})
    features = Features({**FEATURES, **{name: schema.FEATURES[name] for name in COLUMNS}})
    write_splits(output, rows, f"color_swap, {world}, {num_rows} + {num_answers} clips, seed {seed}", features)


def make_base(folder: Path, seed: int) -> None:
    """A random model just wide enough to learn this, that pools four steps."""
    texts = [storms_prompt(question, []) for question in (START, *(MISSING.format(one) for one in range(1, 31)))]
    texts += ["red", "green", "blue"]
    base, processor = build_tiny_base(
        seed, num_hidden_layers=4, hidden_size=128, initializer_range=0.08, rope_theta=10.0, texts=texts * 10
    )
    # Frames of 28 x 28, one token a step: colours are all there is to see.
    processor.video_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
    model, storms_processor = convert(base, processor, seed=seed)
    model.config.temporal_pool = storms_processor.video_processor.temporal_pool = 4
    model.save_pretrained(folder)
    storms_processor.save_pretrained(folder)


def train(start: Path, output: Path, dataset: Path, split: str, steps: int, seed: int, flags: Sequence[str]) -> None:
    """One run of `recipes/sft.py`, unless it is done."""
    if not (output / "losses.json").is_file():
        options = ["--model_name_or_path", str(start), "--output_dir", str(output), "--dataset_name", str(dataset)]
        options += ["--dataset_train_split", split, "--max_steps", str(steps), "--seed", str(seed)]
        options += ["--num_frames", "128", "--per_device_train_batch_size", "32", *flags]
        trainer = sft.main(["--config", str(CONFIG), *options, "--resume_from_checkpoint", "last"])
        losses = [[one["step"], float(one["loss"])] for one in trainer.state.log_history if "loss" in one]
        (output / "losses.json").write_text(json.dumps(losses) + "\n")


def measure(checkpoint: Path, dataset: Path) -> dict[str, Any]:
    """Accuracy on held-out clips, with its 95% interval (Wilson), visual tokens of a clip, and losses by step.

    `steps_to_learn` is the first step whose loss (the mean since the last one logged) is below 0.1; guessing one of
    three colours is 0.55: ln 3 for the word, nothing for the end of the turn.
    """
    model = StormsForConditionalGeneration.from_pretrained(checkpoint).eval()
    collator = StormsCollator(StormsProcessor.from_pretrained(checkpoint))
    rows: Any = list(load_split(str(dataset), "validation"))
    answers = answer_rows(model, collator, rows, batch_size=50, max_new_tokens=8, latent_mode="off")
    num, right = len(answers), sum(one["is_correct"] for one in answers)
    tokens = collator.prompts(rows[:1])["input_ids"] == model.config.video_token_id
    losses = json.loads((checkpoint / "losses.json").read_text())
    found = {"accuracy": right / num, "interval": wilson(right, num), "num_answers": num}
    found |= {"steps_to_learn": next((step for step, loss in losses if loss < 0.1), None), "losses": losses}
    return found | {"visual_tokens": int(tokens.sum())}


def sweep(checkpoint: Path, dataset: Path, output: Path) -> list[dict[str, Any]]:
    """A model's answers with each combination of `SWEEP`, by `python -m evaluation`.

    Returns:
        Of each combination its number of `frames`, `temporal_pool`, `temporal_sampling`, `visual_tokens`, `accuracy`
        and 95% `interval` (clustered by video), and `modules`, the seconds that each took of a question.
    """
    flags = [text for name, values in SWEEP.items() for text in (f"--{name}", values)]
    task = ["--benchmarks", f"simulated={dataset}", "--split", "validation", "--latent_mode", "off"]
    task += ["--max_new_tokens", "8", "--num_workers", "2", "--output", str(output)]
    evaluate(["--model", str(checkpoint), *task, *flags])
    found = []
    for path in output.glob("*.json"):
        run = json.loads(path.read_text())
        (result,), settings = run["results"], run["settings"]
        one = {"frames": settings["protocol"]["num_frames"], **settings["reduction"]}
        one |= {"visual_tokens": run["costs"]["video_tokens_per_question"], "modules": run["costs"]["modules"]}
        found.append(one | {"accuracy": result["value"], "interval": result["interval"]})
    return sorted(found, key=lambda one: (one["frames"], one["temporal_pool"], one["temporal_sampling"]))


def _named(world: str, arm: str) -> str:
    return f"{world} {arm}".replace(", ", "_").replace(" ", "_")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(LongVideoArguments, description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    root = Path(arguments.output)
    runs: list[dict[str, Any]] = []
    for world in dict.fromkeys(("slow", *arguments.worlds)):  # what is seen is seen in slow clips
        if not (root / "data" / world / "README.md").is_file():
            write_world(root / "data" / world, world, arguments.num_rows, arguments.num_answers, arguments.data_seed)
    for seed in arguments.seeds:
        folder = root / f"seed{seed}"
        if not (folder / "base" / "config.json").is_file():
            make_base(folder / "base", seed)
        train(folder / "base", folder / "see", root / "data" / "slow", "see", arguments.see_steps, seed, [])
        for world in arguments.worlds:
            for arm, flags in ARMS.items():
                output, data = folder / _named(world, arm), root / "data" / world
                train(folder / "see", output, data, "train", arguments.max_steps, seed, flags)
                runs.append({"world": world, "arm": arm, "seed": seed, **measure(output, data)})
    sweeps = {}
    for world in arguments.worlds:
        for arm in ARMS:
            checkpoint = root / f"seed{arguments.seeds[0]}" / _named(world, arm)
            sweeps[f"{world}, {arm}"] = sweep(checkpoint, root / "data" / world, root / "sweep" / checkpoint.name)
    results = {"command": "python -m recipes.experiments.long_video", "max_steps": arguments.max_steps, "runs": runs}
    results["sweeps"] = sweeps
    for path in (root / "long_video.json", arguments.results):
        if path is not None:
            Path(path).write_text(json.dumps(results, indent=2) + "\n")
    table = Table("world", "arm", "seed", "accuracy", "interval", "visual tokens", "steps to learn")
    for run in runs:
        low, high = run["interval"]
        steps = str(run["steps_to_learn"] or "")
        figures = (f"{run['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(run["visual_tokens"]), steps)
        table.add_row(run["world"], run["arm"], str(run["seed"]), *figures)
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
