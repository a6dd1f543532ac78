"""Seconds go to the module that took them, whatever the batch, the cache and the number of passes."""

from types import SimpleNamespace

import pytest

from evaluation import clock
from evaluation.clock import ModuleClock
from tests.conftest import PROJECTOR, prompts_of, with_reduction
from tests.modeling_storms.conftest import eager_to


@pytest.fixture
def spend(monkeypatch):
    """A clock of the test's own, and a way to make a module's pass take some of its seconds."""
    now = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(module, seconds):
        forward = module.forward

        def slowly(*args, **kwargs):
            now[0] += seconds(kwargs)
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", slowly)

    return spend


def timed(model, spend, inputs, **options):
    """What the clock says if a token costs a second in a prefill, and a decoding step 1,000."""
    inner = model.model
    spend(inner.visual, lambda kwargs: 0.5)
    spend(inner.language_model, lambda kwargs: 1000 if (n := kwargs["inputs_embeds"].shape[1]) <= 2 else n)
    if getattr(inner, "temporal_projector", None) is not None:
        spend(inner.temporal_projector, lambda kwargs: 0.25)
    watch = ModuleClock(model)
    with watch.running() as passes:
        sequences = model.generate(**inputs, do_sample=False, stopping_criteria=[passes], **options)
    new_ids = sequences[:, inputs["input_ids"].shape[1] :]
    watch.add_steps(passes.seconds, new_ids)
    assert not inner.language_model._forward_hooks
    return watch, new_ids


@pytest.mark.parametrize("chunk", [None, 20])
def test_each_module_has_its_own_seconds(pair, clip, short_clip, spend, chunk):
    model, processor = with_reduction(pair[1], pair[2], PROJECTOR, temporal_pool=2)
    model.config.vision_chunk_size = 24  # one step of the longer clip: the tower runs as often as there are steps
    inputs = prompts_of(processor, clip, short_clip)("video", "video", "text")
    options = {"latent_mode": "force", "latent_size": 3, "max_new_tokens": 12, "min_new_tokens": 12}
    watch, _ = timed(model, spend, inputs, prefill_chunk_size=chunk, **options)
    # Three slots are the block's; its end runs with the last one, its start with a prompt that is not in chunks.
    is_ahead = chunk is None
    expected = {"vision tower": 4 * 0.5, "projector": 0.25, "prefill": inputs["input_ids"].shape[1] + is_ahead}
    # What is left is the text but for the last token.
    assert watch.take() == expected | {"latent block": 3000 if is_ahead else 4000, "decode": 6000}
    assert set(watch.take().values()) == {0}


def test_a_step_in_which_any_row_thinks_is_the_blocks(prompts, model, spend):
    eager_to(model, start=0.4, end=0.4, seed=3)
    inputs = prompts("video", "text", "both", "image", "text", "video", "text", "image")
    watch, new_ids = timed(model, spend, inputs, latent_size=3, max_new_tokens=30, min_new_tokens=30)
    inside = (new_ids == model.latent_tokens.start) | (new_ids == model.latent_tokens.pad)
    opened = inside.any(1)
    assert 0 < opened.sum() < len(opened)
    steps = inside[:, :-1].any(0)
    assert 4 < steps.sum() < 29, "rows open their blocks at different steps"
    assert watch.seconds["latent block"] == 1000 * int(steps.sum())
    assert watch.seconds["decode"] == 1000 * int((~steps).sum())


def test_a_plain_model_has_neither_projector_nor_blocks(reference, prompts, spend):
    watch, _ = timed(reference, spend, prompts("video"), max_new_tokens=5, min_new_tokens=5)
    assert watch.seconds["decode"] == 4000
    assert watch.seconds["vision tower"] == 0.5
    assert watch.seconds["latent block"] == watch.seconds["projector"] == 0
