"""What an adapter costs, by the LoRA paper's arithmetic (Hu et al.

2021, arXiv 2106.09685, sections 1, 4.2 and 5.5): pure numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lora.wording import megabytes

MOMENTS = 2  # Adam keeps two numbers for each parameter that it trains


@dataclass(frozen=True)
class Product:
    """An update of low rank, B · A, of a weight or a part of one: (outputs × rank) · (rank × inputs)."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Dimensions:
    """A model's number of parameters, and the products that its targets get."""

    name: str
    parameters: int
    products: tuple[Product, ...]


@dataclass(frozen=True)
class Figure:
    """One number, where it comes from, and what the paper has for it, if it is the paper's model."""

    name: str
    value: float
    unit: str
    formula: str
    paper: str = ""


@dataclass(frozen=True)
class Plan:
    """The figures of one model, rank and number of tasks, and what was assumed."""

    model: str
    rank: int
    tasks: int
    assumptions: tuple[str, ...]
    figures: tuple[Figure, ...]


def plan(model: Dimensions, rank: int, tasks: int, width: int = 2) -> Plan:
    """The figures for ``tasks`` adapters of ``rank``, both at least 1.

    ``width`` is the bytes of a stored parameter.
    """
    trainable = sum(rank * (product.inputs + product.outputs) for product in model.products)
    base, adapter = width * model.parameters, width * trainable
    full, lora = width * (1 + MOMENTS) * model.parameters, width * model.parameters + width * (1 + MOMENTS) * trainable
    whole, own = megabytes(base), megabytes(adapter)
    figures = (
        Figure("parameters of the base", model.parameters, "", "counted from the configuration"),
        Figure(
            "trainable parameters",
            trainable,
            "",
            f"rank × (inputs + outputs), summed: {_spelled(model.products, rank)}",
        ),
        Figure("share of the base", trainable / model.parameters, "%", "trainable ÷ parameters"),
        Figure("checkpoint, full fine-tuning", base, "bytes", f"{width} B × {model.parameters:,}"),
        Figure("checkpoint, LoRA", adapter, "bytes", f"{width} B × {trainable:,}"),
        Figure("checkpoint, full ÷ LoRA", model.parameters / trainable, "×", "parameters ÷ trainable"),
        Figure(
            "Adam's moments, full fine-tuning",
            width * MOMENTS * model.parameters,
            "bytes",
            f"{MOMENTS} × {width} B × {model.parameters:,}",
        ),
        Figure("Adam's moments, LoRA", width * MOMENTS * trainable, "bytes", f"{MOMENTS} × {width} B × {trainable:,}"),
        Figure("weights and moments, full fine-tuning", full, "bytes", f"{whole} + {MOMENTS} × {whole}"),
        Figure("weights and moments, LoRA", lora, "bytes", f"{whole} + {1 + MOMENTS} × {own}"),
        Figure("weights and moments, full ÷ LoRA", full / lora, "×", "their quotient"),
        Figure(
            f"{tasks} tasks, one base and an adapter each",
            base + tasks * adapter,
            "bytes",
            f"{whole} + {tasks} × {own}",
        ),
        Figure(f"{tasks} tasks, a model each", tasks * base, "bytes", f"{tasks} × {whole}"),
    )
    return Plan(model.name, rank, tasks, _assumptions(width), figures)


def _spelled(products: tuple[Product, ...], rank: int) -> str:
    """Such as ``192 × 4 × (12288 + 12288)``: equal products together."""
    shapes = Counter((product.inputs, product.outputs) for product in products)
    return " + ".join(f"{count} × {rank} × ({inputs} + {outputs})" for (inputs, outputs), count in shapes.items())


def _assumptions(width: int) -> tuple[str, ...]:
    return (
        (
            f"weights, gradients and Adam's two moments in {width} bytes a number, as the paper counts; moments in 4"
            " bytes need more"
        ),
        (
            "gradients and activations are left out: they depend on the batch, and the paper's ÷ 3 is of weights and"
            " moments"
        ),
        "1 MB is 10⁶ bytes",
    )
