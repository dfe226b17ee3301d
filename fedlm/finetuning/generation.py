"""Scores of a language model's examples: perplexity of the counted targets, and BLEU of greedy answers to prompts.

Perplexity is the exact full softmax's, per token of the vocabulary. BLEU is sacrebleu's (Post 2018, "A call for clarity
in reporting BLEU scores"), lower-cased, against all references of a prompt. Answers and references are both spelled by
the vocabulary, so a word-level one compares only with itself: it has neither case nor numbers.

Legend: B examples, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlm.data.batching import Batch
from fedlm.data.examples import TextRows
from fedlm.data.prompts import Ids, prompt_ids
from fedlm.data.vocabulary import Vocabulary
from fedlm.errors import DataError
from fedlm.losses.evaluation import Score, score
from fedlm.models.base import LanguageModel

CHUNK = 2048  # vocabulary entries at a time
_BATCH = 32  # answers that grow together


@torch.no_grad()
def perplexity(model: LanguageModel, examples: Batch, batch_size: int) -> float:
    """Return the perplexity of the targets that count.

    Raises:
        DataError: No target counts.
    """
    if not examples.num_targets:
        raise DataError("no held-out example has a target: its prompts fill finetune.max_length; raise that")
    model.eval()
    total = Score()
    # By length: batches are cut to their longest example, and padding costs time.
    order = np.argsort(examples.read.sum(1), kind="stable")
    for start in range(0, len(order), batch_size):
        batch = examples.select(order[start : start + batch_size])
        counted = torch.from_numpy(batch.mask)  # (B, T)
        hidden = model.hidden(torch.from_numpy(batch.inputs), torch.from_numpy(batch.read))[counted]  # (N, D)
        targets = torch.from_numpy(batch.targets)[counted]  # (N,)
        total += score(hidden, targets, model.output_table, model.output_bias, num_bytes=0, chunk=CHUNK)
    return total.perplexity


def bleu(model: LanguageModel, vocabulary: Vocabulary, rows: TextRows, num_prompts: int, max_length: int) -> float:
    """Return the BLEU of greedy answers to the first prompts, from 0 to 100.

    Arguments:
        model: The model.
        vocabulary: Its own.
        rows: Prompts with answers; equal prompts are one, with several references.
        num_prompts: Prompts that are answered, at most.
        max_length: Tokens of a prompt and its answer, at most.

    Raises:
        DataError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise DataError("finetune.samples needs sacrebleu; pip install fedlm[bleu], or set it to 0") from error
    references = _references(rows, num_prompts)
    prompts = [prompt_ids(prompt, vocabulary) for prompt in references]
    answers = [vocabulary.decode(ids).strip() for ids in greedy(model, prompts, vocabulary.boundary_id, max_length)]
    spelled = [[vocabulary.decode(vocabulary.encode(text)) for text in texts] for texts in references.values()]
    # One stream for each position in the lists of references; the empty text is no reference.
    streams = [list(texts) for texts in zip_longest(*spelled)]
    return float(BLEU(lowercase=True).corpus_score(answers, streams).score)


def greedy(model: LanguageModel, prompts: Sequence[Ids], end: int, max_length: int) -> list[list[int]]:
    """Return the most likely continuation of each prompt, token by token, without its end.

    Arguments:
        model: The model.
        prompts: Ids, at least one each.
        end: The token that ends a continuation.
        max_length: Tokens of prompt and continuation together, at most.
    """
    model.eval()
    answers: dict[int, list[int]] = {}
    # By length, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), _BATCH):
        some = order[start : start + _BATCH]
        answers.update(zip(some, _continue([prompts[i] for i in some], model, end, max_length), strict=True))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _continue(prompts: Sequence[Ids], model: LanguageModel, end: int, max_length: int) -> list[list[int]]:
    """Continue some prompts together; an answer that has ended leaves the batch."""
    lengths = np.array([min(len(prompt), max_length) for prompt in prompts])  # (B,)
    tokens = np.zeros((len(prompts), max_length), np.int64)  # (B, T)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = prompt[: lengths[row]]
    starts = lengths.copy()
    going = np.flatnonzero(lengths < max_length)  # (b,)
    while len(going):
        chosen = _next(model, tokens[going, : lengths[going].max()], lengths[going])  # (b,)
        going, chosen = going[chosen != end], chosen[chosen != end]
        tokens[going, lengths[going]] = chosen
        lengths[going] += 1
        going = going[lengths[going] < max_length]
    return [tokens[row, starts[row] : lengths[row]].tolist() for row in range(len(prompts))]


def _next(model: LanguageModel, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the most likely token after each text of (b, T) tokens, (b,)."""
    mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])  # (b, T)
    hidden = model.hidden(torch.from_numpy(tokens), mask)  # (b, T, D)
    last = hidden[torch.arange(len(tokens)), torch.from_numpy(lengths - 1)]  # (b, D)
    scores: Tensor = F.linear(last, model.output_table, model.output_bias)  # (b, V)
    return scores.argmax(1).numpy()


def _references(rows: TextRows, num_prompts: int) -> Mapping[str, list[str]]:
    """Return the answers of the first distinct prompts, in the file's order."""
    found: dict[str, list[str]] = {}
    for prompt, answer in rows.texts:
        if prompt in found or len(found) < num_prompts:
            found.setdefault(prompt, []).append(answer)
    return found
