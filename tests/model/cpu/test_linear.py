"""Packed linear layers compute what `nn.Linear` does, alone, side by side, and called one by one."""

import pytest
import torch
from torch import nn

from kvbaton.model.cpu.linear import PackedLinear, SharedInput, SharedInputMember, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no oneDNN kernels for bfloat16 here")


def linear(outputs: int, bias: bool, seed: int, inputs: int = 96) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=2**-7)


def test_float32_is_left_alone() -> None:
    assert not can_pack(torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 8, 33])
def test_one_layer(bias: bool, rows: int) -> None:
    layer, x = linear(40, bias, 1), torch.randn(rows, 96).bfloat16()
    packed = PackedLinear.of([layer])
    close(packed(x), layer(x))
    close(packed(x[None]), layer(x[None]))


def test_side_by_side_where_only_some_have_a_bias() -> None:
    layers = [linear(32, False, 1), linear(16, True, 2)]
    x = torch.randn(3, 96).bfloat16()
    close(PackedLinear.of(layers)(x), torch.cat([layer(x) for layer in layers], -1))


def test_members_of_a_shared_input() -> None:
    layers = [linear(32, False, 1), linear(16, False, 2), linear(16, False, 3)]
    shared = SharedInput(layers)
    members = [SharedInputMember(shared, index, layer) for index, layer in enumerate(layers)]
    first, second = torch.randn(2, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    for x in (first, second, first):
        for member, layer in zip(members, layers, strict=True):
            close(member(x), layer(x))
    # A forward pass that broke off after the first of them leaves nothing behind that a later one could take.
    members[0](first)
    close(members[1](second), layers[1](second))
    close(members[0](second), layers[0](second))


@pytest.mark.parametrize("x", [torch.ones(3, 192).bfloat16(), torch.ones(3, 48).bfloat16(), torch.ones(3, 96)])
def test_rows_of_another_kind_are_refused(x: torch.Tensor) -> None:
    # The kernel would take their memory for what it expects, and write beyond the result's.
    with pytest.raises(ValueError, match="rows of 96 bfloat16"):
        PackedLinear.of([linear(40, False, 1)])(x)


def test_rows_that_do_not_lie_in_order() -> None:
    layer, x = linear(40, False, 1), torch.randn(96, 5).bfloat16().t()
    close(PackedLinear.of([layer])(x), layer(x))
    close(PackedLinear.of([layer])(x[::2]), layer(x[::2]))
