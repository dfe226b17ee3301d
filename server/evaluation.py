"""How good the model is: held-out users are scored by the nodes, their sums added up by the server."""

from __future__ import annotations

from dataclasses import asdict

from fedlm.data.batching import evaluation_users
from fedlm.experiment import Experiment
from fedlm.losses.evaluation import Score
from fedlm.losses.metrics import metrics_of
from fedlm.messages import EvaluateRequest
from fedlm.randomness import seed_key, stream
from server.transport.dispatch import Dispatcher
from server.transport.exchange import ExchangeSpec

USERS_PER_REQUEST = 8


class Evaluation:
    """The evaluations of a run, all on the same users.

    Arguments:
        experiment: Says who is held out, and which figures are wanted.
        dispatcher: Hands out the work.
    """

    def __init__(self, experiment: Experiment, dispatcher: Dispatcher) -> None:
        config, self._store, self._dispatcher = experiment.config, experiment.store, dispatcher
        rng = stream(seed_key(config.seed), "evaluation")
        users = evaluation_users(experiment.store, config.data.max_eval_tokens, rng)
        starts = range(0, len(users), USERS_PER_REQUEST)
        self._requests = [EvaluateRequest(users[i : i + USERS_PER_REQUEST]) for i in starts]
        self._num_sums = sum(metric.size for metric in metrics_of(config.evaluation))
        self._every, self._rounds = config.execution.eval_every, config.rounds

    def is_due(self, t: int) -> bool:
        """Tell whether the model after round t is scored; the base and the last one always are."""
        return t in (0, self._rounds) or (self._every > 0 and t % self._every == 0)

    def score(self, exchange_spec: ExchangeSpec) -> Score:
        """Return the score of the model that a broadcast makes known.

        Parts are added in a fixed order, so the figure does not depend on the workers.
        """
        parts: dict[int, Score] = {}
        for index, reply in self._dispatcher.evaluate(exchange_spec, self._requests, self._store, self._num_sums):
            figures = asdict(reply)
            del figures["stale"]
            parts[index] = Score(**figures)
        return sum((parts[i] for i in range(len(parts))), Score())
