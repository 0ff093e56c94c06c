"""Networks whose code asks how large its input is: one graph where the answer changes no value, else refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from olss_fast import Profile
from olss_fast.compiling.export import export
from olss_fast.errors import BuildError

SHAPES = Profile((1, 2, 8), (4, 2, 8), (100, 2, 8))


class Asking(nn.Module):
    """A network that looks at its input first."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.look, self.mix = look, nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.look(x))) + time[:, None, None]


def exported(look: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    network = Asking(look).eval()
    return export(network, (torch.randn(4, 2, 8), torch.ones(4)), [], SHAPES, doubled=False)


@pytest.mark.parametrize("batch", [1, 63, 64, 100])
def test_copies_from_some_size_on_leave_the_graph_as_it_is(batch: int) -> None:
    network = Asking(lambda x: x.contiguous() if x.shape[0] >= 64 else x).eval()
    program = export(network, (torch.randn(4, 2, 8), torch.ones(4)), [], SHAPES, doubled=False).module()
    inputs = torch.randn(batch, 2, 8), torch.rand(batch)
    assert torch.equal(program(*inputs), network(*inputs))


def doubled_from_64_on(x: Tensor) -> Tensor:
    return 2 * x if x.shape[0] >= 64 else x


def refused_from_64_on(x: Tensor) -> Tensor:
    if x.shape[0] >= 64:
        raise ValueError("too many")
    return x


@pytest.mark.parametrize("look", [doubled_from_64_on, refused_from_64_on])
def test_other_values_from_some_size_on_are_refused_by_name(look: Callable[[Tensor], Tensor]) -> None:
    line = rf"s\d+ >= 64 \({__file__}, line \d+\)"
    with pytest.raises(BuildError, match=rf"for noise of 1…100 × 2 × 8: it computes something else where .*{line}"):
        exported(look)


def test_the_opposite_answer_is_not_what_a_network_of_fewer_sizes_is_asked_for() -> None:
    """Within the profile there is but one answer, and no second trace."""
    network = Asking(doubled_from_64_on).eval()
    within = Profile((1, 2, 8), (4, 2, 8), (63, 2, 8))
    export(network, (torch.randn(4, 2, 8), torch.ones(4)), [], within, doubled=False)


def test_sizes_that_the_code_fixes_are_named_without_guards() -> None:
    with pytest.raises(BuildError, match=r"its code works for fewer sizes than these, batch = 4: build") as caught:
        exported(lambda x: x.reshape(4, 2, 8))
    assert "guard" not in str(caught.value)
