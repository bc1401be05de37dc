import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "build", "dist"}


def configured():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages():
    """Yield the dotted name of every folder with an __init__.py."""
    for folder, inner, files in os.walk(ROOT):
        inner[:] = sorted(
            d for d in inner if not d.startswith((".", "__")) and d not in NOT_SHIPPED
        )
        if "__init__.py" in files:
            yield ".".join(("fourfold", *Path(folder).relative_to(ROOT).parts))


def test_every_package_is_shipped():
    assert sorted(configured()["packages"]) == sorted(packages())
    assert configured()["package-dir"] == {"fourfold": "."}


def test_the_only_module_at_the_root_is_the_face():
    # Every other one would be installed as a part of the package.
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_package_data_exists():
    for package, patterns in configured()["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern}"
