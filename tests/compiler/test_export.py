import builtins

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from fourfold.compiler.errors import ModelError, UnsupportedError
from fourfold.compiler.export import export, from_text

TEXT = """<ir_version: 9, opset_import: ["" : 20]>
g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1,2,3,4}> { y = MatMul(x, w) }"""

MODULE = f"""
import onnx
import onnx_ir as ir
from pathlib import Path
TEXT = '''{TEXT}'''
def as_ir(): return ir.from_onnx_text(TEXT)
def as_proto(): return onnx.parser.parse_model(TEXT)
def as_path():
    onnx.save(as_proto(), "written.onnx")
    return Path("written.onnx")
def as_text(): return "written.onnx"
def raises(): raise KeyError("oops")
def nothing(): return None
def unsound(): return ir.from_onnx_text(TEXT.replace('"" : 20', '"" : 9'))
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models_of_this_test.py").write_text(MODULE)
    (tmp_path / "broken_of_this_test.py").write_text("1 / 0")
    (tmp_path / "needs_of_this_test.py").write_text("import not_there_at_all")


@pytest.mark.parametrize("kind", ["as_ir", "as_proto", "as_path", "as_text"])
def test_every_form_of_an_onnx_model(here, kind):
    if kind == "as_text":
        onnx.save(onnx.parser.parse_model(TEXT), "written.onnx")
    model = from_text(f"models_of_this_test:{kind}")
    assert [n.op_type for n in model.graph] == ["MatMul"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no name at all", "expected package.module:function"),
        ("models_of_this_tests:as_ir", "no module .* did you mean 'models_of_this_test'"),
        ("models_of_this_test:as_irr", "did you mean 'as_ir'"),
        ("models_of_this_test:number", "is a int; expected a function"),
        ("models_of_this_test:raises", "models_of_this_test:raises raised KeyError: 'oops'"),
        ("models_of_this_test:nothing", "returned a NoneType: expected an ir.Model"),
        ("models_of_this_test:unsound", "opset 9: expected 11"),
        ("broken_of_this_test:as_ir", "raised ZeroDivisionError"),
        ("needs_of_this_test:as_ir", "raised: No module named 'not_there_at_all'"),
    ],
)
def test_what_is_wrong_is_named(here, text, said):
    with pytest.raises(ModelError, match=said) as error:
        from_text(text)
    assert "\n" not in str(error.value)


def test_without_torch_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UnsupportedError, match=r"pip install 'fourfold\[torch\]'"):
        export(object(), ())


@pytest.mark.torch
@pytest.mark.slow
def test_a_torch_module_is_exported(here, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(8, 3)]
    module = torch.nn.Sequential(*layers).train()
    batch = torch.export.Dim("batch")
    model = export(module, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    assert module.training
    assert not list(tmp_path.glob("*.onnx*"))
    assert len(model.graph.initializers) == 4
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    expected = module.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.torch
@pytest.mark.slow
def test_a_function_that_returns_a_torch_module(here, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "torch_of_this_test.py").write_text(
        "import torch\n"
        "def pair(): return torch.nn.Linear(2, 2), (torch.zeros(3, 2),)\n"
        "def triple():\n"
        "    return torch.nn.Linear(2, 2), (torch.zeros(3, 2),), ({0: torch.export.Dim('n')},)\n"
    )
    assert from_text("torch_of_this_test:pair").graph.inputs[0].shape == (3, 2)
    open_axis = from_text("torch_of_this_test:triple").graph.inputs[0].shape[0]
    assert not isinstance(open_axis, int)


@pytest.mark.torch
def test_what_torch_refuses_is_one_line():
    torch = pytest.importorskip("torch")

    class Broken(torch.nn.Module):
        def forward(self, x):
            return x @ torch.zeros(7, 7)

    with pytest.raises(ModelError, match="torch cannot export Broken") as error:
        export(Broken(), (torch.zeros(2, 3),))
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="expected a torch"):
        export(3, ())
    with pytest.raises(ModelError, match="expected a tuple"):
        export(Broken(), torch.zeros(2))
