"""The commands of engine files: `olss-fast build`, `validate` and `bench`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

import olss_fast
from olss_fast.cli import options
from olss_fast.errors import EngineFileError, InputError, OlssError

SOLVER = {"solver": "unipc", "order": 3, "variant": "bh1"}  # among the best analytic solvers at low NFE
DTYPES = ("float32", "float16", "bfloat16", "float64")
PROGRAM = (
    "It is a program: whoever loads it runs its machine code. Load only files that you built yourself, or whose sha256 "
    "you have from somebody you trust."
)
DigestOption = Annotated[
    str | None, typer.Option("--sha256", metavar="DIGITS", help="That the file ought to have, as sha256sum prints it.")
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="An engine file.")]
PlaceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="'cpu', 'cuda', 'cuda:1'. Default: what it was built for."),
]


@options.named_errors
def build(
    model: options.ModelOption,
    steps: Annotated[
        str | None, typer.Option("--steps", "-s", metavar="LIST", help="NFE of an analytic solver; a plan for each.")
    ] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", "-p", metavar="FILE", help="Plans of your own; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The engine file.")] = Path("engine.olss"),
    batch: Annotated[
        str, typer.Option("--batch", "-b", metavar="LIST", help="Samples at once: least,usual,most; or one number.")
    ] = "1,4,16",
    solver: Annotated[
        str | None, typer.Option("--solver", metavar="NAME", help="With --steps. Default: unipc of order 3, bh1.")
    ] = None,
    order: options.OrderOption = None,
    spacing: options.SpacingOption = None,
    variant: options.VariantOption = None,
    guidance_scale: options.GuidanceOption = None,
    null_class: options.NullClassOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="float32 (default), float16, bfloat16 or float64.")
    ] = None,
    device: options.DeviceOption = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile anew, and keep nothing.")] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Compile a model ahead of time into one file with its plans, to sample from without the model's code.

    The first plan is the one that the engine runs where none is named.

    Examples:

    - `olss-fast build --model demo --steps 5,8 --out demo.olss`
    - `olss-fast build --model path/to/folder --plan tuned/plans/olss-5.safetensors --batch 1,8,32 --out tuned.olss`
    """
    given = {"solver": solver, "order": order, "spacing": spacing, "variant": variant}
    settings = {name: value for name, value in given.items() if value is not None}
    if steps is None and (not plans or settings):
        raise InputError("give --steps LIST of an analytic solver, or --plan FILE, or both")
    nfes = [] if steps is None else options.parse_steps(steps)
    batches = _batches(batch)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    begin = time.perf_counter()
    from olss_fast.cli import jobs
    from olss_fast.engine import describe
    from olss_fast.support.folders import make_folder

    loaded = [olss_fast.Plan.load(path) for path in plans or []]
    _check_target(out)
    subject = jobs.NetworkSubject(
        model=model, device=device, null_class=null_class, guidance_scale=guidance_scale, progress=not quiet
    )
    chosen = settings if solver is not None else {**SOLVER, **settings}
    every = [subject.plan(each, {}) for each in loaded]
    every += [subject.plan(None, {**chosen, "steps": nfe}) for nfe in nfes]
    engine = subject.build_engine(every, batches, dtype=dtype, cache=not no_cache)
    make_folder(out.parent)
    engine.save(out)
    took, compiling = time.perf_counter() - begin, engine.manifest.facts["measured"]["seconds_to_compile"]
    known = f"; the code, {compiling:.0f} s of compiling, was there from an earlier build" if took < compiling else ""
    typer.echo(describe.inspected(out))
    typer.echo(f"\n{out} has {out.stat().st_size / 1e6:.1f} MB and took {took:.1f} s{known}")


def _batches(text: str) -> list[int]:
    """ "1,4,16" or "4" as least, usual and most."""
    numbers = options.parse_numbers(text, "--batch", least=1)
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3 or numbers != sorted(numbers):
        raise InputError(f"--batch is {text!r}: expected least,usual,most, such as 1,4,16, or one number")
    return numbers


def _check_target(out: Path) -> None:
    """InputError if no file can be written there, before minutes are spent on building it."""
    from olss_fast.support.folders import try_folder

    try_folder(out.parent)
    if out.is_dir():
        raise InputError(f"--out is {out}, a folder: name a file in it, such as {out / 'engine.olss'}")


@options.named_errors
def validate(
    file: FileArgument,
    device: PlaceOption = None,
    sha256: DigestOption = None,
    run: Annotated[bool, typer.Option("--run", help="Also load it, which runs its code, and sample once.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Is an engine file whole, and does it fit this machine? All that is wrong is named, and the exit code is 2 then.

    None of its code is run without `--run`. An engine file is a program: being whole says nothing about who wrote it.

    Examples:

    - `olss-fast validate demo.olss`
    - `olss-fast validate demo.olss --sha256 "$(cut -d' ' -f1 demo.olss.sha256)"`
    - `olss-fast validate demo.olss --run --device cuda:1`
    """
    problems = _problems(file, device, sha256, run)
    if as_json:
        typer.echo(json.dumps({"file": str(file), "usable": not problems, "problems": problems}, indent=1))
    elif problems:
        typer.secho("\n".join(f"Error: {each}" for each in problems), fg=typer.colors.RED, err=True)
    else:
        from olss_fast.engine.manifest import FORMAT
        from olss_fast.support.container import file_sha256

        typer.echo(f"{file} is whole and fits this machine" + (", and it samples" if run else ""))
        typer.echo(f"sha256 {file_sha256(file, FORMAT)}\n{PROGRAM}")
    if problems:
        raise typer.Exit(options.BAD_INPUT)


def _problems(file: Path, device: str | None, sha256: str | None, run: bool) -> list[str]:
    from olss_fast.engine.engine import load_engine, warm_up
    from olss_fast.engine.machine import mismatches
    from olss_fast.engine.verifying import verified

    try:
        facts = verified(file, sha256).manifest.facts
    except EngineFileError as error:
        return [str(error)]
    found = mismatches(facts["built_with"], facts["machine"], device)
    if run and not found:
        try:
            warm_up(load_engine(file, device=device, sha256=sha256))
        except OlssError as error:
            return [str(error)]
    return found


@options.named_errors
def bench(
    file: FileArgument,
    steps: Annotated[int | None, typer.Option("--steps", "-s", min=1, help="The plan with that NFE.")] = None,
    plan: Annotated[str | None, typer.Option("--plan", "-p", metavar="NAME", help="The plan of that name.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", "-b", min=1, help="Samples at once.")] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Calls that do not count.")] = 3,
    iterations: Annotated[int | None, typer.Option("--iterations", "-n", min=1, help="Calls that do.")] = None,
    duration: Annotated[float, typer.Option("--duration", min=0.0, help="Or how many seconds of them.")] = 5.0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of the processor. Default: torch's.")] = None,
    device: PlaceOption = None,
    sha256: DigestOption = None,
    as_csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write every call.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write figures and calls.")] = None,
    quiet: options.QuietOption = False,
) -> None:
    """Time an engine: latency, throughput, memory, and what the loop costs beyond its network calls.

    Every call is timed in turns with its network calls alone. Runs the file's code.

    Examples:

    - `olss-fast bench demo.olss`
    - `olss-fast bench demo.olss --steps 8 --batch 1 --iterations 100 --threads 1 --csv calls.csv`
    """
    for path in (as_csv, as_json):
        if path is not None:
            _check_target(path)
    from olss_fast.engine.describe import aligned
    from olss_fast.engine.timing import time_engine

    found = time_engine(
        file,
        device=device,
        sha256=sha256,
        steps=steps,
        plan=plan,
        batch=batch,
        threads=threads,
        warmup=warmup,
        iterations=iterations,
        duration=duration,
        progress=not quiet,
    )
    typer.echo("\n".join(aligned(found.rows())))
    if as_csv is not None:
        found.to_csv(as_csv)
    if as_json is not None:
        found.to_json(as_json)
