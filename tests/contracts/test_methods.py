"""Every method there is, on models that are hard in different ways."""

import functools

import pytest

from laconic.methods.base import method_names
from laconic.testing import contracts

MODELS = ["plain_cnn", "resnet", "fused_split", "tied_autoencoder"]


@functools.cache
def _case(method, model):
    return contracts.case(method, model)


@pytest.mark.parametrize("check", contracts.METHOD_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", method_names())
def test_contract(method, model, check):
    check(_case(method, model))
