"""What is trained: the base with a head for the task, LoRA in its attention, and the texts as the model takes them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from safetensors import SafetensorError

from lora.errors import AdapterError, CheckpointError
from lora.modules.layers import Injection, inject
from lora.modules.positions import unused_positions
from lora.modules.projections import attention_targets
from lora.training.examples import Examples, Kind

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
PEFTS_HEADS = (
    "classifier",
    "score",
)  # what the names of modules end in that PEFT trains whole, with the task type SEQ_CLS
IGNORED = -100  # the target of a token that is not learnt


@dataclass(frozen=True)
class Size:
    """LoRA's rank, alpha and dropout; ``targets`` none: queries and values."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Learner:
    """The model to be trained, its tokenizer, and what was put into it."""

    model: Any
    tokenizer: Any
    injection: Injection
    kind: Kind
    longest: int

    def features(self, examples: Examples) -> list[dict[str, Any]]:
        """Each example as the model takes it, cut to ``longest`` tokens."""
        return [self._feature(text, target) for text, target in zip(examples.texts, examples.targets, strict=True)]

    def cut(self, examples: Examples) -> int:
        """How many of the examples have more tokens than ``longest``."""
        texts = [
            text + (target if self.kind == "causal-lm" else "")
            for text, target in zip(examples.texts, examples.targets, strict=True)
        ]
        return sum(len(ids) > self.longest for ids in self.tokenizer(texts)["input_ids"])

    def check(self, examples: Examples, path: Path) -> None:
        """Raises CheckpointError naming the first row that has no token to be learnt: the mean over none is no loss."""
        if self.kind != "causal-lm":
            return
        for row, feature in enumerate(self.features(examples)):
            if all(label == IGNORED for label in feature["labels"][1:]):  # the first is never foretold
                raise CheckpointError(
                    f"{path}: row {row + 1} has no token to be learnt among its first {self.longest}; shorten or remove"
                    " its text, or raise --max-tokens"
                )

    def _feature(self, text: str, target: Any) -> dict[str, Any]:
        if self.kind != "causal-lm":
            return {**self.tokenizer(text, truncation=True, max_length=self.longest), "labels": target}
        # A prompt is not learnt, only what follows it; without one to follow, the whole text is.
        prompt = self.tokenizer(text)["input_ids"]
        following = (
            self.tokenizer(target, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            if target
            else []
        )
        ids = (prompt + following)[: self.longest]
        learnt = [IGNORED] * len(prompt) + following if target else prompt
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": learnt[: self.longest]}

    def collator(self) -> Any:
        """Pads the features of a batch."""
        if self.kind == "causal-lm":
            return transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        return transformers.DataCollatorWithPadding(self.tokenizer)


def new_learner(base: Path, kind: Kind, labels: Sequence[str], size: Size, longest: int, seed: int) -> Learner:
    """The learner before its first step; the same seed gives the same.

    Raises CheckpointError when the base can't be loaded for the task, AdapterError when the targets are none of its
    modules.
    """
    _be_quiet()
    transformers.set_seed(seed)
    tokenizer = _tokenizer(base, kind)
    model, new = _model(base, kind, labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    targets, parts = (size.targets, (True,)) if size.targets else attention_targets(model)
    injection = Injection(targets, size.rank, size.alpha, size.dropout, parts, heads=new)
    inject(model, injection)
    return Learner(model, tokenizer, injection, kind, min(longest, _most_tokens(model, tokenizer)))


def _tokenizer(base: Path, kind: Kind) -> Any:
    tokenizer = _loaded(base, transformers.AutoTokenizer)
    files = getattr(tokenizer, "vocab_files_names", None)  # none of a tokenizer of bytes or characters
    names = {*files.values(), "tokenizer.json"} if files else set()
    if names and not any((base / name).is_file() for name in names):  # transformers makes one without a vocabulary
        raise CheckpointError(
            f"{base}: has no tokenizer (one of {', '.join(sorted(names))}); save the base's own there with"
            " save_pretrained"
        )
    if kind == "causal-lm" and tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{base}: its tokenizer has no end of text, which a language model has to learn; add one to"
            " tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"{base}: its tokenizer has neither padding nor an end of text, to fill a batch with; add one to"
                " tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _most_tokens(model: Any, tokenizer: Any) -> int:
    """How many tokens the model takes, by its positions and its tokenizer.

    RoBERTa's positions begin after its padding's.
    """
    positions, said = getattr(model.config, "max_position_embeddings", None) or 0, tokenizer.model_max_length or 0
    return min([*(int(most) for most in (positions - unused_positions(model), said) if most > 0), sys.maxsize])


def _model(base: Path, kind: Kind, labels: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """The model, and the modules to be trained whole: the head, and whatever leads to it that the checkpoint lacks."""
    if kind == "causal-lm":
        model, info = _loaded(base, transformers.AutoModelForCausalLM, output_loading_info=True)
        if info["missing_keys"]:
            raise CheckpointError(
                f"{base}: lacks {sorted(info['missing_keys'])[0]}; a language model's base has to be a language model"
            )
        return model, ()
    config = _loaded(base, transformers.AutoConfig)
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{base}: an encoder with a decoder, which has no classes or numbers here; give an encoder, or a language"
            " model"
        )
    # Whatever the base was used for before; as attributes one by one, as together with the file's they may contradict
    # each other.
    config.problem_type = "single_label_classification" if kind == "classification" else "regression"
    config.num_labels = len(labels) or 1
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    options = {"config": config, "ignore_mismatched_sizes": True}
    model, info = _loaded(base, transformers.AutoModelForSequenceClassification, output_loading_info=True, **options)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    return model, _heads(model, {*info["missing_keys"], *mismatched})


def _heads(model: Any, new: set[str]) -> tuple[str, ...]:
    """The topmost modules with nothing but new parameters, and those that PEFT trains whole with every classification.

    PEFT saves and loads such a module as a whole, so one below it must not be named instead.
    """
    modules = {
        path: {f"{path}.{name}" for name, _ in module.named_parameters()}
        for path, module in model.named_modules()
        if path
    }
    whole = [path for path, held in modules.items() if held and (held <= new or path.endswith(PEFTS_HEADS))]
    alone = [
        path for path in {name.rpartition(".")[0] for name in new} if path in modules and path not in whole
    ]  # with parameters that the base has
    chosen = sorted({*whole, *alone})
    return tuple(path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen))


def _loaded(base: Path, auto: Any, **options: Any) -> Any:
    if not (base / "config.json").is_file():
        raise CheckpointError(f"{base}: no config.json; give the folder of a model that transformers saved")
    try:
        return auto.from_pretrained(base, **options)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{base}: transformers can't load it for this task ({' '.join(str(error).split())[:160]})"
        ) from error


def _be_quiet() -> None:
    """What transformers has to say about new heads is what is wanted here."""
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


class DivergedError(AdapterError):
    """The loss is no number any more."""


def check_finite(loss: float, step: int) -> None:
    """Raises DivergedError when training has diverged."""
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise DivergedError(f"training diverged at step {step} (the loss is {loss}); choose a lower --rate")
