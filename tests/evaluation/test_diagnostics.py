"""Diagnostics tell a model that reads its latents from one that does not, and their figures agree with references."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.decomposition import PCA
from sklearn.metrics import label_ranking_average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from dataset_builder.schema import FEATURES, MULTIPLE_CHOICE
from dataset_builder.thought_video import encode_video
from evaluation.answering import Answerer, encode_clip
from evaluation.benchmarks.base import Question
from evaluation.diagnostics.__main__ import DiagnosticsArguments, main
from evaluation.diagnostics.collapse import effective_rank, mean_cosine, slot_cosines
from evaluation.diagnostics.effects import Outcome, Resampling, donor_test, effect, first_token_kl, verdict
from evaluation.diagnostics.interventions import (
    Donor,
    PlaceStates,
    change_frames,
    choose_donors,
    empty_block,
    other_rows,
    replacements,
)
from evaluation.diagnostics.projections import project
from evaluation.diagnostics.report import sections
from evaluation.diagnostics.retrieval import cosine_table, match_ranks, retrieval_scores, search
from evaluation.diagnostics.rows import load_rows, read_frames
from evaluation.diagnostics.run import FORCE, diagnose
from evaluation.protocols import Protocol
from modeling_storms import StormsForConditionalGeneration
from tests.conftest import PROJECTOR, with_reduction


COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210)}
OPTIONS = list(COLOURS)
ASKED = ("Which cup moves?", "Why?")
PROTOCOL = Protocol.named("uniform4")


# -- models whose use of latents is known


class PastLatents(StormsForConditionalGeneration):
    """Nothing after a block sees its slots: latents are ignored by construction."""

    def prepare_inputs_for_generation(self, input_ids, latent_run=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, latent_run=latent_run, **kwargs)
        is_slot = input_ids == self.latent_tokens.pad
        hidden = is_slot & (input_ids[:, -1:] != self.latent_tokens.pad)
        given = kwargs.get("attention_mask")
        if hidden.any():
            inputs["attention_mask"] = (torch.ones_like(input_ids) if given is None else given) * ~hidden
        return inputs


class OnlyLatents(StormsForConditionalGeneration):
    """Under the bottleneck slots don't see the video either: it reaches the answer through what they are fed alone."""

    def _bottleneck_sight(self, input_ids, is_slot, rows=None):
        _, concealed = super()._bottleneck_sight(input_ids, is_slot, rows)
        is_visual = self._is_visual(input_ids)
        return ~(is_visual | (input_ids == self.latent_tokens.start)), concealed


def write_rows(folder, num_videos, seed, broken=False):
    """A dataset of videos in one of three colours, two questions each; the letter is the colour's."""
    generator = np.random.default_rng(seed)
    rows = []
    for video in range(num_videos):
        letter = video % 3
        frames = np.empty((8, 56, 84, 3), dtype=np.uint8)
        shade = np.array(COLOURS[OPTIONS[letter]]) + generator.integers(-30, 30, 3)
        frames[:] = shade.clip(0, 255)
        frames += generator.integers(0, 12, frames.shape, dtype=np.uint8)
        clip = {"bytes": encode_video(frames, 4), "path": None}
        for asked, question in enumerate(ASKED):
            empty = {name: None for name in FEATURES if name.startswith("video_")}
            row = {"id": f"{seed}-{video}-{asked}", "source": "test", "video_id": f"{seed}-{video}", "video": clip}
            row |= {"question": question, "options": OPTIONS, "answer": "ABC"[letter], "thought_video": clip}
            rows.append({**dict.fromkeys(FEATURES), **empty, "video_path": "", "keyframes": [], **row})
            rows[-1] |= {"video_id": row["video_id"], "problem_type": MULTIPLE_CHOICE}
    if broken:
        rows.append({**rows[-1], "id": "broken", "video_id": "broken", "video": {"bytes": b"no video", "path": None}})
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("held_out"), 12, seed=1, broken=True)


@pytest.fixture(scope="module")
def built(pair, processor, tmp_path_factory):
    """Models of each kind whose heads were fitted to answer which colour it is."""
    rows = load_rows(str(write_rows(tmp_path_factory.mktemp("fitted"), 30, seed=2)), "test")

    def build(kind, bottleneck):
        model = copy.deepcopy(pair[1]).eval()
        model.__class__ = kind
        model.generation_config.latent_bottleneck = bottleneck
        model.generation_config.latent_size = 3
        answerer = Answerer(model, processor, max_new_tokens=1, batch_size=len(rows))
        size = processor.video_processor.size
        clips = [encode_clip(processor, *read_frames(row, PROTOCOL), size) for row in rows]
        seen = []
        hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -1].clone()))
        answerer.answer(clips, [[row.text] for row in rows], **FORCE)
        hook.remove()
        states, letters = seen[-1].double(), torch.tensor(["ABC".index(row.question.answer) for row in rows])
        ridge = states.T @ states + 1e-3 * torch.eye(states.shape[1])
        weights = torch.linalg.solve(ridge, states.T @ torch.nn.functional.one_hot(letters, 3).double()).T
        ids = [processor.tokenizer(letter)["input_ids"][-1] for letter in "ABC"]
        head = torch.zeros_like(model.lm_head.weight)
        head[ids] = 20 * weights.to(head.dtype)
        model.lm_head.weight = torch.nn.Parameter(head)
        return model

    return {"past": build(PastLatents, False), "only": build(OnlyLatents, True)}


@pytest.fixture(scope="module")
def records(built, processor, folder):
    rows = load_rows(str(folder), "test")
    sizes = {"past": 24, "only": 13}  # all at once, and in batches that share a video
    return {
        name: diagnose(
            Answerer(model, processor, max_new_tokens=1, batch_size=sizes[name]), rows, PROTOCOL, (3,), 4, samples=500
        )
        for name, model in built.items()
    }


def test_a_model_that_ignores_its_latents_is_reported_so(records):
    record = records["past"]
    assert record["components"]["intact"]["accuracy"]["mean"] > 0.9
    assert record["verdict"]["status"] == "none"
    assert record["verdict"]["carried"] == {"mean": 0.0, "interval": [0.0, 0.0], "num_rows": 24}
    assert record["verdict"]["text"].startswith("The latents carry none of ")
    for one in record["latents"].values():
        assert one["flip_rate"]["mean"] == 0
        assert one["kl"]["mean"] < 1e-6
    assert record["donor_test"]["follows"]["mean"] == record["donor_test"]["anyway"]["mean"]
    assert record["videos"]["other_video"]["flip_rate"]["mean"] > 0.3  # while the video is not ignored


def test_a_model_that_answers_from_its_latents_alone_is_reported_so(records):
    record = records["only"]
    above = record["verdict"]["above_chance"]["mean"]
    assert record["components"]["intact"]["accuracy"]["mean"] > 0.9
    assert record["verdict"]["status"] == "carry"
    assert record["verdict"]["carried"]["interval"][0] > 0
    # Another video's row has the same colour in 8 of 22 cases: by chance, up to the draw.
    assert abs(record["verdict"]["carried"]["mean"] - above) < 0.25
    assert record["donor_test"]["follows"]["mean"] > 0.9
    assert record["donor_test"]["anyway"]["mean"] < 0.1
    assert record["donor_test"]["by"] == {"text": 24, "letter": 0, "free-form": 0}
    for name in ("zero", "mean", "pad"):  # the same for all rows: no better than a guess
        assert record["latents"][name]["accuracy"]["mean"] < 0.6
    assert record["components"]["markers"]["accuracy"]["mean"] < 0.6


def test_what_can_not_be_read_is_left_out_and_told(records):
    for record in records.values():
        assert record["num_questions"] == 24
        assert [one["id"] for one in record["left_out"]] == ["broken"]


def test_latents_of_videos_in_one_colour_find_their_own(records):
    found = records["only"]["retrieval"]
    assert set(found) == {"video", "thought_video", "questions"}
    assert found["questions"]["num_queries"] == 24
    scores = found["questions"]["queries"]
    assert scores["latents"]["centred"]["mrr"]["mean"] > scores["random"]["centred"]["mrr"]["mean"]


def test_the_budget_of_the_checkpoint_gives_the_intact_answers(records):
    for record in records.values():
        assert record["latent"]["latent_size"] == 3
        assert record["budgets"]["3"]["kl"]["mean"] == 0
        assert record["budgets"]["3"]["flip_rate"]["mean"] == 0


def test_own_states_put_back_change_nothing(built, processor, folder):
    rows = [row for row in load_rows(str(folder), "test") if row.question.id != "broken"][:6]
    answerer = Answerer(built["only"], processor, max_new_tokens=1, batch_size=8)
    size = processor.video_processor.size
    clips = answerer.encode([encode_clip(processor, *read_frames(row, PROTOCOL), size) for row in rows])
    texts = [[row.text] for row in rows]
    intact = [one[0] for one in answerer.answer(clips, texts, keep_logits=True, **FORCE)]
    states = torch.stack([reply.latent_states for reply in intact])
    placed = answerer.answer(clips, texts, keep_logits=True, **FORCE, latent_intervention=PlaceStates(states))
    for own, (reply,) in zip(intact, placed):
        assert torch.equal(own.first_logits, reply.first_logits)
        assert torch.equal(own.latent_states, reply.latent_states)


def test_a_guess_is_one_of_the_options_or_as_likely_as_told(folder):
    rows = load_rows(str(folder), "test", free_form_chance=0.25)
    assert {row.chance for row in rows} == {1 / 3}
    assert replace(rows[0], question=replace(rows[0].question, options={})).chance == 0.25
    with pytest.raises(ValueError, match=r"--free_form_chance: saw 1.0, expected 0 to 1, without 1"):
        DiagnosticsArguments(model="model", dataset="dataset", free_form_chance=1.0)


def test_question_states_are_those_of_one_forward_pass_over_the_whole_prompt(pair, processor, folder):
    model = pair[1].eval()
    rows = [row for row in load_rows(str(folder), "test") if row.question.id != "broken"][:2]  # of one video
    clip = encode_clip(processor, *read_frames(rows[0], PROTOCOL), processor.video_processor.size)
    answerer = Answerer(model, processor)
    (found,) = answerer.question_states(answerer.encode([clip]), [[row.text for row in rows]])
    for row, state in zip(rows, found):
        video = {"type": "video", "video": read_frames(row, PROTOCOL)[0]}
        messages = [{"role": "user", "content": [video, {"type": "text", "text": row.text}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = processor.tokenizer(text.split(processor.video_token)[1])["input_ids"]
        inputs = {
            "input_ids": torch.cat([clip.input_ids, torch.tensor(ids)])[None],
            "mm_token_type_ids": torch.cat([clip.mm_token_type_ids, torch.zeros(len(ids), dtype=torch.long)])[None],
        }
        with torch.no_grad():
            expected = model.model(**inputs, **clip.media).last_hidden_state[0, -len(ids) :].mean(0)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_block_is_what_a_forward_pass_over_both_markers_gives(pair, processor, clip, prompts):
    model, tokens = pair[1], pair[1].latent_tokens
    inputs = prompts("video")
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **empty_block(tokens.end),
    )
    length = inputs["input_ids"].shape[1]
    assert out.sequences[0, length : length + 2].tolist() == [tokens.start, tokens.end]
    markers = torch.tensor([[tokens.start, tokens.end]])
    by_hand = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], markers], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(markers)], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(markers)], 1),
    }
    with torch.no_grad():
        expected = model(**by_hand).logits[0, -1]
    torch.testing.assert_close(out.logits[2][0], expected, rtol=1e-4, atol=1e-4)


def test_one_command_writes_numbers_pictures_and_a_page_of_its_own(built, processor, folder, tmp_path, capsys):
    # Of a checkpoint that reduces tokens; others are examined above.
    model, processor = with_reduction(built["only"], processor, PROJECTOR, temporal_pool=2, spatial_pool=4)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    options = {"model": tmp_path / "checkpoint", "dataset": folder, "output": tmp_path / "out"}
    options |= {"protocol": "uniform4", "max_questions": 14, "batch_size": 16, "max_new_tokens": 1, "samples": 200}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    record = main([*given, "--budgets", "1", "2", "--num_target_frames", "4"])
    assert json.loads((tmp_path / "out" / "diagnostics.json").read_text()) == record
    assert record["num_questions"] in (13, 14)  # the broken one may be among those drawn
    assert str(tmp_path) not in json.dumps(record)
    pictures = {name for section in sections(record) for name in section.pictures}
    assert pictures == {path.name for path in (tmp_path / "out").glob("*.png")}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page
    assert record["verdict"]["text"].split(" (")[0][:60] in page
    assert "The latents" in capsys.readouterr().out or record["verdict"]["status"] == "nothing to carry"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    help = capsys.readouterr().out
    assert "    python -m evaluation.diagnostics --model org/storms-7b --dataset org/thoughts" in help
    assert all(f"--{name}" in help for name in ("protocol", "max_questions", "budgets"))


@pytest.mark.parametrize("option", [["--samples", "5"], ["--budgets", "0"], ["--max_questions", "1"]])
def test_options_that_mean_nothing_are_refused(option):
    with pytest.raises(ValueError, match=option[0]):
        main(["--model", "none", "--dataset", "none", *option])


def test_a_plain_model_is_refused(pair, processor, folder):
    with pytest.raises(ValueError, match="without latents"):
        diagnose(Answerer(pair[0], processor), load_rows(str(folder), "test"), PROTOCOL)


# -- figures against references


vectors = hnp.arrays(np.float64, st.tuples(st.integers(2, 7), st.integers(2, 5)), elements=st.floats(-4, 4))


@settings(deadline=None)
@given(
    similarity=hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(2, 8)), elements=st.integers(-3, 3)),
    data=st.data(),
)
def test_ranks_are_those_of_a_naive_count_with_half_for_ties(similarity, data):
    rows, entries = similarity.shape
    matches = [data.draw(st.sets(st.integers(0, entries - 1), min_size=1)) for _ in range(rows)]
    is_match = np.array([[entry in found for entry in range(entries)] for found in matches])
    for row, rank in enumerate(match_ranks(similarity, is_match)):
        best = max(similarity[row, entry] for entry in matches[row])
        wrong = [similarity[row, entry] for entry in range(entries) if entry not in matches[row]]
        assert rank == 1 + sum(value > best for value in wrong) + sum(value == best for value in wrong) / 2
        if len(matches[row]) == 1:
            (entry,) = matches[row]
            assert rank == scipy.stats.rankdata(-similarity[row], method="average")[entry]


def test_reciprocal_ranks_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    similarity, is_match = generator.standard_normal((20, 20)), np.eye(20, dtype=bool)
    resampling = Resampling([str(row) for row in range(20)], 200)
    scores = retrieval_scores(match_ranks(similarity, is_match), resampling, range(20))
    assert scores["mrr"]["mean"] == pytest.approx(label_ranking_average_precision_score(is_match, similarity))
    top = similarity.argmax(1) == np.arange(20)
    assert scores["hit_at_1"]["mean"] == pytest.approx(top.mean())


def test_searching_finds_what_is_there_and_nothing_by_luck():
    generator = np.random.default_rng(0)
    video = generator.standard_normal((10, 3, 8))
    pooled = np.repeat(video, 2, axis=0)  # two questions a video
    states = pooled + 0.01 * generator.standard_normal(pooled.shape)
    same = {"same for all": np.ones((20, 8))}
    clips = [row // 2 for row in range(20)]
    found = search(states, same, {"video": pooled}, clips, Resampling([str(clip) for clip in clips], 200))
    for gallery in ("video", "questions"):
        queries, slots = found[gallery]["queries"], found[gallery]["slots"]
        for way in ("cosine", "centred"):
            assert queries["latents"][way]["hit_at_1"]["mean"] == 1
            assert slots["in order"][way]["hit_at_1"]["mean"] == 1
            assert slots["reversed"][way]["hit_at_1"]["mean"] < 0.6
        assert queries["same for all"]["centred"]["hit_at_1"]["mean"] == 0
        assert queries["random"]["centred"]["mrr"]["mean"] < 0.6
    assert found["video"]["num_entries"] == 10
    assert found["questions"]["num_entries"] == 19
    assert found["questions"]["chance_of_hit_at_1"] == pytest.approx(1 / 19)


@settings(deadline=None)
@given(vectors, vectors)
def test_cosines_agree_with_scikit_learn(queries, gallery):
    width = min(queries.shape[1], gallery.shape[1])
    queries, gallery = np.round(queries[:, :width], 3), np.round(gallery[:, :width], 3)
    np.testing.assert_allclose(
        cosine_table(queries, gallery, False), cosine_similarity(queries, gallery), atol=1e-9, rtol=0
    )


@settings(deadline=None)
@given(hnp.arrays(np.float64, (4, 3, 5), elements=st.floats(0.1, 4)))
def test_mean_cosines_are_those_of_naive_loops(states):
    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    rows = states[:, 0]
    pairs = [cosine(rows[i], rows[j]) for i in range(4) for j in range(4) if i != j]
    assert mean_cosine(rows) == pytest.approx(np.mean(pairs))
    expected = [[np.mean([cosine(row[a], row[b]) for row in states]) for b in range(3)] for a in range(3)]
    np.testing.assert_allclose(slot_cosines(states), expected, atol=1e-12)


@settings(deadline=None)
@given(vectors)
def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values(rows):
    rows = np.round(rows, 3)
    values, found = scipy.linalg.svdvals(rows), effective_rank(rows)
    if values.max() == 0:
        assert found == 0
    else:
        assert 1 - 1e-9 <= found <= min(rows.shape) + 1e-9
        assert found == pytest.approx(np.exp(scipy.stats.entropy(values)))


def test_effective_rank_counts_equal_directions():
    assert effective_rank(np.eye(6)) == pytest.approx(6)
    assert effective_rank(np.outer(np.arange(1, 5), np.arange(1, 4))) == pytest.approx(1, abs=1e-6)


@settings(deadline=None)
@given(hnp.arrays(np.float64, (2, 6), elements=st.floats(-20, 20)))
def test_kl_agrees_with_scipy_without_what_can_not_be_emitted(logits):
    kept = [0, 1, 3, 4]
    p, q = scipy.special.softmax(logits[:, kept], axis=1)
    found = first_token_kl(*torch.from_numpy(logits), excluded=[2, 5])
    assert found == pytest.approx(scipy.special.rel_entr(p, q).sum(), rel=1e-6, abs=1e-9)


def test_intervals_agree_with_scipys_bootstrap():
    generator = np.random.default_rng(0)
    before, after = generator.random(60) < 0.8, generator.random(60) < 0.5
    found = Resampling([str(row) for row in range(60)], samples=10_000).change(before, after)
    expected = scipy.stats.bootstrap(
        (after.astype(float) - before,), np.mean, n_resamples=10_000, method="percentile", rng=generator
    ).confidence_interval
    assert found["mean"] == pytest.approx(after.mean() - before.mean())
    np.testing.assert_allclose(found["interval"], expected, atol=0.02)  # one step of 1/60


def test_questions_about_one_video_are_no_separate_evidence():
    values = np.random.default_rng(0).random(30)
    single = Resampling([str(row) for row in range(30)]).mean(values)
    double = Resampling([str(row // 2) for row in range(60)]).mean(values.repeat(2))
    assert double["interval"] == pytest.approx(single["interval"])
    assert Resampling(["same"] * 4).mean(values[:4])["interval"] is None


# -- interventions


def questions(answers, options=("red", "green", "blue")):
    options = dict(zip("ABC", options))
    return [Question(str(row), "Which?", answer, options, str(row)) for row, answer in enumerate(answers)]


def test_replacements_are_what_they_are_called():
    generator = torch.Generator().manual_seed(3)
    states, pad = torch.randn(5, 4, 16, generator=generator), torch.randn(16, generator=generator)
    placed = replacements(states, pad, [1, 2, 3, 4, 0], [2, None, 0, 0, 1], seed=0)
    assert not placed["zero"].any()
    torch.testing.assert_close(placed["mean"][3], states.mean(0))
    torch.testing.assert_close(placed["noise"].norm(dim=-1), states.norm(dim=-1))
    assert (torch.cosine_similarity(placed["noise"], states, dim=-1).abs() < 0.95).all()
    assert torch.equal(placed["pad"][2, 1], pad)
    assert torch.equal(placed["other_row"], states[[1, 2, 3, 4, 0]])
    assert torch.equal(placed["donor"], states[[2, 1, 0, 0, 1]])
    for row, shuffled in zip(states, placed["shuffled_slots"]):
        assert not torch.equal(row, shuffled)
        assert sorted(row.tolist()) == sorted(shuffled.tolist())
    assert "shuffled_slots" not in replacements(states[:, :1], pad, [1, 2, 3, 4, 0], [None] * 5, seed=0)


@settings(deadline=None)
@given(st.lists(st.sampled_from("ABC"), min_size=2, max_size=9), st.integers(0, 5))
def test_donors_have_another_answer_and_another_video(answers, seed):
    asked = questions(answers)
    for row, (question, donor) in enumerate(zip(asked, choose_donors(asked, [True] * len(asked), seed))):
        if donor is None:
            assert set(answers) == {question.answer}
        else:
            assert donor.row != row
            assert donor.answer == asked[donor.row].answer != question.answer
    assert all(row != other for row, other in enumerate(other_rows(asked, seed)))


def test_a_donors_answer_is_mapped_by_its_text():
    asked = [
        Question("0", "?", "A", {"A": "red", "B": "green"}, "0"),
        Question("1", "?", "A", {"A": "Green ", "B": "red"}, "1"),  # the same letter, another answer
        Question("2", "?", "B", {"A": "blue", "B": "red"}, "2"),  # another letter, the same answer
    ]
    donors = choose_donors(asked, [True] * 3, seed=0)
    assert donors[0] == Donor(1, "B", "text")
    assert donors[1].answer == "B"
    assert choose_donors([asked[0], asked[2]], [True] * 2, seed=0) == [None, None]


def test_donors_are_taken_by_letter_only_where_no_text_fits():
    asked = [
        Question("0", "?", "A", {"A": "red", "B": "green"}, "0"),
        Question("1", "?", "B", {"A": "two", "B": "three"}, "1"),
    ]
    assert choose_donors(asked, [True] * 2, seed=0) == [Donor(1, "B", "letter"), Donor(0, "A", "letter")]
    free = [Question("0", "?", "a cup", {}, "0"), Question("1", "?", "A cup.", {}, "1")]
    assert choose_donors(free, [True] * 2, seed=0) == [None, None]


def test_donors_that_answer_right_themselves_are_preferred():
    asked = questions("ABBB")
    assert choose_donors(asked, [True, False, True, False], seed=0)[0].row == 2


def test_one_video_alone_is_refused():
    with pytest.raises(ValueError, match="two videos or more"):
        other_rows([Question(str(row), "?", "A", {}, "same") for row in range(3)], 0)


def test_the_donor_test_counts_by_hand():
    asked = questions("AABB")
    intact = [Outcome(letter, True, True) for letter in "AABC"]
    given_ = [Outcome(letter, True, True) for letter in "BAAA"]
    donors = [Donor(2, "B", "text"), Donor(2, "B", "text"), Donor(0, "A", "text"), None]
    found = donor_test(asked, intact, given_, donors, Resampling([one.video_id for one in asked], 200))
    assert found["follows"]["mean"] == pytest.approx(2 / 3)
    assert found["anyway"]["mean"] == 0
    assert found["excess"]["mean"] == pytest.approx(2 / 3)
    assert found["follows"]["num_rows"] == 3


def test_frames_are_changed_as_said():
    frames = np.random.default_rng(0).integers(0, 255, (5, 4, 4, 3), dtype=np.uint8)
    shuffled = change_frames(frames, "shuffled_frames", np.random.default_rng(0))
    assert not np.array_equal(shuffled, frames)
    assert sorted(shuffled.tolist()) == sorted(frames.tolist())
    assert np.array_equal(change_frames(frames, "reversed_frames", None)[::-1], frames)
    assert len(np.unique(change_frames(frames, "blank", None))) == 1


def outcomes(num_right, num_rows=60):
    return [Outcome("A" if row < num_right else "B", True, row < num_right) for row in range(num_rows)]


@pytest.mark.parametrize(
    ("intact", "other", "noise", "status"),
    [
        (55, 20, 20, "carry"),
        (55, 55, 55, "none"),
        (55, 55, 10, "none"),
        (20, 20, 20, "nothing to carry"),
        (40, 58, 40, "hurt"),
    ],
)
def test_the_verdict_is_in_plain_words(intact, other, noise, status):
    resampling = Resampling([str(row) for row in range(60)], 500)
    asked, donors = questions("A" * 60), [Donor(0, "B", "text")] * 60
    donor = donor_test(asked, outcomes(intact), outcomes(other), donors, resampling)
    found = verdict(outcomes(intact), outcomes(other), outcomes(noise), [1 / 3] * 60, donor, resampling)
    assert found["status"] == status
    x, y = 100 * (intact - other) / 60, 100 * (intact / 60 - 1 / 3)
    if status == "carry":
        assert found["text"].startswith(f"The latents carry {x:.1f} of {y:.1f} points of accuracy above chance (95%")
    if status == "none":
        assert found["text"].startswith(f"The latents carry none of {y:.1f} points of accuracy above chance")
        assert ("Noise in the slots costs 75.0 points" in found["text"]) == (noise == 10)


def test_an_effect_is_paired():
    resampling = Resampling([str(row) for row in range(60)], 500)
    found = effect(outcomes(40), outcomes(40), resampling)
    assert found["accuracy_change"] == {"mean": 0.0, "interval": [0.0, 0.0], "num_rows": 60}
    assert found["accuracy"]["interval"][0] < found["accuracy"]["mean"] < found["accuracy"]["interval"][1]


def test_projections_are_scikit_learns_of_all_kinds_together():
    generator = np.random.default_rng(0)
    groups = {kind: [generator.standard_normal((3, 6)) for _ in range(4)] for kind in ("frame", "latent")}
    groups["keyframe"] = [np.zeros((0, 6))] * 4
    found = project(groups)
    rows = np.concatenate(groups["frame"] + groups["latent"])
    expected = PCA(2).fit_transform(rows)
    np.testing.assert_allclose(np.abs([one["pca"] for one in found["points"]]), np.abs(expected), atol=1e-9)
    assert [one["kind"] for one in found["points"]] == ["frame"] * 12 + ["latent"] * 12
    assert [one["clip"] for one in found["points"]][:6] == [0, 0, 0, 1, 1, 1]
    assert np.isfinite([one["tsne"] for one in found["points"]]).all()
