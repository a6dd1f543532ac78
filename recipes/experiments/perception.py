"""Questions that teach a random tiny model to see: they play the part of a pretrained backbone's training.

    python -m recipes.experiments.perception --num_rows 1000 --num_swaps 1 --output perception

Writes a dataset of four splits for `recipes/sft.py`, to be taught one after another. `see` asks about scenes of the
shell game whose ball is in sight, and which cup stays in place, in words; `choose` adds letters, and texts without a
video; `follow` asks where a named cup ends; `letters` is what of it needs letters most. None asks what the shell game
asks: where a ball ends that was seen at the start only.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, Video
from transformers import HfArgumentParser

from dataset_builder.schema import FREE_FORM, LETTERS, MULTIPLE_CHOICE
from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.sources.worlds import ShellGameScene
from dataset_builder.thought_video import encode_video
from evaluation.prompts import storms_prompt


FEATURES = Features(
    {
        "id": Value("string"),
        "video": Video(decode=False),
        "question": Value("string"),
        "options": List(Value("string")),
        "answer": Value("string"),
        "problem_type": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)

STILL = "Which cup stays in its place in swap {}?"
SEEN = "The ball is seen through its cup. Where is it at the end?"
START = "Where is the ball at the start?"
TOLD = "The ball is under the {}. Where is the ball?"
FOLLOW = "Follow the {}. Where is it at the end?"
SPLITS = {
    "see": ("still", "seen", "start"),
    "choose": ("still", "seen", "start", "start, choice", "text"),
    "follow": ("still", "seen", "start", "start, choice", "follow", "follow, choice"),
    "letters": ("start, choice", "follow", "follow, choice"),
}


@dataclass
class PerceptionArguments:
    output: str = field(metadata={"help": "Folder to write; an earlier one is replaced."})
    num_rows: int = field(default=1000, metadata={"help": "Scenes, each with a question of every kind."})
    num_swaps: int = field(default=1, metadata={"help": "Swaps of the cups in each scene."})
    seed: int = field(default=1, metadata={"help": "Of the scenes: others than those of the task itself."})


def list_questions(scene: ShellGameScene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions about one scene: the kind of each, and its columns."""
    clip, thought = (
        {"bytes": encode_video(frames, scene.fps), "path": None} for frames in (scene.frames(), scene.thought_frames())
    )
    names = scene.options
    for swap_idx, pair in enumerate(scene.swaps):
        (stays,) = set(range(3)) - set(pair)
        yield "still", _question(clip, STILL.format(swap_idx + 1), names, stays)
    yield "seen", _question(thought, SEEN, names, scene.answer_idx)
    yield "start", _question(clip, START, names, scene.start)
    yield "start, choice", _question(clip, START, names, scene.start, rng)
    for cup in range(len(names)):
        end = cup
        for low, high in scene.swaps:
            end = {low: high, high: low}.get(end, end)
        follow = FOLLOW.format(names[cup])
        yield "follow", _question(clip, follow, names, end)
        yield "follow, choice", _question(clip, follow, names, end, rng)
    order = rng.permutation(len(names))
    told = TOLD.format(names[scene.start])
    reply = LETTERS[order.tolist().index(scene.start)]
    messages = [
        {"role": "user", "content": storms_prompt(told, [names[idx] for idx in order])},
        {"role": "assistant", "content": reply},
    ]
    yield "text", {"messages": messages}


def _question(
    video: dict[str, Any], question: str, names: Sequence[str], answer_idx: int, rng: np.random.Generator | None = None
) -> dict[str, Any]:
    """In words, or, with `rng`, with shuffled options."""
    row = {"video": video, "question": question, "options": [], "answer": names[answer_idx], "problem_type": FREE_FORM}
    if rng is not None:
        order = rng.permutation(len(names)).tolist()
        row |= {"options": [names[idx] for idx in order], "answer": LETTERS[order.index(answer_idx)]}
        row["problem_type"] = MULTIPLE_CHOICE
    return row


def write_perception(arguments: PerceptionArguments) -> Path:
    """Write the dataset folder."""
    dials = {"shell_game": {"num_swaps": arguments.num_swaps}}
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for index, source in enumerate(
        list_rows(["shell_game"], arguments.num_rows, arguments.seed, {"train": 1.0}, dials)
    ):
        scene: Any = scene_of(source["scene"])
        rng = np.random.default_rng([arguments.seed, index])
        for number, (kind, columns) in enumerate(list_questions(scene, rng)):
            row = {**dict.fromkeys(FEATURES), "id": f"{source['id']}-{kind}-{number}", **columns}
            for split, kinds in SPLITS.items():
                if kind in kinds:
                    rows[split].append(row)
    described = f"{arguments.num_rows} scenes, {arguments.num_swaps} swaps, seed {arguments.seed}"
    return write_splits(Path(arguments.output), rows, described)


def write_splits(
    output: Path, rows: Mapping[str, Sequence[dict[str, Any]]], described: str, features: Features = FEATURES
) -> Path:
    """Write a dataset folder with rows by split; an earlier one is replaced."""
    shutil.rmtree(output, ignore_errors=True)
    (output / "data").mkdir(parents=True)
    for split, listed in rows.items():
        Dataset.from_list(listed, features=features).to_parquet(output / "data" / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in rows]
    configs = [{"config_name": "default", "description": described, "data_files": files}]
    (output / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n\n# {described}\n")
    return output


def main() -> None:
    (arguments,) = HfArgumentParser(PerceptionArguments, description=__doc__).parse_args_into_dataclasses()
    print(f"Wrote {write_perception(arguments)}")


if __name__ == "__main__":
    main()
