"""Who imports whom: the runtime needs neither torch nor onnx, and imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_session import build

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("torch", "onnx", "onnx_ir", "onnxscript", "icnnrt_models", "icnnrt_exporters", "scipy", "sklearn")

# A module may import modules of its own tier and of lower ones. Tier 0 is pure: no onnxruntime, no session.
TIERS = {
    "errors": 0,
    "status": 0,
    "domains": 0,
    "reference": 0,
    "certificate": 0,
    "bregman": 0,
    "_fields": 0,
    "_printable": 0,
    "_files": 0,
    "_wire": 0,
    "_forks": 0,
    "_turns": 0,
    "_once": 0,
    "_weight_sets": 0,
    "_upgrade": 0,
    "signatures": 0,
    "signs": 0,
    "manifest": 0,
    "package": 0,
    "solution": 0,
    "checkpoints": 0,
    "_arguments": 0,
    "limits": 0,
    "_chunks": 0,
    "tabular": 0,
    "_build_info": 0,
    "_onnx_graph": 0,
    "_onnx_numpy": 0,
    "_curvature": 0,
    "_univariate": 0,
    "_convexity_rules": 0,
    "_convexity_bounds": 0,
    "_convexity_grounds": 0,
    "_kept_convex": 0,
    "convexity": 0,
    "golden": 0,
    "qp_status": 0,
    "qp_advice": 0,
    "qp_reference": 0,
    "_piecewise": 0,
    "lp_files": 0,
    "bundle_qp": 0,
    "_native": 1,
    "ort": 1,
    "_served": 1,
    "_runner": 1,
    "adjoint": 2,
    "session": 2,
    "quadratic_program": 2,
    "polyhedron": 2,
    "qp_solver": 2,
    "epigraph": 3,
    "__init__": 3,
    "finetune": 3,
    "federated": 3,
    "verify": 3,
    "recommend": 3,
    "repair": 3,
    "cli": 4,
    "cli_tune": 4,
    "cli_repair": 4,
    "cli_epigraph": 4,
    "__main__": 4,
}
MAY_IMPORT_ONNXRUNTIME = 1


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(file: Path) -> set[str]:
    """The modules a file imports, in full, wherever in it the import stands; TYPE_CHECKING blocks aside."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            # `from icnnrt import certificate` names a module, `from icnnrt.errors import InputError` does not.
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= named if node.module == "icnnrt" else {node.module}
    return found


def test_the_runtime_serves_a_package_without_torch_or_onnx(tmp_path: Path) -> None:
    path = str(build(tmp_path / "tiny.icnn"))
    loaded = python(
        "import sys, icnnrt, numpy as np\n"
        f"session = icnnrt.load({path!r})\n"
        "solution = session.argmin(np.ones((2, 2, 2)))\n"
        "session.value_and_gradient(solution.x, solution.y)\n"
        "session.vjp(solution, solution.y)\n"
        "icnnrt.qp(np.eye(2), np.ones(2), np.eye(2), np.ones(2)).vjp(np.ones(2)).G\n"
        "print(*sys.modules, sep='\\n')\n"
    ).split()
    assert "onnxruntime" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(FOREIGN)


def test_import_icnnrt_is_light_and_packages_need_no_onnxruntime(tmp_path: Path) -> None:
    assert python("import sys, icnnrt; print([m for m in ('numpy', 'onnxruntime') if m in sys.modules])") == "[]\n"
    path = str(build(tmp_path / "tiny.icnn"))
    code = f"import sys, icnnrt; icnnrt.Package.open({path!r}); icnnrt.Status; print('onnxruntime' in sys.modules)"
    assert python(code) == "False\n"


def test_the_version_is_a_string() -> None:
    assert python("import icnnrt; print(icnnrt.__version__)").strip()


MODULES = sorted((ROOT / "icnnrt").glob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_modules_import_only_what_their_tier_may(file: Path) -> None:
    assert file.stem in TIERS, f"icnnrt/{file.name} is new: say in TIERS which modules it may import"
    own = TIERS[file.stem]
    for module in imports(file):
        head, _, rest = module.partition(".")
        assert head not in FOREIGN, f"icnnrt/{file.name} imports {module}"
        if head == "onnxruntime":
            assert own >= MAY_IMPORT_ONNXRUNTIME, f"icnnrt/{file.name} is pure, but imports onnxruntime"
        if head == "icnnrt" and rest:
            other = rest.partition(".")[0]
            if other in TIERS:
                assert TIERS[other] <= own, f"icnnrt/{file.name} imports {module}, which stands above it"


@pytest.mark.parametrize(
    ("package", "banned"), [("models/icnnrt_models", ("icnnrt_exporters",)), ("exporters/icnnrt_exporters", ())]
)
def test_packages_import_one_way(package: str, banned: tuple[str, ...]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        heads = {module.partition(".")[0] for module in imports(file)}
        assert not heads & set(banned), f"{file.relative_to(ROOT)} imports what stands above it"
