"""The bottleneck adapters that LoRA is measured against: small layers in sequence with the model's own.

No merge removes them.

*adapter-h* (Houlsby et al. 2019, arXiv 1902.00751): after the attention's and after the feed-forward's projection,
before the residual sum. *adapter-l* (Lin et al. 2020, arXiv 2004.03829): after the feed-forward's projection only,
behind a layer normalization of its own.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora.errors import LorafuseError

Kind = Literal["adapter-h", "adapter-l"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# What the projections at the end of a block's two parts are called: GPT-2; Llama, Qwen; BERT, RoBERTa; DistilBERT.
ATTENTION = (".attn.c_proj", ".self_attn.o_proj", ".attention.output.dense", ".attention.out_lin")
FEED_FORWARD = (".mlp.c_proj", ".mlp.down_proj", ".output.dense", ".ffn.lin2")


class Bottleneck(nn.Module):
    """``x + up(act(down(x)))``, on vectors of ``features``; ``up`` starts at zero, so a fresh one changes nothing."""

    def __init__(self, features: int, width: int, kind: Kind, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, dtype=dtype) if kind == "adapter-l" else nn.Identity()
        self.act = nn.ReLU() if kind == "adapter-l" else nn.GELU()
        self.down = nn.Linear(features, width, dtype=dtype)
        self.up = nn.Linear(width, features, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, values: Tensor) -> Tensor:
        """``values`` of any shape that ends in ``features``."""
        added: Tensor = self.up(self.act(self.down(self.norm(values))))
        return values + added


def insert(model: nn.Module, kind: Kind, width: int) -> list[str]:
    """Put bottlenecks of ``width`` into ``model``, whose other parameters keep their names; the new parameters' names.

    Raises LorafuseError when the model has no projection by a name that is known.
    """
    new = []
    for name, projection in _projections(model, kind).items():
        bottleneck = Bottleneck(_features(projection), width, kind, next(projection.parameters()).dtype)
        projection.add_module("bottleneck", bottleneck)
        projection.register_forward_hook(_through_bottleneck)
        new += [f"{name}.bottleneck.{parameter}" for parameter, _ in bottleneck.named_parameters()]
    return new


def width_for(model: nn.Module, kind: Kind, parameters: int) -> int:
    """The width with which ``model``'s bottlenecks have ``parameters`` in all, as nearly as can be; at least 1."""
    features = [_features(projection) for projection in _projections(model, kind).values()]
    of_any_width = sum(features) * (3 if kind == "adapter-l" else 1)  # up's bias; the normalization's weight and bias
    return max(1, round((parameters - of_any_width) / (2 * sum(features) + len(features))))


def _through_bottleneck(projection: nn.Module, inputs: object, output: Tensor) -> Tensor:
    changed: Tensor = projection.get_submodule("bottleneck")(output)
    return changed


def _projections(model: nn.Module, kind: Kind) -> dict[str, nn.Module]:
    """The modules that bottlenecks follow, by name."""
    found = {name: module for name, module in model.named_modules() if name.endswith((*ATTENTION, *FEED_FORWARD))}
    chosen = {name: module for name, module in found.items() if kind == "adapter-h" or not name.endswith(ATTENTION)}
    if not chosen:
        known = ", ".join(suffix[1:] for suffix in (*ATTENTION, *FEED_FORWARD))
        raise LorafuseError(
            f"{type(model).__name__}: has no projection that {kind} could follow; expected modules named {known}; leave"
            f" {kind} out"
        )
    return chosen


def _features(projection: Any) -> int:
    """The width of what a linear layer, or transformers' Conv1D, gives."""
    return int(projection.out_features if hasattr(projection, "out_features") else projection.nf)
