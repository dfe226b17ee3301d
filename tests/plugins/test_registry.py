"""The registries: what is written beside a built-in class is true of it, and entry points are names like any other."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
from tiny_job import Job

from fedlm import registry
from fedlm.config.keys import keys, keys_of_options
from fedlm.config.schema import Config
from fedlm.config.validate import problems
from fedlm.registry import REGISTRIES, STRATEGIES, NoOptions, Registry

EVERY = [(found, name) for found in REGISTRIES for name in found.built_in]
IDS = [f"{found.key}={name}" for found, name in EVERY]


@pytest.mark.parametrize(("found", "name"), EVERY, ids=IDS)
def test_a_built_in_class_has_the_options_that_its_registry_names(found: Registry[Any], name: str) -> None:
    kind = found.resolve(name)
    assert getattr(kind, "Options", NoOptions) is found.options_of(name)
    assert found.reference(kind) in (name, f"{kind.__module__}:{kind.__qualname__}")
    assert found.resolve(found.reference(kind)) is kind
    for key in keys_of_options(found.options_of(name), "x.").values():
        assert key.help
        assert key.coerce(key.default) == key.default
    assert len(fields(found.options_of(name))) == 0 or found.options_key
    assert getattr(kind, "name", name) == name


@pytest.mark.parametrize("found", REGISTRIES, ids=lambda found: found.key)
def test_the_default_is_a_name_and_the_key_says_what_it_takes(found: Registry[Any]) -> None:
    key = keys()[found.key]
    assert key.registry is found
    assert all(name in key.allowed for name in found.built_in)
    assert "pkg.mod:Class" in key.allowed
    default = key.default if found.many else (key.default,)
    assert set(default) <= {*found.built_in, ""}  # type: ignore[arg-type]


@pytest.mark.parametrize(("found", "name"), EVERY, ids=IDS)
def test_only_classes_that_say_so_have_checks(found: Registry[Any], name: str) -> None:
    """The front door imports a built-in class for its checks only where its registry says that it has some."""
    kind = found.resolve(name)
    has_some = "problems" in vars(kind) or getattr(kind, "keeps_noise", False)
    assert has_some == found._built_in[name].checks
    assert not list(problems(Config()))


def test_an_entry_point_is_used_by_its_name(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write(
        "installed_steps", '"""As a package would have it."""\nfrom fedlm.strategies.fedavg import FedAvg as Steps\n'
    )
    points = EntryPoints(
        [
            EntryPoint("steps", "installed_steps:Steps", "fedlm.strategies"),
            EntryPoint("broken", "not_there:Thing", "fedlm.strategies"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    job.fedlm("config check")  # finds the folder
    listed = {row["name"]: row["class"] for row in job.verb("strategies")["strategies"]}
    assert listed["steps"] == "installed_steps:Steps"
    assert list(listed)[:2] == list(STRATEGIES.built_in)
    code, found, error = job.fedlm("config check", "strategy.kind=steps")
    assert code == 0, error
    assert "strategy.kind = 'broken' cannot be imported" not in json.dumps(found)
    assert "cannot be imported: No module named 'not_there'" in job.refusal("strategy.kind=broken")
    assert "did you mean 'steps'? Known: fedavg, fedadam, steps, broken" in job.refusal("strategy.kind=step")
    assert job.simulate("strategy.kind=steps")["rounds"] == 2


def test_a_node_needs_no_plug_in_of_the_server(job: Job) -> None:
    """What a node reads says which strategy runs and with what options; the node imports nothing of it."""
    from fedlm.config.load import config_from_toml, config_to_toml, load_config

    job.write(
        "far_away",
        """
        from dataclasses import dataclass
        from fedlm.config.schema import option
        from fedlm.strategies.fedavg import FedAvg

        @dataclass(frozen=True)
        class FarOptions:
            reach: float = option(1.0, "how far", above=0)
            names: tuple[str, ...] = option((), "which")

        class Far(FedAvg):
            Options = FarOptions
        """,
    )
    sets = ["strategy.kind=far_away:Far", "strategy.options.reach=3", 'strategy.options.names=["a", "b"]']
    text = config_to_toml(load_config(job.folder / "job.toml", sets))
    (job.folder / "far_away.py").unlink()
    registry._resolved.cache_clear()
    import sys

    del sys.modules["far_away"]
    node = config_from_toml(text, imports_plugins=False)
    assert dict(node.strategy.options) == {"names": ("a", "b"), "reach": 3.0}
    assert hash(node) == hash(config_from_toml(text, imports_plugins=False))
    with pytest.raises(Exception, match="cannot be imported"):
        config_from_toml(text)
