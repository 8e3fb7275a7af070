"""Fixtures of tests of workers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.worker.pipelines_of_stages import Pipelines


@pytest.fixture(scope="session")
def opened(tiny_folder: Callable[[str], Path]) -> "Callable[[str], Pipelines]":
    """`opened(kind)`: block stages of a tiny model, loaded once a session."""
    from tests.worker.pipelines_of_stages import Pipelines

    return functools.cache(lambda kind: Pipelines.open(kind, tiny_folder(kind)))
