"""From a base and a file of examples to an adapter's folder, and how it fares."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora.bases.checkpoint import fingerprint
from lora.errors import AdapterError
from lora.files.durable import flush
from lora.modules.peft_files import save
from lora.progress import Progress
from lora.training.curve import draw
from lora.training.examples import Columns, Examples, Kind, held_out, read_examples
from lora.training.learner import TASK_TYPES, DivergedError, Learner, Size, new_learner
from lora.training.probe import linear_probe, majority, metric_of
from lora.training.run import Outcome, Schedule, train

RECORD, CURVE = "training.json", "loss.png"
VALIDATION_SHARE = 0.1
TORCHS_WRITER = "inline_container"  # the file of torch that an error names when what torch.save writes finds no room


@dataclass(frozen=True)
class Course:
    """What is to be learnt: from which examples, judged on which, with which adapter and schedule."""

    base: Path
    data: Path
    kind: Kind
    validation: Path | None = None
    columns: Columns = field(default_factory=Columns)
    size: Size = field(default_factory=Size)
    schedule: Schedule = field(default_factory=Schedule)
    longest: int = 128


@dataclass(frozen=True)
class Trained:
    """The adapter's folder, and how it fares on validation examples beside majority, probe or base.

    ``cut`` is how many texts had more tokens than ``longest``, which is fewer than asked for where the base takes
    fewer.
    """

    folder: Path
    metric: str
    scores: dict[str, float]
    labels: tuple[str, ...]
    examples: dict[str, int]
    cut: int
    longest: int
    trainable: int
    seconds: float
    outcome: Outcome


def finetune(course: Course, out: Path, step: Progress) -> Trained:
    """Train an adapter into the new folder ``out``: PEFT's two files, the run's record, and its curve of losses.

    Checkpoints lie in a folder beside it, and are gone at the end; who is killed goes on when called again. Raises
    CheckpointError for a base or a file of examples, AdapterError for settings, a folder or a run that has diverged.
    """
    started = time.monotonic()
    _check(course)
    with _writing(out):
        if out.exists():
            raise AdapterError(f"{out}: exists already; choose another folder, or remove it")
    step("reading the examples")
    examples, others = _read(course)
    train_set, validation = _split(course, examples, others)
    learner = new_learner(course.base, course.kind, train_set.labels, course.size, course.longest, course.schedule.seed)
    base_sha256 = fingerprint(course.base)  # of what is trained on, and before hours of it
    learner.check(examples, course.data)
    if others is not None and course.validation is not None:
        learner.check(others, course.validation)
    cut = learner.cut(train_set) + learner.cut(validation)
    scores = _baselines(course, learner, train_set, validation, step)
    work = out.parent / f".{out.name}.training"
    try:
        with _writing(out):
            outcome = train(learner, course.schedule, train_set, validation, base_sha256, work, step)
    except DivergedError:
        shutil.rmtree(work)  # it would diverge again; other settings begin anew
        raise
    scores["adapter"] = outcome.loss if outcome.metric is None else outcome.metric
    trained = Trained(
        out,
        metric_of(course.kind),
        scores,
        train_set.labels,
        {"training": len(train_set), "validation": len(validation)},
        cut,
        learner.longest,
        sum(parameter.numel() for parameter in learner.model.parameters() if parameter.requires_grad),
        round(time.monotonic() - started, 1),
        outcome,
    )
    with _writing(out):
        _write(course, learner, trained, base_sha256, work)
    shutil.rmtree(work, ignore_errors=True)
    return trained


def _check(course: Course) -> None:
    """Raises AdapterError for a setting that no run can have."""
    size, schedule = course.size, course.schedule
    for option, value, fits, expected in (
        ("--alpha", size.alpha, math.isfinite(size.alpha), "a finite number"),
        ("--dropout", size.dropout, 0 <= size.dropout < 1, "0 or more, and less than 1"),
        ("--epochs", schedule.epochs, 0 < schedule.epochs < math.inf, "a finite number above 0"),
        ("--rate", schedule.rate, 0 <= schedule.rate < math.inf, "a finite number, 0 or more"),
        ("--seed", schedule.seed, 0 <= schedule.seed < 2**32, f"0 to {2**32 - 1}"),
    ):
        if not fits:
            raise AdapterError(f"{option} {value}: expected {expected}")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raises AdapterError where a folder can't be written, or a disk is full."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and TORCHS_WRITER not in str(error):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise AdapterError(
            f"{out}: can't be written ({reason}); choose a folder that is yours, with room in it"
        ) from error


def _read(course: Course) -> tuple[Examples, Examples | None]:
    """The examples, and those to judge by where they have a file of their own."""
    examples = read_examples(course.data, course.kind, course.columns)
    if course.kind == "classification" and len(examples.labels) < 2:
        raise AdapterError(
            f"{course.data}: all rows are of the class '{examples.labels[0]}' in column '{course.columns.target}'; give"
            " examples of two at least"
        )
    return examples, (
        None
        if course.validation is None
        else read_examples(course.validation, course.kind, course.columns, examples.labels)
    )


def _split(course: Course, examples: Examples, others: Examples | None) -> tuple[Examples, Examples]:
    """(training, validation)."""
    if others is not None:
        return examples, others
    train_set, validation = held_out(examples, VALIDATION_SHARE, course.data)
    if course.kind == "classification" and len(set(train_set.targets)) < 2:
        raise AdapterError(
            f"{course.data}: of {len(examples)} rows, {len(validation)} are held out, and the others are all of the"
            f" class '{examples.labels[train_set.targets[0]]}'; give more examples, or another file with --validation"
        )
    return train_set, validation


def _baselines(
    course: Course, learner: Learner, train_set: Examples, validation: Examples, step: Progress
) -> dict[str, float]:
    if course.kind == "causal-lm":
        step("the base's own loss")
        return {"base": _base_loss(learner, validation, course.schedule.batch)}
    step("a linear probe")
    probe = linear_probe(course.base, learner.tokenizer, course.kind, train_set, validation, learner.longest)
    return (
        {"majority": majority(train_set, validation), "linear probe": probe}
        if course.kind == "classification"
        else {"linear probe": probe}
    )


def _base_loss(learner: Learner, validation: Examples, batch: int) -> float:
    """The loss as the Trainer's evaluation has it: a mean over tokens in each batch, and over examples of those.

    LoRA changes nothing yet.
    """
    import numpy as np
    import torch

    collate, features = learner.collator(), learner.features(validation)
    learner.model.eval()
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(features), batch):
            together = features[start : start + batch]
            losses += [float(learner.model(**collate(together)).loss)] * len(together)
    return float(np.mean(np.array(losses, dtype=np.float32)))


def _write(course: Course, learner: Learner, trained: Trained, base_sha256: str, work: Path) -> None:
    """The folder is there whole or not at all: it is made among the checkpoints, and then renamed."""
    made = work / "adapter"
    shutil.rmtree(made, ignore_errors=True)
    save(learner.model, learner.injection, made, TASK_TYPES[course.kind], base_sha256)
    record: dict[str, Any] = {**asdict(trained), "folder": None, "course": asdict(course)}
    (made / RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n")
    draw(trained.outcome.points, made / CURVE)
    for path in (made / RECORD, made / CURVE, made):
        flush(path)
    made.rename(trained.folder)
    flush(trained.folder.parent)
