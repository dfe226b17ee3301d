"""The seam between a language model and its embedding tables.

A model is three tables (input rows, output rows, output bias) and a *body* in between. Training never
differentiates a whole table: it takes the few rows in play and calls `body(embed(rows))`, so a V x D gradient
never exists, and the tables can be views of memory that others own (a memory-mapped file, an object store).

Shape legend: V vocabulary, D model width, B batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlm.errors import DataError

# A linear module belongs to a group when one segment of its dotted path is in the group's set; beside the
# names of our own models, these are the names that Hugging Face's causal LMs use.
LINEAR_GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"attention", "attn", "self_attn", "self_attention"}),
    "mlp": frozenset({"mlp", "ffn", "feed_forward", "block_sparse_moe", "fc1", "fc2"}),
    "recurrent": frozenset({"cells", "mixer", "linear_attn", "temporal_block"}),
}


class LanguageModel(nn.Module, ABC):
    """A causal language model: frozen tables around a trainable body.

    The tables are buffers: never parameters, without gradient, left out of `state_dict()`
    (`fedlm.models.weights` has all weights by name). They may be views of read-only memory, so nobody writes
    into them in place; whoever trains rows replaces them with `set_tables`, or keeps the rows elsewhere.

    Arguments:
        input_table: Rows looked up for input tokens, (V, D).
        output_table: Rows scored against the hidden state, (V, D); None ties it to `input_table`.
        output_bias: Added to the logits, (V,), or None.
    """

    input_table: Tensor
    output_bias: Tensor | None

    def __init__(self, input_table: Tensor, output_table: Tensor | None, output_bias: Tensor | None) -> None:
        super().__init__()
        self.dropout_generator = torch.Generator()
        self.vocabulary_size, self.d_model = input_table.shape
        self.tied = output_table is None
        self.register_buffer("input_table", input_table.detach(), persistent=False)
        self.register_buffer("untied_table", _detached(output_table), persistent=False)
        self.register_buffer("output_bias", _detached(output_bias), persistent=False)

    @property
    def output_table(self) -> Tensor:
        """Rows scored against the hidden state, (V, D): the very tensor `input_table` when tied."""
        return self.input_table if self.tied else self.get_buffer("untied_table")

    def set_tables(
        self,
        *,
        input_table: Tensor | None = None,
        output_table: Tensor | None = None,
        output_bias: Tensor | None = None,
    ) -> None:
        """Replace tables by the given tensors themselves (no copy); None leaves a table as it is.

        Arguments:
            input_table: (V, D) float32.
            output_table: (V, D) float32; for an untied model only.
            output_bias: (V,) float32; for a model that has one only.

        Raises:
            DataError: A table that the model does not have, or another shape or type.
        """
        replacements = {
            "input_table": input_table,
            "untied_table": output_table,
            "output_bias": output_bias,
        }
        given = {name: table.detach() for name, table in replacements.items() if table is not None}
        for name, table in given.items():
            _check_replacement(name.replace("untied", "output"), self._buffers[name], table)
        for name, table in given.items():
            self.register_buffer(name, table, persistent=False)

    @staticmethod
    def empty_tables(vocabulary_size: int, d_model: int, *, tied: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return uninitialised tables (V, D), (V, D) or None, and (V,): reserved, untouched memory."""
        shape = (vocabulary_size, d_model)
        return torch.empty(shape), None if tied else torch.empty(shape), torch.empty(vocabulary_size)

    def initialise_tables(self, log_frequencies: Tensor, std: float, generator: torch.Generator) -> None:
        """Draw the rows from N(0, std^2) and set the output bias to `log_frequencies` (V,), in place."""
        for table in dict.fromkeys((self.input_table, self.output_table)):
            nn.init.normal_(table, std=std, generator=generator)
        assert self.output_bias is not None
        self.output_bias.copy_(log_frequencies)

    def seed_dropout(self, seed: int) -> None:
        """Fix the dropout masks to come; without dropout it has no effect."""
        self.dropout_generator.manual_seed(seed)

    @abstractmethod
    def body(self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Map embedded inputs to final hidden states (after the final norm), looking only to the left.

        Arguments:
            x: What `embed` returned, (B, T, D).
            mask: True at real tokens, (B, T); padding stands on the right, so causality alone keeps it out of
                every real position and a model is free to ignore the mask. None: no padding.
            noise: What `row_noise` returned for the same tokens; models without Re-Attention ignore it.

        Returns:
            (B, T, D); finite but meaningless at padding. Logits are `hidden @ output_table.T + output_bias`.
        """

    def embed(self, rows: Tensor) -> Tensor:
        """Turn looked-up rows of `input_table`, (..., D), into inputs of `body`, (..., D)."""
        return rows

    def row_noise(self, tokens: Tensor) -> Tensor | None:
        """Return the variance of the noise in the rows of `tokens` (B, T), (B, T); None: they are taken as exact.

        Only a transformer with Re-Attention and noise levels has any (`fedlm.models.re_attention.attention`).
        """
        return None

    def hidden(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, D) of `tokens` (B, T) with the model's own `input_table`."""
        rows = F.embedding(tokens, self.input_table)  # (B, T, D)
        return self.body(self.embed(rows), mask, self.row_noise(tokens))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Call `hidden`; no method gives logits, because (B, T, V) should not exist in training."""
        return self.hidden(tokens, mask)

    def body_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every tensor of the body that could train, with its name; the tables are not among them."""
        return self.named_parameters()

    def named_linear_targets(self, groups: Sequence[str]) -> list[str]:
        """Return the paths of the linear modules that adapters go to, in the order of the model.

        Arguments:
            groups: "attention", "mlp", "recurrent", or dotted endings of module paths ("qkv", "0.mlp.up").

        Returns:
            Full paths, each once; right for peft's `target_modules`.

        Raises:
            DataError: A group that matches no linear module of this model.
        """
        linears = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        return matching_linears(type(self).__name__, groups, linears)


def matching_linears(model: str, groups: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Return those of some linear modules that belong to groups, in their order; see `named_linear_targets`."""
    chosen: set[str] = set()
    for group in groups:
        matches = [name for name in linears if _matches(name, group)]
        if not matches:
            raise DataError(_no_match(model, group, linears))
        chosen.update(matches)
    return [name for name in linears if name in chosen]


def _detached(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.detach()


def _check_replacement(name: str, old: Tensor | None, new: Tensor) -> None:
    if old is None:
        raise DataError(f"{name} given, but the model has none of its own; leave it out")
    if new.shape != old.shape or new.dtype != old.dtype:
        found, wanted = (f"{tuple(table.shape)} {table.dtype}" for table in (new, old))
        raise DataError(f"{name} is {found}; the model takes {wanted}")


def _matches(name: str, group: str) -> bool:
    if group in LINEAR_GROUPS:
        return not LINEAR_GROUPS[group].isdisjoint(name.split("."))
    return f".{name}".endswith(f".{group}")


def _no_match(model: str, group: str, linears: Sequence[str]) -> str:
    groups = [known for known in LINEAR_GROUPS if any(_matches(name, known) for name in linears)]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    near = get_close_matches(group, [*groups, *endings, *linears], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"'{group}' matches no linear module of {model}; it has {', '.join([*groups, *endings])}{hint}"
