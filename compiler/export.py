"""Takes models from PyTorch: exports a module, or calls the user's function that gives a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from .errors import FourfoldError, ModelError, UnsupportedError
from .model import load, refuse_unsound
from .named import call, importable_cwd


def export(
    module: Any,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
) -> ir.Model:
    """Export a `torch.nn.Module` in eval mode; weights are kept, no file is written.

    The model's weights share memory with the module's.

    Args:
        module: The module; its training mode is put back afterwards.
        args: Example inputs, a tuple.
        kwargs: Example inputs by keyword.
        dynamic_shapes: Which axes stay open, as `torch.export.export` takes it; None fixes all.
        opset: ONNX opset; None takes torch's own choice.

    Raises:
        UnsupportedError: torch is not installed.
        ModelError: `module` is not a torch module, torch cannot export it, or the result is not
            sound.
    """
    try:
        import torch
    except ImportError:
        raise UnsupportedError(
            "exporting a module needs torch: pip install 'fourfold[torch]'"
        ) from None
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"cannot export a {type(module).__name__}: expected a torch.nn.Module")
    if not isinstance(args, tuple):
        raise ModelError(f"example inputs are a {type(args).__name__}: expected a tuple")
    name = type(module).__name__
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's exporter warns about its own internals; nobody here can act on it.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            program = torch.onnx.export(
                module,
                args,
                kwargs=dict(kwargs or {}),
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch has an exception for every stage of its exporter
        raise ModelError(f"torch cannot export {name}: {_cause(error)}") from error
    finally:
        for part, mode in training.items():
            part.training = mode
    model: ir.Model = program.model
    refuse_unsound(model, name)
    return model


def _cause(error: BaseException) -> str:
    """Return the first line of the message of the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400].rstrip(".: ")


def from_text(text: str) -> ir.Model:
    """Import `package.module:function`, call it without arguments and return its model.

    The function returns an `ir.Model`, an `onnx.ModelProto`, the path of a .onnx file, or a tuple
    (torch module, example inputs) or (torch module, example inputs, dynamic shapes). The current
    directory can be imported from.

    Raises:
        ModelError: There is no such module or function, it raises, it returns something else, or
            the model is not sound.
        UnsupportedError: It returns a torch module, and torch is not installed.
    """
    with importable_cwd():
        returned = call(text, ModelError)
        try:
            return _model(returned, text)
        except FourfoldError as error:
            error.add_note(f"from {text}")
            raise


def _model(returned: Any, text: str) -> ir.Model:
    """Return the model in whatever form the user's function gave it."""
    match returned:
        case ir.Model():
            refuse_unsound(returned, text)
            return returned
        case onnx.ModelProto():
            return _deserialized(returned, text)
        case str() | Path():
            return load(Path(returned))
        case (module, args):
            return export(module, args)
        case (module, args, dynamic_shapes):
            return export(module, args, dynamic_shapes=dynamic_shapes)
    raise ModelError(
        f"{text} returned a {type(returned).__name__}: expected an ir.Model, ModelProto, path, or "
        "(module, example inputs) or (module, example inputs, dynamic shapes)"
    )


def _deserialized(proto: onnx.ModelProto, text: str) -> ir.Model:
    """Return the checked model of a proto that carries its weights."""
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever a malformed field leads to
        raise ModelError(f"{text}: not a sound ONNX model: {_cause(error)}") from error
    refuse_unsound(model, text)
    return model
