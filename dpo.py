"""Sequence log-probabilities and preference losses: pure functions on tensors.

DPO (arXiv 2305.18290) needs four numbers of a pair: log pi(y_w|x), log pi(y_l|x) of the policy and of the reference.
Here the rows are packed: answer tokens of both answers stand in one row, and `target_branch` says whose they are
(1 = chosen, 2 = rejected, 0 = padding). HA-DPO (arXiv 2311.16839) uses DPO's own loss, the sigmoid, with beta 0.1.

Deliberately different from eric-mitchell/direct-preference-optimization: logits exist only at answer positions, and
nothing here knows about models, padding ids or batches that are concatenated and split again.
"""
import torch
import torch.nn.functional as F

CHOSEN, REJECTED = 1, 2


def token_logps(logits, target):
    """log p(target) under logits. logits (..., vocab) in any dtype, target (...) → (...) in fp32, nats."""
    logits = logits.float()
    return logits.gather(-1, target[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sequence_logps(logps, target_branch, num_branches=2):
    """Sum of the token log-probabilities of each branch: logps, target_branch (B, A) → (B, num_branches)."""
    branches = torch.arange(1, num_branches + 1, device=logps.device)
    return (logps[:, :, None] * (target_branch[:, :, None] == branches)).sum(1)


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, loss="dpo", label_smoothing=0.0):
    """All inputs (B,) in nats → losses (B,), chosen rewards (B,), rejected rewards (B,).

    A reward is beta * log(pi / pi_ref), DPO's implicit reward (below its eq. 5) without its constant. `loss` is one of

        dpo    -log sigmoid(margin)                     DPO, eq. 7; at pi = pi_ref it is ln 2 = 0.6931
               with label_smoothing e: a label is wrong with probability e (Mitchell, "A note on DPO with noisy
               preferences & relationship to IPO", 2023, eq. 3: conservative DPO)
        ipo    (margin / beta - 1 / (2 beta))^2         IPO, arXiv 2310.12036, eq. 17 (its tau is beta; sums, not means)
        hinge  max(0, 1 - margin)                       SLiC (arXiv 2305.10425) on rewards: RSO's hinge-norm, arXiv 2309.06657

    where margin = chosen reward - rejected reward.
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    margin = chosen_rewards - rejected_rewards
    if loss == "dpo":
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    elif loss == "ipo":
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        losses = F.relu(1 - margin)
    else:
        raise ValueError(f"no such preference loss: {loss}")
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def mean_nll(logps, mask):
    """Mean negative log-likelihood of each row's tokens where mask is true, nats per token. logps, mask (B, A) → (B,).

    Of the chosen answer, -log pi(y_w|x) / |y_w|, and added to a preference loss with a weight: Iterative RPO's NLL term,
    arXiv 2404.19733, eq. 1 (there the weight stands at the other term).
    """
    return -(logps * mask).sum(1) / mask.sum(1).clamp(min=1)
