"""What is trained, and the loss that trains it: set_trained of model.py, Objective of dpo.py."""
import math

import pytest
import torch
from conftest import largest_difference, preference_rows, shake
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


# ---- Length-normalised ---------------------------------------------------------------------------


def policy_beside_reference(world):
    """An Objective whose policy has moved away from its reference, and a batch of pairs."""
    base, head = base_and_head(world, "full", zero_init=False)
    set_trained(base.trunk, head, STAGES[1])
    objective = Objective(base.trunk, head, Loss("dpo"))
    shake(objective.head.post_interaction_block, seed=1).requires_grad_(True)
    return objective, preference_rows(world, base.trunk)[SOME]


@pytest.mark.parametrize("name, formula", (
    ("dpo", lambda margin, beta: math.log(1 + math.exp(-margin))),
    ("ipo", lambda margin, beta: (margin / beta - 1 / (2 * beta)) ** 2),
    ("hinge", lambda margin, beta: max(0, 1 - margin))))
def test_length_normalised_by_hand(world, name, formula):
    """Means over an answer's tokens, of policy and reference; what is logged of them stays sums."""
    objective, batch = policy_beside_reference(world)
    with torch.no_grad():
        states = objective.answer_states(batch)
        logps = [objective.logps(head, states, batch)
                 for head in (objective.head, objective.reference)]
    expected, sums, lengths = [], [], []
    for row, branch in enumerate(batch.target_branch.tolist()):
        tokens = {c: [n for n, b in enumerate(branch) if b == c] for c in (1, 2)}
        means = [[float(of_head[row, at].mean()) for at in tokens.values()] for of_head in logps]
        (chosen, rejected), (ref_chosen, ref_rejected) = means
        expected.append(0.7 * ((chosen - ref_chosen) - (rejected - ref_rejected)))
        sums.append(float(logps[0][row, tokens[1]].sum()))
        lengths.append([len(at) for at in tokens.values()])
    assert any(a != b for a, b in lengths) and len({a for a, _ in lengths}) > 1
    objective.loss = Loss(name, 0.7, length_normalised=True)
    loss, metrics = objective(batch)
    by_hand = sum(formula(margin, 0.7) for margin in expected) / len(expected)
    assert largest_difference(name, loss, by_hand) < 1e-5
    assert largest_difference("margin", metrics["rewards/margin"], sum(expected) / 7) < 1e-5
    assert largest_difference("logps", metrics["logps/chosen"], sum(sums) / 7) < 1e-4
    objective.loss = Loss(name, 0.7)
    assert (objective(batch)[0] - loss).detach().abs() > 0.01


def test_length_normalised_gradients_are_others(world):
    """A pair of answers of different lengths pulls in another direction, not only less far."""
    objective, batch = policy_beside_reference(world)
    gradients = []
    for normalised in (False, True):
        objective.loss = Loss("dpo", 0.1, length_normalised=normalised)
        trained = objective.head.post_interaction_block.parameters()
        of_loss = torch.autograd.grad(objective(batch)[0], list(trained))
        gradients.append(torch.cat([g.flatten() for g in of_loss]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    print(f"cosine {cosine:.3f}, norms {[float(g.norm()) for g in gradients]}")
    assert 0 < gradients[1].norm() < gradients[0].norm() and cosine < 0.99


@pytest.mark.parametrize("trains_trunk", (False, True))
def test_length_normalised_starts_at_ln_2(world, trains_trunk):
    """Also where the reference's sums come from outside."""
    base, head = base_and_head(world, "full")
    set_trained(base.trunk, head, ("projector",) if trains_trunk else STAGES[1])
    objective = Objective(base.trunk, head, Loss("dpo", 0.5, length_normalised=True))
    batch = preference_rows(world, base.trunk)[SOME]
    reference = objective.policy_logps(batch).detach() if trains_trunk else None
    loss, metrics = objective(batch, reference)
    assert largest_difference("loss against ln 2", loss, math.log(2)) < 1e-6
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0
    if trains_trunk:            # 3 nats less of an answer's sum are 3 / tokens of its mean
        tokens = (batch.target_branch == 1).sum(1)
        _, metrics = objective(batch, reference - torch.tensor([3.0, 0.0]))
        expected = (0.5 * 3 / tokens).mean()
        assert largest_difference("reward", metrics["rewards/chosen"], expected) < 1e-5


# ---- Losses and groups ---------------------------------------------------------------------------


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
