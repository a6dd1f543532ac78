"""Stage II: make the latents the model's own. Its own states fill the slots, answers alone are trained, and the
gradient runs through the whole block (STORMS, Sec. 3.3).

    accelerate launch recipes/stage2.py --config recipes/configs/tiny/stage2.yaml
    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/stage2.py \\
        --config recipes/configs/qwen2_5_vl_7b/stage2.yaml --dataset_name org/storms-thought-videos \\
        --model_name_or_path storms-7b-stage1 --output_dir storms-7b --push_to_hub true --hub_model_id org/storms-7b

Any flag overrides the YAML. `--resume_from_checkpoint last` goes on after an interruption.
"""

from collections.abc import Sequence

from recipes.trainer import StormsTrainer, run


def main(argv: Sequence[str] | None = None) -> StormsTrainer:
    return run("stage2", __doc__, argv)


if __name__ == "__main__":
    main()
