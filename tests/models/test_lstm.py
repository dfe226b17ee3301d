"""The LSTM against torch's own."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCABULARY, ModelMaker
from torch import nn

from fedlm.models.lstm import LstmLayer, LstmModel


@pytest.mark.parametrize(("d_hidden", "num_layers"), [(16, 1), (12, 3), (20, 2)])
def test_outputs_and_gradients_equal_torch(make_model: ModelMaker, d_hidden: int, num_layers: int) -> None:
    model = make_model("lstm", d_hidden=d_hidden, num_layers=num_layers)
    assert isinstance(model, LstmModel)
    reference = nn.LSTM(16, d_hidden, num_layers, batch_first=True)
    with torch.no_grad():
        for layer, cell in enumerate(model.cells):
            assert isinstance(cell, LstmLayer)
            cell.input.weight.copy_(getattr(reference, f"weight_ih_l{layer}"))
            cell.recurrent.weight.copy_(getattr(reference, f"weight_hh_l{layer}"))
            both = getattr(reference, f"bias_ih_l{layer}") + getattr(reference, f"bias_hh_l{layer}")
            cell.input.bias.copy_(both)
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(1))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    found = model.body(ours)
    wanted = model.projection(reference(theirs)[0])
    torch.testing.assert_close(found, wanted)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(direction)
    (wanted_gradient,) = torch.autograd.grad(wanted, theirs, direction, retain_graph=True)
    torch.testing.assert_close(ours.grad, wanted_gradient)
    for layer, cell in enumerate(model.cells):
        assert isinstance(cell, LstmLayer)
        pairs = {
            "weight_ih": cell.input.weight,
            "weight_hh": cell.recurrent.weight,
            "bias_ih": cell.input.bias,
        }
        for name, parameter in pairs.items():
            expected = torch.autograd.grad(
                wanted, getattr(reference, f"{name}_l{layer}"), direction, retain_graph=True
            )[0]
            torch.testing.assert_close(parameter.grad, expected)


def test_forget_gates_start_open(make_model: ModelMaker) -> None:
    model = make_model("lstm")
    assert isinstance(model, LstmModel)
    for cell in model.cells:
        assert isinstance(cell, LstmLayer)
        bias = cell.input.bias.view(4, -1)  # (input, forget, cell, output; H)
        assert torch.equal(bias.sum(1), torch.tensor([0.0, cell.d_hidden, 0.0, 0.0]))


def test_projection_exists_only_where_widths_differ(make_model: ModelMaker) -> None:
    names = {width: dict(make_model("lstm", d_hidden=width).body_parameters()) for width in (0, 12)}
    assert "projection.weight" not in names[0]
    assert names[12]["projection.weight"].shape == (16, 12)
    assert make_model("lstm").hidden(torch.arange(VOCABULARY)[None]).shape == (1, VOCABULARY, 16)
