"""A run that is killed goes on as if nothing had happened: the same losses, the same weights."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataset_builder.__main__ import main as dataset_builder
from recipes import stage2
from recipes.checkpoints import last_checkpoint


# Runs Stage II and is killed, as by `kill -9`, when a method of the trainer is called at a step.
KILLED = """
import os, signal, sys
from recipes import stage2
from recipes.trainer import StormsTrainer

method, step = sys.argv[1], int(sys.argv[2])
original = getattr(StormsTrainer, method)

def kill_at_step(self, *arguments, **options):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **options)

setattr(StormsTrainer, method, kill_at_step)
stage2.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def flags(tiny_checkpoint, tmp_path_factory):
    """Of a run over a built dataset: 5 rows, 2 a step, so that an epoch's rows end in the middle of a step."""
    folder = tmp_path_factory.mktemp("datasets") / "thoughts"
    built = ["--world", "shell_game", "--num_rows", "5", "--validation_fraction", "0", "--test_fraction", "0"]
    dataset_builder(["build", *built, "--output", str(folder)])
    return [
        *("--model_name_or_path", str(tiny_checkpoint), "--dataset_name", str(folder), "--num_frames", "4"),
        *("--max_steps", "8", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3"),
        *("--latent_bottleneck", "0.5", "--dataloader_num_workers", "0", "--cache_rows", "true"),
        *("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true"),
        *("--resume_from_checkpoint", "last"),
    ]


def train_and_be_killed(method: str, step: int, *flags: str) -> str:
    command = [sys.executable, "-c", KILLED, method, str(step), *flags]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


def trajectory(output: Path) -> list[tuple[float, ...]]:
    """What is logged of each step, but for times and memory."""
    names = ("loss", "loss/lm", "grad_norm", "learning_rate", "latent_norm", "mean_token_accuracy", "epoch")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [tuple(entry[name] for name in names) for entry in history if "loss" in entry]


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("method", "step", "options"),
    [
        # In the middle of writing checkpoint-6: its weights are there, the optimiser's state is not.
        (
            "_save_optimizer_and_scheduler",
            6,
            ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"],
        ),
        # In the middle of a step, with rows from a stream, whose end is not known.
        ("compute_loss", 5, ["--per_device_train_batch_size", "2", "--dataset_streaming", "true"]),
        pytest.param(
            "compute_loss", 5, ["--per_device_train_batch_size", "2", "--use_peft", "true"], marks=pytest.mark.slow
        ),
    ],
    ids=["while-saving", "streaming", "lora"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(flags, tmp_path, capfd, method, step, options):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    stage2.main([*flags, *options, "--output_dir", str(undisturbed)])
    assert f"No checkpoint in {undisturbed} yet: starting." in capfd.readouterr().out

    train_and_be_killed(method, step, *flags, *options, "--output_dir", str(killed))
    expected = {"checkpoint-2", "checkpoint-4"}
    assert checkpoints(killed) == (expected | {"checkpoint-6"} if method.startswith("_save") else expected)
    assert not (killed / "trainer_state.json").exists()
    stage2.main([*flags, *options, "--output_dir", str(killed)])
    assert f"Resuming from {killed / 'checkpoint-4'}" in capfd.readouterr().out

    # Equal to the last bit wherever this has run. The room is for mathematics libraries that add up in another order
    # where memory lies otherwise; a row, a bottleneck draw or an optimiser's state that is another one costs at least
    # 1e-3, which is what any two steps differ by.
    ours, theirs = torch.tensor(trajectory(killed)), torch.tensor(trajectory(undisturbed))
    assert len(theirs) == 8
    assert theirs[:, 0].diff().abs().min() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    ours, theirs = (load_file(output / "model.safetensors") for output in (killed, undisturbed))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    start = load_file(Path(flags[1]) / "model.safetensors")
    assert any((theirs[name] - start[name]).abs().max() > 1e-3 for name in start), "else equal weights say nothing"


class TestLastCheckpoint:
    def write(self, output: Path, name: str, state: str | None = "{}") -> Path:
        (output / name).mkdir(parents=True)
        if state is not None:
            (output / name / "trainer_state.json").write_text(state)
        return output / name

    def test_is_the_whole_one_of_most_steps(self, tmp_path):
        self.write(tmp_path, "checkpoint-9")
        newest = self.write(tmp_path, "checkpoint-10")
        os.utime(tmp_path / "checkpoint-9")  # a copy may change times
        assert last_checkpoint(tmp_path) == newest

    @pytest.mark.parametrize("state", [None, "", '{"global_step": 1'])
    def test_skips_what_was_not_finished(self, tmp_path, state):
        whole = self.write(tmp_path, "checkpoint-9")
        self.write(tmp_path, "checkpoint-10", state)
        assert last_checkpoint(tmp_path) == whole

    def test_skips_what_is_none(self, tmp_path):
        self.write(tmp_path, "checkpoint-best")
        self.write(tmp_path, "checkpoint-3-old")
        (tmp_path / "checkpoint-7").write_text("a file")
        assert last_checkpoint(tmp_path) is None

    def test_may_be_missing_with_the_whole_folder(self, tmp_path):
        assert last_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_is_not_there_is_named(flags, tmp_path):
    missing = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=missing):
        stage2.main([*flags, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", missing])


def test_a_full_disk_costs_no_checkpoint(flags, tmp_path):
    """Files above a limit can't be written, as on a disk without room for them."""
    stage2.main([*flags, "--output_dir", str(tmp_path), "--max_steps", "2"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # below the weights
    try:
        with pytest.raises(SystemExit, match=r"Saving .*checkpoint-4 failed: .*GB are free") as caught:
            stage2.main([*flags, "--output_dir", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"last whole checkpoint is {tmp_path / 'checkpoint-2'}" in str(caught.value)
    assert "--resume_from_checkpoint last goes on" in str(caught.value)
    assert not (tmp_path / "checkpoint-4").exists()  # nothing half-written
    assert load_file(tmp_path / "model.safetensors")  # that of the first run
    stage2.main([*flags, "--output_dir", str(tmp_path)])
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert len(trajectory(tmp_path)) == 8
