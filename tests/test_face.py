import os
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold


@pytest.mark.parametrize("name", fourfold.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fourfold, name).__name__ == name


def test_dir_is_all():
    assert dir(fourfold) == list(fourfold.__all__) == sorted(set(fourfold.__all__))


def test_types_and_face_name_the_same():
    text = (Path(fourfold.__path__[0]) / "__init__.py").read_text()
    block = text.split("if TYPE_CHECKING:\n", 1)[1].split("\n\n", 1)[0]
    assert sorted(line.split()[3] for line in block.splitlines()) == fourfold.__all__


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'fourfold' has no attribute 'Modell'"):
        _ = fourfold.Modell


@pytest.mark.parametrize("name", ["numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "torch"])
def test_import_is_light(name):
    assert name not in imported("import fourfold; dir(fourfold)")


def test_torch_is_imported_only_where_it_is_needed():
    everything = "import fourfold; [getattr(fourfold, name) for name in fourfold.__all__]"
    loaded = imported(everything)
    assert "onnx_ir" in loaded  # the check can fail
    assert "torch" not in loaded


def imported(code):
    """Run code in a fresh interpreter; return the modules that it loaded."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fourfold.__path__[0]).parent)}
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.split())
