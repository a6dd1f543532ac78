"""A base model becomes a STORMS checkpoint without losing or inventing a weight."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from modeling_storms import StormsForConditionalGeneration, StormsProcessor
from recipes.init_checkpoint import InitArguments, build_tiny_base, convert, init_checkpoint
from tests.conftest import ask


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A folder as Qwen publishes it: native class, native processor, generation defaults of its own."""
    folder = tmp_path_factory.mktemp("native") / "qwen2.5-vl-tiny"
    base, processor = build_tiny_base(seed=3)
    base.generation_config.repetition_penalty = 1.05
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_native_folder_keeps_every_weight(native, tmp_path):
    output = init_checkpoint(InitArguments(base=str(native), output=str(tmp_path / "storms")))
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(native)
    model, loading = StormsForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = model.latent_tokens
    new = [tokens.start, tokens.pad, tokens.end]
    ours, theirs = model.state_dict(), base.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        kept = torch.ones(len(weight), dtype=torch.bool)
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            kept[new] = False
        assert torch.equal(ours[name][kept], weight[kept]), name
    assert model.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape, "no resize needed"
    assert model.generation_config.repetition_penalty == 1.05
    processor = StormsProcessor.from_pretrained(output)
    assert processor.tokenizer.convert_tokens_to_ids("<|latent_pad|>") == tokens.pad
    assert processor.tokenizer.padding_side == "left"


def as_released(native, folder):
    """The tiny base in the file layout of the released Qwen2.5-VL repositories: a flat config of before version 5,
    old weight names, one preprocessor file for images and videos, pixel limits by their old names."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((native / name).read_bytes())
    config = json.loads((native / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    for name in ("layer_types", "model_type", "attention_dropout"):
        text.pop(name, None)
    vision = {**vision, "in_chans": 3, "spatial_patch_size": vision["patch_size"], "model_type": "qwen2_5_vl"}
    for name in ("rope_parameters", "in_channels", "patch_size"):
        vision.pop(name, None)
    flat = {**config, **text, "vision_config": vision, "torch_dtype": "float32", "vision_token_id": 410}
    flat |= {"rope_theta": rope["rope_theta"], "transformers_version": "4.41.2"}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "sliding_window": 32768}
    (folder / "config.json").write_text(json.dumps(flat))
    preprocessor = {"min_pixels": 3136, "max_pixels": 4704, "patch_size": 14, "temporal_patch_size": 2}
    preprocessor |= {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    preprocessor |= {"merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**preprocessor, "processor_class": "Qwen2_5_VLProcessor"})
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'their own' }}"}))
    generation = {"bos_token_id": 0, "pad_token_id": 0, "do_sample": True, "eos_token_id": [401, 0]}
    generation |= {"repetition_penalty": 1.05, "temperature": 1e-6, "transformers_version": "4.49.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in load_file(native / "model.safetensors").items()
    }
    assert any(name.startswith("visual.") for name in weights)
    assert any(name.startswith("model.layers.") for name in weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_folder_as_released_becomes_the_same_checkpoint(native, tmp_path, clip):
    released = as_released(native, tmp_path / "released")
    one = init_checkpoint(InitArguments(base=str(released), output=str(tmp_path / "from-released")))
    other = init_checkpoint(InitArguments(base=str(native), output=str(tmp_path / "from-native")))
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    options = json.loads((one / "generation_config.json").read_text())
    assert (options["repetition_penalty"], options["temperature"], options["latent_mode"]) == (1.05, 1e-6, "auto")
    # The file's pixel limits are meant for images; videos get the limits of videos.
    sizes = [StormsProcessor.from_pretrained(folder).video_processor.size for folder in (one, other)]
    assert [(size["shortest_edge"], size["longest_edge"]) for size in sizes] == [(100352, 602112), (3136, 4704)]
    results = []
    for folder in (one, other):
        model = StormsForConditionalGeneration.from_pretrained(folder).eval()
        processor = StormsProcessor.from_pretrained(folder)
        inputs = ask(processor, str(clip), size={"shortest_edge": 3136, "longest_edge": 4704})
        assert int(inputs["video_grid_thw"][0, 0]) == 12  # all 24 frames, fewer than the default of 32
        out = model.generate(**inputs, max_new_tokens=12, latent_mode="force", do_sample=False, repetition_penalty=1.0)
        results.append((inputs["input_ids"].tolist(), inputs["pixel_values_videos"].sum(), out.tolist()))
    assert results[0] == results[1]


def test_options_survive_a_base_without_a_generation_config(tmp_path):
    """A model built from a config derives its generation config, and the library marks it so when it saves."""
    built, processor = build_tiny_base()
    Qwen2_5_VLForConditionalGeneration(built.config).save_pretrained(tmp_path / "native")
    processor.save_pretrained(tmp_path / "native")
    assert json.loads((tmp_path / "native" / "generation_config.json").read_text())["_from_model_config"]
    output = init_checkpoint(InitArguments(base=str(tmp_path / "native"), output=str(tmp_path / "storms")))
    loaded = StormsForConditionalGeneration.from_pretrained(output)
    assert (loaded.generation_config.latent_mode, loaded.generation_config.latent_size) == ("auto", 8)
    # The same for a STORMS model built from a config.
    model = StormsForConditionalGeneration(loaded.config)
    model.generation_config.latent_mode = "force"
    model.save_pretrained(tmp_path / "again")
    again = StormsForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.generation_config.latent_mode == "force"


def test_new_embeddings_are_average_and_distinct():
    base, processor = build_tiny_base()
    num_known = len(processor.tokenizer)
    model, _ = convert(base, processor, seed=5)
    generator = torch.Generator().manual_seed(5)
    tokens = model.latent_tokens
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        mean, std = table[:num_known].mean(0), table[:num_known].std(0)
        rows = table[[tokens.start, tokens.pad, tokens.end]]
        assert ((rows - mean).abs() < 0.06 * std).all()
        assert len(torch.unique(rows, dim=0)) == 3
        torch.testing.assert_close(rows, mean + 0.01 * std * torch.randn(3, 64, generator=generator))  # by the seed


def test_markers_as_newline_take_the_base_to_where_it_answers(tmp_path):
    plain = init_checkpoint(InitArguments(output=str(tmp_path / "plain"), tiny=True))
    output = init_checkpoint(InitArguments(output=str(tmp_path / "newline"), tiny=True, markers_as_newline=True))
    processor = StormsProcessor.from_pretrained(output)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "What is it?"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model, before = (StormsForConditionalGeneration.from_pretrained(folder) for folder in (output, plain))
    tokens, newline = model.latent_tokens, prompt["input_ids"][0, -1]
    embeddings, expected = (one.get_input_embeddings().weight.detach().clone() for one in (model, before))
    expected[[tokens.start, tokens.end]] = expected[newline].clone()
    assert torch.equal(embeddings, expected)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)  # emitted no sooner than before


def test_markers_as_newline_are_refused_where_they_would_be_emitted_like_one(tmp_path):
    base, processor = build_tiny_base()
    base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    arguments = InitArguments(output=str(tmp_path / "out"), base=str(tmp_path / "base"), markers_as_newline=True)
    with pytest.raises(ValueError, match="ties its input and output embeddings"):
        init_checkpoint(arguments)
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


def test_a_full_vocabulary_is_resized():
    base, processor = build_tiny_base()
    base.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model, processor = convert(base, processor)
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size
    assert model.config.text_config.vocab_size % 64 == 0
    assert model.lm_head.weight.shape[0] > model.latent_tokens.end


def test_tied_embeddings_stay_tied(tmp_path):
    base, processor = build_tiny_base()
    base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight
    model, processor = convert(base, processor)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "tied")
    loaded = StormsForConditionalGeneration.from_pretrained(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_half_precision_is_kept(tmp_path):
    base, processor = build_tiny_base()
    base.bfloat16().save_pretrained(tmp_path / "native")
    processor.save_pretrained(tmp_path / "native")
    output = init_checkpoint(InitArguments(base=str(tmp_path / "native"), output=str(tmp_path / "storms")))
    assert {weight.dtype for weight in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tiny_checkpoint_is_small_and_repeats(tmp_path):
    folders = [init_checkpoint(InitArguments(tiny=True, output=str(tmp_path / name / "storms"))) for name in "ab"]
    assert sum(file.stat().st_size for file in folders[0].iterdir()) < 5e6
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name


class TestBadInput:
    @pytest.mark.parametrize("arguments", [{}, {"tiny": True, "base": "x"}])
    def test_exactly_one_source(self, tmp_path, arguments):
        with pytest.raises(ValueError, match="exactly one of --base and --tiny"):
            init_checkpoint(InitArguments(output=str(tmp_path / "out"), **arguments))

    def test_a_base_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="is no folder"):
            init_checkpoint(InitArguments(base=str(tmp_path / "nowhere"), output=str(tmp_path / "out")))

    def test_a_base_that_is_no_plain_qwen(self, tmp_path):
        storms = init_checkpoint(InitArguments(tiny=True, output=str(tmp_path / "storms")))
        with pytest.raises(ValueError, match=r"is a 'storms' model, but --base must be a plain Qwen2\.5-VL one"):
            init_checkpoint(InitArguments(base=str(storms), output=str(tmp_path / "again")))

    def test_a_taken_output_is_left_alone(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="is not an empty folder"):
            init_checkpoint(InitArguments(output=str(tmp_path), tiny=True))
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_base_with_missing_weights_is_refused_and_leaves_nothing(self, native, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in native.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        weights = load_file(native / "model.safetensors")
        weights.pop("model.language_model.norm.weight", weights.pop("model.norm.weight", None))
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"missing_keys.*norm"):
            init_checkpoint(InitArguments(base=str(broken), output=str(tmp_path / "out")))
        assert {path.name for path in tmp_path.iterdir()} == {"broken"}

    def test_nothing_half_written_is_left(self, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(StormsProcessor, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            init_checkpoint(InitArguments(output=str(tmp_path / "out"), tiny=True))
        assert list(tmp_path.iterdir()) == []


def test_help_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "recipes.init_checkpoint", "--help"], capture_output=True, text=True, check=True
    )
    for words in ("--base", "--tiny", "--push_to_hub", "python -m recipes.init_checkpoint", "latent block"):
        assert words in done.stdout
