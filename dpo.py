"""Preference learning: log-probabilities, losses, and the module whose forward is the loss.

    loss, metrics = Objective(trunk, head, Loss("dpo", beta=0.1))(batch)      # what DeepSpeed wraps

DPO (arXiv 2305.18290) needs four numbers of a pair: log pi(y_w|x) and log pi(y_l|x) of the policy
and of the reference. Here the rows are packed: the tokens of both answers stand in one row, and
`target_branch` says whose they are (1 = chosen, 2 = rejected, 0 = padding). HA-DPO (arXiv
2311.16839) uses DPO's own loss, the sigmoid, with beta 0.1.

There is no reference model. A frozen trunk gives policy and reference the same hidden states, so
the reference is a copy of the head as it was. Where the trunk itself is trained, the
log-probabilities are asked of the model before its first step (training/reference.py).

Follows eric-mitchell/direct-preference-optimization. Deliberately different: logits exist only at
answer positions, and batches are not concatenated and split again.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE
from model import answer_states

CHOSEN, REJECTED = 1, 2
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy",
           "logps/chosen", "logps/rejected", "logps/reference_chosen", "logps/reference_rejected",
           "nll")


@dataclass
class Loss:
    """Which loss is minimised. `name`: sft, dpo, ipo or hinge."""
    name: str = "dpo"
    beta: float = 0.1
    sft_weight: float = 0.0          # of the chosen answer's mean NLL, beside a preference loss
    label_smoothing: float = 0.0     # the share of labels taken to be wrong (dpo)
    length_normalised: bool = False  # log-probabilities are means over an answer's tokens


def token_logps(logits, target):
    """log p(target) under logits. logits (..., vocab), target (...) → (...) in fp32, nats."""
    logits = logits.float()
    return logits.gather(-1, target[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sequence_logps(logps, target_branch, num_branches=2):
    """Sum of each branch's token log-probabilities: (B, A) and (B, A) → (B, num_branches), nats."""
    branches = torch.arange(1, num_branches + 1, device=logps.device)
    return (logps[:, :, None] * (target_branch[:, :, None] == branches)).sum(1)


def answer_lengths(target_branch, num_branches=2):
    """How many tokens each branch's answer has: (B, A) → (B, num_branches), at least 1."""
    return sequence_logps(torch.ones_like(target_branch), target_branch, num_branches).clamp(min=1)


def preference_loss(policy, reference, loss):
    """Log-probabilities (B, 2) of chosen and rejected, in nats → losses (B,), rewards (B, 2).

    A reward is beta * log(pi / pi_ref), DPO's implicit reward (below its eq. 5) without its
    constant.

        dpo    -log sigmoid(margin)                     DPO, eq. 7; at pi = pi_ref it is ln 2
               with label_smoothing e: a label is wrong with probability e (Mitchell, "A note on DPO
               with noisy preferences & relationship to IPO", 2023, eq. 3: conservative DPO)
        ipo    (margin / beta - 1 / (2 beta))^2         IPO, arXiv 2310.12036, eq. 17 (tau = beta)
        hinge  max(0, 1 - margin)                       SLiC (arXiv 2305.10425) on rewards: RSO's
                                                        hinge-norm, arXiv 2309.06657

    where margin = chosen reward - rejected reward.
    """
    beta, smoothing = loss.beta, loss.label_smoothing
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    if loss.name == "dpo":
        losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    elif loss.name == "ipo":
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    elif loss.name == "hinge":
        losses = F.relu(1 - margin)
    else:
        raise ValueError(f"no such preference loss: {loss.name}")
    return losses, rewards.detach()


def mean_nll(logps, mask):
    """Mean negative log-likelihood of each row's tokens where mask is true: (B, A) → (B,), nats.

    Of the chosen answer it is -log pi(y_w|x) / |y_w|, and is added to a preference loss with a
    weight: Iterative RPO's NLL term, arXiv 2404.19733, eq. 1 (there the weight stands at the other
    term).
    """
    return -(logps * mask).sum(1) / mask.sum(1).clamp(min=1)


class Objective(nn.Module):
    """What the engine wraps: the only place where loss and model meet.

    `trunk` is None where its outputs are kept (training/features.py).
    """

    def __init__(self, trunk, head, loss):
        super().__init__()
        self.trunk, self.head, self.loss = trunk, head, loss
        self.trains_trunk = trunk is not None and any(p.requires_grad for p in trunk.parameters())
        self.needs_reference_logps = loss.name != "sft" and self.trains_trunk
        if loss.name != "sft" and not self.trains_trunk:
            self.reference = frozen_copy(head)

    def answer_states(self, batch):
        """What a head reads at the answer tokens: h (B, A, hidden), what the block looks at,
        mask.
        """
        hidden_states, context = batch.hidden_states, batch.image_features
        if hidden_states is None:
            with torch.set_grad_enabled(self.trains_trunk and torch.is_grad_enabled()):
                hidden_states, image_features = self.trunk(batch)
                context = self.trunk.image_context(self.head.block_config, image_features)
        return answer_states(self.head, hidden_states, context, batch)

    def logps(self, head, states, batch):
        """Log-probability of every answer token, (B, A); 0 at padding."""
        wanted = batch.target != IGNORE
        logps = token_logps(head(*states, wanted), batch.target[wanted])     # (answer tokens,)
        return torch.zeros(wanted.shape, device=logps.device).masked_scatter(wanted, logps)

    def policy_logps(self, batch):
        """Log-probabilities (B, 2) of chosen and rejected under the model as it is now, nats."""
        logps = self.logps(self.head, self.answer_states(batch), batch)
        return sequence_logps(logps, batch.target_branch)

    def forward(self, batch, reference=None, answer_tokens=None):
        """Batch → loss, {name: scalar}.

        reference: log-probabilities (B, 2) where the trunk is trained. answer_tokens: what the SFT
        loss is divided by; default the batch's own number.
        """
        states = self.answer_states(batch)
        logps = self.logps(self.head, states, batch)                                        # (B, A)
        if self.loss.name == "sft":
            number = (batch.target != IGNORE).sum() if answer_tokens is None else answer_tokens
            loss = -logps.sum() / number
            return loss, {"loss": loss.detach()}
        policy = sequence_logps(logps, batch.target_branch)                                 # (B, 2)
        if not self.trains_trunk:
            with torch.no_grad():
                reference_logps = self.logps(self.reference, states, batch)
                reference = sequence_logps(reference_logps, batch.target_branch)            # (B, 2)
        # Means over the tokens: length-normalised DPO, as in Tulu 3 (arXiv 2411.15124).
        tokens = answer_lengths(batch.target_branch) if self.loss.length_normalised else 1
        losses, rewards = preference_loss(policy / tokens, reference / tokens, self.loss)
        nll = mean_nll(logps, batch.target_branch == CHOSEN).mean()
        loss = losses.mean()
        if self.loss.sft_weight:
            loss = loss + self.loss.sft_weight * nll                          # Iterative RPO, eq. 1
        chosen, rejected = rewards.unbind(1)
        values = (loss, chosen, rejected, chosen - rejected, (chosen > rejected).float(),
                  *policy.unbind(1), *reference.unbind(1), nll)
        named = zip(METRICS, values, strict=True)
        return loss, {name: value.detach().mean() for name, value in named}


def frozen_copy(head):
    """The reference of a frozen trunk: the head as it is now, its parts shared where not trained.

    An identity block is left out, because it changes nothing.
    """
    reference = copy.deepcopy(head).requires_grad_(False)
    if not head.lm_head.weight.requires_grad:
        reference.lm_head = head.lm_head
    if head.block_config and head.post_interaction_block.is_identity():
        reference.post_interaction_block = None
    return reference
