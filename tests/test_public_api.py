"""Every public name of the runtime is listed here: adding, renaming or dropping one is a decision, not an accident."""

import importlib
import inspect
import pkgutil

import pytest

import icnnrt

# Classes and functions that each module defines under a name without an underscore.
PUBLIC = {
    "checking.golden": {"Replayed", "compute", "replay"},
    "checking.recommend": {"Recommendation", "prefixes", "recommend"},
    "checking.repair": {"RepairReport", "project"},
    "checking.report": {"Check", "VerifyReport", "judged", "median", "skipped", "worst"},
    "checking.verify": {"Row", "verify"},
    "cli.app": {"as_command", "console", "icnnrt_command", "number", "one_line", "print_json", "tell", "with_limits"},
    "cli.doctor": {"doctor"},
    "cli.epigraph": {"epigraph"},
    "cli.inspect": {"inspect"},
    "cli.qp": {"qp"},
    "cli.repair": {"repair"},
    "cli.run": {"run"},
    "cli.tabular": {"bound", "check_result", "check_size", "read_archive", "read_array", "write_answers"},
    "cli.tune": {"tune"},
    "cli.verify": {"verify"},
    "convexity.prover": {"Repeated", "grounds", "prove"},
    "epigraph.problem": {"EpigraphProblem", "EpigraphSolution", "epigraph"},
    "errors": {
        "CertificateError",
        "ExportError",
        "IcnnrtError",
        "InputError",
        "LimitError",
        "MissingDependencyError",
        "PackageError",
        "ProviderError",
        "SampleError",
    },
    "federated": {"Local", "client_app", "from_record", "get_weights", "set_weights", "to_record", "weighted_average"},
    "format.checkpoints": {"Checkpoint", "History", "architecture", "check_apart", "fingerprint_points", "network_of"},
    "format.manifest": {
        "Domain",
        "File",
        "GraphFile",
        "Manifest",
        "OpSet",
        "PolyhedronSpec",
        "SolverSpec",
        "TrainingSpec",
        "WeightSpec",
        "WeightsFile",
    },
    "format.package": {"Package", "opened", "write"},
    "format.signatures": {
        "Signature",
        "Tensor",
        "arrays_of",
        "arrays_of_polyhedron",
        "declared",
        "expected",
        "fits",
        "listed",
        "outputs_of",
        "shown",
        "state_of",
    },
    "format.signs": {"Run", "Sign", "united"},
    "format.verdict": {"Convexity", "Evidence", "Witness", "box_of"},
    "integrations.qpsolvers": {"register", "solve_problem"},
    "limits": {
        "Deadline",
        "Limited",
        "Limits",
        "call",
        "check",
        "checked_limits",
        "deadline",
        "each_call",
        "ended",
        "needs_memory",
        "within",
    },
    "mathematics.bregman": {"adjoint", "argmin", "bregman_adjoint", "bregman_argmin"},
    "mathematics.bundle": {"Trajectory", "argmin"},
    "mathematics.bundle_qp": {
        "PolyhedronCotangents",
        "bundle_qp_adjoint",
        "bundle_qp_argmin",
        "bundle_qp_bound",
        "bundle_qp_excess",
        "bundle_qp_implicit",
        "bundle_qp_models",
        "bundle_qp_status",
        "bundle_qp_uncertainty",
        "qp_existing",
    },
    "mathematics.certificate": {
        "Tolerances",
        "convexity_violation",
        "differentiable",
        "duality_gap",
        "implied_point",
        "judge",
        "kkt_residuals",
        "magnification",
        "relative_residual",
        "rounding",
        "status_of",
        "uncertainty",
        "unit",
    },
    "mathematics.condensed_kkt": {"Matrices", "matrices", "solver", "transposed"},
    "mathematics.cut_model": {
        "Cuts",
        "InnerSolution",
        "Iterate",
        "Model",
        "certified",
        "first",
        "inner_solution",
        "prepared",
        "solve",
        "solved",
        "step",
        "unfinished",
    },
    "mathematics.domains": {
        "Coordinates",
        "Domain",
        "box_coordinates",
        "check_bounds",
        "coordinates",
        "distance",
        "space_coordinates",
    },
    "mathematics.infeasibility": {"farkas", "recession"},
    "mathematics.interior_point": {
        "Answer",
        "Equilibrated",
        "Iterate",
        "Problem",
        "Units",
        "apart",
        "beyond",
        "both",
        "bounds_of",
        "equilibrated",
        "evaluated",
        "finished",
        "first",
        "interior_point",
        "measured",
        "newton",
        "size_of_z",
        "split",
        "step",
        "swept",
        "unit",
        "unit_of_cost",
        "units",
    },
    "mathematics.implicit_adjoint": {"implicit_adjoint"},
    "mathematics.kkt_adjoint": {"adjoint", "kkt_adjoint"},
    "mathematics.namespace": {"Eager", "Namespace", "Numpy"},
    "mathematics.polyhedron": {"Model", "PolyhedronTrajectory", "argmin", "status"},
    "mathematics.polyhedron_adjoint": {"ProgramCotangents", "pulled_back"},
    "mathematics.polyhedron_answers": {"answers", "doubt", "known", "solved"},
    "mathematics.polyhedron_programs": {"Polyhedron", "Programs", "steepness"},
    "mathematics.qp_adjoint": {"Adjoint", "Held", "begin", "finished", "gradients", "held", "qp_adjoint", "step"},
    "mathematics.quadratic_program": {"Precision", "Solution", "solve"},
    "mathematics.qp_advice": {"far_bound", "qp_advice", "qp_cause"},
    "mathematics.qp_data": {"Sizes", "check_shapes"},
    "mathematics.qp_names": set(),
    "mathematics.minimum_degree": {"Symbolic", "minimum_degree"},
    "mathematics.qp_pattern": {"QPPattern"},
    "mathematics.qp_reference": {
        "QP",
        "QPCotangents",
        "QPReference",
        "QPSensitivity",
        "kkt_residual",
        "precision_of",
        "qp_adjoint",
        "qp_gradients",
        "qp_sensitivity",
        "qp_solve",
    },
    "mathematics.qp_reliability": {
        "dependent",
        "existing",
        "gradient_advice",
        "moved",
        "moves",
        "reliable",
        "weak_rows",
    },
    "mathematics.qp_settings": {"Settings", "checked_smoothing", "checked_tolerance"},
    "mathematics.qp_smoothing": {"Smoothed", "adjoint", "central_point", "newton_step", "off_path", "smoothed"},
    "mathematics.qp_status": {"QPStatus", "advise", "statuses"},
    "mathematics.qp_tangent": {"tangent_residuals"},
    "mathematics.recursive_adjoint": {
        "CoordinatesCotangents",
        "CutCotangents",
        "coordinates_adjoint",
        "recursive_adjoint",
    },
    "mathematics.reference": {
        "argmin_adjoint",
        "bundle_entropy_argmin",
        "bundle_entropy_solve",
        "coordinates_adjoint",
        "in_coordinates",
        "kkt_adjoint",
    },
    "mathematics.rounding": {
        "excess",
        "known",
        "magnification",
        "rounding",
        "rounding_at",
        "sizes",
        "sizes_at",
        "uncertainty",
        "uncertainty_at",
        "violation",
    },
    "mathematics.status": {"Status", "advise", "advise_polyhedron", "imprecise", "summarise"},
    "ort": {
        "bound_memory",
        "checked_providers",
        "checked_threads",
        "first_line",
        "native_operators",
        "onnxruntime",
        "open_session",
        "provider_names",
        "session_options",
    },
    "serving.adjoint": {"Cotangents", "leave_out", "own", "vjp"},
    "serving.argmin": {"ArgminSolution", "argmin", "judged"},
    "serving.energy_session": {"EnergySession"},
    "serving.heads": {"Pulled", "demand_value", "evaluated", "pulled_back", "weights_bar"},
    "serving.load": {"load"},
    "serving.operators": {"operator_session", "stopped_after"},
    "serving.polyhedron": {
        "PolyhedronSolution",
        "argmin",
        "fed",
        "programs_by",
        "usual_settings",
        "value_and_gradient",
    },
    "serving.polyhedron_adjoint": {"ConstraintCotangents", "vjp"},
    "serving.qp_session": {"QPNetworkSolution", "QPSession"},
    "serving.qp_smoothed": {"Points", "smoothed_adjoint"},
    "serving.qp_solver": {"QPData", "QPSolver"},
    "serving.quadratic_program": {"QPGradients", "QPSolution", "QPTangents", "array_solver", "qp"},
    "serving.session": {"Session"},
    "serving.solution": {"EnergySolution", "Record", "Solution", "demand_converged", "first_of", "untrusted"},
    "programs.program": {"Coo", "Program"},
    "programs.reading": {"ProgramFile", "read_program"},
    "programs.writing": {"write_program"},
    "tuning.finetune": {"FineTuner"},
    "tuning.reports": {"EpochReport", "FitReport", "StepReport"},
}
# What others of our own modules use, and nobody else should.
INTERNAL = {
    "arguments",
    "checking.answers",
    "checking.differences",
    "checking.energy",
    "checking.problems",
    "checking.stored",
    "checking.trial",
    "cli.commands",
    "cli.following",
    "cli.tuning_report",
    "convexity.bounds",
    "convexity.memory",
    "convexity.onnx_numpy",
    "convexity.piecewise",
    "convexity.quadratic",
    "convexity.rests_on",
    "convexity.rules",
    "convexity.samples",
    "convexity.segments",
    "convexity.univariate",
    "convexity.walk",
    "convexity.weighing",
    "format.contents",
    "format.fields",
    "format.files",
    "format.folder",
    "format.onnx_graph",
    "format.replacement",
    "format.upgrade",
    "format.wire",
    "native_library",
    "printable",
    "serving.chunks",
    "serving.direct_kernels",
    "serving.domain_arguments",
    "serving.forks",
    "serving.kept_convex",
    "serving.once",
    "serving.runner",
    "serving.served",
    "serving.turns",
    "serving.weight_sets",
    "tuning.checkpointing",
    "tuning.epochs",
    "tuning.given",
    "tuning.judges",
}
TOP = {
    "ArgminSolution",
    "EnergySession",
    "PolyhedronSolution",
    "QPNetworkSolution",
    "QPPattern",
    "QPSession",
    "CertificateError",
    "Cotangents",
    "EpochReport",
    "ExportError",
    "FineTuner",
    "FitReport",
    "IcnnrtError",
    "InputError",
    "LimitError",
    "Limits",
    "MissingDependencyError",
    "Package",
    "PackageError",
    "ProviderError",
    "QPData",
    "QPGradients",
    "QPSolution",
    "QPSolver",
    "SampleError",
    "Session",
    "Solution",
    "Status",
    "StepReport",
    "__version__",
    "load",
    "ops_library",
    "qp",
}
# What sessions of both kinds have, and the calls that are one kind's: the other one refuses them in a sentence.
SESSION = {
    "close",
    "convexity",
    "dtype",
    "limits",
    "manifest",
    "native",
    "options",
    "package",
    "path",
    "providers",
    "runner",
    "update_weights",
    "weights",
    "weights_id",
}
CALLS = {
    "argmin",
    "argmin_polyhedron",
    "gradient",
    "gradient_x",
    "hessian",
    "hvp",
    "prove_convexity",
    "pullback",
    "solve_qp",
    "value",
    "value_and_gradient",
    "value_gradient_hessian",
    "vjp",
    "vjp_polyhedron",
}
TUNER = {
    "check",
    "fit",
    "keep",
    "learning_rate",
    "loss",
    "resume",
    "rollback",
    "save",
    "set_weights",
    "settle",
    "state",
    "step",
    "steps",
    "undone",
    "why_undone",
    "write_package",
}

MODULES = sorted(
    m.name.removeprefix("icnnrt.")
    for m in pkgutil.walk_packages(icnnrt.__path__, "icnnrt.")
    if not m.ispkg and not m.name.startswith("icnnrt._")
)


def defined(name: str) -> dict[str, object]:
    """The public classes and functions that a module itself defines."""
    module = importlib.import_module(f"icnnrt.{name}")
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def test_the_top_level_names() -> None:
    assert set(icnnrt.__all__) == TOP
    assert list(icnnrt.__all__) == sorted(icnnrt.__all__)
    for name in TOP:
        assert getattr(icnnrt, name) is not None
    assert set(dir(icnnrt)) >= TOP
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        icnnrt.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_known_and_documented(name: str) -> None:
    assert importlib.import_module(f"icnnrt.{name}").__doc__
    if name in INTERNAL:
        return
    assert name in PUBLIC, f"icnnrt.{name} is new: list its public names in PUBLIC, or the module in INTERNAL"
    found = defined(name)
    if name == "format.manifest":  # it shares its checks of JSON values with package; users have no use for those
        found = {key: value for key, value in found.items() if inspect.isclass(value)}
    assert set(found) == PUBLIC[name]
    for key in PUBLIC[name]:
        assert inspect.getdoc(found[key]), f"icnnrt.{name}.{key} has no docstring"


def test_the_prover_and_the_epigraph_are_packages_with_names_of_their_own() -> None:
    for name in ("convexity", "epigraph"):
        package = importlib.import_module(f"icnnrt.{name}")
        assert package.__all__ == sorted(package.__all__)
        for one in package.__all__:
            assert inspect.getdoc(getattr(package, one))


@pytest.mark.parametrize(
    ("owner", "expected"),
    [("Session", SESSION), ("EnergySession", CALLS), ("QPSession", CALLS), ("FineTuner", TUNER)],
)
def test_the_methods_of_a_session_and_of_a_tuner(owner: str, expected: set[str]) -> None:
    found = {name: value for name, value in vars(getattr(icnnrt, owner)).items() if not name.startswith("_")}
    assert set(found) == expected
    for name, value in found.items():
        assert inspect.getdoc(value), f"{owner}.{name} has no docstring"
