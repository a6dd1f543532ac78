"""Every YAML is one that its program takes, and says in its first lines on what it was run and what came of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch import nn

from modeling_storms.temporal_storms import TemporalProjector
from recipes import align, cache_targets, sft, stage1, stage2
from recipes.arguments import STAGES, DataArguments, StormsTrainingArguments, parse_arguments


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
STAGE_CONFIGS = sorted(path for path in (RECIPES / "configs").rglob("*.yaml") if path.stem in STAGES)
ACCELERATE_CONFIGS = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
RELEASED = [path for path in STAGE_CONFIGS if path.parent.name.startswith("qwen")]


def header(path: Path) -> str:
    """The comment that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(idx for idx, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def relative(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def test_every_size_has_every_stage():
    assert {relative(path) for path in RELEASED} == {
        f"configs/qwen2_5_vl_{size}/{stage}.yaml" for size in ("3b", "7b") for stage in STAGES
    }
    assert [path.stem for path in ACCELERATE_CONFIGS] == ["ddp", "deepspeed_zero3", "fsdp2", "single"]


@pytest.mark.parametrize("path", STAGE_CONFIGS, ids=relative)
def test_a_stages_config_is_taken_as_it_stands(path, tmp_path):
    # A CPU has no bfloat16 kernels that the arguments would accept; a YAML may leave data and model to flags.
    flags = ["--use_cpu", "true"]
    given = yaml.safe_load(path.read_text())
    needed = {"dataset_name": "given", "model_name_or_path": "given", "output_dir": str(tmp_path)}
    if "datasets" in given:
        needed.pop("dataset_name")
    for name in needed.keys() - given.keys():
        flags += [f"--{name}", needed[name]]
    data, training, model = parse_arguments(path.stem, None, ["--config", str(path), *flags])
    for name, value in given.items():
        holders = [part for part in (data, training, model) if hasattr(part, name)]
        assert holders, name
        if name != "use_cpu":
            assert value in [getattr(part, name) for part in holders], name


@pytest.mark.parametrize("path", STAGE_CONFIGS, ids=relative)
def test_a_stages_config_says_on_what_it_was_run(path):
    first = header(path).split("\n")[0]
    assert any(word in first for word in ("GPU", "CPU", "core")), first
    assert any(word in first for word in ("untested", "measured", "minute", "second", "figures")), first


@pytest.mark.parametrize("path", [path for path in RELEASED if path.stem == "align"], ids=relative)
def test_expected_memory_of_alignment_is_that_of_frozen_weights_and_a_projector(path):
    total, hidden_size = {"qwen2_5_vl_7b": (8.29, 3584), "qwen2_5_vl_3b": (3.75, 2048)}[path.parent.name]
    _, training, model = parse_arguments("align", None, ["--config", str(path), "--use_cpu", "true"])
    assert model.dtype == "float32"
    assert training.trainable == "projector"
    with torch.device("meta"):
        projector = TemporalProjector(hidden_size, training.temporal_projector)
    billions = sum(parameter.numel() for parameter in projector.parameters()) / 1e9
    text = header(path)
    assert f"{billions:.3f}e9 x 16 bytes = {16 * billions:.1f}" in text
    assert f"{total}e9 x 4 bytes = {4 * total:.1f} GB" in text
    assert f"over {4 * total + 16 * billions:.0f} GB" in text


@pytest.mark.parametrize("path", [path for path in RELEASED if path.stem != "align"], ids=relative)
def test_expected_memory_is_the_arithmetic_of_its_settings(path):
    total, frozen = {"qwen2_5_vl_7b": (8.29, 0.67), "qwen2_5_vl_3b": (3.75, 0.67)}[path.parent.name]
    _, training, model = parse_arguments(path.stem, None, ["--config", str(path), "--use_cpu", "true"])
    # Float32 weights stay float32 under FSDP2, and so do gradients and both of AdamW's averages.
    assert model.dtype == "float32"
    assert training.trainable == "llm"
    assert not model.use_peft
    assert training.optim in ("adamw_torch", "adamw_torch_fused")
    weights, gradients, optimizer = 4 * total, 4 * (total - frozen), 8 * (total - frozen)
    text = header(path)
    for gigabytes in (weights, gradients, optimizer):
        assert f"= {gigabytes:.1f}" in text
    assert f"= {(weights + gradients + optimizer) / 4:.0f} GB" in text
    # The Trainer saves weights twice under FSDP, for `AutoModel` and for itself, and the optimiser.
    assert f"{2 * weights + optimizer:.0f} GB a checkpoint" in text
    assert training.save_total_limit == 2


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=relative)
def test_accelerate_takes_its_configs(path):
    config = load_config_from_file(str(path))  # refuses unknown names, but not inside of the plugins' parts
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    assert config.mixed_precision == "bf16"
    text = header(path)
    assert "ntested" in text.split("\n")[0]
    assert f"accelerate launch --config_file recipes/accelerate_configs/{path.name}" in text
    for flag in ("--num_machines", "--machine_rank", "--main_process_ip"):
        assert flag in text


class TestSharding:
    def plugin(self, monkeypatch) -> FullyShardedDataParallelPlugin:
        """What `accelerate launch` makes of the file: it hands the values to the program by its environment."""
        config = load_config_from_file(str(RECIPES / "accelerate_configs" / "fsdp2.yaml"))
        for name in [name for name in os.environ if name.startswith("FSDP_")]:
            monkeypatch.delenv(name)
        for name, value in config.fsdp_config.items():
            monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
        return FullyShardedDataParallelPlugin()

    def test_each_layer_of_both_towers_is_a_unit(self, monkeypatch, model):
        plugin = self.plugin(monkeypatch)
        plugin.set_auto_wrap_policy(model)
        classes = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
        layers = [*model.model.language_model.layers, *model.model.visual.blocks]
        assert isinstance(model.model.visual.blocks, nn.ModuleList)
        assert classes == {type(layer) for layer in layers}

    def test_whole_weights_are_saved_and_checkpointing_is_the_trainers(self, monkeypatch):
        plugin = self.plugin(monkeypatch)
        assert plugin.fsdp_version == 2
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
        assert plugin.reshard_after_forward
        assert not plugin.activation_checkpointing
        assert not plugin.cpu_ram_efficient_loading


def assert_explains_our_options(printed: str) -> None:
    printed = " ".join(printed.split())
    assert "accelerate launch recipes/" in printed
    for part in (DataArguments, StormsTrainingArguments):
        for name in part.__annotations__:
            help = part.__dataclass_fields__[name].metadata.get("help")
            if help is not None:  # those without are TRL's, with another default
                assert f"--{name}" in printed
                assert " ".join(help.split()) in printed, name


def test_help_explains_our_options():
    command = [sys.executable, str(RECIPES / "stage2.py"), "--help"]
    assert_explains_our_options(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("program", [align, sft, stage1, stage2, cache_targets], ids=lambda program: program.__name__)
def test_help_of_each_program_explains_itself(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    if program is cache_targets:
        for words in ("--latent_size", "K, targets a row", "python -m recipes.cache_targets"):
            assert words in " ".join(printed.split())
    else:
        assert_explains_our_options(printed)
