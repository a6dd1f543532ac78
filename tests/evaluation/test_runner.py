"""A run's answers depend on nothing but the questions: not on batches, sharing, workers, ranks or a kill between."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from datasets import Dataset, Features
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from dataset_builder.schema import FEATURES
from dataset_builder.thought_video import encode_video
from evaluation.__main__ import EvaluationArguments, label, main
from evaluation.answering import Answerer
from evaluation.benchmarks.base import Benchmark, Question
from evaluation.prompts import storms_prompt
from evaluation.protocols import Protocol
from evaluation.report import public_command
from evaluation.runner import Item, Journal, costs, run
from model_card.render import check_results
from tests.conftest import ask, moving_disc
from tests.dataset_builder.fault_server import fault_server, reply


PROTOCOL = Protocol(num_frames=4)
TEXTS = (
    "Which cup moves?",
    "Why?",
    "Does the red car stop before the light changes, or after two seconds of waiting?",
)


@pytest.fixture(scope="module")
def videos():
    """Four clips of different lengths and sizes."""
    shapes = ((8, 96, 128), (5, 112, 84), (12, 84, 84), (6, 64, 64))
    return [encode_video(moving_disc(*shape, seed), 4) for seed, shape in enumerate(shapes)]


@pytest.fixture(scope="module")
def benchmark(videos):
    """Twelve questions about four videos: with options, and without."""
    questions = []
    for number, video in enumerate(videos):
        for turn, text in enumerate(TEXTS):
            options = {} if turn == 1 else {"A": "left", "B": "right"}
            categories = {"turn": str(turn)}
            questions.append(
                Question(f"{number}-{turn}", text, "A", options, f"v{number}", video, categories=categories)
            )
    return Benchmark("clips", "org/clips", "test", questions)


@pytest.fixture
def answerer(pair):
    return Answerer(pair[1].eval(), pair[2], max_new_tokens=16, batch_size=4, latent_mode="force", latent_size=2)


def items(benchmark, settings=""):
    return [Item(benchmark, question, settings=settings) for question in benchmark.questions]


def essence(answers):
    """What must not depend on how a run went."""
    changing = ("seconds", "latency", "batch_size", "shared_by", "modules")
    return [{name: value for name, value in answer.items() if name not in changing} for answer in answers]


@pytest.fixture(scope="module")
def undisturbed(pair, benchmark, tmp_path_factory):
    answerer = Answerer(pair[1].eval(), pair[2], max_new_tokens=16, batch_size=4, latent_mode="force", latent_size=2)
    answers = run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path_factory.mktemp("undisturbed")))
    assert [answer["id"] for answer in answers] == [question.id for question in benchmark.questions]
    assert len({answer["text"] for answer in answers}) >= 9, "alike answers would hide any mix-up"
    return essence(answers)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 1}, {"batch_size": 12}, {"share_prefix": False}, {"num_workers": 2}],
    ids=lambda changes: ", ".join(f"{name} {value}" for name, value in changes.items()),
)
def test_answers_do_not_depend_on_how_they_are_batched(answerer, benchmark, undisturbed, tmp_path, changes):
    answerer.batch_size = changes.pop("batch_size", 4)
    assert essence(run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path), **changes)) == undisturbed


def test_the_questions_of_one_video_share_its_encoded_prefix(answerer, benchmark, tmp_path):
    shared = run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path / "shared"))
    tokens = answerer.num_video_tokens
    found = costs(shared)
    assert found["video_tokens"] == pytest.approx(tokens)
    assert found["video_tokens_unshared"] == 3 * tokens  # three questions each: one video's worth, not three
    run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path / "alone"), share_prefix=False)
    assert answerer.num_video_tokens == 4 * tokens


def test_a_finished_question_is_never_asked_again(answerer, benchmark, undisturbed, tmp_path, monkeypatch):
    asked = []
    answer = Answerer.answer

    def stop_after_five(self, clips, texts, **options):
        if len(asked) >= 5:
            raise KeyboardInterrupt
        asked.extend(text for given in texts for text in given)
        return answer(self, clips, texts, **options)

    monkeypatch.setattr(Answerer, "answer", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path))
    before = len(asked)
    assert 0 < before < 12
    # A kill in the middle of a line leaves a torn one; what was asked for there is asked again.
    with (tmp_path / "answers-00000.jsonl").open("ab") as file:
        file.write(b'{"key": "0123", "id": "0-0", "te')
    asked.clear()

    def count(self, clips, texts, **options):
        asked.extend(text for given in texts for text in given)
        return answer(self, clips, texts, **options)

    monkeypatch.setattr(Answerer, "answer", count)
    answers = run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path))
    assert essence(answers) == undisturbed
    assert len(asked) == 12 - before
    asked.clear()
    assert essence(run(answerer, items(benchmark), PROTOCOL, Journal(tmp_path))) == undisturbed
    assert asked == []
    # Written down after the torn line, nothing is lost.
    assert len(Journal(tmp_path).read()) == 12


def test_other_settings_another_text_or_another_video_ask_anew(benchmark, videos):
    first = Item(benchmark, benchmark.questions[0])
    assert first.key == Item(benchmark, replace(benchmark.questions[0])).key
    others = [
        Item(benchmark, benchmark.questions[0], settings="x"),
        Item(benchmark, benchmark.questions[0], thinking=True),
        Item(benchmark, replace(benchmark.questions[0], video=videos[1])),
        Item(benchmark, replace(benchmark.questions[0], start=0.5)),
        Item(benchmark, replace(benchmark.questions[0], answer="B")),
        Item(replace(benchmark, name="others"), benchmark.questions[0]),
    ]
    assert len({first.key, *(other.key for other in others)}) == 7


def test_what_cannot_be_asked_is_counted_and_the_rest_is_asked(answerer, benchmark, undisturbed, videos, tmp_path):
    bad = [
        replace(benchmark.questions[0], id="missing", failure="missing video: a.mp4"),
        replace(benchmark.questions[0], id="cut", video=videos[0][:300]),
        replace(benchmark.questions[0], id="gone", video=str(tmp_path / "gone.mp4")),
        replace(benchmark.questions[0], id="late", start=50.0, end=60.0),
        replace(benchmark.questions[0], id="reserved", question="What is <|video_pad|>?"),
    ]
    whole = replace(benchmark, questions=[*bad, *benchmark.questions])
    answers = run(answerer, items(whole), PROTOCOL, Journal(tmp_path / "journal"), num_workers=1)
    assert essence(answers[5:]) == undisturbed
    told = ("missing video", "can't be opened", "no such file", "50.0 to 60.0 seconds", "reserved text")
    for answer, words in zip(answers, told):
        assert words in answer["failure"]
        assert (answer["is_correct"], answer["is_parsed"], answer["text"]) == (False, False, "")


def test_what_failed_is_tried_again_and_an_answer_outdoes_a_failure(answerer, benchmark, tmp_path):
    (item,) = items(replace(benchmark, questions=benchmark.questions[:1]))
    failure = {"key": item.key, "failure": "OSError: stale file handle", "is_correct": False}
    Journal(tmp_path, rank=1).write([failure])
    for _ in range(2):
        (answer,) = run(answerer, [item], PROTOCOL, Journal(tmp_path))
        assert answer["failure"] == ""
        assert answer["num_frames"] == 4
    assert len((tmp_path / "answers-00000.jsonl").read_text().splitlines()) == 1


def test_a_clip_is_cut_before_frames_are_sampled(answerer, benchmark, tmp_path):
    part = replace(benchmark, questions=[replace(benchmark.questions[0], start=1.0, end=2.0)])
    (answer,) = run(answerer, items(part), Protocol(num_frames=2), Journal(tmp_path))
    assert answer["frame_times"] == [0.0, 0.5]
    assert answer["second_per_grid"] == 1.0  # two frames of half a second


# -- the command


@pytest.fixture(scope="module")
def checkpoint(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "storms"
    pair[1].save_pretrained(folder)
    pair[2].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(videos, tmp_path_factory):
    """A folder as the builder writes one: six questions about three videos."""
    folder = tmp_path_factory.mktemp("datasets") / "clips"
    rows = []
    for number in range(6):
        row = dict.fromkeys(FEATURES) | {
            "id": f"row-{number}",
            "source": "simulated",
            "video_id": f"v{number // 2}",
            "video": {"bytes": videos[number // 2], "path": None},
            "video_path": f"world/v{number // 2}.mp4",
            "question": TEXTS[number % 3],
            "options": ["left", "right", "none"][: 2 + number % 2],
            "answer": "AB"[number % 2],
            "problem_type": "multiple choice",
            "keyframes": [],
        }
        rows.append(row)
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=Features(FEATURES)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    config = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")
    return folder


def flags(checkpoint, dataset, output):
    given = {"model": checkpoint, "benchmarks": dataset, "output": output, "frames": 4, "max_new_tokens": 8}
    return [
        str(part)
        for name, value in {**given, "num_workers": 0, "batch_size": 3}.items()
        for part in (f"--{name}", value)
    ]


def test_the_command_writes_what_a_model_card_takes(checkpoint, dataset, tmp_path, capsys):
    sweep = ["--latent_mode", "off,force", "--latent_size", "2,3"]
    results = main([*flags(checkpoint, dataset, tmp_path / "out"), *sweep])
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(written) == {"off", "force-k2", "force-k3"}
    assert [one for name in ("off", "force-k2", "force-k3") for one in written[name]["results"]] == results
    for name, body in written.items():
        (entry,) = check_results(body, name)
        assert entry["num_rows"] == 6 == len(body["answers"])
        assert entry["value"] == sum(answer["is_correct"] for answer in body["answers"]) / 6
        assert entry["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
        assert entry["protocol"] == "uniform4"
        assert str(tmp_path) not in json.dumps(body)
        lengths = {answer["latent_length"] for answer in body["answers"]}
        assert lengths == {0 if name == "off" else int(name[-1])}
    assert written["force-k2"]["results"][0]["latent_mode"] == "force 2"
    shown = capsys.readouterr().out
    assert "clips" in shown
    assert "force 2" in shown
    assert "uniform4, prompt storms" in shown


def test_a_sweep_answers_as_one_question_at_a_time_with_its_frames_and_reduction(
    pair, checkpoint, dataset, videos, tmp_path, capsys, monkeypatch
):
    # Not by the environment: `Dataset.map` with processes replaces `os.environ`, and rich goes on reading the old one.
    monkeypatch.setattr("rich.console.Console._environ", {"COLUMNS": "250"})
    given = flags(checkpoint, dataset, tmp_path / "out")
    given += ["--frames", "4,8", "--temporal_pool", "1,2", "--spatial_pool", "4", "--latent_mode", "off"]
    results = main(given)
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    names = [f"uniform{frames}-pool{pool}-spatial4-off" for frames in (4, 8) for pool in (1, 2)]
    assert set(written) == set(names)
    assert [written[name]["results"][0] for name in names] == results
    table = capsys.readouterr().out.split("visual tokens")[1]
    rows = [" ".join(line.split()) for line in table.splitlines()]
    tokens = []
    model, processor = pair[1].eval(), pair[2]
    for name, (frames, pool) in zip(names, product((4, 8), (1, 2))):
        body, reduction = written[name], {"temporal_pool": pool, "spatial_pool": 4}
        assert body["settings"]["reduction"] == {**reduction, "temporal_sampling": 1, "pool_images": False}
        described = f"uniform{frames}, {'temporal pool 2, ' * (pool == 2)}spatial pool 4"
        assert check_results(body, name)[0]["protocol"] == described
        for number, answer in enumerate(body["answers"]):
            path = tmp_path / f"{number // 2}.mp4"
            path.write_bytes(videos[number // 2])
            text = storms_prompt(TEXTS[number % 3], ["left", "right", "none"][: 2 + number % 2])
            inputs = ask(processor, str(path), text, num_frames=frames, **reduction)
            out = model.generate(**inputs, **reduction, latent_mode="off", max_new_tokens=8, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            assert answer["text"] == processor.batch_decode(new, skip_special_tokens=True)[0]
            assert answer["num_video_tokens"] == int((inputs["input_ids"] == processor.video_token_id).sum())
        taken = body["costs"]
        assert 0 < sum(taken["modules"].values()) < taken["seconds_per_question"]
        assert taken["modules"]["latent block"] == taken["modules"]["projector"] == 0
        assert all(taken["modules"][module] > 0 for module in ("vision tower", "prefill", "decode"))
        tokens.append(taken["video_tokens_per_question"])
        low, high = (f"{100 * one:.1f}" for one in body["results"][0]["interval"])
        accuracy = f"{100 * body['results'][0]['value']:.1f} ({low} to {high})"
        shown = f"{described.replace(',', '', 1)} {tokens[-1]:.0f} {accuracy}"
        assert [line for line in rows if line.startswith(f"{shown} ")], shown
    assert tokens[0] == tokens[3] == 2 * tokens[1] < tokens[2], "twice the frames, half of them left, are as many"
    # The same command asks nothing again, and one that goes beyond it what is new.
    asked = []
    answer = Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, *args: (asked.append(self.reducer.temporal_pool), answer(self, *args))[1]
    )
    assert main(given) == results
    assert asked == []
    given[given.index("1,2")] = "1,2,3"
    assert len(main(given)) == 6
    assert set(asked) == {3}


def test_a_run_killed_at_any_moment_goes_on_to_the_same_answers(checkpoint, dataset, tmp_path):
    main(flags(checkpoint, dataset, tmp_path / "whole"))
    killer = (
        "import os, signal, sys\n"
        "from evaluation.__main__ import main\n"
        "from evaluation.runner import Journal\n"
        "write, calls = Journal.write, []\n"
        "def write_then_die(self, answers):\n"
        "    write(self, answers)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.write = write_then_die\n"
        "main(sys.argv[1:])\n"
    )
    given = flags(checkpoint, dataset, tmp_path / "killed")
    died = subprocess.run([sys.executable, "-c", killer, *given], capture_output=True, text=True, check=False)
    assert died.returncode == -9, died.stderr[-2000:]
    assert 0 < len(Journal(tmp_path / "killed" / ".answers").read()) < 6
    assert not list((tmp_path / "killed").glob("*.json"))
    main(given)
    whole, resumed = (json.loads((tmp_path / name / "default.json").read_text()) for name in ("whole", "killed"))
    assert essence(resumed["answers"]) == essence(whole["answers"])
    drop = {"command"}
    assert [{k: v for k, v in one.items() if k not in drop} for one in resumed["results"]] == [
        {k: v for k, v in one.items() if k not in drop} for one in whole["results"]
    ]


def test_results_of_another_run_are_not_overwritten(checkpoint, dataset, tmp_path):
    given = flags(checkpoint, dataset, tmp_path / "out")
    assert main(given) == main(given)
    before = (tmp_path / "out" / "default.json").read_bytes()
    with pytest.raises(ValueError, match=r"results of another run \(prompt, max_new_tokens\)\. Give another --output"):
        main([*given, "--thinking", "--max_new_tokens", "9"])
    shutil.copytree(dataset, tmp_path / "others")
    given[given.index(str(dataset))] = str(tmp_path / "others")
    with pytest.raises(ValueError, match=r"another run \(clips\)"):
        main(given)
    assert (tmp_path / "out" / "default.json").read_bytes() == before


def test_two_datasets_of_one_name_are_refused_before_a_question_is_asked(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / dataset.name)
    with pytest.raises(ValueError, match="saw the names clips, clips, expected at least one and each once"):
        main(["--model", "no/such", "--benchmarks", f"{dataset},{tmp_path / dataset.name}"])


def test_a_part_of_a_dataset_is_told_as_such(checkpoint, dataset, tmp_path, capsys):
    (result,) = main([*flags(checkpoint, dataset, tmp_path), "--max_questions", "2"])
    assert (result["is_subset"], result["num_rows"]) == (True, 2)
    assert "2*" in capsys.readouterr().out


def test_a_published_command_names_no_folder_of_this_machine():
    given = ["--benchmarks", "simulated=/home/me/worlds,mmvu=/home/me/mmvu,mvbench", "--output=/home/me/out"]
    expected = "python -m evaluation --benchmarks simulated=./worlds,mmvu=./mmvu,mvbench --output=./out"
    assert public_command("evaluation", given) == expected


def test_a_plain_checkpoint_reasons_in_text(pair, dataset, tmp_path):
    plain = Qwen2_5_VLProcessor(
        pair[2].image_processor,
        pair[2].tokenizer,
        Qwen2VLVideoProcessor(size=pair[2].video_processor.size),
        chat_template=pair[2].chat_template,
    )
    for part in (pair[0], plain):
        part.save_pretrained(tmp_path / "plain")
    results = main([*flags(tmp_path / "plain", dataset, tmp_path / "out"), "--thinking"])
    assert (results[0]["latent_mode"], results[0]["prompt"]) == ("none", "storms, thinking")
    for option, told in (("latent_mode", "force"), ("temporal_pool", "4")):
        with pytest.raises(ValueError, match=f"without a latent mode and token reduction, but {option} was given"):
            main([*flags(tmp_path / "plain", dataset, tmp_path / "out"), f"--{option}", told])


def test_free_form_answers_go_to_the_judge_once(checkpoint, dataset, tmp_path, monkeypatch):
    rows = Dataset.from_parquet(str(dataset / "data" / "test-00000-of-00001.parquet"))
    rows = rows.map(lambda row, index: {"options": row["options"] if index % 2 else []}, with_indices=True)
    open_ended = tmp_path / "open"
    shutil.copytree(dataset, open_ended)
    rows.cast(Features(FEATURES)).to_parquet(open_ended / "data" / "test-00000-of-00001.parquet")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-4f9a1c7e2b8d6053")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fault_server(lambda request: reply({"verdict": "correct"})) as server:
        judge = ["--judge_model", "grader-1", "--judge_base_url", server.base_url]
        for _ in range(2):
            (result,) = main([*flags(checkpoint, open_ended, tmp_path / "out"), *judge])
        assert len(server.requests) == 3
    answers = json.loads((tmp_path / "out" / "default.json").read_text())["answers"]
    assert [answer["rule"] == "judge" for answer in answers] == [True, False] * 3
    assert all(answer["is_correct"] for answer in answers[::2])
    assert result["judge"]["model"] == "grader-1"
    assert result["judge"]["num_judged"] == 3


@pytest.mark.slow
def test_two_processes_share_the_questions(checkpoint, dataset, tmp_path):
    main(flags(checkpoint, dataset, tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "evaluation"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, *flags(checkpoint, dataset, tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    journals = sorted((tmp_path / "two" / ".answers").glob("answers-*.jsonl"))
    assert len(journals) == 2
    assert all(journal.read_text().count("\n") for journal in journals), "one process asked everything"
    one, two = (json.loads((tmp_path / name / "default.json").read_text()) for name in ("one", "two"))
    assert essence(two["answers"]) == essence(one["answers"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--frames", "8", "--protocol", "uniform8"], "both say which frames"),
        (["--protocol", "dense"], "expected a name like uniform32 or fps2_max32"),
        (["--protocol", "fps0_max8"], "expected numbers above 0"),
        (["--prompt", "magic"], "expected one of storms, official"),
        (["--latent_size", "many"], "expected numbers like 4,8"),
        (["--latent_size", "0"], "latent_size is 0"),
        (["--frames", "0"], "expected numbers above 0"),
        (["--frames", "4,"], "--frames: saw '4,', expected numbers like 4,8"),
        (["--temporal_pool", "4.5"], "--temporal_pool: saw '4.5', expected numbers like 4,8"),
        (["--spatial_pool", "4,8"], "spatial_pool is 8, but must be a square number"),
        (["--latent_mode", "off,on"], "latent_mode is 'on'"),
        (["--batch_size", "0"], "expected 1 or more"),
        (["--open_ended"], "Name one by --judge_model"),
        (["--min_frame_pixels", "100", "--max_frame_pixels", "50"], "more than --max_frame_pixels 50"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(given, told):
    with pytest.raises(ValueError, match=told):
        main(["--model", "no/such", "--benchmarks", "no/such", *given])


def test_a_sweep_has_one_run_without_latents():
    arguments = EvaluationArguments("m", "b", latent_mode="off,force", latent_size="4,8", latent_stop="token")
    settings = arguments.latent_settings()
    assert [label(options) for options in settings] == ["off", "force-k4-token", "force-k8-token"]
    assert [label(options) for options in EvaluationArguments("m", "b").latent_settings()] == ["default"]
    arguments = EvaluationArguments("m", "b", frames="32,128,32", temporal_pool="1, 4", temporal_sampling="2")
    assert [protocol.name for protocol in arguments.protocols()] == ["uniform32", "uniform128"]
    assert [label(options, "uniform128") for options in arguments.reductions()] == [
        "uniform128-pool1-sampling2",
        "uniform128-pool4-sampling2",
    ]
