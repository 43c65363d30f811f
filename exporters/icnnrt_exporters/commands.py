"""The commands `icnnrt export`, `icnnrt pack` and `icnnrt demo`, and what `icnnrt verify` needs torch for.

The command line imports this file to show its help, so torch is imported within the commands only.
"""

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from icnnrt.arguments import refused
from icnnrt.cli.app import FollowFlag, JsonFlag, PackageArgument, console, number, print_json
from icnnrt.errors import ExportError, InputError, MissingDependencyError
from icnnrt.mathematics.cut_model import STEPS

if TYPE_CHECKING:
    import torch

    from icnnrt.checking.report import Check
    from icnnrt.format.package import Package
    from icnnrt_exporters.assembly.train_spec import TrainSpec

EXAMPLES: Final = 16  # samples that an export is traced and checked with
NEEDED: Final = ("torch", "onnx", "onnx_ir", "onnxscript", "jaxtyping")


class LossName(StrEnum):
    """The losses that need no code of one's own; `icnnrt_exporters.assembly.losses` states them."""

    squared_error = "squared_error"
    binary_cross_entropy = "binary_cross_entropy"
    huber = "huber"


class OptimizerName(StrEnum):
    """The optimisers of a training graph, with torch.optim's settings; SGD has momentum 0.9."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class HeadName(StrEnum):
    """The heads that a package has if they are asked for."""

    hvp = "hvp"
    hessian = "hessian"
    gradient_x = "gradient_x"
    pullback = "pullback"
    polyhedron = "polyhedron"


class KindName(StrEnum):
    """What the module's forward returns."""

    energy = "energy"
    gradient = "gradient"
    qp = "qp"


class DomainName(StrEnum):
    """Where y* lies; `icnnrt.format.manifest.Domain` has the regularisers."""

    unit_box = "unit_box"
    box = "box"
    simplex = "simplex"
    space = "space"


class Precision(StrEnum):
    """The dtypes a package can have."""

    float32 = "float32"
    float64 = "float64"


@contextmanager
def _needs(extra: str, *modules: str) -> Iterator[None]:
    """Say in one sentence what to install, before and while importing what a command needs."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"this command needs {', '.join(missing)}: pip install 'icnnrt[{extra}]'.")
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"this command cannot import {error}: pip install 'icnnrt[{extra}]'.") from error


@contextmanager
def _stages(prefix: str) -> Iterator[Callable[[str], None]]:
    """A function that shows each stage on stderr, the one under way with a spinner, those done with their time."""
    columns = (SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console(err=True)) as progress:
        current: list[Any] = []

        def finish() -> None:
            while current:
                progress.update(current.pop(), total=1, completed=1)

        def stage(text: str) -> None:
            finish()
            current.append(progress.add_task(escape(f"{prefix}{text}"), total=None))

        yield stage
        finish()


# --- export --------------------------------------------------------------------------------------


def export(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns the energy, or a solver around it (BundleEntropyArgmin, "
            "BregmanProximalGradient) whose settings are then the defaults; MODULE is also looked for in the working "
            "directory.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The package folder to write, such as model.icnn.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights: a state dict as .safetensors, .pt or .pth.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", "--x-example", metavar="FILE", help="An .npz with x and y: real samples make the check mean more."
        ),
    ] = None,
    x_shape: Annotated[
        str | None,
        typer.Option(help="Shape of one x, such as 32 or 3,8,8; by default that of the data, or x_dim of the energy."),
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Entries of y; by default those of the data, or y_dim of the energy.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Convert the energy first; by default it stays as it is.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Cuts K of the solver. (default: 10)")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Most steps of each inner solve. (default: {STEPS})")
    ] = None,
    gap_tolerance: Annotated[
        float | None,
        typer.Option(help="Duality gap, relative to max(1, |lower bound|), that counts as converged. (default: 0.001)"),
    ] = None,
    domain: Annotated[
        DomainName | None,
        typer.Option(
            help="Where y* lies: unit_box [0,1]ⁿ, box (bounds are given with every call), simplex, or space ℝⁿ. "
            "(default: unit_box)"
        ),
    ] = None,
    mu: Annotated[float | None, typer.Option(help="μ of the regulariser (μ/2)‖y‖² of space. (default: 1)")] = None,
    head: Annotated[
        list[HeadName] | None, typer.Option(help="A further graph; may be given several times. hessian is dense.")
    ] = None,
    solver: Annotated[
        bool, typer.Option("--solver/--no-solver", help="Whether argmin and adjoint come along, or the energy alone.")
    ] = True,
    auto: Annotated[
        bool, typer.Option("--auto", help="Measure both solvers over [0,1]ⁿ on the examples and keep the better.")
    ] = False,
    torchscript: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a TorchScript file too, and say how far it is from the package."),
    ] = None,
    kind: Annotated[
        KindName,
        typer.Option(
            help="What forward returns: the energy, its gradient (then there is no solver), or, of x alone, the answer "
            "of quadratic programs."
        ),
    ] = KindName.energy,
    allow_not_convex: Annotated[
        bool, typer.Option("--allow-not-convex", help="Export an energy that was seen not to be convex in y.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What the package calls itself; by default the folder's stem.")
    ] = None,
    train: Annotated[
        LossName | None,
        typer.Option(help="Add a training graph for this loss of y*, so that `icnnrt tune` can adapt the package."),
    ] = None,
    optimizer: Annotated[
        OptimizerName | None, typer.Option(help="Of the training graph; needs --train. (default: adam)")
    ] = None,
    train_weights: Annotated[
        str | None,
        typer.Option(
            metavar="all|last|PATTERNS",
            help="Which weights tuning moves: all, those of the last layer, or names with wildcards, separated by "
            "commas, such as 'layers.2.*'; needs --train. (default: all)",
        ),
    ] = None,
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Bound of the gradient's norm, all weights together; needs --train. (default: none)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a package that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Export a trained torch energy with its argmin and adjoint as a package. Needs torch and onnx.

    Exit codes:
    0 written, and in agreement with torch
    1 an error; nothing is written
    2 wrong usage
    """
    without = not solver or kind != KindName.energy
    settings = {"iterations": iterations, "steps": steps, "gap-tolerance": gap_tolerance, "domain": domain, "mu": mu}
    for option, given in settings.items():
        if given is not None and (without or auto):
            reason = "--auto chooses itself" if auto else "--no-solver or --kind leaves out"
            raise typer.BadParameter(f"--{option} belongs to the solver, which {reason}.")
    if torchscript is not None and (without or auto):
        raise typer.BadParameter("--torchscript needs the bundle method; leave --no-solver, --kind and --auto out.")
    if auto and without:
        raise typer.BadParameter("--auto chooses a solver, which --no-solver or --kind leaves out.")
    for option, wanted in (("optimizer", optimizer), ("train-weights", train_weights), ("clip-norm", clip_norm)):
        if wanted is not None and train is None:
            raise typer.BadParameter(f"--{option} needs --train, the loss of the training graph.")
    with _needs("export", *NEEDED):
        import torch

        from icnnrt.serving.load import load
        from icnnrt_exporters import checkpoint as checkpoints
        from icnnrt_exporters.exporter import export as write
        from icnnrt_models import BundleEntropyArgmin
    if out.exists() and not overwrite:
        raise ExportError(f"out: {out} is there already; pass --overwrite to replace it, or choose another.")
    training = None if train is None else _training(train, optimizer, train_weights, clip_norm)
    arrays = _data(data)
    made = checkpoints.make(factory)
    if dtype is not None:
        made = made.to(getattr(torch, dtype.value))
    if checkpoint is not None:
        checkpoints.load(made, checkpoint)
    energy: torch.nn.Module = made.get_submodule("energy") if checkpoints.is_solver(made) else made
    x_size, y_size = _sizes(energy, made, arrays, x_shape, n)
    layer = None
    if solver and kind == KindName.energy and not auto:
        layer = checkpoints.settings(
            made,
            n=y_size,
            iterations=iterations,
            steps=steps,
            gap_tolerance=gap_tolerance,
            domain=domain and domain.value,
            mu=mu,
        )
    if torchscript is not None and not isinstance(layer, BundleEntropyArgmin):
        raise InputError("torchscript: it needs the bundle method, but the factory's solver is another; leave it out.")
    T = next((p.dtype for p in energy.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x, y = _examples(arrays, x_size, y_size, T)

    began = time.perf_counter()
    with _stages("") as stage, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        package = write(
            energy,
            "auto" if auto else layer,
            x,
            y,
            out,
            name=name,
            heads=tuple(h.value for h in head or ()),
            kind=kind.value,
            train=training,
            allow_not_convex=allow_not_convex,
            overwrite=overwrite,
            progress=stage,
        )
    seconds = time.perf_counter() - began
    for warning in told:
        console(err=True).print(f"[yellow]warning:[/] {escape(str(warning.message))}")
    parity, convexity = dict(package.manifest.parity), package.manifest.convexity
    scripted: dict[str, float] = {}
    if torchscript is not None and isinstance(layer, BundleEntropyArgmin):
        from icnnrt_exporters.torch_files.torchscript import check_torchscript, export_torchscript
        from icnnrt_exporters.tracing.overhead import one_thread

        with one_thread(), _stages("TorchScript: ") as stage:
            stage("tracing")
            export_torchscript(energy, layer, x, y, torchscript, overwrite=overwrite)
            stage("comparing with the package")
            with load(package) as session:
                scripted = dict(check_torchscript(torchscript, session, x, y))
    if as_json:
        print_json(
            {
                "package": str(package.path),
                "name": package.manifest.name,
                "parity": parity,
                "convexity": convexity and convexity.to_json(),
                "torchscript": scripted or None,
                "seconds": seconds,
            }
        )
        return
    screen = console()
    table = Table("figure", "largest difference from torch in float64", box=None)
    gaps = {}
    for key, value in parity.items():
        if key.startswith("gap_"):
            gaps[key.removeprefix("gap_")] = value
        else:
            table.add_row(escape(key), number(value) if isinstance(value, float) else escape(str(value)))
    screen.print(table)
    if gaps:
        screen.print("gap       " + ", ".join(f"{key} {number(float(value))}" for key, value in gaps.items()))  # type: ignore[arg-type]
    if scripted:
        apart = ", ".join(f"{key} {number(value)}" for key, value in scripted.items())
        screen.print(f"written   {escape(str(torchscript))}, from the package by at most: {apart}")
    if choice := package.manifest.metadata.get("solver_choice"):
        screen.print(f"solver    {escape(str(choice))}")
    if convexity:
        screen.print(f"convexity {convexity.verdict}: {escape(convexity.sentence())}")
    screen.print(f"written   {escape(str(package.path))} in {seconds:.0f} s")


def _training(
    loss: LossName, optimizer: OptimizerName | None, weights: str | None, clip_norm: float | None
) -> "TrainSpec":
    from icnnrt_exporters.assembly.train_spec import TrainSpec

    names = [part.strip() for part in (weights or "all").split(",") if part.strip()]
    return TrainSpec(
        loss=loss.value,
        optimizer="adam" if optimizer is None else optimizer.value,
        weights=names[0] if names in (["all"], ["last"]) else names,
        clip_norm=clip_norm,
    )


def _data(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from icnnrt.cli import tabular

    arrays = tabular.read_archive(path, ("x", "y"))
    x, y = arrays["x"], arrays["y"]
    if y.ndim != 2 or x.ndim < 1 or len(x) != len(y) or not len(x):
        came = f"{list(x.shape)} and {list(y.shape)}"
        raise refused(str(path), "x [B, ...] and y [B, n] of as many samples", came)
    return arrays


def _sizes(
    energy: Any, made: Any, arrays: dict[str, Any], x_shape: str | None, n: int | None
) -> tuple[tuple[int, ...], int]:
    """The shape of one x and the entries of y: as told, else of the data, else of the energy."""
    shape: tuple[int, ...] | None = None
    if x_shape is not None:
        try:
            shape = tuple(int(part) for part in x_shape.split(",") if part.strip())
        except ValueError:
            shape = None
        if not shape or min(shape) < 0 or math.prod(shape) > 1 << 31:
            raise refused("x-shape", "sizes such as 32 or 3,8,8", repr(x_shape))
    if arrays:
        given = arrays["x"].shape[1:]
        if shape not in (None, given):
            raise InputError(f"x-shape: {list(shape or ())} was asked for, but x in the data has {list(given)}.")
        if n not in (None, arrays["y"].shape[1]):
            raise InputError(f"n: {n} was asked for, but y in the data has {arrays['y'].shape[1]} entries.")
        return given, arrays["y"].shape[1]
    if shape is None:
        x_dim = getattr(energy, "x_dim", None)
        if not isinstance(x_dim, int):
            raise InputError(
                f"x-shape: {type(energy).__name__} has no x_dim to take it from; pass --x-shape or --data."
            )
        shape = (x_dim,)
    if n is None:
        y_dim = getattr(made, "y_dim", None) or getattr(energy, "y_dim", None)
        if not isinstance(y_dim, int):
            raise InputError(f"n: {type(energy).__name__} has no y_dim to take it from; pass --n or --data.")
        n = y_dim
    return shape, n


def _examples(
    arrays: dict[str, Any], x_shape: tuple[int, ...], n: int, dtype: "torch.dtype"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    import numpy as np
    import torch

    if arrays:
        x, y = (torch.from_numpy(np.array(arrays[key][:EXAMPLES])).to(dtype) for key in ("x", "y"))
        return x, y
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(EXAMPLES, *x_shape, generator=generator, dtype=dtype),
        torch.rand(EXAMPLES, n, generator=generator, dtype=dtype),
    )


# --- pack ----------------------------------------------------------------------------------------


def pack(
    package: PackageArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The .onnx file to write; with --siblings a folder, or a path as prefix."),
    ],
    graph: Annotated[
        str | None,
        typer.Option(help="Which graph: argmin, value, adjoint, or another the package has.", show_default="argmin"),
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Standard ONNX operators alone: no functions, no domain of ours.")
    ] = False,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Weights as constants, and what hangs on them alone computed beforehand.")
    ] = False,
    settings_as_inputs: Annotated[
        bool,
        typer.Option(
            "--settings-as-inputs",
            help="Run-time settings (depth, mu, tolerance, ...) as plain inputs, as hosts in JavaScript need them.",
        ),
    ] = False,
    siblings: Annotated[
        bool,
        typer.Option(
            "--siblings",
            help="Write argmin.onnx, adj_argmin.onnx, value.onnx, adj_value.onnx: functions and gradients.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    follow_links: FollowFlag = False,
) -> None:
    """Write one graph of a package, weights included, as a single ONNX file for plain ONNX Runtime. Needs onnx.

    Exit codes:
    0 written
    1 an error; nothing is written
    2 wrong usage
    """
    from icnnrt.format.folder import check_place
    from icnnrt.format.package import Package

    if siblings:
        given = {"--graph": graph is not None, "--freeze": freeze, "--settings-as-inputs": settings_as_inputs}
        if wrong := [name for name, there in given.items() if there]:
            raise InputError(
                "siblings: expected without --graph, --freeze and --settings-as-inputs, as it writes set files whose "
                f"weights have gradients, but {wrong[0]} was given; leave it out."
            )
        with _needs("export", "onnx", "onnx_ir"):
            from icnnrt_exporters.graphs.derivative_siblings import siblings as write_siblings
    else:
        if out.suffix.lower() != ".onnx":
            raise refused("out", "a file name ending in .onnx", out)
        if out.exists() and not overwrite:
            raise ExportError(f"out: {out} is there already; pass --overwrite to replace it, or choose another.")
        with _needs("export", "onnx"):
            from icnnrt_exporters.graphs.packer import pack as write
    check_place(out, "out")
    opened = Package.open(package, follow_links=follow_links)
    if siblings:
        written = write_siblings(opened, out, portable=portable, overwrite=overwrite)
    else:
        options = {"portable": portable, "freeze": freeze, "settings_as_inputs": settings_as_inputs}
        written = (write(opened, out, graph or "argmin", **options, overwrite=overwrite),)
    for path in written:
        console().print(f"written   {escape(str(path))}, {path.stat().st_size:,} bytes")
    if settings_as_inputs:
        signature = opened.manifest.graphs[graph or "argmin"].signature
        inputs = signature.inputs if signature else {}
        usual = ", ".join(f"{name} {t.default!r} ({t.dtype})" for name, t in inputs.items() if t.default is not None)
        console().print(f"to feed   usually {escape(usual)}")


# --- verify --------------------------------------------------------------------------------------


def torch_files(
    package: "Path | Package", torchscript: Path | None, programs: Sequence[Path], x: Any = None, **settings: Any
) -> "list[Check]":
    """What `icnnrt verify` makes of --torchscript and --program: see `file_parity.compare`."""
    with _needs("export", *NEEDED):
        from icnnrt_exporters.torch_files.file_parity import compare
        from icnnrt_exporters.tracing.overhead import one_thread
    with one_thread():
        return compare(package, torchscript, programs, x, **settings)


# --- demo ----------------------------------------------------------------------------------------


def demo(
    out: Annotated[
        Path, typer.Option(help="The folder for the package and the picture; what is there is replaced.")
    ] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 1,437 training images.")] = 40,
    as_json: JsonFlag = False,
) -> None:
    """Train on real digits, export, reload without torch, complete images, check, draw. A minute or two.

    Exit codes:
    0 done
    1 an error
    2 wrong usage
    """
    with _needs("demo", *NEEDED, "sklearn", "matplotlib"):
        from icnnrt_exporters import demo as digits_demo
        from icnnrt_exporters.tracing.overhead import one_thread
        from icnnrt_models import digits
    package, picture = out / "digits_completion.icnn", out / "completion.png"
    out.mkdir(parents=True, exist_ok=True)
    split = digits.load()
    began = time.perf_counter()
    with one_thread():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console(err=True)) as progress:
            task = progress.add_task("training through the argmin", total=epochs, loss="")
            layer = digits.train(
                split.train,
                epochs=epochs,
                on_epoch=lambda e: progress.update(
                    task, completed=e.number, loss=f"epoch {e.number}/{epochs}, training MSE {e.train_mse:.4f}"
                ),
            )
        with _stages("export: ") as stage:
            digits_demo.export_digits(layer, split.train, package, progress=stage)
        with _stages("") as stage:
            stage("completing the test images with onnxruntime")
            report = digits_demo.evaluate(layer, split, package, picture)
    seconds = time.perf_counter() - began
    if as_json:
        print_json({**report.as_dict(), "epochs": epochs, "seconds": seconds})
        return

    screen = console()
    errors = {**report.baselines, "this network": report.test_mse}
    best = min(errors, key=lambda key: errors[key])
    table = Table("right half told by", "test MSE", title="360 test images, pixels in 0..1", title_justify="left")
    for key, value in sorted(errors.items(), key=lambda pair: -pair[1]):
        shown = f"{value:.4f}"
        table.add_row(
            f"[bold green]{key}[/]" if key == best else key, f"[bold green]{shown} best[/]" if key == best else shown
        )
    screen.print(table)
    facts = Table(box=None, show_header=False)
    facts.add_row("status", ", ".join(f"{count} {name}" for name, count in report.status.items()))
    facts.add_row("duality gap", f"median {number(report.gap_median)}, max {number(report.gap_max)}")
    facts.add_row("KKT residual", f"max {number(report.residual_max)}")
    facts.add_row(
        "time",
        f"{number(report.batch_milliseconds_per_image)} ms an image in one batch, "
        f"{number(report.single_milliseconds)} ms for one image alone",
    )
    facts.add_row("against torch", f"y differs by at most {number(report.torch_difference)}")
    facts.add_row("", f"gradient by x by at most {number(report.gradient_check)} of its largest entry")
    screen.print(facts)
    screen.print(f"package   {escape(report.package)}")
    screen.print(f"picture   {escape(report.picture)}")
    screen.print(f"{seconds:.0f} s in all")
