"""Measure a model dense, reduced and without global attention, side by side."""

from __future__ import annotations

from .api import bench
from .result import Benchmark, Row

__all__ = ["Benchmark", "Row", "bench"]
