"""The project as it is installed: what the wheel holds, and that every dependency is pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {"excise", "localize", "edit", "sae", "evals"}
MODELS = ("dense", "dense-oracle", "moe", "moe-oracle")
LARGEST = 16 * 2**20


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(_plain(line).split("==") for line in lines if line.strip())


def _plain(name: str) -> str:
    return (
        re.sub(r"[-_.]+", "-", name.split(";")[0].strip()).lower()
        if "==" not in name
        else "==".join((re.sub(r"[-_.]+", "-", name.split("==")[0]).lower(), name.split("==")[1].strip()))
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[zipfile.ZipInfo]:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        return opened.infolist()


def test_wheel_holds_the_five_packages_and_nothing_else(wheel: list[zipfile.ZipInfo]) -> None:
    names = [f.filename for f in wheel]
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == PACKAGES
    assert all(f"{package}/__init__.py" in names for package in PACKAGES)
    # Without it a type checker ignores what a package says of itself.
    assert all(f"{package}/py.typed" in names for package in PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test_" in name or name.endswith((".pyc", ".ipynb"))]


def test_wheel_holds_what_the_code_reads(wheel: list[zipfile.ZipInfo]) -> None:
    packed = {f.filename for f in wheel}
    for package in PACKAGES:
        data = [p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        missing = {p.relative_to(ROOT).as_posix() for p in data} - packed
        assert not {m for m in missing if not Path(m).name.startswith(".")}


@pytest.mark.parametrize("name", MODELS)
def test_wheel_holds_the_embedded_models(wheel: list[zipfile.ZipInfo], name: str) -> None:
    found = [f for f in wheel if f.filename == f"excise/testbed/models/{name}/model.safetensors"]
    assert found and found[0].file_size <= LARGEST


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_wheel_holds_the_embedded_dictionaries(wheel: list[zipfile.ZipInfo], name: str) -> None:
    found = {f.filename: f.file_size for f in wheel if f.filename.startswith(f"sae/embedded/{name}/")}
    assert set(found) == {f"sae/embedded/{name}/{part}" for part in ("cfg.json", "sae_weights.safetensors")}
    assert all(size == (ROOT / part).stat().st_size for part, size in found.items())


def test_every_dependency_is_pinned_and_installed_as_pinned() -> None:
    from packaging.requirements import Requirement

    pinned, extras = pins(), PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["peft"], *extras["docs"], *extras["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "excise":
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{name} is missing in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), (
            f"{name}: {pinned[name]} is outside {requirement.specifier}"
        )
        assert metadata.version(name).split("+")[0] == pinned[name]


def test_no_import_without_a_dependency() -> None:
    """Everything that the packages import is in the standard library, ours, or asked for in pyproject.toml."""
    from test_layers import imported

    asked = {re.split(r"[<>=\[ ]", d)[0].replace("-", "_") for d in PROJECT["project"]["dependencies"]}
    extras = {
        re.split(r"[<>=\[ ]", d)[0] for e in ("ray", "peft") for d in PROJECT["project"]["optional-dependencies"][e]
    }
    allowed = asked | extras | PACKAGES | set(sys.stdlib_module_names)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert not imported(path) - allowed - {""}, f"{path.relative_to(ROOT)}: {imported(path) - allowed}"


def test_nothing_unsafe_is_called() -> None:
    """No pickle, no code from files: artefacts are data."""
    unsafe = re.compile(
        r"\b(pickle|joblib|cloudpickle|dill)\b|torch\.load\(|(?<![.\w])(eval|exec)\(|shell=True|allow_pickle=True"
    )
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not unsafe.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
