"""float8_e4m3fn from its definition, without torch's conversion or the kernels'."""

from __future__ import annotations

import torch

LARGEST = 448.0
NAN = 0x7F


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of codes from 0 to 255, in float64."""
    sign = torch.where(codes >= 128, -1.0, 1.0).double()
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).double()
    normal = (1 + mantissa / 8) * torch.pow(2.0, (exponent - 7).double())
    value = sign * torch.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return torch.where((codes & 127) == NAN, torch.nan, value)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Return the code nearest to each float64 value: ties to even, saturating, every NaN as 0x7f."""
    numbers = decode(torch.arange(NAN)).to(values.device)
    magnitude = values.abs().clamp(max=LARGEST).contiguous()
    above = torch.searchsorted(numbers, magnitude.nan_to_num(0.0)).clamp(max=NAN - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = numbers[above] - magnitude, magnitude - numbers[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = torch.where(take_below, below, above) | torch.where(torch.signbit(values), 128, 0)
    return torch.where(values.isnan(), NAN, code).to(torch.uint8)


def quotient(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `values / scale` rounded to float32, as float64.

    The quotient of two float32 numbers in float64, rounded to float32, is the correctly rounded one.
    """
    return (values.double() / scale.double()).float().double()


def codes(quantised: torch.Tensor) -> torch.Tensor:
    """Return the bytes of float8 numbers."""
    assert quantised.dtype == torch.float8_e4m3fn
    return quantised.contiguous().view(torch.uint8)


def neighbours(values: torch.Tensor, dtype: torch.dtype, reach: int = 3) -> torch.Tensor:
    """Return values in a dtype, each with the next `reach` numbers on both sides of it."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = values.to(dtype).view(integer)
    steps = torch.arange(-reach, reach + 1, dtype=integer)
    return (bits[:, None] + steps).flatten().view(dtype)


def ties() -> torch.Tensor:
    """Return every float8 number, the midpoints between them, and some numbers just beyond their range."""
    numbers = decode(torch.arange(NAN))
    return torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers, torch.tensor([464.0, 480.0, 512.0])]).float()


def check_operator(operator: torch._ops.OpOverload, arguments: tuple[object, ...]) -> None:
    """Run `torch.library.opcheck`, and check what the operator writes, which opcheck cannot compare in float8.

    Autograd must be able to notice it: the versions of exactly those arguments change.
    """
    torch.library.opcheck(
        operator, arguments, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    versions = [a._version if isinstance(a, torch.Tensor) else None for a in given]
    operator(*given)
    for declared, before, after, version in zip(operator._schema.arguments, arguments, given, versions, strict=True):
        if isinstance(before, torch.Tensor):
            assert (after._version != version) == declared.is_write, declared.name
            one, other = (t.reshape(-1).view(torch.uint8) for t in (before, after))
            assert torch.equal(one, other) != declared.is_write, declared.name
