"""Exchanging operators instead of tracing again: the same graph, and the same numbers; where that is not certain, it is
traced again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny_models import ARCHITECTURES, save_base
from torch.export import ExportedProgram

import exporter.graph.trace
from exporter.graph.decompose import decomposed_in_place
from exporter.graph.digest import graph_digest
from exporter.heads import head_of
from exporter.source import checkpoint
from exporter.task import unadapted

TRACED_AGAIN = {"DebertaV2 SEQ_CLS", "T5"}  # they add in place
FAMILIES = ["BERT TOKEN_CLS", "DebertaV2 SEQ_CLS", "GPT2", "Llama", "T5", "Whisper encoder"]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that were traced again."""
    programs: list[ExportedProgram] = []
    original: Callable[..., ExportedProgram] = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        programs.append(program)
        return original(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return programs


@pytest.mark.parametrize(("name", "precision"), [*((name, "float32") for name in FAMILIES), ("Llama", "float16")])
def test_the_graph_is_the_one_that_tracing_again_gives(
    name: str, precision: Any, tmp_path: Path, again: list[ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base")
    head = head_of(unadapted(base), base, architecture.asked)

    def traced() -> str:
        return graph_digest(
            _with_torchs_reshapes(
                exporter.graph.trace.trace(checkpoint(base, lambda: "", "").signature("model", head, precision)).graph
            )
        )

    in_place = traced()
    assert len(again) == (name in TRACED_AGAIN)
    monkeypatch.setattr(exporter.graph.trace, "decomposed_in_place", nullcontext)
    assert in_place == traced()
    assert len(again) == (name in TRACED_AGAIN) + 1


def _with_torchs_reshapes(graph: onnx.ModelProto) -> onnx.ModelProto:
    """What a zero in a shape means is the one attribute that may differ: no shape here has one."""
    for node in graph.graph.node:
        if node.op_type == "Reshape":
            del node.attribute[:]
    return graph


def _dropout(values: torch.Tensor) -> torch.Tensor:
    return torch.dropout(values, 0.5, False)


def _casts(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float64).to(torch.float64).to(values.device, torch.float16).to(dtype=torch.float32)


def _logic(values: torch.Tensor) -> torch.Tensor:
    return torch.where((values > 0) & (values < 1), values, torch.min(values, values * 2))


def _detached(values: torch.Tensor) -> torch.Tensor:
    return (values * 2).detach_().contiguous().reshape(-1).flatten()


def _added_in_place(values: torch.Tensor) -> torch.Tensor:
    doubled = values * 2
    part = doubled[0]
    doubled.add_(1)
    return part


def _written_in_place(values: torch.Tensor) -> torch.Tensor:
    doubled = values * 2
    part = doubled[0]
    doubled[:, 1] = values[:, 0]
    return part


def _random(values: torch.Tensor) -> torch.Tensor:
    return torch.dropout(values, 0.0, True)


def _under_autocast(values: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return values * 2


def _no_function_in_onnx(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softshrink(values, 0.5)


@pytest.mark.parametrize(
    ("function", "is_traced_again"),
    [
        (_dropout, False),
        (_casts, False),
        (_logic, False),
        (_detached, False),
        (_added_in_place, True),
        (_written_in_place, True),
        (_random, True),
        (_under_autocast, True),
        (_no_function_in_onnx, True),
    ],
)
def test_the_graph_computes_what_the_module_does(
    function: Callable[[torch.Tensor], torch.Tensor], is_traced_again: bool, again: list[ExportedProgram]
) -> None:
    class Module(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return function(values), values + 1

    values = torch.linspace(-2, 2, 12).reshape(3, 4)
    with decomposed_in_place():
        program = torch.onnx.export(Module().eval(), (values,), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    for got, expected in zip(program(values), Module()(values), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(again) == is_traced_again


def test_outside_the_context_torch_decomposes_as_ever() -> None:
    before = ExportedProgram.run_decompositions
    with decomposed_in_place():
        assert ExportedProgram.run_decompositions is not before
    assert ExportedProgram.run_decompositions is before
