"""Bottleneck adapters: where they go, how many parameters they have, and that nothing else of the model changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lora.errors import LorafuseError
from lora.modules.bottlenecks import KINDS, Bottleneck, Kind, insert, width_for

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=2)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TINY)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=96)
    ),
}
each_model = pytest.mark.parametrize("model", MODELS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(14).reshape(2, 7))[0]


@each_model
@each_kind
def test_a_fresh_one_changes_no_name_and_no_answer(model: str, kind: Kind):
    changed = MODELS[model]().eval()
    before, names = answer(changed), set(changed.state_dict())
    new = insert(changed, kind, 4)
    assert torch.equal(answer(changed), before)
    assert set(changed.state_dict()) == names | set(new)
    assert not names & set(new)


@each_model
@each_kind
def test_every_block_has_two_of_houlsbys_and_one_of_lins(model: str, kind: Kind):
    changed = MODELS[model]()
    insert(changed, kind, 4)
    places = [name for name, module in changed.named_modules() if isinstance(module, Bottleneck)]
    assert len(places) == (4 if kind == "adapter-h" else 2)
    assert len({name.split("attention" if "attention" in name else "att")[0] for name in places if "att" in name}) == (
        2 if kind == "adapter-h" else 0
    )


@each_model
@each_kind
def test_every_one_of_them_changes_the_answer_once_it_is_trained(model: str, kind: Kind):
    changed = MODELS[model]().eval()
    before = answer(changed)
    insert(changed, kind, 4)
    for module in changed.modules():
        if isinstance(module, Bottleneck):
            nn.init.normal_(module.up.weight, std=0.5)
            assert not torch.equal(answer(changed), before)
            nn.init.zeros_(module.up.weight)


@each_kind
def test_the_formula_is_the_papers(kind: Kind):
    torch.manual_seed(0)
    layer = Bottleneck(6, 3, kind)
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    values = torch.randn(2, 5, 6)
    normed = (
        (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        if kind == "adapter-l"
        else values
    )
    inner = normed @ layer.down.weight.T + layer.down.bias
    inner = inner.clamp(min=0) if kind == "adapter-l" else inner * (1 + torch.erf(inner / 2**0.5)) / 2
    torch.testing.assert_close(layer(values), values + inner @ layer.up.weight.T + layer.up.bias)


@each_model
@each_kind
@pytest.mark.parametrize("parameters", [1, 700, 5_000])
def test_the_width_is_the_one_that_comes_nearest(model: str, kind: Kind, parameters: int):
    def size(width: int) -> int:
        changed = MODELS[model]()
        return sum(changed.get_parameter(name).numel() for name in insert(changed, kind, width))

    width = width_for(MODELS[model](), kind, parameters)
    others = [abs(size(other) - parameters) for other in (width - 1, width + 1) if other > 0]
    assert abs(size(width) - parameters) <= min(others)


@each_kind
def test_gpt2_medium_has_the_papers_11_million(kind: Kind):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        names = insert(model, kind, width_for(model, kind, 11_000_000))
    assert sum(model.get_parameter(name).numel() for name in names) == pytest.approx(11e6, rel=0.005)


@each_kind
def test_a_model_without_known_projections_is_refused(kind: Kind):
    with pytest.raises(
        LorafuseError,
        match=(
            rf"\ASequential: has no projection that {kind} could follow; expected modules named [^\n]*; leave {kind}"
            r" out\Z"
        ),
    ):
        insert(nn.Sequential(nn.Linear(2, 2)), kind, 4)


def test_a_model_in_half_precision_gets_bottlenecks_of_its_dtype():
    model = MODELS["gpt2"]().to(torch.bfloat16)
    assert {model.get_parameter(name).dtype for name in insert(model, "adapter-l", 4)} == {torch.bfloat16}
