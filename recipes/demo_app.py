"""A page to try a STORMS checkpoint on: upload a video, ask, and see the answer beside the one without latents.

    python -m recipes.demo_app --model org/storms-7b           # prints the page's address
    python -m recipes.demo_app --model ./storms-tiny --server_port 8000
    python -m recipes.demo_app --model org/storms-7b --push_to_space org/storms-demo

The page shows both answers and their seconds, the number of latent slots, why the block ended, and for each slot the
frame that its state is nearest to. Needs the extra `demo` (pip install "storms[demo]").

This very file is a Space's `app.py`, so it imports nothing of this project: a model brings its own code, loaded by
`AutoModel.from_pretrained(..., trust_remote_code=True)`. Flags may also stand in a file beside it, `app.args`.
"""

import argparse
import importlib.util
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    PreTrainedConfig,
    StoppingCriteria,
    TextIteratorStreamer,
)


MODES = {
    "auto": "auto: the model opens a latent block if it wants to",
    "force": "force: it always starts with one",
    "off": "off: no latents, the plain backbone",
}
STOPS = {"budget": "budget: a block uses all its slots", "token": "token: the model may end it earlier"}
STOP_REASONS = {
    "budget": "its budget was used up",
    "token": "the model ended it",
    "length": "the answer was cut inside it",
}


@dataclass
class AppArguments:
    model: str = field(metadata={"help": "STORMS checkpoint: a Hub id, or a folder."})
    revision: str | None = field(
        default=None, metadata={"help": "Its branch, tag or commit. A Space is pinned to the commit behind it."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights: auto (as saved; the default), bfloat16, ..."}
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "Frames to look at unless the page says otherwise; default: the checkpoint's."}
    )
    max_file_size: str = field(default="500mb", metadata={"help": "Largest video taken (500mb)."})
    server_name: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on (127.0.0.1); 0.0.0.0 lets other machines in."}
    )
    server_port: int | None = field(default=None, metadata={"help": "Port; default: the first free one from 7860."})
    share: bool = field(default=False, metadata={"help": "Also make a public link, through Gradio's servers."})
    push_to_space: str | None = field(
        default=None, metadata={"help": "ORG/NAME: publish the page as this Space instead of starting it here."}
    )
    private: bool = field(default=False, metadata={"help": "Create the Space as private."})


def check_model(name: str, revision: str | None = None) -> None:
    """Refuse what is no STORMS checkpoint, before its weights are fetched.

    Raises:
        ValueError: if it is another model, or there is no such folder.
        OSError: if there is no such repository, or it can't be reached.
    """
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise ValueError(f"--model {name} is no folder. Give a folder or a Hub id.")
    model_type = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type")
    if model_type != "storms":
        raise ValueError(
            f"{name} is a {model_type!r} model, expected a STORMS checkpoint. Make one by `python -m "
            f"recipes.init_checkpoint --base {name} --output DIR`."
        )


def load_checkpoint(name: str, revision: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """A checkpoint's model and processor, by the code it carries; on the GPU if there is one."""
    model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True, dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def prepare(processor: Any, video: str, question: str, num_frames: int) -> tuple[Any, np.ndarray, list[float]]:
    """Model inputs of a question about a video file, which is decoded once.

    Returns:
        The inputs, the sampled frames `(num_frames, height, width, 3)` in uint8 RGB, and their times in seconds.

    Raises:
        ValueError: if the video can't be decoded; it names the file, what was seen and what to do.
    """
    reader = processor.video_processor
    frames, metadata = reader.fetch_videos(video, partial(reader.sample_frames, num_frames=num_frames))
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
    )
    return inputs, frames, [float(seconds) for seconds in metadata.timestamps]


@dataclass
class Answer:
    """An answer, or how far it has come: `states` and `stop_reason` belong to a finished one.

    Attributes:
        states (`torch.Tensor` of shape `(num_slots, hidden_size)`): what was fed to the latent slots.
        stop_reason (`str`): how the block ended, in the words of `generate`.
    """

    text: str
    seconds: float
    states: torch.Tensor | None = None
    stop_reason: str = "none"


class TextBudget(StoppingCriteria):
    """Ends an answer after `num_text_tokens` tokens that are not latent: a block must not shorten the text."""

    def __init__(self, prompt_length: int, num_text_tokens: int, latent_token_ids: torch.Tensor):
        self.prompt_length = prompt_length
        self.num_text_tokens = num_text_tokens
        self.latent_token_ids = latent_token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_text = ~torch.isin(input_ids[:, self.prompt_length :], self.latent_token_ids)
        return is_text.sum(1) >= self.num_text_tokens


def answer(
    model: Any, processor: Any, inputs: Any, num_text_tokens: int, latent_mode: str, **latent_options: Any
) -> Iterator[Answer]:
    """Answer one question greedily, so that nothing but the latents makes two answers differ.

    Args:
        inputs (`BatchFeature`): one row, from `prepare`.
        num_text_tokens (`int`): longest answer; a block's tokens are added to it.
        latent_mode, latent_options: of the model's `generate`.

    Yields:
        The answer after each word, then the finished one.
    """
    inputs = inputs.to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    size = latent_options.get("latent_size") or model.generation_config.latent_size
    room = 0 if latent_mode == "off" else model.generation_config.max_latent_blocks * (size + 2)
    latent_token_ids = torch.tensor(processor.latent_token_ids, device=model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    started, text = time.perf_counter(), ""

    def generate() -> tuple[Any, list[int], float]:
        out = model.generate(
            **inputs,
            max_new_tokens=num_text_tokens + room,
            stopping_criteria=[TextBudget(prompt_length, num_text_tokens, latent_token_ids)],
            do_sample=False,
            streamer=streamer,
            return_dict_in_generate=True,
            latent_mode=latent_mode,
            **latent_options,
        )
        new_ids = out.sequences[0, prompt_length:].tolist()
        return out, new_ids, time.perf_counter() - started  # by this clock, showing the words costs nothing

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(generate)
        job.add_done_callback(lambda _: streamer.end())  # a failure too must end the loop
        for word in streamer:
            text += word
            yield Answer(text, time.perf_counter() - started)
        out, new_ids, seconds = job.result()
    text = processor.decode(new_ids, skip_special_tokens=True)
    yield Answer(text, seconds, out.latent_states[0], out.latent_stop_reasons[0])


@torch.no_grad()
def step_features(model: Any, inputs: Any) -> torch.Tensor:
    """Mean visual token of each temporal grid step of one video, as the vision tower sees it.

    Returns:
        `torch.Tensor` of shape `(num_grid_steps, hidden_size)`.
    """
    pixels, grid = (inputs[name].to(model.device) for name in ("pixel_values_videos", "video_grid_thw"))
    tokens = model.get_target_features(pixels, grid)[0]  # before projector and reducer
    return tokens.unflatten(0, (int(grid[0, 0]), -1)).mean(1)


def slot_similarity(states: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Cosines of slots' states `(num_slots, hidden_size)` and `step_features`, `(num_slots, num_grid_steps)`."""
    return torch.cosine_similarity(states[:, None].float(), steps[None].float(), dim=-1)


def step_frames(num_frames: int, num_grid_steps: int) -> list[int]:
    """The first frame of each temporal grid step: of 7 frames in 4 steps, 0, 2, 4 and 6."""
    return [step * -(-num_frames // num_grid_steps) for step in range(num_grid_steps)]


def nearest_frames(similarity: torch.Tensor, frames: np.ndarray, seconds: list[float]) -> list[tuple[np.ndarray, str]]:
    """For each slot the frame of the grid step it is nearest to, and a caption: `slot 3: 1.4 s (cosine 0.62)`."""
    first = step_frames(len(frames), similarity.shape[1])
    cosines, steps = similarity.max(dim=1)
    return [
        (frames[first[step]], f"slot {slot}: {seconds[first[step]]:.1f} s (cosine {cosine:.2f})")
        for slot, (cosine, step) in enumerate(zip(cosines.tolist(), steps.tolist()), start=1)
    ]


def check_question(processor: Any, video: str | None, question: str) -> None:
    """Refuse what can't be asked.

    Raises:
        ValueError: if video or question are missing, or the question holds one of the model's control tokens.
    """
    if video is None:
        raise ValueError("There is no video yet. Drop a file on the field above, or click there to choose one.")
    if not question.strip():
        raise ValueError("The question is empty. Type what you want to know about the video.")
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    if found := [token for token in special if token in question]:
        raise ValueError(f"The question holds {' and '.join(found)}, which would steer the model. Leave it out.")


def describe(result: Answer) -> str:
    """A finished answer's slots and stop reason, in a sentence."""
    if result.stop_reason == "none":
        return "0 slots: the model opened no block. The mode *force* makes it open one."
    assert result.states is not None
    return f"{len(result.states)} slots, stop reason: {result.stop_reason} ({STOP_REASONS[result.stop_reason]})."


def build_page(model: Any, processor: Any, name: str, num_frames: int | None = None) -> Any:
    """The page, a `gradio.Blocks`, for one model that answers one question at a time."""
    import gradio as gr  # here, as the functions above are of use without it

    defaults = model.generation_config
    num_frames = num_frames or processor.video_processor.num_frames or 32

    def ask(video, question, mode, latent_size, latent_stop, num_frames, num_text_tokens):
        page = {note: "", with_text: "", with_facts: "", off_text: "", off_facts: "", pictures: []}
        try:
            check_question(processor, video, question)
            inputs, frames, seconds = prepare(processor, video, question, int(num_frames))
        except ValueError as error:  # says what was seen and what to do
            message = str(error) if video is None else str(error).replace(video, Path(video).name)
            yield page | {note: f"**No answer.** {message}"}
            return
        page[note] = f"Frames looked at: {len(frames)}, at " + ", ".join(f"{at:.1f}" for at in seconds) + " s."
        try:
            steps = step_features(model, inputs)  # first, so that neither answer pays for warming up the GPU
            if mode == "off":
                page[with_facts] = "The mode is *off*: the answer is beside."
            else:
                options = {"latent_mode": mode, "latent_size": int(latent_size), "latent_stop": latent_stop}
                for result in answer(model, processor, inputs, int(num_text_tokens), **options):
                    yield page | {with_text: result.text, with_facts: f"{result.seconds:.1f} s ..."}
                page |= {with_text: result.text, with_facts: f"**{result.seconds:.2f} s**, {describe(result)}"}
                page[pictures] = nearest_frames(slot_similarity(result.states, steps), frames, seconds)
            yield page
            for result in answer(model, processor, inputs, int(num_text_tokens), "off"):
                yield {off_text: result.text, off_facts: f"{result.seconds:.1f} s ..."}
            yield page | {off_text: result.text, off_facts: f"**{result.seconds:.2f} s**"}
        except torch.OutOfMemoryError:
            yield page | {note: f"**No answer.** {len(frames)} frames don't fit into memory. Look at fewer."}

    with gr.Blocks(title="STORMS", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            f"# STORMS\n`{Path(name).name if Path(name).is_dir() else name}` answers a question about a video twice: "
            "after a latent block, in which it thinks in hidden states instead of text, and without one."
        )
        with gr.Row():
            with gr.Column():
                # Another `format`, or a webcam, would need a system FFmpeg.
                video = gr.Video(label="Video", sources=["upload"], height=300)
                question = gr.Textbox(label="Question", placeholder="Which cup hides the ball?")
                button = gr.Button("Ask", variant="primary")
                note = gr.Markdown()
            with gr.Column():
                mode = gr.Radio(
                    [(text, key) for key, text in MODES.items()], value=defaults.latent_mode, label="Latent mode"
                )
                latent_size = gr.Slider(
                    1,
                    max(32, defaults.latent_size),
                    defaults.latent_size,
                    step=1,
                    label="Latent budget, slots per block",
                )
                latent_stop = gr.Radio(
                    [(text, key) for key, text in STOPS.items()], value=defaults.latent_stop, label="Stop rule"
                )
                frame_slider = gr.Slider(1, max(64, num_frames), num_frames, step=1, label="Frames to look at")
                length = gr.Slider(1, 512, 64, step=1, label="Longest answer, tokens of text")
        with gr.Row():
            with gr.Column():
                with_text = gr.Textbox(label="With latents", lines=4, interactive=False)
                with_facts = gr.Markdown()
            with gr.Column():
                off_text = gr.Textbox(label="Latents off", lines=4, interactive=False)
                off_facts = gr.Markdown()
        label = "For each slot the frame that its state is nearest to (a visual step holds two; the first is shown)"
        pictures = gr.Gallery(label=label, columns=4, height="auto", object_fit="contain")
        gr.on(
            [button.click, question.submit],
            ask,
            [video, question, mode, latent_size, latent_stop, frame_slider, length],
            [note, with_text, with_facts, off_text, off_facts, pictures],
            api_name="ask",
        )
    return blocks.queue(default_concurrency_limit=1, max_size=20)


def main() -> None:
    parser = HfArgumentParser(AppArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        check_model(arguments.model, arguments.revision)
        if arguments.push_to_space is not None:
            from recipes.space import push_to_space

            print(f"Pushed to {push_to_space(Path(__file__), arguments)}")
            return
        if importlib.util.find_spec("gradio") is None:  # better said before the weights are loaded
            raise ValueError('The page needs Gradio: pip install "storms[demo]".')
        model, processor = load_checkpoint(arguments.model, arguments.revision, arguments.dtype)
    except (ValueError, OSError) as error:  # these say what was seen and what to do
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    page = build_page(model, processor, arguments.model, arguments.num_frames)
    page.launch(
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        share=arguments.share,
        max_file_size=arguments.max_file_size,
    )


if __name__ == "__main__":
    main()
