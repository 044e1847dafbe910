"""Wide merges: models of one class run side by side, block by block, y = x + Σ wᵢ fᵢ(x).

Every model's block keeps its own weights, so nothing that leaves a block's function as it is, no symmetry
whatever, changes the result: a lock does not hinder it. The price is size: all blocks of all models.

What a block is is found in the structure of the module alone: the outermost lists of modules of one class.
With `parts="auto"` the sum is taken inside blocks, behind each child that writes to the residual stream
(attention, then the rest), wherever a probe shows that a block is x plus what these children give; elsewhere,
as in blocks that normalise their sum, around the block as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import InputError, UsageError

PARTS = ("auto", "block")
# How near a block must be to the sum of its parts, relative to its largest output.
_NEAR = 1e-4


class WideModel(nn.Module):
    """Several models as one, callable as they are.

    Weights that sum to 1 make it a mean of blocks; with the base among the models, weights (1 − a − b, a, b)
    add a and b of two models' changes. Everything outside of blocks (embeddings, last norm) is the mean with
    the same weights, over their sum; what the models do not share (heads) is the host's. Not for two threads at
    once, nor two wide models with blocks in common: running one puts stand-ins into blocks.

    Args:
        models: two or more of one class, in evaluation mode; their blocks are used as they are, not copied.
        weights: one for each.
        host: the index of the model whose private tensors are used: one wide model for each task.
        parts: "auto" or "block".
        private: beginnings of names that are the host's although all models have them in one shape: heads.

    Attributes:
        size_ratio: numbers in it over those of one model.
        private: names outside of blocks that the models do not share: the host's.

    Raises:
        UsageError: not one weight for each model, or another `parts`.
        InputError: models of different classes or shapes, or without lists of blocks.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float],
        *,
        host: int = 0,
        parts: str = "auto",
        private: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if parts not in PARTS:
            raise UsageError("no such kind of parts", expected=" | ".join(PARTS), got=parts)
        if not models or len(weights) != len(models) or not 0 <= host < len(models):
            got = f"{len(models)} models, {len(weights)} weights, host {host}"
            raise UsageError("a wide merge needs one weight for each model", got=got)
        self.weights = tuple(float(weight) for weight in weights)
        lists = [block_lists(model) for model in models]
        paths = list(lists[host])
        for model, found in zip(models, lists, strict=True):
            _check(models[host], lists[host], model, found)
        stacks = {path: [list(found[path]) for found in lists] for path in paths}
        # Blocks are shared with the originals: only what lies outside of them is copied.
        memo: dict[int, Any] = {id(block): block for path in paths for block in stacks[path][host]}
        self.model = copy.deepcopy(models[host], memo)
        shared = {part for path in paths for block in stacks[path][host] for part in block.modules()}
        self.private = self._outside(models, paths, tuple(private))
        self.handed: Handed = {}
        for path in paths:
            blocks = [
                WideBlock(columns, self.weights, host, parts, self.handed)
                for columns in zip(*stacks[path], strict=True)
            ]
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, nn.ModuleList(blocks))
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False) and module not in shared:
                config.use_cache = False
        single = sum(p.numel() for p in models[host].parameters())
        self.size_ratio = sum(p.numel() for p in self.parameters()) / single
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the models' own; caches of keys are refused."""
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise UsageError("a wide model runs without a cache", hint="call it with use_cache=False")
        self.handed.clear()
        try:
            return self.model(*args, **kwargs)
        finally:
            self.handed.clear()

    def _outside(self, models: Sequence[nn.Module], paths: list[str], own: tuple[str, ...]) -> list[str]:
        """Average what lies outside of blocks; returns the names of what the models do not share."""
        total = sum(self.weights)
        states = [_values(model) for model in models]
        inside = tuple(f"{path}." for path in paths)
        private = []
        with torch.no_grad():
            for name, tensor in _values(self.model).items():
                if name.startswith(inside) or not tensor.is_floating_point():
                    continue
                others = [state.get(name) for state in states]
                same = all(other is not None and other.shape == tensor.shape for other in others)
                if not same or name.startswith(own):
                    private.append(name)
                    continue
                if all(other is not None and torch.equal(other, tensor) for other in others):
                    continue
                if abs(total) < 1e-6:
                    raise UsageError("the weights of a wide merge sum to zero", got=self.weights)
                mixed = sum(
                    weight * other.to(tensor.device, torch.float64)
                    for weight, other in zip(self.weights, others, strict=True)
                    if other is not None
                )
                assert isinstance(mixed, torch.Tensor)
                tensor.copy_(mixed / total)
        return private


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once."""
    found: dict[str, torch.Tensor] = dict(model.named_buffers())
    found.update(model.named_parameters())
    return found


# By the identity of what the host's block gave behind its stream, what every model's block gave there.
Handed: TypeAlias = dict[int, tuple[Any, ...]]


class WideBlock(nn.Module):
    """One block of every model: x + Σ wᵢ fᵢ(x), or the same behind each part that writes to x.

    Attributes of the host's block are seen through it, for models that ask a block for its kind.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        weights: Sequence[float],
        host: int,
        parts: str,
        handed: Handed | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.weights, self.host = tuple(weights), host
        self.handed: Handed = {} if handed is None else handed
        # None: not probed yet; else the names of the children that write to the stream, in order; () if whole.
        self.writers: tuple[str, ...] | None = None if parts == "auto" else ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            blocks: Any = super().__getattr__("blocks")
            return getattr(blocks[super().__getattribute__("host")], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = _stream(args, kwargs)
        if kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None:
            raise UsageError("a wide model runs without a cache", hint="call it with use_cache=False")
        if self.writers is None:
            self.writers = _writers(self.blocks[self.host], x, args, kwargs)
        return self._by_parts(x, args, kwargs) if self.writers else self._whole(x, args, kwargs)

    def _whole(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = []
        for number, block in enumerate(self.blocks):
            own = tuple(self._own(value, number) for value in args)
            outputs.append(block(*own, **{name: self._own(value, number) for name, value in kwargs.items()}))
        for behind in zip(*(one[1:] for one in outputs if isinstance(one, tuple)), strict=False):
            if isinstance(behind[self.host], torch.Tensor):
                self.handed[id(behind[self.host])] = behind
        y = x
        for output, weight in zip(outputs, self.weights, strict=True):
            y = y + weight * (_first(output, x) - x)
        return _like(outputs[self.host], y)

    def _own(self, value: Any, number: int) -> Any:
        """What a model's own earlier blocks handed on, where it stands for the host's: biases of positions."""
        held = self.handed.get(id(value))
        return value if held is None or held[self.host] is not value else held[number]

    def _by_parts(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run every block up to each writer with the sums of the writers before it in their places."""
        done: dict[str, Part] = {}
        assert self.writers is not None
        for writer in self.writers:
            total: Part | None = None
            for block, weight in zip(self.blocks, self.weights, strict=True):
                part = _run_until(block, writer, done, args, kwargs)
                total = Part(weight * part.value + (0 if total is None else total.value), part.length)
            assert total is not None
            done[writer] = total
        with _replaced(self.blocks[self.host], done):
            return self.blocks[self.host](*args, **kwargs)


@dataclass(frozen=True)
class Part:
    """What a child of a block gives: a tensor, or a tuple of so many that begins with one."""

    value: torch.Tensor
    length: int

    @classmethod
    def of(cls, output: Any) -> Part:
        """From what the child returned."""
        return cls(output[0], len(output)) if isinstance(output, tuple) else cls(output, 0)

    @property
    def output(self) -> Any:
        """What the child would have returned; without what stood behind the tensor."""
        return (self.value, *(None,) * (self.length - 1)) if self.length else self.value


class _Seen(Exception):  # noqa: N818 - not an error: the rest of the block is not needed
    """What a part gives is known."""


def _run_until(
    block: nn.Module, writer: str, done: dict[str, Part], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Part:
    """Run a block no further than through one child, with what is given in the place of those before it."""
    seen: list[Part] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(Part.of(output))
        raise _Seen

    handle = block.get_submodule(writer).register_forward_hook(hook)
    try:
        with _replaced(block, done), suppress(_Seen):
            block(*args, **kwargs)
    finally:
        handle.remove()
    if not seen:
        raise InputError("a block does not run a part that the host's runs", where=writer)
    return seen[0]


@contextmanager
def _replaced(block: nn.Module, outputs: dict[str, Part]) -> Iterator[None]:
    """Let children of a block return what is given instead of running."""
    children = {block.get_submodule(name): part.output for name, part in outputs.items()}
    for child, output in children.items():
        child.forward = _constant(output)
    try:
        yield
    finally:
        for child in children:
            del child.forward


def _constant(output: Any) -> Any:
    return lambda *_, **__: output


def _writers(
    block: nn.Module, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, ...]:
    """The children of a block that write to the residual stream; empty if it is not x plus what they give."""
    seen: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda _, __, output: seen.setdefault(name, []).append(output)

    handles = [child.register_forward_hook(watch(name)) for name, child in block.named_children()]
    try:
        with torch.no_grad():
            y = _first(block(*args, **kwargs), x)
    finally:
        for handle in handles:
            handle.remove()
    # Norms and dropouts have no matrix; a writer has, and gives something of the stream's shape, once.
    found: dict[str, torch.Tensor] = {}
    for name, outputs in seen.items():
        value = Part.of(outputs[0]).value
        matrices = any(parameter.ndim >= 2 for parameter in block.get_submodule(name).parameters())
        if matrices and len(outputs) == 1 and isinstance(value, torch.Tensor) and value.shape == x.shape:
            found[name] = value
    rest = y - x
    for value in found.values():
        rest = rest - value
    return tuple(found) if float(rest.abs().max()) <= _NEAR * float(y.abs().max()) else ()


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of blocks: lists of modules of one class that are made of modules themselves.

    Raises:
        InputError: there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) and len({type(one) for one in module}) == 1 and any(module[0].children()):
            found[path] = module
    if not found:
        raise InputError("the model has no list of blocks of one class", where=type(model).__name__)
    return found


def _check(
    host: nn.Module,
    own: dict[str, nn.ModuleList],
    model: nn.Module,
    found: dict[str, nn.ModuleList],
) -> None:
    """That a model has the host's blocks, of the same class and shapes."""
    where = type(model).__name__
    if found.keys() != own.keys() or any(len(found[path]) != len(own[path]) for path in own):
        raise InputError("models with different blocks", where=where, expected=list(own), got=list(found))
    for path, blocks in own.items():
        for one, two in zip(blocks, found[path], strict=True):
            shapes = [{n: p.shape for n, p in block.named_parameters()} for block in (one, two)]
            if type(one) is not type(two) or shapes[0] != shapes[1]:
                raise InputError("blocks of different classes or shapes", where=f"{where}: {path}")


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state that a block is called with."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, torch.Tensor):
        raise InputError("a block is not called with a hidden state", got=type(x).__name__)
    return x


def _first(output: Any, x: torch.Tensor) -> torch.Tensor:
    """The hidden state in what a block returns."""
    y = output[0] if isinstance(output, tuple) else output
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        got = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise InputError("a block does not return its input's shape", expected=list(x.shape), got=got)
    return y


def _like(output: Any, y: torch.Tensor) -> Any:
    return (y, *output[1:]) if isinstance(output, tuple) else y
