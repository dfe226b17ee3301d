"""An evaluation metric and a DP metric, each with an option of its own, each added from outside in one file."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_job import Job

from fedlm.codec import decode, encode
from fedlm.config.load import load_config
from fedlm.experiment import Experiment
from fedlm.privacy.clipping.query_input import DeviceStats, QueryInput
from fedlm.privacy.clipping.side_queries import DPMetrics, SideQuery

RARE = '''
    """Perplexity of rare words alone."""
    import math
    from dataclasses import dataclass

    import torch

    from fedlm.config.schema import option
    from fedlm.losses.metrics import EvaluationMetric


    @dataclass(frozen=True)
    class RareOptions:
        least_id: int = option(10, "words from this id on count as rare", low=0)


    class Rare(EvaluationMetric):
        """Likelihood of rare words."""

        name = "rare"
        Options = RareOptions
        size = 2

        def contribution(self, scored):
            rare = scored.targets >= self.options.least_id
            return [float(scored.nll[rare].sum()), float(rare.sum())]

        def figures(self, totals):
            return {"rare_perplexity": math.exp(totals[0] / totals[1]), "rare_tokens": totals[1]}
'''
DISTINCT = '''
    """How many distinct words a device has."""
    from dataclasses import dataclass

    import numpy as np

    from fedlm.config.schema import option
    from fedlm.privacy.dp_metrics import DPMetric


    @dataclass(frozen=True)
    class DistinctOptions:
        most: float = option(40.0, "more distinct words count as this", above=0, high=1000)


    class Distinct(DPMetric):
        """Distinct words."""

        name = "distinct"
        Options = DistinctOptions
        share = 0.2
        wants_words = True

        @property
        def bound(self):
            return self.options.most

        def value(self, seen):
            return len(np.unique(seen.device_stats.words))
'''
MOODY = '''
    """A metric that fails on some devices' texts."""
    from fedlm.privacy.dp_metrics import DPMetric


    class Moody(DPMetric):
        """Raises where the first word has an odd number."""

        name = "moody"
        bound = 1.0
        wants_words = True

        def value(self, seen):
            if seen.device_stats.words[0] % 2:
                raise ValueError("an odd text")
            return 1.0
'''
RARE_KIND, LEAST = "evaluation.metrics=['rare_words:Rare', 'next_word_accuracy']", "evaluation.options.rare.least_id"
DP_KIND, MOST = "privacy.metrics=['distinct_words:Distinct', 'num_tokens']", "privacy.metric_options.distinct.most"
EXACT = ("privacy.epsilon=0", "privacy.noise_multiplier=1e-6", "privacy.sampler=fixed")


def test_an_evaluation_metric_beside_the_config_is_measured(job: Job) -> None:
    job.write("rare_words", RARE)
    summary = job.simulate(RARE_KIND, f"{LEAST}=0")
    last = job.lines("metrics.jsonl")[-1]
    assert last["evaluation"]["rare_perplexity"] == pytest.approx(last["perplexity"], rel=1e-6)  # every word is rare
    assert 0 < last["evaluation"]["next_word_accuracy"] < 1
    assert summary["evaluation"] == last["evaluation"]
    assert "Rare perplexity by round" in (job.run / "report.html").read_text()
    (job.folder / "run").rename(job.folder / "first")
    job.simulate(RARE_KIND, f"{LEAST}=20", "execution.workers=1")
    rare = job.lines("metrics.jsonl")[-1]["evaluation"]
    assert 0 < rare["rare_tokens"] < last["evaluation"]["rare_tokens"]
    assert rare["rare_perplexity"] > last["perplexity"]


def test_the_options_of_an_evaluation_metric_are_checked(job: Job) -> None:
    job.write("rare_words", RARE)
    assert f"did you mean '{LEAST}'?" in job.refusal(RARE_KIND, "evaluation.options.rare.lest_id=3")
    assert f"{LEAST} = -1 is not allowed; expected a whole number >= 0" in job.refusal(RARE_KIND, f"{LEAST}=-1")
    assert job.shown(LEAST, RARE_KIND)["help"] == "words from this id on count as rare"
    assert "names one twice" in job.refusal("evaluation.metrics=['next_word_accuracy', 'next_word_accuracy']")


def test_a_dp_metric_beside_the_config_leaves_devices_with_noise_and_clip(job: Job) -> None:
    job.write("distinct_words", DISTINCT)
    job.simulate(DP_KIND, *EXACT)
    settings = load_config(job.folder / "job.toml")
    store = Experiment.open(settings).store
    counts = [len(np.unique(store.tokens(int(user)))) for user in store.users("train")]
    found = [line["dp_metrics"]["distinct"] for line in job.lines("metrics.jsonl")[1:]]
    assert all(min(counts) <= value <= max(counts) for value in found)
    (job.folder / "run").rename(job.folder / "first")
    job.simulate(DP_KIND, f"{MOST}={min(counts) / 2}", *EXACT)
    clipped = job.lines("metrics.jsonl")[-1]["dp_metrics"]["distinct"]
    assert clipped == pytest.approx(min(counts) / 2, rel=1e-3)  # every device is beyond it
    statement = job.lines("ledger.jsonl")[0]["privacy"]["privacy_statement"]
    assert "metrics (distinct_words:Distinct, num_tokens) included" in statement
    assert "DP metric distinct by round" in (job.run / "report.html").read_text()


def test_its_share_is_its_part_of_the_clip_norm(job: Job) -> None:
    """Twice the share is half the noise for the metric, and the update gets what is left."""
    job.write("distinct_words", DISTINCT)
    config = load_config(job.folder / "job.toml", [DP_KIND, f"{MOST}=10"]).privacy
    side_query = DPMetrics.of(config.metrics, config.metric_options)
    assert side_query.share == pytest.approx(math.sqrt(0.2**2 + 0.1**2 + 0.1**2))
    seen = QueryInput(1.0, 1.0, np.ones(1), DeviceStats(0.0, 500, np.arange(5)))
    assert side_query.answer(seen).tolist() == [2 * 5 / 10, 500 / 2000, 1.0]
    assert side_query.means(3 * side_query.answer(seen)) == pytest.approx({"distinct": 5.0, "num_tokens": 500.0})
    assert side_query.wants_words
    assert np.linalg.norm(
        side_query.answer(QueryInput(1.0, 1.0, np.ones(1), DeviceStats(0.0, 9999, np.arange(99))))
    ) == (pytest.approx(side_query.bound))
    assert decode(SideQuery, encode(side_query, SideQuery), where="a query") == side_query


def test_the_options_of_a_dp_metric_are_checked(job: Job) -> None:
    job.write("distinct_words", DISTINCT)
    assert f"did you mean '{MOST}'?" in job.refusal(DP_KIND, "privacy.metric_options.distinct.mots=3")
    assert f"{MOST} = 0 is not allowed; expected a number > 0 and <= 1_000" in job.refusal(DP_KIND, f"{MOST}=0")
    assert "privacy.metrics = 'num_token' is unknown; did you mean 'num_tokens'?" in job.refusal(
        "privacy.metrics=['num_token']"
    )


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_dp_metric_that_fails_on_a_text_fails_that_device_alone(job: Job, group_size: int) -> None:
    """A round must not be repeated, nor a run end, because of what a device's text is."""
    job.write("moody", MOODY)
    job.simulate("privacy.metrics=['moody:Moody']", *EXACT, f"execution.group_size={group_size}")
    ledger = job.lines("ledger.jsonl")
    store = Experiment.open(load_config(job.folder / "job.toml")).store
    odd = {place for place, user in enumerate(store.users("train")) if store.tokens(int(user))[0] % 2}
    failed = {line["device"] for line in ledger if line["event"] == "device_failed"}
    assert failed
    assert failed <= odd
    assert all("ValueError: an odd text" in line["cause"] for line in ledger if line["event"] == "device_failed")
    assert not [line for line in ledger if line["event"] == "work_lost"]
    for line in ledger:
        if line["event"] == "round":
            assert line["trained"] + sum(line["failed"].values()) == line["sampled"]
