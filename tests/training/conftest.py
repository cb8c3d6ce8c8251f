"""The sample job as a module."""

import importlib.util
from pathlib import Path

import pytest


def _load():
    path = Path(__file__).parent / "sample.py"
    spec = importlib.util.spec_from_file_location("training_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sample():
    return _load()


@pytest.fixture
def program(sample):
    return sample.make_program()


@pytest.fixture
def task(sample):
    return sample.make_task()
