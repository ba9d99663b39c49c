"""Generating tokens with a decoder's engine: prefill, then one token at a time on the key-value cache. Greedy."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import numpy as np

from engines.backends import Runs
from engines.feeds.inputs import CACHED
from engines.feeds.text import base_config
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError
from lora.files.tensorfile import Array


def greedy(
    session: Runs, inputs: Mapping[str, Array], limit: int, stop: AbstractSet[int] = frozenset()
) -> list[list[int]]:
    """The likeliest next tokens of each row of ``inputs``, as ``TextEncoder.encode`` gives them: padded on the left.

    A row ends after ``limit`` tokens, or with the first token of ``stop``, which is left out. Raises EngineError when
    the session refuses the inputs.
    """
    feed = dict(inputs)
    rows: list[list[int]] = [[] for _ in feed["input_ids"]]
    ended = np.zeros(len(rows), bool)
    for _ in range(limit):
        outputs = session.run(feed)
        chosen = outputs["logits"][:, -1].argmax(axis=-1)
        ended |= np.isin(chosen, list(stop))
        for row, token in enumerate(chosen.tolist()):
            if not ended[row]:
                rows[row].append(token)
        if ended.all():
            break
        feed = _next(feed, outputs, chosen)
    return rows


def check_generates(part: TaskPart) -> None:
    """Raises EngineError unless the task is a language model with a cache."""
    if not any(port.name.startswith(CACHED) for port in part.graph.inputs):
        kind = part.graph.head.task_type
        raise EngineError(f"{part.bundle.path}: task '{part.name}' is of type {kind} and generates no tokens")


def stop_tokens(bundle: Bundle) -> frozenset[int]:
    """The tokens that end a text, as the base's generation_config.json or config.json says; none where neither does."""
    for name in ("generation_config.json", "config.json"):
        found = base_config(bundle, name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _next(feed: Mapping[str, Array], outputs: Mapping[str, Array], chosen: Array) -> dict[str, Array]:
    """The inputs of the step after ``feed``: the chosen tokens, one position on, and the cache that it left."""
    mask = feed["attention_mask"]
    return {
        "input_ids": chosen[:, None].astype(feed["input_ids"].dtype),
        "attention_mask": np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1),
        "position_ids": feed["position_ids"][:, -1:] + 1,
        **{name: outputs[name.replace(CACHED, "present.")] for name in feed if name.startswith(CACHED)},
    }
