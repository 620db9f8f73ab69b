"""float8_e4m3fn from its definition: not by torch's conversion, nor by the kernels'."""

from __future__ import annotations

import torch

LARGEST = 448.0
NAN = 0x7F


def decode(codes: torch.Tensor) -> torch.Tensor:
    """What codes from 0 to 255 stand for, in float64."""
    sign = torch.where(codes >= 128, -1.0, 1.0).double()
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).double()
    normal = (1 + mantissa / 8) * torch.pow(2.0, (exponent - 7).double())
    value = sign * torch.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return torch.where((codes & 127) == NAN, torch.nan, value)


def encode(values: torch.Tensor) -> torch.Tensor:
    """The code nearest to each float64 value: ties to the even one, saturating, every NaN as 0x7f."""
    numbers = decode(torch.arange(NAN)).to(values.device)
    magnitude = values.abs().clamp(max=LARGEST).contiguous()
    above = torch.searchsorted(numbers, magnitude.nan_to_num(0.0)).clamp(max=NAN - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = numbers[above] - magnitude, magnitude - numbers[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = torch.where(take_below, below, above) | torch.where(torch.signbit(values), 128, 0)
    return torch.where(values.isnan(), NAN, code).to(torch.uint8)


def quotient(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values / scale` as float32 rounds it, in float64: of two floats, float64's quotient rounds to the same."""
    return (values.double() / scale.double()).float().double()


def codes(quantised: torch.Tensor) -> torch.Tensor:
    assert quantised.dtype == torch.float8_e4m3fn
    return quantised.contiguous().view(torch.uint8)


def neighbours(values: torch.Tensor, dtype: torch.dtype, reach: int = 3) -> torch.Tensor:
    """Values in a dtype with the next ones on both sides of each."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = values.to(dtype).view(integer)
    steps = torch.arange(-reach, reach + 1, dtype=integer)
    return (bits[:, None] + steps).flatten().view(dtype)


def ties() -> torch.Tensor:
    """Every number half way between two codes, what saturates next, and the numbers themselves."""
    numbers = decode(torch.arange(NAN))
    return torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers, torch.tensor([464.0, 480.0, 512.0])]).float()


def check_operator(operator: torch._ops.OpOverload, arguments: tuple[object, ...]) -> None:
    """`torch.library.opcheck`, whose look at what is written cannot compare float8; that look, and whether
    autograd could notice what is written."""
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
