"""What is trained, and the loss that trains it: set_trained of model.py, Objective of dpo.py."""
import math

import pytest
import torch
from conftest import largest_difference, preference_rows
from short_runs import SOME, base_and_head, conversation_rows

from dpo import Loss, Objective
from model import STAGES, set_trained
from post_decoder import VARIANTS

PREFIXES = {"clip": "vision_tower.", "projector": "model.mm_projector.",
            "llama": ("model.embed", "model.layers", "model.norm"),
            "post_decoder": "post_interaction_block.", "lm_head": "lm_head."}
OF_STAGE = {0: ("model.", "lm_head."), 1: "post_interaction_block.",
            2: ("post_interaction_block.", "lm_head.")}


def named_parameters(base, head):
    return dict(base.trunk.named_parameters()) | dict(head.named_parameters())


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("stage", (1, 2))
def test_first_loss_is_ln_2(world, variant, stage):
    torch.manual_seed(0)
    base, head = base_and_head(world, variant)
    set_trained(base.trunk, head, STAGES[stage])
    objective = Objective(base.trunk, head, Loss("dpo", beta=0.1, sft_weight=0.0))
    loss, metrics = objective(preference_rows(world, base.trunk)[SOME])
    assert largest_difference("loss against ln 2", loss, math.log(2)) < 1e-6
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0
    assert metrics["logps/chosen"] != metrics["logps/rejected"]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_the_stages_tensors_and_no_other(world, stage):
    """The block is no longer the identity (there, most gradients are exactly 0): all must learn."""
    torch.manual_seed(0)
    base, head = base_and_head(world, "full" if stage else None, zero_init=False)
    named = named_parameters(base, head)
    expected = {name for name in named if name.startswith(OF_STAGE[stage])}
    for module in (base.trunk, head):                    # whatever another stage has left behind
        module.requires_grad_(True)
    trained = set_trained(base.trunk, head, STAGES[stage])
    assert set(trained) == expected
    assert all(trained[name] is named[name] for name in expected)
    rows = preference_rows(world, base.trunk) if stage else conversation_rows(world, base)
    loss = Loss("dpo" if stage else "sft", beta=0.1, sft_weight=0.0)
    objective = Objective(base.trunk, head, loss)
    objective(rows[SOME[:-1]])[0].backward()
    assert not any(p.requires_grad for name, p in objective.named_parameters()
                   if name.startswith("reference."))
    assert {name for name, p in named.items() if p.grad is not None} == expected
    assert [name for name in expected if not named[name].grad.any()] == []


def test_sft_weight_adds_the_chosen_answers_nll(world):
    base, head = base_and_head(world, "full", zero_init=False)
    rows = preference_rows(world, base.trunk)
    batch = rows[SOME]
    unweighted = Objective(base.trunk, head, Loss("dpo", 0.1, 0.0))
    plain, _ = unweighted(batch)
    weighted, _ = Objective(base.trunk, head, Loss("dpo", 0.1, 0.5))(batch)
    alone = [unweighted(rows[[i]])[1]["logps/chosen"] for i in SOME]
    tokens = (batch.target_branch == 1).sum(1)
    nll = -(torch.stack(alone) / tokens).mean()                # mean per token, then over the pairs
    assert largest_difference("weighted loss", weighted, plain + 0.5 * nll) < 1e-5


@pytest.mark.parametrize("groups", (("clip",), ("projector",), ("llama",), ("post_decoder",),
                                    ("lm_head",), ("clip", "projector", "post_decoder")))
@pytest.mark.parametrize("loss", ("sft", "dpo"))
def test_every_group_can_be_trained_by_every_loss(world, groups, loss):
    base, head = base_and_head(world, "full", zero_init=False)
    if loss == "sft":
        rows = conversation_rows(world, base)
    else:
        rows = preference_rows(world, base.trunk)
    trained = set_trained(base.trunk, head, groups)
    named = named_parameters(base, head)
    assert set(trained) == {n for n in named if any(n.startswith(PREFIXES[g]) for g in groups)}
    objective = Objective(base.trunk, head, Loss(loss))
    reference = torch.full((len(SOME) - 1, 2), -20.0)
    value, _ = objective(rows[SOME[:-1]], reference=reference)
    value.backward()
    moved = [n for n, p in named.items() if p.grad is not None and p.grad.any()]
    assert moved == [n for n in named if n in trained]


def test_sft_loss_is_the_mean_over_the_answer_tokens_given(world):
    base, head = base_and_head(world, None)
    rows = conversation_rows(world, base)
    objective, batch = Objective(base.trunk, head, Loss("sft")), rows[SOME[:-1]]
    hidden_states, _ = base.trunk(batch)
    at_answers = hidden_states[torch.arange(len(hidden_states))[:, None], batch.source]
    logits = head.lm_head(at_answers).transpose(1, 2)                            # (B, vocab, A)
    nll = torch.nn.functional.cross_entropy(logits, batch.target, ignore_index=-100,
                                            reduction="none")
    tokens = (batch.target != -100).sum()
    assert largest_difference("mean", objective(batch)[0], nll.sum() / tokens) < 1e-5
    parts = [objective(rows[part], answer_tokens=tokens)[0] for part in (SOME[:3], SOME[3:-1])]
    assert largest_difference("sum of two parts", sum(parts), objective(batch)[0]) < 1e-5
