"""Many questions at once, on one encoded prefix a video, get the answers that each gets alone."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLProcessor, Qwen2Config, Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from evaluation.answering import Answerer, encode_clip, load_model, read_question_clip
from evaluation.benchmarks.base import Question
from evaluation.protocols import Protocol
from tests.conftest import PROJECTOR, moving_disc, with_reduction


QUESTIONS = (
    ("Which cup moves?", "Why?", "Does the red car stop before the light changes, or after two seconds of waiting?"),
    ("What falls first, the cup or the plate?",),
    ("Where?", "How many discs cross the picture from left to right, and in which order do they do so?"),
)


SHAPES = ((8, 96, 128), (5, 112, 84), (12, 84, 84))  # of three clips: frames, height, width


def sampled(num_frames, fps=4.0):
    return VideoMetadata(total_num_frames=num_frames, fps=fps, frames_indices=list(range(num_frames)))


def encode_clips(processor):
    size = processor.video_processor.size
    return [
        encode_clip(processor, moving_disc(*shape, seed), sampled(shape[0]), size) for seed, shape in enumerate(SHAPES)
    ]


@pytest.fixture(scope="module")
def clips(processor):
    return encode_clips(processor)


@pytest.fixture(scope="module")
def reduced(pair):
    """A checkpoint with a projector that reduces tokens by default, and its processor."""
    return with_reduction(pair[1], pair[2], PROJECTOR, temporal_pool=2, spatial_pool=4)


def alone(model, processor, seed, text, reduction=None, **options):
    """One question about one clip by the library's own way: no batch, no shared prefix."""
    frames = moving_disc(*SHAPES[seed], seed)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": text}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [sampled(len(frames))], "do_sample_frames": False, **(reduction or {})},
    )
    options |= {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    out = model.generate(**inputs, **options, **(reduction or {}))
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0], out


MODES = {
    "plain": {},
    "off": {"latent_mode": "off"},
    "auto": {"latent_mode": "auto", "latent_size": 3},
    "force": {"latent_mode": "force", "latent_size": 4},
    "bottleneck": {"latent_mode": "force", "latent_size": 4, "latent_bottleneck": True},
}


REDUCTIONS = {
    "own": {},  # the checkpoint's
    "sampled": {"temporal_sampling": 2},  # on top of it
    "instead": {"temporal_pool": 1, "spatial_pool": 1, "temporal_sampling": 3},
}


CASES = [(mode, "none") for mode in MODES]
CASES += [("auto", "own"), ("force", "sampled"), ("off", "instead"), ("bottleneck", "own")]


@pytest.mark.parametrize(("mode", "reduction"), CASES)
def test_batches_with_shared_prefixes_answer_like_one_question_at_a_time(pair, reduced, mode, reduction):
    model, processor = pair[mode != "plain"], pair[2]
    if reduction != "none":
        model, processor = reduced
    model = model.eval()
    options, numbers = MODES[mode], REDUCTIONS.get(reduction, {})
    room = options.get("latent_size", -2) + 2 if mode not in ("plain", "off", "auto") else 0
    answerer = Answerer(model, processor, max_new_tokens=12, batch_size=4, **options, **numbers)
    clips = encode_clips(answerer.processor)
    # Steps of 2 x 2 tokens, 4, 3 and 6 of them, and what reductions leave of that.
    left = {"none": [16, 12, 24], "own": [2, 2, 3], "sampled": [1, 1, 2], "instead": [8, 4, 8]}[reduction]
    assert [one.record["num_video_tokens"] for one in clips] == left
    answered = answerer.answer(clips, QUESTIONS)
    assert answerer.num_video_tokens == sum(left)
    texts = []
    for seed, (given, replies) in enumerate(zip(QUESTIONS, answered)):
        assert len(given) == len(replies)
        for text, reply in zip(given, replies):
            expected, out = alone(model, processor, seed, text, numbers, max_new_tokens=12 + room, **options)
            assert reply.text == expected
            texts.append(expected)
            if mode not in ("plain", "off"):
                assert reply.latent_stop_reason == out.latent_stop_reasons[0]
                torch.testing.assert_close(reply.latent_states, out.latent_states[0], atol=1e-4, rtol=1e-4)
    assert len(set(texts)) > len(texts) / 2, "the test compares nothing if all answers are alike"


@pytest.mark.parametrize(
    "mode", ["auto", "bottleneck", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("plain", "off", "force"))]
)
def test_compiled_steps_give_the_same_answers_and_compile_for_each_size_once(pair, clips, mode):
    model, processor = pair[mode != "plain"].eval(), pair[2]
    expected = Answerer(model, processor, 12, 4, **MODES[mode]).answer(clips, QUESTIONS)
    compiled = Answerer(model, processor, 12, 4, is_compiled=True, **MODES[mode])
    compiled.compile_config.backend = "aot_eager"  # as the other, without minutes of code generation
    torch.compiler.reset()
    with warnings.catch_warnings(action="error", category=UserWarning):
        found = [compiled.answer(clips, QUESTIONS)]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0
        # Batches of four and two rows, then of one, as of two clips only: made up to a power of two.
        with torch._dynamo.config.patch(error_on_recompile=True):
            found.append(compiled.answer(clips, QUESTIONS))
            three = compiled.answer(clips[:1], QUESTIONS[:1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for answered in (*found, [three[0], *found[0][1:]]):
        for replies, others in zip(answered, expected):
            assert len(replies) == len(others)
            for reply, other in zip(replies, others):
                assert (reply.text, reply.latent_stop_reason) == (other.text, other.latent_stop_reason)
                torch.testing.assert_close(reply.latent_states, other.latent_states, atol=1e-4, rtol=1e-4)
    taken = compiled.clock.take()
    assert (taken["latent block"] > 0) == (mode in ("force", "bottleneck"))
    assert min(taken["prefill"], taken["decode"]) > 0


def test_where_nothing_compiles_steps_run_as_they_are(pair, clips):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    answerer = Answerer(pair[1].eval(), pair[2], 6, is_compiled=True, latent_mode="force", latent_size=2)
    expected = Answerer(pair[1], pair[2], 6, latent_mode="force", latent_size=2).answer(clips, QUESTIONS)
    answerer.compile_config.backend = broken
    torch.compiler.reset()
    with pytest.warns(UserWarning, match=r"(?s)can't be compiled here, and are run as they are: .*no compiler here"):
        found = answerer.answer(clips, QUESTIONS)
    assert [[one.text for one in given] for given in found] == [[one.text for one in given] for given in expected]
    assert not answerer.is_compiled


def test_question_states_are_those_of_the_whole_prompt_in_one_pass(reduced):
    model, processor = reduced
    answerer = Answerer(model, processor, temporal_sampling=2)
    (states,) = answerer.question_states(answerer.encode(encode_clips(answerer.processor)[:1]), QUESTIONS[:1])
    for text, found in zip(QUESTIONS[0], states):
        _, out = alone(
            model, processor, 0, text, {"temporal_sampling": 2}, max_new_tokens=1, output_hidden_states=True
        )
        (last,) = out.hidden_states[0][-1]
        video = (out.sequences[0, :-1] == model.config.video_token_id).nonzero().max()
        torch.testing.assert_close(found, last[video + 1 :].mean(0), atol=1e-4, rtol=1e-4)


def test_reductions_of_clip_and_model_must_agree(pair, reduced, clips):
    other = Answerer(reduced[0], reduced[1], temporal_sampling=2)
    with pytest.raises(ValueError, match=r"temporal_sampling=1, .*but the processor by .*temporal_sampling=2"):
        Answerer(*reduced).encode(encode_clips(other.processor))
    with pytest.raises(ValueError, match="must do the same"):
        other.encode(clips)
    assert reduced[0].model.reducer.temporal_sampling == 1, "an answerer leaves the model as it was"
    with pytest.raises(ValueError, match="temporal_pool is 0"):
        Answerer(*reduced, temporal_pool=0)
    with pytest.raises(ValueError, match="without a latent mode and token reduction, but temporal_pool was given"):
        Answerer(pair[0], pair[2], temporal_pool=1)


def test_logits_of_the_first_answer_token_are_those_after_the_block(pair, processor, clips):
    model = pair[1].eval()
    options = {"latent_mode": "force", "latent_size": 3}
    answerer = Answerer(model, processor, max_new_tokens=2, batch_size=3, **options)
    replies = answerer.answer(clips, QUESTIONS, keep_logits=True)
    for seed, (given, answered) in enumerate(zip(QUESTIONS, replies)):
        for text, reply in zip(given, answered):
            _, out = alone(model, processor, seed, text, max_new_tokens=7, **options)
            # start, three slots, end, and the first token of text
            torch.testing.assert_close(reply.first_logits, out.logits[5][0], atol=1e-3, rtol=1e-3)


def test_three_questions_on_a_video_run_its_tokens_once(pair, processor, clips):
    model = pair[1].eval()
    lengths = []
    forward = model.model.language_model.forward

    def count(*args, **kwargs):
        embeds = kwargs["inputs_embeds"]
        lengths.append(embeds.shape[0] * embeds.shape[1])
        return forward(*args, **kwargs)

    def cost(texts):
        lengths.clear()
        answerer = Answerer(model, processor, max_new_tokens=1, batch_size=8, latent_mode="off")
        answerer.answer(clips[:1], [texts])
        return sum(lengths), answerer.num_video_tokens

    model.model.language_model.forward = count
    try:
        one, video_tokens = cost(["Why?"])
        three, video_tokens_of_three = cost(["Why?", "How?", "When?"])
    finally:
        del model.model.language_model.forward
    assert video_tokens_of_three == video_tokens == clips[0].record["num_video_tokens"]
    # What is added are two short questions, not the video.
    assert three - one < 0.3 * clips[0].record["num_video_tokens"] + 2 * 30
    assert three < 3 * one


def test_an_answer_is_as_long_with_a_block_as_without(pair, processor, clips):
    for options in ({"latent_mode": "off"}, {"latent_mode": "force", "latent_size": 5}):
        replies = Answerer(pair[1].eval(), processor, max_new_tokens=6, **options).answer(clips, QUESTIONS)
        assert max(reply.num_text_tokens for given in replies for reply in given) == 6


def test_an_intervention_reaches_every_row(pair, processor, clips):
    model = pair[1].eval()
    seen = []

    def zero(states, slot_index):
        seen.append(len(states))
        return torch.zeros_like(states)

    answerer = Answerer(model, processor, max_new_tokens=2, batch_size=8, latent_mode="force", latent_size=2)
    replies = answerer.answer(clips, QUESTIONS, latent_intervention=zero)
    assert seen == [6, 6]
    assert all((reply.latent_states == 0).all() for given in replies for reply in given)


def test_a_system_message_is_part_of_the_shared_prefix(processor):
    clip = encode_clip(processor, moving_disc(4), sampled(4), processor.video_processor.size, "Watch closely.")
    text = processor.tokenizer.decode(clip.input_ids)
    assert "Watch closely." in text
    assert text.endswith(processor.video_token)
    assert clip.record["frame_times"] == [0.0, 0.25, 0.5, 0.75]
    assert clip.record["second_per_grid"] == 0.5


def test_a_plain_checkpoint_is_read_and_decoded_like_ours(pair, processor, tmp_path, clip):
    reference, model, _ = pair
    reference.save_pretrained(tmp_path / "plain")
    settings = processor.video_processor.to_dict()
    plain_video = Qwen2VLVideoProcessor(
        **{name: settings[name] for name in ("size", "patch_size", "temporal_patch_size", "merge_size")}
    )
    plain = Qwen2_5_VLProcessor(
        processor.image_processor, processor.tokenizer, plain_video, chat_template=processor.chat_template
    )
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "storms")
    processor.save_pretrained(tmp_path / "storms")
    question = Question("1", "Why?", "", video=str(clip), start=0.5, end=1.5)
    texts = []
    for name in ("plain", "storms"):
        loaded, own = load_model(str(tmp_path / name))
        made = read_question_clip(own, question, Protocol.named("uniform4"))
        assert made.record["frame_times"] == [0.0, 0.25, 0.5, 0.75]
        answerer = Answerer(loaded, own, max_new_tokens=8, **({"latent_mode": "off"} if name == "storms" else {}))
        texts.append(answerer.answer([made], [["Why?"]])[0][0].text)
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="without a latent mode"):
        Answerer(copy.copy(reference), plain, latent_mode="force")


def test_a_plain_checkpoint_with_pixel_limits_for_images_only_sees_videos_as_ours_does(pair, processor, tmp_path):
    pair[0].save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(processor.chat_template)
    # As in the released repositories, which have no other file of a processor.
    released = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    released |= {"min_pixels": 3136, "max_pixels": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
    own = load_model(str(tmp_path))[1]
    expected = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    assert Protocol.named("uniform32").frame_size(own.video_processor.size) == expected


def test_a_repetition_penalty_of_the_checkpoint_changes_no_answer(pair, processor, clips):
    model = pair[1].eval()
    answerer = Answerer(model, processor, max_new_tokens=12, latent_mode="off")
    expected = [[reply.text for reply in given] for given in answerer.answer(clips, QUESTIONS)]
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    model.generation_config.repetition_penalty = 3.0
    try:
        penalised = [[reply.text for reply in given] for given in answerer.answer(clips, QUESTIONS)]
    finally:
        model.generation_config = own
    assert penalised == expected


def test_rows_of_a_batch_that_open_their_blocks_or_not_answer_as_alone(pair, processor, clips):
    model = pair[1].eval()
    bias = [[[model.latent_tokens.start], 1.7]]  # so that some open one, sooner or later
    options = {"latent_mode": "auto", "latent_size": 3, "sequence_bias": bias}
    together = Answerer(model, processor, 12, 6, **options).answer(clips, QUESTIONS)
    one = Answerer(model, processor, 12, 1, **options)
    lengths = []
    for clip, given, replies in zip(clips, QUESTIONS, together):
        for text, reply in zip(given, replies):
            alone = one.answer([clip], [[text]])[0][0]
            assert (reply.text, reply.latent_stop_reason) == (alone.text, alone.latent_stop_reason)
            lengths.append(reply.latent_length)
    assert set(lengths) == {0, 3}


def test_another_kind_of_model_is_refused(tmp_path):
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'qwen2' model, expected a STORMS or Qwen2\.5-VL"):
        load_model(str(tmp_path))


def test_frames_are_resized_to_the_protocol(processor, clip):
    small = read_question_clip(processor, Question("1", "", "", video=str(clip)), Protocol(4, max_frame_pixels=3136))
    assert np.prod(small.record["frame_size"]) <= 3136
    large = read_question_clip(processor, Question("1", "", "", video=str(clip)), Protocol(4, min_frame_pixels=40000))
    assert np.prod(large.record["frame_size"]) >= 40000
    assert large.record["num_video_tokens"] > small.record["num_video_tokens"]
