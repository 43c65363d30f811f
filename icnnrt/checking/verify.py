"""Checks of a package by what it does: each one compares two ways to the same number, none needs torch.

`CHECKS` lists them, in the order in which they are made. Points y lie in the package's domain, within random bounds
where that is a box; without a solver in [0, 1]^n. A check judges the worst sample against that sample's own bound, or,
of central differences, the median (`icnnrt.checking.differences` says why).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from icnnrt.arguments import integer
from icnnrt.checking import answers, energy, stored
from icnnrt.checking.report import Check, VerifyReport
from icnnrt.checking.trial import Trial, contexts
from icnnrt.format.package import Package, opened
from icnnrt.limits import check
from icnnrt.ort import Provider
from icnnrt.serving.load import load

MAX_SAMPLES: Final = 1 << 16


class Row(NamedTuple):
    """One check, or several that share their numbers."""

    stage: str  # what is told when it begins
    needs: tuple[str, ...]  # any one of these words suffices; `Trial.has` lists those of a package
    checks: Callable[[Trial], Iterator[Check]]


ANSWERS: Final = ("argmin", "solve")
CHECKS: Final = (
    Row("files and signs of weights", ("files",), stored.files),
    Row("gradient", ("energy",), energy.gradient),
    Row("convexity proof", ("energy",), stored.proof),
    Row("convexity", ("energy",), energy.convexity),
    Row("monotony", ("gradient",), energy.monotony),
    Row("hvp", ("hvp",), energy.hvp),
    Row("hessian", ("hessian",), energy.hessian),
    Row("gradient_x", ("gradient_x",), energy.gradient_x),
    Row("pullback", ("pullback",), energy.pullback),
    Row("argmin over a polyhedron", ("argmin_polyhedron",), answers.over_polyhedron),
    Row("golden data", ("golden",), stored.outputs),
    Row("argmin against the reference", ("argmin",), answers.against_reference),
    Row("certificate and lower bound", ("argmin",), answers.recomputed),
    Row("samples alone", ("solve",), answers.alone),
    Row("native kernels against portable bodies", ANSWERS, answers.kernels),
    Row("adjoint by x", ANSWERS, lambda trial: answers.adjoint(trial, "adjoint: x", ("x",))),
    Row("adjoint by bounds", ("bounds",), lambda trial: answers.adjoint(trial, "adjoint: bounds", ("lower", "upper"))),
    Row("adjoint by the weights", ANSWERS, answers.adjoint_by_weights),
    Row("status", ANSWERS, answers.status),
)


def verify(
    path: str | os.PathLike[str] | Package,
    x: object = None,
    *,
    samples: int = 64,
    seed: int = 0,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    native: bool | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> VerifyReport:
    """Check the package at `path`, or one that is open, on contexts x; every figure has its bound and verdict.

    x:         [B, *x_shape]; real data, of which at most `samples` are drawn. Without it x is standard normal, which
               may be unlike anything the model was trained on
    samples:   how many contexts
    seed:      of all random numbers; equal seeds give equal figures
    providers, threads, native: as for `icnnrt.load`
    progress:  called with a line of text at each stage

    Raises `PackageError` for a package that cannot be opened at all, `InputError` for x of the wrong shape or without
    a finite sample.
    """
    samples, seed = integer(samples, "samples", 1, MAX_SAMPLES), integer(seed, "seed", 0, 2**63 - 1)

    def begun(stage: str) -> None:
        check(f"verify: {stage}")
        progress(stage)

    begun("hashes and structure")
    package = opened(path)
    manifest, rng = package.manifest, np.random.default_rng(seed)
    X = contexts(manifest, x, samples, rng)
    checks: list[Check] = []
    with load(package, providers=providers, threads=threads, native=native) as session:
        trial = Trial(package, session, X, rng, providers=providers, threads=threads)
        for row in CHECKS:
            if trial.has.intersection(row.needs):
                begun(row.stage)
                checks += row.checks(trial)
    source = "random" if x is None else "data"
    found = tuple(checks), trial.counts()
    return VerifyReport(str(package.path), manifest.name, manifest.dtype, len(X), seed, source, *found)
