"""Benchmarks by name, and datasets of the builder's schema, read into questions."""

from pathlib import Path

from . import (
    egoschema,
    longvideobench,
    mlvu,
    mmvu,
    mvbench,
    tempcompass,
    video_holmes,
    videoespresso,
    videomme,
)
from .adapter import load
from .base import Benchmark, Prompt, Question, Subtitle
from .simulated import load_dataset_split


BENCHMARKS = {
    "videomme": videomme.ADAPTER,
    "mvbench": mvbench.ADAPTER,
    "tempcompass": tempcompass.ADAPTER,
    "mmvu": mmvu.ADAPTER,
    "video_holmes": video_holmes.ADAPTER,
    "videoespresso": videoespresso.ADAPTER,
    "mlvu": mlvu.ADAPTER,
    "longvideobench": longvideobench.ADAPTER,
    "egoschema": egoschema.ADAPTER,
}


def load_benchmark(
    name: str,
    data_root: str | None = None,
    revision: str | None = None,
    subtitles: bool = False,
    open_ended: bool = False,
    split: str | None = None,
    video_root: str | None = None,
    max_questions: int | None = None,
    allow_subset: bool = False,
    cache_dir: str | None = None,
) -> Benchmark:
    """The questions of a benchmark, from the Hub or a folder, each with its video or the reason why it has none.

    Args:
        name (`str`): one of `BENCHMARKS`; or a dataset of the builder's schema, as a folder or a Hub id (it holds a
            "/"), which is named by the folder's own name or the id, or `simulated=FOLDER_OR_ID` to name it so.
            `NAME=FOLDER_OR_ID` reads a benchmark from there.
        data_root (`str`, *optional*): folder that holds the benchmark's files as published, or has a folder of the
            benchmark's name that does; its zips may be unpacked or not. From the Hub by default.
        revision (`str`, *optional*): of the Hub's dataset; the branch `video` of MVBench by default.
        subtitles (`bool`): read them, for prompts that show them (Video-MME, LongVideoBench).
        open_ended (`bool`): also the questions that only a judge can score: TempCompass' captioning, MMVU's open ones.
        split (`str`, *optional*): of a dataset of the builder's schema, `test` by default.
        video_root (`str`, *optional*): folder of such a dataset's `video_path`.
        max_questions (`int`, *optional*): draw as many, the same in every run.
        allow_subset (`bool`): accept fewer or more questions than the benchmark has.
        cache_dir (`str`, *optional*): where videos out of archives go, beside the Hub's cache by default.

    Raises:
        ValueError: if there is no such benchmark or folder, the number of questions is not the benchmark's, a row's
            options, answer or id can't be right, or none of the videos is there. Such a result would be compared with
            others'. A single missing video is a question's `failure` instead.
    """
    known, _, dataset = name.partition("=")
    is_dataset = "=" not in name and name not in BENCHMARKS and ("/" in name or Path(name).is_dir())
    if known in BENCHMARKS:
        if split not in (None, BENCHMARKS[known].split):
            raise ValueError(
                f"{known}: saw split {split!r}, expected {BENCHMARKS[known].split!r}, the only one. --split is for "
                "datasets of the builder's schema."
            )
        return load(
            known,
            BENCHMARKS[known],
            dataset=dataset or None,
            data_root=data_root,
            revision=revision,
            subtitles=subtitles,
            open_ended=open_ended,
            max_questions=max_questions,
            allow_subset=allow_subset,
            cache_dir=cache_dir,
        )
    if is_dataset:
        known, dataset = Path(name).resolve().name if Path(name).is_dir() else name, name
    elif known != "simulated":
        raise ValueError(
            f"There is no benchmark {name!r}, but {', '.join(BENCHMARKS)}, simulated=FOLDER, and any dataset of the "
            "builder's schema by its folder or Hub id."
        )
    elif not dataset and data_root is not None:
        dataset = str(Path(data_root) / "simulated" if Path(data_root, "simulated").is_dir() else data_root)
    if not dataset:
        raise ValueError(
            "simulated: say which dataset, as simulated=FOLDER or simulated=HUB_ID. Build one by "
            "`python -m dataset_builder build --source simulated --output FOLDER`."
        )
    if subtitles:
        raise ValueError(f"{known}: a dataset of the builder's schema has no subtitles. Leave out --subtitles.")
    return load_dataset_split(known, dataset, split or "test", revision, video_root, max_questions, cache_dir)


__all__ = ["BENCHMARKS", "Benchmark", "Prompt", "Question", "Subtitle", "load_benchmark"]
