"""What all bases have in common, whatever they are stored as."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

from lora.files.tensorfile import Array, TensorFile


class BaseTensors(Mapping[str, Array]):
    """A base's weights by name, read one at a time: dense, quantized, or in another program's format.

    ``tied`` is {a tensor that is not stored: the one that holds its values}: such a tensor is found, not listed.
    ``files`` are the safetensors files of dense weights, whose bytes may be copied; none where weights are computed.
    """

    tied: Mapping[str, str]
    files: tuple[TensorFile, ...] = ()

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""


Tensors = TypeVar("Tensors", bound=BaseTensors)


def tied_as(tensors: Tensors, tied: Mapping[str, str]) -> Tensors:
    """The same tensors, with these as the tied ones."""
    again = copy.copy(tensors)
    again.tied = tied
    return again
