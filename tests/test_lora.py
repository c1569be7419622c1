"""LoRA: what it computes, what it trains, how it is saved; and gradient checkpointing, which its memory asks for.

The files are loaded by peft over transformers' LLaMA, by our own loader, and by the two programs that take a checkpoint.
"""
import json
import math
import os
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, dpo_flags, largest_difference, load_json, preference_rows, run_train, succeeds
from safetensors.torch import load_file

import train
from checkpoint import base_of, fingerprint, kind, load_base
from data import ResumableSampler
from lora import LINEARS, LoRALinear, add_lora, without_lora
from objective import Objective, checkpoint_layers, set_trained
from readers import InputError

SOME = [5, 17, 2, 40, 41, 90, 146]


def lora_run(world, folder, *flags):
    run_train("--lora_r", 4, "--lora_alpha", 12, "--learning_rate", 1e-2, "--max_steps", 3, "--per_device_train_batch_size", 8,
              "--gradient_accumulation_steps", 1, "--keep_correct", "--output_dir", folder, *flags, *dpo_flags(world))


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory, in_this_process):
    """Three steps of HA-DPO itself → folder."""
    folder = str(tmp_path_factory.mktemp("lora") / "adapter")
    lora_run(world, folder)
    return folder


def with_lora(world, dropout=0.0, r=4, alpha=12, fill=0.1):
    """The session's base with LoRA on it; B is zero where `fill` is."""
    trunk, head, *_ = load_base(world.base)
    torch.manual_seed(3)
    add_lora(trunk.model, r, alpha, dropout)
    for name, parameter in trunk.named_parameters():
        if ".lora_B." in name and fill:
            torch.nn.init.normal_(parameter, std=fill)
    return trunk, head


# ---------------------------------------------------------------------------------------------------------------------
# The linear


def test_by_hand():
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(6, 5, bias=False), torch.randn(2, 3, 6)
    linear = LoRALinear(plain, 2, 8, 0.5)
    assert linear.weight is plain.weight and sorted(linear.state_dict()) == ["lora_A.weight", "lora_B.weight", "weight"]
    assert torch.equal(linear(x), plain(x)) and linear.lora_A.weight.abs().max() <= 6 ** -0.5   # Kaiming-uniform, a = sqrt 5
    torch.nn.init.normal_(linear.lora_B.weight)
    linear.eval()
    merged = plain.weight + 8 / 2 * linear.lora_B.weight @ linear.lora_A.weight
    assert largest_difference("against the merged weight", linear(x), x @ merged.T) < 1e-5
    linear.train()                                                               # the change of a batch of ones, dropped or doubled
    change = linear(torch.ones(2000, 6)) - plain(torch.ones(2000, 6))
    assert largest_difference("mean under dropout", change.mean(0), torch.ones(6) @ (merged - plain.weight).T) < 0.5
    assert change.std(0).min() > 0.1


def test_without_lora_it_is_the_base(world):
    trunk, _ = with_lora(world)
    base, *_ = load_base(world.base)
    batch = preference_rows(world, trunk)[SOME]
    with without_lora(trunk):
        assert torch.equal(trunk(batch)[0], base(batch)[0])
    assert largest_difference("its change", trunk(batch)[0], base(batch)[0]) > 1e-3
    with pytest.raises(KeyError), without_lora(trunk):
        raise KeyError
    assert all(module.on for module in trunk.modules() if isinstance(module, LoRALinear))


def test_every_linear_of_llama_and_no_other(world):
    trunk, head = with_lora(world, fill=0)
    fresh, fresh_head, *_ = load_base(world.base)
    names = {name for name, module in trunk.named_modules() if isinstance(module, LoRALinear)}
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert names == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}
    plain = {k: v for k, v in trunk.state_dict().items() if ".lora_" not in k}
    assert plain.keys() == fresh.state_dict().keys() and len(names) == 2 * len(LINEARS)          # the names of a base stay its own
    batch = preference_rows(world, trunk)[SOME]
    assert torch.equal(trunk(batch)[0], fresh(batch)[0])                         # B is zero: the model as it was
    trained = set_trained(trunk, head, ("lora", "lm_head"))
    assert set(trained) == {f"{n}.lora_{x}.weight" for n in names for x in "AB"} | {"lm_head.weight"}
    assert fingerprint(fresh, fresh_head)


def test_gradients_are_those_of_the_merged_weights(world):
    """dL/dB = alpha / r · dL/dW A^T and dL/dA = alpha / r · B^T dL/dW, with dL/dW of the model whose weights are merged."""
    trunk, head = with_lora(world)
    batch = preference_rows(world, trunk)[SOME]
    merged, _, *_ = load_base(world.base)
    for name, module in trunk.named_modules():
        if isinstance(module, LoRALinear):
            merged.get_submodule(name).weight.data += module.scale * module.lora_B.weight @ module.lora_A.weight
    reference = torch.full((len(SOME), 2), -20.0)
    losses = []
    for model, groups in ((trunk, ("lora",)), (merged, ("llama",))):
        set_trained(model, head, groups)
        loss, _ = Objective(model, head, "dpo", beta=0.1)(batch, reference=reference)
        loss.backward()
        losses.append(loss)
    assert largest_difference("loss", *losses) < 1e-5
    for name, module in trunk.named_modules():
        if isinstance(module, LoRALinear):
            whole = merged.get_submodule(name).weight.grad
            assert whole.any()
            for ours, theirs in ((module.lora_B, whole @ module.lora_A.weight.T), (module.lora_A, module.lora_B.weight.T @ whole)):
                assert largest_difference(name, ours.weight.grad, module.scale * theirs) < 1e-5 * max(1, theirs.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# A run, and what it leaves


def test_first_loss_is_ln_2_and_the_reference_is_the_base(world, adapter):
    rows = [json.loads(line) for line in open(f"{adapter}/metrics.jsonl")]
    # Dropout is the only difference between policy and reference at step 0, and B is still zero: none at all.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[0]["rewards/chosen"] == 0 == rows[0]["rewards/rejected"]
    assert abs(rows[2]["rewards/margin"]) > 1e-4 and rows[2]["logps/chosen"] != rows[2]["logps/reference_chosen"]
    trunk, head, *_ = load_base(world.base)
    dataset = preference_rows(world, trunk)
    objective = Objective(trunk.requires_grad_(True), head, "dpo").eval()
    for row, ids in zip(rows, ResumableSampler(len(dataset), 3, 8, 8, 0, 1, 42)):
        chosen, rejected = objective(dataset[ids]).mean(0)
        assert largest_difference("reference", torch.tensor([row["logps/reference_chosen"], row["logps/reference_rejected"]]),
                                  torch.stack([chosen, rejected]).detach()) < 1e-4


def test_what_is_saved(world, adapter):
    assert sorted(os.listdir(adapter)) == ["adapter_config.json", "adapter_model.safetensors", "config.json", "metrics.jsonl",
                                           "tokenizer.model", "training.svg"]
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors and len(tensors) == 2 * 2 * len(LINEARS)
    assert all(t.any() for t in tensors.values())                                # B has learnt
    config = load_json(f"{adapter}/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.05)
    assert kind(adapter) == "adapter" and base_of(adapter) == world.base


def test_peft_loads_it(world, adapter):
    """peft over transformers' LLaMA with the base's weights, unmerged, against ours, merged at load."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    trunk, head, tokenizer, _ = load_base(world.base)
    text = trunk.config.text
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{name: value for name, value in asdict(text).items() if name != "rope_theta"})).eval()
    state = trunk.state_dict() | head.state_dict()
    theirs.load_state_dict({k: v for k, v in state.items() if not k.startswith(("vision_tower.", "model.mm_projector."))})
    ids = torch.randint(3, text.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
    before = theirs(ids).logits
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        expected = wrapped(ids).logits
    assert (expected - before).abs().max() > 1e-2
    loaded = {name for name, _ in wrapped.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(load_file(f"{adapter}/adapter_model.safetensors"))
    trunk, head, *_ = load_base(world.base, adapter=adapter)
    position = torch.arange(60).expand(2, -1)
    ours = head.lm_head(trunk.model(trunk.model.embed_tokens(ids), position, torch.zeros_like(ids)))
    assert largest_difference("logits against peft", ours, expected) < 1e-4


def test_the_programs_take_it(world, adapter, tmp_path):
    said = succeeds("python", os.path.join(ROOT, "checkpoint.py"), adapter, tmp_path / "merged")
    assert world.base in said
    trunk, _, *_ = load_base(world.base, adapter=adapter)
    merged, _, *_ = load_base(str(tmp_path / "merged"))
    assert all(torch.equal(t, merged.state_dict()[k]) for k, t in trunk.state_dict().items())
    said = succeeds("python", os.path.join(ROOT, "eval_pope.py"), adapter, "--coco_path", world.coco, "--pope_path", world.pope,
                    "--set", "random", "--max_new_tokens", 4, "--output_dir", tmp_path / "pope")
    assert "| adapter |" in said


def test_block_and_lm_head_beside_it(world, tmp_path, monkeypatch, in_this_process):
    """They are saved beside the adapter, and what is loaded says what the modules said that were trained."""
    heads, bases = [], []
    initial_head, load = train.initial_head, train.load
    monkeypatch.setattr(train, "initial_head", lambda *args: heads.append(initial_head(*args)) or heads[-1])
    monkeypatch.setattr(train, "load", lambda *args: bases.append(load(*args)) or bases[-1])
    folder = str(tmp_path / "all")
    lora_run(world, folder, "--tune", "lora,post_decoder,lm_head", "--block", "align_linear", "--loss", "ipo")
    assert {name.split(".")[0] for name in load_file(f"{folder}/trained.safetensors")} == {"post_interaction_block", "lm_head"}
    trunk, head, *_ = load_base(world.base, adapter=folder)
    assert head.block.align == "linear"
    batch = preference_rows(world, trunk)[SOME]
    models = (trunk, head), (bases[0].trunk, heads[0][0]), load_base(world.base)[:2]
    *said, plain = (Objective(t.requires_grad_(True), h, "dpo").eval()(batch) for t, h in models)
    assert largest_difference("log-probs, loaded or still there", *said) < 1e-4
    assert (said[0] - plain).abs().max() > 1e-2


def test_combinations_that_cannot_be(world):
    for flags, said in (("--stage 1 --lora_r 8", "--stage 1"), ("--stage 2 --tune lora", "--stage 2"), ("--tune lora,llama", "beside lora"),
                        ("--tune post_decoder --lora_r 8", "does not name lora"), ("--tune lm_head --block full", "add post_decoder"),
                        ("--tune post_decoder --block head", "nothing to train"), ("--loss ipo --label_smoothing 0.1", "--label_smoothing")):
        with pytest.raises(InputError, match=said):
            train.parse(flags.split())
    args = train.parse(["--lora_r", "8"])
    assert (args.tune, args.block, args.loss, args.lora_alpha, args.lora_dropout) == (("lora",), ["head"], "dpo", 256, 0.05)
    assert train.parse(["--lora_r", "8", *dpo_flags(world)]).learning_rate == [2e-6]
    assert train.parse(["--lora_r", "8", "--block", "full"]).tune == ("post_decoder", "lora")
    assert train.parse(["--tune", "lora"]).lora_r == 128


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing


@pytest.mark.parametrize("groups", (("lora",), ("projector", "llama"), ("clip",)), ids="+".join)
def test_checkpointing_changes_no_gradient(world, groups, recwarn):
    """Dropout included: the second forward draws what the first one drew. Fewer tensors are kept for the backward."""
    results = []
    for checkpointed in (False, True):
        trunk, head = with_lora(world, dropout=0.3) if "lora" in groups else load_base(world.base)[:2]
        trained = set_trained(trunk, head, groups)
        if checkpointed:
            checkpoint_layers(trunk.model)
        kept = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            reference = torch.full((len(SOME), 2), -20.0)
            loss, _ = Objective(trunk, head, "dpo")(preference_rows(world, trunk)[SOME], reference=reference)
        loss.backward()
        results.append((loss, {k: p.grad for k, p in trained.items()}, sum(kept)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][k]) and g.any() for k, g in results[0][1].items())
    print("bytes kept outside of the layers", [r[2] for r in results])
    assert results[1][2] < (0.6 if "lora" in groups else 1) * results[0][2]
    with torch.no_grad():
        trunk(preference_rows(world, trunk)[SOME])
    assert not recwarn.list                                                      # "None of the inputs have requires_grad"


def test_two_processes_zero3_with_checkpointing(world, adapter, two, tmp_path):
    """fp32 without dropout follows one process under ZeRO-0; bf16 with everything on runs, and learns."""
    for name, more in (("fp32", {}), ("bf16", {"bf16": {"enabled": True}})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 3}, **more}))
    common = ["--lora_r", 4, "--lora_alpha", 12, "--learning_rate", 1e-2, "--max_steps", 3, "--keep_correct", *dpo_flags(world)]
    for name, flags in (("fp32", ["--lora_dropout", 0]), ("bf16", ["--tune", "lora,post_decoder,lm_head"])):
        two(*common, "--deepspeed", tmp_path / f"{name}.json", "--output_dir", tmp_path / f"out_{name}", "--gradient_checkpointing",
            "--per_device_train_batch_size", 2, *flags)
    run_train(*common, "--output_dir", tmp_path / "one", "--lora_dropout", 0, "--per_device_train_batch_size", 8,
              "--gradient_accumulation_steps", 1)
    losses = {name: [json.loads(line)["loss"] for line in open(tmp_path / name / "metrics.jsonl")]
              for name in ("one", "out_fp32", "out_bf16")}
    print(losses)
    assert largest_difference("losses", losses["one"], losses["out_fp32"]) < 1e-4
    assert largest_difference("ln 2", losses["out_fp32"][0], math.log(2)) < 1e-6
    assert largest_difference("ln 2, bf16", losses["out_bf16"][0], math.log(2)) < 1e-6 and losses["out_bf16"][0] != losses["out_bf16"][2]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "out_fp32"))
    assert max(largest_difference(k, t, theirs[k]) for k, t in ours.items()) < 1e-2
    assert load_file(tmp_path / "out_bf16" / "trained.safetensors")["lm_head.weight"].dtype == torch.bfloat16
