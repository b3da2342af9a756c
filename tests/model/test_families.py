"""A family that nobody has heard of, by one entry: a Llama whose every part is called otherwise.

It computes what a Llama computes, so that a Llama of the same weights says what must come out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import SIZES, export
from safetensors.torch import load_file, save_file
from tiny import SMALL, make_model, read, write_ids
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama import modeling_llama as llama

import mixbits
from mixbits.checkpoint.saving import save
from mixbits.errors import UsageError
from mixbits.export import gguf
from mixbits.formats.recipes import parse_recipe
from mixbits.model import families
from mixbits.model.families import FAMILIES, Family, Gguf, Stacks, name_from_vllm
from mixbits.model.layout import find_linears, meta_model, shared_inputs
from mixbits.model.units import make_units
from mixbits.quantize import main
from mixbits.source.folding import folding_of
from mixbits.source.source import open_source

NAMES = {
    "self_attn": "mixer",
    "mlp": "feed",
    "q_proj": "ask",
    "k_proj": "hear",
    "v_proj": "tell",
    "o_proj": "merge",
    "gate_proj": "valve",
    "up_proj": "lift",
    "down_proj": "drop",
}
ENTRY = Family(
    attention=("ask", "hear", "tell", "merge"),
    ffn_inputs=("valve", "lift"),
    ffn_output="drop",
    stored_names={".mixer.": ".attention."},
    gguf=Gguf("llama", True, names={f".{new}": f".{old}" for old, new in NAMES.items()}),
    vllm_names={".mixer.": ".attn."},
)


def renamed(name: str) -> str:
    """What a Llama's linear, unit or tensor is called in the other family."""
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def rename(module: nn.Module) -> None:
    held = [(NAMES.get(name, name), child) for name, child in module._modules.items()]
    module._modules.clear()
    module._modules.update(held)


def known_as(name: str) -> Any:
    return property(lambda self: getattr(self, NAMES[name]))


class Attention(llama.LlamaAttention):
    """Llama's own code, which finds its linears by these properties."""

    q_proj, k_proj, v_proj, o_proj = map(known_as, ("q_proj", "k_proj", "v_proj", "o_proj"))

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rename(self)


class FeedForward(llama.LlamaMLP):
    gate_proj, up_proj, down_proj = map(known_as, ("gate_proj", "up_proj", "down_proj"))

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rename(self)


class Layer(llama.LlamaDecoderLayer):
    self_attn, mlp = map(known_as, ("self_attn", "mlp"))

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self._modules["self_attn"] = Attention(config, index)
        self._modules["mlp"] = FeedForward(config)
        rename(self)


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = (Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)
        self.post_init()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    AutoConfig.register("odd", OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)
    yield
    del CONFIG_MAPPING._extra_content["odd"]
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[OddConfig]


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setitem(FAMILIES, "odd", ENTRY)
    return ENTRY


def make_odd(folder: Path) -> Path:
    """Turn a saved Llama into one of the other family."""
    state = load_file(folder / "model.safetensors")
    weights = {renamed(name): value for name, value in state.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read(folder / "config.json")
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def both(**overrides: object) -> list[Any]:
    """A Llama and the other, without storage."""
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "vocab_size": 130}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **overrides}
    return [meta_model(kind(**sizes)) for kind in (LlamaConfig, OddConfig)]


def described(model: Any, rename: Any = str) -> list[Any]:
    return [
        (
            rename(info.name),
            [rename(maker) for maker in info.makers],
            info.remembered,
            [rename(leaf) for leaf in info.shared],
            info.ffn_output,
        )
        for info in find_linears(model)
    ]


@pytest.mark.parametrize("known", [False, True], ids=["by use", "by its entry"])
def test_what_linears_are_to_each_other(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tells as much as names do."""
    if known:
        monkeypatch.setitem(FAMILIES, "odd", ENTRY)
    plain, odd = both()
    found = described(odd)
    assert found == described(plain, renamed)
    assert found[0] == ("model.layers.0.mixer.ask", [], False, ["ask", "hear", "tell"], False)
    assert found[6][1:] == (
        ["model.layers.0.feed.valve", "model.layers.0.feed.lift"],
        False,
        [],
        True,
    )
    for options in ({}, {"fuse": True}, {"fuse": True, "by_input": True}):
        units = [
            [(name(unit.name), [name(i.name) for i in unit.linears]) for unit in made]
            for name, made in (
                (renamed, make_units(find_linears(plain), **options)),
                (str, make_units(find_linears(odd), **options)),
            )
        ]
        assert units[0] == units[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_show_in_use(attention: str) -> None:
    """Also of an attention that is written out: two products, and a softmax between them."""
    for model, wanted in zip(both(attn_implementation=attention), KEYS_AND_VALUES, strict=True):
        assert later_of(model) == wanted


def test_keys_and_values_by_an_entry(entry: Family) -> None:
    """For code that cannot be run without storage."""
    odd = both()[1]
    assert later_of(odd, by_use=False) == {"hear", "tell"}
    FAMILIES.pop("odd")
    assert later_of(odd, by_use=False) == set()


KEYS_AND_VALUES = {"k_proj", "v_proj"}, {"hear", "tell"}


def later_of(model: Any, by_use: bool = True) -> set[str]:
    """Names of the linears whose outputs later tokens read."""
    return {i.name.rpartition(".")[2] for i in find_linears(model, by_use=by_use) if i.remembered}


def test_names_do_not_overrule_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Family(attention=("ask", "merge", "tell", "hear"), ffn_inputs=("lift", "drop"))
    monkeypatch.setitem(FAMILIES, "odd", wrong)
    found = {i.name.rpartition(".")[2]: i for i in find_linears(both()[1])}
    assert found["ask"].shared == ("ask", "hear", "tell") and found["merge"].shared == ()
    assert found["drop"].shared == () and found["drop"].ffn_output
    assert [maker.rpartition(".")[2] for maker in found["drop"].makers] == ["valve", "lift"]


def test_experts_of_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from mixbits.model.experts import layout_of

    class OwnNames(MixtralExperts):
        gate_up_proj = property(lambda self: self.first)
        down_proj = property(lambda self: self.second)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            held = self._parameters
            held["first"], held["second"] = held.pop("gate_up_proj"), held.pop("down_proj")

    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=48, num_local_experts=4
    )
    config._experts_implementation = "eager"
    assert layout_of(OwnNames(config)) is None
    monkeypatch.setitem(FAMILIES, "odd", Family(experts=Stacks("first", "none", "second")))
    found = layout_of(OwnNames(config))
    assert found is not None and found.stacks == ("first", "second")
    assert found.projections == ("gate_proj", "up_proj", "down_proj")


def run(folder: Path, *options: str) -> Path:
    """Quantize the model in a folder with slabs that are ordered, and rotated FFNs."""
    dataset, out = str(write_ids(folder.parent / "ids.npy")), folder.parent / f"{folder.name}-out"
    arranged = ["--granularity", "slab", "--rotate", "ffn", "--avg-bits", "6", "--rounding", "rtn"]
    argv = [str(folder), "--dataset", dataset, *SMALL, *arranged, "--out", str(out), *options]
    assert main(argv) == 0
    return out


def units_of(out: Path, rename: Any = str) -> list[Any]:
    return [
        {
            **{key: value for key, value in unit.items() if key not in ("unit", "linears")},
            "unit": rename(unit["unit"]),
            "rotated": [rename(name) for name in unit.get("rotated", [])],
            "linears": [rename(name) for name in unit["linears"]],
        }
        for unit in read(out / "plan.json")["units"]
    ]


def test_the_command(tmp_path: Path, entry: Family) -> None:
    """Slabs that readers of an input share, orders that fold, rotations: as in the Llama, and the
    packed model multiplies those that read one input in one call."""
    plain = run(make_model(tmp_path / "plain"))
    odd = run(make_odd(make_model(tmp_path / "odd")))
    units = units_of(odd)
    assert units == units_of(plain, renamed)
    assert units[0]["linears"] == [f"model.layers.0.mixer.{n}" for n in ("ask", "hear", "tell")]
    rotated = [name for unit in units for name in unit["rotated"]]
    assert rotated == [f"model.layers.{i}.feed.drop" for i in range(2)]
    wanted = {renamed(n): t for n, t in load_file(plain / "model.safetensors").items()}
    found = load_file(odd / "model.safetensors")
    assert "model.layers.0.feed.drop.order" not in found  # it is in the rows of valve and lift
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    ids = torch.arange(20)[None] * 7 % 128
    models = [mixbits.load(folder) for folder in (plain, odd)]
    with torch.no_grad():
        for length in (20, 1):
            logits = [model(ids[:, :length]).logits for model in models]
            assert torch.equal(*logits)
    layer = models[1].model.layers[0]
    groups = [[layer.mixer.ask, layer.mixer.hear, layer.mixer.tell]]
    groups.append([layer.feed.valve, layer.feed.lift])
    for group in groups:
        assert {id(linear.siblings) for linear in group} == {id(group[0].siblings)}
        assert group[0].siblings.linears == group and group[0].siblings.misses_left
    assert layer.mixer.merge.siblings is None and layer.feed.drop.siblings is None


def test_inputs_are_shared_without_an_entry() -> None:
    """A folder is loaded where nobody has heard of the family."""
    for model, names in zip(both(), (str, renamed), strict=True):
        chosen = {i.name for i in find_linears(model) if not i.name.endswith(names("k_proj"))}
        first = [
            [f"model.layers.0.{names(name)}" for name in group]
            for group in (
                ("self_attn.q_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            )
        ]
        assert shared_inputs(model, chosen)[:2] == first


def entries(path: Path) -> dict[str, Tensor]:
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def test_exports(tmp_path: Path, entry: Family) -> None:
    """Names of checkpoints, and of a GGUF, with rows of ask and hear in llama.cpp's order."""
    found = {}
    for kind, change in (("plain", Path), ("odd", make_odd)):
        source = open_source(str(change(make_model(tmp_path / kind, **SIZES))))
        linears = find_linears(source.load())
        folder = tmp_path / f"{kind}-packed"
        folder.mkdir()
        assignment = {info.name: parse_recipe("MXFP4A16") for info in linears}
        modes = {"weight_scale_mode": "floor", "act_scale_mode": "even"}
        save(folder, source, source.load(), linears, assignment, modes)
        found[kind] = entries(export(folder, "gguf") / gguf.FILE)
    assert found["odd"].keys() == found["plain"].keys() and "blk.0.attn_q.weight" in found["odd"]
    assert all(torch.equal(found["odd"][n], found["plain"][n]) for n in found["plain"])
    tensors = load_file(export(folder, "compressed-tensors") / "model.safetensors")
    assert "model.layers.0.attention.ask.weight_packed" in tensors
    assert not any(".mixer." in name for name in tensors)
    FAMILIES.pop("odd")
    with pytest.raises(UsageError, match=r"knows the architectures llama, .*: got odd"):
        gguf._check_model(OddConfig())


def test_names_in_vllm(entry: Family) -> None:
    assert name_from_vllm("model.layers.0.attn.ask") == "model.layers.0.mixer.ask"
    assert name_from_vllm("model.layers.0.attn") == "model.layers.0.mixer"
    assert name_from_vllm("model.layers.0.block_sparse_moe.experts") == "model.layers.0.mlp.experts"
    assert name_from_vllm("model.layers.0.attention.ask") == "model.layers.0.attention.ask"


def test_a_family_of_no_entry_has_the_usual_names() -> None:
    assert families.family_of(OddConfig()) is families.DEFAULT
    assert families.DEFAULT.shared_inputs[0] == ("q_proj", "k_proj", "v_proj")


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text(encoding="utf-8")
    for kind in (Family, Gguf, Stacks):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, field.name


def test_it_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream shows in use; where values are, an entry says."""
    odd = both()[1]
    found = folding_of(odd)
    assert not found.values
    assert "model.layers.1.feed.drop.weight" in found.turns
    monkeypatch.setitem(FAMILIES, "odd", ENTRY)
    assert folding_of(odd).turns.keys() - found.turns.keys() == set()
    assert folding_of(odd).values
