"""`olss-fast`: the command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec, TypeVar

import typer

from olss_fast import __version__
from olss_fast.errors import InputError, OlssError

if TYPE_CHECKING:
    from olss_fast.plan import Plan

BAD_INPUT = 2
LARGEST_SEED = 2**63 - 1
MOST_SAMPLES = 1_000_000
P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="olss-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fewer network evaluations for diffusion sampling, at the quality of a long run.

    Begin with `olss-fast demo`, then tune a model of your own:

    - `olss-fast tune --model path/to/ddpm-folder --steps 5,8 --out tuned`
    - `olss-fast sample --model path/to/ddpm-folder --plan tuned/plans/olss-5.safetensors --out images`
    """,
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="FOLDER", help="A local diffusers folder (UNet2DModel), or 'demo'.")
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
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the noise.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples at once.")]
TeacherOption = Annotated[int, typer.Option("--teacher-steps", min=1, help="NFE of the DDIM teacher.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def named_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Bad input ends in one clear message and exit code 2, never in a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (OlssError, OSError) as error:
            fail(str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail("out of memory: lower --batch-size, --samples or --count, or use another --device")

    return run


def out_of_memory(error: Exception) -> bool:
    """NumPy's, or torch's of a GPU (by name, so that torch is not imported for this) or of the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def fail(message: str) -> NoReturn:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(BAD_INPUT)


def parse_numbers(text: str, option: str, *, least: int) -> list[int]:
    """ "4,5,6" or "4 5 6" as numbers of at least `least`."""
    try:
        numbers = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise InputError(f"{option} is {text!r}: expected whole numbers of at least {least}, such as 5 or 4,5,8")
    return numbers


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"olss-fast {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
@named_errors
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for plans, report and pictures.")] = Path(
        "olss-demo"
    ),
    steps: Annotated[str, typer.Option("--steps", "-s", metavar="LIST", help="NFE to tune for.")] = "4,5,6,8,10",
    samples: Annotated[
        int | None, typer.Option("--samples", min=4, max=MOST_SAMPLES, help="Noises to fit and judge on.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Tune the model that comes with the package, and show that it worked: minutes on two CPU cores.

    Leaves plans, a report (JSON) and pictures in `olss-demo/`. It takes fewer samples and polishes less than
    `olss-fast tune` does by default.

    Examples:

    - `olss-fast demo`
    - `olss-fast demo --steps 5 --out quick`
    """
    wanted = parse_numbers(steps, "--steps", least=1)
    from olss_fast import demo_run

    demo_run.run_demo(
        out,
        device=device,
        steps=wanted,
        samples=samples or demo_run.SAMPLES,
        seed=seed,
        progress=not quiet,
        say=typer.echo,
    )


@app.command()
@named_errors
def tune(
    model: ModelOption,
    steps: Annotated[str, typer.Option("--steps", "-s", metavar="LIST", help="NFE to tune for.")] = "5,8",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for plans, report and pictures.")] = Path(
        "olss-tuned"
    ),
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=4, max=MOST_SAMPLES, help="Noises; a quarter of them judge.")
    ] = 256,
    teacher_steps: TeacherOption = 100,
    guidance_scale: GuidanceOption = None,
    null_class: NullClassOption = None,
    light: Annotated[bool, typer.Option("--light", help="A tenth of the polish, a little worse.")] = False,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder for the recording: a killed run resumes from it.")
    ] = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fit samplers to a model: record its teacher, plan, fit, polish, and accept on held-out noise.

    Writes `plans/olss-<n>.safetensors`, `report.json` and pictures.

    Examples:

    - `olss-fast tune --model demo --steps 5,8 --out tuned`
    - `olss-fast tune --model path/to/class-conditional-folder --null-class 1000 --guidance-scale 2 --store recording`
    """
    wanted = parse_numbers(steps, "--steps", least=1)
    import time

    from olss_fast import demo_run, models, tuning

    start = time.perf_counter()
    folder = demo_run.make_folders(out)
    loaded = models.load_model(model, device=device, null_class=null_class)
    result = tuning.tune(
        loaded.network,
        noise=models.draw_noise(loaded, samples, seed),
        schedule=loaded.schedule,
        steps=wanted,
        teacher_steps=teacher_steps,
        effort=tuning.Effort.light() if light else None,
        batch_size=batch_size,
        store=store,
        seed=seed,
        progress=not quiet,
        **models.arguments(loaded, models.pick_labels(loaded, samples), guidance_scale),
    )
    demo_run.write_result(result, folder)
    typer.echo(result.report.table())
    typer.echo(demo_run.time_spent(result.report, time.perf_counter() - start))
    typer.echo(f"Plans, report and pictures are in {folder}")


@app.command()
@named_errors
def sample(
    model: ModelOption,
    plan: Annotated[Path | None, typer.Option("--plan", "-p", metavar="FILE", help="A plan file.")] = None,
    solver: Annotated[str | None, typer.Option("--solver", metavar="NAME", help="An analytic solver instead.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-s", min=1, help="NFE of the solver.")] = None,
    order: Annotated[int | None, typer.Option("--order", min=1, help="Order of the solver.")] = None,
    spacing: Annotated[
        str | None, typer.Option("--spacing", metavar="NAME", help="Time spacing of the solver.")
    ] = None,
    variant: Annotated[str | None, typer.Option("--variant", metavar="NAME", help="Variant of the solver.")] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", min=0.0, help="Fresh noise of ddim and euler_ancestral.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")] = Path("olss-images"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=MOST_SAMPLES, help="How many images.")] = 16,
    classes: Annotated[
        str | None, typer.Option("--classes", "-c", metavar="LIST", help="Labels, in turn. Default: all.")
    ] = None,
    guidance_scale: GuidanceOption = None,
    null_class: NullClassOption = None,
    batch_size: BatchOption = 64,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Sample images with a plan, or with an analytic solver. Writes `00000.png` and so on, and `grid.png`.

    Examples:

    - `olss-fast sample --model demo --plan olss-demo/plans/olss-5.safetensors --count 20`
    - `olss-fast sample --model demo --solver dpm_solver_pp --steps 8 --order 2 --spacing logsnr --classes 3,7`
    """
    labels = [] if classes is None else parse_numbers(classes, "--classes", least=0)
    if (plan is None) == (solver is None):
        raise InputError("give either --plan FILE, or --solver NAME with --steps N")
    settings = {"steps": steps, "order": order, "spacing": spacing, "variant": variant, "eta": eta}
    given = {name: value for name, value in settings.items() if value is not None}
    if plan is not None and given:
        raise InputError(f"--{next(iter(given))} belongs to --solver: a plan has its own")
    chosen = None if plan is None else load_plan(plan)
    from olss_fast import models
    from olss_fast.images import save_images
    from olss_fast.report import make_folder

    folder = make_folder(out)
    loaded = models.load_model(model, device=device, null_class=null_class)
    chosen = chosen or models.solver_plan(loaded.schedule, str(solver), given)
    images = models.sample_images(
        chosen,
        loaded,
        count,
        classes=labels,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
        progress=not quiet,
    )
    written = save_images(images, folder)
    typer.echo(f"{count} images at {chosen.nfe} NFE are in {folder}, all of them in {written[-1]}")


def load_plan(path: Path) -> Plan:
    from olss_fast.plan import Plan

    return Plan.load(path)


@app.command()
@named_errors
def compare(
    model: ModelOption,
    steps: Annotated[
        str, typer.Option("--steps", "-s", metavar="LIST", help="NFE to compare at.")
    ] = "4,5,6,8,10,12,16,20",
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", "-p", metavar="FILE", help="Plans of your own; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report and plot.")] = Path("olss-compare"),
    samples: Annotated[int, typer.Option("--samples", "-n", min=2, max=MOST_SAMPLES, help="Noises to judge on.")] = 64,
    teacher_steps: TeacherOption = 100,
    guidance_scale: GuidanceOption = None,
    null_class: NullClassOption = None,
    batch_size: BatchOption = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the noise; not the one that was tuned on.")
    ] = 1000,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compare every analytic solver, and plans of your own, with the teacher at many numbers of evaluations.

    Prints a table, with the NFE at which the best analytic solver is as good as the plans, and leaves `report.json`
    and plots.

    Examples:

    - `olss-fast compare --model demo --plan tuned/plans/olss-5.safetensors --plan tuned/plans/olss-8.safetensors`
    - `olss-fast compare --model path/to/ddpm-folder --steps 5,10,20 --samples 128`
    """
    wanted = parse_numbers(steps, "--steps", least=1)
    loaded_plans = [load_plan(path) for path in plans or []]
    from olss_fast import compare as comparison
    from olss_fast import models
    from olss_fast.report import make_folder

    folder = make_folder(out)
    loaded = models.load_model(model, device=device, null_class=null_class)
    report = comparison.compare(
        loaded.network,
        noise=models.draw_noise(loaded, samples, seed),
        schedule=loaded.schedule,
        steps=wanted,
        plans=loaded_plans,
        teacher_steps=teacher_steps,
        batch_size=batch_size,
        progress=not quiet,
        **models.arguments(
            loaded, models.pick_labels(loaded, samples), models.tuned_guidance(loaded_plans, guidance_scale)
        ),
    )
    report.to_json(folder / "report.json")
    report.plot(folder)
    typer.echo(report.solver_table())
    typer.echo(f"Report and plots are in {folder}")


@app.command()
@named_errors
def inspect(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="All fields as JSON, for programs.")] = False,
) -> None:
    """Show a plan: facts, times, noise levels and coefficients.

    Examples:

    - `olss-fast inspect olss-demo/plans/olss-5.safetensors`
    - `olss-fast inspect olss-demo/plans/olss-5.safetensors --json | jq .timesteps`
    """
    loaded = load_plan(plan)
    if not as_json:
        typer.echo(loaded.describe())
        return
    from olss_fast.report import plan_to_dict

    typer.echo(json.dumps({"nfe": loaded.nfe, **plan_to_dict(loaded)}, indent=1))


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
