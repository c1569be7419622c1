"""What is trained, and against what: groups of tensors, and one module whose forward is the loss.

    trained = set_trained(trunk, head, ("post_decoder", "lm_head"))       # {name: parameter}; everything else is frozen
    loss, metrics = Objective(trunk, head, "dpo", beta=0.1)(batch)        # what DeepSpeed's engine wraps

There is no reference model. A frozen trunk gives policy and reference the same hidden states, so the reference is a copy of
the head as it was; where the trunk itself is trained (LoRA or not), the reference's log-probabilities, two numbers a pair,
are taken from the model itself before its first step, with LoRA's adapters off (loop.py).
"""
import copy
import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import IGNORE
from dpo import CHOSEN, dpo_loss, mean_nll, sequence_logps, token_logps
from model import answer_states

GROUPS = ("clip", "projector", "llama", "post_decoder", "lm_head", "lora")
STAGES = {0: ("projector", "llama", "lm_head"), 1: ("post_decoder",), 2: ("post_decoder", "lm_head")}     # train.py's --stage
TRUNK = {"clip", "projector", "llama", "lora"}          # the groups in front of the head
MONITORED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen",
             "logps/rejected", "logps/reference_chosen", "logps/reference_rejected", "nll")


class Objective(nn.Module):
    """What the engine wraps. `forward(batch)` → loss, {name: scalar}: the only place where loss and model meet.

    `trunk` is None where its outputs are kept (features.py). In eval mode `forward` gives log-probabilities instead,
    (B, 2) of chosen and rejected: the model before its first step is the reference of a trunk that is trained.
    """

    def __init__(self, trunk, head, loss, beta=0.1, sft_weight=0.0, label_smoothing=0.0):
        super().__init__()
        self.trunk, self.head, self.loss, self.beta, self.sft_weight = trunk, head, loss, beta, sft_weight
        self.label_smoothing, self.block = label_smoothing, head.block
        self.trains_trunk = trunk is not None and any(p.requires_grad for p in trunk.parameters())
        self.needs_table = loss != "sft" and self.trains_trunk
        if loss != "sft" and not self.trains_trunk:
            self.reference = reference_of(head)

    def logps(self, head, states, batch):
        """Log-probability of every answer token, (B, A); 0 at padding. Logits exist only for answer tokens."""
        wanted = batch.target != IGNORE
        logps = token_logps(head(*states, wanted), batch.target[wanted])                            # (number of answer tokens,)
        return torch.zeros(wanted.shape, device=logps.device).masked_scatter(wanted, logps)

    def forward(self, batch, answer_tokens=None, reference=None):
        """answer_tokens: how many the SFT loss is divided by; default the batch's own. reference (B, 2): log-probabilities."""
        hidden, context = batch.hidden, batch.features
        if hidden is None:
            with torch.set_grad_enabled(self.trains_trunk and torch.is_grad_enabled()):
                hidden, features = self.trunk(batch)
                context = self.trunk.image_context(self.block, features)
        states = answer_states(self.head, hidden, context, batch)
        logps = self.logps(self.head, states, batch)
        if self.loss == "sft":
            loss = -logps.sum() / ((batch.target != IGNORE).sum() if answer_tokens is None else answer_tokens)
            return loss, {"loss": loss.detach()}
        policy = sequence_logps(logps, batch.target_branch)                                         # (B, 2)
        if not self.training:
            return policy
        if not self.trains_trunk:
            with torch.no_grad():
                reference = sequence_logps(self.logps(self.reference, states, batch), batch.target_branch)
        losses, chosen_rewards, rejected_rewards = dpo_loss(*policy.unbind(1), *reference.unbind(1), self.beta, self.loss,
                                                            self.label_smoothing)
        nll = mean_nll(logps, batch.target_branch == CHOSEN).mean()
        loss = losses.mean() + self.sft_weight * nll if self.sft_weight else losses.mean()          # Iterative RPO, eq. 1
        values = (loss, chosen_rewards, rejected_rewards, chosen_rewards - rejected_rewards,
                  (chosen_rewards > rejected_rewards).float(), *policy.unbind(1), *reference.unbind(1), nll)
        return loss, {name: value.detach().mean() for name, value in zip(MONITORED, values)}


def reference_of(head):
    """A frozen copy of the head as it is now. What is not trained is shared, and an identity block is left out."""
    reference = copy.deepcopy(head).requires_grad_(False)
    if not head.lm_head.weight.requires_grad:
        reference.lm_head = head.lm_head
    if head.block and head.post_interaction_block.is_identity():
        reference.post_interaction_block = None
    return reference


def set_trained(trunk, head, groups):
    """Freeze everything but the named groups. Returns {public name: parameter} of what is trained."""
    modules = {"clip": [trunk.vision_tower], "projector": [trunk.model.mm_projector],
               "llama": [trunk.model.embed_tokens, trunk.model.layers, trunk.model.norm],
               "post_decoder": [head.post_interaction_block] if head.block else [], "lm_head": [head.lm_head]}
    for module in (trunk, head):
        module.requires_grad_(False)
    for group in groups:
        for module in modules.get(group, []):
            module.requires_grad_(True)
    if "lora" in groups:
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(".lora_" in name or parameter.requires_grad)
    return {name: p for module in (trunk, head) for name, p in module.named_parameters() if p.requires_grad}


def checkpoint_layers(model):
    """Gradient checkpointing (arXiv 1604.06174): a decoder layer keeps its input, and is computed again in the backward."""
    for layer in model.layers:
        layer.forward = functools.partial(recomputed, layer.forward)


def recomputed(forward, x, *rest):
    """Reentrant: the first pass builds no graph, which takes half as long where the CPU cannot launch kernels fast enough. It
    asks for a gradient of its input, or its parameters would get none."""
    if not torch.is_grad_enabled():
        return forward(x, *rest)
    return checkpoint(forward, x if x.requires_grad else x.detach().requires_grad_(), *rest, use_reentrant=True)
