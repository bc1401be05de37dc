"""The passes of a compile for onnxruntime CPU, from top to bottom."""

from __future__ import annotations

from typing import Any

from ...compiler.capability import Capability
from ...compiler.contract import Pass
from ...compiler.precision import Precision
from ...compiler.recipe import Recipe
from ...passes.assign_bits import AssignBits
from ...passes.calibrate import Calibrate
from ...passes.correct_outputs import CorrectOutputs
from ...passes.equalize import Equalize
from ...passes.fold_batchnorm import FoldBatchnorm
from ...passes.fuse_matmul_bias import FuseMatmulBias
from ...passes.insert_qdq import InsertQdq
from ...passes.lower_embeddings import LowerEmbeddings
from ...passes.pack_tables import PackTables
from ...passes.pad_codes import PadCodes
from ...passes.quantize_biases import QuantizeBiases
from ...passes.rank_weights import RankWeights
from ...passes.read_plan import ReadPlan
from ...passes.rotate import Rotate
from ...passes.round_weights import Method, RoundWeights
from ...passes.split_layers import SplitLayers
from ...passes.split_skip_layernorm import SplitSkipLayernorm
from ...passes.tidy import Tidy
from ...passes.tune import Tune
from ...passes.unpack_weights import UnpackWeights
from ...passes.widen_floats import WidenFloats


def recipe_of(precision: Precision, capability: Capability) -> Recipe:
    """Return the passes for a precision.

    Order: exact rewrites first, since ranges must be taken of the folded graph; then the
    decisions; then the edits that obey them, and what makes up for their losses; last what only
    this runtime wants.
    """
    narrow = "int2" if precision.narrowest == 2 else "int4" if precision.narrowest <= 4 else ""
    split = precision.split is not None
    return Recipe(
        (
            WidenFloats(),
            Tidy(opset=capability.packed.get(narrow, 0)),
            FoldBatchnorm(),
            *_evened(precision),
            *_decisions(precision),
            *((SplitLayers(),) if split else ()),
            InsertQdq(),
            RoundWeights(method=_METHODS[precision.effort]),
            *((CorrectOutputs(),) if precision.effort else ()),
            *((Tune(),) if precision.effort > 2 else ()),
            QuantizeBiases(),
            PadCodes(),
            LowerEmbeddings(),
            UnpackWeights(),
            *((PackTables(),) if split else ()),
            FuseMatmulBias(),
            SplitSkipLayernorm(),
        )
    )


_METHODS: tuple[Method, ...] = ("nearest", "nearest", "gptq", "adaround")  # by effort


def _evened(precision: Precision) -> tuple[Pass, ...]:
    """Return the exact rewrites after which less is lost."""
    if precision.effort < 2:
        return ()
    rotate = Rotate(weights=precision.narrowest)
    # Equalizing weighs 8-bit activations against weights; with float ones it has no aim.
    return (rotate, Equalize(weights=precision.narrowest)) if precision.activations else (rotate,)


def _decisions(precision: Precision) -> tuple[Pass, ...]:
    """Return the passes that make the plan, or read it."""
    if precision.planned:
        return ReadPlan(), AssignBits(method="plan", activations=precision.ranges)
    mode = precision.ranges if precision.activations else "float"
    if not precision.widths:
        calibrate = (Calibrate(weights=precision.weights),) if precision.calibrated else ()
        bits = AssignBits(weights=precision.weights, activations=mode, **_split(precision))
        return *calibrate, bits
    # A budget on time weighs kernels against each other, so all of them are open.
    limits = precision.limits
    timed = limits.seconds is not None or precision.goal == "seconds"
    kernels = "any" if timed else mode
    return (
        *((Calibrate(),) if precision.calibrated else ()),
        RankWeights(
            signals=precision.signals,
            widths=precision.widths,
            activations=kernels,
            **_split(precision),
        ),
        AssignBits(
            widths=precision.widths,
            method=precision.method,
            goal=precision.goal,
            average_bits=limits.average_bits,
            max_bytes=limits.bytes,
            max_seconds=limits.seconds,
            max_loss=limits.loss,
            trials=precision.trials,
            activations=kernels,
            **_split(precision),
        ),
    )


def _split(precision: Precision) -> dict[str, Any]:
    """Return the options of deciding passes that split weights."""
    wish = precision.split
    if wish is None:
        return {}
    return {
        "split": wish.form,
        "clusters": wish.clusters,
        "over": wish.over,
        "levels": wish.levels,
    }
