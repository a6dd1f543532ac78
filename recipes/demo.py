"""Show a STORMS model at work on a video, from nothing but installed packages.

    python -m recipes.demo                    # a bouncing ball, encoded on the spot
    python -m recipes.demo --video clip.mp4   # any video file
    python -m recipes.demo --model org/storms-7b --video clip.mp4 --question "What falls first?"

Without --model it makes a tiny checkpoint with random weights: the answer means nothing, the machinery is the real
one. The model is loaded in a separate process by `AutoModel.from_pretrained(..., trust_remote_code=True)`, in which
this package can't be imported.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


QUESTION = "Where will the ball be after the clip ends?"


def write_clip(path: Path, num_frames: int = 48, fps: int = 12, height: int = 112, width: int = 168) -> Path:
    """Encode a red ball that flies and bounces on a grey floor, as H.264 (one thread, so that bytes repeat).

    Args:
        path (`Path`): file to write; its ending picks the container.
        num_frames, fps (`int`): length in frames and frames a second.
        height, width (`int`): pixels, even.
    """
    import av

    rows, columns = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for frame_idx in range(num_frames):
            seconds = frame_idx / fps
            x = 12 + (width - 24) * frame_idx / max(num_frames - 1, 1)
            y = height - 24 - 0.6 * height * abs(math.cos(2.5 * seconds))
            image = np.full((height, width, 3), 230, dtype=np.uint8)
            image[rows > height - 16] = 120
            image[(rows - y) ** 2 + (columns - x) ** 2 < 10**2] = (210, 40, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def answer(model_name: str, video: str, question: str, num_frames: int, max_new_tokens: int) -> dict[str, Any]:
    """Load a checkpoint as a stranger would, run a forced latent block on a video, and answer.

    Returns:
        `dict` with the answer, the class that answered, the block's length and stop reason, the sampled frames' times
        in seconds, and `similarity` `(num_slots, num_grid_steps)`: cosine between each slot's state and the mean
        visual token of each grid step, as the language model receives them.
    """
    import torch
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(model_name, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(model_name, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": num_frames, "return_metadata": True},
    )
    metadata = inputs.pop("video_metadata")[0]
    inputs = inputs.to(model.device)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, latent_mode="force", return_dict_in_generate=True)
    new_ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    steps = features.pooler_output[0].unflatten(0, (int(inputs["video_grid_thw"][0, 0]), -1)).mean(1)
    similarity = torch.cosine_similarity(out.latent_states[0][:, None].float(), steps[None].float(), dim=-1)
    if len(similarity) == 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a slot. Give at least 10.")
    return {
        "answer": processor.decode(new_ids, skip_special_tokens=True),
        "loaded_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "latent_length": int(out.latent_lengths[0]),
        "latent_stop_reason": out.latent_stop_reasons[0],
        "frame_seconds": [float(seconds) for seconds in metadata.timestamps],
        "similarity": similarity.tolist(),
    }


def plot(result: dict[str, Any], frames: np.ndarray, path: Path) -> None:
    """Sampled frames above, the slots' similarity to them below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    similarity = np.array(result["similarity"])
    num_steps = similarity.shape[1]
    shown = np.linspace(0, num_steps - 1, min(num_steps, 8)).round().astype(int)
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=[1, 1.6])
    per_step = len(frames) / num_steps
    for column, step in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        frame_idx = min(int(step * per_step), len(frames) - 1)
        axes.imshow(frames[frame_idx])
        axes.set_title(f"step {step}, {result['frame_seconds'][frame_idx]:.1f} s", fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    picture = axes.imshow(similarity, aspect="auto", cmap="viridis")
    axes.set_xlabel("temporal grid step of the video (two frames each)")
    axes.set_ylabel("latent slot")
    axes.set_yticks(range(len(similarity)), [str(k + 1) for k in range(len(similarity))])
    figure.colorbar(picture, ax=axes, label="cosine similarity")
    figure.suptitle(f"{result['latent_length']} slots, stop: {result['latent_stop_reason']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    parser.add_argument("--video", help="video file; a procedural clip by default")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument("--model", help="checkpoint folder or Hub id; a tiny random one by default")
    parser.add_argument("--output", default="demo_output", help="folder for clip, checkpoint and picture")
    parser.add_argument("--num_frames", type=int, default=16, help="frames to sample (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="length of block and answer together")
    parser.add_argument("--load-only", metavar="RESULT", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.load_only is not None:
        sys.modules["modeling_storms"] = sys.modules["recipes"] = None  # type: ignore[assignment]  # makes imports fail
        result = answer(
            arguments.model, arguments.video, arguments.question, arguments.num_frames, arguments.max_new_tokens
        )
        Path(arguments.load_only).write_text(json.dumps(result))
        return

    from modeling_storms import decode_video
    from modeling_storms.video_storms import uniform_frame_indices
    from recipes.init_checkpoint import InitArguments, init_checkpoint

    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    video = Path(arguments.video) if arguments.video else write_clip(output / "bouncing_ball.mp4")
    frames, metadata = decode_video(
        video, lambda metadata: uniform_frame_indices(metadata.total_num_frames, arguments.num_frames)
    )
    print(f"Video     {video}: {metadata.total_num_frames} frames, {metadata.duration:.1f} s, {len(frames)} used")
    model_name = arguments.model
    if model_name is not None and Path(model_name).is_dir():
        model_name = str(Path(model_name).resolve())  # the other process runs in another folder
    elif model_name is None:
        folder = output / "storms-tiny"
        shutil.rmtree(folder, ignore_errors=True)  # it holds a copy of the code, which may be an older one
        init_checkpoint(InitArguments(output=str(folder), tiny=True))
        model_name = str(folder.resolve())
    result = answer_in_another_process(arguments, model_name, video.resolve())
    plot(result, frames, output / "latent_slots.png")
    print(f"Model     {model_name}\n          loaded as {result['loaded_class']}, without this package")
    print(f"Question  {arguments.question}")
    print(f"Block     {result['latent_length']} slots, stop reason: {result['latent_stop_reason']}")
    print(f"Answer    {result['answer']!r}")
    if arguments.model is None:
        print("          (the weights are random: this answer means nothing, only the way to it is real)")
    print(f"Picture   {output / 'latent_slots.png'}")


if __name__ == "__main__":
    main()
