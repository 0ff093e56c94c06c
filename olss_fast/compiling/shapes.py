"""The shapes of noise that an engine is built for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from olss_fast.errors import InputError

Shape = tuple[int, ...]
MULTIPLE = 8  # most networks halve their images three times
BATCH = "batch"  # the name of the size of the first axis, where that is the number of samples
LARGEST = 2**31 - 1
DTYPES = ("float16", "bfloat16", "float32", "float64")  # of noise


@dataclass(frozen=True, init=False)
class Profile:
    """Shapes (B, …) of the noise: size s of axis i fits if min[i] <= s <= max[i] and multiple[i] divides it.

    The engine is compiled and measured at `opt`. An axis with min = max is fixed. `multiple` defaults to 1 for the
    batch and to the greatest common divisor of min, opt, max and 8 for other axes: networks that halve their images
    take no other sizes.

    Raises:
        InputError: shapes of different lengths or fewer than two axes, sizes below 1, not min <= opt <= max, or a
            multiple that does not divide all three.
    """

    min: Shape
    opt: Shape
    max: Shape
    multiple: Shape

    def __init__(
        self, min: Sequence[int], opt: Sequence[int], max: Sequence[int], multiple: Sequence[int] | None = None
    ) -> None:
        given = [_shape(name, each) for name, each in (("min", min), ("opt", opt), ("max", max))]
        if len({len(each) for each in given}) != 1:
            raise InputError(f"min, opt and max are {given[0]}, {given[1]} and {given[2]}; expected equally many axes")
        derived = (1, *(gcd(MULTIPLE, *sizes) for sizes in list(zip(*given, strict=True))[1:]))
        steps = derived if multiple is None else _shape("multiple", multiple)
        if len(steps) != len(given[0]):
            raise InputError(f"multiple is {steps}; expected {len(given[0])} numbers, one an axis")
        for axis, (least, usual, most, step) in enumerate(zip(*given, steps, strict=True)):
            if not least <= usual <= most or least % step or usual % step or most % step:
                raise InputError(
                    f"axis {axis} has min {least}, opt {usual}, max {most} in steps of {step}; expected "
                    "min <= opt <= max, all of them multiples of the step"
                )
        for name, value in zip(("min", "opt", "max", "multiple"), (*given, steps), strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, shapes: Profile | Sequence[int]) -> Profile:
        """The profile itself, or that of one fixed shape."""
        return shapes if isinstance(shapes, Profile) else cls(shapes, shapes, shapes)

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The axes that are not fixed."""
        return tuple(axis for axis, (least, most) in enumerate(zip(self.min, self.max, strict=True)) if least != most)

    def check(self, shape: Sequence[int]) -> None:
        """InputError that names the axis unless `shape` fits."""
        if len(shape) != len(self.min):
            raise InputError(f"noise has shape {tuple(shape)}; this engine takes {len(self.min)} axes, {self}")
        for axis, (size, least, most, step) in enumerate(zip(shape, self.min, self.max, self.multiple, strict=True)):
            if not least <= size <= most or size % step:
                raise InputError(
                    f"noise has shape {tuple(shape)}, and axis {axis} does not fit the engine's profile: expected "
                    f"{_sizes(least, most, step)}; build an engine with a wider profile for others"
                )

    def to_dict(self) -> dict[str, Any]:
        """The profile's entry in a manifest."""
        return {name: list(getattr(self, name)) for name in ("min", "opt", "max", "multiple")}

    def __str__(self) -> str:
        axes = zip(self.min, self.max, self.multiple, strict=True)
        return " × ".join(_sizes(*axis) for axis in axes)


def name_of(dtype: object) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def _sizes(least: int, most: int, step: int) -> str:
    if least == most:
        return str(least)
    return f"{least}…{most}" if step == 1 else f"{least}…{most} in steps of {step}"


def _shape(name: str, value: object) -> Shape:
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(sizes) < 2 or not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
        raise InputError(f"{name} is {value!r}; expected a shape (samples, ...) of whole numbers of at least 1")
    return sizes
