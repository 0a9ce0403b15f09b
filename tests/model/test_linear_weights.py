"""Packed matrices against numpy in float64, which reads the same codes by the format's definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.model.weights import Dense, Grouped

Float = npt.NDArray[np.float64]


def drawn(
    seed: int, bits: int, group: int, groups: int, outputs: int, *, zeros: bool, order: bool
) -> tuple[Grouped, Float]:
    """A random packed matrix, and its values ``[outputs, inputs]`` in the order of the inputs."""
    rng = np.random.default_rng(seed)
    inputs = group * groups
    scales = rng.uniform(0.01, 2, (outputs, groups)).astype(np.float32)
    if bits == 8:
        whole = rng.integers(-128, 128, (outputs, inputs))
        codes, zero = whole.astype(np.int8), np.zeros((outputs, groups), int)
    else:
        whole = rng.integers(0, 16, (outputs, inputs))
        codes = (whole[:, 0::2] + 16 * whole[:, 1::2]).astype(np.uint8)
        zero = rng.integers(0, 16, (outputs, groups)) if zeros else np.full((outputs, groups), 8)
    lying = (whole - np.repeat(zero, group, 1)) * np.repeat(scales.astype(np.float64), group, 1)
    places = rng.permutation(inputs) if order else np.arange(inputs)
    values = np.empty_like(lying)
    values[:, places] = lying
    packed = Grouped(
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        torch.from_numpy(zero.astype(np.uint8)) if zeros and bits == 4 else None,
        bits,
        group,
        outputs,
        inputs,
        torch.from_numpy(rng.standard_normal(outputs).astype(np.float32)),
        torch.from_numpy(places) if order else None,
    )
    return packed, values


@given(
    st.integers(0, 1 << 16),
    st.sampled_from([(8, 48), (8, 7), (4, 32), (4, 64), (4, 128)]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_values_and_products(
    seed: int, form: tuple[int, int], groups: int, outputs: int, zeros: bool, order: bool
) -> None:
    packed, values = drawn(seed, *form, groups, outputs, zeros=zeros, order=order)
    np.testing.assert_array_equal(packed.dequantize().numpy(), values.astype(np.float32))
    x = np.random.default_rng(seed + 1).standard_normal((3, packed.inputs))
    assert packed.bias is not None
    expected = x @ values.T + packed.bias.double().numpy()
    np.testing.assert_allclose(packed(torch.from_numpy(x).float()).numpy(), expected, rtol=1e-5, atol=1e-3)


def test_products_in_several_tiles_are_those_of_one_matrix() -> None:
    """More elements than a tile has."""
    packed, values = drawn(3, 4, 128, 64, 300, zeros=True, order=True)
    x = torch.randn(2, packed.inputs, generator=torch.Generator().manual_seed(1))
    assert packed.bias is not None
    expected = x.double().numpy() @ values.T + packed.bias.double().numpy()
    np.testing.assert_allclose(packed(x).numpy(), expected, rtol=1e-5, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    packed, values = drawn(5, 4, 32, 3, 17, zeros=True, order=True)
    assert torch.equal(packed.dequantize(dtype), torch.from_numpy(values).float().to(dtype))
    assert packed.bias is not None
    product = replace(packed, bias=packed.bias.to(dtype))(torch.ones(2, packed.inputs, dtype=dtype))
    assert product.dtype == dtype


def test_bytes_are_those_that_are_held() -> None:
    packed, _ = drawn(1, 4, 64, 2, 10, zeros=True, order=False)
    assert packed.nbytes == 10 * 128 // 2 + 10 * 2 * 4 + 10 * 2 + 10 * 4
    packed, _ = drawn(1, 8, 128, 1, 10, zeros=False, order=False)
    assert packed.nbytes == 10 * 128 + 10 * 4 + 10 * 4
    assert Dense(torch.ones(3, 4, dtype=torch.bfloat16)).nbytes == 24
