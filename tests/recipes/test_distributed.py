"""Two processes equal one at the same global batch: replicated (DDP) and sharded (FSDP2), on CPUs over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .distributed_worker import run_case
from .test_trainer import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from .tiny_runs import worst_difference


ROOT = Path(__file__).parents[2]
TIMEOUT = 400  # seconds, on a busy machine; a hang fails instead of blocking


# Unpooled, rows have 4, 12, 8 and 4 slots: rank 0 rolls out 12, rank 1 only 8 and idles for 4 passes.
UNEQUAL = {"latent_size": None}
EVALUATED = {**UNEQUAL, "eval_answers": 3}
ROLLOUT = {**UNEQUAL, "latent_input": "rollout"}
DRAWN = {**UNEQUAL, "latent_bottleneck": 0.5, "stop_supervision": "not_end", "gradient_checkpointing": True}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}


def case(name: str, stage: str, options: dict[str, Any], sharding: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "stage": stage, "options": options, "sharding": sharding, **more}


CASES = [
    case("ddp-stage1", "stage1", EVALUATED, evaluates=True),
    case("ddp-stage1-rollout", "stage1", {**ROLLOUT, "gradient_accumulation_steps": 2}),
    case("ddp-stage2-bottleneck", "stage2", DRAWN),
    case("ddp-video-beside-text", "stage2", {}, text_rows=[2, 3]),
    case("fsdp-stage1", "stage1", EVALUATED, "torch", evaluates=True),
    case("fsdp-stage1-rollout", "stage1", ROLLOUT, "torch"),
    case("fsdp-stage2-bottleneck", "stage2", DRAWN, "torch"),
    # The embedding, a unit of its own here, is gathered for the text after a block too.
    case("fsdp-by-accelerate", "stage1", ROLLOUT, "accelerate"),
    case("fsdp-tower-trains", "stage1", {**ROLLOUT, "trainable": "all"}, "torch"),
]
REFUSED = [
    case("video-beside-text", "sft", {}, "torch", text_rows=[2, 3], seen="[[0, 1, 0], [0, 0, 0]]", is_refused=True),
    case(
        "stored-beside-not", "stage1", {}, "torch", stored_rows=[2, 3], seen="[[0, 1, 1], [0, 1, 0]]", is_refused=True
    ),
]
SLOW_CASES = [
    case("ddp-lora", "stage1", {**ROLLOUT, **EVALUATED}, model_options=LORA, evaluates=True),
    case("ddp-sft", "sft", {"gradient_accumulation_steps": 2}),
    case("ddp-tower-trains", "stage1", {**UNEQUAL, "trainable": "all"}),
    case("accelerate-stage1", "stage1", EVALUATED, "accelerate", evaluates=True),
    case("accelerate-stage2-bottleneck", "stage2", DRAWN, "accelerate"),
    case("accelerate-lora", "stage1", {**ROLLOUT, **EVALUATED}, "accelerate", model_options=LORA, evaluates=True),
]


def launch(cases, checkpoint, folder):
    """Run the cases on two ranks; what the first came to, and the second."""
    cases = [
        {**one, "options": {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **one["options"]}}
        for one in cases
    ]
    for one in cases:
        one["options"]["per_device_train_batch_size"] //= one["options"].get("gradient_accumulation_steps", 1)
    spec = {"checkpoint": str(checkpoint), "output": str(folder), "cases": cases}
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.recipes.distributed_worker", str(folder / "spec.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks
            process.wait(60)
        log.seek(0)
        assert process.returncode == 0, log.read()[-6000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tiny_checkpoint, tmp_path_factory):
    return launch(CASES + REFUSED, tiny_checkpoint, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def slow_ranks(tiny_checkpoint, tmp_path_factory):
    return launch(SLOW_CASES, tiny_checkpoint, tmp_path_factory.mktemp("slow-ranks"))


def assert_equals_one_process(case, ranks, checkpoint, folder):
    two, other = (results[case["name"]] for results in ranks)
    # 1. Two ranks there were, and sharded weights.
    assert two["world_size"] == 2
    assert two["is_sharded"] == (case["sharding"] is not None)
    assert two["wrapper"].startswith("FSDP" if case["sharding"] else "DistributedDataParallel")
    # 2. One process, and the four rows in one batch.
    options = {name: value for name, value in case["options"].items() if name != "gradient_accumulation_steps"}
    one = run_case(str(checkpoint), folder, {**case, "sharding": None, "options": options})
    assert one["world_size"] == 1
    for mine, theirs in zip(two["logs"], one["logs"], strict=True):
        names = set(theirs) - {"tokens_per_second", "items_per_second", "peak_memory_gb", "grad_norm", "epoch"}
        assert {"loss", "loss/lm", "mean_token_accuracy", "num_tokens"} <= names <= set(mine)
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE), name
        # A second's work is that of both.
        assert mine["tokens_per_second"] / mine["items_per_second"] == pytest.approx(
            theirs["tokens_per_second"] / theirs["items_per_second"]
        )
    assert worst_difference(two["gradients"], one["gradients"]) < GRADIENT_TOLERANCE
    assert worst_difference(two["weights"], other["weights"]) == 0.0, "the ranks have come apart"
    # 3. Three rows to evaluate on fill no second batch of two on the second rank: repeated ones must not count.
    if case.get("evaluates"):
        names = {"eval_loss", "eval_loss/lm", "eval_loss/latent", "eval_latent_cosine", "eval_mean_token_accuracy"}
        names |= {"eval_accuracy", "eval_parsed", "eval_full_blocks"}
        assert 0 < one["eval"]["eval_parsed"] < 1
        for name in names:
            assert two["eval"][name] == pytest.approx(one["eval"][name], rel=LOSS_TOLERANCE), name  # seen: equal


def cases(chosen):
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["name"])


@cases(CASES)
def test_two_processes_equal_one(case, ranks, tiny_checkpoint, tmp_path):
    assert_equals_one_process(case, ranks, tiny_checkpoint, tmp_path)


@pytest.mark.slow
@cases(SLOW_CASES)
def test_two_processes_equal_one_in_other_ways(case, slow_ranks, tiny_checkpoint, tmp_path):
    assert_equals_one_process(case, slow_ranks, tiny_checkpoint, tmp_path)


@cases(REFUSED)
def test_ranks_that_would_wait_for_each_other_for_ever_say_so(case, ranks):
    for error in (results[case["name"]]["error"] for results in ranks):
        assert case["seen"] in error
        assert "train on rows of one kind, or by accelerate_configs/ddp.yaml" in error
