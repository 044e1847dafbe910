"""Models of several stages: their names, their sizes, and that what one stage has is not taken for another's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import toy
import unmergeable as um
from unmergeable.arithmetic import evaluate_size
from unmergeable.config import structure
from unmergeable.errors import InputError
from unmergeable.prove import stages
from unmergeable.prove.inventory import fold, take_stock
from unmergeable.prove.shrink import STYLES, Style, shrink
from unmergeable.prove.sizes import Sizes
from unmergeable.stock import load_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]

SWIN: dict[str, Any] = {
    "model_type": "swin", "embed_dim": 96, "hidden_size": 768, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24],
    "window_size": 7, "mlp_ratio": 4.0, "image_size": 224, "patch_size": 4, "num_layers": 4,
}  # fmt: skip
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [32, 64, 160, 256], "num_attention_heads": [1, 2, 5, 8], "depths": [2, 2, 2, 2],
    "num_encoder_blocks": 4, "decoder_hidden_size": 256,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Two stages of two blocks, the second twice as wide, and what stands between them."""
    found: dict[str, tuple[int, ...]] = {"body.layers.0.down.weight": (24, 48), "body.norm.weight": (24,)}
    for stage, width in enumerate((12, 24)):
        for block in range(2):
            place = f"body.layers.{stage}.blocks.{block}"
            found[f"{place}.query.weight"] = (width, width)
            found[f"{place}.mlp.0.weight"] = (4 * width, width)
            found[f"{place}.mlp.2.weight"] = (width, 4 * width)
            found[f"{place}.places"] = (4, 4)
    return found


def test_a_stages_number_is_part_of_the_name() -> None:
    assert set(fold(shapes(), shapes())) == {
        "body.layers.{l}.down.weight", "body.norm.weight",
        *(f"body.layers.{stage}.blocks.{{l}}.{leaf}" for stage in (0, 1)
          for leaf in ("query.weight", "mlp.0.weight", "mlp.2.weight", "places")),
    }  # fmt: skip
    stock = {one.name: one for one in take_stock([shapes(), shapes()])}
    assert stock["body.layers.1.blocks.{l}.query.weight"].axes == ((24, 24), (24, 24))


def test_layers_of_one_width_are_no_stages() -> None:
    """Experts, and layers of several kinds, have further numbers as well."""
    experts = {f"layers.{k}.experts.{e}.w.weight": (8, 4) for k in range(2) for e in range(3)}
    kinds = {f"block.{b}.layer.{k}.norm.weight": (4,) for b in range(2) for k in range(2)}
    assert stages.staged(experts, experts) == stages.staged(kinds, kinds) == set()
    assert set(fold(experts, experts)) == {"layers.{l}.experts.{e}.w.weight"}


@pytest.mark.parametrize("shape", [0, 1])
def test_a_small_one_keeps_its_proportions(shape: int) -> None:
    small = shrink(copy.deepcopy(SWIN), shape)
    first, *_, last = small["num_heads"]
    assert [count // first for count in small["num_heads"]] == [1, 2, 4, 8]
    assert small["depths"] == SWIN["depths"]
    assert small["hidden_size"] == 8 * small["embed_dim"]
    assert small["embed_dim"] // first == small["hidden_size"] // last
    # Windows are shifted in all stages but the last, which is one window.
    assert small["image_size"] == small["patch_size"] * small["window_size"] * 8
    other = shrink(copy.deepcopy(SEGFORMER), shape)
    each = [w // n for w, n in zip(other["hidden_sizes"], other["num_attention_heads"], strict=True)]
    assert len(set(each)) == 1
    assert len(set(other["num_attention_heads"])) == 4


def test_two_small_ones_differ_in_every_stage() -> None:
    for config in (SWIN, SEGFORMER):
        one, two = (shrink(copy.deepcopy(config), shape) for shape in (0, 1))
        for name in ("num_heads", "num_attention_heads", "hidden_sizes"):
            assert all(a != b for a, b in zip(one.get(name, ()), two.get(name, ()), strict=True))


def test_sizes_of_a_stage() -> None:
    configs = [shrink(copy.deepcopy(SWIN), shape) for shape in (0, 1)]
    sizes = Sizes(configs)
    scope = "swin.encoder.layers.2.blocks.{l}.attention.self"
    assert sizes.heads(scope) == ["num_heads[2]"]
    assert sizes.heads("swin.encoder") == []
    head = tuple(config["embed_dim"] // config["num_heads"][0] for config in configs)
    text = sizes.find(head, scope, "head")
    assert text is not None
    assert evaluate_size(text, SWIN) == 32
    inner = tuple(int(4 * config["embed_dim"] * config["mlp_ratio"]) for config in configs)
    text = sizes.find(inner, scope, "mlp")
    assert text is not None
    assert evaluate_size(text, SWIN) == 4 * 4 * 96


@pytest.mark.parametrize(
    "text", ["num_heads[4]", "num_heads[-1]", "embed_dim[0]", "num_heads['0']", "depth[0]"]
)
def test_entries_that_are_not_there(text: str) -> None:
    with pytest.raises(InputError):
        evaluate_size(text, SWIN)


def test_what_decides_a_spec() -> None:
    """How many stages there are and how deep they are, and lists that no small model resizes; not how wide."""
    wider = {**SWIN, "embed_dim": 128, "hidden_size": 1024, "num_heads": [4, 8, 16, 32]}
    assert structure(wider) == structure(SWIN)
    for change in (
        {"depths": [2, 2, 18, 2]}, {"num_heads": [3, 6, 12]}, {"num_heads": 3}, {"num_heads": [3, 6, 6, 24]}
    ):  # fmt: skip
        assert structure({**SWIN, **change}) != structure(SWIN)
    mobile = {"hidden_sizes": [144, 192, 240], "num_attention_heads": 4}
    assert structure(mobile) != structure({**mobile, "hidden_sizes": [96, 120, 144]})


# --- from a model on disk ------------------------------------------------------------------------------------


@pytest.fixture
def swin(tmp_path: Path) -> Path:
    """Two stages of one block each, with shifted windows."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=2,
        image_size=16,
        patch_size=2,
        num_labels=3,
    )
    module = transformers.SwinForImageClassification(config)
    with torch.no_grad():
        for one in module.parameters():
            one.add_(torch.randn(one.shape) / 8)
    module.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_each_stage_has_sites_of_its_own(swin: Path, tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    report = um.lock(swin, tmp_path / "locked", key=toy.key(), method="gauge")
    for stage in (0, 1):
        mine = [one for one in report.sites if f"layers.{stage}." in one.site]
        assert {one.kind for one in mine} == {"qk", "vo", "mlp", "heads"}
        assert all(one.acted for one in mine)
    with torch.no_grad():
        before, after = (load_module(path).double()(pixels).logits for path in (swin, tmp_path / "locked"))
    assert float((before - after).norm() / before.norm()) < 1e-5
    # Other heads than the widths allow are not believed.
    config = json.loads((swin / "config.json").read_text())
    (swin / "config.json").write_text(json.dumps({**config, "num_heads": [2, 2]}))
    with pytest.raises(InputError, match="axis 1 is 'g' = 2 by the config, got 4"):
        um.lock(swin, tmp_path / "again", key=toy.key())
    assert not (tmp_path / "again").exists()


# --- an encoder and a decoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("style", STYLES)
def test_a_decoder_as_wide_as_its_encoder(shape: int, style: Style) -> None:
    """Only where they are not as wide as each other there is a projection between them."""
    decoder = {
        "d_model": 768,
        "decoder_attention_heads": 16,
        "encoder_attention_heads": 16,
        "decoder_layers": 4,
    }
    for encoder in (SWIN, {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}):
        both = {"encoder": encoder, "decoder": decoder}
        small = shrink(copy.deepcopy(both), shape, style)
        assert small["decoder"]["d_model"] == small["encoder"]["hidden_size"]
        assert small["decoder"]["d_model"] % small["decoder"]["decoder_attention_heads"] == 0
        other = {**both, "decoder": {**decoder, "d_model": 1024}}
        assert structure(other) != structure(both)
        if style.distinct_towers:
            small = shrink(copy.deepcopy(other), shape, style)
            assert small["decoder"]["d_model"] != small["encoder"]["hidden_size"]


@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("counts", [(8, 8), (8, 4), (4, 8), (12, 6)])
def test_numbers_of_heads_that_differ_stay_apart(shape: int, style: Style, counts: tuple[int, int]) -> None:
    """Else no trial could tell which of them a site of the decoder means."""
    names = ("encoder_attention_heads", "decoder_attention_heads")
    small = shrink({"d_model": 48, **dict(zip(names, counts, strict=True))}, shape, style)
    first, second = (small[name] for name in names)
    assert (first == second) == (counts[0] == counts[1])
    assert small["d_model"] % first == small["d_model"] % second == 0


# --- heads in pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("groups", [1, 8, 32])
def test_heads_in_pairs_where_a_class_splits_them(shape: int, groups: int) -> None:
    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": groups}
    strict = [shrink(dict(config), shape, style) for style in STYLES if not style.any_heads]
    assert strict
    for small in strict:
        heads, kv = small["num_attention_heads"], small["num_key_value_heads"]
        assert heads % kv == 0
        assert (kv == 1) == (groups == 1)
        assert (kv == heads) == (groups == 32)
        if groups > 1:
            assert heads % 4 == kv % 2 == 0
        assert small["hidden_size"] % heads == 0
    others = [shrink(dict(config), 1 - shape, style)["num_attention_heads"] for style in STYLES]
    assert strict[0]["num_attention_heads"] not in others[-1:]


@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("groups", [1, 8])
def test_heads_of_state_spaces_make_up_their_width(shape: int, groups: int) -> None:
    config = {
        "hidden_size": 4096, "num_attention_heads": 32, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_expand": 2,
        "mamba_n_groups": groups,
    }  # fmt: skip
    for style in STYLES:
        small = shrink(dict(config), shape, style)
        assert small["mamba_n_heads"] * small["mamba_d_head"] == 2 * small["hidden_size"]
        assert small["mamba_n_heads"] % groups == 0
        left = shrink({**config, "mamba_d_head": "auto"}, shape, style)
        assert left["mamba_d_head"] == "auto"
        assert 2 * left["hidden_size"] % left["mamba_n_heads"] == 0
