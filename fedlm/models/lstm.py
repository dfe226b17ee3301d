"""An LSTM language model (Hochreiter and Schmidhuber 1997; forget gates by Gers et al. 2000).

`torch.nn.LSTM` keeps its weights where adapters cannot reach them. This one is made of linear modules:
`input` meets all time steps in one product, `recurrent` one step at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedlm.models.base import LanguageModel
from fedlm.models.layers import Dropout, empty_linear

_ROW_STD = 0.1  # rows enter the gates without a norm, so they must be large enough to drive them


class LstmModel(LanguageModel):
    """Stacked LSTM layers and an output bias; uninitialised until `initialise`.

    Arguments:
        vocabulary_size: V.
        d_model: Width D of the embedding rows.
        d_hidden: Width H of the layers; when it is not D, a linear `projection` maps the last layer back.
        num_layers: Layers, each on the one below, without residual connections.
        dropout: Rate on each layer's input and on the last layer's output.
        tied: Input and output embedding are one table.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        d_model: int,
        d_hidden: int,
        num_layers: int,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__(*self.empty_tables(vocabulary_size, d_model, tied=tied))
        self.dropout = Dropout(dropout, self.dropout_generator)
        widths = [d_model, *[d_hidden] * (num_layers - 1)]
        self.cells = nn.ModuleList(LstmLayer(width, d_hidden) for width in widths)
        self.projection = nn.Identity() if d_hidden == d_model else empty_linear(d_hidden, d_model)

    def body(self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Map embedded inputs (B, T, D) to hidden states (B, T, D); see `LanguageModel.body`."""
        for cell in self.cells:
            x = cell(self.dropout(x))  # (B, T, H)
        return self.projection(self.dropout(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def initialise(self, log_frequencies: Tensor, generator: torch.Generator) -> None:
        """Draw all weights: uniform in +-1/sqrt(fan-in), forget bias 1; it starts as the unigram model.

        Arguments:
            log_frequencies: The output bias, (V,).
            generator: The only source of randomness.
        """
        self.initialise_tables(log_frequencies, _ROW_STD, generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for cell in self.cells:
            assert isinstance(cell, LstmLayer)
            cell.input.bias[cell.d_hidden : 2 * cell.d_hidden] = 1.0


class LstmLayer(nn.Module):
    """One LSTM layer from a zero state; gates stand in torch's order: input, forget, cell, output.

    Arguments:
        d_input: Width of the input.
        d_hidden: H.
    """

    def __init__(self, d_input: int, d_hidden: int) -> None:
        super().__init__()
        self.d_hidden = d_hidden
        self.input = empty_linear(d_input, 4 * d_hidden)
        self.recurrent = empty_linear(d_hidden, 4 * d_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d_input) to (B, T, H)."""
        state = memory = x.new_zeros(x.shape[0], self.d_hidden)  # (B, H)
        states = []
        for from_input in self.input(x).unbind(1):  # T times (B, 4H)
            i, f, g, o = (from_input + self.recurrent(state)).chunk(4, dim=-1)  # (B, H) each
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()  # (B, H)
            state = o.sigmoid() * memory.tanh()  # (B, H)
            states.append(state)
        return torch.stack(states, dim=1)  # (B, T, H)
