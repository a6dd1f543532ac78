"""The chat demo: its answers, its page in a real browser, and the Space it becomes."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

from modeling_storms import decode_video
from recipes import demo_app
from recipes.init_checkpoint import build_tiny_base
from tests.conftest import ask
from tests.hub.server import loopback_hub


ROOT = Path(__file__).parents[2]
TOKEN = "hf_ofTheEnvironment"
ANSWERED = re.compile(r"^\*{0,2}\d+\.\d\d s")  # a finished answer's seconds; while it grows, one digit and dots


@pytest.fixture
def question(processor, clip):
    """Model inputs, frames and times of a question about 7 of the clip's frames."""
    return demo_app.prepare(processor, str(clip), "Why?", 7)


def last(steps):
    *_, result = steps
    return result


class TestAnswers:
    def test_a_video_is_prepared_as_the_processor_does_by_itself(self, processor, clip, question):
        inputs, frames, seconds = question
        expected = ask(processor, str(clip), num_frames=7)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert seconds == pytest.approx([index / 12 for index in (0, 3, 6, 10, 13, 17, 20)])
        assert np.array_equal(frames, decode_video(clip)[0][[0, 3, 6, 10, 13, 17, 20]])

    def test_off_is_the_plain_answer(self, model, processor, question):
        inputs = question[0]
        result = last(demo_app.answer(model, processor, inputs, 12, "off"))
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, latent_mode="off")
        assert result.text == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert (len(result.states), result.stop_reason) == (0, "none")

    @pytest.mark.parametrize("num_text_tokens", [1, 12])
    def test_a_block_does_not_shorten_the_text(self, model, processor, question, num_text_tokens):
        inputs = question[0]
        result = last(demo_app.answer(model, processor, inputs, num_text_tokens, "force", latent_size=3))
        options = {"do_sample": False, "latent_mode": "force", "latent_size": 3, "return_dict_in_generate": True}
        out = model.generate(**inputs, max_new_tokens=1 + 3 + 1 + num_text_tokens, **options)
        new_ids = out.sequences[0, inputs["input_ids"].shape[1] :]
        assert result.text == processor.decode(new_ids, skip_special_tokens=True)
        assert torch.equal(result.states, out.latent_states[0])
        assert (len(result.states), result.stop_reason) == (3, "budget")

    def test_an_answer_without_a_block_is_no_longer_than_one_with_latents_off(self, model, processor, question):
        inputs = question[0]
        model.generation_config.latent_size = 30
        with torch.no_grad():  # a model that never opens a block
            model.lm_head.weight[model.latent_tokens.start] = 0
        result = last(demo_app.answer(model, processor, inputs, 5, "auto"))
        assert result.stop_reason == "none"
        assert result.text == last(demo_app.answer(model, processor, inputs, 5, "off")).text
        assert "opened no block" in demo_app.describe(result)

    def test_the_answer_grows_word_by_word(self, model, processor, question):
        *steps, result = demo_app.answer(model, processor, question[0], 24, "force")
        assert len(steps) > 1
        for before, after in pairwise(steps):
            assert after.text.startswith(before.text)
        assert steps[-1].text == result.text

    def test_a_failure_ends_the_answer(self, model, processor, question, monkeypatch):
        def fail(**kwargs):
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            list(demo_app.answer(model, processor, question[0], 5, "off"))

    def test_the_frames_shown_are_the_nearest_ones(self, model, processor, clip, question):
        inputs, frames, seconds = question
        states = last(demo_app.answer(model, processor, inputs, 2, "force")).states
        shown = demo_app.nearest_frames(
            demo_app.slot_similarity(states, demo_app.step_features(model, inputs)), frames, seconds
        )
        # The visual tokens as the language model is given them, caught on the way.
        caught = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        tokens = caught[0][inputs["input_ids"] == model.config.video_token_id].numpy()
        steps = tokens.reshape(4, -1, tokens.shape[-1]).mean(1)
        all_frames, _ = decode_video(clip)
        first_of_step = [0, 6, 13, 20]  # 7 frames in pairs, the last one alone
        for slot, state in enumerate(states.numpy()):
            cosines = [step @ state / np.linalg.norm(step) / np.linalg.norm(state) for step in steps]
            index = first_of_step[int(np.argmax(cosines))]
            picture, caption = shown[slot]
            assert caption == f"slot {slot + 1}: {index / 12:.1f} s (cosine {max(cosines):.2f})"
            assert np.array_equal(picture, all_frames[index])
        assert len(shown) == 8

    def test_a_state_equal_to_a_steps_features_finds_that_step(self, model, question):
        inputs, frames, seconds = question
        steps = demo_app.step_features(model, inputs)
        order = [2, 0, 3, 1]
        shown = demo_app.nearest_frames(demo_app.slot_similarity(steps[order] * 5, steps), frames, seconds)
        first_of_step = [(0.0, 0), (0.5, 2), (13 / 12, 4), (20 / 12, 6)]
        for slot, (picture, caption) in enumerate(shown):
            at, frame_idx = first_of_step[order[slot]]
            assert caption == f"slot {slot + 1}: {at:.1f} s (cosine 1.00)"
            assert np.array_equal(picture, frames[frame_idx])

    def test_another_model_is_refused_before_it_is_loaded(self, tmp_path):
        build_tiny_base()[0].config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a 'qwen2_5_vl' model, expected a STORMS checkpoint"):
            demo_app.check_model(str(tmp_path))
        with pytest.raises(ValueError, match=r"nowhere is no folder\. Give a folder or a Hub id\."):
            demo_app.check_model(str(tmp_path / "nowhere"))


@pytest.fixture
def page(model, processor):
    """Asks the page's server, here, without a browser: `page(video, question, **options) -> outputs by name`."""
    from gradio_client import Client, handle_file

    blocks = demo_app.build_page(model, processor, "org/storms-tiny", num_frames=4)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    client = Client(address, verbose=False, analytics_enabled=False)

    def submit(video, question="Why?", mode="force", size=8, stop="budget", num_frames=4, length=8):
        video = None if video is None else handle_file(str(video))
        return client.submit(video, question, mode, size, stop, num_frames, length, api_name="/ask")

    yield lambda *args, **kwargs: outputs_of(submit(*args, **kwargs).result()), submit
    blocks.close()


def outputs_of(values):
    return SimpleNamespace(**dict(zip(("note", "text", "facts", "off_text", "off_facts", "pictures"), values)))


class TestPage:
    def test_answers_beside_each_other(self, page, clip, model, processor):
        call, _ = page
        shown = call(clip, size=3)
        inputs, _, _ = demo_app.prepare(processor, str(clip), "Why?", 4)
        assert shown.note == "Frames looked at: 4, at 0.0, 0.5, 1.0, 1.5 s."
        assert shown.text == last(demo_app.answer(model, processor, inputs, 8, "force", latent_size=3)).text
        assert shown.off_text == last(demo_app.answer(model, processor, inputs, 8, "off")).text
        assert "3 slots, stop reason: budget (its budget was used up)." in shown.facts
        assert ANSWERED.match(shown.facts)
        assert ANSWERED.match(shown.off_facts)
        assert [picture["caption"].split(":")[0] for picture in shown.pictures] == ["slot 1", "slot 2", "slot 3"]

    def test_mode_off_answers_once(self, page, clip):
        call, _ = page
        shown = call(clip, mode="off")
        assert "mode is *off*" in shown.facts
        assert shown.text == ""
        assert shown.pictures == []
        assert shown.off_text
        assert ANSWERED.match(shown.off_facts)

    @pytest.mark.parametrize(
        ("video", "question", "message"),
        [
            (None, "Why?", "There is no video yet."),
            ("clip", " ", "The question is empty."),
            ("clip", "<|video_pad|>", "The question holds <|video_pad|>, which would steer the model."),
            ("notes.mp4", "Why?", "notes.mp4: 0 frames decoded, it can't be opened."),
            ("empty.mp4", "Why?", "empty.mp4: 0 frames decoded, it can't be opened."),
            ("cut.mp4", "Why?", "cut.mp4: only some of 5 frames decode"),
        ],
    )
    def test_what_cannot_be_asked_is_said_in_words(self, page, clip, tmp_path, video, question, message):
        (tmp_path / "notes.mp4").write_text("no video\n" * 50)
        (tmp_path / "empty.mp4").write_bytes(b"")
        (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:3000])
        files = {None: None, "clip": clip}
        call, _ = page
        shown = call(files.get(video, tmp_path / str(video)), question)
        note = re.sub("only [0-4] of", "only some of", shown.note)  # decord's threads find none, one or two
        assert note.startswith(f"**No answer.** {message}")
        assert "Traceback" not in shown.note
        assert str(tmp_path.parts[1]) not in shown.note, "no path of the server"
        assert shown.text == shown.off_text == ""
        assert call(clip).text, "the next question works"

    def test_too_little_memory_is_said_in_words(self, page, clip, monkeypatch):
        call, _ = page
        with monkeypatch.context() as patch:
            patch.setattr(demo_app, "step_features", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
            assert call(clip).note == "**No answer.** 4 frames don't fit into memory. Look at fewer."
        assert call(clip).text

    def test_two_users_are_answered_one_after_the_other(self, page, clip, monkeypatch):
        _, submit = page
        spans, real = [], demo_app.answer

        def timed(*args, **kwargs):
            started = time.perf_counter()
            yield from real(*args, **kwargs)
            spans.append((started, time.perf_counter()))

        monkeypatch.setattr(demo_app, "answer", timed)
        jobs = [submit(clip, "Why?"), submit(clip, "Which cup moves?")]
        first, second = (outputs_of(job.result()) for job in jobs)
        assert len(spans) == 4
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert first.text
        assert second.text


@contextmanager
def running(command, log, **kwargs):
    """The app as a process; yields its address once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--server_port", str(port)], stdout=output, stderr=subprocess.STDOUT, **kwargs
        )
    try:
        deadline = time.monotonic() + 180
        while "Running on local URL" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser():
    """A real Chromium, without a window."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(names)} is on the PATH (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_a_browser(browser, tiny_checkpoint, clip, tmp_path, model, processor):
    from playwright.sync_api import expect

    (tmp_path / "notes.mp4").write_text("no video\n" * 50)
    (tmp_path / "large.mp4").write_bytes(bytes(2_000_000))
    command = [sys.executable, "-m", "recipes.demo_app", "--model", tiny_checkpoint, "--num_frames", 8]
    with running([*command, "--max_file_size", "1mb"], tmp_path / "log", cwd=ROOT) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 1350})
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        button, both = page.get_by_role("button", name="Ask"), ("With latents", "Latents off")
        texts = [page.get_by_label(label) for label in both]
        field = page.locator("input[type=file]")

        def question(file, words):
            if not field.count():  # it gives way to the video
                page.get_by_role("button", name="Clear").click()
            field.set_input_files(file)
            expect(field).to_have_count(0)
            page.get_by_label("Question").fill(words)
            button.click()

        def check_answers():
            expect(page.get_by_text(re.compile(r"8 slots, stop reason: budget"))).to_be_visible(timeout=60_000)
            expect(page.get_by_text(re.compile(r"^\d+\.\d\d s$")).last).to_be_visible(timeout=60_000)
            expect(page.get_by_text("Frames looked at: 8, at 0.0, 0.2, 0.5, ")).to_be_visible()
            inputs, _, _ = demo_app.prepare(processor, str(clip), "Which way does the ball move?", 8)
            for text, mode in zip(texts, ("force", "off")):
                expect(text).to_have_value(last(demo_app.answer(model, processor, inputs, 64, mode)).text)
            for slot in range(1, 9):
                caption = re.compile(rf"slot {slot}: \d\.\d s \(cosine -?[01]\.\d\d\)")
                expect(page.get_by_text(caption).first).to_be_visible()
            pictures = page.locator(".grid-container img")
            expect(pictures).to_have_count(8)
            assert all(
                picture.evaluate("one => one.complete && one.naturalWidth == 168") for picture in pictures.all()
            )

        # 1. A video, a question, both answers.
        expect(page.get_by_text("storms-tiny answers a question about a video twice")).to_be_visible()
        page.get_by_label("force").check()
        question(clip, "Which way does the ball move?")
        check_answers()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        # 2. A file that is no video: a message, no answer, nothing of the server's insides.
        question(tmp_path / "notes.mp4", "Which way does the ball move?")
        expect(page.get_by_text("No answer. notes.mp4: 0 frames decoded, it can't be opened.")).to_be_visible()
        for text in texts:
            expect(text).to_have_value("")
        seen = page.locator("body").inner_text()
        assert "Traceback" not in seen
        assert str(tmp_path) not in seen
        # 3. One that is too large never gets here.
        page.get_by_role("button", name="Clear").click()
        field.set_input_files(tmp_path / "large.mp4")
        expect(page.get_by_text(re.compile("exceed the maximum allowed size of 1"))).to_be_visible()
        # 4. And a good one again.
        question(clip, "Which way does the ball move?")
        check_answers()
        assert all(url.startswith((address, "data:", "blob:")) for url in requested), "nothing is fetched elsewhere"
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture
def hub(tiny_checkpoint, tmp_path):
    """A loopback Hub that holds the checkpoint, and the environment of a user who is logged in there."""
    with loopback_hub() as hub:
        hub.create("org/storms-tiny")
        files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
        hub.commits["org/storms-tiny"].append(("5" * 40, files))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        yield hub, environment | {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}


def push(environment, *arguments):
    command = [sys.executable, "-m", "recipes.demo_app", *map(str, arguments), "--push_to_space", "org/storms-demo"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# Runs a Space's app where this project can't be imported.
STRANGER = """
import runpy, sys
for package in ("dataset_builder", "evaluation", "model_card", "modeling_storms", "recipes"):
    sys.modules[package] = None
sys.argv = ["app.py", *sys.argv[1:]]
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_pushed_space_starts_and_answers(hub, clip, tmp_path):
    from gradio_client import Client, handle_file

    hub, environment = hub
    pushed = push(environment, "--model", "org/storms-tiny", "--num_frames", 4)
    assert pushed.returncode == 0, pushed.stderr
    assert f"Pushed to {hub.endpoint}/spaces/org/storms-demo" in pushed.stdout
    _, files = hub.tree("spaces/org/storms-demo")
    assert set(files) == {"README.md", "app.py", "app.args", "requirements.txt"}
    # 1. The files.
    assert files["app.py"] == Path(demo_app.__file__).read_bytes()
    assert f"--model org/storms-tiny --revision {'5' * 40} " in files["app.args"].decode()
    card = SpaceCard(files["README.md"].decode()).data.to_dict()
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == version("gradio")
    assert card["app_file"] == "app.py"
    assert card["models"] == ["org/storms-tiny"]
    needed = [Requirement(line) for line in files["requirements.txt"].decode().splitlines()]
    names = {one.name for one in needed}
    assert {"decord", "gradio", "torch", "torchvision", "transformers"} <= names
    assert "storms" not in names
    for one in needed:
        if one.marker is None or one.marker.evaluate():
            assert one.specifier.contains(version(one.name)), f"{one} is what is installed and tested here"
    for name, data in files.items():
        for secret in (TOKEN, str(tmp_path), str(ROOT), str(Path.home())):
            assert secret.encode() not in data, f"{name} holds {secret}"
    # 2. What a stranger's machine makes of them.
    space = tmp_path / "space"
    space.mkdir()
    for name, data in files.items():
        (space / name).write_bytes(data)
    command = [sys.executable, "-c", STRANGER, "--server_name", "127.0.0.1"]
    with running(command, tmp_path / "log", cwd=space, env=environment) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        video = handle_file(str(clip))
        shown = outputs_of(client.predict(video, "Why?", "force", 8, "budget", 4, 8, api_name="/ask"))
        assert shown.note == "Frames looked at: 4, at 0.0, 0.5, 1.0, 1.5 s."
        assert "8 slots, stop reason: budget" in shown.facts
        assert ANSWERED.match(shown.off_facts)


@pytest.mark.slow
def test_a_space_that_cannot_be_is_refused_in_words(hub, tiny_checkpoint):
    hub, environment = hub
    refused = push(environment, "--model", tiny_checkpoint)
    assert refused.returncode == 1
    assert "is a folder of this machine, which a Space can't read. Publish it (`python -m model_card" in refused.stderr
    hub.fail(403, "POST /api/repos/create")
    refused = push(environment, "--model", "org/storms-tiny")
    assert refused.returncode == 1
    assert "Pushing the Space org/storms-demo failed: status 403" in refused.stderr
    assert "Use one with write access." in refused.stderr
    for text in (refused.stdout, refused.stderr):
        assert TOKEN not in text
    assert "spaces/org/storms-demo" not in hub.commits
