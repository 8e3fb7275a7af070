"""Fixtures that every test may use. Heavy libraries are imported inside fixtures only, so pure tests stay fast."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: tests need no network


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(kind)` is the diffusers folder of a tiny random pipeline, built once a session. Read only."""
    from tests import tiny_pipelines

    @functools.cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp("tiny") / kind
        tiny_pipelines.build(kind, path)
        return path

    return folder
