"""Public moments: repeatable, of public users alone, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.experiment import Experiment
from server import app as server
from server.public_moments import PublicMoments, public_moments

Make = Callable[..., Config]


def test_moments_are_repeatable_and_leave_the_model_alone(small: Make) -> None:
    config = small("privacy.allocation=public")
    server.ensure_base(config, lambda event: None)
    experiment = Experiment.open(config)
    trainable = experiment.trainable()
    before = trainable.initial_values()
    found = public_moments(experiment, trainable)
    assert np.array_equal(trainable.initial_values(), before)
    assert public_moments(experiment, trainable) == found
    assert set(found.moments) == set(found.importance) == {"lora_a", "lora_b", "bias", "rows"}
    assert min(found.moments.values()) > 0
    assert found.moments["lora_b"] > 2 * found.moments["lora_a"] > 0  # B moves first; A's gradient is zero at B = 0


def test_private_users_do_not_count(small: Make) -> None:
    """With the text of every user who trains exchanged for a public one's, the moments are the same."""
    config = small("privacy.allocation=per_group")
    server.ensure_base(config, lambda event: None)
    experiment = Experiment.open(config)
    found = public_moments(experiment, experiment.trainable())

    class OtherPrivateUsers:
        def __getattr__(self, name: str) -> object:
            return getattr(experiment.store, name)

        def tokens(self, user: int) -> object:
            public = experiment.store.users("public")
            return experiment.store.tokens(user if user in public else int(public[0]))

    other = replace(experiment, store=OtherPrivateUsers())  # type: ignore[arg-type]
    assert public_moments(other, experiment.trainable()) == found


def test_nothing_is_trained_where_nobody_asks(small: Make) -> None:
    for change in ("privacy.allocation=adaptive", "privacy.enabled=false"):
        experiment = Experiment.open(small(change))
        assert public_moments(experiment, None) == PublicMoments()  # type: ignore[arg-type]


def test_diverging_public_users_are_refused(small: Make) -> None:
    config = small("privacy.allocation=public", "local.learning_rate=1e38", "local.epochs=3")
    server.ensure_base(config, lambda event: None)
    experiment = Experiment.open(config)
    with pytest.raises(ConfigError, match="diverges"):
        public_moments(experiment, experiment.trainable())
