"""lmms-eval itself, in an environment of its own, runs our model as an installed plug-in on a local task."""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from dataset_builder.thought_video import encode_video
from evaluation.answering import Answerer, load_model
from evaluation.benchmarks.base import Benchmark, Prompt, Question
from evaluation.protocols import Protocol
from evaluation.runner import Item, Journal, run
from tests.conftest import moving_disc, with_reduction


ROOT = Path(__file__).parents[2]
TASK = """\
task: storms_clips
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function task.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
process_results: !function task.score
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false, until: ["<stop>"]}}
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
CODE = """\
def visual(doc):
    return [doc["video"]]


def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""
TEXTS = ("Which cup moves?", "Why?", "Does the red car stop before the light changes?")


@pytest.fixture(scope="module")
def lmms_python(tmp_path_factory):
    """A Python that has lmms-eval with the versions it pins, and for the rest this environment's packages."""
    folder = tmp_path_factory.mktemp("lmms") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "lmms-eval>=0.7.3"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip("lmms-eval can't be downloaded here")
    assert done.returncode == 0, done.stderr[-2000:]
    return python


@pytest.mark.slow
def test_lmms_eval_gets_the_answers_of_our_runner(pair, lmms_python, tmp_path):
    # 1. A checkpoint, a task and what our runner answers.
    for part in with_reduction(pair[1], pair[2], temporal_pool=2):
        part.save_pretrained(tmp_path / "storms")
    videos = []
    for seed, shape in enumerate(((8, 96, 128), (12, 84, 84))):
        videos.append(tmp_path / f"{seed}.mp4")
        videos[-1].write_bytes(encode_video(moving_disc(*shape, seed), 4))
    questions = [
        Question(f"{number}-{turn}", text, "", video_id=str(number), video=str(video))
        for number, video in enumerate(videos)
        for turn, text in enumerate(TEXTS)
    ]
    benchmark = Benchmark("clips", "clips", "test", questions, prompts={"official": lambda one: Prompt(one.question)})
    model, processor = load_model(str(tmp_path / "storms"))
    options = {"latent_mode": "force", "latent_size": 3, "spatial_pool": 4}
    answerer = Answerer(model, processor, max_new_tokens=12, batch_size=2, **options)
    items = [Item(benchmark, question, "official") for question in questions]
    expected = [one["text"] for one in run(answerer, items, Protocol(num_frames=4), Journal(tmp_path / "journal"))]
    assert len(set(expected)) >= 4, "alike answers would hide any mix-up"
    # 2. The same by lmms-eval, which finds us by the entry point.
    task = tmp_path / "task"
    task.mkdir()
    rows = [
        {"id": one.id, "question": one.question, "video": one.video, "answer": text}
        for one, text in zip(questions, expected)
    ]
    (task / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "task.yaml").write_text(TASK.format(data=task / "data.jsonl"))
    (task / "task.py").write_text(CODE)
    options |= {"pretrained": tmp_path / "storms", "protocol": "uniform4", "num_workers": 0}
    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    command = [lmms_python, "-m", "lmms_eval", "--model", "storms", "--model_args", arguments, "--batch_size", "2"]
    command += ["--tasks", "storms_clips", "--include_path", task, "--log_samples", "--output_path", tmp_path / "out"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "LMMS_EVAL_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (samples,) = (tmp_path / "out").rglob("*samples_storms_clips.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {one["doc_id"]: one["filtered_resps"] for one in logged}
    assert [answers[index] for index in range(6)] == expected
    (results,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["storms_clips"]["exact,none"] == 1.0
