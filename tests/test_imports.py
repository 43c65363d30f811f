"""Who imports whom: the runtime needs neither torch nor onnx, and imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_session import build

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("torch", "onnx", "onnx_ir", "onnxscript", "icnnrt_models", "icnnrt_exporters", "scipy", "sklearn")

# Folders and modules of icnnrt, lowest first. A file may import what stands in a line above its own, and from its own
# folder; nothing that stands beside it.
LAYERS = (
    ("_build_info", "printable"),
    ("errors",),
    ("arguments", "native_library"),
    ("limits", "mathematics", "ort"),
    ("format",),
    ("convexity", "programs"),
    ("serving",),
    ("tuning", "checking", "epigraph", "__init__"),
    ("federated", "integrations"),
    ("cli",),
    ("__main__",),
)
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names}
MAY_IMPORT_ONNXRUNTIME = ("ort", "serving", "checking", "cli")
# Reading a package, opening and using a session needs no prover: what does, imports it where it is used.
WITHOUT_PROVER = ("serving",)


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(file: Path, *, at_once: bool = False) -> set[str]:
    """The modules a file imports, in full, wherever in it the import stands, TYPE_CHECKING blocks aside.

    `at_once`: those alone that it imports when it is imported itself.
    """
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    aside = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        or (at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in aside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            # `from icnnrt.mathematics import certificate` names a module, `from icnnrt.errors import InputError` not.
            found |= {node.module} if node.module.startswith("icnnrt.") else set()
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
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


HOME = ROOT / "icnnrt"
MODULES = sorted(HOME.rglob("*.py"))


def place(file: Path, home: Path) -> str:
    """Where in LAYERS a file of a package stands."""
    return file.relative_to(home).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(HOME)))
def test_imports_go_down(file: Path) -> None:
    own = place(file, HOME)
    assert own in LAYER, f"icnnrt/{own} is new: say in LAYERS where it stands"
    for module in imports(file):
        head, _, rest = module.partition(".")
        assert head not in FOREIGN, f"{file} imports {module}"
        if head == "onnxruntime":
            assert own in MAY_IMPORT_ONNXRUNTIME, f"{file} is pure, but imports onnxruntime"
        other = rest.partition(".")[0]
        if head == "icnnrt" and other in LAYER and other != own:
            assert LAYER[other] < LAYER[own], f"{file} imports {module}, which does not stand below it"
    if own in WITHOUT_PROVER:
        assert not any(module.startswith("icnnrt.convexity") for module in imports(file, at_once=True))


def test_no_file_imports_itself_by_way_of_others() -> None:
    """What is imported when a file is: of any two files one at most needs the other."""
    files = {
        ".".join(("icnnrt", *file.relative_to(HOME).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in MODULES
        if file != HOME / "__init__.py"  # which imports what it names when it is asked for
    }
    needs = {}
    for name, file in files.items():
        found = imports(file, at_once=True) & files.keys()
        # `from icnnrt.convexity import rules` is of the module alone, though the package's own file runs before it.
        needs[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)}
    left = dict(needs)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


# The packages above, likewise.
MODELS = (("networks",), ("layers",), ("digits", "__init__"))
EXPORTERS = (
    ("versions", "surgery"),
    ("tracing", "operators"),
    ("graphs",),
    ("assembly",),
    ("writing", "checks"),
    ("torch_files", "energy_package", "qp_package", "checkpoint"),
    ("exporter",),
    ("__init__", "demo"),
    ("commands",),
)


@pytest.mark.parametrize(
    ("package", "layers", "banned"),
    [("models/icnnrt_models", MODELS, ("icnnrt_exporters",)), ("exporters/icnnrt_exporters", EXPORTERS, ())],
    ids=["models", "exporters"],
)
def test_packages_import_one_way(package: str, layers: tuple[tuple[str, ...], ...], banned: tuple[str, ...]) -> None:
    home = ROOT / package
    layer = {name: height for height, names in enumerate(layers) for name in names}
    files = sorted(home.rglob("*.py"))
    assert files
    for file in files:
        own = place(file, home)
        assert own in layer, f"{file.relative_to(ROOT)} is new: say where it stands"
        for module in imports(file):
            head, _, rest = module.partition(".")
            assert head not in banned, f"{file.relative_to(ROOT)} imports what stands above it"
            other = rest.partition(".")[0]
            if head == home.name and other in layer and other != own:
                assert layer[other] < layer[own], f"{file.relative_to(ROOT)} imports {module}, not below it"


# --- Private names -------------------------------------------------------------------------------

# Not private, whatever they begin with: the methods of a named tuple, and what Python and torch have no other name for.
NOT_PRIVATE = {
    *("_asdict", "_fields", "_make", "_replace", "_current_frames", "_exit", "_getframe"),
    *("_can_decompose", "_modules", "_saved_training", "_schema", "_DEFAULT_REWRITE_RULES", "_target_pattern"),
    *("_TypePromotionInterpreter", "_maybe_promote_node", "_set_current_node"),
}
OF_OTHERS = ("torch.", "aten.")


def private_of_others(file: Path) -> set[str]:
    """Names with one underscore that a file uses and does not itself define: those of other files."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.Attribute):
            # What a base class defines in another file is an object's own.
            of_others = ast.unparse(node).startswith(OF_OTHERS)
            if not of_others and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("torch"):
            used |= {alias.name for alias in node.names}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    return private - own - NOT_PRIVATE


@pytest.mark.parametrize("home", ["icnnrt", "models/icnnrt_models", "exporters/icnnrt_exporters"])
def test_private_names_stay_in_their_file(home: str) -> None:
    found = {str(file.relative_to(ROOT)): private_of_others(file) for file in sorted((ROOT / home).rglob("*.py"))}
    found = {file: names for file, names in found.items() if names}
    assert not found
