"""`StormsTrainer`: TRL's SFT trainer with our forward instead of its fused head, and our losses, metrics and saves."""

import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from datasets import IterableDataset
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, has_length
from transformers.utils import logging
from transformers.utils.hub import PushInProgress
from trl import SFTTrainer

from model_card.push import HubError, explain, published_files, upload, write_whole
from model_card.render import public_name, render_model_card

from .answers import answer_rows
from .arguments import RESUME_FROM_LAST, WITHOUT_BLOCKS, StormsTrainingArguments, parse_arguments
from .checkpoints import last_checkpoint, list_runs, load_model, lora_config, save_static_files
from .collator import IGNORED, TARGET_MEDIA, StormsCollator
from .data import load_data
from .merge_lora import merge_lora
from .targets import encode_targets, target_settings


logger = logging.get_logger(__name__)

# Metrics that a checkpoint's card shows.
CARD_METRICS = ("loss/lm", "loss/latent", "loss/stop", "latent_cosine", "eval_loss", "eval_accuracy", "eval_parsed")


class SavingError(RuntimeError):
    """A checkpoint could not be written; says which one is whole, and what to do."""


class StormsTrainer(SFTTrainer):
    """Trains one stage.

    What differs from TRL's trainer: the loss is `forward`'s own (TRL's fused head would run the backbone directly, so
    that no latent loss is ever computed); every loss is divided by the count of its items in the whole global batch,
    accumulation and ranks included; ranks make the same number of passes; evaluation also answers rows by generation.

    Args:
        stage (`str`): `"align"`, `"sft"`, `"stage1"` or `"stage2"`.
        base_model (`str`, *optional*), dataset_names (`Sequence[str]`): what the card names.
        earlier (`Sequence[dict]`): records of the runs that made the base model, for the card.
        kwargs: of `SFTTrainer`; `data_collator` is a `StormsCollator`.
    """

    _tag_names = ["storms", "trl", "sft"]  # noqa: RUF012  # as TRL declares it
    _name = "STORMS"

    args: StormsTrainingArguments
    data_collator: StormsCollator

    def __init__(
        self,
        *args: Any,
        stage: str,
        base_model: str | None = None,
        dataset_names: Sequence[str] = (),
        earlier: Sequence[dict[str, Any]] = (),
        **kwargs: Any,
    ):
        self.stage = stage
        self.push_in_progress: PushInProgress | None = None
        self.earlier = list(earlier)
        self.base_model, self.dataset_names = base_model, list(dataset_names)
        self._num_slots_in_batch: torch.Tensor | None = None
        # By mode and name, (sum, count) on the device: read out when something is logged, not at every step.
        self._sums: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
        # Time spent on training since something was logged: up to the last pause, and when it went on after that.
        self._seconds = 0.0
        self._since: float | None = None
        self._num_repeated = 0  # rows at the end of an evaluation batch that other batches hold too
        super().__init__(*args, **kwargs)
        # Targets stay those of the tower that training began with, also where the tower itself trains.
        self.target_tower: torch.nn.Module | None = None
        tower = self._backbone(self.model).model.visual
        if stage == "stage1" and any(parameter.requires_grad for parameter in tower.parameters()):
            self.target_tower = copy.deepcopy(tower).requires_grad_(False).to(self.args.device)

    # ------------------------------------------------------------------ loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._since = time.perf_counter() if self._since is None else self._since
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Slots are counted over the same micro-batches and ranks as labels.
        num_slots = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            num_slots += (batch["input_ids"] == self.data_collator.pad_id).sum().to(device)
        if self.accelerator.num_processes > 1:
            num_slots = self.accelerator.reduce(num_slots, "sum")
        self._num_slots_in_batch = num_slots
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        seeds = inputs.pop("row_seeds")
        is_slot = inputs["input_ids"] == self.data_collator.pad_id
        # Logits elsewhere would cost much memory and serve nothing.
        kept = torch.nn.functional.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))
        # Before anything that ranks do together: encoding targets is one such thing.
        num_passes = self._agree_on_passes(model, inputs) if self.accelerator.num_processes > 1 else None
        if self.stage not in WITHOUT_BLOCKS:
            inputs |= self._latent_inputs(model, inputs, seeds, is_slot) | {"num_passes": num_passes}
            if self.args.stop_supervision != "none":
                kept = kept | torch.nn.functional.pad(is_slot[:, 1:], (0, 1))
        for name in TARGET_MEDIA:
            inputs.pop(name, None)
        if num_items_in_batch is not None:
            inputs["num_items_in_batch"] = num_items_in_batch
            if self.stage not in WITHOUT_BLOCKS:
                assert self._num_slots_in_batch is not None
                inputs["num_slots_in_batch"] = self._num_slots_in_batch.clamp(min=1)
        outputs = model(**inputs, logits_to_keep=kept, use_cache=False)
        self._count(inputs, outputs, is_slot, kept, num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            # Sums over this rank, divided by counts over all: data parallelism averages gradients over the ranks.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _latent_inputs(self, model, inputs, seeds, is_slot) -> dict[str, Any]:
        """What `forward` is told about the batch's blocks."""
        added: dict[str, Any] = {"latent_input": self._latent_input, "stop_supervision": self.args.stop_supervision}
        if self.stage == "stage1":
            if "latent_targets" not in inputs:
                with self.compute_loss_context_manager():
                    added["latent_targets"] = encode_targets(
                        self._whole(model),
                        inputs["target_pixel_values"],
                        inputs["target_grid_thw"],
                        inputs["target_media_per_row"],
                        self.args.latent_size,
                        self.target_tower,
                    )
            added["latent_loss_weight"] = self.args.latent_loss_weight
        if self.args.latent_bottleneck > 0:
            draws = _draw(seeds, self.args.seed, self.state.global_step)
            added["latent_bottleneck"] = (draws < round(self.args.latent_bottleneck * 2**32)) & is_slot.any(1)
        return added

    @property
    def _latent_input(self) -> str | None:
        """What fills the slots in this stage."""
        if self.stage == "stage1":
            return self.args.latent_input or "teacher_forced"
        return (self.args.latent_input or "rollout") if self.stage == "stage2" else None

    def _agree_on_passes(self, model, inputs) -> int:
        """The most passes that any rank needs; refuses batches in which ranks would wait for each other for ever."""
        passes, unwrapped = 1, self._whole(model)
        if self._latent_input == "rollout":
            passes = unwrapped.num_rollout_passes(inputs["input_ids"], inputs["attention_mask"])
        has_media = ["pixel_values" in inputs, "pixel_values_videos" in inputs, "target_pixel_values" in inputs]
        counts = torch.tensor([passes, *has_media], device=inputs["input_ids"].device)
        counts = self.accelerator.gather(counts[None])
        if self._is_sharded(model) and (counts[:, 1:] != counts[:1, 1:]).any():
            raise ValueError(
                f"Ranks have batches with different media (images, videos, targets to encode: "
                f"{counts[:, 1:].tolist()}). With sharded weights each rank must call the vision tower as often: "
                "train on rows of one kind, or by accelerate_configs/ddp.yaml."
            )
        return int(counts[:, 0].max())

    def _is_sharded(self, model) -> bool:
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return is_deepspeed or self.is_fsdp_enabled or any(isinstance(one, FSDPModule) for one in model.modules())

    def _whole(self, model: Any) -> Any:
        """The model without data parallelism around it, of which more than `forward` may be called."""
        model = self.accelerator.unwrap_model(model)
        if isinstance(model, FSDPModule):
            sharded: Any = model
            # 1. Methods beside `forward` would find weights sharded. Each registration wraps once more.
            for name in ("get_target_features", "generate"):
                if name not in vars(sharded):
                    register_fsdp_forward_method(sharded, name)
            # 2. A rollout embeds the text after its block once more, which ranks with shorter blocks reach earlier:
            #    gathered in between, the table would meet another rank's layer.
            embedding = sharded.get_input_embeddings()
            if isinstance(embedding, FSDPModule):
                embedding.set_reshard_after_forward(False)
        return model

    def _backbone(self, model: Any) -> Any:
        """The STORMS model inside whatever wraps it."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    # ------------------------------------------------------------------ what is logged

    @torch.no_grad()
    def _count(self, inputs, outputs, is_slot, kept, num_items) -> None:
        """Add up numerators and denominators of this micro-batch's metrics, without reading them."""
        shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        labels = shifted[shifted != IGNORED]
        is_counted = torch.arange(len(is_slot), device=is_slot.device) < len(is_slot) - self._num_repeated
        own_items, own_slots = labels.numel(), (is_slot & is_counted[:, None]).sum()
        sums: dict[str, tuple[Any, Any]] = {}
        divisor = own_items if num_items is None else num_items
        if own_items > 0:
            sums["loss/lm"] = (outputs.lm_loss * divisor, own_items)
        predicted = outputs.logits[0][(shifted != IGNORED)[kept]].argmax(-1)
        sums["mean_token_accuracy"] = ((predicted == labels).sum(), own_items)
        if outputs.stop_loss is not None:
            before_slot = torch.nn.functional.pad((is_slot & is_counted[:, None])[:, 1:], (0, 1))
            logits = outputs.logits[0][before_slot[kept]]
            sums["loss/stop"] = (self._backbone(self.model)._stop_loss(logits, self.args.stop_supervision), own_slots)
        if outputs.latent_states is not None:
            mask = outputs.latent_mask & is_counted[:, None]
            states = outputs.latent_states[mask].float()
            sums["latent_norm"] = (states.norm(dim=-1).sum(), own_slots)
            if (targets := inputs.get("latent_targets")) is not None:
                targets = targets[mask].to(states)
                sums["loss/latent"] = ((states - targets).pow(2).mean(-1).sum(), own_slots)
                sums["latent_cosine"] = (torch.cosine_similarity(states, targets, dim=-1).sum(), own_slots)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            sums["num_tokens"] = (inputs["attention_mask"].sum(), 0)
            sums["num_rows"] = (len(is_slot), 0)
        for name, pair in sums.items():
            now = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=is_slot.device) for one in pair])
            self._sums[mode][name] = self._sums[mode].get(name, 0) + now

    def _read_metrics(self, mode: str) -> dict[str, float]:
        """The metrics since they were last read, over all ranks."""
        known = ["loss/lm", "loss/latent", "loss/stop", "mean_token_accuracy", "latent_norm", "latent_cosine"]
        names = [*known, "num_tokens", "num_rows"]
        sums = self._sums[mode]
        if not sums and self.accelerator.num_processes == 1:
            return {}
        zero = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        table = torch.stack([sums.get(name, zero) for name in names])
        if self.accelerator.num_processes > 1:
            table = self.accelerator.reduce(table, "sum")
        self._sums[mode] = {}
        if not table.any():
            return {}
        values = dict(zip(names, table.tolist()))
        metrics = {name: values[name][0] / values[name][1] for name in known if values[name][1] > 0}
        if mode == "train":
            self._stop_clock()
            if self._total_train_tokens == 0:  # perhaps a run that goes on
                logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
                self._total_train_tokens = logged[-1] if logged else 0
            self._total_train_tokens += int(values["num_tokens"][0])
            metrics["num_tokens"] = self._total_train_tokens
            metrics["tokens_per_second"] = values["num_tokens"][0] / self._seconds
            metrics["items_per_second"] = values["num_rows"][0] / self._seconds
            self._seconds, self._since = 0.0, time.perf_counter()
        if torch.cuda.is_available():
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
            metrics["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        return metrics

    def _stop_clock(self) -> None:
        """Of the time spent on training; the next batch starts it again."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:  # those of evaluation are in its results
            logs |= self._read_metrics("train")
        super().log(logs, start_time)
        if self.args.stop_at_loss is not None and (loss := logs.get("loss/lm", math.inf)) <= self.args.stop_at_loss:
            self.accelerator.print(f"Step {self.state.global_step}: the answers' loss is {loss:.4f}, training ends.")
            self.control.should_training_stop = True

    # ------------------------------------------------------------------ evaluation

    def prediction_step(self, model, inputs, *args, **kwargs):
        # The last round of batches over all ranks is filled up with rows that were there before.
        loader, num_rows = self.accelerator.gradient_state, len(inputs["input_ids"])
        if self.accelerator.num_processes > 1 and loader.end_of_dataloader and loader.remainder > 0:
            num_new = loader.remainder - self.accelerator.process_index * num_rows
            self._num_repeated = num_rows - min(max(num_new, 0), num_rows)
            inputs["labels"][num_rows - self._num_repeated :] = IGNORED
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._num_repeated = 0

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        self._stop_clock()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        measured = self._read_metrics("eval")
        # The loop's own is a mean over batches, whatever their number of tokens, with repeated rows.
        weights = {"loss/lm": 1.0, "loss/latent": self.args.latent_loss_weight, "loss/stop": 1.0}
        measured["loss"] = sum(weight * measured.get(name, 0.0) for name, weight in weights.items())
        if self.args.eval_answers > 0:
            measured |= self._answer(dataloader.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return EvalLoopOutput(*output)

    def _answer(self, dataset) -> dict[str, float]:
        """Accuracy of real answers, in the mode that a user of the checkpoint gets, each rank on its share."""
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        is_shared = has_length(dataset)  # else a stream, of which each rank has its own part
        most = self.args.eval_answers if is_shared else -(-self.args.eval_answers // num_ranks)
        rows: list[dict[str, Any]] = []
        for row in dataset:
            if len(rows) == most:
                break
            if not row.get("messages"):
                rows.append(row)
        mine = rows[rank::num_ranks] if is_shared else rows
        lengths = self.accelerator.gather(torch.tensor([len(rows), len(mine)], device=self.args.device)).view(-1, 2)
        if not lengths[:, 0].all():
            return {}
        # Ranks that share weights must all generate as often.
        padded = mine + rows[:1] * (int(lengths[:, 1].max()) - len(mine))
        model = self._whole(self.model)
        model.eval()
        answers = answer_rows(
            model,
            self.data_collator,
            padded,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self.args.eval_max_new_tokens,
            synced_gpus=num_ranks > 1 and self._is_sharded(model),
        )[: len(mine)]
        slots = getattr(self.model.config, "latent_size", 0)
        counts = [
            len(mine),
            *(sum(one[name] for one in answers) for name in ("is_correct", "is_parsed")),
            sum(one["latent_length"] == slots for one in answers),
        ]
        table = torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        if num_ranks > 1:
            table = self.accelerator.reduce(table, "sum")
        total, correct, parsed, full = table.tolist()
        return {"accuracy": correct / total, "parsed": parsed / total, "full_blocks": full / total}

    # ------------------------------------------------------------------ saving

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, from a checkpoint folder on, or from `"last"`: the last whole one, if there is any."""
        output = Path(self.args.output_dir)
        if resume_from_checkpoint in RESUME_FROM_LAST or resume_from_checkpoint is True:
            last = last_checkpoint(output)
            resume_from_checkpoint = None if last is None else str(last)
            self.accelerator.print(f"Resuming from {last}" if last else f"No checkpoint in {output} yet: starting.")
        if self.args.should_save:
            # The push of a checkpoint in mid-training adds only weights to these.
            save_static_files(self._backbone(self.model), self.processing_class, output)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state comes next, and says that a checkpoint is whole: of every rank.
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers'; but a finished LoRA run leaves the merged model in the output folder, and the adapter in
        `_adapter/`: with both in one folder, `AutoModel` would look for the adapter's base instead. (What begins
        with `_` is not pushed.)"""
        root = self.args.output_dir
        if not is_peft_model(self.model) or (output_dir is not None and Path(output_dir) != Path(root)):
            return super().save_model(output_dir, _internal_call=_internal_call)
        adapter = Path(root) / "_adapter"
        super().save_model(str(adapter), _internal_call=True)
        if self.is_world_process_zero():
            merge_lora(adapter, Path(root))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if is_peft_model(self.model) and output_dir is not None and self.args.should_save:
            # What `merge_lora` needs beside the adapter.
            backbone = self._backbone(self.model)
            backbone.config.save_pretrained(output_dir)
            backbone.generation_config.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self._saving(folder):
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[None]:
        """Says what to do if a save fails, as on a full disk. (safetensors and torch have errors of their own.)"""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            output = Path(self.args.output_dir)
            if folder != output:
                shutil.rmtree(folder, ignore_errors=True)  # half-written
            free, last = shutil.disk_usage(output).free / 1e9, last_checkpoint(output)
            raise SavingError(
                f"Saving {folder} failed: {error} ({free:.1f} GB are free.) "
                + (f"The last whole checkpoint is {last}; " if last else "There is no earlier checkpoint; ")
                + "make room, and the same command with --resume_from_checkpoint last goes on."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push while training goes on: as transformers', but only what belongs on the Hub, and failures are told."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return  # the next checkpoint will do
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output, folder = Path(self.args.output_dir), Path(checkpoint_folder)
        # What is on its way must stay as it is: the next save writes a card, and old checkpoints are deleted.
        staging = output / "_push"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for path in published_files(output):
            if ".safetensors" not in path.name:
                shutil.copy(path, staging / path.name)
        for path in folder.glob("model*.safetensors*"):
            _link(path, staging / path.name)
        step = self.state.global_step
        job = HfApi().run_as_future(
            self._upload, staging, f"Training in progress, step {step}", f"Step {step} is in {folder}."
        )
        job.add_done_callback(partial(_after_push, staging))
        self.push_in_progress = PushInProgress([job])

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> Any:
        """Save, write the card, and push, once the push in progress has ended.

        Raises:
            HubError: if the Hub refuses or can't be reached; the checkpoint is in the output folder.
        """
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.save_model(_internal_call=True)
        self.create_model_card()
        return self._push(commit_message or "End of training")

    def _push(self, message: str = "End of training") -> Any:
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        command = f"python -m model_card push --checkpoint {self.args.output_dir} --repo {self.hub_model_id}"
        again = f"It holds the trained model; push it by `{command}`."
        return self._upload(Path(self.args.output_dir), message, again)

    def _upload(self, folder: Path, message: str, again: str) -> Any:
        return upload(
            folder,
            self.hub_model_id,
            message,
            again,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            tell=logger.warning,
        )

    def create_model_card(self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None) -> None:
        """Write the card, and `training.json`, from which its numbers are."""
        if not self.is_world_process_zero():
            return
        output = Path(self.args.output_dir)
        chosen: tuple[str, ...] = (
            "learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "seed",
            "trainable",
        )
        if self.stage not in WITHOUT_BLOCKS:
            chosen += ("latent_size", "latent_bottleneck", "stop_supervision")
        if self.stage == "stage1":
            chosen += ("latent_loss_weight", "target_source")
        metrics: dict[str, Any] = {}
        for entry in self.state.log_history:
            metrics |= {name: value for name, value in entry.items() if name in CARD_METRICS}
        record = {
            "stage": self.stage,
            "base_model": self.base_model and public_name(self.base_model),
            "datasets": [public_name(name) for name in self.dataset_names],
            "steps": self.state.global_step,
            "rows": self.state.global_step
            * self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes,
            "num_processes": self.accelerator.num_processes,
            "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "hours": self._hours(),
            "arguments": {name: getattr(self.args, name) for name in chosen},
            "metrics": metrics,
            "earlier": self.earlier,
        }
        write_whole(output / "training.json", json.dumps(record, indent=2) + "\n")
        card = render_model_card(self.hub_model_id or output.resolve().name, record)
        write_whole(output / "README.md", card)

    def _hours(self) -> float | None:
        """Wall time of the training that has ended; of a resumed one it would only be the last part."""
        runtimes = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return round(runtimes[-1] / 3600, 4) if runtimes and not self.args.resume_from_checkpoint else None

    def finish(self) -> None:
        """Save, write the card and, with `--push_to_hub`, push."""
        with self._saving(Path(self.args.output_dir)):
            self.save_state()
            self.save_model(self.args.output_dir, _internal_call=True)
            self.create_model_card()
        self.accelerator.print(f"Saved in {self.args.output_dir}")
        if self.args.push_to_hub:
            self._push()
            self.accelerator.print(f"Pushed to {self.hub_model_id}")
        self.end()


def _link(source: Path, target: Path) -> None:
    """A second name for a file that nobody will write to again, or a copy where that can't be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _after_push(staging: Path, job: Any) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    if (error := job.exception()) is not None:
        logger.warning(f"{error} Training goes on, and the next checkpoint will be pushed.")


def _draw(row_seeds: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """A number from 0 to 2**32 - 1 for each row, which depends on the row, the seed and the step alone: the same in
    any batch, on any rank, after a resume. Mixed well, or rows would be drawn together, and in runs of steps."""
    return _mix(row_seeds ^ _mix(step ^ _mix(seed)))


def _mix(value: Any) -> Any:
    """A permutation of 32-bit numbers that looks random (two rounds of xor-shift and multiply)."""
    for _ in range(2):
        value = (value ^ (value >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return value ^ (value >> 16)


def _make_repository(training: StormsTrainingArguments) -> None:
    """Before anything is loaded: a wrong token or name should not cost a training."""
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    try:
        HfApi().create_repo(name, token=training.hub_token, private=training.hub_private_repo, exist_ok=True)
    except Exception as error:
        raise SystemExit(
            f"Error: Can't make {name} on the Hub: {explain(error)[0]} Nothing was trained yet."
        ) from error


def _warn_of_shared_steps(training: StormsTrainingArguments, frames_per_step: int) -> None:
    """Neighbouring targets that average over a grid step of both say less of either."""
    steps, num_slots = -(-training.num_target_frames // frames_per_step), training.latent_size
    if num_slots is not None and max(steps, num_slots) % min(steps, num_slots):
        logger.warning(
            f"--num_target_frames {training.num_target_frames} gives {steps} steps in time for {num_slots} slots, so "
            f"neighbouring slots share some. With --num_target_frames {frames_per_step * num_slots}, or a multiple, "
            "each has its own."
        )


def run(stage: str, description: str | None, argv: Sequence[str] | None = None) -> StormsTrainer:
    """What each script does: parse, load model and data, train, save, push.

    Args:
        stage (`str`): `"align"`, `"sft"`, `"stage1"` or `"stage2"`.
        description (`str`): of the script, for `--help`.
        argv (`Sequence[str]`, *optional*): flags, those of the command line by default.
    """
    data, training, model_arguments = parse_arguments(stage, description, argv)
    if training.push_to_hub and training.process_index == 0:
        _make_repository(training)
    if stage in WITHOUT_BLOCKS:
        training.latent_size = None  # without blocks, the checkpoint keeps the K it has
    model, processor = load_model(model_arguments, training, data)
    if stage not in WITHOUT_BLOCKS:
        # Inference does what training did: on rows that never saw the video past the slots, it should not begin to.
        model.generation_config.latent_bottleneck = training.latent_bottleneck == 1
    settings = target_settings(model, processor, training) if stage == "stage1" else None
    if settings is not None and training.target_source == "thought_video":
        _warn_of_shared_steps(training, processor.video_processor.temporal_patch_size)
    train_dataset, eval_dataset = load_data(data, training, stage, settings)
    if isinstance(train_dataset, IterableDataset):
        # The Trainer does not know where a stream ends: resumed after that, it would go on with other rows.
        train_dataset = train_dataset.repeat(None)
    collator = StormsCollator(
        processor,
        stage,
        latent_size=training.latent_size,
        visual_context=data.visual_context,
        video_root=data.video_root,
        max_length=training.max_length,
        padding_side=training.padding_side,
        target_source=training.target_source,
        num_target_frames=training.num_target_frames,
        cache={} if data.cache_rows else None,
    )
    if stage not in WITHOUT_BLOCKS and training.latent_size is None:
        # As many slots as a target has tokens; for inference, as many as that of the first row.
        first = next(row for row in train_dataset if not row.get("messages"))
        num_slots = collator.encode(first).input_ids.count(collator.pad_id)
        model.config.latent_size = model.generation_config.latent_size = num_slots
    try:
        trainer = StormsTrainer(
            model,
            training,
            collator,
            train_dataset,
            eval_dataset,
            processing_class=processor,
            peft_config=lora_config(model_arguments, model),
            stage=stage,
            base_model=model_arguments.model_name_or_path,
            dataset_names=[source.path for source in data.sources()],
            earlier=list_runs(model_arguments.model_name_or_path, model_arguments.model_revision),
        )
        trainer.train(training.resume_from_checkpoint)
        trainer.finish()
    except (HubError, SavingError) as error:
        raise SystemExit(f"Error: {error}") from error
    return trainer
