"""dpo.py against numbers worked out by hand."""
import math

import numpy as np
import pytest
import torch
from conftest import largest_difference

from dpo import (
    Loss,
    answer_lengths,
    mean_nll,
    preference_loss,
    sequence_logps,
    token_logps,
)


def test_dpo_loss_by_hand():
    # pair 1: the policy likes the chosen answer more than the reference does, the rejected one less
    #     rewards  0.5 * (-2 - -3) = 0.5   and   0.5 * (-5 - -4) = -0.5
    #     loss     -ln sigmoid(1) = ln(1 + 1/e) = 0.3132617
    # pair 2: the other way round
    #     rewards  0.5 * (-10 - -6) = -2   and   0.5 * (-1 - -3) = 1
    #     loss     -ln sigmoid(-3) = ln(1 + e^3) = 3.0485874
    policy = torch.tensor([[-2., -5.], [-10., -1.]])                    # chosen, rejected
    reference = torch.tensor([[-3., -4.], [-6., -3.]])
    losses, rewards = preference_loss(policy, reference, Loss("dpo", beta=0.5))
    assert rewards.tolist() == [[0.5, -0.5], [-2, 1]]
    assert largest_difference("losses", losses, torch.tensor([0.3132617, 3.0485874])) < 1e-6


def test_ln_2_where_policy_and_reference_agree():
    logps = torch.tensor([[-1.5, -2.5], [-300., -0.1], [0., -70.]])
    losses, rewards = preference_loss(logps, logps, Loss("dpo", beta=0.1))
    assert largest_difference("against ln 2", losses, torch.full((3,), math.log(2))) < 1e-7
    assert not rewards.any()


def test_gradient_and_extremes():
    # dL/d(chosen) = -beta * sigmoid(-margin); at margin 0 that is -0.1 / 2, and the opposite for
    # the rejected answer.
    policy = torch.full((1, 2), -4., requires_grad=True)
    losses, rewards = preference_loss(policy, torch.full((1, 2), -4.), Loss("dpo", beta=0.1))
    losses.sum().backward()
    assert largest_difference("gradients", policy.grad, torch.tensor([[-0.05, 0.05]])) < 1e-8
    assert not rewards.requires_grad
    # A margin of -200: exp(200) is no fp32 number, the loss is 200 all the same.
    policy = torch.tensor([[-2000., 0.]])
    losses, _ = preference_loss(policy, torch.zeros(1, 2), Loss("dpo", beta=0.1))
    assert losses.tolist() == [200]


# Chosen reward - rejected reward, at beta 0.5.
MARGINS = np.array([-9., -1., -1e-3, 0., 0.3, 1., 4., 30.])
FORMULAS = {  # (loss, label_smoothing): the loss of a margin, written out
    ("dpo", 0.0): lambda m, beta: np.log1p(np.exp(-m)),
    ("dpo", 0.2): lambda m, beta: 0.8 * np.log1p(np.exp(-m)) + 0.2 * np.log1p(np.exp(m)),
    ("ipo", 0.0): lambda m, beta: (m / beta - 0.5 / beta) ** 2,
    ("hinge", 0.0): lambda m, beta: np.maximum(0, 1 - m),
}


@pytest.mark.parametrize("name, smoothing", FORMULAS)
def test_losses_against_their_formulas(name, smoothing):
    """Values in fp64, and gradients against differences of the formula. The reference's share of a
    margin counts, too.
    """
    formula, beta = FORMULAS[name, smoothing], 0.5
    chosen = torch.tensor(MARGINS / beta - 7, requires_grad=True)
    rejected = torch.full((8,), -11., dtype=torch.float64)
    policy = torch.stack((chosen, rejected), 1)
    reference = torch.tensor([[-9., -13.]])          # (chosen + 9) - (-11 + 13) = margin / beta
    loss = Loss(name, beta, label_smoothing=smoothing)
    losses, rewards = preference_loss(policy, reference, loss)
    assert largest_difference("margins", rewards[:, 0] - rewards[:, 1], MARGINS) < 1e-12
    assert largest_difference(f"{name} {smoothing}", losses, formula(MARGINS, beta)) < 1e-12
    gradient, = torch.autograd.grad(losses.sum(), chosen)
    slope = (formula(MARGINS + 1e-6, beta) - formula(MARGINS - 1e-6, beta)) / 2e-6 * beta
    smooth = MARGINS != 1 if name == "hinge" else MARGINS == MARGINS     # the hinge has a corner
    assert largest_difference("gradient", gradient[smooth], slope[smooth]) < 1e-6


def test_where_each_loss_is_content():
    """Minimum over the margin: conservative DPO at log((1 - e) / e), IPO at 1 / 2, the hinge from
    1 on, DPO nowhere.
    """
    m = torch.linspace(-20, 20, 400001, dtype=torch.float64)
    policy = torch.stack((m / 0.1, torch.zeros_like(m)), 1)

    def best(name, smoothing=0.0):
        loss = Loss(name, 0.1, label_smoothing=smoothing)
        return m[preference_loss(policy, torch.zeros(1, 2), loss)[0].argmin()]

    assert largest_difference("cDPO", best("dpo", 0.1), math.log(9)) < 1e-4
    assert largest_difference("IPO", best("ipo"), 0.5) < 1e-4
    assert largest_difference("hinge", best("hinge"), 1) < 1e-4
    assert best("dpo") == 20
    with pytest.raises(ValueError):
        preference_loss(torch.zeros(1, 2), torch.zeros(1, 2), Loss("none such"))


def test_token_logps_by_hand():
    # Unnormalised probabilities 1, 2, 3 are 1/6, 1/3, 1/2 of the whole.
    logits = torch.tensor([[[1., 2., 3.]] * 3]).log()
    logps = token_logps(logits, torch.tensor([[0, 1, 2]]))
    expected = torch.tensor([[1 / 6, 1 / 3, 1 / 2]]).log()
    assert largest_difference("log-probs", logps, expected) < 1e-6


def test_token_logps_of_bf16_logits_are_fp32():
    # 32,000 equal logits: -ln 32000 = -10.3735, which bf16 would round to -10.375; and no rounding
    # elsewhere either.
    flat = token_logps(torch.zeros(1, 32000, dtype=torch.bfloat16), torch.tensor([17]))
    assert flat.dtype == torch.float32
    assert largest_difference("flat", flat, [-math.log(32000)]) < 1e-5
    torch.manual_seed(0)
    logits, target = (4 * torch.randn(5, 7, 1000)).bfloat16(), torch.randint(1000, (5, 7))
    expected = torch.log_softmax(logits.double(), -1).gather(-1, target[..., None])[..., 0]
    assert largest_difference("bf16 logits", token_logps(logits, target), expected) < 1e-5


def test_sequence_logps_with_padding():
    # Branch 0 is padding, whatever stands there; a branch without tokens sums to 0; order within a
    # row does not matter.
    logps = torch.tensor([[-1., -2., -4., -8.], [-16., -32., 99., 99.]])
    branch = torch.tensor([[1, 2, 1, 2], [2, 2, 0, 0]])
    assert sequence_logps(logps, branch).tolist() == [[-5, -10], [0, -48]]
    assert sequence_logps(logps, branch, num_branches=3).tolist() == [[-5, -10, 0], [0, -48, 0]]


def test_answer_lengths_by_hand():
    # Padding is of no answer; an answer without tokens counts as one, to be divided by.
    branch = torch.tensor([[1, 2, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert answer_lengths(branch).tolist() == [[3, 1], [1, 2], [1, 1]]
    assert answer_lengths(branch, num_branches=3).tolist() == [[3, 1, 1], [1, 2, 1], [1, 1, 1]]


def test_mean_nll_by_hand():
    # Per row, so that it does not depend on how pairs are batched.
    logps = torch.tensor([[-1., -2.], [-6., 50.]])
    mask = torch.tensor([[True, True], [True, False]])
    assert mean_nll(logps, mask).tolist() == [1.5, 6]
    assert mean_nll(logps, mask & False).tolist() == [0, 0]
