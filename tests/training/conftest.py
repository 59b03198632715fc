"""A small pool of training clips that the tests of this folder share."""

from pathlib import Path

import pytest

from training.pool import render_shard


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two old scenes at 64x64, and new ones at 56x72 and 88x48, 4 frames each."""
    path = tmp_path_factory.mktemp("pool")
    render_shard(path, "v1", 0, 4, (64, 64), scenes=2)
    render_shard(path, "v2", 0, 4, (56, 72), scenes=3)
    render_shard(path, "v2", 64, 4, (88, 48), scenes=3)
    return path
