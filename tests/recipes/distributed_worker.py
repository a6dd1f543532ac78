"""One rank of a distributed run: `torchrun ... -m tests.recipes.distributed_worker SPEC.json` runs its cases."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .tiny_runs import make_rows, make_trainer, train


def shard_by_torch(model) -> None:
    """Decoder layers and vision blocks alone, everything else in the root's group, which is freed after each forward
    pass: whatever runs outside of one finds no weights."""
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)


def shard_by_accelerate(model) -> None:
    """As `accelerate launch` does it with FSDP2 on GPUs: the embedding is a unit of its own. On CPUs accelerate never
    turns it on."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True
    )
    fsdp2_prepare_model(accelerator, model)


SHARDING = {"torch": shard_by_torch, "accelerate": shard_by_accelerate}


def rows_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Four rows, some of them replaced by conversations without media, or with stored targets."""
    rows = make_rows()
    if "text_rows" in case:
        rows = [{"messages": None} | row for row in rows]
    for index in case.get("text_rows", []):
        turns = [{"role": "user", "content": f"Why {index}?"}, {"role": "assistant", "content": "So."}]
        rows[index] = dict.fromkeys(rows[index], None) | {"id": f"text-{index}", "messages": turns}
    if "stored_rows" in case:
        rows = [{"latent_targets": None} | row for row in rows]
    for index in case.get("stored_rows", []):
        rows[index] = rows[index] | {"latent_targets": torch.ones(3, 64).tolist(), "thought_video": None}
    return rows


def run_case(checkpoint: str, output: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What a case comes to, in any number of processes."""
    rows = rows_of(case)
    trainer = make_trainer(
        checkpoint,
        output / case["name"],
        case["stage"],
        rows,
        rows[:3] if case.get("evaluates") else None,
        case.get("model_options"),
        **{"max_steps": 2, **case.get("options", {})},
    )
    if sharding := case.get("sharding"):
        SHARDING[sharding](trainer.model)
        # What tells transformers to leave a model alone that came sharded: accelerate would put DDP around it.
        trainer.is_distributed_loading_by_transformers = True
    if case.get("is_refused"):
        with pytest.raises(ValueError, match="Ranks have batches with different media") as refused:
            trainer.train()
        return {"error": str(refused.value)}
    result = train(trainer)
    result["world_size"] = trainer.accelerator.num_processes
    result["wrapper"] = type(trainer.model_wrapped).__name__
    result["is_sharded"] = all(isinstance(one, DTensor) for one in trainer.model.parameters())
    if sharding == "torch" and case["stage"] != "sft":
        # Registered once, and not once more at each step.
        assert not hasattr(trainer.model.get_target_features.__func__.__wrapped__, "__wrapped__")
    if case.get("evaluates"):
        result["eval"] = trainer.evaluate()
    return result


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    checkpoint, output = spec["checkpoint"], Path(spec["output"])
    results: dict[str, Any] = {}
    for case in spec["cases"]:
        print(f"case {case['name']}", flush=True)  # the last one is where it hangs
        results[case["name"]] = run_case(checkpoint, output, case)
    torch.save(results, output / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
