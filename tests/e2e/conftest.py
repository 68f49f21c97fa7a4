"""Models for runs of the real command."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small model with random weights: enough where nothing has to be learned."""
    from tests.integration.models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "random", tied=True, hidden_size=64)
