"""What a build can be told, by flags and YAML alike."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from .engines import ENGINES
from .schema import SPLITS
from .validate import Thresholds


SOURCES = ("simulated", "local_folder", "video_r1")
TEACHERS = ("local", "openai")
GENERATORS = ("simulated", "source_clip", "wan")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check_types(part: Any) -> None:
    """Check values that came from a YAML file, which flags' parser takes as they are; a single text becomes a list."""
    for name, hint in get_type_hints(type(part)).items():
        value = getattr(part, name)
        if get_origin(hint) is list and isinstance(value, str):
            value = [value]
        known = get_args(hint) if NoneType in get_args(hint) else (hint,)
        if float in known and type(value) is int:
            value = float(value)
        is_texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (is_texts if get_origin(hint) is list else type(value) in known):
            names = [getattr(kind, "__name__", str(kind)) for kind in known if kind is not NoneType]
            raise ValueError(f"--{name}: saw {value!r}, expected {names[0]}{' or null' if len(known) > 1 else ''}.")
        setattr(part, name, value)


def _absolute(path: str | None) -> str | None:
    """Workers, and later commands, may run in another folder."""
    return None if path is None else os.path.abspath(os.path.expanduser(path))


@dataclass
class SourceArguments:
    output: str = _option("", "Folder to build in. Required.")
    source: str = _option("simulated", f"Where questions come from: {', '.join(SOURCES)}.")
    num_rows: int | None = _option(
        None,
        "Rows to publish. Refused ones are replaced from the source while it has more. All by default; 64 simulated.",
    )
    seed: int = _option(0, "Decides simulated scenes, which rows are drawn, and splits.")
    world: list[str] = field(
        default_factory=lambda: ["shell_game"],
        metadata={"help": "Simulated worlds: shell_game, bounce, order, speed, collide, color_swap, or all."},
    )
    dials: list[str] = field(
        default_factory=list, metadata={"help": "Difficulty of worlds, as world.dial=value: shell_game.num_cups=4."}
    )
    shuffle_options: bool = _option(
        True, "Options of simulated rows in a random order; false: in the world's own, such as left, middle, right."
    )
    questions: str | None = _option(
        None,
        "Questions of a real source: Video-R1's JSON, a .jsonl or a .csv. Default: questions.* in the folder.",
    )
    video_root: str | None = _option(None, "Folder (or .zip, .tar) of a real source's videos.")
    license: str = _option("unknown", "Licence of a real source's rows that state none, for example cc-by-4.0.")
    exclude_videos: str | None = _option(None, "File of video ids, one a line, to refuse: those of evaluation sets.")
    validation_fraction: float | None = _option(None, "Part of the videos for validation (simulated: 0.1; real: 0).")
    test_fraction: float | None = _option(None, "Part of the videos for test (simulated: 0.1; real: 0).")
    max_video_seconds: float | None = _option(None, "Refuse longer source videos or segments.")

    def __post_init__(self):
        _check_types(self)
        _one_of("--source", self.source, SOURCES)
        if not self.output:
            raise ValueError("--output is missing: the folder to build in.")
        for name in ("output", "questions", "video_root", "exclude_videos"):
            setattr(self, name, _absolute(getattr(self, name)))
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"--num_rows: saw {self.num_rows}, expected 1 or more.")
        if self.source == "simulated":
            if self.questions or self.video_root:
                raise ValueError(
                    "--questions and --video_root are of real sources: add --source local_folder or video_r1."
                )
            self.num_rows = 64 if self.num_rows is None else self.num_rows
        elif self.video_root is None:
            raise ValueError(f"--source {self.source} needs --video_root, the folder of its videos.")
        elif self.questions is None:
            if self.source == "video_r1":
                raise ValueError("--source video_r1 needs --questions, Video-R1's JSON file.")
            found = sorted(
                path for path in Path(self.video_root).glob("questions.*") if path.suffix in (".jsonl", ".csv")
            )
            if len(found) != 1:
                raise ValueError(
                    f"--questions is missing, and {self.video_root} holds {len(found)} files questions.jsonl or "
                    "questions.csv instead of one."
                )
            self.questions = str(found[0])

    @property
    def public(self) -> dict[str, Any]:
        """What the source was asked for, without paths of this machine and without what does not apply."""
        simulated = ["world", "dials", "shuffle_options"]
        names = ["source", "num_rows", "seed"] + (simulated if self.source == "simulated" else ["license"])
        return {**{name: getattr(self, name) for name in names}, "splits": self.fractions}

    @property
    def fractions(self) -> dict[str, float]:
        """Part of the rows in each split."""
        default = 0.1 if self.source == "simulated" else 0.0
        validation = default if self.validation_fraction is None else self.validation_fraction
        test = default if self.test_fraction is None else self.test_fraction
        if min(validation, test) < 0 or validation + test > 1:
            raise ValueError(
                f"--validation_fraction {validation}, --test_fraction {test}: expected 0 or more, 1 together at most."
            )
        return dict(zip(SPLITS, (1 - validation - test, validation, test)))


@dataclass
class TeacherArguments:
    teacher: str = _option(
        "local", "Who picks keyframes and writes plans. local: by motion, no network. openai: any compatible server."
    )
    model: str = _option("gpt-4o", "The server's model.")
    base_url: str | None = _option(None, "The server, for example http://localhost:8000/v1. OpenAI's by default.")
    api_key_env: str = _option("OPENAI_API_KEY", "Environment variable that holds the key. The key is never written.")
    temperature: float | None = _option(0.0, "Sampling temperature; none in a YAML file for models that refuse it.")
    teacher_seed: int | None = _option(0, "Sampling seed; none in a YAML file for servers that refuse it.")
    max_image_side: int = _option(512, "Pixels of a frame's longer side, as the server is sent it.")
    timeout: float = _option(60.0, "Seconds until a request is given up.")
    max_retries: int = _option(5, "Times a request is repeated after 429, 5xx and lost connections, ever more slowly.")
    max_attempts: int = _option(3, "Times a row is asked about if the answer can't be used.")
    concurrency: int = _option(8, "Rows asked about at once.")
    num_candidates: int = _option(16, "Frames shown to the teacher.")
    max_keyframes: int = _option(4, "Frames it may pick.")
    input_price: float = _option(0.0, "US dollars per million input tokens, for the ledger.")
    output_price: float = _option(0.0, "US dollars per million output tokens, for the ledger.")

    def __post_init__(self):
        _check_types(self)
        _one_of("--teacher", self.teacher, TEACHERS)
        for name in ("max_attempts", "concurrency", "num_candidates", "max_keyframes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: saw {getattr(self, name)}, expected 1 or more.")


@dataclass
class ThoughtVideoArguments:
    generator: str | None = _option(
        None, f"How thought videos are made: {', '.join(GENERATORS)}. By default simulated, or source_clip if real."
    )
    clip_max_frames: int = _option(64, "source_clip: frames at most; longer spans are thinned, played at real speed.")
    clip_margin_seconds: float = _option(1.0, "source_clip: how far the clip goes on after the last keyframe.")
    clip_max_side: int = _option(640, "source_clip: longer side in pixels at most.")
    wan_model: str = _option("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan: a Wan pipeline, Hub id or folder.")
    wan_revision: str | None = _option(None, "wan: the model's revision.")
    wan_conditioning: str = _option(
        "first", "wan: first (first keyframe), first_last (an FLF2V model), or vace (all keyframes, a VACE model)."
    )
    wan_dtype: str = _option("bfloat16", "wan: bfloat16, float16 or float32.")
    wan_offload: str = _option("none", "wan: none, model, group or sequential: ever less GPU memory, ever slower.")
    wan_fp8: bool = _option(False, "wan: store the transformer's weights in 8 bits.")
    wan_vae_tiling: bool = _option(False, "wan: decode in tiles, for less memory.")
    wan_num_frames: int = _option(81, "wan: 4k + 1 frames.")
    wan_fps: float = _option(16.0, "wan: frames a second.")
    wan_max_area: int = _option(480 * 832, "wan: pixels of a frame at most; the keyframe's aspect is kept.")
    wan_num_inference_steps: int = _option(40, "wan: denoising steps.")
    wan_flow_shift: float | None = _option(None, "wan: the scheduler's shift, if not the model's.")
    wan_guidance_scale: float = _option(5.0, "wan: classifier-free guidance; 1 turns it off.")
    wan_negative_prompt: str | None = _option(None, "wan: what to avoid. A short list of usual faults by default.")
    wan_seed: int = _option(0, "wan: together with the row's id it decides the noise.")

    def __post_init__(self):
        _check_types(self)
        if self.generator is not None:
            _one_of("--generator", self.generator, GENERATORS)
        if Path(self.wan_model).is_dir():
            self.wan_model = os.path.abspath(self.wan_model)


@dataclass
class FilterArguments(Thresholds):
    tower: str | None = _option(
        None, "Vision tower that compares thought videos with keyframes: CLIP, SigLIP, DINOv2, ... None by default."
    )
    tower_revision: str | None = _option(None, "The tower's revision.")

    def __post_init__(self):
        _check_types(self)
        if self.tower is not None and Path(self.tower).is_dir():
            self.tower = os.path.abspath(self.tower)
        if self.min_tower_similarity is not None and self.tower is None:
            raise ValueError("--min_tower_similarity needs --tower, the model that measures it.")


@dataclass
class RunArguments:
    engine: str = _option("local", f"{' or '.join(ENGINES)}: processes of this machine, or a Ray cluster.")
    num_workers: int | None = _option(None, "Processes or actors of a stage. All cores by default.")
    retry_rejected: bool = _option(False, "Try again the rows that were refused because a server failed.")
    embed_video: bool = _option(False, "Embed real source clips too, where the row's licence is an open one.")
    max_shard_mb: int = _option(500, "Media in one Parquet file, about.")
    max_report_rows: int = _option(100, "Rows in report.html.")
    push_to_hub: str | None = _option(None, "Dataset to push to, name or organization/name.")
    private: bool = _option(False, "Whether a dataset newly made there is private.")

    def __post_init__(self):
        _check_types(self)
        _one_of("--engine", self.engine, ENGINES)
        for name in ("num_workers", "max_shard_mb", "max_report_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}: saw {getattr(self, name)}, expected 1 or more.")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.push_to_hub):
            raise ValueError(f"--push_to_hub {self.push_to_hub!r}: expected 'name' or 'organization/name'.")


def _one_of(flag: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{flag}: saw {value!r}, expected one of {', '.join(known)}.")
