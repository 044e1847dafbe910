"""`lock_module`: a torch module locked in memory, in place, and undone."""

from __future__ import annotations

import numpy as np
import pytest

import toy
from unmergeable.errors import InputError, UsageError

torch = pytest.importorskip("torch")

from unmergeable.module import lock_module  # noqa: E402


class Config:
    def to_dict(self):
        return {**toy.CONFIG, "architectures": None}


class Toy(torch.nn.Module):
    """The toy's tensors under its names, and one that is tied to the embedding."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.config = Config()
        self.embed = torch.nn.Parameter(torch.tensor(toy.tensors()["embed"], dtype=dtype))
        self.values = {}
        for name, value in toy.tensors().items():
            if name != "embed":
                self.values[name] = torch.tensor(value, dtype=dtype)
        self.head = self.embed

    def state_dict(self, *args, **kwargs):
        return {"embed": self.embed.detach(), **self.values, "head": self.head.detach()}


def forward(model):
    return toy.forward({name: value.double().numpy() for name, value in model.state_dict().items()})


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_in_place_and_back(dtype):
    model = Toy(dtype)
    before, want = copies(model), forward(model)
    handle = lock_module(model, key=toy.key(), spec=toy.spec())
    moved = copies(model)
    assert not torch.equal(before["l.0.x.1.up"], moved["l.0.x.1.up"])
    assert torch.equal(before["embed"], moved["embed"])
    assert np.abs(forward(model) - want).max() <= 1e-12 * np.abs(want).max()
    assert handle.locked
    handle.unlock()
    assert all(torch.equal(value, before[name]) for name, value in copies(model).items())
    with pytest.raises(UsageError):
        handle.unlock()


def test_gauge_and_training():
    model = Toy(torch.float64)
    before, want = copies(model), forward(model)
    handle = lock_module(model, key=toy.key(), spec=toy.spec(), method="gauge")
    assert np.abs(forward(model) - want).max() <= 1e-11 * np.abs(want).max()
    with torch.no_grad():
        model.values["l.0.o.weight"] += 0.01
    want = forward(model)
    handle.unlock()
    assert np.abs(forward(model) - want).max() <= 1e-11 * np.abs(want).max()
    assert torch.allclose(copies(model)["l.1.o.weight"], before["l.1.o.weight"])


def test_it_is_the_lock_of_its_checkpoint(tmp_path):
    from unmergeable.lock import lock

    model = Toy(torch.bfloat16)
    src = toy.write(tmp_path / "src", toy.tensors())
    lock(src, tmp_path / "dst", key=toy.key(), spec=toy.spec(), salt=bytes(32))
    lock_module(model, key=toy.key(), spec=toy.spec(), salt=bytes(32))
    for name, value in toy.load(tmp_path / "dst").items():
        assert np.array_equal(value, model.state_dict()[name].double().numpy())


def test_refusals_leave_the_module_as_it_was():
    model = Toy()
    with torch.no_grad():
        model.values["l.1.down"][0, 0, 0] = float("nan")
    before = copies(model)
    with pytest.raises(InputError, match=r"l\.1\.down"):
        lock_module(model, key=toy.key(), spec=toy.spec(), method="gauge")
    for name, value in copies(model).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    model.values["l.0.router"] = model.values["l.0.router"][:2]
    with pytest.raises(InputError):
        lock_module(model, key=toy.key(), spec=toy.spec())
    with pytest.raises(UsageError):
        lock_module(model, key=toy.key(), spec=toy.spec(), method="gauge", scales=True)
    model.config = None
    with pytest.raises(InputError, match="config"):
        lock_module(model, key=toy.key(), spec=toy.spec())
