"""Every architecture of the exporter, for the builder."""

from __future__ import annotations
