"""The linear layers of a block in the order in which their inputs are computed."""

from torch import nn

from slimlm.calibration.capture import BlockRun, layer_inputs


def stages_of(block_run: BlockRun, linears: dict[str, nn.Module]) -> list[list[str]]:
    """The linear layers of a block in the order in which their inputs are computed, grouped by stage.

    The layers of a stage share an input (q, k and v; gate and up), or are the same layer of every expert. When the stages are
    compressed one after another, each is measured on the outputs of the compressed stages before it. The order is found by
    running one batch of the first rank; layers that it does not reach come last.

    Args:
        block_run: The block and its inputs.
        linears: Its layers that are to be compressed, by their names within it.
    """
    return block_run.inputs.group.broadcast(lambda: _stages_of(block_run, linears))


def _stages_of(block_run: BlockRun, linears: dict[str, nn.Module]) -> list[list[str]]:
    block, seen = block_run.block, next(layer_inputs(block_run, linears))
    stages: list[list[str]] = []
    for layer, x in seen.items():
        for stage in stages:
            if any(seen[other] is x or kind_of(block, other) == kind_of(block, layer) for other in stage):
                stage.append(layer)
                break
        else:
            stages.append([layer])
    missed = [layer for layer in linears if layer not in seen]
    for layer in list(missed):
        for stage in stages:
            if any(kind_of(block, other) == kind_of(block, layer) for other in stage):
                stage.append(layer)
                missed.remove(layer)
                break
    return [*stages, missed] if missed else stages


def kind_of(block: nn.Module, layer: str) -> str:
    """A layer's name without the number of its expert, which is its place in a list (nn.ModuleList)."""
    pieces = layer.split(".")
    for i, piece in enumerate(pieces):
        if piece.isdigit() and i > 0 and isinstance(block.get_submodule(".".join(layer.split(".")[:i])), nn.ModuleList):
            pieces[i] = "*"
    return ".".join(pieces)
