"""Stage I: ground the latents. Answers are trained, and the state that each slot should hold is drawn to features of
the row's thought video (STORMS, Sec. 3.3).

    accelerate launch recipes/stage1.py --config recipes/configs/tiny/stage1.yaml
    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/stage1.py \\
        --config recipes/configs/qwen2_5_vl_7b/stage1.yaml --dataset_name org/storms-thought-videos \\
        --model_name_or_path storms-7b-init --output_dir storms-7b-stage1

Targets are encoded on the fly, or read from the dataset if `recipes.cache_targets` has put them there. Any flag
overrides the YAML. `--resume_from_checkpoint last` goes on after an interruption.
"""

from collections.abc import Sequence

from recipes.trainer import StormsTrainer, run


def main(argv: Sequence[str] | None = None) -> StormsTrainer:
    return run("stage1", __doc__, argv)


if __name__ == "__main__":
    main()
