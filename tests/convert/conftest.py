"""What tests of adapters have in common."""

from pathlib import Path

import pytest
from peers import hf_model


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, of the CONFIG of the module that asks for it."""
    path = tmp_path_factory.mktemp("base") / "hf"
    hf_model(request.module.CONFIG).save_pretrained(path)
    return path
