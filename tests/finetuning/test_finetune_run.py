"""A whole fine-tuning job: what it promises, what it learns, what it writes, and how it is interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_words
from fedlm.errors import ConfigError, DataError, Interrupted, OutputError
from fedlm.finetuning.generation import bleu, greedy, perplexity
from fedlm.finetuning.run import FinetuneSummary, finetune, make_plan
from fedlm.finetuning.workloads import LanguageWorkload
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model

WORDS = ("=", ">", "a", "b", "c", "d", "e", "f")
SMALL = [
    "vocabulary.size=600", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "data.sequence_length=24",
    "model.base='random'", "trainable.dense=['*']", "trainable.lora.rank=0", "trainable.embedding_rows.count=0",
    "loss.kind='full_softmax'", "pretrain.negatives=100", "loss.negatives=100", "finetune.max_length=24",
    "finetune.batch_size=20", "finetune.epochs=2", "finetune.learning_rate=0.01",
]  # fmt: skip
PRIVATE = ["finetune.example_dp.enabled=true", "finetune.example_dp.epsilon=8", "finetune.example_dp.delta=0.001"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Prompts whose answer repeats them: a job that is learned within a few steps."""
    pairs = [f"{word},the {word} is {word}" for word in ("red", "blue", "green", "white")]
    (tmp_path / "train.csv").write_text("mr,ref\n" + "\n".join(pairs * 25) + "\n")
    (tmp_path / "test.csv").write_text("mr,ref\n" + "\n".join(pairs) + "\nred,red it is\n")
    return [f"finetune.train='{tmp_path / 'train.csv'}'", f"finetune.test='{tmp_path / 'test.csv'}'"]


def run(path: Path, *overrides: str, events: list[dict[str, object]] | None = None) -> FinetuneSummary:
    return finetune(load_config(None, [*SMALL, *overrides]), path, (events if events is not None else []).append)


def test_a_private_run_keeps_its_promise_and_its_folder(tmp_path: Path, files: list[str]) -> None:
    events: list[dict[str, object]] = []
    summary = run(tmp_path / "run", *files, *PRIVATE, "finetune.samples=4", events=events)
    assert summary.epsilon is not None
    assert 7.5 < summary.epsilon <= 8 * (1 + 1e-4)
    assert summary.noise_multiplier > 0
    assert (summary.steps, summary.num_examples) == (10, 100)
    assert summary.stamps == ()
    assert summary.accuracy is None
    assert summary.perplexity is not None
    assert summary.bleu is not None
    folder = tmp_path / "run"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert json.loads((folder / "summary.json").read_text())["epsilon"] == summary.epsilon
    assert json.loads((folder / "plan.json").read_text())["privacy_statement"] == summary.privacy_statement
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["perplexity"], lines[-1]["perplexity"]) == (summary.perplexity_initial, summary.perplexity)
    # Whatever a line says beyond the guarantee says so by its name.
    public = {"phase", "step", "release_norm", "noise_norm", "epsilon_at_least", "stamps", "seconds", "perplexity"}
    assert all(name in public or name.startswith("non_private_") for line in lines for name in line)
    trained = load_file(folder / "weights" / "trained.safetensors")
    assert sum(tensor.numel() for tensor in trained.values()) == summary.num_trained == summary.update_bytes // 4
    assert [event["step"] for event in events if event["event"] == "finetune"] == list(range(1, 11))
    with pytest.raises(OutputError, match="not an empty folder"):
        run(folder, *files)


def test_without_privacy_it_learns_and_says_that_it_is_not_private(tmp_path: Path, files: list[str]) -> None:
    everything = ["finetune.embeddings=true", "finetune.epochs=16", "finetune.samples=4"]
    summary = run(tmp_path / "run", *files, *everything)
    assert summary.epsilon is None
    assert "NOT PRIVATE" in summary.stamps[0]
    assert summary.perplexity is not None
    assert summary.perplexity_initial is not None
    assert summary.perplexity < 5 < summary.perplexity_initial
    assert summary.bleu is not None
    assert summary.bleu > 50


def test_an_epsilon_with_a_delta_above_one_example_in_n_is_never_told_without_its_stamp(
    tmp_path: Path, files: list[str]
) -> None:
    events: list[dict[str, object]] = []
    more = ("finetune.example_dp.delta=0.01", "trainable.lora.rank=2", "finetune.epochs=0.3")  # of 100 examples
    summary = run(tmp_path / "run", *files, *PRIVATE, *more, events=events)
    (stamp,) = summary.stamps
    assert stamp.startswith("weak guarantee: ")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spent = [line for line in [*lines, *events] if {"epsilon", "epsilon_at_least"} & line.keys()]
    assert len(spent) >= 2
    assert all(list(line["stamps"]) == [stamp] for line in spent)
    weights = tmp_path / "run" / "weights"
    for folder in (weights, weights / "adapter"):
        assert f"{stamp}." in (folder / "README.md").read_text()
        assert json.loads((folder / "privacy.json").read_text())["privacy_statement"] == summary.privacy_statement

    def interrupt(event: dict[str, object]) -> None:
        if event["event"] == "finetune":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"\[weak guarantee\] was spent on them"):
        finetune(load_config(None, [*SMALL, *files, *PRIVATE, *more]), tmp_path / "interrupted", interrupt)


def test_two_phases_compose_and_save_what_trained_in_either(tmp_path: Path, files: list[str]) -> None:
    phases = ["finetune.full_epochs=1", "finetune.epochs=1", "trainable.dense=[]", "trainable.lora.rank=2"]
    base = save_small_base(tmp_path / "base")
    summary = run(tmp_path / "run", *files, *PRIVATE, *phases, f"model.base='{base}'")
    assert summary.steps == 10
    assert summary.epsilon is not None
    assert summary.epsilon <= 8 * (1 + 1e-4)
    trained = load_file(tmp_path / "run" / "weights" / "trained.safetensors")
    assert {"input_table", "output_bias", "blocks.0.attention.qkv.weight", "positions.weight"} <= trained.keys()
    adapter = load_file(tmp_path / "run" / "weights" / "adapter" / "adapter_model.safetensors")
    assert summary.num_trained == sum(tensor.numel() for tensor in adapter.values())
    before = load_file(base / "model.safetensors")
    assert not torch.equal(before["blocks.0.attention.qkv.weight"], trained["blocks.0.attention.qkv.weight"])


def save_small_base(folder: Path) -> Path:
    from fedlm.data.vocabulary_source import load_vocabulary
    from fedlm.models.weights import weights
    from fedlm.pretraining.cache import save_base

    config = load_config(None, [*SMALL, f"model.base='{folder}'"])
    return save_base(config, weights(build_model(config, load_vocabulary(config).frequencies, 1)), {})


def test_steps_of_a_plan_are_epochs_times_examples_over_batch() -> None:
    config = load_config(None, ["finetune.batch_size=64", "finetune.epochs=2", "finetune.full_epochs=0.5"])
    assert [phase.steps for phase in make_plan(config, 1000).phases] == [8, 31]


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path, files: list[str]) -> None:
    for overrides, message in [
        ([], r"finetune\.train names no file"),
        ([*files, "finetune.batch_size=101"], "101"),
        ([*files, "finetune.example_dp.enabled=true"], "epsilon"),
        (["finetune.train='/no/such.csv'"], "cannot read"),
    ]:
        with pytest.raises((ConfigError, DataError), match=message):
            run(tmp_path / "run", *overrides)
        assert not (tmp_path / "run").exists()
    for overrides, message in [
        ([*files, "finetune.max_length=25"], "24 positions"),
        ([files[0], "finetune.samples=3"], r"give finetune\.test"),
        ([*files, "finetune.task=classification"], "takes an encoder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(None, [*SMALL, *overrides])


def test_an_interrupted_run_says_what_was_lost(tmp_path: Path, files: list[str]) -> None:
    def stop(event: dict[str, object]) -> None:
        if event.get("step") == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"after step 3 of 10; .* lost; epsilon [\d.]+ was spent"):
        finetune(load_config(None, [*SMALL, *files, *PRIVATE]), tmp_path / "run", stop)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert not (tmp_path / "run" / "weights").exists()


def test_a_prompt_is_read_but_not_predicted(tmp_path: Path, files: list[str]) -> None:
    """The loss counts the answer alone, and depends on the prompt."""
    from fedlm.example_dp.per_example_gradients import PerExampleGradients

    workload = LanguageWorkload(load_config(None, [*SMALL, *files]), lambda event: None)
    task, batch = workload.task(everything=True), workload.examples.batch(np.array([0]))
    assert batch.present is not None
    assert batch.mask.sum() == 5  # the red is red <s>
    other = replace(batch, inputs=batch.inputs.copy())
    other.inputs[0, 1] += 1  # of the prompt
    with torch.no_grad():
        for parameter in task.trained.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert task.losses(batch, PerExampleGradients(1)) != task.losses(other, PerExampleGradients(1))
    model = workload.model
    hidden = model.hidden(torch.from_numpy(batch.inputs))
    logits = (hidden @ model.output_table.T + model.output_bias)[0]
    counted = torch.from_numpy(batch.mask[0])
    wanted = torch.nn.functional.cross_entropy(logits[counted], torch.from_numpy(batch.targets[0])[counted])
    torch.testing.assert_close(task.losses(batch, PerExampleGradients(1))[0], wanted, rtol=1e-5, atol=1e-6)
    assert perplexity(model, batch, 1) == pytest.approx(float(wanted.detach().exp()), rel=1e-5)


@pytest.fixture(scope="module")
def small() -> tuple[LanguageModel, Vocabulary]:
    vocabulary = vocabulary_from_words(WORDS, np.full(len(WORDS) + 3, 1.0), "test")
    config: Config = load_config(None, [option for option in SMALL if "size=600" not in option])
    model = build_model(config, vocabulary.frequencies, 3).eval()
    with torch.no_grad():
        model.set_tables(input_table=torch.randn(model.input_table.shape, generator=torch.Generator().manual_seed(2)))
    return model, vocabulary


def test_greedy_is_the_plain_loop_for_one_prompt_at_a_time(small: tuple[LanguageModel, Vocabulary]) -> None:
    model, _ = small
    prompts = [np.array(ids, np.int32) for ids in ([1, 4, 5], [1], [1, 6, 7, 8, 9], [1, 3, 3])]
    wanted = []
    for prompt in prompts:
        ids = prompt.tolist()
        while len(ids) < 12:
            with torch.no_grad():
                last = model.hidden(torch.tensor([ids]))[0, -1] @ model.output_table.T + model.output_bias
            if int(last.argmax()) == 1:
                break
            ids.append(int(last.argmax()))
        wanted.append(ids[len(prompt) :])
    assert greedy(model, prompts, 1, 12) == wanted
    assert any(wanted)


def test_bleu_of_the_answers_themselves_is_a_hundred(small: tuple[LanguageModel, Vocabulary]) -> None:
    from fedlm.data.examples import TextRows
    from fedlm.data.prompts import prompt_ids

    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed; pip install fedlm[bleu]")
    model, vocabulary = small
    prompts = ["a b", "c d e"]
    answers = [vocabulary.decode(ids) for ids in greedy(model, [prompt_ids(p, vocabulary) for p in prompts], 1, 20)]
    assert all(len(answer.split()) >= 4 for answer in answers)
    rows = [(prompts[0], "f f f f f"), (prompts[0], answers[0]), (prompts[1], answers[1]), ("f", "not asked for")]
    assert bleu(model, vocabulary, TextRows(("mr", "ref"), rows), 2, 20) == pytest.approx(100)
