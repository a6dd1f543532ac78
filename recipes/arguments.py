"""What a training run can be told, by flags and YAML alike: TRL's own names, and what STORMS adds to them."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import HubStrategy
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from modeling_storms.latent_storms import LATENT_INPUTS, STOP_SUPERVISIONS


STAGES = ("align", "sft", "stage1", "stage2")
WITHOUT_BLOCKS = ("align", "sft")
VISUAL_CONTEXTS = ("keyframes", "video", "both")
TARGET_SOURCES = ("thought_video", "keyframes", "self_distilled")
TRAINABLE = ("llm", "all", "projector")
RESUME_FROM_LAST = ("last", "true", "True", "auto")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"--{name}: saw {value!r}, expected one of {', '.join(map(repr, allowed))}.")


def _at_least(name: str, value: Any, lowest: int) -> None:
    if value is not None and value < lowest:
        raise ValueError(f"--{name}: saw {value}, expected {lowest} or more.")


@dataclass
class DatasetSource:
    """One entry of `datasets` in a YAML: what to load, and how much of it to draw.

    Args:
        path (`str`): a Hub name or a folder.
        name, revision (`str`, *optional*): configuration and revision of it.
        split (`str`, *optional*): `--dataset_train_split` by default.
        weight (`float`, *optional*): probability of drawing the next row from it; all entries or none have one.
        video_root (`str`, *optional*): `--video_root` by default.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str | None = None
    weight: float | None = None
    video_root: str | None = None


@dataclass
class DataArguments(ScriptArguments):
    """TRL's `ScriptArguments`, and what a row is made of."""

    dataset_test_split: str = _option("validation", "Split to evaluate on, if `--eval_strategy` asks for it.")
    dataset_revision: str | None = _option(None, "Revision of `--dataset_name` on the Hub to pin.")
    datasets: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "A mixture instead of `--dataset_name`; a list in a YAML, each entry with `path` and, as needed, "
            "`name`, `revision`, `split`, `weight` (probability of drawing from it) and `video_root`."
        },
    )
    visual_context: str = _option(
        "video", f"What stands before the question: {', '.join(VISUAL_CONTEXTS)} (the video, then its keyframes)."
    )
    video_root: str | None = _option(None, "Folder that `video_path` is relative to, for rows without bytes.")
    num_frames: int | None = _option(None, "Frames of a video. Saved with the processor; its own by default.")
    max_frame_pixels: int | None = _option(
        None, "Most pixels of a video's frame. Saved with the processor; its own by default."
    )
    cache_rows: bool = _option(
        False, "Keep each row's decoded and processed form in memory after its first use. For small datasets."
    )
    max_train_rows: int | None = _option(None, "Use only the first so many training rows.")
    max_eval_rows: int | None = _option(None, "Use only the first so many rows to evaluate on.")

    def __post_init__(self):
        _one_of("visual_context", self.visual_context, VISUAL_CONTEXTS)
        if bool(self.dataset_name) == bool(self.datasets):
            raise ValueError(
                f"--dataset_name: saw {self.dataset_name!r} with {len(self.datasets)} entries of `datasets`, expected "
                "exactly one of the two: a Hub name or a folder, or a list in a YAML."
            )
        if self.video_root is not None:
            self.video_root = os.path.abspath(os.path.expanduser(self.video_root))
        for name in ("num_frames", "max_frame_pixels", "max_train_rows", "max_eval_rows"):
            _at_least(name, getattr(self, name), 1)
        self.sources()

    def sources(self) -> list[DatasetSource]:
        """The datasets to train on.

        Raises:
            ValueError: if an entry has unknown keys or no path, or only some have a weight.
        """
        entries = self.datasets or [
            {"path": self.dataset_name, "name": self.dataset_config, "revision": self.dataset_revision}
        ]
        known = set(DatasetSource.__dataclass_fields__)
        for entry in entries:
            if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= known:
                raise ValueError(f"datasets: saw {entry!r}, expected `path` and some of {', '.join(sorted(known))}.")
        sources = [DatasetSource(**entry) for entry in entries]
        weights = [source.weight for source in sources]
        are_positive = [isinstance(weight, (int, float)) and weight > 0 for weight in weights]
        if weights.count(None) != len(weights) and not all(are_positive):
            raise ValueError(f"datasets: saw weights {weights}, expected a positive one for each entry, or for none.")
        for source in sources:
            if source.video_root is not None:
                source.video_root = os.path.abspath(os.path.expanduser(source.video_root))
        return sources


@dataclass
class StormsTrainingArguments(SFTConfig):
    """TRL's `SFTConfig`, and the latent mode's training. Rows are prepared by our collator, never cut."""

    max_length: int | None = _option(
        None, "Most tokens of a row, prompt, block and answer together. A longer row is an error: none is ever cut."
    )
    remove_unused_columns: bool = False
    dataset_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"skip_prepare_dataset": True})
    trainable: str = _option(
        "llm",
        "What trains: llm (language model, head and temporal projector; vision tower frozen), all, or projector (that "
        "alone). LoRA: see `--use_peft`.",
    )
    temporal_projector: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Give the model a temporal projector, which begins as the identity: options of Mamba-2, JSON or "
            'in a YAML, such as {"num_layers": 2}; {} for the defaults. Otherwise the checkpoint\'s own, if any.'
        },
    )
    temporal_pool: int | None = _option(
        None, "Average so many consecutive grid steps of a video (two frames each). Saved with the checkpoint."
    )
    spatial_pool: int | None = _option(
        None, "Average squares of so many visual tokens: 4, 9, 16. Saved with the checkpoint."
    )
    latent_size: int | None = _option(
        8,
        "K, slots of a block. null: one slot for each token of a row's target, without pooling; generation then uses "
        "as many as the first row has.",
    )
    latent_input: str | None = _option(
        None,
        "What fills the slots: in Stage I teacher_forced (default) or rollout, in Stage II always rollout; or, as a "
        "control, embedding: nothing is fed back (pause tokens), and generation needs an intervention to match.",
    )
    latent_loss_weight: float = _option(0.1, "Stage I only: weight of the regression to the targets.")
    target_source: str = _option("thought_video", f"Stage I only: what the targets show: {', '.join(TARGET_SOURCES)}.")
    num_target_frames: int = _option(
        16, "Stage I only: frames sampled from a thought video as target; best a multiple of 2K."
    )
    latent_bottleneck: float = _option(
        0.0, "Probability, per row and step, that the video reaches the answer only through the slots."
    )
    stop_supervision: str = _option(
        "none", f"Training of the stay-or-end decision: {', '.join(STOP_SUPERVISIONS)}. For latent_stop='token'."
    )
    stop_at_loss: float | None = _option(
        None, "End training once the answers' loss, over the steps between two logs, is at most this: a stage learned."
    )
    eval_answers: int = _option(
        64, "At each evaluation also answer so many rows by real generation (`eval_accuracy`). 0: only the loss."
    )
    eval_max_new_tokens: int = _option(32, "Longest answer in that generation, the block not counted.")
    padding_side: str = _option("left", "Side on which rows of a batch are padded. The result is the same.")
    resume_from_checkpoint: str | None = _option(
        None, "A checkpoint folder, or `last`: the last whole one in --output_dir, if there is any."
    )

    def __post_init__(self):
        super().__post_init__()
        _one_of("trainable", self.trainable, TRAINABLE)
        if isinstance(self.temporal_projector, str):
            try:
                self.temporal_projector = json.loads(self.temporal_projector)
            except ValueError as error:
                raise ValueError(f"--temporal_projector: saw {self.temporal_projector!r}, expected JSON.") from error
        _one_of("latent_input", self.latent_input, (None, *LATENT_INPUTS))
        _one_of("target_source", self.target_source, TARGET_SOURCES)
        _one_of("stop_supervision", self.stop_supervision, STOP_SUPERVISIONS)
        _one_of("padding_side", self.padding_side, ("left", "right"))
        if not 0 <= self.latent_bottleneck <= 1:
            raise ValueError(f"--latent_bottleneck: saw {self.latent_bottleneck}, expected a probability, 0 to 1.")
        for name in ("latent_size", "num_target_frames", "eval_max_new_tokens", "max_length"):
            _at_least(name, getattr(self, name), 1)
        _at_least("eval_answers", self.eval_answers, 0)
        for name in ("latent_loss_weight", "stop_at_loss"):
            _at_least(name, getattr(self, name), 0)
        fixed = {
            **dict.fromkeys(
                ("packing", "padding_free", "label_smoothing_factor"), (0, "it does not work with blocks")
            ),
            "loss_type": ("nll", "no other one works with blocks"),
            "use_liger_kernel": (False, "the loss would be its own"),
            "average_tokens_across_devices": (True, "else the loss would change with the number of ranks"),
        }
        for name, (value, reason) in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"--{name}: saw {getattr(self, name)!r}, expected its default: {reason}.")

    def __getstate__(self) -> dict[str, Any]:
        # Every checkpoint holds its arguments, pickled, and is pushed with them: without the token.
        return {**self.__dict__, "hub_token": None}


def check_stage(arguments: StormsTrainingArguments, stage: str) -> None:
    """Refuse options that a stage would ignore.

    Raises:
        ValueError: if an option was set that means nothing in this stage: it would be believed to have worked.
    """
    _one_of("stage", stage, STAGES)
    ignored: list[str] = []
    if stage != "stage1":
        ignored += ["latent_loss_weight"]
        if stage in WITHOUT_BLOCKS or arguments.latent_input not in ("rollout", "embedding"):
            ignored += ["latent_input"]
        if stage in WITHOUT_BLOCKS or arguments.latent_size is not None:  # else a block is as long as its targets
            ignored += ["target_source", "num_target_frames"]
    elif arguments.target_source != "thought_video":  # an own video's frames are those of the context
        ignored += ["num_target_frames"]
    if stage in WITHOUT_BLOCKS:
        ignored += ["latent_size", "latent_bottleneck", "stop_supervision"]
    defaults = StormsTrainingArguments.__dataclass_fields__
    wrong = [name for name in ignored if getattr(arguments, name) != defaults[name].default]
    if wrong:
        raise ValueError(f"{', '.join(f'--{name}' for name in wrong)} mean nothing in {stage}. Leave them out.")


def parse_arguments(
    stage: str, description: str | None, argv: Sequence[str] | None = None
) -> tuple[DataArguments, StormsTrainingArguments, ModelConfig]:
    """Flags over `--config FILE` over defaults.

    Raises:
        ValueError: for an unknown key, a value that means nothing, or an option that this stage would ignore.
    """
    parts: Any = (DataArguments, StormsTrainingArguments, ModelConfig)
    parser = TrlParser(
        parts,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data, training, model_arguments = parser.parse_args_and_config(argv)
    if stage == "align":
        _one_of("trainable", training.trainable, ("llm", "projector"))  # the default means nothing here
        training.trainable = "projector"
    check_stage(training, stage)
    if training.push_to_hub and training.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"--hub_strategy: saw {training.hub_strategy.value!r}, expected 'every_save' or 'end': states of "
            "optimizers are pickles, which are not published. Resume from --output_dir."
        )
    if model_arguments.use_peft and training.push_to_hub and training.hub_strategy != HubStrategy.END:
        # An adapter alone does not load by `AutoModel`; the merged model is pushed once training has ended.
        training.hub_strategy = HubStrategy.END
    return data, training, model_arguments
