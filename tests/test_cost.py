"""Claims about the cost model: it is PyTorch's count, at every length, of every part."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertConfig

from offramp.backbones import BACKBONES, Batch, Flow, make_backbone
from offramp.engines import cost_model
from offramp.exits import POOLINGS, ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import Full, MaxProbability
from offramp.testing import ARCHITECTURES, tiny_model


def direct_counts(model: MultiExitModel, tokens: int) -> tuple[list[int], list[int], int]:
    """FLOPs of every layer, of every exit and of the stock model, each with its weights."""
    batch = {"input_ids": torch.ones((1, tokens), dtype=torch.long)}
    layers, exits = [], []
    with torch.inference_mode():
        flow = model.backbone.embed(batch)
        for layer in range(1, model.depth + 1):
            layers.append(count(lambda: model.backbone.layer(layer, flow)))  # noqa: B023
            exits.append(count(lambda: model.exit_at(layer)(flow.hidden, None, None)))  # noqa: B023
        return layers, exits, count(lambda: model.stock(**batch))


def count(run: Callable[[], object]) -> int:
    # the fused attention kernels of the CPU are not in PyTorch's list, the plain one is
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_costs_equal_a_direct_count_at_any_length(arch: str, pooling: str) -> None:
    model = tiny_model(arch, spec=ExitSpec(pooling=pooling, hidden=True))
    costs = cost_model(model)
    for tokens in (1, 23, 64):
        layers, exits, stock = direct_counts(model, tokens)
        cumulative = costs.layers([tokens])[0]
        assert np.diff(cumulative).tolist() == layers[1:]
        assert costs.exits([tokens])[0].tolist() == exits
        assert cumulative[-1] + exits[-1] == stock


def test_a_share_pays_for_the_exits_on_the_way() -> None:
    costs = cost_model(tiny_model())
    lengths, exit_layers = [5, 40], np.array([1, 6])
    layers, exits = costs.layers(lengths), costs.exits(lengths)
    executed = layers[0, 0] + exits[0, 0] + layers[1, -1] + exits[1].sum()
    share = costs.share(lengths, exit_layers, MaxProbability())
    assert share == pytest.approx(executed / (layers[:, -1] + exits[:, -1]).sum())
    assert costs.share(lengths, np.array([6, 6]), Full()) == 1


def test_a_bert_base_layer_costs_what_the_textbook_says() -> None:
    with torch.device("meta"):
        stock = AutoModelForSequenceClassification.from_config(BertConfig())
        model = MultiExitModel.from_stock(stock)
    costs = cost_model(model)  # counted, not run: these weights are not there
    # 4 attention projections and two of the feed-forward network; then scores and mixing
    per_token = 2 * (4 * 768 * 768 + 2 * 768 * 3072)
    np.testing.assert_array_equal(costs.layer, [[0, per_token, 2 * 2 * 768]] * 12)


def test_costs_are_shaped_rows_by_layers_and_grow_with_depth_and_length() -> None:
    costs = cost_model(tiny_model(layers=5))
    layers = costs.layers([4, 9, 30])
    assert layers.shape == costs.exits([4, 9, 30]).shape == (3, 5)
    assert (np.diff(layers, axis=1) > 0).all()
    assert (np.diff(layers, axis=0) > 0).all()


def test_counting_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    cost_model(model)
    assert torch.equal(random, torch.get_rng_state())
    assert model.stock.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_backbone_that_looks_at_values_is_counted_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Curious:
        """Refuses to run without values, as a third party's backbone may."""

        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def embed(self, batch: Batch) -> Flow:
            assert int(batch["input_ids"].sum()) >= 0
            return self._inner.embed(batch)  # type: ignore[attr-defined]

    expected = cost_model(tiny_model())
    usual = BACKBONES["bert"]
    monkeypatch.setitem(BACKBONES._items, "bert", lambda stock: Curious(usual(stock)))
    model = tiny_model()
    assert isinstance(model.backbone, Curious)
    np.testing.assert_array_equal(cost_model(model).layer, expected.layer)
    monkeypatch.undo()
    assert not isinstance(make_backbone(model.stock), Curious)
