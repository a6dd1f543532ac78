"""Build thought-video rows, train a tiny model on them in both stages, and show it at work on a video.

    python -m recipes.demo                    # a bouncing ball, encoded on the spot
    python -m recipes.demo --video clip.mp4   # any video file
    python -m recipes.demo --model org/storms-7b --video clip.mp4 --question "What falls first?"

It builds 64 rows of the simulated shell game and one row from the video, and loads them by `load_dataset`. Without
--model it makes a tiny checkpoint with random weights and trains it by `recipes/stage1.py` and `recipes/stage2.py` for
a few steps: its answer means little, the machinery is the real one. The model is loaded in a separate process by
`AutoModel.from_pretrained(..., trust_remote_code=True)`, in which this package can't be imported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


QUESTION = "Where will the ball be after the clip ends?"


def write_clip(path: Path) -> Path:
    """A simulated ball that bounces between walls, as an MP4 file."""
    from dataset_builder.sources.simulated import list_rows, scene_of
    from dataset_builder.thought_video import encode_video

    (row,) = list_rows(["bounce"], num_rows=1, seed=0, split_fractions={"train": 1.0})
    scene = scene_of(row["scene"])
    path.write_bytes(encode_video(scene.frames(), scene.fps))
    return path


def build_rows(video: Path, question: str, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build two datasets, 64 rows of the shell game and one of a given video, and load them as a stranger would.

    Returns:
        The first row of each.
    """
    from datasets import load_dataset

    from dataset_builder.__main__ import main as build

    # Wiped, as a folder keeps what earlier commands built.
    simulated, given = output / "shell_game", output / "given_video"
    build(["build", "--source", "simulated", "--world", "shell_game", "--num_rows", "64", "--output", str(simulated)])
    questions = output / "questions.jsonl"
    questions.write_text(json.dumps({"video": video.name, "question": question, "answer": "unknown"}) + "\n")
    command = ["build", "--source", "local_folder", "--video_root", str(video.parent), "--questions", str(questions)]
    build([*command, "--num_rows", "1", "--output", str(given)])
    first, second = (load_dataset(str(folder), split="train")[0] for folder in (simulated, given))
    return first, second


def train(output: Path, num_steps: int) -> Path:
    """Both stages on the shell game, from random weights, with curves in `curves.png`.

    Returns:
        The trained checkpoint's folder.
    """
    from recipes import stage1, stage2
    from recipes.curves import plot_curves
    from recipes.init_checkpoint import InitArguments, init_checkpoint

    folders = {name: output / name for name in ("storms-tiny", "stage1", "stage2")}
    for folder in folders.values():  # they hold copies of the code, which may be older ones
        shutil.rmtree(folder, ignore_errors=True)
    init_checkpoint(InitArguments(output=str(folders["storms-tiny"]), tiny=True))
    configs = Path(__file__).parent / "configs" / "tiny"
    shared = ["--dataset_name", str(output / "shell_game"), "--max_steps", str(num_steps), "--logging_steps", "2"]
    shared += ["--per_device_train_batch_size", "8", "--warmup_steps", "5", "--eval_strategy", "steps"]
    shared += ["--eval_steps", str(num_steps), "--use_cpu", "true"]
    for script, start in ((stage1, "storms-tiny"), (stage2, "stage1")):
        name = script.__name__.split(".")[-1]
        paths = ["--model_name_or_path", str(folders[start]), "--output_dir", str(folders[name])]
        script.main(["--config", str(configs / f"{name}.yaml"), *paths, *shared])
    plot_curves([folders["stage1"], folders["stage2"]], output / "curves.png")
    return folders["stage2"]


def answer(model_name: str, video: str, question: str, num_frames: int, max_new_tokens: int) -> dict[str, Any]:
    """Load a checkpoint as a stranger would, run a forced latent block on a video, and answer.

    Returns:
        `dict` with the answer, the class that answered, the block's length and stop reason, the sampled frames' times
        in seconds, and `similarity` `(num_slots, num_grid_steps)`: cosine between each slot's state and the mean
        visual token of each grid step, as the language model receives them.
    """
    # A script's folder is on the path, and `recipes` can't be imported here.
    from demo_app import answer as answers
    from demo_app import check_model, load_checkpoint, prepare, slot_similarity, step_features

    check_model(model_name)
    model, processor = load_checkpoint(model_name)
    inputs, _, seconds = prepare(processor, video, question, num_frames)
    *_, result = answers(model, processor, inputs, max_new_tokens, "force")
    return {
        "answer": result.text,
        "loaded_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "latent_length": len(result.states),
        "latent_stop_reason": result.stop_reason,
        "frame_seconds": seconds,
        "similarity": slot_similarity(result.states, step_features(model, inputs)).tolist(),
    }


def plot(rows: dict[str, dict[str, Any]], result: dict[str, Any], frames: np.ndarray, path: Path) -> None:
    """Two dataset rows, each its keyframes and its thought video; below, the slots' similarity to the sampled frames.

    Args:
        rows (`dict`): dataset rows by title.
        result (`dict`): what `answer` returned.
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): the sampled frames, uint8 RGB.
        path (`Path`): the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dataset_builder.stages import segment_sampler
    from modeling_storms import decode_video
    from recipes.demo_app import step_frames

    columns = 10
    figure = plt.figure(figsize=(14, 9), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[1, 1, 2.2])
    for part, (title, row) in zip(parts, rows.items()):
        part.suptitle(f"{title}: {row['question']}", fontsize=10, wrap=True)
        num_keyframes = len(row["keyframes"])
        every = segment_sampler(None, None, columns - num_keyframes)
        thought, metadata = decode_video(row["thought_video"]["bytes"], every)
        keyframes = [np.asarray(picture) for picture in row["keyframes"]]
        names = [f"keyframe\n{seconds:.1f} s" for seconds in row["keyframe_timestamps"]]
        names += [f"thought video\n{seconds:.1f} s" for seconds in metadata.timestamps]
        _strip(part.subplots(1, columns), [*keyframes, *thought], names)

    similarity = np.array(result["similarity"])
    num_steps = similarity.shape[1]
    shown = np.linspace(0, num_steps - 1, min(num_steps, columns)).round().astype(int)
    first = step_frames(len(frames), num_steps)
    frame_idx = [first[step] for step in shown]
    grid = parts[2].add_gridspec(2, len(shown), height_ratios=[1, 1.6])
    axes = [parts[2].add_subplot(grid[0, column]) for column in range(len(shown))]
    _strip(
        axes,
        list(frames[frame_idx]),
        [f"step {s}, {result['frame_seconds'][f]:.1f} s" for s, f in zip(shown, frame_idx)],
    )
    below = parts[2].add_subplot(grid[1, :])
    picture = below.imshow(similarity, aspect="auto", cmap="viridis")
    below.set_xlabel("temporal grid step of the video (two frames each)")
    below.set_ylabel("latent slot")
    below.set_yticks(range(len(similarity)), [str(k + 1) for k in range(len(similarity))])
    parts[2].colorbar(picture, ax=below, label="cosine similarity")
    parts[2].suptitle(f"the model's block: {result['latent_length']} slots, stop: {result['latent_stop_reason']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _strip(axes: Sequence[Any], pictures: Sequence[np.ndarray], names: Sequence[str]) -> None:
    for one in axes:
        one.axis("off")
    for one, picture, name in zip(axes, pictures, names):
        one.imshow(picture)
        one.set_title(name, fontsize=8)


def answer_in_another_process(arguments: argparse.Namespace, model_name: str, video: Path) -> dict[str, Any]:
    """`answer`, in a process where importing this project's packages fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--load-only", str(result), "--model", model_name]
        command += ["--video", str(video), "--question", arguments.question]
        command += ["--num_frames", str(arguments.num_frames), "--max_new_tokens", str(arguments.max_new_tokens)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if subprocess.run(command, cwd=folder, env=environment, check=False).returncode != 0:
            raise SystemExit("The loading process failed; its error is above.")
        return json.loads(result.read_text())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", help="video file; a simulated clip by default")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument("--model", help="checkpoint folder or Hub id; by default a tiny one trained on the spot")
    parser.add_argument("--num_steps", type=int, default=40, help="steps of each stage (default: %(default)s)")
    parser.add_argument("--output", default="demo_output", help="folder for datasets, checkpoint and picture")
    parser.add_argument("--num_frames", type=int, default=16, help="frames to sample (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="longest answer, without its block")
    parser.add_argument("--load-only", metavar="RESULT", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.load_only is not None:
        for package in ("modeling_storms", "dataset_builder", "recipes"):
            sys.modules[package] = None  # type: ignore[assignment]  # makes imports fail
        result = answer(
            arguments.model, arguments.video, arguments.question, arguments.num_frames, arguments.max_new_tokens
        )
        Path(arguments.load_only).write_text(json.dumps(result))
        return

    from modeling_storms import decode_video
    from modeling_storms.video_storms import uniform_frame_indices

    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    video = (Path(arguments.video) if arguments.video else write_clip(output / "bouncing_ball.mp4")).resolve()
    frames, metadata = decode_video(
        video, lambda metadata: uniform_frame_indices(metadata.total_num_frames, arguments.num_frames)
    )
    print(f"Video     {video.name}: {metadata.total_num_frames} frames, {metadata.duration:.1f} s, {len(frames)} used")
    simulated, given = build_rows(video, arguments.question, output)
    model_name = arguments.model
    if model_name is not None and Path(model_name).is_dir():
        model_name = str(Path(model_name).resolve())  # the other process runs in another folder
    elif model_name is None:
        model_name = str(train(output, arguments.num_steps).resolve())
    result = answer_in_another_process(arguments, model_name, video)
    plot({"A simulated row": simulated, "A row of the video": given}, result, frames, output / "demo.png")
    print(f"Model     {model_name}\n          loaded as {result['loaded_class']}, without this package")
    print(f"Question  {arguments.question}")
    print(f"Block     {result['latent_length']} slots, stop reason: {result['latent_stop_reason']}")
    print(f"Answer    {result['answer']!r}")
    if arguments.model is None:
        print(f"          (after {arguments.num_steps} steps a stage from random weights, it means little)")
        print(f"Curves    {output / 'curves.png'}")
    print(f"Picture   {output / 'demo.png'}")


if __name__ == "__main__":
    main()
