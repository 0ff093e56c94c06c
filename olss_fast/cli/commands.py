"""`olss-fast`: the command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import olss_fast
from olss_fast.cli import engine_commands, options
from olss_fast.errors import InputError

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


def show_version(wanted: bool) -> None:
    """Print the version and exit, if wanted."""
    if wanted:
        typer.echo(f"olss-fast {olss_fast.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@options.named_errors
def demo(
    out: options.OutOption = Path("olss-demo"),
    steps: Annotated[str, typer.Option("--steps", "-s", metavar="LIST", help="NFE to tune for.")] = "4,5,6,8,10",
    samples: Annotated[
        int | None, typer.Option("--samples", min=4, max=options.MOST_SAMPLES, help="Noises to fit and judge on.")
    ] = None,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Tune the model that comes with the package, and show that it worked: minutes on two CPU cores.

    Leaves plans, a report (JSON) and pictures in `olss-demo/`. It takes fewer samples and polishes less than
    `olss-fast tune` does by default.

    Examples:

    - `olss-fast demo`
    - `olss-fast demo --steps 5 --out quick`
    """
    wanted = options.parse_steps(steps)
    from olss_fast.cli.demo import SAMPLES, run_demo

    run_demo(
        out, device=device, steps=wanted, samples=samples or SAMPLES, seed=seed, progress=not quiet, say=typer.echo
    )


@app.command()
@options.named_errors
def tune(
    model: options.ModelOption,
    steps: Annotated[str, typer.Option("--steps", "-s", metavar="LIST", help="NFE to tune for.")] = "5,8",
    out: options.OutOption = Path("olss-tuned"),
    prompts: options.PromptsOption = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", "-n", min=4, max=options.MOST_SAMPLES, help="A quarter judge. Default: 256, with --prompts 64."
        ),
    ] = None,
    teacher_steps: options.TeacherOption = None,
    teacher_model: options.TeacherModelOption = None,
    guidance_scale: options.GuidanceOption = None,
    guidance_range: Annotated[
        str | None,
        typer.Option(
            "--guidance-range", metavar="LIST", help="With --prompts: scales to tune across, such as 5,7.5,10."
        ),
    ] = None,
    null_class: options.NullClassOption = None,
    light: Annotated[bool, typer.Option("--light", help="A tenth of the polish, a little worse.")] = False,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder for the recording: a killed run resumes from it.")
    ] = None,
    batch_size: options.BatchOption = None,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Fit samplers to a model: record its teacher, plan, fit, polish, and accept on held-out noise.

    Writes `plans/olss-<n>.safetensors`, `report.json` and pictures.

    Examples:

    - `olss-fast tune --model demo --steps 5,8 --out tuned`
    - `olss-fast tune --model path/to/class-conditional-folder --null-class 1000 --guidance-scale 2 --store recording`
    - `olss-fast tune --model path/to/pruned-folder --teacher-model path/to/full-folder --steps 8`
    - `olss-fast tune --model path/to/stable-diffusion --prompts prompts.txt --guidance-range 5,7.5,10`
    """
    wanted = options.parse_steps(steps)
    scales = None if guidance_range is None else options.parse_scales(guidance_range)
    import time

    from olss_fast.cli import jobs
    from olss_fast.cli.demo import time_spent, try_folders, write_result
    from olss_fast.tuning.tuning import Effort

    start = time.perf_counter()
    folder = try_folders(out)
    subject = jobs.subject(model, prompts, dtype, null_class, device, guidance_scale, batch_size, seed, not quiet)
    effort = Effort.light() if light else Effort()
    how = {"steps": wanted, "teacher_steps": teacher_steps, "effort": effort, "store": store}
    result = subject.tune(samples, scales, teacher_model, **how)
    write_result(result, folder)
    typer.echo(result.report.table())
    typer.echo(time_spent(result.report, time.perf_counter() - start))
    typer.echo(f"Plans, report and pictures are in {folder}")


@app.command()
@options.named_errors
def sample(
    model: options.ModelOption,
    prompts: options.PromptsOption = None,
    plan: Annotated[Path | None, typer.Option("--plan", "-p", metavar="FILE", help="A plan file.")] = None,
    solver: Annotated[str | None, typer.Option("--solver", metavar="NAME", help="An analytic solver instead.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-s", min=1, help="NFE of the solver.")] = None,
    order: options.OrderOption = None,
    spacing: options.SpacingOption = None,
    variant: options.VariantOption = None,
    eta: Annotated[
        float | None, typer.Option("--eta", min=0.0, help="Fresh noise of ddim and euler_ancestral.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")] = Path("olss-images"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=options.MOST_SAMPLES, help="How many images.")] = 16,
    classes: Annotated[
        str | None, typer.Option("--classes", "-c", metavar="LIST", help="Labels, in turn. Default: all.")
    ] = None,
    guidance_scale: options.GuidanceOption = None,
    null_class: options.NullClassOption = None,
    batch_size: options.BatchOption = None,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Sample images with a plan, or with an analytic solver. Writes `00000.png` and so on, and `grid.png`.

    Examples:

    - `olss-fast sample --model demo --plan olss-demo/plans/olss-5.safetensors --count 20`
    - `olss-fast sample --model demo --solver dpm_solver_pp --steps 8 --order 2 --spacing logsnr --classes 3,7`
    - `olss-fast sample --model path/to/stable-diffusion --prompts prompts.txt --plan olss-5.safetensors --count 4`
    """
    labels = [] if classes is None else options.parse_numbers(classes, "--classes", least=0)
    if (plan is None) == (solver is None):
        raise InputError("give either --plan FILE, or --solver NAME with --steps N")
    settings = {"solver": solver, "steps": steps, "order": order, "spacing": spacing, "variant": variant, "eta": eta}
    given = {name: value for name, value in settings.items() if value is not None}
    if plan is not None and given:
        raise InputError(f"--{next(iter(given))} belongs to --solver: a plan has its own")
    chosen = None if plan is None else olss_fast.Plan.load(plan)
    from olss_fast.cli import jobs
    from olss_fast.report.images import save_images
    from olss_fast.support.folders import try_folder

    folder = try_folder(out)
    subject = jobs.subject(model, prompts, dtype, null_class, device, guidance_scale, batch_size, seed, not quiet)
    images, nfe, names = subject.sample(chosen, given, count, labels)
    written = save_images(images, folder, names)
    typer.echo(f"{count} images at {nfe} NFE are in {folder}, all of them in {written[-1]}")


@app.command()
@options.named_errors
def compare(
    model: options.ModelOption,
    prompts: options.PromptsOption = None,
    steps: Annotated[
        str, typer.Option("--steps", "-s", metavar="LIST", help="NFE to compare at.")
    ] = "4,5,6,8,10,12,16,20",
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", "-p", metavar="FILE", help="Plans of your own; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report and plot.")] = Path("olss-compare"),
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=2, max=options.MOST_SAMPLES, help="Noises to judge on.")
    ] = 64,
    teacher_steps: options.TeacherOption = None,
    guidance_scale: options.GuidanceOption = None,
    null_class: options.NullClassOption = None,
    batch_size: options.BatchOption = None,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, max=options.LARGEST_SEED, help="Of the noise; not the one that was tuned on."),
    ] = 1000,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Compare every analytic solver, and plans of your own, with the teacher at many numbers of evaluations.

    Prints a table, with the NFE at which the best analytic solver is as good as the plans, and leaves `report.json`
    and plots.

    Examples:

    - `olss-fast compare --model demo --plan tuned/plans/olss-5.safetensors --plan tuned/plans/olss-8.safetensors`
    - `olss-fast compare --model path/to/ddpm-folder --steps 5,10,20 --samples 128`
    - `olss-fast compare --model path/to/stable-diffusion --prompts prompts.txt --steps 5,8,20 --samples 16`
    """
    wanted = options.parse_steps(steps)
    loaded_plans = [olss_fast.Plan.load(path) for path in plans or []]
    from olss_fast.cli import jobs
    from olss_fast.support.folders import try_folder

    try_folder(out)
    subject = jobs.subject(model, prompts, dtype, null_class, device, guidance_scale, batch_size, seed, not quiet)
    report = subject.compare(samples, loaded_plans, steps=wanted, teacher_steps=teacher_steps)
    report.plot(out)
    report.to_json(out / "report.json")
    typer.echo(report.solver_table())
    typer.echo(f"Report and plots are in {out}")


@app.command()
@options.named_errors
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan file, or an engine file.")],
    as_json: Annotated[bool, typer.Option("--json", help="All fields as JSON, for programs.")] = False,
) -> None:
    """Show a plan (facts, times, noise levels and coefficients), or what an engine file says about itself.

    Examples:

    - `olss-fast inspect olss-demo/plans/olss-5.safetensors`
    - `olss-fast inspect olss-demo/plans/olss-5.safetensors --json | jq .timesteps`
    - `olss-fast inspect demo.olss`
    """
    from olss_fast.engine import describe

    if describe.is_engine_file(file):
        typer.echo(describe.inspected(file, as_json=as_json))
        return
    loaded = olss_fast.Plan.load(file)
    if not as_json:
        typer.echo(loaded.describe())
        return

    typer.echo(json.dumps({"nfe": loaded.nfe, **loaded.to_dict()}, indent=1))


@app.command("export-onnx")
@options.named_errors
def export_onnx(
    model: options.ModelOption,
    plan: Annotated[Path | None, typer.Option("--plan", "-p", metavar="FILE", help="A plan file.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-s", min=1, help="NFE of a solver instead.")] = None,
    solver: Annotated[str, typer.Option("--solver", metavar="NAME", help="With --steps: which one.")] = "unipc",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The model to write.")] = Path("olss.onnx"),
    guidance_scale: options.GuidanceOption = None,
    null_class: options.NullClassOption = None,
    device: options.DeviceOption = None,
) -> None:
    """Write network, guidance and plan as one ONNX model that takes any batch of noise. Needs `olss-fast[onnx]`.

    Examples:

    - `olss-fast export-onnx --model demo --plan olss-demo/plans/olss-5.safetensors --out demo.onnx`
    - `olss-fast export-onnx --model demo --steps 5 --out demo.onnx`
    """
    if (plan is None) == (steps is None):
        raise InputError("give either --plan FILE, or --steps N of an analytic solver")
    chosen = None if plan is None else olss_fast.Plan.load(plan)
    from olss_fast.cli import jobs

    subject = jobs.NetworkSubject(model=model, device=device, null_class=null_class, guidance_scale=guidance_scale)
    exported = subject.export_onnx(chosen, {"solver": solver, "steps": steps}, out)
    typer.echo(f"{exported.nfe} NFE of {exported.metadata.get('method', 'a plan')} are in {out}")


@app.command()
@options.named_errors
def runtime(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bin, lib and include.")] = Path("olss-runtime"),
) -> None:
    """Compile the C++ runtime of engine files: `olss-run` samples without Python. Needs `olss-fast[runtime]`.

    Examples:

    - `olss-fast runtime --out runtime`
    - `runtime/bin/olss-run demo.olss --steps 5 --set class_labels=3 --out image.png`
    """
    from olss_fast.engine.runtime import build_runtime

    typer.echo("Compiling the runtime, which takes about a minute")
    typer.echo(f"The program is {build_runtime(out)}")


for command in (engine_commands.build, engine_commands.validate, engine_commands.bench):
    app.command()(command)
