"""Experiments: their questions are right, their measurements mean what they say, and what they found is shown."""

import dataclasses
import json
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dataset_builder.schema import LETTERS
from dataset_builder.sources.simulated import list_rows, scene_of
from dataset_builder.sources.worlds import COLORS
from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from modeling_storms.video_storms import decode_video
from recipes.answers import answer_rows, compare_solvers
from recipes.collator import StormsCollator
from recipes.data import load_split
from recipes.experiments import gate, internalisation, long_video
from recipes.experiments.perception import SEEN, START, PerceptionArguments, write_perception

from .tiny_runs import make_rows, make_trainer


@pytest.fixture(scope="module")
def perception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception") / "data"
    write_perception(PerceptionArguments(str(folder), num_rows=6, num_swaps=2, seed=3))
    return {split: load_split(str(folder), split) for split in ("see", "choose", "follow", "letters")}


def test_perception_questions_have_right_answers(perception):
    sources = list_rows(["shell_game"], 6, 3, {"train": 1.0}, {"shell_game": {"num_swaps": 2}})
    scenes = {row["id"]: scene_of(row["scene"]) for row in sources}
    kinds = set()
    for row in [*perception["choose"], *perception["follow"]]:
        source, kind, _ = row["id"].rsplit("-", 2)
        scene = scenes[source]
        kinds.add(kind)
        if row["messages"]:
            told, reply = row["messages"]
            assert f"The ball is under the {scene.options[scene.start]}." in told["content"]
            assert f"{reply['content']}. {scene.options[scene.start]}" in told["content"]
            continue
        answer = row["options"][LETTERS.index(row["answer"])] if row["options"] else row["answer"]
        frames, _ = decode_video(row["video"]["bytes"])
        assert len(frames) == scene.num_frames
        if row["question"] == START:
            # The ball's cup is the one that is lifted in the first frame: less of its colour at its foot.
            feet, ball = scene.cups_at(0)
            assert answer == scene.options[sorted(range(3), key=lambda cup: feet[cup][0]).index(ball)]
        elif row["question"] == SEEN:
            last = scene.thought_frame(scene.num_frames - 1)
            feet, ball = scene.cups_at(scene.num_frames - 1)
            x, y = feet[ball]
            assert tuple(last[int(y - 7), int(x)]) == scene.ball_color
            assert answer == scene.options[sorted(range(3), key=lambda cup: feet[cup][0]).index(ball)]
        elif kind.startswith("follow"):
            cup = next(cup for cup in range(3) if f"Follow the {scene.options[cup]}." in row["question"])
            held = dataclasses.replace(scene, start=cup)  # as if the ball were under it
            feet, ball = held.cups_at(scene.num_frames - 1)
            assert answer == scene.options[sorted(range(3), key=lambda one: feet[one][0]).index(ball)]
        else:
            swap = int(row["question"].rstrip("?").split()[-1]) - 1
            assert answer == scene.options[3 - sum(scene.swaps[swap])]
    assert kinds == {"still", "seen", "start", "start, choice", "text", "follow", "follow, choice"}
    for part, whole in (("see", "choose"), ("letters", "follow")):
        assert set(perception[part]["id"]) < set(perception[whole]["id"])


def test_no_perception_question_is_the_task_itself(perception):
    task = next(list_rows(["shell_game"], 1, 0, {"train": 1.0}))["question"]
    assert not [row for split in perception.values() for row in split if task in str(row)]


def test_a_row_given_its_own_states_answers_as_before(tmp_path):
    gate.make_base(tmp_path, seed=0)
    model = StormsForConditionalGeneration.from_pretrained(tmp_path).eval()
    for parameter in model.parameters():  # rows then differ in what they answer
        if parameter.ndim > 1:
            parameter.data.mul_(2)
    processor = StormsProcessor.from_pretrained(tmp_path)
    processor.video_processor.num_frames = 4
    collator = StormsCollator(processor)
    rows = make_rows(4)
    own = answer_rows(model, collator, rows, batch_size=2, latent_mode="force")
    states = [one["latent_states"] for one in own]
    again = answer_rows(model, collator, rows, batch_size=3, replace_states=states)
    assert [one["text"] for one in again] == [one["text"] for one in own]
    for one, other in zip(own, again):
        torch.testing.assert_close(one["latent_states"], other["latent_states"])
    turned = answer_rows(model, collator, rows, batch_size=4, replace_states=[*states[1:], states[0]])
    torch.testing.assert_close(turned[0]["latent_states"], states[1])
    assert [one["text"] for one in turned] != [one["text"] for one in own]


def test_questions_to_see_on_have_right_answers(tmp_path):
    internalisation.write_base_task(tmp_path / "see", num_scenes=9)
    rows = {split: load_split(str(tmp_path / "see"), split) for split in ("see", "step")}
    assert set(rows["see"]["id"]) < set(rows["step"]["id"])
    asked = set()
    for row in rows["step"]:
        index = int(row["id"].split("-")[0])
        dials = {"color_swap": {"num_swaps": 8 - index % 6, "frames_per_swap": 4}}
        (source,) = list_rows(["color_swap"], 1, 1000 + index, {"train": 1.0}, dials)
        scene = scene_of(source["scene"])
        kind = row["question"].split()[0]
        asked.add(kind)
        signals = [int(word.rstrip("?.")) for word in row["question"].split() if word.rstrip("?.").isdigit()]
        shown = {scene.options[one] for one in scene.swaps[signals[0] - 1]} if signals else set()
        if kind == "The" and signals:
            before = row["question"].split()[3]
            assert row["answer"] == ((shown - {before}).pop() if before in shown else before)
        elif signals:
            assert row["answer"] not in shown
        else:
            assert row["answer"] == scene.options[scene.start if "start" in row["question"] else scene.answer_idx]
        assert len(decode_video(row["video"]["bytes"])[0]) == scene.num_frames
    assert asked == {"Which", "The"}


@pytest.mark.slow
def test_the_experiment_on_latents_runs_whole_and_repeats_nothing(tmp_path):
    grid = yaml.safe_load(Path(internalisation.__file__).with_suffix(".yaml").read_text())
    grid |= {"num_rows": 8, "num_answers": 24, "num_scenes": 4, "see_steps": [1, 1], "max_steps": 2, "seeds": [0]}
    grid |= {"swaps": [2, 3], "variant_swaps": 2, "see_loss": 100.0, "rehearsed": 0.7}
    grid["training"]["logging_steps"] = 1
    for arm in ("sft, curriculum", "pause tokens, curriculum"):
        grid["ablations"][arm][0] |= {"stop_at_loss": 100.0, "share": 2.5, "start": {"share": 1.5}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    taught = ["stage 2, curriculum", "sft, curriculum", "pause tokens, curriculum"]
    arms = ["sft", "pause tokens", "chain of thought", "full", "full, shuffled targets", *taught]
    argv = [
        "--output",
        str(tmp_path / "out"),
        "--config",
        str(tmp_path / "grid.yaml"),
        "--swaps",
        "2",
        "--arms",
        *arms,
    ]
    results = internalisation.main(argv)
    assert {run["arm"]: round(run["latent_tokens_per_item"]) for run in results["runs"]} == {
        **dict.fromkeys(arms, 4),
        **dict.fromkeys(taught, 3),
        "sft": 0,
        "sft, curriculum": 0,
        "chain of thought": 0,
    }
    fed_back = ("full", "full, shuffled targets", "stage 2, curriculum")
    assert set(results["interventions"]) == {f"{arm}, 2 swaps" for arm in fed_back}
    assert all(0 <= one["goes_on_from_donor"] <= 1 for one in results["interventions"].values())
    assert (
        {run["arm"]: run["steps"] for run in results["runs"]}
        == {
            **dict.fromkeys(arms, 2),
            **dict.fromkeys([arm for arm in arms if arm.startswith("full")], 3),  # one in each stage
            "stage 2, curriculum": 19,  # six for each of three states, one more for the end
            **dict.fromkeys(taught[1:], 7),  # at most three and five, one where that is enough
        }
    )
    assert all(len(run["accuracy_by_state"]) == 3 for run in results["runs"] if run["arm"] in taught)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    seconds = results.pop("seconds_per_item")
    assert list(seconds) == ["sft", "chain of thought", "full"]
    again = internalisation.main(argv)
    assert all(one > 0 for one in again.pop("seconds_per_item").values())
    assert again == results
    assert [one["iterations"] for one in results["solvers"]] == [None, 1, 2, 3, 4]
    assert results["solvers"][-1]["same_answer"] == 1
    (full,) = (run for run in results["runs"] if run["arm"] == "full")
    assert [len(accuracies) for accuracies in full["probes"]] == [3] * 4  # times by slots
    assert all(0 <= one <= 1 for accuracies in full["probes"] for one in accuracies)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == before
    # From nothing, a run comes out the same.
    internalisation.main(["--output", str(tmp_path / "again"), *argv[2 : -len(arms)], "sft"])
    for name in ("base/model.safetensors", "2 swaps/sft/0/model.safetensors", "2 swaps/sft/run.json"):
        first, second = (tmp_path / root / "seed0" / name for root in ("out", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    # A curriculum asks about the states on the way, in words or by the number of slots.
    folder = str(tmp_path / "out" / "2 swaps" / "curriculum")
    for level in range(3):
        told, slots = (load_split(folder, f"{kind}{level}") for kind in ("told", "slots"))
        for row, same, source in zip(told, slots, load_split(str(tmp_path / "out" / "2 swaps" / "rows"), "chain")):
            asked = row["latent_size"] - 1
            assert asked <= level
            *states, _ = source["answer"].replace("<think>", "").replace("</think>", "").split()
            assert row["answer"] == same["answer"] == states[asked]
            assert row["latent_size"] == same["latent_size"]
            assert same["question"] == source["question"]
            assert row["question"] == (
                source["question"]
                if asked == 2
                else internalisation.AFTER.format(asked)
                if asked
                else internalisation.START
            )
        assert level == 0 or set(slots["latent_size"]) > {level + 1}
    # What the chain says are the lamp's colours; what is shuffled is another row's thought video, of the same row.
    rows = {split: load_split(str(tmp_path / "out" / "2 swaps" / "rows"), split) for split in ("chain", "train")}
    assert all(one["video"] == other["video"] for one, other in zip(rows["chain"], rows["train"]))
    for row, answered in zip(rows["train"], rows["chain"]):
        *states, last = answered["answer"].replace("<think>", "").replace("</think>", "").split()
        assert len(states) == 3
        assert states[-1] == last == row["answer"]
        assert row["reasoning_plan"].startswith(f"The lamp starts {states[0]}.")
        # Another row's last signal has the same effect wherever it finds the same colour, and one back.
        assert internalisation.last_signal(row, row) == row["answer"]
        for donor in rows["train"]:
            before = internalisation._chain(donor["reasoning_plan"])[-2]
            changed = {states[-2]: states[-1], states[-1]: states[-2]}.get(before, before)
            if states[-2] != states[-1] or before == states[-1]:
                assert internalisation.last_signal(row, donor) == changed


@pytest.mark.slow
def test_the_projectors_experiment_runs_whole_and_arms_see_equally_many_tokens(tmp_path):
    sizes = ["--num_rows", "4", "--num_answers", "6", "--see_steps", "1", "--max_steps", "1", "--seeds", "0"]
    results = long_video.main(["--output", str(tmp_path), "--worlds", "fast", *sizes])
    assert [run["arm"] for run in results["runs"]] == ["not pooled", "pooled", "pooled, projector"]
    assert [run["visual_tokens"] for run in results["runs"]] == [64, 16, 16]  # 128 frames, 2 a step, 4 steps pooled
    assert list(results["sweeps"]) == ["fast, not pooled", "fast, pooled", "fast, pooled, projector"]
    for run, swept in zip(results["runs"], results["sweeps"].values()):
        tokens = [(one["frames"], one["temporal_pool"], one["temporal_sampling"]) for one in swept]
        assert tokens == list(product((32, 64, 128), (1, 4), (1, 2)))
        for one in swept:
            steps = one["frames"] // 2 // one["temporal_pool"] // one["temporal_sampling"]
            assert one["visual_tokens"] == steps
        (same,) = (one for one in swept if one["visual_tokens"] == run["visual_tokens"] and one["frames"] == 128)
        assert same["accuracy"] == run["accuracy"]
    for row in load_split(str(tmp_path / "data" / "fast"), "validation"):
        frames, _ = decode_video(row["video"]["bytes"])
        signal = int(row["question"].rstrip("?").split()[-1])
        upper, lower = frames[4 * signal][[20, 38], 63].astype(int)  # halves of the signal, at half the size
        shown = {min(COLORS, key=lambda name: abs(COLORS[name] - color).sum()) for color in (upper, lower)}
        assert shown | {row["answer"]} == {"red", "green", "blue"}


def test_the_projectors_figures_that_are_shown_were_measured():
    found = json.loads((Path(long_video.__file__).parent / "results" / "long_video.json").read_text())
    readme = (Path(long_video.__file__).parents[2] / "README.md").read_text()
    shown = {(run["world"], run["seed"]): [] for run in found["runs"]}
    for run in found["runs"]:  # in the order of the arms
        low, high = run["interval"]
        shown[run["world"], run["seed"]].append(f"{run['accuracy']:.1%} ({low:.1%} to {high:.1%})")
    assert len(shown) == 6
    for (world, seed), cells in shown.items():
        assert f"| {world} | {seed} | {' | '.join(cells)} |" in readme
    by_arm = {arm: [run["accuracy"] for run in found["runs"] if run["arm"] == arm] for arm in long_video.ARMS}
    pairs = list(zip(by_arm["pooled"], by_arm["pooled, projector"], strict=True))
    assert all(one <= other for one, other in pairs)
    assert sum(one < other for one, other in pairs) == 5
    for swept in zip(*found["sweeps"].values(), strict=True):  # one combination, all arms of all worlds
        assert len({(one["frames"], one["visual_tokens"]) for one in swept}) == 1
        cells = " | ".join(f"{100 * one['accuracy']:.1f}" for one in swept)
        assert f" | {swept[0]['visual_tokens']:.0f} | {cells} |" in readme


def test_a_curve_is_drawn(tmp_path):
    runs = [{"arm": arm, "difficulty": level, "accuracy": 0.5} for arm in ("a", "b") for level in (2, 4)]
    internalisation.plot({"runs": runs}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_figures_of_two_folders_are_put_together():
    def results(runs, **interventions):
        runs = [{"arm": arm, "seed": seed, "difficulty": 6, "accuracy": value} for arm, seed, value in runs]
        means = {f"{arm}, 6 swaps": {"noise": value} for arm, value in interventions.items()}
        return {"runs": runs, "interventions": means, "seconds_per_item": {}, "solvers": []}

    earlier = results([("a", 0, 0.1), ("a", 1, 0.2), ("b", 0, 0.3)], a=0.3, b=0.6) | {"seconds_per_item": {"sft": 1.0}}
    merged = internalisation.merge(results([("a", 2, 0.4), ("b", 0, 0.5)], a=0.9, b=0.2), earlier)
    assert [(run["arm"], run["seed"], run["accuracy"]) for run in merged["runs"]] == [
        ("a", 0, 0.1),
        ("b", 0, 0.5),  # run again
        ("a", 1, 0.2),
        ("a", 2, 0.4),
    ]
    assert merged["interventions"] == {"a, 6 swaps": {"noise": pytest.approx(0.5)}, "b, 6 swaps": {"noise": 0.2}}
    assert merged["seconds_per_item"] == {"sft": 1.0}
    with pytest.raises(SystemExit, match="of 2 runs of 'a, 6 swaps' in the earlier results 1 were run anew"):
        internalisation.merge(results([("a", 1, 0.4)], a=0.9), earlier)


def test_probes_find_what_a_slot_holds_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(3, (200, 2), generator=generator)
    states = torch.randn(200, 2, 6, generator=generator)
    states[:, 0, :3] += 5 * torch.nn.functional.one_hot(colors[:, 1], 3)  # slot 0 knows the second colour
    found = internalisation.probe_states(states.numpy(), [["rgb"[one] for one in row] for row in colors.tolist()])
    assert found[0][1] > 0.95
    assert all(found[slot][time] < 0.5 for slot, time in ((0, 0), (1, 0), (1, 1)))


def test_arms_do_not_start_from_a_base_that_does_not_see(tmp_path):
    grid = yaml.safe_load(Path(internalisation.__file__).with_suffix(".yaml").read_text())
    grid["see_rounds"] = 2
    done = {"see": 0.5, "step0": 0.13, "step1": 0.14}
    for name, loss in done.items():
        (tmp_path / "seed2" / name).mkdir(parents=True)
        (tmp_path / "seed2" / name / "training.json").write_text(json.dumps({"metrics": {"loss/lm": loss}}))
    for path in (tmp_path / "see" / "README.md", tmp_path / "seed2" / "random" / "config.json"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    with pytest.raises(SystemExit, match=r"after 2 rounds the base of seed 2 has a loss of 0.140 .* at most 0.03"):
        internalisation.train_base(tmp_path, grid, seed=2)


def test_what_an_arm_has_in_common_with_another_is_trained_once(tmp_path):
    grid = yaml.safe_load(Path(internalisation.__file__).with_suffix(".yaml").read_text())
    stages = grid["arms"]["full"]
    for number in ("0", "1"):  # of the arm without the second stage
        (tmp_path / "full, teacher-forced" / number).mkdir(parents=True)
        (tmp_path / "full, teacher-forced" / number / "training.json").touch()
    found = [internalisation._trained_alike(tmp_path / "full", grid, stages[:count], 6) for count in (1, 2, 3)]
    assert found == [tmp_path / "full, teacher-forced" / "0", tmp_path / "full" / "1", tmp_path / "full" / "2"]
    own = internalisation._trained_alike(tmp_path / "stage 1", grid, grid["arms"]["stage 1"], 6)
    assert own == tmp_path / "stage 1" / "0"  # trained for longer


def test_variants_are_for_the_first_seed_and_the_curve_for_all():
    grid = yaml.safe_load(Path(internalisation.__file__).with_suffix(".yaml").read_text())
    arms = internalisation.list_arms(grid)
    assert set(arms) >= {*grid["arms"], *grid["ablations"], *grid["variants"]}
    assert (arms["full"]["swaps"], arms["full"]["seeds"]) == ([2, 4, 6, 8], [0, 1, 2])
    assert (arms["chain of thought"]["swaps"], arms["chain of thought"]["seeds"]) == ([6], [0, 1, 2])
    assert (arms["full, pad"]["swaps"], arms["full, pad"]["seeds"]) == ([6], [0])


def test_a_size_changes_what_is_there(tmp_path):
    grid = yaml.safe_load(Path(internalisation.__file__).with_suffix(".yaml").read_text())
    for changes in grid["sizes"].values():
        assert set(changes) <= set(grid)
        assert all(set(changes[name]) <= set(grid[name]) for name in ("base", "training"))
    with pytest.raises(SystemExit, match=r"--size: saw 'huge', expected one of larger\."):
        internalisation.main(["--size", "huge", "--output", str(tmp_path)])


def test_the_evidence_that_is_shown_was_measured():
    found = json.loads((Path(internalisation.__file__).parent / "results" / "internalisation.json").read_text())
    lines = (Path(internalisation.__file__).parents[2] / "README.md").read_text().splitlines()
    accuracies = {}
    for run in found["runs"]:
        accuracies.setdefault((run["arm"], run["difficulty"]), []).append(run["accuracy"])
    for (arm, difficulty), measured in accuracies.items():
        cell = f"{sum(measured) / len(measured):.1%}"
        if len(measured) > 1:
            cell += f" ({min(measured):.1%} to {max(measured):.1%})"
        shown = [line for line in lines if line.startswith(f"| {arm} |") and f"| {cell} |" in line]
        assert shown, (arm, difficulty, cell)
        changed = found["interventions"].get(f"{arm}, {difficulty} swaps")
        if changed and difficulty == 6:
            assert any(f"| {changed['follows_donor']:.1%} | {changed['noise']:.1%} |" in line for line in shown), arm


def test_the_states_on_the_way_that_are_shown_were_measured():
    found = json.loads((Path(internalisation.__file__).parent / "results" / "internalisation.json").read_text())
    readme = (Path(internalisation.__file__).parents[2] / "README.md").read_text()
    for arm in ("stage 2, curriculum", "sft, curriculum", "pause tokens, curriculum"):
        runs = [run["accuracy_by_state"] for run in found["runs"] if (run["arm"], run["difficulty"]) == (arm, 6)]
        means = [f"{100 * sum(one) / len(runs):.1f}" for one in zip(*runs, strict=True)]
        assert f"| {arm} | {' | '.join(means)} |" in readme
    gone_on = found["interventions"]["stage 2, curriculum, 6 swaps"]["goes_on_from_donor"]
    assert f"{gone_on:.1%} of the answers are" in readme


def test_runs_that_were_repeated_came_out_the_same():
    results = Path(internalisation.__file__).parent / "results"
    readme = (Path(internalisation.__file__).parents[2] / "README.md").read_text()
    again = json.loads((results / "internalisation_repeated.json").read_text())["runs"]
    first = json.loads((results / "internalisation.json").read_text())["runs"]
    full, sft = again
    assert sft in first  # to the last digit
    assert f"has {sft['accuracy']:.1%} now" in readme
    # The first record is of earlier code.
    (before,) = (run for run in first if all(run[name] == full[name] for name in ("arm", "seed", "difficulty")))
    low, high = before["interval"]
    assert low <= full["accuracy"] <= high


def test_what_noise_does_to_stage_2_at_two_signals_is_shown():
    found = json.loads((Path(internalisation.__file__).parent / "results" / "internalisation.json").read_text())
    readme = (Path(internalisation.__file__).parents[2] / "README.md").read_text()
    changed = found["interventions"]["stage 2, 2 swaps"]
    assert f"with noise in them {changed['noise']:.0%} are" in readme
    assert f"with a donor's states {changed['follows_donor']:.0%} give" in readme


def test_the_passes_that_are_shown_were_measured():
    found = json.loads((Path(internalisation.__file__).parent / "results" / "internalisation.json").read_text())
    sequential, *passes = found["solvers"]
    shown = [f"{one['accuracy']:.1%}" for one in (*passes, sequential)]
    assert f"| right | {' | '.join(shown)} |" in (Path(internalisation.__file__).parents[2] / "README.md").read_text()


def test_solvers_agree_where_they_must(model, processor):
    rows, collator = make_rows(3), StormsCollator(processor, latent_size=3)
    sequential, first, last = compare_solvers(model, collator, rows, (1, 3), latent_size=3, max_new_tokens=4)
    assert (sequential["iterations"], sequential["same_answer"], sequential["max_difference"]) == (None, 1.0, 0.0)
    assert (last["iterations"], last["same_answer"], last["accuracy"]) == (3, 1.0, sequential["accuracy"])
    assert last["relative_error"] <= last["max_difference"] < 1e-5
    assert first["relative_error"] > 0.01
    assert first["relative_error"] < first["max_difference"]


def test_the_gate_says_what_is_missing():
    found = {"num_rows": 250, "accuracy": 1.0, "parsed": 1.0, "full_blocks": 1.0, "full_blocks_latent_stop_token": 1.0}
    swapped = {"follows_donor": 0.8, "intact_gives_donors_answer": 0.0}
    good = {"train": found, "validation": found, "interventions": swapped}
    assert gate.shortfalls(good) == []
    bad = {
        "train": {**found, "accuracy": 0.9},
        "validation": {**found, "accuracy": 0.4, "full_blocks": 0.98},
        "interventions": {**swapped, "follows_donor": 0.05},
    }
    assert [one.split(":")[0] for one in gate.shortfalls(bad)] == [
        "accuracy on training rows",
        "accuracy on held-out rows",
        "blocks opened by itself and full",
        "donor's answer given with its latents",
    ]


def test_the_diagnostics_that_are_shown_were_measured():
    found = json.loads((Path(gate.__file__).parent / "results" / "gate_diagnostics.json").read_text())
    readme = (Path(gate.__file__).parents[2] / "README.md").read_text()
    measured = [found["oracle"], *(found["components"][name] for name in ("intact", "off", "markers"))]
    measured += [*found["latents"].values(), *(found["videos"][name] for name in ("other_video", "reversed_frames"))]
    for one in measured:
        figures = [one["accuracy"]["mean"], *one["accuracy"]["interval"]]
        assert "| {:.1f} ({:.1f} to {:.1f}) |".format(*(100 * figure for figure in figures)) in readme
    assert found["verdict"]["text"] in " ".join(readme.split())


def test_the_trial_of_internalised_latents_that_is_shown_was_measured():
    results = Path(internalisation.__file__).parent / "results"
    arms = ("full", "stage2", "curriculum")
    trials = [json.loads((results / f"internalisation_diagnostics_{arm}.json").read_text()) for arm in arms]
    readme = (Path(internalisation.__file__).parents[2] / "README.md").read_text()
    for group in ("oracle", *trials[0]["latents"]):
        cells = []
        for found in trials:
            one = (found["oracle"] if group == "oracle" else found["latents"][group])["accuracy"]
            cells.append("{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (one["mean"], *one["interval"]))))
        assert f"| {' | '.join(cells)} |" in readme, group
    assert [found["verdict"]["status"] for found in trials] == ["carry", "nothing to carry", "carry"]


def test_the_gate_that_is_shown_was_passed():
    results = json.loads((Path(gate.__file__).parent / "results" / "gate.json").read_text())
    assert gate.shortfalls(results) == []
    defaults = gate.GateArguments()
    assert results["arguments"] == {name: getattr(defaults, name) for name in results["arguments"]}
    readme = (Path(gate.__file__).parents[2] / "README.md").read_text()
    for split, rows in (("train", "training rows"), ("validation", "held-out rows")):
        one = results[split]
        measured = [f"{100 * one[name]:.1f}%" for name in gate.SHOWN]
        assert f"| {one['num_rows']} {rows} | {' | '.join(measured)} |" in readme
    swapped = results["interventions"]
    for name, shown in (("intact", "its own"), ("donor", "a donor's"), ("noise", "noise")):
        followed = f"{100 * swapped['follows_donor']:.1f}%" if name == "donor" else ""
        if name == "intact":
            followed = f"{100 * swapped['intact_gives_donors_answer']:.1f}%"
        assert f"| {shown} | {100 * swapped[name]:.1f}% | {followed} |" in readme


def test_a_trained_model_opens_its_block_by_itself_and_answers(tmp_path):
    """The gate in small: eight rows learned by heart in both stages, then answered by the saved checkpoint."""
    base, rows = tmp_path / "base", make_rows(8)
    gate.make_base(base, seed=0)
    options = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_grad_norm": 1.0, "max_steps": 40}
    options |= {"per_device_train_batch_size": 8, "latent_size": 8, "stop_supervision": "not_end"}
    for stage, start in (("stage1", "base"), ("stage2", "stage1")):
        trainer = make_trainer(tmp_path / start, tmp_path / stage, stage, rows, **options)
        trainer.train()
        trainer.finish()
    model = StormsForConditionalGeneration.from_pretrained(tmp_path / "stage2").eval()
    collator = StormsCollator(StormsProcessor.from_pretrained(tmp_path / "stage2"))
    for how in ({}, {"latent_stop": "token"}):
        answers = answer_rows(model, collator, rows, batch_size=8, **how)
        assert [one["latent_length"] for one in answers] == [8] * 8
        assert [one["is_correct"] for one in answers] == [True] * 8
    assert [one["latent_length"] for one in answer_rows(model, collator, rows, latent_mode="off")] == [0] * 8
