"""Supervised fine-tuning without latent blocks: the baseline on the same data.

    accelerate launch recipes/sft.py --config recipes/configs/tiny/sft.yaml
    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/sft.py \\
        --config recipes/configs/qwen2_5_vl_7b/sft.yaml --dataset_name org/storms-thought-videos

Any flag overrides the YAML. `--resume_from_checkpoint last` goes on after an interruption.
"""

from collections.abc import Sequence

from recipes.trainer import StormsTrainer, run


def main(argv: Sequence[str] | None = None) -> StormsTrainer:
    return run("sft", __doc__, argv)


if __name__ == "__main__":
    main()
