"""Options and error handling shared by the commands of `olss-fast`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer

from olss_fast.errors import InputError, OlssError
from olss_fast.support.arguments import MAX_EVALUATIONS, check_count

BAD_INPUT = 2
INTERRUPTED = 130
LARGEST_SEED = 2**63 - 1
MOST_SAMPLES = 1_000_000
P = ParamSpec("P")
R = TypeVar("R")

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="FOLDER", help="A local diffusers folder, or 'demo'.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Text, one prompt a line (# for comments), taken in turn."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="With --prompts: float32, float16 or bfloat16. Default: by device."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="'cpu', 'cuda', 'cuda:1'. Default: a GPU if there is one."),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", "-g", help="1 is none. Default: the plan's, else the model's own (demo: its own)."
    ),
]
NullClassOption = Annotated[
    int | None, typer.Option("--null-class", help="The label for 'no class' that a model was trained with.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for plans, report and pictures.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the noise.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples at once.")]
TeacherOption = Annotated[
    int | None,
    typer.Option(
        "--teacher-steps", min=1, max=MAX_EVALUATIONS, help="NFE of a DDIM teacher. Default: a measured teacher."
    ),
]
TeacherModelOption = Annotated[
    str | None,
    typer.Option(
        "--teacher-model",
        metavar="FOLDER",
        help="The network whose samples are the aim, if not --model itself: the full one of a distilled or pruned one.",
    ),
]
OrderOption = Annotated[int | None, typer.Option("--order", min=1, help="Order of the solver.")]
SpacingOption = Annotated[str | None, typer.Option("--spacing", metavar="NAME", help="Time spacing of the solver.")]
VariantOption = Annotated[str | None, typer.Option("--variant", metavar="NAME", help="Variant of the solver.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def named_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Bad input ends in one clear message and exit code 2, Ctrl-C in one word and 130, neither with a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            kept = "; the same command with the same --store goes on from here" if kwargs.get("store") else ""
            typer.secho(f"Interrupted{kept}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (OlssError, OSError) as error:
            fail(str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail("out of memory: lower --batch-size, --samples or --count, or use another --device")

    return run


def out_of_memory(error: Exception) -> bool:
    """True for out-of-memory errors of NumPy, and of torch on GPU or CPU (by name, without importing torch)."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def fail(message: str) -> NoReturn:
    """Print the error and exit with code 2."""
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(BAD_INPUT)


def parse_scales(text: str) -> list[float]:
    """ "5,7.5,10" as positive numbers."""
    try:
        scales = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        scales = []
    if not scales or not all(0.0 < scale < float("inf") for scale in scales):
        raise InputError(f"--guidance-range is {text!r}: expected positive numbers, such as 5,7.5,10")
    return scales


def parse_steps(text: str, option: str = "--steps") -> list[int]:
    """ "4,5,6" or "4 5 6" as numbers of network evaluations."""
    numbers = parse_numbers(text, option, least=1)
    check_count(max(numbers), f"{option} holds")
    return numbers


def parse_numbers(text: str, option: str, *, least: int) -> list[int]:
    """ "4,5,6" or "4 5 6" as numbers of at least `least`."""
    try:
        numbers = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise InputError(f"{option} is {text!r}: expected whole numbers of at least {least}, such as 5 or 4,5,8")
    return numbers
