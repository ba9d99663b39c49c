"""``adapter_config.json`` as PEFT 0.21 writes it: every field is honoured, without effect on the merged weight, or
refused by name.

Meaning of the fields: https://huggingface.co/docs/peft/package_reference/lora
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import regex

from lora.errors import AdapterError

Number = TypeVar("Number", int, float)
MATCH_SECONDS = 1.0

# They steer training, or how a model is loaded; the merged weight does not depend on them.
WITHOUT_EFFECT = frozenset(
    {
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# What trainers add to say how they trained: Unsloth's own fields, ms-swift's, LoRA+'s learning rates.
TRAINERS_OWN = ("unsloth_", "lora_dtype", "lorap_", "loraplus_", "merge_weights")
# They change the maths in a way that has no dense form, or the base itself: refused unless empty.
NOT_MERGEABLE = {
    "alora_invocation_tokens": "activated LoRA applies to part of a sequence only and can't be merged",
    "arrow_config": "Arrow routes between adapters per token and can't be merged",
    "use_qalora": "QA-LoRA pools the input and can't be merged into a dense weight",
    "use_bdlora": "block-diagonal LoRA can't be merged here",
    "kasa_config": "KaSA can't be merged here",
    "monteclora_config": "MonteCLoRA samples its update and can't be merged",
    "velora_config": "VeLoRA can't be merged here",
    "megatron_config": "Megatron's parallel layers can't be merged here",
    "layer_replication": "replicated layers share their base weights; merge into a base in which each copy has its own",
    "ensure_weight_tying": "one update for two tied weights can't be merged here; train without it",
}
# These initialisations change the base weight before training: the adapter only fits that changed base.
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# These leave the base as it is: they only choose where A and B start.
PLAIN_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Settings of those initialisations; what decides is init_lora_weights itself.
INIT_SETTINGS = frozenset({"loftq_config", "eva_config", "corda_config", "lora_ga_config"})


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that a merge honours. ``r`` and ``lora_alpha`` may be overridden per module by the two patterns."""

    r: int
    lora_alpha: float
    task_type: str | None = None
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    auto_mapping: dict[str, Any] | None = None
    target_modules: list[str] | str | None = None

    def targets(self, module: str) -> bool:
        """Whether ``target_modules`` names the module at this path."""
        if isinstance(self.target_modules, str):
            return bool(_matches(self.target_modules, module))
        return any(f".{module}".endswith(f".{target}") for target in self.target_modules or ())

    @property
    def model_class(self) -> str | None:
        """The class of the model that was adapted, which PEFT writes down where no task type says it."""
        return _model_class(self.auto_mapping)

    def rank(self, module: str) -> int:
        """The rank of the module at this path."""
        return _by_pattern(self.rank_pattern or {}, module, self.r)

    def scaling(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rank stabilisation (Kalajdzievski 2023)."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def token_rows(self, module: str) -> tuple[int, ...]:
        """The rows of the embedding at this path that were trained; a bare list means the model's input embedding."""
        indices = self.trainable_token_indices
        if isinstance(indices, dict):
            return tuple(next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), ()))
        return tuple(indices or ())


class MethodConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that PEFT's other methods have in common, as far as a merge honours them."""

    peft_type: str
    task_type: str | None = None
    r: int = 1
    alpha: float = 1.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    token_indices: list[int] | None = None
    auto_mapping: dict[str, Any] | None = None

    @property
    def model_class(self) -> str | None:
        """The class of the model that was adapted."""
        return _model_class(self.auto_mapping)

    def scaling(self, module: str, rank: int | None = None) -> float:
        """``alpha / r``; ``rank`` is what the tensors say, where they do."""
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.alpha)
        return alpha / (rank or _by_pattern(self.rank_pattern or {}, module, self.r))

    def is_saved(self, name: str) -> bool:
        """A tensor of ``modules_to_save``, or a saved bias."""
        saved = any(f"{module}." in name for module in self.modules_to_save or ())
        return saved or (self.bias != "none" and name.endswith(".bias"))


def read_config(path: Path) -> PeftConfig | MethodConfig:
    """Parse and check the file: LoRA's, or another method's.

    Raises AdapterError naming the field that can't be honoured.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path}: no such file; expected a PEFT adapter (adapter_config.json and adapter_model.safetensors)"
        ) from error
    except OSError as error:
        raise AdapterError(f"{path}: can't be read ({error.strerror})") from error
    return parse_config(path, content)


def parse_config(path: Path, content: bytes) -> PeftConfig | MethodConfig:
    """Check the JSON ``content``, found in the file ``path``: LoRA's, or another method's.

    Raises AdapterError naming the field that can't be honoured.
    """
    fields = _fields(path, content)
    if fields.get("peft_type") in ("LORA", None):
        return parse_lora_config(path, content)
    return _method_config(path, content, fields)


def _method_config(path: Path, content: bytes, fields: dict[str, Any]) -> MethodConfig:
    try:
        return msgspec.json.decode(content, type=MethodConfig)
    except msgspec.MsgspecError as error:
        raise AdapterError(
            f"{path}: not the configuration of a {fields['peft_type']} adapter ({error}); save the adapter again with"
            " save_pretrained"
        ) from error


def _fields(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path}: not a PEFT LoRA configuration ({error}); save the adapter again with save_pretrained"
        ) from error


def _model_class(auto_mapping: dict[str, Any] | None) -> str | None:
    name = (auto_mapping or {}).get("base_model_class")
    return name if isinstance(name, str) else None


def parse_lora_config(path: Path, content: bytes) -> PeftConfig:
    """Check LoRA's configuration, the JSON ``content`` found in the file ``path``.

    Raises AdapterError naming the field that can't be honoured.
    """
    try:
        fields = msgspec.json.decode(content, type=dict[str, Any])
        config = msgspec.json.decode(content, type=PeftConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path}: not a PEFT LoRA configuration ({error}); save the adapter again with save_pretrained"
        ) from error
    _refuse_other_maths(path, fields)
    _refuse_bad_values(path, config)
    return config


def _refuse_other_maths(path: Path, fields: dict[str, Any]) -> None:
    if fields.get("peft_type") not in ("LORA", None):
        raise AdapterError(f"{path}: field 'peft_type' is {fields['peft_type']!r}; only LORA adapters can be merged")
    for name, reason in NOT_MERGEABLE.items():
        if fields.get(name):
            raise AdapterError(f"{path}: field '{name}' is set: {reason}")
    known = WITHOUT_EFFECT | NOT_MERGEABLE.keys() | INIT_SETTINGS | set(PeftConfig.__struct_fields__)
    for name in sorted(fields.keys() - known):
        if fields[name] not in (None, False, [], {}) and not name.startswith(TRAINERS_OWN):
            raise AdapterError(
                f"{path}: field '{name}' is not known, so the merge might ignore what it does; remove it if it has no"
                " effect"
            )


def _refuse_bad_values(path: Path, config: PeftConfig) -> None:
    init = str(config.init_lora_weights).lower()
    if init.startswith(CHANGED_BASE_INITS):
        raise AdapterError(
            f"{path}: field 'init_lora_weights' is {init!r}, which changes the base before training; "
            "save the adapter converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    if init not in PLAIN_INITS:
        raise AdapterError(
            f"{path}: field 'init_lora_weights' is {init!r}, which is not known and may change the base; expected one"
            f" of {', '.join(PLAIN_INITS)}"
        )
    ranks = {"r": config.r, **(config.rank_pattern or {})}
    for name, rank in ranks.items():
        if rank < 1:
            raise AdapterError(f"{path}: rank of '{name}' is {rank}; expected 1 or more")
    alphas = {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}
    for name, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise AdapterError(f"{path}: alpha of '{name}' is {alpha}; expected a finite number")
    for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        try:
            re.compile(pattern), regex.compile(pattern)  # PEFT's reader, and ours, which can be stopped
        except (re.error, regex.error) as error:
            raise AdapterError(f"{path}: pattern {pattern!r} is not a regular expression ({error})") from error
    if config.bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"{path}: field 'bias' is {config.bias!r}; expected none, all or lora_only")


def _by_pattern(patterns: dict[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that matches the whole module path or a dotted suffix of it.

    A pattern of a stranger may take forever.
    """
    matches = (value for pattern, value in patterns.items() if _matches(rf"(.*\.)?({pattern})", module))
    return next(matches, default)


def _matches(pattern: str, module: str) -> bool:
    """Whether a stranger's pattern matches the whole path. Raises AdapterError where it takes forever."""
    try:
        return regex.fullmatch(pattern, module, timeout=MATCH_SECONDS) is not None
    except regex.error:
        return False
    except TimeoutError as error:
        raise AdapterError(
            f"a pattern of rank_pattern, alpha_pattern or target_modules takes longer than {MATCH_SECONDS:g} s to match"
            f" with '{module}'; write it without nested repetition"
        ) from error
