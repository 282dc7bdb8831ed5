"""Programs of the same small decoders, which are made again and again here, are compiled once."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def programs_compiled_once(compiled_once: None) -> None:
    pass
