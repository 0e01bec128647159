"""The package as a whole: what importing it does, who may import whom, what is installed."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flash_attention_jax import explain
from flash_attention_jax.kernels import hopper_support

ROOT = Path(__file__).parents[1]
PACKAGE = "flash_attention_jax"
OPTIONAL = ("flax", "optax", "orbax", "tqdm", "torch", "jax_triton", "triton", "matplotlib")

# The wings and the public modules, from the lowest floor to the highest. A module imports from its
# own wing and from lower floors; the package itself stands where its public functions are.
FLOORS = [
    ["_core"],
    ["kernels"],
    ["_engines"],
    ["_api"],
    ["_parallel", "_conformance", "cache", "compare", "data", "rotary", "varlen"],
    ["", "sharding", "testing"],
    ["_flax", "_torch", "_commands"],
    ["linen", "nnx", "torch"],
    ["transformer"],
    ["_training"],
    ["train"],
    ["__main__"],
]
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}

# Public module -> the optional packages without which it cannot be imported.
SHELLS = {
    "linen": ["flax"],
    "nnx": ["flax"],
    "torch": ["torch"],
    "train": ["flax", "optax", "orbax", "tqdm"],
    "transformer": ["flax"],
}

# Module name -> file; the kernels are reached through the link, so by the name they import as.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT / PACKAGE, *sorted((ROOT / PACKAGE).iterdir()))
    if folder.is_dir() and folder.name != "__pycache__"
    for path in sorted(folder.glob("*.py"))
}


def wing(module: str) -> str:
    """The folder or public module: `_engines`, `kernels`, `linen`; "" for the package itself."""
    return module.removeprefix(PACKAGE).lstrip(".").split(".")[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """The modules of this package that a file imports anywhere in it, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        else:
            continue
        yield from (
            (node.lineno, name)
            for name in names
            if name == PACKAGE or name.startswith(PACKAGE + ".")
        )


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter whose first place to look for modules is `cwd`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


ABSENT = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"
BROKEN = "raise AttributeError('made for another jax')"


def fakes(folder: Path, body: str, *packages: str) -> str:
    """Puts packages with this body before the installed ones; returns the PYTHONPATH for them."""
    for package in packages:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(body, encoding="utf-8")
    return str(folder)


def test_import_loads_no_optional_package():
    done = run(f"import sys, {PACKAGE}; print(*(set({OPTIONAL}) & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_import_initialises_no_backend():
    # With a platform that does not exist, whatever asks for a device raises.
    done = run(
        f"import jax, {PACKAGE}\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('imported before any device')",
        JAX_PLATFORMS="no_such_platform",
    )
    assert done.stdout.strip() == "imported before any device", done.stderr


def test_import_works_where_only_the_cpu_is_allowed():
    done = run(f"import jax, {PACKAGE}; print(jax.default_backend())", JAX_PLATFORMS="cpu")
    assert done.stdout.strip() == "cpu", done.stderr


@pytest.mark.parametrize("body", [ABSENT, BROKEN], ids=["absent", "broken"])
def test_import_works_without_the_optional_packages(body, tmp_path):
    done = run(f"import {PACKAGE}", PYTHONPATH=fakes(tmp_path, body, *OPTIONAL))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("shell", "package"),
    [
        (shell, package)
        for shell, packages in SHELLS.items()
        for package in packages
        if f"{PACKAGE}.{shell}" in MODULES
    ],
)
def test_shell_without_its_package_says_what_to_install(shell, package, tmp_path):
    done = run(
        f"import {PACKAGE}\n"
        f"try: import {PACKAGE}.{shell}\n"
        "except ImportError as error: print(error)",
        PYTHONPATH=fakes(tmp_path, ABSENT, package),
    )
    assert package in done.stdout, done.stderr
    assert "pip install" in done.stdout
    assert "flash-attention-jax[" in done.stdout


@pytest.mark.parametrize("shell", [s for s in SHELLS if f"{PACKAGE}.{s}" in MODULES])
def test_shell_with_a_broken_package_gives_the_reason(shell, tmp_path):
    package = SHELLS[shell][0]
    done = run(
        f"try: import {PACKAGE}.{shell}\nexcept ImportError as error: print(error)",
        PYTHONPATH=fakes(tmp_path, BROKEN, package),
    )
    assert package in done.stdout, done.stderr
    assert "made for another jax" in done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module):
    relative = [
        node.lineno
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_tree_of_the_readme_is_that_of_the_folders():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree, _, rest = text.partition("## The tree")[2].partition("`flash_attention_jax/kernels` is")
    wings = re.findall(r"^ {6}(\w+)/ ", tree, re.MULTILINE)
    floors = [name for floor in FLOORS for name in floor if (ROOT / PACKAGE / name).is_dir()]
    assert wings == [name for name in floors if name]
    modules = rest[rest.index("itself: ") :].partition(".")[0]
    assert set(re.findall(r"\w+", modules)) - {"itself", "and"} == set(PUBLIC_MODULES)


def test_source_distribution_holds_the_package_and_no_tests(tmp_path):
    pytest.importorskip("setuptools.build_meta", reason="needs setuptools")
    for name in ("MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.bib"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (PACKAGE, "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    done = run(
        "from setuptools import build_meta; build_meta.build_sdist('.')",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert not any(name.split("/")[0] == "tests" for name in files)
    assert {"README.md", "CHANGELOG.md", "CITATION.bib", "kernels/join.py"} <= files
    assert {f"{PACKAGE}/__init__.py", f"{PACKAGE}/_core/call.py"} <= files


def test_every_module_has_a_floor():
    assert {wing(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    mine = wing(module)
    wrong = [
        f"{MODULES[module].name}:{line} imports {other}"
        for line, other in imported(MODULES[module])
        if FLOOR[wing(other)] > FLOOR[mine]
        or (FLOOR[wing(other)] == FLOOR[mine] and wing(other) != mine)
    ]
    assert wrong == []


def test_engines_do_not_import_each_other():
    engines = {f"{PACKAGE}._engines.{name}" for name in ("dense", "blocked", "checkpointed")}
    for engine in engines:
        assert not (engines - {engine}) & {other for _, other in imported(MODULES[engine])}


def test_imports_make_no_circle():
    graph = {module: {other for _, other in imported(path)} for module, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_kernels_are_the_folder_at_the_top():
    done = run(f"import {PACKAGE}.kernels as kernels; print(kernels.__name__, kernels.__file__)")
    name, file = done.stdout.split()
    assert name == f"{PACKAGE}.kernels"
    assert Path(file).resolve() == ROOT / "kernels" / "__init__.py"


def test_kernels_refuse_any_other_name():
    done = run("import kernels")
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: This folder must be imported as `flash_attention_jax.kernels`, "
        "got `kernels`. Write `import flash_attention_jax.kernels`."
    )


@pytest.mark.parametrize("there", ["a text", "nothing", "a link"])
def test_checkout_without_symbolic_links_says_what_to_do(there, tmp_path):
    (tmp_path / PACKAGE).mkdir()
    for path in (ROOT / PACKAGE).rglob("*.py"):
        if path.parent.name != "kernels":
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    if there == "a text":  # as git writes a link where core.symlinks is false
        (tmp_path / PACKAGE / "kernels").write_text("../kernels")
    elif there == "a link":
        (tmp_path / PACKAGE / "kernels").symlink_to("../kernels")
    # An editable install of the checkout would lend its own kernels, so no .pth file is read.
    paths = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    code = f"import sys; sys.path += {paths}; import {PACKAGE}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if there == "a link":
        assert (done.returncode, done.stderr) == (0, "")
        return
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: flash_attention_jax/kernels must be a link to the folder")
    assert "`git config core.symlinks true`" in said
    assert "`pip install .`" in said


PUBLIC_MODULES = (
    *("cache", "compare", "data", "linen", "nnx", "rotary", "sharding", "testing", "torch"),
    *("train", "transformer", "varlen"),
)


def test_every_public_module_is_an_attribute_that_is_imported_when_asked_for():
    files = {path.stem for path in (ROOT / PACKAGE).glob("*.py") if path.stem[0] != "_"}
    assert set(PUBLIC_MODULES) == files
    # Where a package is absent, its module is an attribute that is missing.
    code = (
        f"import sys, {PACKAGE} as f\n"
        f"for name in {PUBLIC_MODULES}:\n"
        "    assert name in dir(f), name\n"
        "    before = set(sys.modules)\n"
        "    try: module = getattr(f, name)\n"
        "    except AttributeError as error: print(name, error)\n"
        "    else:\n"
        f"        assert module is sys.modules[f'{PACKAGE}.{{name}}']\n"
        "        assert f.flash_attention is sys.modules[f.__name__].flash_attention\n"
        f"    if name == 'data': assert not set({OPTIONAL}) & set(sys.modules)\n"
        "print('all asked for')\n"
    )
    done = run(code)
    *missing, last = done.stdout.splitlines() or [""]
    assert last == "all asked for", done.stderr
    absent = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}
    assert {line.split()[0] for line in missing} == {
        shell for shell, packages in SHELLS.items() if absent & set(packages)
    }


def test_attribute_without_its_package_is_missing_and_says_what_to_install(tmp_path):
    done = run(
        f"import {PACKAGE} as f\n"
        "print(hasattr(f, 'linen'), hasattr(f, 'varlen'))\n"
        "try: f.linen\n"
        "except AttributeError as error: print(error)\n"
        f"try: from {PACKAGE} import linen\n"
        "except ImportError as error: print(error)\n"
        "try: f.lin\n"
        "except AttributeError as error: print(error)",
        PYTHONPATH=fakes(tmp_path, ABSENT, "flax"),
    )
    advice = f"{PACKAGE}.linen needs flax: pip install 'flash-attention-jax[flax]'"
    assert done.stdout.splitlines() == [
        "False True",
        advice,
        advice,
        f"module '{PACKAGE}' has no attribute 'lin'",
    ], done.stderr


def test_kernels_that_lack_a_module_say_which(monkeypatch):
    def without(name):
        raise ModuleNotFoundError("No module named 'absl'", name="absl")

    q = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.bfloat16)
    hopper_support._pallas_why_not.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(hopper_support.importlib, "import_module", without)
            said = explain(q, q, q, platform="gpu", capability=(9, 0))
    finally:
        hopper_support._pallas_why_not.cache_clear()
    assert said.forward != "hopper"
    assert said.reasons["hopper"] == (
        f"Pallas for Mosaic GPU of jax {jax.__version__} needs the module absl, which is not "
        "installed: pip install absl-py"
    )


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    # Not what an old build may have left in the checkout, which is on the path too.
    installed = {"name": "flash-attention-jax", "path": [sysconfig.get_path("purelib")]}
    for found in importlib.metadata.distributions(**installed):
        return found
    pytest.skip("needs flash-attention-jax to be installed: `pip install -e .`, or `make test`")


def test_installed_version_is_ours(distribution):
    assert distribution.version == "1.0.0.dev0"
    assert distribution.metadata["Requires-Python"] == ">=3.11"
    assert distribution.metadata["License-Expression"] == "MIT"


def test_plain_install_is_light(distribution):
    core = {need.split(">")[0] for need in distribution.requires or [] if "extra ==" not in need}
    assert core == {"absl-py", "jax", "jaxlib", "jaxtyping", "numpy"}


def test_no_requirement_has_an_upper_bound(distribution):
    specifiers = {need.split(";")[0].replace(" ", "") for need in distribution.requires or []}
    bounded = {need for need in specifiers if "<" in need or "==" in need or "~=" in need}
    # jax-triton reaches into jax; its next release does not lower on the newest.
    assert bounded == {"jax-triton==0.3.1"}


def test_command_is_installed(distribution):
    (command,) = distribution.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("flash-attention-jax", f"{PACKAGE}.__main__:main")


def test_installed_package_brings_the_kernels(distribution, tmp_path):
    done = run(f"import {PACKAGE}.kernels as kernels; print(kernels.__name__)", cwd=tmp_path)
    assert done.stdout.strip() == f"{PACKAGE}.kernels", done.stderr
