"""Fixtures over the small models."""

from __future__ import annotations

import pytest
from small_models import KINDS, ModelMaker, small_model

from fedlm.models.base import LanguageModel


@pytest.fixture
def make_model() -> ModelMaker:
    return small_model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return small_model(request.param)
