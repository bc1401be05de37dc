"""Brings a model into the one form that later passes rely on.

before:  functions, Constant nodes, foldable constants, Identity, duplicate weights, opset 11
becomes: inlined, constants as initializers, folded, deduplicated, shapes inferred, opset >= 21

All rewrites are stock passes of onnx_ir and onnxscript; this file only says which, and in which
order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common
from pydantic import Field

from ..compiler.contract import Context, Pass
from ..compiler.errors import ModelError
from ..compiler.graph import is_standard


class Tidy(Pass):
    """Inline, fold constants, drop what is dead or double, convert to an opset the target takes.

    Attributes:
        opset: Least opset afterwards; 0 takes the target's own least.
        fold_limit: Elements up to which a computed constant is stored instead of computed.
    """

    opset: int = Field(0, ge=0)
    fold_limit: int = Field(1 << 18, ge=0)

    def run(self, model: ir.Model, context: Context) -> int:
        """Apply the stock passes; return how many nodes went away or changed their version."""
        from onnxscript.optimizer import _constant_folding as folding

        before = sum(1 for _ in model.graph.all_nodes())
        common.InlinePass()(model)
        self._own_weights(model, context)
        changed = self._convert(model, context)
        common.ShapeInferencePass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        with _quiet("onnxscript"):
            folding.FoldConstantsPass(
                shape_inference=True,
                input_size_limit=self.fold_limit,
                output_size_limit=self.fold_limit,
                should_fold=_foldable,
            )(model)
        for one in (
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.TopologicalSortPass(),
            common.NameFixPass(),
            common.ShapeInferencePass(),
        ):
            one(model)
        model.graph.opset_imports.setdefault("", model.graph.opset_imports.pop("ai.onnx", 0))
        for node in model.graph.all_nodes():
            node.metadata_props.clear()  # the rewriter's own diary
        after = sum(1 for _ in model.graph.all_nodes())
        return max(before - after, 0) + changed

    def _own_weights(self, model: ir.Model, context: Context) -> None:
        """Make constants of weights that old exporters also list as inputs with a default."""
        listed = [v.name for v in model.graph.inputs if v.name in model.graph.initializers]
        if listed:
            common.RemoveInitializersFromInputsPass()(model)
            reason = f"{len(listed)} weights were inputs with a default and are constants now"
            context.remark(self, listed[0], reason)

    def _convert(self, model: ir.Model, context: Context) -> int:
        """Raise the opset to what the target needs."""
        from onnxscript import version_converter

        now = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
        wanted = self.opset or context.capability.opsets[0]
        if now >= wanted:
            return 0
        with _quiet("onnxscript"):
            try:
                version_converter.convert_version(model, wanted, fallback=True)
            except Exception as error:
                raise ModelError(
                    f"the model has opset {now} and cannot be converted to {wanted}: {error}; "
                    f"export it with opset {wanted}"
                ) from None
        if model.graph.opset_imports.get("", 0) != wanted:
            raise ModelError(
                f"the model has opset {now} and onnx has no converter to {wanted} for one of its "
                f"operators; export it with opset {wanted}"
            )
        context.remark(self, model.graph.name, f"converted from opset {now} to {wanted}")
        return 1


def _foldable(node: ir.Node) -> bool | None:
    """Keep quantizers, which say how weights are stored; leave the rest to the folder's rules."""
    if is_standard(node, "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"):
        return False
    return None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back a library's warnings about what it leaves alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
