"""Does reasoning in latents work, and do the latents matter? Arms from one base model, on worlds whose truth is known.

    python -m recipes.experiments.internalisation --output internalisation_output
    python -m recipes.experiments.internalisation --arms sft full --swaps 6 --seeds 0 --output internalisation_output

In the world `color_swap`, a lamp is covered while signals of two colours each tell it to change; which colour does it
have at the end? The more signals, the longer the chain of states that no frame shows; the thought video shows it. A
tiny random model is first taught to see (questions about one signal, never about a chain), in the role of a pretrained
backbone. Each arm starts from it and trains for equally many steps on the same clips by the recipes' own scripts; the
YAML lists arms and difficulties. First stages that arms have in common are trained once, and a run that is in the
output folder already is not repeated, so that several processes may share one folder, each with other `--seeds` or
`--swaps`; each command writes the figures of all that are there.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import Features, Value
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser

from dataset_builder.__main__ import main as build
from dataset_builder.schema import FEATURES, FREE_FORM, LETTERS
from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.sources.worlds import ColorSwapScene
from dataset_builder.thought_video import encode_video
from evaluation.prompts import storms_prompt
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes import sft, stage1, stage2
from recipes.answers import answer_rows, compare_solvers
from recipes.collator import StormsCollator
from recipes.data import load_split
from recipes.experiments import perception
from recipes.experiments.gate import swap_latents, wilson
from recipes.init_checkpoint import build_tiny_base, convert, embed_markers_as_newline


SCRIPTS = {"sft": sft, "stage1": stage1, "stage2": stage2}
COMPARED = ("sft", "chain of thought", "full")  # in seconds
MAX_SIGNALS = 8  # in the clips that the base learns to see on
START = "Which colour does the lamp have at the start?"
MISSING = "Which colour is missing in signal {}?"
STEP = "The lamp is {} before signal {}. Which colour does it have after it?"
AFTER = "Which colour does the lamp have after signal {}?"
END = "The lamp is uncovered. Which colour does it have at the end?"


@dataclass
class InternalisationArguments:
    output: str = field(default="internalisation_output", metadata={"help": "Folder of data, checkpoints and runs."})
    config: str = field(default=str(Path(__file__).with_suffix(".yaml")), metadata={"help": "The grid, as YAML."})
    size: str | None = field(
        default=None,
        metadata={
            "help": "One of the YAML's `sizes`, such as `larger` for a GPU, in a folder of `output` of its own."
        },
    )
    results: str | None = field(
        default=None,
        metadata={"help": "Also write the figures to this file, beside those of runs in it that `output` lacks."},
    )
    arms: list[str] = field(default_factory=list, metadata={"help": "Run these only; all by default."})
    swaps: list[int] = field(default_factory=list, metadata={"help": "Run these difficulties only."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Run these seeds only."})


# ------------------------------------------------------------------ data


def write_task(root: Path, grid: Mapping[str, Any], num_swaps: int) -> Path:
    """Clips of one difficulty, built by `dataset_builder` unless they are there, with answers in words.

    Returns:
        A dataset's folder. Splits are `train`, `validation`, `chain` (each state written out before the answer) and
        `shuffled` (another row's thought video).
    """
    output = root / f"{num_swaps} swaps" / "rows"
    if (output / "README.md").is_file():
        return output
    num_answers, built = grid["num_answers"], output.with_name("built")
    total = grid["num_rows"] + num_answers
    world = ["--source", "simulated", "--world", "color_swap", "--num_rows", str(total), "--seed", str(num_swaps)]
    dials = ["--dials", f"color_swap.num_swaps={num_swaps}", "color_swap.frames_per_swap=4"]
    splits = ["--validation_fraction", str(num_answers / total), "--test_fraction", "0"]
    build(["build", *world, *dials, *splits, "--output", str(built)])
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "validation"):
        rows[split] = [
            {**row, "options": [], "answer": row["options"][LETTERS.index(row["answer"])], "problem_type": FREE_FORM}
            for row in load_split(str(built), split)
        ]
    rows["chain"] = [
        {**row, "answer": f"<think>{' '.join(_chain(row['reasoning_plan']))}</think> {row['answer']}"}
        for row in rows["train"]
    ]
    thoughts = [row["thought_video"] for row in rows["train"]]
    order = np.random.default_rng(num_swaps).permutation(len(thoughts))
    rows["shuffled"] = [{**row, "thought_video": thoughts[other]} for row, other in zip(rows["train"], order)]
    perception.write_splits(output, rows, f"color_swap, {num_swaps} signals, {total} clips", FEATURES)
    return output


def write_curriculum(root: Path, grid: Mapping[str, Any], num_swaps: int) -> Path:
    """The training clips of one difficulty, each asked about one of its states.

    Returns:
        A dataset's folder. In split `slots3` most clips are asked what the lamp is after signal 3, the others about an
        earlier state, all in the words of the question about the end: how far to go is said by the number of slots
        alone. In `told3` clips are asked the same with that said in words.
    """
    output = root / f"{num_swaps} swaps" / "curriculum"
    if (output / "README.md").is_file():
        return output
    train = list(load_split(str(write_task(root, grid, num_swaps)), "train"))
    rows: dict[str, list[dict[str, Any]]] = {}
    for level in range(num_swaps + 1):
        rng = np.random.default_rng([num_swaps, level])
        is_earlier = (rng.random(len(train)) < grid["rehearsed"]) & (level > 0)
        levels = np.where(is_earlier, rng.integers(max(level, 1), size=len(train)), level)
        for kind in ("slots", "told"):
            rows[f"{kind}{level}"] = [ask_about(row, kind, asked) for row, asked in zip(train, levels.tolist())]
    features = Features({**perception.FEATURES, "latent_size": Value("int32")})
    return perception.write_splits(output, rows, f"color_swap, {num_swaps} signals, states on the way", features)


def ask_about(row: Mapping[str, Any], kind: str, asked: int) -> dict[str, Any]:
    """The question about a clip's state after `asked` signals, 0 for the start, see `write_curriculum`."""
    chain = _chain(row["reasoning_plan"])
    question = row["question"]
    if kind == "told" and asked < len(chain) - 1:
        question = AFTER.format(asked) if asked else START
    return {
        **dict.fromkeys(perception.FEATURES),
        **{name: row[name] for name in ("video", "options", "problem_type")},
        "id": f"{row['id']}-{asked}",
        "question": question,
        "answer": chain[asked],
        "latent_size": asked + 1,
    }


def last_signal(row: Mapping[str, Any], donor: Mapping[str, Any]) -> str:
    """The colour of the donor's lamp before its last signal, after the last signal of `row`."""
    before = _chain(donor["reasoning_plan"])[-2]
    words = row["reasoning_plan"].rpartition(";")[-1].split()
    low, high = (words[words.index("and") + shift] for shift in (-1, 1))
    return {low: high, high: low}.get(before, before)


def _chain(plan: str) -> list[str]:
    """The lamp's colours in a plan, one after another: at the start, then after each signal."""
    words = plan.replace(";", " ").replace(".", " ").replace(",", " ").split()
    return [after for before, after in pairwise(words) if before in ("starts", "lamp") and after != "starts"]


def write_base_task(output: Path, num_scenes: int) -> None:
    """What a base model is taught: in `see` what lamp and signals show, in `step` also what one signal does."""
    rows: dict[str, list[dict[str, Any]]] = {"see": [], "step": []}
    for index in track(range(num_scenes), "clips to see on"):
        rng = np.random.default_rng([1, index])
        dials = {"color_swap": {"num_swaps": MAX_SIGNALS - index % 6, "frames_per_swap": 4}}
        (source,) = list_rows(["color_swap"], 1, 1000 + index, {"train": 1.0}, dials)
        scene: Any = scene_of(source["scene"])
        for kind, question in _questions(scene, rng):
            row = {**dict.fromkeys(perception.FEATURES), "id": f"{index}-{len(rows['step'])}", **question}
            row |= {"options": [], "problem_type": FREE_FORM}
            rows["step"].append(row)
            if kind == "see":
                rows["see"].append(row)
    perception.write_splits(output, rows, f"color_swap, questions to see on, {num_scenes} clips")


def _questions(scene: ColorSwapScene, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
    clip, thought = (
        {"bytes": encode_video(frames, scene.fps), "path": None} for frames in (scene.frames(), scene.thought_frames())
    )
    names = scene.options
    yield "see", {"video": clip, "question": START, "answer": names[scene.start]}
    yield "see", {"video": thought, "question": END, "answer": names[scene.answer_idx]}
    for kind, signal in zip(("see", "see", "step", "step"), rng.integers(len(scene.swaps), size=4).tolist()):
        low, high = scene.swaps[signal]
        if kind == "see":
            (missing,) = set(range(len(names))) - {low, high}
            yield kind, {"video": clip, "question": MISSING.format(signal + 1), "answer": names[missing]}
        else:
            before = int(rng.integers(len(names)))
            after = {low: high, high: low}.get(before, before)
            yield kind, {"video": clip, "question": STEP.format(names[before], signal + 1), "answer": names[after]}


# ------------------------------------------------------------------ training


def make_base(folder: Path, grid: Mapping[str, Any], seed: int) -> None:
    """A random model just wide enough to learn this, at a scale from which it learns."""
    (row,) = list_rows(["color_swap"], 1, seed, {"train": 1.0})
    signals = range(1, MAX_SIGNALS + 1)
    asked = [row["question"], START, END, *(MISSING.format(one) for one in signals)]
    asked += [STEP.format(name, one) for name in row["options"] for one in signals]
    texts = [storms_prompt(question, []) for question in asked] + ["<think>red green blue</think> red"] * 20
    base, processor = build_tiny_base(seed, rope_theta=10.0, texts=texts, **grid["base"])
    # One token for each pair of frames, of which a signal has one.
    processor.video_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
    model, storms_processor = convert(base, processor, seed=seed)
    storms_processor.video_processor.num_frames, storms_processor.video_processor.fps = None, 6.0
    # One position for each of them, as a slot has: the way from a slot to its signal is then the same for all.
    model.config.vision_config.tokens_per_second = 3
    model.save_pretrained(folder)
    storms_processor.save_pretrained(folder)


def train(
    script: str, start: Path, output: Path, dataset: Path, steps: int, seed: int, flags: Mapping[str, Any]
) -> None:
    """One run of a recipe, unless it is done."""
    if not (output / "training.json").is_file():
        named = {"model_name_or_path": start, "output_dir": output, "dataset_name": dataset, "max_steps": steps}
        named |= {"seed": seed, "resume_from_checkpoint": "last", **flags}
        SCRIPTS[script].main([text for name, value in named.items() for text in (f"--{name}", _text(value))])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def train_base(root: Path, grid: Mapping[str, Any], seed: int) -> Path:
    """The model that all arms of a seed start from: it sees, and a block begins for it where answers do.

    Raises:
        SystemExit: if it still does not see after all rounds: its arms would be put on trial for its blindness.
    """
    folder = root / f"seed{seed}"
    if not (root / "see" / "README.md").is_file():
        write_base_task(root / "see", grid["num_scenes"])
    if not (folder / "random" / "config.json").is_file():
        make_base(folder / "random", grid, seed)
    start = folder / "random"
    (first, steps), rounds = grid["see_steps"], range(grid["see_rounds"])
    for name, split, steps in [("see", "see", first), *((f"step{number}", "step", steps) for number in rounds)]:
        flags = {**grid["training"], "learning_rate": 1e-3, "max_grad_norm": 1.0, "dataset_train_split": split}
        train("sft", start, folder / name, root / "see", steps, seed, flags)
        start = folder / name
        loss = json.loads((start / "training.json").read_text())["metrics"]["loss/lm"]
        if split == "step" and loss <= grid["see_loss"]:
            break
    else:
        raise SystemExit(
            f"Error: after {len(rounds)} rounds the base of seed {seed} has a loss of {loss:.3f} on what it sees, "
            f"expected at most {grid['see_loss']}. Raise see_rounds, or choose another seed."
        )
    if not (folder / "base" / "config.json").is_file():
        model = StormsForConditionalGeneration.from_pretrained(start)
        processor = StormsProcessor.from_pretrained(start)
        embed_markers_as_newline(model, processor)
        processor.save_pretrained(folder / "base")
        model.save_pretrained(folder / "base")
    return folder / "base"


def list_arms(grid: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All arms of a grid by name, each with its `stages`, `swaps` (difficulties) and `seeds`."""
    every = {"swaps": grid["swaps"], "seeds": grid["seeds"]}
    one, first = {"swaps": [grid["variant_swaps"]]}, {"seeds": grid["seeds"][:1]}
    arms = {name: {**every, "stages": stages} for name, stages in grid["arms"].items()}
    arms |= {name: {**every, **one, "stages": stages} for name, stages in grid["ablations"].items()}
    arms |= {name: {**every, **one, **first, "stages": stages} for name, stages in grid["variants"].items()}
    return arms


def list_stages(arm: Mapping[str, Any], swaps: int) -> list[dict[str, Any]]:
    """An arm's stages at one difficulty; one with a `curriculum` becomes a stage for each state of the chain.

    Each goes on until its `stop_at_loss`; what differs while the first is learned is under `start`. The last takes all
    of its steps; with an `end`, which says what differs then, it does so as a stage more.
    """
    stages = []
    for stage in arm["stages"]:
        if (kind := stage.get("curriculum")) is None:
            stages.append(stage)
            continue
        one = dict(stage)
        start, end = one.pop("start", {}), one.pop("end", None)
        if stage["script"] != "sft":
            one["latent_size"] = swaps + 1  # of questions about the end
        closing = {**one, "dataset_train_split": f"{kind}{swaps}", **(end or {})}
        closing.pop("stop_at_loss", None)
        one |= {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": "{}"}
        for level in range(swaps + (end is not None)):
            split = {"dataset_train_split": f"{kind}{level}"}
            stages.append({**one, **split, **(start if level == 0 else {})})
        stages.append(closing)
    return stages


def run_arm(
    root: Path, grid: Mapping[str, Any], name: str, arm: Mapping[str, Any], swaps: int, seed: int
) -> dict[str, Any]:
    """Train one arm of `list_arms` and measure it: a record of the results."""
    folder = root / f"seed{seed}" / f"{swaps} swaps" / name
    if (folder / "run.json").is_file():
        return json.loads((folder / "run.json").read_text())
    start = train_base(root, grid, seed)
    task, stages = write_task(root, grid, swaps), list_stages(arm, swaps)
    num_steps = 0
    for number, stage in enumerate(stages):
        own = {key: value for key, value in stage.items() if key not in ("script", "share", "curriculum")}
        # A slot for each segment of the clip, and two frames of the thought video for each slot.
        block = {"latent_size": swaps + 2} if stage["script"] != "sft" else {}
        if stage["script"] == "stage1":
            block["num_target_frames"] = 2 * (swaps + 2)
        flags = {**grid["training"], **block, **own}
        steps = max(1, round(grid["max_steps"] * stage.get("share", 1.0)))
        output = _trained_alike(folder, grid, stages[: number + 1], swaps)
        rows = write_curriculum(root, grid, swaps) if "curriculum" in stage else task
        train(stage["script"], start, output, rows, steps, seed, flags)
        num_steps += json.loads((output / "training.json").read_text())["steps"]
        start = output
    record: dict[str, Any] = {"arm": name, "seed": seed, "world": "color_swap", "difficulty": swaps}
    record["steps"] = num_steps
    record |= measure(start, task, stages, swaps)
    if "curriculum" in stages[-1]:
        asked = [measure(start, task, stages, swaps, is_brief=True, asked=level) for level in range(swaps + 1)]
        record["accuracy_by_state"] = [found["accuracy"] for found in asked]
    if swaps == grid["variant_swaps"]:  # longer chains than it was trained on, too
        for more in (level for level in grid["swaps"] if level > swaps):
            longer = measure(start, write_task(root, grid, more), list_stages(arm, more), more, is_brief=True)
            record.setdefault("more_swaps", {})[str(more)] = {name: longer[name] for name in ("accuracy", "interval")}
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _trained_alike(folder: Path, grid: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], swaps: int) -> Path:
    """Where the last of an arm's first stages is or will be: at an arm that has begun alike, else in its `folder`."""
    last, num = str(len(stages) - 1), len(stages)
    others = [folder.parent / name for name, arm in list_arms(grid).items() if list_stages(arm, swaps)[:num] == stages]
    return next((other / last for other in others if (other / last / "training.json").is_file()), folder / last)


# ------------------------------------------------------------------ figures


@torch.no_grad()
def measure(
    checkpoint: Path,
    dataset: Path,
    stages: Sequence[Mapping[str, Any]],
    swaps: int,
    is_brief: bool = False,
    asked: int | None = None,
) -> dict[str, Any]:
    """Accuracy on held-out clips, what an answer costs and, where states are fed back, what they do and hold.

    Args:
        asked (`int`, *optional*): ask about the state after so many signals instead of the end, as the last of
            `stages` was taught to answer.

    Returns:
        `dict` of `accuracy`, its 95% `interval` (Wilson), `parsed`, `text_tokens_per_item` and
        `latent_tokens_per_item`; unless `is_brief`, also `interventions` of `swap_latents` and `probes` of
        `probe_states`.
    """
    model, collator, rows, options = _ready_to_answer(checkpoint, dataset, stages, swaps)
    if asked is not None:
        rows = [ask_about(row, stages[-1]["curriculum"], asked) for row in rows]
        if "latent_size" in options:
            options["latent_size"] = asked + 1
            options |= {
                name: [one[: asked + 1] for one in options[name]] for name in ("replace_states",) & options.keys()
            }
    answers = answer_rows(model, collator, rows, batch_size=50, **options)
    right, num = sum(one["is_correct"] for one in answers), len(answers)
    texts = collator.tokenizer([one["text"] for one in answers])["input_ids"]
    found: dict[str, Any] = {
        "accuracy": right / num,
        "interval": wilson(right, num),
        "num_answers": num,
        "parsed": sum(one["is_parsed"] for one in answers) / num,
        "text_tokens_per_item": sum(len(ids) for ids in texts) / num,
        "latent_tokens_per_item": sum(one["latent_length"] for one in answers) / num,
    }
    if _is_fed_back(stages) and not is_brief:
        found["interventions"] = swap_latents(model, collator, rows, last_signal)
        states = torch.stack([one["latent_states"] for one in answers])
        found["probes"] = probe_states(states.numpy(), [_chain(row["reasoning_plan"]) for row in rows])
    return found


def probe_states(states: np.ndarray, chains: Sequence[Sequence[str]]) -> list[list[float]]:
    """Does slot k know the lamp's colour at time k? What a linear classifier reads from slots, cross-validated.

    Args:
        states (`np.ndarray`): `(num_rows, num_slots, hidden_size)`.
        chains (`Sequence[Sequence[str]]`): of each row the colour at the start and after each signal.

    Returns:
        Accuracy by slot and time, `num_slots` lists of as many numbers as a chain has colours.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return [
        [float(cross_val_score(classifier, states[:, slot], colors, cv=5).mean()) for colors in zip(*chains)]
        for slot in range(states.shape[1])
    ]


def _is_fed_back(stages: Sequence[Mapping[str, Any]]) -> bool:
    return stages[-1]["script"] != "sft" and stages[-1].get("latent_input") != "embedding"


def _ready_to_answer(checkpoint: Path, dataset: Path, stages: Sequence[Mapping[str, Any]], swaps: int) -> Any:
    """An arm's model, collator and held-out rows, and how `answer_rows` lets it answer."""
    model = StormsForConditionalGeneration.from_pretrained(checkpoint).eval().to(PartialState().device)
    collator = StormsCollator(StormsProcessor.from_pretrained(checkpoint))
    rows: Any = list(load_split(str(dataset), "validation"))
    options: dict[str, Any] = {"max_new_tokens": 32, "latent_mode": "off"}
    if stages[-1]["script"] != "sft":
        options |= {"latent_mode": "force", "latent_size": stages[-1].get("latent_size", swaps + 2)}
        if not _is_fed_back(stages):
            pad = model.get_input_embeddings().weight[model.config.latent_pad_token_id]
            options["replace_states"] = [pad.expand(options["latent_size"], -1)] * len(rows)
    return model, collator, rows, options


def measure_cost(root: Path, grid: Mapping[str, Any], rounds: int = 5) -> dict[str, float]:
    """Seconds an item of the arms in `COMPARED` that are trained, one item at a time, in turns: medians of rounds."""
    swaps, ready = grid["variant_swaps"], {}
    for name in COMPARED:
        stages = list_arms(grid)[name]["stages"]
        checkpoint = root / f"seed{grid['seeds'][0]}" / f"{swaps} swaps" / name / str(len(stages) - 1)
        if (checkpoint / "training.json").is_file():
            ready[name] = _ready_to_answer(checkpoint, write_task(root, grid, swaps), stages, swaps)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds + 1):  # the first is the warm-up
        for name, (model, collator, rows, options) in ready.items():
            begin = time.perf_counter()
            answer_rows(model, collator, rows[:10], batch_size=1, **options)
            seconds[name].append((time.perf_counter() - begin) / 10)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def measure_solvers(root: Path, grid: Mapping[str, Any], num_rows: int = 100) -> list[dict[str, Any]]:
    """What slots found in parallel are worth where each depends on the one before: `compare_solvers` of `full`, of the
    first seed, if that is trained."""
    swaps, stages = grid["variant_swaps"], grid["arms"]["full"]
    checkpoint = root / f"seed{grid['seeds'][0]}" / f"{swaps} swaps" / "full" / str(len(stages) - 1)
    if not (checkpoint / "training.json").is_file():
        return []
    model, collator, rows, options = _ready_to_answer(checkpoint, write_task(root, grid, swaps), stages, swaps)
    del options["latent_mode"]
    size = options["latent_size"]
    passes = [*(count for count in (1, 2, 3, 4, 6) if count < size), size]
    return compare_solvers(model, collator, rows[:num_rows], passes, batch_size=50, **options)


def collect(root: Path) -> dict[str, Any]:
    """The figures of all runs in a folder: `runs`, and by arm the mean of its `interventions`."""
    runs = [json.loads(path.read_text()) for path in root.glob("seed*/* swaps/*/run.json")]
    interventions: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if (found := run.pop("interventions", None)) is not None:
            interventions.setdefault(_name(run), []).append(found)
    means = {
        arm: {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        for arm, found in interventions.items()
    }
    return _sorted(runs, means)


def merge(results: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of two folders in one; a run that both have is that of `results`.

    Raises:
        SystemExit: if the earlier mean of an arm's interventions is over runs of which only some are to be replaced.
    """
    known = {(_name(run), run["seed"]) for run in results["runs"]}
    added = [run for run in earlier["runs"] if (_name(run), run["seed"]) not in known]
    means = dict(results["interventions"])
    for arm, mean in earlier["interventions"].items():
        here, kept, before = (
            sum(_name(run) == arm for run in runs) for runs in (results["runs"], added, earlier["runs"])
        )
        if 0 < kept < before:
            raise SystemExit(
                f"Error: of {before} runs of '{arm}' in the earlier results {before - kept} were run anew, but their "
                "interventions are kept as a mean. Run the others too, or write to another file."
            )
        if kept:
            now = means.get(arm, mean)
            means[arm] = {name: (kept * mean[name] + here * now[name]) / (kept + here) for name in mean}
    shown = ("seconds_per_item", "solvers")  # of the first seed, where that is trained
    return _sorted([*results["runs"], *added], means) | {name: results[name] or earlier[name] for name in shown}


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['arm']}, {run['difficulty']} swaps"


def _sorted(runs: Sequence[dict[str, Any]], interventions: Mapping[str, Any]) -> dict[str, Any]:
    ordered = sorted(runs, key=lambda run: (run["seed"], run["difficulty"], run["arm"]))
    means = {arm: interventions[arm] for arm in sorted(interventions)}
    return {"command": "python -m recipes.experiments.internalisation", "runs": ordered, "interventions": means}


def print_table(results: Mapping[str, Any]) -> None:
    """Accuracy by arm and difficulty, the mean over seeds."""
    levels = sorted({run["difficulty"] for run in results["runs"]})
    table = Table("arm", *(f"{level} swaps" for level in levels), "donor followed", title="accuracy, mean of seeds")
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        cells = []
        for level in levels:
            found = [run["accuracy"] for run in results["runs"] if (run["arm"], run["difficulty"]) == (arm, level)]
            cells.append(f"{sum(found) / len(found):.1%} ({len(found)})" if found else "")
        followed = [
            f"{found['follows_donor']:.0%}"
            for name, found in results["interventions"].items()
            if name.rpartition(", ")[0] == arm
        ]
        table.add_row(arm, *cells, " ".join(followed))
    Console().print(table)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy over difficulty, a line for each arm that has several: the mean of its seeds, and each of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        found: dict[int, list[float]] = {}
        for run in results["runs"]:
            if run["arm"] == arm:
                found.setdefault(run["difficulty"], []).append(run["accuracy"])
        if len(found) > 1:
            levels = sorted(found)
            (line,) = axes.plot(levels, [sum(found[one]) / len(found[one]) for one in levels], label=arm)
            for level in levels:
                axes.plot([level] * len(found[level]), found[level], ".", color=line.get_color())
    axes.axhline(1 / 3, color="grey", linestyle=":", label="guessing")
    axes.set(xlabel="signals (state changes)", ylabel="accuracy on held-out clips", ylim=(0, 1.02))
    axes.set_xticks(sorted({run["difficulty"] for run in results["runs"]}))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    (arguments,) = HfArgumentParser(InternalisationArguments, description=__doc__).parse_args_into_dataclasses(argv)
    root, grid = Path(arguments.output), yaml.safe_load(Path(arguments.config).read_text())
    if arguments.size is not None:
        if arguments.size not in grid["sizes"]:
            raise SystemExit(f"Error: --size: saw {arguments.size!r}, expected one of {', '.join(grid['sizes'])}.")
        root /= arguments.size
        for name, value in grid["sizes"][arguments.size].items():
            grid[name] = {**grid[name], **value} if isinstance(value, dict) else value
    PartialState(cpu=grid["training"]["use_cpu"])  # where answers are given
    known = list_arms(grid)
    if unknown := set(arguments.arms) - set(known):
        raise SystemExit(f"Error: --arms: saw {sorted(unknown)}, expected some of {', '.join(known)}.")
    torch.set_num_threads(1)  # sums in one order: a run that is repeated comes out the same
    for seed in arguments.seeds or grid["seeds"]:
        for name in arguments.arms or known:
            if not arguments.arms and seed not in known[name]["seeds"]:
                continue
            for swaps in known[name]["swaps"]:
                if swaps in (arguments.swaps or known[name]["swaps"]):
                    run_arm(root, grid, name, known[name], swaps, seed)
    results = {**collect(root), "seconds_per_item": measure_cost(root, grid), "solvers": measure_solvers(root, grid)}
    if arguments.results is not None and Path(arguments.results).is_file():
        results = merge(results, json.loads(Path(arguments.results).read_text()))
    for path in (root / "internalisation.json", arguments.results):
        if path is not None:
            Path(path).write_text(json.dumps(results, indent=2) + "\n")
            if len({run["difficulty"] for run in results["runs"]}) > 1:
                plot(results, Path(path).with_suffix(".png"))
    print_table(results)
    return results


if __name__ == "__main__":
    main()
