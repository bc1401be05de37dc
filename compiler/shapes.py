"""The shapes that a model's nodes really meet: one call with one typical sample."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .choices import Open
from .contract import Context
from .feeds import Feeds, input_specs, made_up
from .graph import operand_of
from .observe import Batch, Observer


def operand_shapes(
    model: ir.Model, weights: list[Open], context: Context
) -> dict[str, tuple[int, ...]]:
    """Return node name -> shape of what its weight meets in one call with a batch of one.

    Nodes in the bodies of If and Loop are left out.

    Args:
        model: The model.
        weights: Its weights.
        context: Gives feeds (else random ones are made up) and the work folder.
    """
    feeds = context.feeds or made_up(input_specs(model), context.seed, 1)
    readers = [r for one in weights for r in one.readers if r.node.graph is model.graph]
    names = list(dict.fromkeys(str(operand_of(reader).name) for reader in readers))
    observer = Observer(model, context.folder, context.memory)
    found = {name: array.shape for name, array in observer.once(names, typical(feeds))}
    return {str(reader.node.name): found[str(operand_of(reader).name)] for reader in readers}


def typical(feeds: Feeds) -> Batch:
    """Return a batch of one with the first sample of median size."""
    batches = list(feeds.rebatched(1).head(64) if feeds.rebatchable else feeds.head(1))
    sizes = [sum(np.size(array) for array in batch.values()) for batch in batches]
    return batches[sizes.index(sorted(sizes)[(len(sizes) - 1) // 2])]
