"""Merges that weigh models by statistics of their inputs: RegMean and Fisher. They need unlabelled inputs.

The statistics of a model are gathered once, by running it, and handed to the merge: `grams` for RegMean,
`fisher_information` for Fisher. Names are those of the module in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UsageError
from . import Merged
from .tensors import merge_deltas, without_padding

if TYPE_CHECKING:
    from . import State

# Suite v1. RegMean: what is left of the Gram matrices outside of their diagonals.
REDUCTIONS = (0.1, 0.5, 0.9, 0.95, 1.0)
EXACT_CLASSES = 16


@dataclass(frozen=True)
class Gram:
    """Xᵀ X of the inputs of a linear layer, float64 (inputs, inputs); `axis`: the weight's axis of inputs."""

    matrix: torch.Tensor
    axis: int
    count: int


def grams(
    module: torch.nn.Module,
    run: Callable[[Any], object],
    batches: Iterable[Any],
    masks: Callable[[Any], Sequence[torch.Tensor]] | None = None,
) -> dict[str, Gram]:
    """Gram matrices of the inputs of every linear layer of a module, by the name of its weight.

    What is linear is seen and not named: a module whose output is its input times its two-dimensional weight,
    in either layout, plus its bias.

    Args:
        module: in evaluation mode; not changed.
        run: runs the module on one batch.
        batches: of inputs.
        masks: of a batch, the positions that count, booleans (n, positions); inputs of other shapes count in full.

    Raises:
        InputError: no batch, or nothing in the module is linear.
    """
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    axes: dict[str, int | None] = {}
    counted: Sequence[torch.Tensor] = ()

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0] if inputs else None
            if not isinstance(x, torch.Tensor) or not isinstance(output, torch.Tensor):
                return
            if axes.setdefault(name, _input_axis(layer, x, output)) is None:
                return
            rows = without_padding(x.detach(), counted).reshape(-1, x.shape[-1]).double()
            totals[name] = totals.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = []
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.ndim == 2:
            handles.append(layer.register_forward_hook(watch(f"{name}.weight" if name else "weight")))
    try:
        with torch.no_grad():
            for batch in batches:
                counted = () if masks is None else masks(batch)
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not totals:
        raise InputError("no linear layer saw an input", where=type(module).__name__, hint="give it batches")
    return {name: Gram(total, int(axes[name] or 0), counts[name]) for name, total in totals.items()}


def _input_axis(layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor) -> int | None:
    """The axis of a layer's weight that takes its inputs: 1 for (out, in), 0 for (in, out), None: not linear."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    if weight is None or not x.is_floating_point() or not x.numel():
        return None
    row, want = x.reshape(-1, x.shape[-1])[:4], output.reshape(-1, output.shape[-1])[:4]
    for axis, matrix in ((1, weight.T), (0, weight)):
        if matrix.shape == (row.shape[-1], want.shape[-1]):
            got = row @ matrix + (0 if bias is None else bias)
            if torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-3 * float(want.abs().max())):
                return axis
    return None


def regmean(
    base: State,
    experts: Mapping[str, State],
    *,
    grams: Mapping[str, Mapping[str, Gram]],
    reduction: float = 0.9,
) -> Merged:
    """(Σ Gᵢ)⁻¹ Σ Gᵢ Wᵢ for the weights of linear layers, the mean of the models for everything else.

    For one linear layer this is the least-squares fit to all models' outputs, each on its own inputs.
    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849.

    Args:
        base: names and dtypes; its values take no part.
        experts: state dicts by name.
        grams: of every expert, as `grams` gives them.
        reduction: what Gram matrices are multiplied by outside of their diagonals; 1 leaves them.

    Raises:
        UsageError: an expert without Gram matrices. InputError: models that do not fit together.
    """
    _statistics_of(experts, grams, "grams")

    def mix(name: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        held = {model: grams[model].get(name) for model in deltas}
        known = {model: gram for model, gram in held.items() if gram is not None}
        if len(known) < len(deltas):
            return torch.stack(list(deltas.values())).mean(0)
        total: torch.Tensor | None = None
        right: torch.Tensor | None = None
        axis = next(iter(known.values())).axis
        for model, gram in known.items():
            delta = deltas[model].double()
            matrix = gram.matrix.to(delta.device) / gram.count
            matrix = reduction * matrix + (1 - reduction) * torch.diag(matrix.diagonal())
            part = matrix @ (delta.T if axis == 1 else delta)
            total = matrix if total is None else total + matrix
            right = part if right is None else right + part
        assert total is not None
        assert right is not None
        # An input that is always zero leaves a row undetermined: the shortest solution leaves the base there.
        # That takes a driver which the CPU alone has.
        merged = torch.linalg.lstsq(total.cpu(), right.cpu(), driver="gelsd").solution.to(total.device)
        return (merged.T if axis == 1 else merged).float()

    return merge_deltas(base, experts, mix)


def fisher_information(
    module: torch.nn.Module,
    logits: Callable[[Any], torch.Tensor],
    examples: Iterable[Any],
    *,
    samples: int = 1,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information, by parameter: E over inputs and y ~ p(y|x) of (∂ log p(y|x))².

    For at most EXACT_CLASSES classes the expectation over y is taken exactly, else `samples` labels are drawn.
    Logits of several positions (batch, …, classes): labels of all positions are drawn together, which is the
    Fisher information of the sequence.

    Args:
        module: in evaluation mode; its gradients are cleared.
        logits: runs the module on one example and gives (1, classes) or (1, positions, classes).
        examples: batches of one.
        samples, seed: of drawing.

    Raises:
        InputError: no examples.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for example in examples:
        with torch.enable_grad():
            scores = logits(example).float().log_softmax(-1)
        scores = scores.reshape(-1, scores.shape[-1])
        chances = scores.detach().exp()
        if len(scores) == 1 and scores.shape[-1] <= EXACT_CLASSES:
            terms = [(scores[0, y], float(chances[0, y])) for y in range(scores.shape[-1])]
        else:
            terms = []
            for _ in range(samples):
                labels = torch.multinomial(chances.cpu(), 1, generator=generator).to(scores.device)
                terms.append((scores.gather(1, labels).sum(), 1 / samples))
        for index, (term, weight) in enumerate(terms):
            found = torch.autograd.grad(
                term, list(parameters.values()), retain_graph=index + 1 < len(terms), allow_unused=True
            )
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    totals[name] += weight * gradient.float().square()
        count += 1
    if not count:
        raise InputError("no examples to estimate Fisher information from", where=type(module).__name__)
    return {name: total / count for name, total in totals.items()}


def fisher(
    base: State,
    experts: Mapping[str, State],
    *,
    fishers: Mapping[str, Mapping[str, torch.Tensor]],
    weight: float | Mapping[str, float] = 1.0,
    floor: float = 1e-6,
) -> Merged:
    """Σ wᵢ Fᵢ θᵢ / Σ wᵢ Fᵢ, entry by entry; the weighted mean where no Fisher information is known.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832.

    Args:
        base: names and dtypes; its values take no part.
        experts: state dicts by name.
        fishers: of every expert, as `fisher_information` gives it.
        weight: one for all, or by expert.
        floor: the least Fisher information of an entry.

    Raises:
        UsageError: an expert without Fisher information. InputError: models that do not fit together.
    """
    _statistics_of(experts, fishers, "fishers")
    weights = {name: float(weight[name] if isinstance(weight, Mapping) else weight) for name in experts}

    def mix(name: str, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        known = all(name in fishers[model] for model in deltas)
        top = bottom = torch.zeros((), dtype=torch.float64)
        for model, delta in deltas.items():
            information = (
                fishers[model][name].to(delta.device).double().clamp(min=floor)
                if known
                else torch.ones_like(delta)
            )
            top = top.to(delta.device) + weights[model] * information * delta.double()
            bottom = bottom.to(delta.device) + weights[model] * information
        return (top / bottom).float()

    return merge_deltas(base, experts, mix)


def _statistics_of(experts: Mapping[str, State], found: Mapping[str, object], what: str) -> None:
    if missing := [name for name in experts if name not in found]:
        raise UsageError(f"experts without {what}", got=", ".join(missing), expected=", ".join(experts))
