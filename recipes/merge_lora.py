"""Merge a LoRA checkpoint into a plain STORMS checkpoint, which loads by `AutoModel` without peft.

    python -m recipes.merge_lora --adapter storms-3b-stage2/checkpoint-500 --output storms-3b-merged

A finished run has done this already: its output folder holds the merged model, and `_adapter/` the adapter.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import GenerationConfig, HfArgumentParser

from modeling_storms import StormsConfig, StormsForConditionalGeneration, StormsProcessor


@dataclass
class MergeArguments:
    adapter: str = field(metadata={"help": "Folder of a LoRA checkpoint."})
    output: str = field(metadata={"help": "Folder to write the merged checkpoint to."})
    base: str | None = field(
        default=None, metadata={"help": "What it was trained on; what it says itself by default."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of the merged weights; the base's by default."})


def merge_lora(adapter: Path, output: Path, base: str | None = None, dtype: str = "auto") -> Path:
    """Write the merged checkpoint; files of the same name in `output` are replaced.

    Raises:
        ValueError: if `adapter` is no LoRA checkpoint, or peft is not installed.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError('Merging needs peft: pip install "storms[lora]".') from error
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json, expected a LoRA checkpoint's folder.")
    trained_on = PeftConfig.from_pretrained(str(adapter))
    revision = (trained_on.revision if base is None else None) or "main"
    base = base or trained_on.base_model_name_or_path
    model = StormsForConditionalGeneration.from_pretrained(base, revision=revision, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if (adapter / "config.json").is_file():  # K may be the run's own
        merged.config.latent_size = StormsConfig.from_pretrained(adapter).latent_size
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    is_whole = (adapter / "processor_config.json").is_file()
    processor = StormsProcessor.from_pretrained(adapter if is_whole else base, revision=revision)
    output.mkdir(parents=True, exist_ok=True)
    staging = output / f".merged.{os.getpid()}"
    try:
        merged.save_pretrained(staging)
        processor.save_pretrained(staging)
        for file in staging.iterdir():
            file.replace(output / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def main() -> None:
    (arguments,) = HfArgumentParser(MergeArguments, description=__doc__).parse_args_into_dataclasses()
    print(f"Wrote {merge_lora(Path(arguments.adapter), Path(arguments.output), arguments.base, arguments.dtype)}")


if __name__ == "__main__":
    main()
