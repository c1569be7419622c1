"""LoRA: what it computes, what it trains, how it is saved; and gradient checkpointing, which its
memory asks for.

The files are loaded by peft over transformers' LLaMA, by our own loader, and by the two programs
that take a checkpoint.
"""
import math
import os
from dataclasses import asdict

import pytest
import torch
from conftest import dpo_flags, largest_difference, load_json, preference_rows, run_train
from programs import ROOT, succeeds
from safetensors.torch import load_file
from short_runs import SOME, logged, losses_of, zero_file

import train
from checkpoints.load import base_of, checkpoint_type, fingerprint, load_base
from dpo import Loss, Objective
from llama import LINEARS
from model import set_trained
from training.batches import ResumableSampler, Share
from training.engine import checkpoint_layers
from training.lora import LoRALinear, add_lora, without_lora


def lora_run(world, folder, *flags):
    run_train("--lora_r", 4, "--lora_alpha", 12, "--learning_rate", 1e-2, "--max_steps", 3,
              "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1,
              "--keep_correct", "--output_dir", folder, *flags, *dpo_flags(world))


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory, in_this_process):
    """Three steps of HA-DPO itself → folder."""
    folder = str(tmp_path_factory.mktemp("lora") / "adapter")
    lora_run(world, folder)
    return folder


def with_lora(world, dropout=0.0, fill=0.1):
    """The session's base with LoRA on it (r 4, alpha 12) → trunk, head; B is zero where `fill` is.
    """
    base = load_base(world.base)
    torch.manual_seed(3)
    add_lora(base.trunk.model, 4, 12, dropout)
    for name, parameter in base.trunk.named_parameters():
        if ".lora_B." in name and fill:
            torch.nn.init.normal_(parameter, std=fill)
    return base.trunk, base.head


# ---- The linear ----------------------------------------------------------------------------------


def test_by_hand():
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(6, 5, bias=False), torch.randn(2, 3, 6)
    linear = LoRALinear(plain, 2, 8, 0.5, plain.weight)
    assert linear.weight is plain.weight
    assert sorted(linear.state_dict()) == ["lora_A.weight", "lora_B.weight", "weight"]
    assert torch.equal(linear(x), plain(x))
    assert linear.lora_A.weight.abs().max() <= 6 ** -0.5         # Kaiming-uniform, a = sqrt 5
    torch.nn.init.normal_(linear.lora_B.weight)
    linear.eval()
    merged = plain.weight + 8 / 2 * linear.lora_B.weight @ linear.lora_A.weight
    assert largest_difference("against the merged weight", linear(x), x @ merged.T) < 1e-5
    # The change of a batch of ones, dropped or doubled.
    linear.train()
    change = linear(torch.ones(2000, 6)) - plain(torch.ones(2000, 6))
    expected = torch.ones(6) @ (merged - plain.weight).T
    assert largest_difference("mean under dropout", change.mean(0), expected) < 0.5
    assert change.std(0).min() > 0.1


def test_without_lora_it_is_the_base(world):
    trunk, _ = with_lora(world)
    base = load_base(world.base).trunk
    batch = preference_rows(world, trunk)[SOME]
    with without_lora(trunk):
        assert torch.equal(trunk(batch)[0], base(batch)[0])
    assert largest_difference("its change", trunk(batch)[0], base(batch)[0]) > 1e-3
    with pytest.raises(KeyError), without_lora(trunk):
        raise KeyError
    assert all(module.on for module in trunk.modules() if isinstance(module, LoRALinear))


def test_every_linear_of_llama_and_no_other(world):
    trunk, head = with_lora(world, fill=0)
    fresh = load_base(world.base)
    names = {name for name, module in trunk.named_modules() if isinstance(module, LoRALinear)}
    parts = [f"self_attn.{x}_proj" for x in "qkvo"]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert names == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}
    assert len(names) == 2 * len(LINEARS)
    # The names of a base stay its own.
    plain = {key for key in trunk.state_dict() if ".lora_" not in key}
    assert plain == fresh.trunk.state_dict().keys()
    # B is zero: the model as it was.
    batch = preference_rows(world, trunk)[SOME]
    assert torch.equal(trunk(batch)[0], fresh.trunk(batch)[0])
    trained = set_trained(trunk, head, ("lora", "lm_head"))
    expected = {f"{name}.lora_{x}.weight" for name in names for x in "AB"}
    assert set(trained) == expected | {"lm_head.weight"}
    assert fingerprint(fresh.trunk, fresh.head) == fresh.fingerprint


def test_gradients_are_those_of_the_merged_weights(world):
    """dL/dB = alpha / r · dL/dW A^T and dL/dA = alpha / r · B^T dL/dW, with dL/dW of the model
    whose weights are merged."""
    trunk, head = with_lora(world)
    batch = preference_rows(world, trunk)[SOME]
    merged = load_base(world.base).trunk
    linears = {n: module for n, module in trunk.named_modules() if isinstance(module, LoRALinear)}
    for name, module in linears.items():
        change = module.scale * module.lora_B.weight @ module.lora_A.weight
        merged.get_submodule(name).weight.data += change
    reference = torch.full((len(SOME), 2), -20.0)
    losses = []
    for model, groups in ((trunk, ("lora",)), (merged, ("llama",))):
        set_trained(model, head, groups)
        loss, _ = Objective(model, head, Loss("dpo", beta=0.1))(batch, reference=reference)
        loss.backward()
        losses.append(loss)
    assert largest_difference("loss", *losses) < 1e-5
    for name, module in linears.items():
        A, B, whole = module.lora_A, module.lora_B, merged.get_submodule(name).weight.grad
        assert whole.any()
        for ours, theirs in ((B, whole @ A.weight.T), (A, B.weight.T @ whole)):
            bound = 1e-5 * max(1, theirs.abs().max())
            assert largest_difference(name, ours.weight.grad, module.scale * theirs) < bound


# ---- A run, and what it leaves -------------------------------------------------------------------


def test_first_loss_is_ln_2_and_the_reference_is_the_base(world, adapter):
    rows = logged(adapter)
    # Dropout is the only difference between policy and reference at step 0, and B is still zero:
    # none at all.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[0]["rewards/chosen"] == 0 == rows[0]["rewards/rejected"]
    assert abs(rows[2]["rewards/margin"]) > 1e-4
    assert rows[2]["logps/chosen"] != rows[2]["logps/reference_chosen"]
    base = load_base(world.base)
    dataset = preference_rows(world, base.trunk)
    objective = Objective(base.trunk.requires_grad_(True), base.head, Loss("dpo")).eval()
    for row, ids in zip(rows, ResumableSampler(len(dataset), 3, Share(8, 8), 42), strict=True):
        expected = objective.policy_logps(dataset[ids]).mean(0).detach()         # chosen, rejected
        said = [row["logps/reference_chosen"], row["logps/reference_rejected"]]
        assert largest_difference("reference", said, expected) < 1e-4


def test_what_is_saved(world, adapter):
    assert sorted(os.listdir(adapter)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "config.json",
        "metrics.jsonl", "tokenizer.model", "training.svg"]
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert len(tensors) == 2 * 2 * len(LINEARS)
    assert all(t.any() for t in tensors.values())                                # B has learnt
    config = load_json(f"{adapter}/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.05)
    assert checkpoint_type(adapter) == "adapter" and base_of(adapter) == world.base


def test_peft_loads_it(world, adapter):
    """peft over transformers' LLaMA with the base's weights, unmerged, against ours, merged at
    load."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = load_base(world.base)
    text = base.config.text
    values = {name: value for name, value in asdict(text).items() if name != "rope_theta"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    state = base.trunk.state_dict() | base.head.state_dict()
    not_llama = ("vision_tower.", "model.mm_projector.")
    theirs.load_state_dict({k: v for k, v in state.items() if not k.startswith(not_llama)})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, text.vocab_size, (2, 60), generator=generator)
    before = theirs(ids).logits
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        expected = wrapped(ids).logits
    assert (expected - before).abs().max() > 1e-2
    loaded = {name for name, _ in wrapped.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(load_file(f"{adapter}/adapter_model.safetensors"))
    merged = load_base(world.base, adapter=adapter)
    llama, position = merged.trunk.model, torch.arange(60).expand(2, -1)
    ours = merged.head.lm_head(llama(llama.embed_tokens(ids), position, torch.zeros_like(ids)))
    assert largest_difference("logits against peft", ours, expected) < 1e-4


def test_the_programs_take_it(world, adapter, tmp_path):
    said = succeeds("python", "-m", "tools.merge", adapter, tmp_path / "merged")
    assert world.base in said
    expected = load_base(world.base, adapter=adapter).trunk.state_dict()
    merged = load_base(str(tmp_path / "merged")).trunk.state_dict()
    assert all(torch.equal(t, merged[key]) for key, t in expected.items())
    said = succeeds("python", os.path.join(ROOT, "eval_pope.py"), adapter,
                    "--coco_path", world.coco, "--pope_path", world.pope, "--set", "random",
                    "--max_new_tokens", 4, "--output_dir", tmp_path / "pope")
    assert "| adapter |" in said


def test_block_and_lm_head_beside_it(world, tmp_path, monkeypatch, in_this_process):
    """They are saved beside the adapter, and what is loaded says what the modules said that were
    trained."""
    heads, bases, initial_head = [], [], train.initial_head

    def noted_head(*args):
        heads.append(initial_head(*args))
        return heads[-1]

    def noted_base(*args, **options):
        bases.append(load_base(*args, **options))
        return bases[-1]

    monkeypatch.setattr(train, "initial_head", noted_head)
    monkeypatch.setattr(train, "load_base", noted_base)
    folder = str(tmp_path / "all")
    lora_run(world, folder, "--tune", "lora,post_decoder,lm_head", "--block", "align_linear",
             "--loss", "ipo")
    saved = load_file(f"{folder}/trained.safetensors")
    assert {name.split(".")[0] for name in saved} == {"post_interaction_block", "lm_head"}
    loaded, plain = load_base(world.base, adapter=folder), load_base(world.base)
    assert loaded.head.block_config.align == "linear"
    batch = preference_rows(world, loaded.trunk)[SOME]
    models = ((loaded.trunk, loaded.head), (bases[0].trunk, heads[0][0]),
              (plain.trunk, plain.head))
    said = []
    for trunk, head in models:
        objective = Objective(trunk.requires_grad_(True), head, Loss("dpo")).eval()
        said.append(objective.policy_logps(batch))
    assert largest_difference("log-probs, loaded or still there", said[0], said[1]) < 1e-4
    assert (said[0] - said[2]).abs().max() > 1e-2


# ---- Gradient checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("groups", (("lora",), ("projector", "llama"), ("clip",)), ids="+".join)
def test_checkpointing_changes_no_gradient(world, groups, recwarn):
    """Dropout included: the second forward draws what the first one drew. Fewer tensors are kept
    for the backward."""
    results, reference = [], torch.full((len(SOME), 2), -20.0)
    for checkpointed in (False, True):
        if "lora" in groups:
            trunk, head = with_lora(world, dropout=0.3)
        else:
            base = load_base(world.base)
            trunk, head = base.trunk, base.head
        trained = set_trained(trunk, head, groups)
        if checkpointed:
            checkpoint_layers(trunk.model)
        loss, kept = forward_and_kept(Objective(trunk, head, Loss("dpo")),
                                      preference_rows(world, trunk)[SOME], reference)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in trained.items()}, kept))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(g, gradients_again[k]) and g.any() for k, g in gradients.items())
    print("bytes kept outside of the layers", kept, kept_again)
    assert kept_again < (0.6 if "lora" in groups else 1) * kept
    with torch.no_grad():
        trunk(preference_rows(world, trunk)[SOME])
    assert not recwarn.list                          # "None of the inputs have requires_grad"


def forward_and_kept(objective, batch, reference):
    """→ the loss, how many bytes its graph keeps for the backward."""
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = objective(batch, reference=reference)
    return loss, sum(kept)


def test_two_processes_zero3_with_checkpointing(world, two, tmp_path, in_this_process):
    """fp32 without dropout follows one process under ZeRO-0; bf16 with everything on runs, and
    learns."""
    common = ["--lora_r", 4, "--lora_alpha", 12, "--learning_rate", 1e-2, "--max_steps", 3,
              "--keep_correct", *dpo_flags(world)]
    for name, flags, more in (
            ("fp32", ["--lora_dropout", 0], {}),
            ("bf16", ["--tune", "lora,post_decoder,lm_head"], {"bf16": {"enabled": True}})):
        two(*common, "--deepspeed", zero_file(tmp_path, 3, name, **more),
            "--output_dir", tmp_path / f"out_{name}", "--gradient_checkpointing",
            "--per_device_train_batch_size", 2, *flags)
    run_train(*common, "--output_dir", tmp_path / "one", "--lora_dropout", 0,
              "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1)
    one, fp32, bf16 = (losses_of(tmp_path / name) for name in ("one", "out_fp32", "out_bf16"))
    print(one, fp32, bf16)
    assert largest_difference("losses", one, fp32) < 1e-4
    assert largest_difference("ln 2", fp32[0], math.log(2)) < 1e-6
    assert largest_difference("ln 2, bf16", bf16[0], math.log(2)) < 1e-6 and bf16[0] != bf16[2]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors")
                    for name in ("one", "out_fp32"))
    assert max(largest_difference(key, t, theirs[key]) for key, t in ours.items()) < 1e-2
    head = load_file(tmp_path / "out_bf16" / "trained.safetensors")
    assert head["lm_head.weight"].dtype == torch.bfloat16
