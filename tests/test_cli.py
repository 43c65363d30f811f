"""The command line: what it prints, its exit codes, and one sentence for every bad input."""

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("onnxruntime")

from typer.testing import CliRunner

from icnnrt import native_library
from icnnrt.checking.recommend import recommend
from icnnrt.cli import app as console_app
from icnnrt.cli import run as run_command
from icnnrt.cli import tabular
from icnnrt.cli import verify as verify_command
from icnnrt.cli.commands import app
from icnnrt.errors import InputError
from icnnrt.serving.load import load


def icnnrt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def sentence(result: Any, code: int = 1) -> str:
    """The one line on stderr of a command that failed, with nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("icnnrt: ")
    assert "Traceback" not in result.stderr
    return str(lines[0])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [20, 4] in every format, as files x.*."""
    folder = tmp_path_factory.mktemp("inputs")
    x = np.random.default_rng(0).standard_normal((20, 4))
    np.savez(folder / "x.npz", x=x, other=x)
    np.savez(folder / "only.npz", anything=x)
    np.save(folder / "x.npy", x)
    np.savetxt(folder / "x.csv", x, delimiter=",", fmt="%.17g")
    np.savetxt(folder / "named.csv", x, delimiter=",", fmt="%.17g", header="a,b,c,d", comments="")
    x[3, 1] = np.nan
    np.save(folder / "nan.npy", x)
    return folder


# --- The command line as a whole -----------------------------------------------------------------


def python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


LOADED = "import atexit, sys\natexit.register(lambda: print('LOADED', *sys.modules))\n"
RUN_MAIN = "import runpy\nrunpy.run_module('icnnrt', run_name='__main__')\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["doctor"], ["RUN"], ["INSPECT"]])
def test_neither_help_nor_the_runtime_commands_import_torch(
    arguments: list[str], digits_like_package: Path, inputs: Path
) -> None:
    if arguments == ["RUN"]:
        arguments = ["run", str(digits_like_package), str(inputs / "x.npy")]
    elif arguments == ["INSPECT"]:
        arguments = ["inspect", str(digits_like_package)]
    done = python(LOADED + RUN_MAIN, *arguments)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.partition("LOADED")[2].split()}
    assert "icnnrt" in loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxscript", "sklearn", "matplotlib"}


def test_help_lists_the_commands_of_all_packages() -> None:
    done = subprocess.run([sys.executable, "-m", "icnnrt", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    declared = {point.name for point in importlib.metadata.entry_points(group=console_app.ENTRY_POINTS)}
    assert {"export", "demo"} <= declared
    for name in {"run", "inspect", "verify", "doctor", *declared}:
        assert re.search(rf"^\W*{name}\s+\w", done.stdout, re.MULTILINE), name
    for code in ("0 done", "3 run: some sample did not converge", "4 verify: a check failed"):
        assert code in done.stdout


def test_entry_points_are_declared_as_they_are_written() -> None:
    import tomllib

    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    commands = pytest.importorskip("icnnrt_exporters.commands")
    for name, value in declared["project"]["entry-points"][console_app.ENTRY_POINTS].items():
        assert value == f"icnnrt_exporters.commands:{name}"
        assert callable(getattr(commands, name))
    assert declared["project"]["entry-points"][verify_command.CHECKS] == {
        "torch_files": "icnnrt_exporters.commands:torch_files"
    }
    assert callable(commands.torch_files)


def test_without_its_check_verify_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, digits_like_package: Path, tmp_path: Path
) -> None:
    points: list[importlib.metadata.EntryPoint] = []
    plain = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **k: points if k.get("group") == verify_command.CHECKS else plain(**k),
    )
    command = ("verify", digits_like_package, "--torchscript", tmp_path / "f.pt")
    assert "no check of files of torch is installed; pip install" in sentence(icnnrt(*command))
    points.append(importlib.metadata.EntryPoint("torch_files", "no_such_module_here:check", verify_command.CHECKS))
    assert "cannot be loaded from no_such_module_here" in sentence(icnnrt(*command))


def test_the_version() -> None:
    result = icnnrt("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == importlib.metadata.version("icnnrt")


def test_wrong_usage_is_exit_code_2(digits_like_package: Path, inputs: Path) -> None:
    assert icnnrt("nonsense").exit_code == 2
    assert icnnrt("run", digits_like_package).exit_code == 2
    assert icnnrt("run", digits_like_package, inputs / "x.npy", "--threads", "0").exit_code == 2
    assert icnnrt("verify", digits_like_package, "--samples", "none").exit_code == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_or_rich_one_sentence_says_what_to_install(missing: str) -> None:
    done = python(f"import sys\nsys.modules[{missing!r}] = None\n" + RUN_MAIN, "--help")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'icnnrt[cli]'" in done.stderr


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("export", "torch", "export"), ("pack", "onnx", "export"), ("demo", "sklearn", "demo"), ("demo", "torch", "demo")],
)
def test_without_torch_the_commands_are_listed_and_say_what_to_install(command: str, missing: str, extra: str) -> None:
    block = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
        f"sys.modules[{missing!r}] = None\n"
    )
    assert python(block + RUN_MAIN, "--help").returncode == 0
    arguments = {"export": ["export", "m:f", "--out", "o"], "pack": ["pack", "p", "o.onnx"], "demo": ["demo"]}[command]
    done = python(block + RUN_MAIN, *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"needs {missing}: pip install 'icnnrt[{extra}]'" in done.stderr


def test_a_command_that_cannot_be_loaded_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("broken", "no_such_module_here:command", console_app.ENTRY_POINTS)
    monkeypatch.setattr(console_app, "_entry_points", lambda: {"broken": point})
    monkeypatch.setattr(typer_group(), "commands", dict(typer_group().commands))
    helped = icnnrt("--help")
    assert helped.exit_code == 0
    assert "not available" in helped.stdout
    assert "the command cannot be loaded from no_such_module_here" in sentence(icnnrt("broken", "a", "--b", "c"))


def typer_group() -> Any:
    import typer

    return typer.main.get_command(app)


# --- run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.npz", "only.npz", "x.npy", "x.csv", "named.csv"])
def test_run_reads_every_format_and_prints_a_table(name: str, digits_like_package: Path, inputs: Path) -> None:
    result = icnnrt("run", digits_like_package, inputs / name)
    assert result.exit_code == 0, result.output
    for text in ("20: 20 CONVERGED", "median", "ms a sample", "energy", "and 12 more"):
        assert text in result.stdout


def test_run_says_whether_kernels_ran(digits_like_package: Path, inputs: Path) -> None:
    built = native_library.build().library is not None
    for flag, native in (([], built), (["--portable"], False), *([(["--native"], True)] if built else [])):
        arguments = ["run", digits_like_package, inputs / "x.npy", *flag]
        assert json.loads(icnnrt(*arguments, "--json").stdout)["native"] is native
        assert ("CPUExecutionProvider, native operators" in icnnrt(*arguments).stdout) is native


def test_every_format_of_input_and_output_holds_the_same_numbers(
    tmp_path: Path, digits_like_package: Path, inputs: Path
) -> None:
    import icnnrt as library

    true = library.load(digits_like_package).argmin(np.load(inputs / "x.npy"))
    for name in ("x.npz", "x.csv"):
        for suffix in tabular.SUFFIXES:
            out = tmp_path / f"out{suffix}"
            assert icnnrt("run", digits_like_package, inputs / name, "--out", out).exit_code == 0
            if suffix == ".csv":
                y = tabular.read_array(out, "y", (5,)).astype(np.float32)
            elif suffix == ".npy":
                y = np.load(out)
            else:
                with np.load(out) as archive:
                    y = archive["y"]
                    for field in ("lam", "slopes", "energy", "gap", "residual", "status", "lam_history"):
                        np.testing.assert_array_equal(archive[field], getattr(true, field))
                    assert json.loads(str(archive["info"]))["iterations"] == 8
                    assert str(archive["weights_id"]) == true.weights_id
            np.testing.assert_array_equal(y, true.y)
    assert list(tmp_path.glob(".*")) == []


def test_a_bad_row_gets_a_status_and_exit_code_3_and_the_rest_is_written(
    tmp_path: Path, digits_like_package: Path, inputs: Path
) -> None:
    out = tmp_path / "out.npz"
    result = icnnrt("run", digits_like_package, inputs / "nan.npy", "--out", out)
    assert result.exit_code == 3
    assert "19 CONVERGED, 1 NOT_FINITE_INPUT" in result.stdout
    assert "sample 3: x holds NaN" in result.stdout
    with np.load(out) as archive:
        assert archive["status"].tolist() == [0] * 3 + [4] + [0] * 16
        assert np.isnan(archive["y"][3]).all()


def test_strict_writes_nothing(tmp_path: Path, digits_like_package: Path, inputs: Path) -> None:
    result = icnnrt("run", digits_like_package, inputs / "nan.npy", "--out", tmp_path / "out.npy", "--strict")
    assert "1 of 20 samples did not converge, nothing is written: sample 3: x holds NaN" in sentence(result, 3)
    assert not list(tmp_path.iterdir())
    assert icnnrt("run", digits_like_package, inputs / "x.npy", "--strict").exit_code == 0


def test_json_is_one_object_and_nothing_else(tmp_path: Path, digits_like_package: Path, inputs: Path) -> None:
    result = icnnrt("run", digits_like_package, inputs / "nan.npy", "--json")
    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert content["samples"] == 20
    assert content["status"] == {"CONVERGED": 19, "NOT_FINITE_INPUT": 1}
    assert content["y"][3] == [None] * 5
    assert len(content["y"][0]) == 5
    content = json.loads(
        icnnrt("run", digits_like_package, inputs / "x.npy", "--json", "--out", tmp_path / "y.csv").stdout
    )
    assert content["out"].endswith("y.csv")
    assert "y" not in content


def test_large_inputs_run_in_batches_and_advice_names_the_sample_of_the_file(
    tmp_path: Path, digits_like_package: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    x = np.load(inputs / "x.npy")
    x[17] = np.inf
    np.save(tmp_path / "x.npy", x)
    assert icnnrt("run", digits_like_package, tmp_path / "x.npy", "--out", whole).exit_code == 3
    monkeypatch.setattr(run_command, "BATCH", 7)
    result = icnnrt("run", digits_like_package, tmp_path / "x.npy", "--out", parts)
    assert "sample 17: x holds" in result.stdout
    with np.load(whole) as a, np.load(parts) as b:
        assert set(a) == set(b)
        np.testing.assert_allclose(a["y"], b["y"], atol=1e-3)  # sums run in another order


def test_y_init_and_provider_and_threads(tmp_path: Path, digits_like_package: Path, inputs: Path) -> None:
    np.savez(tmp_path / "start.npz", y_init=np.full((20, 5), 0.25))
    command = ["run", digits_like_package, inputs / "x.npy", "--y-init", tmp_path / "start.npz"]
    out = tmp_path / "out.npz"
    assert icnnrt(*command, "--out", out, "--provider", "CPUExecutionProvider", "--threads", 2).exit_code == 0
    with np.load(out) as archive:
        assert (archive["cut_points"][:, 0] == 0.25).all()
    np.savez(tmp_path / "start.npz", y_init=np.full((20, 5), 1.5))
    assert "y_init: expected numbers in [0, 1]" in sentence(icnnrt(*command))
    np.savez(tmp_path / "start.npz", y_init=np.full((3, 5), 0.5))
    assert "y_init: expected shape [20, 5], but got [3, 5]; it needs one row for every" in sentence(icnnrt(*command))
    np.savetxt(tmp_path / "start.csv", np.zeros((20, 4)), delimiter=",")
    command[-1] = tmp_path / "start.csv"
    assert "expected 5 numbers a line, y_init of shape [5] flattened" in sentence(icnnrt(*command))


def test_no_samples_are_no_error(tmp_path: Path, digits_like_package: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 4)))
    result = icnnrt("run", digits_like_package, tmp_path / "none.npy", "--out", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["y"].shape == (0, 5)
    assert "no samples" in result.stdout
    assert "ms a sample" not in result.stdout


def write_npy(path: Path, header: str, data: bytes = b"") -> None:
    text = header.encode().ljust(118) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)


def test_every_bad_input_is_one_sentence(tmp_path: Path, digits_like_package: Path) -> None:
    def bad(name: str) -> str:
        return sentence(icnnrt("run", digits_like_package, tmp_path / name))

    assert "cannot be read" in bad("missing.npy")
    (tmp_path / "folder.npy").mkdir()
    assert "it is a folder" in bad("folder.npy")
    (tmp_path / "x.txt").touch()
    assert "ending in .npz, .npy or .csv, but got '.txt'; the ending tells the format, so use" in bad("x.txt")
    (tmp_path / "x").touch()
    assert "but got a name without an ending; the ending tells the format, so use one of these, such as x.npz." in bad(
        "x"
    )

    np.save(tmp_path / "wide.npy", np.zeros((3, 7)))
    assert "x: expected shape [B, 4], but got [3, 7]; the shape of a sample is fixed by" in bad("wide.npy")
    np.save(tmp_path / "single.npy", np.zeros(4))
    assert "x: expected shape [B, 4], but got [4]; a single sample needs a batch dimension" in bad("single.npy")
    np.save(tmp_path / "scalar.npy", np.float64(3))
    assert "but got []" in bad("scalar.npy")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    assert "expected real numbers, but got dtype <U1" in bad("text.npy")
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    assert "pickled Python objects, which are never loaded" in bad("pickled.npy")
    (tmp_path / "open.npy").write_bytes(b"\x93NUMPY\x01\0\x16\0{'descr': '<f8', 'a':\n(")
    assert "expected a .npy array, but got something else (" in bad("open.npy")
    (tmp_path / "no.npy").write_bytes(b"nonsense")
    assert "expected a .npy array" in bad("no.npy")
    (tmp_path / "empty.npy").touch()
    assert "expected a .npy array" in bad("empty.npy")
    write_npy(tmp_path / "huge.npy", "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 4), }")
    assert "its header promises 32000000000000 bytes" in bad("huge.npy")
    write_npy(tmp_path / "short.npy", "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 4), }", b"\0" * 90)
    assert "its header promises 96 bytes" in bad("short.npy") or "truncated" in bad("short.npy")
    write_npy(tmp_path / "code.npy", "__import__('os')")
    assert "expected a .npy array" in bad("code.npy")

    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    assert "expected an array named 'x', but got the arrays 'a', 'b'" in bad("two.npz")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    assert "pickled Python objects" in bad("pickled.npz")
    (tmp_path / "no.npz").write_bytes(b"nonsense")
    assert "expected a .npz archive" in bad("no.npz")
    with zipfile.ZipFile(tmp_path / "broken.npz", "w") as archive:
        archive.writestr("x.npy", "nonsense")
    assert "x: expected a .npy array" in bad("broken.npz")


def test_every_bad_csv_is_one_sentence(tmp_path: Path, digits_like_package: Path) -> None:
    path = tmp_path / "x.csv"
    for text, message in {
        "": "expected at least one line of numbers",
        "a,b,c,d\n": "expected at least one line of numbers",
        "1,2,3,4\n1,2,3\n": "expected 4 numbers a line, x of shape [4] flattened, but got 3 in line 2; write one whole",
        "1,2,3,4\n\n1,2,x,4\n": "expected a number in line 3, column 3, but got 'x'",
        "1,2,,4\n": "expected a number in line 1, column 3, but got ''",
        "a,b,3,d\n1,2,3,4\n": "expected a number in line 1, column 1, but got 'a'",
        "1;2;3;4\n5;6;7;8\n": "expected a number in line 2, column 1, but got '5;6;7;8'",
    }.items():
        path.write_text(text)
        assert message in sentence(icnnrt("run", digits_like_package, path)), text
    path.write_bytes(b"\xff\xfe1,2")
    assert "expected UTF-8 text" in sentence(icnnrt("run", digits_like_package, path))
    path.write_bytes(b"\xef\xbb\xbfa, b, c, d\r\n1, 2, 3, 4\r\n")
    assert icnnrt("run", digits_like_package, path).exit_code == 0


def test_shapes_of_more_dimensions_are_flat_in_a_csv(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2,3,4\n5,6,7,8\n")
    assert tabular.read_array(tmp_path / "x.csv", "x", (2, 2))[1].tolist() == [[5, 6], [7, 8]]


def test_arrays_in_fortran_order_and_of_other_dtypes(tmp_path: Path) -> None:
    for array in (np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(6, dtype=">i4").reshape(2, 3)):
        np.save(tmp_path / "x.npy", array)
        np.testing.assert_array_equal(tabular.read_array(tmp_path / "x.npy", "x", (3,)), array)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"more than 8 GiB; write \.npy or \.csv"):
        tabular.check_size(10**6, 20, 200, np.dtype(np.float32), ".npz")
    tabular.check_size(10**6, 20, 200, np.dtype(np.float32), ".npy")
    np.save(tmp_path / "x.npy", np.zeros((100, 4)))
    monkeypatch.setattr(tabular, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="at most 1000 can be there"):
        tabular.read_array(tmp_path / "x.npy", "x", (4,))
    (tmp_path / "x.csv").write_text("1,2,3,4\n" * 10)
    monkeypatch.setattr(tabular, "MAX_TEXT_BYTES", 20)
    with pytest.raises(InputError, match="expected at most 20 bytes of text"):
        tabular.read_array(tmp_path / "x.csv", "x", (4,))


def test_bad_outputs_and_providers(tmp_path: Path, digits_like_package: Path, inputs: Path) -> None:
    def bad(*options: object) -> str:
        return sentence(icnnrt("run", digits_like_package, inputs / "x.npy", *options))

    assert "ending in .npz, .npy or .csv, but got '.txt'" in bad("--out", tmp_path / "y.txt")
    assert "is not there; create it first" in bad("--out", tmp_path / "nowhere" / "y.npy")
    assert "is the input file itself" in bad("--out", inputs / "x.npy")
    (tmp_path / "y.npy").mkdir()
    assert "it is a folder" in bad("--out", tmp_path / "y.npy")
    assert "providers: Nonsense is not in this onnxruntime" in bad("--provider", "Nonsense")


# --- inspect -------------------------------------------------------------------------------------


def copy_of(package: Path, target: Path) -> Path:
    target.mkdir()
    for file in package.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_inspect_shows_everything(digits_like_package: Path) -> None:
    result = icnnrt("inspect", digits_like_package)
    assert result.exit_code == 0, result.output
    for text in (
        "digits_like",
        "icnnrt 2, float32, opset 21",
        "x [4] → y [5] in [0, 1]",
        "BundleEntropy: 8 cuts",
        "adjoint",
        "ai.icnnrt::BundleEntropySolve",
        "layers.1.W_z.weight",
        "[8, 8]",
        "nonnegative",
        "gap_median",
        "torch",
        "note  [a] test",
    ):
        assert text in result.stdout, text


def test_inspect_as_json(digits_like_package: Path) -> None:
    content = json.loads(icnnrt("inspect", digits_like_package, "--json").stdout)
    assert content["x_shape"] == [4]
    assert content["weights"]["tensors"]["layers.1.W_z.weight"]["min"] >= 0
    assert set(content["graphs"]) == {"value", "argmin", "adjoint"}


FIXTURES = Path(__file__).parent / "fixtures" / "version1"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as a hub's cache has it, of links to blobs, with a model card and data beside it."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "linked.icnn").mkdir()
    for number, file in enumerate(sorted((FIXTURES / "unit_box.icnn").iterdir())):
        (folder / f"blob{number}").write_bytes(file.read_bytes())
        (folder / "linked.icnn" / file.name).symlink_to(Path("..") / f"blob{number}")
    (folder / "linked.icnn" / "README.md").write_text("# A model")
    (folder / "linked.icnn" / ".gitattributes").touch()
    x = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.savez(folder / "data.npz", x=x, target=np.full((8, 3), 0.5, np.float32))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "linked.icnn"],
        ["run", "linked.icnn", "x.npy"],
        ["verify", "linked.icnn", "--data", "x.npy", "--recommend", "0.1"],
        ["tune", "linked.icnn", "data.npz", "--out", "OUT", "--epochs", "1"],
        ["repair", "linked.icnn", "--data", "x.npy", "--out", "OUT", "--project"],
        ["epigraph", "linked.icnn", "x.npy", "OUT.lp"],
        ["pack", "linked.icnn", "OUT.onnx"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_follows_links_where_asked(arguments: list[str], hub: Path, tmp_path: Path) -> None:
    places = [hub / a if (hub / a).exists() else a.replace("OUT", str(tmp_path / "out")) for a in arguments]
    assert "is a symbolic link; pass follow_links=True, or --follow-links" in sentence(icnnrt(*places))
    followed = icnnrt(*places, "--follow-links")
    if arguments[0] == "epigraph":  # which the network is not fit for
        assert "piecewise linear" in sentence(followed)
    else:
        assert followed.exit_code == 0, followed.output


def test_inspect_names_what_it_does_not_read(hub: Path) -> None:
    shown = icnnrt("inspect", hub / "linked.icnn", "--follow-links").stdout
    assert "beside the package, and not read: .gitattributes, README.md" in shown
    content = json.loads(icnnrt("inspect", hub / "linked.icnn", "--follow-links", "--json").stdout)
    assert content["ignored"] == [".gitattributes", "README.md"]


def test_tuning_in_place_keeps_what_lies_beside(hub: Path, tmp_path: Path) -> None:
    package = copy_of(FIXTURES / "unit_box.icnn", tmp_path / "mine.icnn")
    (package / "README.md").write_text("# Mine")
    tuned = icnnrt("tune", package, hub / "data.npz", "--out", package, "--overwrite", "--epochs", "1")
    assert tuned.exit_code == 0, tuned.output
    assert (package / "README.md").read_text() == "# Mine"
    (package / ".git").mkdir()
    refused = icnnrt("tune", package, hub / "data.npz", "--out", package, "--overwrite", "--epochs", "1")
    assert 'also holds ".git", which a replacement of the folder cannot take along' in sentence(refused)


@pytest.mark.parametrize("command", ["inspect", "verify", "run", "pack"])
def test_packages_that_cannot_be_opened(command: str, tmp_path: Path, digits_like_package: Path, inputs: Path) -> None:
    more = {"run": [inputs / "x.npy"], "pack": [tmp_path / "o.onnx"]}.get(command, [])
    assert "expected a package folder" in sentence(icnnrt(command, tmp_path / "missing.icnn", *more))
    tampered = copy_of(digits_like_package, tmp_path / "tampered.icnn")
    weights = bytearray((tampered / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (tampered / "weights.safetensors").write_bytes(weights)
    assert "weights.safetensors: its SHA-256 should be" in sentence(icnnrt(command, tampered, *more))


# --- verify --------------------------------------------------------------------------------------


def test_verify_passes_a_good_package(digits_like_package: Path, inputs: Path) -> None:
    result = icnnrt("verify", digits_like_package, "--data", inputs / "x.csv", "--samples", 8)
    assert result.exit_code == 0, result.output
    assert "no check failed" in result.stdout
    assert "8 samples of the data" in result.stdout


def test_verify_fails_a_package_that_is_not_convex_with_exit_code_4(nonconvex_package: Path) -> None:
    result = icnnrt("verify", nonconvex_package)
    assert result.exit_code == 4
    assert re.search(r"failed: .*convexity", result.stdout)
    result = icnnrt("verify", nonconvex_package, "--json")
    assert result.exit_code == 4
    content = json.loads(result.stdout)
    assert content["passed"] is False
    assert {check["name"]: check["verdict"] for check in content["checks"]}["convexity"] == "fail"


def test_verify_recommends_iterations_for_a_gap(digits_like_package: Path, inputs: Path) -> None:
    options = ("--data", inputs / "x.npy", "--samples", 4, "--recommend")
    told = json.loads(icnnrt("verify", digits_like_package, *options, "1e-2", "--json").stdout)["recommend"]
    with load(digits_like_package) as session:
        expected = recommend(session, np.load(inputs / "x.npy")[:4], 1e-2)
    assert told == json.loads(json.dumps(expected.as_dict()))
    shown = icnnrt("verify", digits_like_package, *options, "1e-2")
    assert shown.exit_code == 0
    K = told["iterations"]
    assert f"90 %: {K['90']}, 99 %: {K['99']}, 100 %: {K['100']}; the package has 8" in shown.stdout
    assert "gap: expected a positive number" in sentence(icnnrt("verify", digits_like_package, *options, "-1"))


def test_verify_with_bad_data(tmp_path: Path, digits_like_package: Path) -> None:
    def bad(x: Any) -> str:
        np.save(tmp_path / "x.npy", x)
        return sentence(icnnrt("verify", digits_like_package, "--data", tmp_path / "x.npy"))

    assert "x: expected shape [B, 4], but got [3, 7]" in bad(np.zeros((3, 7)))
    assert "x: expected at least one sample" in bad(np.full((3, 4), np.nan))
    assert "cannot be read" in sentence(icnnrt("verify", digits_like_package, "--data", tmp_path / "missing.npy"))


# --- doctor --------------------------------------------------------------------------------------


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions({"onnxruntime": "1.31", "onnxruntime-gpu": ""}))
    result = icnnrt("doctor")
    assert result.exit_code == 0, result.output
    for text in ("python", "numpy", "CPUExecutionProvider", "native operators", "packages can be served"):
        assert text in result.stdout
    content = json.loads(icnnrt("doctor", "--json").stdout)
    assert content["problems"] == []
    assert content["threads"] == 1
    native, built = content["native"], native_library.build()
    assert native["library"] == (str(built.library) if built.library else None)
    assert (native["instruction_set"] in native["compiled_for"]) == (built.library is not None)
    assert bool(native["reason"]) == (built.library is None)


def test_doctor_tells_of_a_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions({"onnxruntime": "1.31", "onnxruntime-gpu": ""}))
    broken = tmp_path / "libicnnrt_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native_library, "build", lambda: native_library.Build(broken, "", "GNU 12", ("x86_64_v2",)))
    native_library.kernels.cache_clear()
    result = icnnrt("doctor", "--json")
    native_library.kernels.cache_clear()
    assert result.exit_code == 1
    assert f"native: onnxruntime cannot use {broken}" in json.loads(result.stdout)["problems"][0]


def versions(given: dict[str, str]) -> Any:
    plain = importlib.metadata.version

    def version(name: str) -> str:
        if given.get(name) == "":
            raise importlib.metadata.PackageNotFoundError(name)
        return given.get(name) or plain(name)

    return version


def test_doctor_finds_both_builds_of_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions({"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}))
    result = icnnrt("doctor")
    assert result.exit_code == 1
    assert "both installed and overwrite each other: pip uninstall onnxruntime onnxruntime-gpu" in result.stdout
    content = json.loads(icnnrt("doctor", "--json").stdout)
    assert len(content["problems"]) == 1


@pytest.mark.parametrize(("there", "other"), [("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-gpu", "onnxruntime")])
def test_doctor_does_not_miss_the_other_build_of_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, there: str, other: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions({there: "1.31", other: ""}))
    names = {line.split()[0]: line for line in icnnrt("doctor").stdout.splitlines() if line.strip()}
    assert "1.31" in names[there]
    assert other not in names
    assert json.loads(icnnrt("doctor", "--json").stdout)["versions"][other] == ""


def test_doctor_without_onnxruntime() -> None:
    done = python("import sys\nsys.modules['onnxruntime'] = None\n" + RUN_MAIN, "doctor", "--json")
    assert done.returncode == 1
    assert "pip install 'icnnrt[cpu]'" in json.loads(done.stdout)["problems"][0]


# --- export, pack, demo --------------------------------------------------------------------------


FACTORY = (
    "import torch\n"
    "from icnnrt_models import FICNN, BregmanProximalGradient, BundleEntropyArgmin\n"
    "def small(): return FICNN(2, 3, hidden=(3,), generator=torch.Generator().manual_seed(0))\n"
    "def layer(): return BundleEntropyArgmin(small(), iterations=3, steps=20)\n"
    "def bregman():\n"
    "    energy = FICNN(2, 3, hidden=(3,), activation='softplus', generator=torch.Generator().manual_seed(0))\n"
    "    return BregmanProximalGradient(energy, iterations=5, step_size=0.5)\n"
    "class Bare(torch.nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.net = small()\n"
    "    def forward(self, x, y): return self.net(x, y)\n"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the module `cli_factory`."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_factory", raising=False)
    (tmp_path / "cli_factory.py").write_text(FACTORY)
    return tmp_path


def test_export_then_run(here: Path) -> None:
    import torch

    from icnnrt_models import FICNN

    trained = FICNN(2, 3, hidden=(3,), generator=torch.Generator().manual_seed(5))
    torch.save(trained.state_dict(), here / "weights.pt")
    rng = np.random.default_rng(0)
    np.savez(here / "data.npz", x=rng.standard_normal((6, 2)), y=rng.random((6, 3)))
    command = ["export", "cli_factory:layer", "--out", "made.icnn", "--checkpoint", "weights.pt"]
    options = ["--data", "data.npz", "--dtype", "float64", "--steps", 25, "--name", "tiny", "--gap-tolerance", "0.01"]
    result = icnnrt(*command, *options, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["parity"]["value"] < 1e-12
    assert "adjoint" in result.stderr

    made = json.loads(icnnrt("inspect", "made.icnn", "--json").stdout)
    assert (made["name"], made["dtype"], made["x_shape"], made["y_shape"]) == ("tiny", "float64", [2], [3])
    assert (made["solver"]["iterations"], made["solver"]["steps"]) == (3, 25)
    assert made["solver"]["gap_tolerance"] == 0.01
    low = float(trained.get_parameter("layers.0.W_y").detach().min())
    assert made["weights"]["tensors"]["layers.0.W_y"]["min"] == pytest.approx(low, rel=1e-6)
    assert "is there already; pass --overwrite" in sentence(icnnrt(*command))
    assert icnnrt("run", "made.icnn", "data.npz").exit_code == 0

    packed = icnnrt("pack", "made.icnn", "value.onnx", "--graph", "value")
    assert packed.exit_code == 0, packed.output
    assert "bytes" in packed.stdout
    assert (here / "value.onnx").stat().st_size > 100


def test_export_of_another_solver(here: Path) -> None:
    refused = icnnrt("export", "cli_factory:bregman", "--out", "made.icnn", "--torchscript", "made.pt")
    assert "it needs the bundle method" in sentence(refused)
    result = icnnrt("export", "cli_factory:bregman", "--out", "made.icnn", "--gap-tolerance", "0.1")
    assert result.exit_code == 0, result.output
    solver = json.loads(icnnrt("inspect", "made.icnn", "--json").stdout)["solver"]
    assert (solver["name"], solver["iterations"], solver["step_size"]) == ("BregmanProximalGradient", 5, 0.5)
    assert solver["gap_tolerance"] == 0.1
    # verify tells, of this solver too, how many iterations a gap takes
    told = icnnrt("verify", "made.icnn", "--samples", 4, "--recommend", "0.01", "--json")
    found = json.loads(told.stdout)["recommend"]
    assert (found["samples"], found["exported"], found["gap"]) == (4, 5, 0.01)
    assert all(K is None or 1 <= K <= found["tried"] for K in found["iterations"].values())


def test_bad_exports_are_one_sentence_and_write_nothing(here: Path) -> None:
    def bad(factory: str, *options: object) -> str:
        told = sentence(icnnrt("export", factory, "--out", "made.icnn", *options))
        assert not (here / "made.icnn").exists()
        return told

    assert "expected MODULE:FACTORY" in bad("cli_factory")
    assert "no module 'nothing_of_that_name'" in bad("nothing_of_that_name:f")
    assert "has no 'large'; it can call" in bad("cli_factory:large")
    assert "Bare has no x_dim to take it from; pass --x-shape" in bad("cli_factory:Bare")
    assert "Bare has no y_dim to take it from; pass --n" in bad("cli_factory:Bare", "--x-shape", 2)
    assert "x-shape: expected sizes such as 32" in bad("cli_factory:small", "--x-shape", "a,b")
    assert "gap_tolerance: expected a finite number above 0" in bad("cli_factory:small", "--gap-tolerance", -1)
    assert "there is no such file" in bad("cli_factory:small", "--checkpoint", "none.pt")
    (here / "bad.pt").write_bytes(b"nonsense")
    assert "bad.pt" in bad("cli_factory:small", "--checkpoint", "bad.pt")
    np.savez(here / "data.npz", x=np.zeros((6, 2)), y=np.zeros((5, 3)))
    assert "as many samples" in bad("cli_factory:small", "--data", "data.npz")
    np.savez(here / "data.npz", x=np.zeros((6, 2)))
    assert "expected an array named 'y'" in bad("cli_factory:small", "--data", "data.npz")
    np.savez(here / "data.npz", x=np.zeros((6, 2)), y=np.zeros((6, 3)))
    assert "n: 4 was asked for" in bad("cli_factory:small", "--data", "data.npz", "--n", 4)
    assert "x-shape: [7] was asked for" in bad("cli_factory:small", "--data", "data.npz", "--x-shape", 7)
    assert icnnrt("export", "cli_factory:small", "--out", "made.icnn", "--dtype", "float16").exit_code == 2
    for options in (["--no-solver", "--gap-tolerance", "1e-4"], ["--auto", "--gap-tolerance", "1e-4"]):
        assert icnnrt("export", "cli_factory:small", "--out", "made.icnn", *options).exit_code == 2, options


def test_bad_packs_are_one_sentence(tmp_path: Path, digits_like_package: Path) -> None:
    def bad(*arguments: object) -> str:
        return sentence(icnnrt("pack", digits_like_package, *arguments))

    assert "ending in .onnx" in bad(tmp_path / "o.txt")
    assert "is not there; create it first" in bad(tmp_path / "nowhere" / "o.onnx")
    assert "the package has no graph 'train'; it has adjoint, argmin, value" in bad(
        tmp_path / "o.onnx", "--graph", "train"
    )
    (tmp_path / "o.onnx").touch()
    assert "is there already; pass --overwrite" in bad(tmp_path / "o.onnx")
    assert icnnrt("pack", digits_like_package, tmp_path / "o.onnx", "--overwrite").exit_code == 0


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    result = icnnrt("demo", "--out", tmp_path / "demo", "--epochs", 1, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["epochs"] == 1
    assert content["torch_difference"] < 1e-3
    assert sum(content["status"].values()) == 360
    assert Path(content["picture"]).stat().st_size > 1000
    assert icnnrt("inspect", content["package"]).exit_code == 0
