"""Embedding against numpy."""

import numpy as np
import pytest

from farrier.plugins.embedding import Embedding
from tests.kernels.interpreter import bfloat16, float32


@pytest.mark.parametrize("hidden", [96, 128, 2880])
@pytest.mark.parametrize("table_type", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("multiplier", [1.0, 48.5])
def test_embedding(run, hidden, table_type, multiplier):
    values = np.random.default_rng(hidden).standard_normal((10, hidden)).astype(np.float32)
    table = bfloat16(values) if table_type == "bf16" else values.astype({"fp16": "f2", "fp32": "f4"}[table_type])
    rows = float32(table) if table_type == "bf16" else table.astype(np.float32)
    ids = np.array([3, -1, 9, -2, -3, 10, 0], np.int32)
    previous = np.array([7, -1, 4], np.int32)
    residual = np.full((len(ids), hidden), np.nan, np.float32)
    variant = Embedding(10, hidden, table_type, multiplier)
    run(variant.source(), variant.grid(len(ids)), ids, previous, table, residual)
    assert (residual == rows[[3, 7, 9, 0, 4, 0, 0]] * np.float32(multiplier)).all()
