"""Alignment: teach a new temporal projector what the language model can read, with everything else frozen (STORM).

    accelerate launch recipes/align.py --config recipes/configs/qwen2_5_vl_7b/align.yaml \\
        --model_name_or_path storms-7b --dataset_name org/pairs --output_dir storms-7b-aligned

Data are image-text pairs as TRL's conversational rows (`messages`, `images`), or questions about videos. Then go on
with `sft.py`, `stage1.py` and `stage2.py`, with `--temporal_pool` and more frames. Any flag overrides the YAML.
"""

from collections.abc import Sequence

from recipes.trainer import StormsTrainer, run


def main(argv: Sequence[str] | None = None) -> StormsTrainer:
    return run("align", __doc__, argv)


if __name__ == "__main__":
    main()
