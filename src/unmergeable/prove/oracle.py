"""The judge of every conjecture: how much does the function change when these tensors of the checkpoint do?

Edits are given on the layout of the checkpoint. Loading one may rename, stack, split, transpose or permute
tensors; the oracle finds out where every stored number ends up by loading a checkpoint of serial numbers
once, and then writes edits straight into the model's memory. Tensors for which that does not explain the
loaded values take the long way, through `from_pretrained`. `reload_error` always does, through files.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmergeable.errors import InputError, RunError
from unmergeable.prove.inputs import InputSet, flatten_outputs
from unmergeable.prove.miniature import Miniature

#: A reloaded model has to give the miniature's outputs to this relative error.
SELF_ERROR = 1e-12
CACHED_STEPS = 4


class _Place:
    """Where a stored tensor lives: its numbers `source` are at positions `target` of a parameter."""

    def __init__(
        self, parameter: torch.Tensor, target: torch.Tensor | None, source: torch.Tensor | None
    ) -> None:
        self.parameter = parameter
        self.target = target
        self.source = source

    def write(self, tensor: torch.Tensor) -> None:
        if self.target is None:
            self.parameter.copy_(tensor)
        else:
            self.parameter.view(-1)[self.target] = tensor.reshape(-1)[self.source]


class Oracle:
    """Measures changes of a miniature's function.

    Args:
        miniature: built in this process. layout: one of `Miniature.layouts`: "disk" for the tensors as
        `save_pretrained` writes them, and others. attention: attention implementation of the model that is
        asked.

    Raises:
        RunError: stock `from_pretrained` does not bring the miniature back from this layout.

    Attributes:
        tensors: {name: float64 array}, the stored tensors that may be changed.
        forwards: how many forwards were run; `seconds`: how long they took.
        slow: names whose edits take the long way (all of them or none); `unused`: names that loading ignores.
        self_error: error of the reloaded miniature against the one that was built.
        decoded: whether a thorough `reload_error` has compared decoding with a cache.
    """

    def __init__(self, miniature: Miniature, layout: str = "disk", attention: str = "eager") -> None:
        layouts = miniature.layouts()
        if layout not in layouts:
            raise RunError("the miniature has no such layout", expected=" or ".join(layouts), got=layout)
        self.miniature = miniature
        self.layout = layout
        self.attention = attention
        self.forwards = 0
        self.seconds = 0.0
        stored = layouts[layout]
        self._stored = stored
        self.tensors: dict[str, np.ndarray] = {
            name: tensor.detach().numpy() for name, tensor in stored.items() if tensor.is_floating_point()
        }
        for array in self.tensors.values():
            array.setflags(write=False)
        self.decoded = False
        self._sets = list(miniature.inputs)
        self._sdpa: list[list[torch.Tensor]] | None = None
        self._model = miniature.load(stored, attention=attention)
        self._places, self.slow, self.unused = self._trace()
        self._base = self._run(self._model)
        original = self._run(miniature.model)
        difference = max(_difference(mine, theirs) for mine, theirs in zip(self._base, original, strict=True))
        if not difference <= SELF_ERROR:
            raise RunError(
                f"a reloaded miniature ({layout} layout) is not the same function",
                expected=f"at most {SELF_ERROR}",
                got=difference,
            )
        self.self_error = difference

    # ---- questions

    def error(self, changes: Mapping[str, np.ndarray], *, limit: float = math.inf) -> float:
        """The largest relative change of the output when these stored tensors are replaced.

        Args:
            changes: {stored name: new values of the same shape}.
            limit: stop and return early once an input set exceeds this.

        Returns:
            max over input sets and output tensors of |new - old| / |old| (Frobenius); infinity where the
            model fails or gives a number that is not finite.

        Raises:
            InputError: a name or shape that the checkpoint does not have.
        """
        new = self._checked(changes)
        if self.slow.isdisjoint(new):
            touched = self._write(new)
            try:
                return self._compare(self._model, limit)
            finally:
                for name in touched:
                    self._put(name, self._stored[name])
        try:
            model = self.miniature.load({**self._stored, **new}, attention=self.attention)
        except Exception:  # a converter may fail on any values: then the change is not a symmetry
            return math.inf
        return self._compare(model, limit)

    def reload_error(self, changes: Mapping[str, np.ndarray], *, thorough: bool = False) -> float:
        """As `error`, but through files: write an edited checkpoint, load it with `from_pretrained`.

        Args:
            thorough: also compare under scaled-dot-product attention, and decoding with a cache.
        """
        new = self._checked(changes)
        with tempfile.TemporaryDirectory(prefix="unmergeable-") as folder:
            path = Path(folder)
            self.miniature.write(path, {**self._stored, **new})
            try:
                model = self.miniature.load(folder=path, attention=self.attention)
            except Exception:  # as above: whatever stops it from loading, it is not a symmetry
                return math.inf
            worst = self._compare(model, math.inf)
            if thorough and worst < math.inf:
                worst = max(worst, self._compare_sdpa(path), self._compare_cached(model))
        return worst

    def reads(self, names: Mapping[str, str]) -> bool:
        """Whether stock loaders give the same function from a checkpoint under other names.

        Args:
            names: {other name: stored name}; what is not mentioned keeps its own.
        """
        renamed = {other: self._stored[name] for other, name in names.items()}
        kept = {name: tensor for name, tensor in self._stored.items() if name not in set(names.values())}
        with tempfile.TemporaryDirectory(prefix="unmergeable-") as folder:
            self.miniature.write(Path(folder), {**kept, **renamed})
            try:
                model = self.miniature.load(folder=Path(folder), attention=self.attention)
            except Exception:  # a loader may refuse unknown names in any way
                return False
            return self._compare(model, math.inf) <= SELF_ERROR

    # ---- how

    def _checked(self, changes: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for name, value in changes.items():
            old = self.tensors.get(name)
            if old is None:
                raise InputError("the checkpoint has no such tensor", where=name)
            if value.shape != old.shape:
                raise InputError(
                    "a changed tensor has another shape", where=name, expected=old.shape, got=value.shape
                )
            new[name] = torch.from_numpy(np.array(value, dtype=np.float64, order="C"))
        return new

    def _write(self, new: Mapping[str, torch.Tensor]) -> list[str]:
        for name, tensor in new.items():
            self._put(name, tensor)
        return list(new)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        for place in self._places.get(name, ()):
            place.write(tensor)

    def _trace(self) -> tuple[dict[str, list[_Place]], set[str], set[str]]:
        """Find the places of every stored tensor by loading serial numbers, and check them on new values."""
        names = list(self.tensors)
        sizes = [self._stored[name].numel() for name in names]
        first = np.cumsum([1, *sizes])
        numbered = {
            name: torch.arange(start, start + size, dtype=torch.float64).view(self._stored[name].shape)
            for name, start, size in zip(names, first, sizes, strict=False)
        }
        try:
            traced = _memory(self.miniature.load({**self._stored, **numbered}, attention=self.attention))
        except Exception:  # a class that reads its weights while it loads: everything goes the long way
            return {}, set(names), set()
        bounds = torch.from_numpy(first)
        places: dict[str, list[_Place]] = {name: [] for name in names}
        memory = _memory(self._model)
        for path, parameter in memory.items():
            numbers = traced[path].reshape(-1)
            inside = (numbers >= 1) & (numbers < int(first[-1])) & (numbers == numbers.round())
            positions = inside.nonzero().squeeze(1)
            serial = numbers[positions].to(torch.int64)
            owner = torch.bucketize(serial, bounds, right=True) - 1
            for index in owner.unique().tolist():
                mine = owner == index
                target, source = positions[mine], serial[mine] - int(first[index])
                stored = self._stored[names[index]]
                whole = parameter.shape == stored.shape and target.numel() == stored.numel()
                if whole and torch.equal(target, source):
                    places[names[index]].append(_Place(parameter, None, None))
                else:
                    places[names[index]].append(_Place(parameter, target, source))
        if not self._explains(places, memory):
            # what feeds the numbers that are not explained is not known, so no tensor is trusted
            return {}, set(names), set()
        return places, set(), {name for name, found in places.items() if not found}

    def _explains(self, places: Mapping[str, list[_Place]], memory: Mapping[str, torch.Tensor]) -> bool:
        """Whether writing new values to these places equals loading them, bit for bit."""
        generator = torch.Generator().manual_seed(5)
        other = {
            name: tensor + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            for name, tensor in self._stored.items()
            if name in self.tensors
        }
        loaded = _memory(self.miniature.load({**self._stored, **other}, attention=self.attention))
        before = {path: tensor.clone() for path, tensor in memory.items()}
        for name, tensor in other.items():
            for place in places[name]:
                place.write(tensor)
        same = all(torch.equal(memory[path], loaded[path]) for path in memory)
        for path, tensor in before.items():
            memory[path].copy_(tensor)
        return same

    def _run(self, model: Any, sets: list[InputSet] | None = None) -> list[list[torch.Tensor]]:
        return [self._forward(model, entry) for entry in (self._sets if sets is None else sets)]

    def _forward(self, model: Any, entry: InputSet) -> list[torch.Tensor]:
        started = time.monotonic()
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = [tensor.clone() for tensor in flatten_outputs(model(**entry.arguments), entry.masks)]
        self.forwards += 1
        self.seconds += time.monotonic() - started
        return outputs

    def _compare(self, model: Any, limit: float) -> float:
        worst = 0.0
        for entry, base in zip(self._sets, self._base, strict=True):
            try:
                outputs = self._forward(model, entry)
            except Exception:  # an edit may break any assumption inside a model: then it is not a symmetry
                return math.inf
            worst = max(worst, _difference(outputs, base))
            if not worst <= limit:
                break
        return worst

    def _compare_sdpa(self, folder: Path) -> float:
        """The same comparison under scaled-dot-product attention; 0 where the class has none."""
        if self._sdpa is None:
            try:
                model = self.miniature.load(self._stored, attention="sdpa")
            except (ValueError, ImportError):
                self._sdpa = []
            else:
                self._sdpa = self._run(model)
        if not self._sdpa:
            return 0.0
        try:
            outputs = self._run(self.miniature.load(folder=folder, attention="sdpa"))
        except Exception:  # it ran before the edit
            return math.inf
        return max(_difference(new, old) for new, old in zip(outputs, self._sdpa, strict=True))

    def _compare_cached(self, model: Any) -> float:
        """Greedy decoding with a cache, token by token, on the tokens that the unchanged model chooses."""
        entry = self._sets[0]
        if not _decodes(model, entry):
            return 0.0
        try:
            tokens, old = _decode(self._model, entry, None)
        except Exception:  # no cache that a plain loop can drive: the claim is then made without it
            return 0.0
        self.decoded = True
        try:
            _, new = _decode(model, entry, tokens)
        except Exception:  # it ran before the edit
            return math.inf
        return _difference(new, old)


def _memory(model: Any) -> dict[str, torch.Tensor]:
    """Every saved float tensor of a model once, under its first name."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for path, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            result[path] = tensor
    return result


def _difference(new: list[torch.Tensor], old: list[torch.Tensor]) -> float:
    if len(new) != len(old):
        return math.inf
    worst = 0.0
    for mine, theirs in zip(new, old, strict=True):
        if mine.shape != theirs.shape:
            return math.inf
        norm = float(theirs.norm())
        change = float((mine - theirs).norm())
        if not math.isfinite(change):
            return math.inf
        worst = max(worst, change / norm if norm else change)
    return worst


def _decodes(model: Any, entry: InputSet) -> bool:
    prompt = "decoder_input_ids" if "decoder_input_ids" in entry.arguments else "input_ids"
    return prompt in entry.arguments and bool(model.can_generate())


def _decode(
    model: Any, entry: InputSet, forced: list[torch.Tensor] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tokens and logits of a few greedy steps with a cache; with `forced` the tokens are given."""
    name = "decoder_input_ids" if "decoder_input_ids" in entry.arguments else "input_ids"
    arguments = {**entry.arguments, "use_cache": True}
    arguments[name] = arguments[name][:, :-1]
    arguments.pop("token_type_ids", None)
    tokens: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        for step in range(CACHED_STEPS + 1):
            output = model(**arguments)
            logits.append(output.logits[:, -1].clone())
            tokens.append(output.logits[:, -1].argmax(-1, keepdim=True) if forced is None else forced[step])
            arguments[name] = tokens[-1]
            arguments["past_key_values"] = output.past_key_values
            if name == "decoder_input_ids":
                arguments["encoder_outputs"] = (output.encoder_last_hidden_state,)
    return tokens, logits
