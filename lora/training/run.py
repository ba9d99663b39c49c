"""One training run on transformers' Trainer: its settings, its checkpoints, and how it goes on after it was killed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from lora.errors import AdapterError
from lora.files.durable import flush
from lora.files.tensorfile import Array
from lora.training.examples import Examples
from lora.training.learner import Learner, check_finite
from lora.training.probe import judged

SETTINGS, STATE, WHOLE = (
    "settings.json",
    "trainer_state.json",
    "whole",
)  # WHOLE marks a checkpoint that was written to its end
Report = Callable[[str, float], None]  # what is being done, and the share of the steps that is


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. ``patience`` is how many evaluations may pass without a better loss; 0: no early stopping.

    ``evaluations`` is how often in all the validation examples are looked at, and a checkpoint is kept.
    """

    epochs: float = 3
    batch: int = 32
    rate: float = 1e-3
    seed: int = 0
    patience: int = 5
    evaluations: int = 10


@dataclass(frozen=True)
class Point:
    """The losses at a step; None where that one was not looked at."""

    step: int
    training: float | None
    validation: float | None


@dataclass(frozen=True)
class Outcome:
    """The best model's loss and metric on the validation examples, the losses on the way, and how far it went."""

    loss: float
    metric: float | None
    points: tuple[Point, ...]
    steps: int
    planned: int
    resumed: int  # the step that an earlier, killed run had reached


def train(
    learner: Learner,
    schedule: Schedule,
    train_set: Examples,
    validation: Examples,
    base_sha256: str,
    work: Path,
    report: Report,
) -> Outcome:
    """Train; at the end the learner's model is the best that the validation examples have seen.

    ``work`` holds the checkpoints: a run that finds one of the same settings goes on from it, and ends with the same
    weights, bit for bit on the same CPU. Raises AdapterError when it holds another run, or training diverges.
    """
    _claim(work, learner, schedule, train_set, validation, base_sha256)
    last = _last_whole(work)
    if last:
        _point_to_best(last)
    per_epoch = -(-len(train_set) // schedule.batch)
    planned = max(1, round(per_epoch * schedule.epochs))
    trainer: Any = transformers.Trainer(
        model=learner.model,
        args=_arguments(schedule, work, planned, last is not None and _had_ended(last)),
        train_dataset=learner.features(train_set),
        eval_dataset=learner.features(validation),
        data_collator=learner.collator(),
        compute_metrics=_metric(learner, validation) if learner.kind != "causal-lm" else None,
        callbacks=[
            _Watch(report, planned),
            *([transformers.EarlyStoppingCallback(schedule.patience)] if schedule.patience else []),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    found = trainer.evaluate()
    resumed = int(last.name.rpartition("-")[2]) if last else 0
    return Outcome(
        found["eval_loss"],
        found.get("eval_metric"),
        _points(trainer.state.log_history),
        trainer.state.global_step,
        planned,
        resumed,
    )


def _arguments(schedule: Schedule, work: Path, planned: int, ended: bool) -> Any:
    """The Trainer's settings; where the run had ended, it goes through no epoch, and only takes the best model."""
    every = max(1, planned // schedule.evaluations)
    return transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=-1 if ended else planned,
        num_train_epochs=0,  # counts where max_steps does not
        per_device_train_batch_size=schedule.batch,
        per_device_eval_batch_size=schedule.batch,
        learning_rate=schedule.rate,
        warmup_steps=planned // 20,
        seed=schedule.seed,
        data_seed=schedule.seed,
        eval_strategy="steps",
        save_strategy="steps",
        logging_strategy="steps",
        eval_steps=every,
        save_steps=every,
        logging_steps=max(1, every // 4),
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how often in a row the loss was no better
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )


def _metric(learner: Learner, validation: Examples) -> Callable[[Any], dict[str, float]]:
    targets = np.array(validation.targets)

    def metric(prediction: Any) -> dict[str, float]:
        logits: Array = prediction.predictions
        predicted = logits.argmax(-1) if learner.kind == "classification" else logits[:, 0]
        return {"metric": judged(learner.kind, predicted, targets)}

    return metric


class _Watch(transformers.TrainerCallback):
    """Reports every step, stops when the loss is not finite, and marks whole checkpoints."""

    def __init__(self, report: Report, planned: int) -> None:
        self._report, self._planned, self._loss = report, planned, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(f"step {state.global_step} of {self._planned}{self._loss}", state.global_step / self._planned)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs:
                check_finite(float(logs[name]), state.global_step)
                self._loss = f", loss {logs[name]:.4f}"

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in sorted(checkpoint.iterdir()):
            flush(path)
        (checkpoint / WHOLE).touch()
        flush(checkpoint)
        # Not by the Trainer's save_total_limit, which removes the last whole one while this has no mark yet.
        for other in checkpoint.parent.glob("checkpoint-*"):
            if other.name not in (checkpoint.name, f"checkpoint-{state.best_global_step}"):
                (other / WHOLE).unlink(missing_ok=True)
                shutil.rmtree(other)


def _claim(
    work: Path, learner: Learner, schedule: Schedule, train_set: Examples, validation: Examples, base_sha256: str
) -> None:
    """Make the folder this run's, or see that it is."""
    data = hashlib.sha256(repr((train_set, validation)).encode()).hexdigest()
    config = hashlib.sha256(learner.model.config.to_json_string().encode()).hexdigest()
    run = {
        "data": data,
        "base": base_sha256,
        "config": config,
        "longest": learner.longest,
        **asdict(learner.injection),
        **asdict(schedule),
    }
    settings = json.dumps(run, indent=1)
    kept = work / SETTINGS
    if kept.exists() and kept.read_text() != settings:
        raise AdapterError(
            f"{work}: holds a run with another base, other data or settings that did not end; repeat those, or remove"
            " the folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    kept.write_text(settings)


def _last_whole(work: Path) -> Path | None:
    """The last checkpoint that was written to its end; what was not is removed."""
    whole = []
    for path in work.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _point_to_best(checkpoint: Path) -> None:
    """Point the checkpoint's record at where the best checkpoint lies now.

    The folder may have been moved, or the working directory be another.
    """
    state, written = _state(checkpoint), checkpoint / f"{STATE}.new"
    if state.best_global_step:
        state.best_model_checkpoint = str(checkpoint.with_name(f"checkpoint-{state.best_global_step}"))
        state.save_to_json(str(written))
        flush(written)
        written.replace(checkpoint / STATE)


def _had_ended(checkpoint: Path) -> bool:
    """Whether the run had made all its steps, or stopped early, when it wrote the checkpoint."""
    return bool(_state(checkpoint).stateful_callbacks["TrainerControl"]["args"]["should_training_stop"])


def _state(checkpoint: Path) -> Any:
    return transformers.TrainerState.load_from_json(str(checkpoint / STATE))


def _points(history: list[dict[str, Any]]) -> tuple[Point, ...]:
    losses: dict[int, dict[str, float]] = {}
    for entry in history:
        for name in ("loss", "eval_loss"):
            if name in entry:
                losses.setdefault(int(entry["step"]), {})[name] = float(entry[name])
    return tuple(Point(step, found.get("loss"), found.get("eval_loss")) for step, found in sorted(losses.items()))
