"""Checks whether a model, a recipe and a text suit each other, before any work; most of them need only shapes."""

import fnmatch

from torch import nn

from slimlm.calibration.samples import Calibration
from slimlm.core.errors import ModelError, RecipeError
from slimlm.core.solvers.inverse import tokens_needed
from slimlm.core.statistics.base import Source
from slimlm.data.rows import Reading
from slimlm.data.windows import chat_template_of
from slimlm.events import Notify
from slimlm.models.embeddings import Embeddings
from slimlm.models.experts import without_router
from slimlm.models.lazy import LazyModel
from slimlm.models.structure import linears_of, others_of, weight_of
from slimlm.recipe import Recipe


def compressible(blocks: dict[str, nn.Module], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Full name and shape (out, in) of every layer that the recipe compresses."""
    linears = {f"{block}.{name}": linear for block, module in blocks.items() for name, linear in linears_of(module).items()}
    shapes = {name: weight_of(linear).shape for name, linear in linears.items() if not recipe.ignores(name)}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def without_embeddings(skipped: dict[str, str], embeddings: Embeddings) -> dict[str, str]:
    """The layers that are not compressed, without an embedding or head that is."""
    return {name: reason for name, reason in skipped.items() if name != embeddings.head} | embeddings.skipped


def refuse_early(dense: LazyModel, blocks: dict[str, nn.Module], recipe: Recipe, *, planning: bool = False) -> dict[str, str]:
    """Check every layer against the recipe, by its shape.

    Args:
        dense: The original model.
        blocks: Its blocks by full name.
        recipe: The recipe.
        planning: Whether a plan will choose pattern and rank, so that the recipe's own need not fit.

    Returns:
        The layers that are not compressed, and why.

    Raises:
        RecipeError: A pattern of the recipe fits no layer, no layer would be compressed, or a step needs gradients.
        ModelError: A layer cannot take the recipe, or the model has too few layers that slimlm knows.
    """
    if wanting := [own.__name__ for own in recipe.needs if own.source is Source.GRADIENTS]:
        raise RecipeError(
            f"recipe {recipe.name} needs {wanting[0]}, which is made of a loss's gradients; compression measures what forward "
            "passes give, and no gradients. Use steps that need other statistics"
        )
    model = dense.model
    skipped = {
        name: "outside the blocks"
        for name, module in linears_of(model).items()
        if not any(name.startswith(block + ".") for block in blocks)
    }
    refuse_unknown(model, blocks)
    known = [f"{block_name}.{name}" for block_name, block in blocks.items() for name in linears_of(block)]
    for pattern in recipe.ignore:
        if not fnmatch.filter(known, pattern):
            raise RecipeError(f"`ignore={pattern!r}` fits no layer of the model; its layers are named like {known[0]}")
    for rule in recipe.rules:
        if unmatched := [pattern for pattern in rule.layers if not fnmatch.filter(known, pattern)]:
            raise RecipeError(f"a rule's {unmatched[0]!r} fits no layer of the model; its layers are named like {known[0]}")
    if all(map(recipe.ignores, known)):
        raise RecipeError("`ignore` excludes every layer; there is nothing to compress")
    refuse_experts([name for name in known if not recipe.ignores(name)], dense.experts, recipe)
    for block_name, block in blocks.items():
        for name, linear in linears_of(block).items():
            full = f"{block_name}.{name}"
            if recipe.ignores(full):
                skipped[full] = "ignored by the recipe"
                continue
            out, width = weight_of(linear).shape
            if not planning and (reason := recipe.refuses(full, (out, width))):
                raise ModelError(f'{reason}; or exclude the layer (`ignore="*.{name}"`)')
        skipped |= {f"{block_name}.{name}": reason for name, reason in others_of(block).items()}
    return skipped


def refuse_unknown(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Raise ModelError where most of the blocks' matrices lie in no linear layer, so that compression would do little."""
    sizes = {f"{block}.{name}": p.numel() for block, m in blocks.items() for name, p in m.named_parameters() if p.ndim > 1}
    others = {f"{block}.{name}": reason for block, m in blocks.items() for name, reason in others_of(m).items()}
    whole, unknown = sum(sizes.values()), sum(sizes[name] for name in others)
    if not any(linears_of(block) for block in blocks.values()):
        raise ModelError(
            f"the blocks of {type(model).__name__} ({next(iter(blocks))} and on) hold no linear layers: there is nothing to "
            "compress; slimlm knows nn.Linear, transformers' Conv1D and fused experts"
        )
    for block, module in blocks.items():
        if lone := without_router(module):
            raise ModelError(
                f"{block}.{lone[0]} of {type(model).__name__} holds experts, and slimlm finds no router next to them. A router "
                "must not be compressed, so it has to be known: a module next to them with an output for each works"
            )
    if unknown > whole / 2:
        largest = max(others, key=lambda name: sizes[name])
        raise ModelError(
            f"{unknown / whole:.0%} of the matrix weights in the blocks of {type(model).__name__} are in no linear layer that "
            f"slimlm knows, such as {largest}: {others[largest]}. Compressing the rest would do little"
        )


def refuse_experts(layers: list[str], experts: list[str], recipe: Recipe) -> None:
    """Raise ModelError where a step needs whole samples and a layer is an expert's, which is given only some tokens."""
    inside = tuple(f"{name}." for name in experts)
    needing = [named.method for named in recipe.steps if any(own.source is Source.SAMPLES for own in named.step.needs)]
    if needing and (own := [n for n in layers if n.startswith(inside)]):
        raise ModelError(
            f"{own[0]} is an expert's, which is given only some of the tokens; {' and '.join(needing)} of the recipe needs "
            'whole samples. Exclude such layers (`ignore="*.experts.*"`) or use another recipe'
        )


def refuse_text(dense: LazyModel, wanted: Calibration) -> None:
    """Raise DataError where a source has no sample, or a chat template is asked for that there is none of; reads no text."""
    wanted.refuse_empty_shares()
    if dense.tokenizer is not None:
        Reading(chat_template_of(dense.tokenizer), wanted.chat)


def warn_of_few_tokens(shapes: dict[str, tuple[int, int]], tokens: int, notify: Notify) -> None:
    """Notify where the calibration text is too short for the covariance of the widest layer."""
    name, (_, width) = max(shapes.items(), key=lambda entry: entry[1][1])
    if tokens < tokens_needed(width):
        notify(
            f"calibration has {tokens} tokens, but the covariance of the widest layer ({name}, {width} inputs) needs "
            f"{tokens_needed(width)}: for layers with too few, covariances are shrunk towards their diagonal, and calibration "
            "is not asymmetric. Give more text or `samples` for a better result"
        )
