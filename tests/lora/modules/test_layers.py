"""LoRA layers against PEFT's and loralib's: outputs, gradients and merged weights on the same factors; adapters that go
both ways.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora.errors import AdapterError
from lora.formats.peft import read_peft
from lora.formats.read import ReadOptions
from lora.merging.checkpoint import Storing
from lora.merging.merge import apply
from lora.merging.several import Blending
from lora.merging.to_folder import Sources, merge_folder
from lora.modules.layers import Injection, adapted, inject, merge, unmerge
from lora.modules.peft_files import load, save

CLOSE = {"rtol": 0, "atol": 1e-6}
RANK, ALPHA = 3, 7.0


class Model(nn.Module):
    """One layer of each kind, under the names that targets use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 12)
        self.query = nn.Linear(12, 8)
        self.fused = Conv1D(6, 8)
        self.square = Conv1D(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.square(torch.tanh(self.fused(torch.tanh(self.query(self.words(ids))))))))


IDS = torch.tensor([[1, 4, 10], [0, 4, 4]])
KINDS = [("query",), ("fused",), ("square",), ("words",), ("query", "square", "words")]
each_kind = pytest.mark.parametrize("targets", KINDS, ids=" ".join)


def in_peft(targets: tuple[str, ...], **options: Any) -> Any:
    """The same model in PEFT, with factors at random."""
    conv = set(targets) <= {"fused", "square"}
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), fan_in_fan_out=conv, init_lora_weights=False, **options
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.3  # weights stay below 1 or so, where 1e-6 is a few roundings
    return model


def pair(targets: tuple[str, ...]) -> tuple[Any, Model]:
    """A model in PEFT and one of ours with its factors."""
    theirs, ours = in_peft(targets), Model()
    for path, factors in inject(ours, Injection(targets, RANK, ALPHA)).items():
        layer = theirs.base_model.model.get_submodule(path)
        embedding = path == "words"
        factors.A.data, factors.B.data = (factor.detach().clone() for factor in factors_of(layer, embedding))
    return theirs, ours


def factors_of(layer: Any, embedding: bool) -> tuple[nn.Parameter, nn.Parameter]:
    """PEFT's A and B of a layer."""
    if embedding:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@each_kind
def test_outputs_and_gradients_are_pefts(targets: tuple[str, ...]):
    theirs, ours = pair(targets)
    np.testing.assert_allclose(ours(IDS).detach(), theirs(IDS).detach(), **CLOSE)
    for model in (theirs, ours):
        model(IDS).square().sum().backward()
    for path, _, factors in adapted(ours):
        for ours_, theirs_ in zip(
            (factors.A, factors.B),
            factors_of(theirs.base_model.model.get_submodule(path), path == "words"),
            strict=True,
        ):
            np.testing.assert_allclose(ours_.grad, theirs_.grad, rtol=1e-6, atol=1e-6)


@each_kind
def test_merged_weights_are_pefts_and_give_the_same_answers(targets: tuple[str, ...]):
    theirs, ours = pair(targets)
    before = ours(IDS).detach()
    merge(ours)
    np.testing.assert_allclose(ours(IDS).detach(), before, **CLOSE)
    merged = theirs.merge_and_unload()
    for path, layer, _ in adapted(ours):
        np.testing.assert_allclose(layer.weight.detach(), merged.get_submodule(path).weight.detach(), **CLOSE)


def test_a_fresh_one_changes_no_answer_and_trains_nothing_else():
    model = Model()
    before, names = model(IDS).detach(), {name for name, _ in model.named_parameters()}
    inject(model, Injection(("query", "square", "words"), RANK, ALPHA, heads=("head",)))
    torch.testing.assert_close(model(IDS).detach(), before, rtol=0, atol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"{layer}.lora.{factor}" for layer in ("query", "square", "words") for factor in "AB"}
    assert trained == factors | {"head.weight", "head.bias"}
    assert {name for name, _ in model.named_parameters()} == names | factors


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, True, False), (True, False)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_parts_of_a_fused_projection_are_loralibs(enabled: tuple[bool, ...], kind: str):
    torch.manual_seed(0)
    theirs = loralib.MergedLinear(8, 12, r=RANK, lora_alpha=ALPHA, enable_lora=list(enabled), merge_weights=False)
    layer = nn.Linear(8, 12) if kind == "linear" else Conv1D(12, 8)
    layer.weight.data = theirs.weight.data.clone() if kind == "linear" else theirs.weight.data.T.contiguous()
    layer.bias.data = theirs.bias.data.clone()
    model = nn.Sequential(layer)
    (factors,) = inject(model, Injection(("0",), RANK, ALPHA, parts=enabled)).values()
    factors.A.data = theirs.lora_A.data.clone().normal_(std=0.2)
    theirs.lora_A.data = factors.A.data.clone()
    factors.B.data = theirs.lora_B.data.clone().normal_(std=0.2)
    theirs.lora_B.data = factors.B.data.clone()
    x = torch.randn(5, 8)
    np.testing.assert_allclose(model(x).detach(), theirs(x).detach(), **CLOSE)
    for each in (model, theirs):
        each(x).square().sum().backward()
    np.testing.assert_allclose(factors.A.grad, theirs.lora_A.grad, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(factors.B.grad, theirs.lora_B.grad, rtol=1e-6, atol=1e-5)
    before = model(x).detach()
    merge(model)
    np.testing.assert_allclose(model(x).detach(), before, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unmerging_restores_every_byte_after_a_thousand_cycles(dtype: torch.dtype):
    model = Model().to(dtype)
    before = copy.deepcopy(model.state_dict())
    for factors in inject(model, Injection(("query", "square", "words"), RANK, ALPHA)).values():
        nn.init.normal_(factors.A)
        nn.init.normal_(factors.B)
    for _ in range(1000):
        merge(model)
        unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), values.view(torch.uint8)) for name, values in before.items())
    merge(model)
    assert not torch.equal(model.query.weight, before["query.weight"])
    merge(model)  # twice is once
    unmerge(model)
    assert torch.equal(model.query.weight, before["query.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_merged_weight_is_the_one_that_a_merge_of_the_file_gives(tmp_path: Path, dtype: torch.dtype):
    """W + ΔW in float32, rounded once: the same bits."""
    model = Model().to(dtype)
    injection = Injection(("query", "fused"), RANK, ALPHA)
    for factors in inject(model, injection).values():
        nn.init.normal_(factors.B)
    save(model, injection, tmp_path / "adapter")
    weights = {path: layer.weight.data.float().numpy().copy() for path, layer, _ in adapted(model)}
    merge(model)
    for change in read_peft(tmp_path / "adapter").changes:
        layer = model.get_submodule(change.module)
        change = replace(change, layout="linear" if change.module == "query" else "transposed")  # as their shapes say
        exact = torch.from_numpy(apply([change], weights[change.module])).to(dtype)
        assert torch.equal(layer.weight.data, exact)


@each_kind
def test_an_adapter_of_ours_is_pefts_and_the_other_way_round(tmp_path: Path, targets: tuple[str, ...]):
    theirs, ours = pair(targets)
    injection = Injection(targets, RANK, ALPHA)
    save(ours, injection, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours")
    np.testing.assert_allclose(again(IDS).detach(), ours(IDS).detach(), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = Model()
    load(loaded, tmp_path / "theirs")
    np.testing.assert_allclose(loaded(IDS).detach(), theirs(IDS).detach(), **CLOSE)


def test_heads_and_fused_parts_go_both_ways(tmp_path: Path):
    model = Model()
    injection = Injection(("fused",), RANK, ALPHA, parts=(True, False, True), heads=("head",))
    (factors,) = inject(model, injection).values()
    nn.init.normal_(factors.B)
    nn.init.normal_(model.head.weight)
    save(model, injection, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours")
    np.testing.assert_allclose(again(IDS).detach(), model(IDS).detach(), **CLOSE)
    loaded = Model()
    load(loaded, tmp_path / "ours")
    np.testing.assert_allclose(loaded(IDS).detach(), model(IDS).detach(), **CLOSE)


def test_a_real_architecture_answers_as_pefts(tmp_path: Path):
    """GPT-2, whose fused projection the paper adapts in its queries and values."""
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=50, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    plain = copy.deepcopy(model)
    injection = Injection(("c_attn",), 4, 8, parts=(True, False, True))
    for factors in inject(model, injection).values():
        nn.init.normal_(factors.B, std=0.1)
    save(model, injection, tmp_path / "adapter", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = torch.arange(12).reshape(2, 6)
    np.testing.assert_allclose(model(ids).logits.detach(), theirs(ids).logits.detach(), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("injection", "said"),
    [
        (
            Injection(("nope",), 4, 8),
            r"target 'nope': Model has no such module; its layers are called fused, head, query, square, words",
        ),
        (Injection("w.", 4, 8), r"target 'w\.': Model has no such module"),
        (Injection("(query", 4, 8), r"target '\(query': not a regular expression \("),
        (Injection(("query",), 0, 8), "rank 0: expected at least 1"),
        (Injection(("query",), 4, 8, heads=("nope",)), "head 'nope': Model has no such module"),
        (
            Injection(("fused",), 4, 8, parts=(True, False, True, True)),
            "'fused' has 6 outputs, which are not 4 parts with one chosen",
        ),
        (
            Injection(("fused",), 4, 8, parts=(False, False)),
            "'fused' has 6 outputs, which are not 2 parts with one chosen",
        ),
    ],
)
def test_what_cannot_be_injected_is_refused_by_name_and_leaves_the_model_as_it_was(injection: Injection, said: str):
    model = Model()
    with pytest.raises(AdapterError, match=said):
        inject(model, injection)
    assert list(adapted(model)) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(AdapterError, match="'0' is a Conv2d; LoRA here is for Linear, Conv1D and Embedding layers"):
        inject(nn.Sequential(nn.Conv2d(1, 1, 1)), Injection(("0",), 4, 8))


TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
TOKENS = torch.arange(10)[None]


def with_random_factors(model: Any, injection: Injection) -> Any:
    torch.manual_seed(1)
    for factors in inject(model, injection).values():
        nn.init.normal_(factors.A, std=0.1)
        nn.init.normal_(factors.B, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("targets", [("embed_tokens", "lm_head"), ("lm_head",), ("embed_tokens",)], ids=" ".join)
def test_tied_embeddings_are_merged_each_by_itself_and_restored(targets: tuple[str, ...]):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=True))
    tied = model.lm_head.weight
    before = tied.detach().clone()
    with_random_factors(model, Injection(targets, RANK, ALPHA))
    apart = logits(model)
    for _ in range(2):
        merge(model)
        np.testing.assert_allclose(logits(model), apart, rtol=0, atol=1e-5)
        unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied
    assert torch.equal(tied, before)
    torch.testing.assert_close(logits(model), apart, rtol=0, atol=0)


def test_a_scaled_embedding_scales_the_update_too(tmp_path: Path):
    config = transformers.Gemma3TextConfig(**TINY, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    model = transformers.Gemma3ForCausalLM(config)
    plain, injection = copy.deepcopy(model), Injection(("embed_tokens",), RANK, ALPHA)
    with_random_factors(model, injection)
    save(model, injection, tmp_path / "adapter", "CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    apart = logits(model)
    np.testing.assert_allclose(apart, logits(theirs), rtol=0, atol=1e-5)
    merge(model)
    np.testing.assert_allclose(logits(model), apart, rtol=0, atol=1e-5)


def test_a_file_says_how_square_layers_are_stored(tmp_path: Path):
    """Of GPT-2, a square Conv1D, and a Linear that is not: a merge of the file has to read the first as (in, out)."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=32, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    injection = Injection(("attn.c_proj", "lm_head"), RANK, ALPHA)
    save(with_random_factors(model, injection), injection, tmp_path / "adapter", "CAUSAL_LM")
    merge_folder(
        Sources(tmp_path / "base", ((tmp_path / "adapter", 1.0),), ReadOptions()),
        tmp_path / "merged",
        Storing(),
        Blending(),
    )
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    np.testing.assert_allclose(logits(merged), logits(model), rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_square_layers_of_both_kinds_in_one_file_are_refused(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4))
    injection = Injection(("0", "1"), RANK, ALPHA)
    inject(model, injection)
    with pytest.raises(
        AdapterError,
        match=(
            r"adapter: has square layers stored \(out, in\) and others stored \(in, out\), which PEFT's file can't tell"
            r" apart"
        ),
    ):
        save(model, injection, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_was_loaded_can_be_trained_on_and_saved(tmp_path: Path):
    model, injection = Model(), Injection(("query",), RANK, ALPHA, heads=("head",))
    inject(model, injection)
    save(model, injection, tmp_path / "first")
    again = Model()
    load(again, tmp_path / "first")
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == {
        "query.lora.A",
        "query.lora.B",
        "head.weight",
        "head.bias",
    }
    save(again, injection, tmp_path / "second")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    with pytest.raises(
        AdapterError, match="first: 'query' of the model has LoRA already; load it into a model that has none"
    ):
        load(again, tmp_path / "first")
    with pytest.raises(AdapterError, match="'query' has LoRA already; take a model that has none"):
        inject(again, injection)


def test_a_head_that_is_trained_whole_gets_no_factors(tmp_path: Path):
    model, injection = Model(), Injection(("query", "head"), RANK, ALPHA, heads=("head",))
    assert list(inject(model, injection)) == ["query"]
    nn.init.normal_(model.head.weight)
    save(model, injection, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "adapter")
    np.testing.assert_allclose(theirs(IDS).detach(), model(IDS).detach(), **CLOSE)
    with pytest.raises(
        AdapterError, match="all that the targets name is trained whole, as part of head; choose other targets"
    ):
        inject(Model(), Injection(("head",), RANK, ALPHA, heads=("head",)))


def test_a_layer_whose_forward_is_never_called_is_refused():
    """torch's attention multiplies by its output projection's weight itself."""
    with pytest.raises(
        AdapterError,
        match="'out_proj' is a NonDynamicallyQuantizableLinear; LoRA here is for Linear, Conv1D and Embedding layers",
    ):
        inject(nn.MultiheadAttention(8, 2), Injection(("out_proj",), RANK, ALPHA))


def test_a_folder_that_exists_is_left_alone(tmp_path: Path):
    model = Model()
    inject(model, Injection(("query",), 4, 8))
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="there: exists already; choose another folder, or remove it"):
        save(model, Injection(("query",), 4, 8), tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="adapter: can't be written"):
        save(model, Injection(("query",), 4, 8), tmp_path / "file" / "adapter")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"use_dora": True},
            "changes the model by more than low-rank products and whole modules; merge it with 'lorafuse merge'",
        ),
        ({"lora_bias": True}, "changes the model by more than low-rank products"),
    ],
)
def test_an_adapter_that_has_no_layer_here_is_refused(tmp_path: Path, options: dict[str, Any], said: str):
    in_peft(("query",), **options).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=said):
        load(Model(), tmp_path / "theirs")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    in_peft(("query",)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="theirs: the model has no 'query'; the adapter was trained on another"):
        load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "theirs")
    wider = Model()
    wider.query = nn.Linear(12, 9)
    with pytest.raises(
        AdapterError, match=r"theirs: B of 'query' has shape \(8, 3\), expected \(9, 3\); load another base"
    ):
        load(wider, tmp_path / "theirs")
