"""A mechanism with an option of its own, added from outside in one file."""

from __future__ import annotations

import json

import pytest
from tiny_job import Job

MARGIN = '''
    """Gaussian noise that claims less than it gives."""
    from dataclasses import dataclass
    from typing import ClassVar

    from fedlm.codec import coded
    from fedlm.config.schema import option
    from fedlm.privacy.mechanisms.gaussian import Gaussian


    @dataclass(frozen=True)
    class MarginOptions:
        factor: float = option(1.5, "claimed epsilon over the accounted one", low=1, high=4)


    @coded
    @dataclass(frozen=True)
    class Margin(Gaussian):
        """Gaussian noise with a margin."""

        factor: float = 1.5
        name: ClassVar[str] = "margin"
        Options = MarginOptions
        summary: ClassVar[str] = "Gaussian noise with a margin for errors of the accountant"

        @classmethod
        def planned(cls, participation, request):
            return cls(participation, request.options.factor)

        @property
        def description(self):
            return f"{super().description}, a margin of {self.factor:g}"

        def epsilon(self, *, noise_multiplier, num_releases, delta):
            plain = super().epsilon(noise_multiplier=noise_multiplier, num_releases=num_releases, delta=delta)
            return self.factor * plain

        def noise_multiplier(self, *, epsilon, delta):
            return super().noise_multiplier(epsilon=epsilon / self.factor, delta=delta)
'''
KIND, FACTOR = "privacy.mechanism=margin:Margin", "privacy.options.factor"


def test_a_mechanism_beside_the_config_decides_noise_and_statement(job: Job) -> None:
    job.write("margin", MARGIN)
    summary = job.simulate(KIND, f"{FACTOR}=2.5")
    assert "a margin of 2.5" in summary["privacy_statement"]
    assert summary["mechanism"] == "margin:Margin"
    plan = json.loads((job.run / "plan.json").read_text())
    assert plan["mechanism"]["name"] == "margin:Margin"
    assert "Gaussian noise with a margin for errors of the accountant" in (job.run / "report.html").read_text()
    more, plain = (job.fedlm("plan", *sets)[1]["noise_multiplier"] for sets in ([KIND, f"{FACTOR}=2.5"], []))
    assert more > 1.5 * plain


def test_the_accounting_verbs_know_it_too(job: Job) -> None:
    job.write("margin", MARGIN)
    job.fedlm("config check", KIND)  # finds the folder
    words = [
        "privacy",
        "epsilon",
        "--population",
        "1000",
        "--cohort",
        "20",
        "--noise-multiplier",
        "1",
        "--rounds",
        "5",
        "--delta",
        "1e-6",
    ]
    own = ["--mechanism", "margin:Margin", "--option", "factor=2"]
    found = [job.verb(*words, *more)["epsilon"] for more in ([], own)]
    assert found[1] == pytest.approx(2 * found[0])
    error = job.verb_error(*words, "--mechanism", "margin:Margin", "--option", "fctor=2")
    assert f"did you mean '{FACTOR}'?" in error


def test_its_options_are_checked(job: Job) -> None:
    job.write("margin", MARGIN)
    assert f"did you mean '{FACTOR}'?" in job.refusal(KIND, "privacy.options.facto=2")
    assert f"{FACTOR} = 5 is not allowed; expected a number from 1 to 4" in job.refusal(KIND, f"{FACTOR}=5")
    assert (
        "is no noise mechanism; name a class that derives from fedlm.privacy.mechanisms.base.Mechanism"
        in job.refusal("privacy.mechanism=margin:MarginOptions")
    )


def test_a_run_of_a_plug_in_that_is_gone_can_still_be_read(job: Job) -> None:
    """The report names the mechanism as the run did; what needs its accounting says what is missing, in one line."""
    job.write("margin", MARGIN)
    job.simulate(KIND)
    (job.folder / "margin.py").unlink()
    job.forget("margin")
    job.verb("report", str(job.run))
    assert "margin:Margin" in (job.run / "report.html").read_text()
    error = job.verb_error("privacy", "compare", "--run", str(job.run))
    assert "mechanism.name = 'margin:Margin' must be one of gaussian" in error
    assert "No module named 'margin'" in error
