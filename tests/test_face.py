# SPDX-License-Identifier: Apache-2.0
"""The package's face: which names it shows, that each is found, that nothing hides a module, and what an import loads."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import paradiff
from paradiff.lazy import EXTRAS, lazily

SOURCE = Path(paradiff.__file__).parent
PRESETS = [
    "sequential",
    "jacobi",
    "paradigms",
    "parasolver",
    "quasi_newton",
    "srds",
    "collocation",
    "piadm_sde",
    "piadm_ode",
    "parataa",
    "chords",
    "quasi_deer",
]
ROOT = {
    *["sample", "solve", "parallelize", "explain", "calibrate", "compare", "plan", "auto", "by_row", "from_scheduler"],
    *["Table", "Schedule", "Keyed", "Recorded", "Evaluator", "Solution", "Trajectory", "Method", "Policy", "__version__"],
    *PRESETS,
    *["parallel", "ParallelInTimeConfig", "enable_parallel_in_time", "disable_parallel_in_time", "is_parallel_in_time_enabled"],
    *["chain", "samplers", "solver", "methods", "slopes", "noise", "models", "planning", "pipelines", "serving"],
}
LAZY = [SOURCE / "__init__.py", *(SOURCE / room / "__init__.py" for room in ("models", "pipelines"))]
HEAVY = ("diffusers", "transformers", "matplotlib", "typer", "rich", "PIL", "greenlet")
CLOSED_FORM = """
import torch, paradiff
table = paradiff.samplers.ddim(paradiff.Schedule.linear(), 10)
data = paradiff.models.Gaussian(torch.zeros(4), torch.ones(4))
assert paradiff.sample(data.denoiser(table), table, paradiff.Keyed((4,)), paradiff.parasolver()).sample.shape == (1, 4)
"""


def modules() -> list[str]:
    """All modules of the package."""
    return ["paradiff", *(m.name for m in pkgutil.walk_packages([str(SOURCE)], "paradiff."))]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs code."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


FORKS = """
import os, sys, torch
for code in {codes!r}:
    process = os.fork()
    if not process:
        exec(code)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def run_each(codes: list[str]) -> tuple[list[int], list[str]]:
    """The exit code and the one line of each of some codes, run one after the other, in forks of a fresh interpreter that has
    imported torch."""
    found = run(FORKS.format(codes=codes))
    return [int(code) for code in found.stdout.splitlines()], found.stderr.splitlines()


def test_the_root_shows_these_names_and_no_others() -> None:
    assert set(dir(paradiff)) == set(paradiff.__all__) == ROOT
    for name in ROOT:
        assert getattr(paradiff, name) is not None


@pytest.mark.parametrize("name", [name for name in modules() if (SOURCE.parent / name.replace(".", "/")).is_dir()])
def test_every_package_has_the_names_that_it_lists(name: str) -> None:
    package = importlib.import_module(name)
    for listed in getattr(package, "__all__", []):
        getattr(package, listed)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = package.nothing_of_this_name


@pytest.mark.parametrize("path", LAZY, ids=[p.parent.name for p in LAZY])
def test_a_lazy_package_says_the_same_to_type_checkers_and_to_python(path: Path) -> None:
    tree = ast.parse(path.read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module
        for alias in node.names:
            path = SOURCE.parent / node.module.replace(".", "/") / alias.name
            module = path.is_dir() or path.with_suffix(".py").is_file()
            typed[alias.asname or alias.name] = f"{node.module}.{alias.name}:" if module else node.module
    (names,) = (node for node in ast.walk(block) if isinstance(node, ast.Dict))
    (listed,) = (node for node in tree.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(names) == typed
    assert ast.literal_eval(listed.value) == sorted(typed)


@pytest.mark.parametrize("name", modules())
def test_no_attribute_hides_a_module(name: str) -> None:
    package, _, last = name.rpartition(".")
    if package:
        found = getattr(importlib.import_module(package), last, None)
        assert found is None or found is importlib.import_module(name)


@pytest.mark.parametrize("name", [*PRESETS, "sample", "solve", "from_scheduler", "parallelize", "explain"])
def test_what_the_root_offers_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(paradiff, name))


def test_the_version_is_that_of_the_distribution() -> None:
    assert paradiff.__version__ == importlib.import_module("importlib.metadata").version("paradiff")


def test_the_citation_is_of_this_version_and_names_the_papers_of_the_methods() -> None:
    root = SOURCE.parents[1]
    cited = (root / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (.+)$", cited, flags=re.MULTILINE)
    assert version == paradiff.__version__
    table = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| `")]
    for line in table:
        for number in re.findall(r"arXiv (\d+\.\d+)", line):
            assert f"arXiv:{number}" in cited


def test_a_source_tree_without_a_distribution_has_a_version_all_the_same() -> None:
    found = run(
        "import importlib.metadata as m\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "m.version = absent\n"
        "import paradiff; print(paradiff.__version__)"
    )
    assert found.stdout.strip() == "0+unknown"


@pytest.mark.parametrize("code", ["import paradiff", CLOSED_FORM], ids=["import", "sample"])
def test_the_core_loads_torch_and_numpy_only(code: str) -> None:
    found = run(f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def test_an_import_alone_loads_no_room_and_not_torch() -> None:
    found = run("import paradiff, sys; print([m for m in sys.modules if m.startswith('paradiff.') or m == 'torch'])")
    assert found.stdout.strip() == "['paradiff.errors', 'paradiff.lazy']", found.stderr


def test_a_missing_package_is_named_with_its_extra() -> None:
    uses = [
        ("paradiff.parallelize", "diffusers"),
        ("paradiff.parallelize", "greenlet"),
        ("paradiff.explain", "diffusers"),
        ("paradiff.models.load", "diffusers"),
        ("paradiff.models.load_pipeline", "diffusers"),
        ("paradiff.pipelines.Run", "diffusers"),
    ]
    codes, said = run_each(
        [
            f"sys.modules[{missing!r}] = None\n"
            f"import paradiff\ntry:\n    {use}\nexcept ImportError as error:\n    sys.exit(str(error))"
            for use, missing in uses
        ]
    )
    assert said == [
        f"{use} needs {missing}, which is not installed; pip install 'paradiff[{EXTRAS[missing]}]'" for use, missing in uses
    ]
    assert codes == [1] * len(uses)


def test_the_command_names_the_extra_of_a_missing_package() -> None:
    packages = ["typer", "rich", "matplotlib", "PIL", "diffusers"]
    codes, said = run_each(
        [
            f"sys.modules[{missing!r}] = None; sys.argv = ['paradiff', 'sample', 'digits', '--steps', '2']\n"
            "from paradiff.app import main; main()"
            for missing in packages
        ]
    )
    assert said == [
        f"error: the command paradiff needs {missing}, which is not installed; pip install 'paradiff[{EXTRAS[missing]}]'"
        for missing in packages
    ]
    assert codes == [1] * len(packages)


def test_a_sentence_names_an_extra_that_brings_the_package() -> None:
    text = (SOURCE.parents[1] / "pyproject.toml").read_text()
    distribution = {"PIL": "pillow", "imageio_ffmpeg": "imageio-ffmpeg"}
    for package, extra in EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
        assert f'"{distribution.get(package, package)}>=' in listed


def test_the_lower_bounds_are_the_oldest_versions_that_are_tested() -> None:
    root = SOURCE.parents[1]
    bounds = dict(re.findall(r'"([a-z_-]+)>=([\d.]+)"', (root / "pyproject.toml").read_text()))
    pinned = dict(re.findall(r"^(.+)==(.+)$", (root / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    tested = bounds.keys() & pinned.keys()
    assert {"numpy", "torch", "diffusers", "transformers", "typer", "matplotlib"} <= tested
    for name in tested:
        assert f"{pinned[name]}.0.0".startswith(f"{bounds[name]}."), name


def test_a_module_that_is_missing_for_another_reason_is_reported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "here", ModuleType("here"))
    find, listed = lazily("here", {"there": "paradiff.nowhere"})
    assert listed() == ["there"]
    with pytest.raises(ModuleNotFoundError, match=r"paradiff\.nowhere"):
        find("there")
