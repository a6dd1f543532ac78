"""Does a temporal projector save what pooling averages away? 128 frames, four steps pooled, with it and without.

    python -m recipes.experiments.long_video --output long_video_output

Clips of the world `order`: four lamps light up one after another, and the question is which comes after a given one.
In `slow`, each is lit for 32 frames: events are far apart, and pooled tokens still show single lamps. In `fast`,
each is lit for two, so that the eight frames of a pooled token show every lamp once: without a projector, the order
is averaged away. A tiny random model is first taught to see (which lamp is lit at the start, at the end); from there,
both arms train by `recipes/sft.py` for equally many steps on equal data and equally many visual tokens. What is in the
output folder already is not repeated; delete the folder to start afresh.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

from dataset_builder.schema import FREE_FORM
from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.sources.worlds import COLORS, OrderScene
from dataset_builder.thought_video import encode_video
from evaluation.prompts import storms_prompt
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes import sft
from recipes.answers import answer_rows
from recipes.collator import StormsCollator
from recipes.data import load_split
from recipes.experiments.perception import FEATURES, write_splits
from recipes.init_checkpoint import build_tiny_base, convert


CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "sft.yaml"
# By world: rounds of the four lamps, and frames that each is lit.
WORLDS = {"slow": (1, 32), "fast": (16, 2)}
ARMS: dict[str, list[str]] = {
    "pooled": [],
    "pooled, projector": ["--temporal_projector", json.dumps({"state_size": 32, "head_dim": 32})],
}
SEEN = {"start": "Which lamp is lit at the start?", "end": "Which lamp is lit at the end?"}


@dataclass
class LongVideoArguments:
    output: str = field(default="long_video_output", metadata={"help": "Folder of data and checkpoints."})
    results: str | None = field(default=None, metadata={"help": "Write the figures to this file."})
    worlds: list[str] = field(default_factory=lambda: list(WORLDS), metadata={"help": "slow, fast."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of weights and of training."})
    data_seed: int = field(default=0, metadata={"help": "Of the clips, which all seeds share."})
    num_rows: int = field(default=1500, metadata={"help": "Clips of each world to train on."})
    num_answers: int = field(default=300, metadata={"help": "Held-out clips of each world to answer."})
    see_steps: int = field(default=600, metadata={"help": "Steps in which the model learns to see."})
    max_steps: int = field(default=600, metadata={"help": "Steps of each arm."})


def write_world(output: Path, world: str, num_rows: int, num_answers: int, seed: int) -> None:
    """Clips of one world with their questions in `train` and `validation`, and what is seen in them in `see`."""
    num_rounds, frames_per_lamp = WORLDS[world]
    dials = {"order": {"num_rounds": num_rounds, "frames_per_lamp": frames_per_lamp}}
    total = num_rows + num_answers
    listed = list_rows(["order"], total, seed, {"train": num_rows / total, "validation": num_answers / total}, dials)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "see": []}
    for source in track(listed, f"clips of {world}", total):
        scene: Any = scene_of(source["scene"])
        row = {**dict.fromkeys(FEATURES), "id": source["id"], "options": [], "problem_type": FREE_FORM}
        row["video"] = {"bytes": encode_video(scene.frames(), scene.fps), "path": None}
        answer = scene.options[scene.answer_idx]
        rows[source["split"]].append({**row, "question": source["question"], "answer": answer})
        if source["split"] == "train":
            for when, question in SEEN.items():
                lit = _lit(scene, 0 if when == "start" else scene.num_frames - 1)
                rows["see"].append({**row, "id": f"{row['id']}-{when}", "question": question, "answer": lit})
    write_splits(output, rows, f"order, {world}, {num_rows} + {num_answers} clips, seed {seed}")


def _lit(scene: OrderScene, frame_idx: int) -> str:
    color = scene.colors[scene.lit_at(frame_idx)]
    return f"the {next(name for name, one in COLORS.items() if one == color)} lamp"


def make_base(folder: Path, seed: int) -> None:
    """A random model just wide enough to learn this, that pools four steps."""
    (row,) = list_rows(["order"], 1, seed, {"train": 1.0})
    questions = [row["question"].replace(color, other) for color in COLORS for other in COLORS] + list(SEEN.values())
    texts = [storms_prompt(question, []) for question in questions] + [f"the {color} lamp" for color in COLORS]
    base, processor = build_tiny_base(
        seed, num_hidden_layers=4, hidden_size=128, initializer_range=0.08, rope_theta=10.0, texts=texts * 10
    )
    # Frames of 28 x 56, two tokens a step: colours are all there is to see.
    processor.video_processor.size = {"shortest_edge": 28 * 56, "longest_edge": 28 * 56}
    model, storms_processor = convert(base, processor, seed=seed)
    model.config.temporal_pool = storms_processor.video_processor.temporal_pool = 4
    model.save_pretrained(folder)
    storms_processor.save_pretrained(folder)


def train(start: Path, output: Path, dataset: Path, split: str, steps: int, seed: int, flags: Sequence[str]) -> None:
    """One run of `recipes/sft.py`, unless it is done."""
    if not (output / "training.json").is_file():
        options = ["--model_name_or_path", str(start), "--output_dir", str(output), "--dataset_name", str(dataset)]
        options += ["--dataset_train_split", split, "--max_steps", str(steps), "--seed", str(seed)]
        options += ["--num_frames", "128", "--per_device_train_batch_size", "32", *flags]
        sft.main(["--config", str(CONFIG), *options, "--resume_from_checkpoint", "last"])


def measure(checkpoint: Path, dataset: Path) -> dict[str, Any]:
    """Accuracy on held-out clips, with its 95% interval (Wilson), and the visual tokens of a clip."""
    model = StormsForConditionalGeneration.from_pretrained(checkpoint).eval()
    collator = StormsCollator(StormsProcessor.from_pretrained(checkpoint))
    rows: Any = list(load_split(str(dataset), "validation"))
    answers = answer_rows(model, collator, rows, batch_size=50, max_new_tokens=8, latent_mode="off")
    num, right = len(answers), sum(one["is_correct"] for one in answers)
    tokens = collator.prompts(rows[:1])["input_ids"] == model.config.video_token_id
    center, spread = right / num + 1.92 / num, 1.96 * math.sqrt(right * (num - right) / num**3 + 0.96 / num**2)
    interval = [(center - spread) / (1 + 3.84 / num), (center + spread) / (1 + 3.84 / num)]
    return {"accuracy": right / num, "interval": interval, "num_answers": num, "visual_tokens": int(tokens.sum())}


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
                output, data = folder / f"{world}, {arm}".replace(", ", "_"), root / "data" / world
                train(folder / "see", output, data, "train", arguments.max_steps, seed, flags)
                runs.append({"world": world, "arm": arm, "seed": seed, **measure(output, data)})
    results = {"command": "python -m recipes.experiments.long_video", "max_steps": arguments.max_steps, "runs": runs}
    for path in (root / "long_video.json", arguments.results):
        if path is not None:
            Path(path).write_text(json.dumps(results, indent=2) + "\n")
    table = Table("world", "arm", "seed", "accuracy", "interval", "visual tokens")
    for run in runs:
        low, high = run["interval"]
        figures = (f"{run['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(run["visual_tokens"]))
        table.add_row(run["world"], run["arm"], str(run["seed"]), *figures)
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
