"""What onnxruntime runs in integers on each class of CPU, as data."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

from ...compiler.capability import Capability, Legality
from ...compiler.model import newest_opset

Isa = Literal["auto", "vnni", "avx2", "arm64"]

NARROW = ("int8", "int4", "int2")
# Affine: the code less its zero point fits the int8 of the kernel, and is computed at load.
SHIFTED = ("uint4", "uint2")
# MatMulNBits: onnxruntime makes it of a block-wise DequantizeLinear and a MatMul at load, keeps
# the weight packed in memory, and rounds the float activations to 8 bits on the way.
BLOCKED = ("int4", "int2", "uint4", "uint2")
BLOCKS = (32, 128)

# Beside floats any codes are widened at load; rows of embeddings have no zero points.
WIDENED = (*NARROW, "uint8", *SHIFTED)

MEASURED = "onnxruntime 1.32"

CARRIES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad"}
)
WEIGHT_ONLY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")

FLOAT_ONLY = {
    "LayerNormalization": "no integer LayerNormalization; its float kernel is exact and quick",
    "Gelu": "no integer Gelu",
    "Erf": "no integer Erf",
    "Softmax": "float: an 8-bit softmax loses small probabilities, and costs as much",
    "MatMul": "two activations: converting them costs more than the integer kernel saves",
}


def capability_of(isa: str) -> Capability:
    """Return the legality table of one class of CPU.

    Without VNNI, u8 x s8 kernels add pairs of products in 16 bits and saturate: weights keep to 7
    bits.
    """
    activation = "int8" if isa == "arm64" else "uint8"
    acts = (activation,)
    both = ("per_tensor", "per_axis")
    since = MEASURED

    def weighted(
        op: str, acts: tuple[str, ...], *, dynamic: bool = False, output: bool = False
    ) -> Legality:
        return Legality(op, NARROW + SHIFTED, acts, both, dynamic, output, since)

    return Capability(
        name=f"onnxruntime cpu ({isa})",
        opsets=(21, newest_opset()),
        rows=(
            weighted("Conv", acts),
            weighted("Gemm", acts, output=True),
            weighted("MatMul", acts, dynamic=activation == "uint8", output=True),
            *(
                Legality(op, (), acts, since=since)
                for op in ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu")
            ),
            *(Legality(op, (), acts, since=since) for op in ("AveragePool", "GlobalAveragePool")),
        ),
        widened=(
            *(
                Legality(op, NARROW if op == "Gather" else WIDENED, ("float",), both, since=since)
                for op in WEIGHT_ONLY
            ),
            Legality("MatMul", BLOCKED, ("float",), ("per_block",), since=since, blocks=BLOCKS),
        ),
        carries=CARRIES,
        fuses=frozenset({"Relu", "Clip"}),
        activation=activation,
        weight_bits=7 if isa == "avx2" else 8,
        float_only=FLOAT_ONLY,
        packed={"int4": 21, "uint4": 21, "int2": 25, "uint2": 25},
        tables=True,
    )


def host_isa() -> Literal["vnni", "avx2", "arm64"]:
    """Return the class of this machine's CPU; where flags cannot be read, one without VNNI."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "avx2"
    return "vnni" if "avx512_vnni" in flags or "avx_vnni" in flags else "avx2"
