"""A config file says exactly what it says, or is refused in one line that names the fix."""

from __future__ import annotations

import math
import re
import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.config import Config, config_from_toml, config_hash, config_to_toml, describe, load_config
from fedlm.config.keys import Key, build, flatten, keys, option_keys, to_flat
from fedlm.config.schema import PrivacyConfig
from fedlm.errors import ConfigError

patient = settings(deadline=None)  # the machine may be busy
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1)


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Every value that the key accepts."""
    if key.choices:
        return st.sampled_from(key.choices)
    if key.registry:
        names = st.sampled_from([*key.registry.built_in, *([""] if key.default == "" else [])])
        return st.lists(names, unique=True).map(tuple) if key.registry.many else names
    if key.kind is bool:
        return st.booleans()
    if key.kind is str:
        return TEXT
    low = key.low if key.low is not None else key.above
    if key.kind is int:
        return st.integers(int(low or 0), int(key.high if key.high is not None else 2**63 - 1))
    if key.kind is float:
        return st.floats(low, key.high, exclude_min=key.above is not None, allow_nan=False, allow_infinity=False)
    return st.lists(TEXT).map(tuple)


@st.composite
def any_values(draw: st.DrawFn) -> dict[str, Any]:
    """Any values of any keys, options of the classes that they name among them."""
    values: dict[str, Any] = draw(
        st.fixed_dictionaries({}, optional={path: values_of(key) for path, key in keys().items()})
    )
    options = option_keys(build(values))
    return values | draw(st.fixed_dictionaries({}, optional={path: values_of(key) for path, key in options.items()}))


ANY_VALUES = any_values()


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_is_the_schema_s_defaults() -> None:
    assert load_config(None) == Config()
    assert config_from_toml("") == Config()


@patient
@given(ANY_VALUES)
def test_toml_round_trip_is_exact_for_every_allowed_value(values: dict[str, Any]) -> None:
    config = build(values)
    again = build(dict(flatten(tomllib.loads(config_to_toml(config)))))
    assert again == config
    assert config_hash(again) == config_hash(config)


@patient
@given(ANY_VALUES, ANY_VALUES)
def test_hashes_are_equal_exactly_when_configs_are(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (config_hash(build(a)) == config_hash(build(b))) == (build(a) == build(b))


def test_hash_does_not_see_how_a_number_was_written() -> None:
    integer = replace(Config(), privacy=PrivacyConfig(epsilon=2))
    assert config_hash(integer) == config_hash(Config())
    assert config_hash(load_config(None, ["data.public_fraction=-0.0", "pretrain.corpus=a.txt"])) == config_hash(
        load_config(None, ["data.public_fraction=0", "pretrain.corpus=a.txt"])
    )
    assert re.fullmatch("[0-9a-f]{12}", config_hash(integer))


def test_file_and_overrides_stack_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(
        b"\xef\xbb\xbfseed = 5\r\n[trainable]\r\nlora = { rank = 4, alpha = 8 }\r\n[data]\r\ncorpus = '\xc3\xa9'"
    )
    config = load_config(path, ["trainable.lora.alpha=1", "trainable.lora.alpha=2", "fleet={cohort=7}"])
    assert (config.seed, config.trainable.lora.rank, config.trainable.lora.alpha) == (5, 4, 2.0)
    assert isinstance(config.trainable.lora.alpha, float)
    assert (config.data.corpus, config.fleet.cohort) == ("é", 7)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("privacy.population=1_000_000", "privacy.population", 1_000_000),
        ("local.learning_rate=1", "local.learning_rate", 1.0),
        (" seed = 3 ", "seed", 3),
        ("data.corpus=my corpus.txt", "data.corpus", "my corpus.txt"),
        ("data.corpus=a=b#c", "data.corpus", "a=b#c"),
        ("data.corpus='quoted'", "data.corpus", "quoted"),
        (r"data.corpus=C:\new\users.txt", "data.corpus", r"C:\new\users.txt"),
        ("data.corpus=1\nseed = 9", "data.corpus", "1\nseed = 9"),
        ("data.cache_dir=", "data.cache_dir", ""),
        ("trainable.bias=true", "trainable.bias", True),
        ('trainable.lora.targets=["mlp"]', "trainable.lora.targets", ("mlp",)),
    ],
)
def test_override_values(override: str, path: str, value: object) -> None:
    found = to_flat(load_config(None, [override]))
    assert found[path] == value
    assert type(found[path]) is type(value)
    assert {**found, path: None} == {**to_flat(Config()), path: None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainable.lora.rnak=4", "unknown key 'trainable.lora.rnak'; did you mean 'trainable.lora.rank'?"),
        ("trainable.rank=4", "unknown key 'trainable.rank'; did you mean 'trainable.lora.rank'?"),
        ("cohort=4", "unknown key 'cohort'; did you mean 'fleet.cohort'?"),
        ("local.learning-rate=1", "unknown key 'local.learning-rate'; did you mean 'local.learning_rate'?"),
        ("qqq=1", "unknown key 'qqq'; `fedlm config show` lists every key"),
        ("rounds=true", "rounds = true is not allowed; expected a whole number >= 1"),
        ("rounds=0", "rounds = 0 is not allowed; expected a whole number >= 1"),
        ("rounds=1e3", "rounds = 1000.0 is not allowed; expected a whole number >= 1; write 1_000"),
        ("seed=9223372036854775808", "expected a whole number >= 0; TOML integers have 64 bits"),
        ("privacy.delta=0", "privacy.delta = 0 is not allowed; expected a number > 0 and <= 0.1"),
        ("privacy.delta=nan", "privacy.delta = NaN is not allowed; expected a number > 0 and <= 0.1"),
        ("privacy.epsilon=inf", "privacy.epsilon = Infinity is not allowed; expected a number >= 0"),
        ("privacy.epsilon=.5", 'privacy.epsilon = ".5" is not allowed; expected a number >= 0'),
        ("trainable.bias=1", "trainable.bias = 1 is not allowed; expected true or false"),
        ("trainable.bias=True", 'trainable.bias = "True" is not allowed; expected true or false'),
        ("data.corpus=3", "data.corpus = 3 is not allowed; expected text, not empty; quote it"),
        ("data.corpus=", 'data.corpus = "" is not allowed; expected text, not empty'),
        ("trainable.lora.targets=mlp", 'expected a list of text; write ["mlp"]'),
        ('trainable.lora.targets=["mlp", 3]', "expected a list of text"),
        (
            "loss.kind=NCE",
            "loss.kind = 'NCE' is unknown; did you mean 'nce'? Known: nce, sampled_softmax, full_softmax",
        ),
        ("privacy=true", "privacy = true is not allowed; expected a table: privacy is a section"),
        ("seed={x=1}", 'seed = {"x": 1} is not allowed; expected a whole number >= 0'),
        ("seed", '--set "seed" is not allowed; expected KEY=VALUE, such as --set seed=3'),
        ("=3", '--set "=3" is not allowed; expected KEY=VALUE, such as --set seed=3'),
        ("data.corpus=\udcff", "expected UTF-8 text"),
    ],
)
def test_refusals_name_what_is_allowed_and_the_fix(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nrounds = = 2", "config: broken TOML at line 2, column 10: Invalid value"),
        ("seed = 'a", "config: broken TOML at line 1, column 10: "),
        ("seed = 1\nseed = 2", "config: broken TOML at line 2, column 9: Cannot overwrite a value"),
        ("seed = " + "9" * 5000, "config: broken TOML at line 1, "),
        ("seed = 0x" + "f" * 5000, "seed = (a very long number) is not allowed"),
        ("seed = " + "[" * 5000, "config: broken TOML at line 1, "),
        ('"privacy.epsilon" = 1', 'unknown key "privacy.epsilon"; a key with dots is written without quotes'),
        ("[[privacy]]", "privacy = [{}] is not allowed; expected a table: privacy is a section"),
        ('"a\\nb" = 1', "unknown key 'a\\\\nb'"),
    ],
)
def test_broken_files_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@patient
@given(st.text())
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        config_from_toml(text)


@patient
@given(st.sampled_from(sorted(keys())), TEXT)
def test_any_override_is_a_config_or_a_config_error(path: str, value: str) -> None:
    with suppress(ConfigError):
        load_config(None, [f"{path}={value}"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"[data]\ncorpus = '\xe9'")
    for path, message in [
        (tmp_path / "none.toml", "none.toml' does not exist"),
        (tmp_path, "is a folder; name a TOML file in it"),
        (tmp_path / "latin.toml", "latin.toml' is not UTF-8 at byte 17; save it as UTF-8"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(path)


def test_every_bound_of_the_schema_is_enforced_on_its_own_side() -> None:
    for path, key in keys().items():
        step = 1 if key.kind is int else 1e-9
        if key.low is not None:
            assert key.coerce(key.kind(key.low)) == key.low
            with pytest.raises(ConfigError, match=re.escape(path)):
                key.coerce(key.kind(key.low) - step)
        if key.high is not None:
            assert key.coerce(key.kind(key.high)) == key.high
            with pytest.raises(ConfigError, match=re.escape(path)):
                key.coerce(math.nextafter(key.high, math.inf) if key.kind is float else int(key.high) + 1)
        if key.above is not None:
            assert key.coerce(key.kind(key.above) + step) is not None
            with pytest.raises(ConfigError, match=re.escape(path)):
                key.coerce(key.kind(key.above))


@patient
@given(st.sampled_from(sorted(keys())), st.data())
def test_one_wrong_letter_finds_the_key(path: str, data: st.DataObject) -> None:
    leaf_start = path.rfind(".") + 1
    if len(path) - leaf_start < 4:
        return  # of a short name one letter is too much
    place = data.draw(st.integers(leaf_start, len(path) - 1))
    wrong = f"{path[:place]}ß{path[place + 1 :]}"
    if any(
        other != path and other[:place] + other[place + 1 :] == path[:place] + path[place + 1 :] for other in keys()
    ):
        return  # strategy.betaß is as near to beta1 as to beta2
    assert f"did you mean {path!r}?" in refusal(f"{wrong}=1")


@patient
@given(
    st.sampled_from(sorted(keys())),
    st.sampled_from(["data", "model", "privacy", "nowhere", "trainable.lora"]),
)
def test_a_key_in_the_wrong_section_is_found_by_its_name(path: str, section: str) -> None:
    leaf = path.rpartition(".")[2]
    if f"{section}.{leaf}" not in keys():
        assert re.search(rf"did you mean '([a-z_.]+\.)?{leaf}'\?", refusal(f"{section}.{leaf}=1"))


def test_describe_lists_every_key_once_with_what_changed() -> None:
    rows = {row["key"]: row for row in describe(load_config(None, ["seed=9"]))}
    assert list(rows) == [*keys(), *option_keys(Config())]
    assert rows["seed"] == {
        "key": "seed",
        "value": 9,
        "default": 1,
        "allowed": "a whole number >= 0",
        "help": "public; of everything but privacy noise and cohorts",
    }
