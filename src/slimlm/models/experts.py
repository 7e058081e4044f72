"""Mixtures of experts: fused weights are split into linear layers, and routers distinguished from other layers.

Transformers keeps the weights of all experts of a block in two tensors `[experts, out, in]`. The classes that do so declare
their layout in attributes (which `use_experts_implementation` sets), so they are recognized by structure. `Experts` replaces
such a module: it holds a `gate_proj`, an `up_proj` and a `down_proj` per expert, each an `nn.Linear`, and computes what the
class computes, with the class's own activation.

Routers stand beside experts and are known by the shapes of what is in them, or by their names; where experts have none, slimlm
refuses the model rather than compress what may be one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.core.errors import ModelError

ROUTER = "a router, which picks experts; routers are not compressed"


@dataclass(frozen=True)
class Layout:
    """How a fused module lays out the weights of its experts."""

    count: int
    """number of experts"""
    gated: bool
    """whether gate and up are in one tensor"""
    interleaved: bool
    """whether rows of gate and up alternate; otherwise gate is the first half and up the second"""
    transposed: bool
    """whether weights are `[experts, in, out]`"""
    biased: bool

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of one expert's linear layers."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the fused tensors."""
        weights = {"gate_up_proj" if self.gated else "up_proj", "down_proj"}
        return frozenset(weights | {f"{name}_bias" for name in weights} if self.biased else weights)

    def fused(self, projection: str) -> str:
        """The name of the fused tensor that holds a projection's weight."""
        return "gate_up_proj" if self.gated and projection != "down_proj" else projection

    def weight(self, fused: Tensor, projection: str) -> Tensor:
        """A projection's weight `[out, in]`, a view of one expert's slice of the fused tensor."""
        return self.rows(fused.T if self.transposed else fused, projection)

    def rows(self, stacked: Tensor, projection: str) -> Tensor:
        """A projection's rows `[out, ...]`, or its bias `[out]`, a view of the joined rows of gate and up."""
        if not self.gated or projection == "down_proj":
            return stacked
        second = projection == "up_proj"
        return stacked[second::2] if self.interleaved else stacked.chunk(2)[second]

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """Outputs of gate and up, each `[tokens, inner]`, as one tensor `[tokens, 2 inner]` in the fused layer's layout."""
        return torch.stack((gate, up), dim=-1).flatten(-2) if self.interleaved else torch.cat((gate, up), dim=-1)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a fused module; None where a module is not one, or has tensors that are not in its layout."""
    flags = [getattr(module, name, None) for name in ("has_gate", "is_concatenated", "is_transposed", "has_bias")]
    if not all(isinstance(flag, bool) for flag in flags) or getattr(module, "has_post_expert_norm", False):
        return None
    gated, concatenated, transposed, biased = map(bool, flags)
    layout = Layout(int(getattr(module, "num_experts", 0)), gated, not concatenated, transposed, biased)
    parameters = dict(module.named_parameters())
    if parameters.keys() != layout.parameters or list(module.buffers()):
        return None
    up, down = parameters[layout.fused("up_proj")], parameters["down_proj"]
    return layout if up.ndim == down.ndim == 3 and {len(up), len(down)} == {layout.count} else None


class Experts(nn.ModuleList):
    """Replaces a fused module: one linear layer per expert and projection, `self[i]["gate_proj"]` and so on.

    It is called as transformers calls the fused module.
    """

    def __init__(self, experts: list[nn.ModuleDict], layout: Layout, activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__(experts)
        self.layout = layout
        self.activate = activate
        """the fused class's own function from the joined outputs of gate and up to the inputs of the down projection"""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of the experts that were chosen for each token.

        Args:
            hidden_states: inputs `[tokens, width]`.
            top_k_index: the experts chosen for each token, `[tokens, chosen]`.
            top_k_weights: their weights, `[tokens, chosen]`.

        Returns:
            Outputs `[tokens, width]`.
        """
        total = torch.zeros_like(hidden_states)
        for i in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == i)
            outputs = self.expert(self[i], hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, outputs.to(total.dtype))
        return total

    def expert(self, layers: nn.ModuleDict, x: Tensor) -> Tensor:
        """The outputs `[tokens, width]` of one expert for inputs `[tokens, width]`, not yet weighted."""
        inner = layers["up_proj"](x)
        if self.layout.gated:
            inner = self.layout.joined(layers["gate_proj"](x), inner)
        return layers["down_proj"](self.activate(inner))


@dataclass(frozen=True)
class Share:
    """Which part of a fused tensor a linear layer's weight or bias is."""

    fused: str
    """full name of the fused tensor"""
    expert: int
    view: Callable[[Tensor], Tensor]
    """from the expert's slice of the fused tensor to the weight or bias"""
    half: int | None
    """0 or 1: the first or the second half of the expert's rows; None: neither"""


def fused_in(model: nn.Module) -> list[str]:
    """The names of the fused modules that can be taken apart."""
    return [name for name, module in model.named_modules() if layout_of(module) is not None]


def shares_of(model: nn.Module) -> Iterator[Share]:
    """The parts that `take_apart` takes out of the model's fused tensors for the first expert; those of others are alike."""
    for name in fused_in(model):
        layout = layout_of(model.get_submodule(name))
        assert layout is not None
        for projection in layout.projections:
            yield from (share for _, share in _shares(layout, name, 0, projection))


def take_apart(model: nn.Module, name: str) -> dict[str, Share]:
    """Replace a fused module of the model by `Experts`, whose weights are views of the fused tensors.

    Args:
        model: it is changed in place.
        name: the fused module's name in it.

    Returns:
        Which part of the model's former tensors each new weight and bias is, by full name.

    Raises:
        ModelError: the module is not one that `fused_in` names.
    """
    fused: Any = model.get_submodule(name)
    layout = layout_of(fused)
    if layout is None:
        raise ModelError(f"{name} is a {type(fused).__name__}, which is not a module of fused experts that slimlm knows")
    tensors = {key: parameter for key, parameter in fused.named_parameters() if key in layout.parameters}
    experts, shares = [], {}
    for i in range(layout.count):
        layers = nn.ModuleDict()
        for projection in layout.projections:
            layer = layers[projection] = _linear()
            for key, share in _shares(layout, name, i, projection):
                tensor = tensors[share.fused.rpartition(".")[2]]
                setattr(layer, key, nn.Parameter(share.view(tensor.detach()[i]), requires_grad=tensor.requires_grad))
                shares[f"{name}.{i}.{projection}.{key}"] = share
            layer.out_features, layer.in_features = layer.weight.shape
        experts.append(layers)
    for key in tensors:
        delattr(fused, key)
    # Bound to the old module, which has no tensors any more, because the activation may read its settings.
    activate = fused._apply_gate if layout.gated else fused.act_fn.forward
    model.set_submodule(name, Experts(experts, layout, activate).train(fused.training))
    return shares


def _linear() -> nn.Linear:
    """A linear layer without values; the caller sets its weight."""
    with torch.device("meta"):
        return nn.Linear(1, 1, bias=False)


def _shares(layout: Layout, name: str, expert: int, projection: str) -> Iterator[tuple[str, Share]]:
    """Weight and bias of a projection of one expert."""
    fused = f"{name}.{layout.fused(projection)}"
    halves = {"gate_proj": 0, "up_proj": 1} if layout.gated and not (layout.interleaved or layout.transposed) else {}
    half = halves.get(projection)
    yield "weight", Share(fused, expert, lambda tensor: layout.weight(tensor, projection), half)
    if layout.biased:
        yield "bias", Share(f"{fused}_bias", expert, lambda tensor: layout.rows(tensor, projection), half)


def routers_of(block: nn.Module) -> set[str]:
    """The names of a block's routers and of all modules in them: of what only decides which experts a token is given to.

    A router calls itself so, or it stands beside a module of experts, or beside one that holds them. There it is, if none
    calls itself so,

    - a layer with one output for each expert;
    - or a module of any layers that takes activations and returns none: no matrix in it has as many rows as the first one has
      columns, and one has a row for each expert, or for each and for at most as many choices besides (such as an expert that
      does nothing).

    A layer beside experts that has a single output, the gate of a shared expert, counts as one, too.
    """
    experts = _experts_in(block)
    routers = _called_routers(block, experts)
    for name, count in experts.items():
        routers |= _routers_beside(block, name, count)
        routers |= {path for path, shapes in next(_siblings(block, name)).items() if [shape[0] for shape in shapes] == [1]}
    return {f"{router}.{name}".rstrip(".") for router in routers for name, _ in block.get_submodule(router).named_modules()}


def without_router(block: nn.Module) -> list[str]:
    """The names of a block's experts for which no router is found, neither a module nor a matrix of a module around them."""
    experts = _experts_in(block)
    if _called_routers(block, experts):
        return []
    lone = [name for name, count in experts.items() if not _routers_beside(block, name, count)]
    return [name for name in lone if not any(experts[name] in shape for shape in _matrices_around(block, name))]


def _experts_in(block: nn.Module) -> dict[str, int | None]:
    """The names of a block's modules of experts, taken apart or of a class that slimlm does not know, and how many each has."""
    counts: dict[str, int | None] = {}
    for name, module in block.named_modules():
        if isinstance(module, Experts):
            counts[name] = len(module)
        elif "Experts" in type(module).__name__ or name.rpartition(".")[2] == "experts":
            count = len(module) if isinstance(module, nn.ModuleList) else getattr(module, "num_experts", None)
            counts[name] = count if isinstance(count, int) else None
    return counts


def _called_routers(block: nn.Module, experts: Iterable[str]) -> set[str]:
    """The names of the modules that are called routers, by name or class, and hold none of the experts."""
    return {
        name
        for name, module in block.named_modules()
        if "router" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        and not any(f"{path}.".startswith(f"{name}.") for path in experts)
    }


def _around(path: str) -> Iterator[str]:
    """The names of the modules that hold this one, from the innermost to the block, whose own name is empty."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _matrices_around(block: nn.Module, experts: str) -> list[torch.Size]:
    """The shapes of the matrices that modules around these experts hold themselves, not in a layer."""
    around = [block.get_submodule(path) for path in _around(experts)]
    return [p.shape for module in around for p in module.parameters(recurse=False) if p.ndim == 2]


def _siblings(block: nn.Module, experts: str) -> Iterator[dict[str, list[torch.Size]]]:
    """The modules beside these experts, then those beside each module around them: by name the shapes of their matrices.

    Modules that hold tensors of more dimensions are not among them.
    """
    for around in _around(experts):
        beside: dict[str, list[torch.Size]] = {}
        for name, module in block.get_submodule(around).named_children():
            path = f"{around}.{name}".lstrip(".")
            shapes = [parameter.shape for parameter in module.parameters() if parameter.ndim > 1]
            if not f"{experts}.".startswith(f"{path}.") and all(len(shape) == 2 for shape in shapes):
                beside[path] = shapes
        yield beside


def _routers_beside(block: nn.Module, experts: str, count: int | None) -> set[str]:
    """The routers beside these experts, or else beside the innermost module around them that has any."""
    called = _called_routers(block, [experts])
    for beside in _siblings(block, experts):
        if routers := called & beside.keys() or {path for path, shapes in beside.items() if _chooses(shapes, count)}:
            return routers
    return set()


def _chooses(shapes: list[torch.Size], count: int | None) -> bool:
    """Whether matrices of these shapes `[out, in]` can be those of a router of so many experts (None: it is not known)."""
    rows = [shape[0] for shape in shapes]
    if len(rows) < 2:
        return rows == [count]
    return shapes[0][1] not in rows and (count is None or any(count <= each <= 2 * count for each in rows))
