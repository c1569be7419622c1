"""What people who trained these models met, thirty-three times: for each the tests behind it here.

PITFALLS is the table: what happened to them, and what keeps it from happening, as names of tests. A
name that no test file defines is an error, so that no row loses its test unseen. Tests that belong
to no other file stand below the table.
"""
import ast
import json
import os
import re
import shutil
import sys
from glob import glob

import pytest
import torch
from conftest import dpo_flags, preference_rows, run_train, small_config
from programs import ROOT, succeeds
from short_runs import zero_file

import train
from checkpoints.load import checkpoint_type, fingerprint, load_base, load_trained
from checkpoints.save import save_base
from data import Tokenizer
from dpo import Loss, Objective
from model import Head, Llava, Trunk, set_trained
from support.tensors import read_safetensors

PITFALLS = {
    1: ("a newer peft broke the run",
        "test_no_foreign_package_runs test_by_hand test_peft_loads_it"),
    2: ("a DeepSpeed file without a global batch, or with one that does not come out",
        "test_batch_arithmetic test_impossible_configurations_are_explained "
        "test_micro_batch_follows_from_the_number_of_processes"),
    3: ("builds of CUDA, torch and DeepSpeed that do not match",
        "test_a_gpu_that_torch_cannot_use test_a_gpu_without_kernels "
        "test_deepspeed_that_cannot_be_imported"),
    4: ("a copied file moved the optimizer to the CPU",
        "test_offload_only_when_asked_for test_the_shipped_configuration_is_plain "
        "test_impossible_configurations_are_explained"),
    5: ("no_sync is incompatible with ZeRO-3",
        "test_the_loop_only_calls_the_engine test_zero3_on_two_processes_follows_zero0_on_one "
        "test_every_zero_stage_gives_the_same_losses"),
    6: ('"auto" outside of the HF Trainer',
        "test_impossible_configurations_are_explained test_mistakes_are_one_line"),
    7: ("GIFs named .jpg, images missing or cut short",
        "test_a_gif_named_jpg_opens test_images_are_checked_before_training "
        "test_images_cut_short_are_found "
        "test_images_of_very_many_are_looked_up_in_their_folders test_mistakes_are_one_line"),
    8: ("a save failed over temperature and top_p of a greedy model",
        "test_drawing_fields_are_ignored_when_greedy "
        "test_nothing_depends_on_a_generation_config"),
    9: ('a folder had to be called "llava"',
        "test_folders_are_known_by_what_they_hold"),
    10: ("decoding one token with a cache was wrong",
         "test_token_by_token test_many_tokens_after_the_cache test_greedy_answers"),
    11: ("DeepSpeed's ops did not compile",
         "test_nothing_is_compiled"),
    12: ("DeepSpeed has no cosine schedule",
         "test_cosine test_every_metric_is_logged"),
    13: ("flash-attn did not install",
         "test_no_foreign_package_runs test_llama"),
    14: ("out of memory while saving",
         "test_a_save_gathers_one_tensor_at_a_time "
         "test_checkpoint_holds_exactly_what_was_trained"),
    15: ("a saved adapter was empty",
         "test_a_save_that_went_wrong_is_found test_checkpoint_holds_exactly_what_was_trained "
         "test_what_is_saved test_wrong_adapters"),
    16: ("eos, pad and bos were all 0: answers never stopped",
         "test_other_tokenizers_are_refused test_greedy_answers"),
    17: ("killed: weights larger than memory",
         "test_loading_needs_about_one_tensor_more"),
    18: ("device-side assert: a token id out of range",
         "test_no_id_is_out_of_range test_encode_decode test_damaged "
         "test_image_mark_in_a_users_text"),
    19: ("two million conversations took 350 GB",
         "test_rows_are_those_that_json_finds test_rows_are_read_when_asked_for "
         "test_bench_rows_runs"),
    20: ('"newly initialized" scrolled past',
         "test_damaged test_nothing_is_read_before_shapes_agree test_wrong_adapters"),
    21: ('"None of the inputs have requires_grad"',
         "test_a_trained_tensor_without_gradient_is_an_error "
         "test_checkpointing_changes_no_gradient "
         "test_gradients_reach_the_stages_tensors_and_no_other "
         "test_every_group_can_be_trained_by_every_loss test_a_run_says_what_it_trains"),
    22: ("the reference took a second 14 GB",
         "test_the_reference_is_no_second_model"),
    23: ("a hub id where a path was meant",
         "test_names_without_a_folder test_without_a_network test_mistakes_are_one_line "
         "test_flags_that_cannot_be test_no_foreign_package_runs"),
    24: ('all answers became "no"',
         "test_table_flags_a_model_that_leans test_nothing_but_yes_or_no"),
    25: ("answers zipped with another version of the labels",
         "test_answers_are_joined_not_zipped test_answers_of_other_questions "
         "test_incomplete_and_absent_splits"),
    26: ("all labels masked, loss 0",
         "test_bad_files_are_named test_answers_without_words_are_an_error "
         "test_conversation_layout"),
    27: ("truncation cut the image or the prompt",
         "test_prompts_are_never_cut test_an_image_is_never_cut "
         "test_rows_that_are_too_long_are_counted_before_training "
         "test_a_run_says_what_it_trains"),
    28: ("rotary_emb.inv_freq in old files",
         "test_llava_with_the_tower_outside test_llava_with_the_tower_inside test_damaged"),
    29: ("ZeRO-3: weights of shape [0], and a hang over a text-only batch",
         "test_text_only_batches_under_zero3 test_always_an_image_changes_nothing "
         "test_checkpoint_holds_exactly_what_was_trained test_dpo_of_the_whole_trunk"),
    30: ("answers in a batch differed from answers alone",
         "test_greedy_answers test_packed_logits_and_logps "
         "test_several_processes_give_the_identical_table test_bf16_as_on_a_gpu"),
    31: ('"the chosen reward falls too"',
         "test_first_loss_is_ln_2 test_first_loss_is_ln_2_and_the_reference_is_the_base "
         "test_a_policy_that_is_not_its_reference_at_the_start test_every_metric_is_logged "
         "test_the_readme_says_what_is_normal"),
    32: ("the tower's last layer was built though it is not used",
         "test_clip test_tower_inside_without_its_config"),
    33: ("open_clip's tower without quick-GELU",
         "test_features test_a_file_as_the_tower"),
}


def program(path):
    with open(f"{ROOT}/{path}", encoding="utf-8") as file:
        return ast.parse(file.read())


# What a user runs: the root, and every folder but bench/, docs/ and tests/.
FOLDERS = ("checkpoints", "evals", "support", "tiny", "tools", "training")
PATHS = glob("*.py", root_dir=ROOT) + [path for folder in FOLDERS
                                       for path in glob(f"{folder}/*.py", root_dir=ROOT)]
PROGRAMS = {path: program(path) for path in PATHS}


def test_every_row_has_its_tests():
    paths = glob("tests/**/test_*.py", root_dir=ROOT, recursive=True)
    tests = {node.name for path in paths for node in program(path).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert sorted(PITFALLS) == list(range(1, 34))
    named = {name for _, names in PITFALLS.values() for name in names.split()}
    assert all(names.split() for _, names in PITFALLS.values()) and named - tests == set()


# ---- What the programs do not do -----------------------------------------------------------------


def imports(tree):
    """Top names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def attributes(tree):
    return [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def test_no_foreign_package_runs():
    """1, 13, 23: no peft, no transformers, no flash-attn, and nothing that downloads (open_clip and
    huggingface_hub, where one is named, aside). pyarrow is only needed for parquet."""
    imported = set().union(*map(imports, PROGRAMS.values()))
    ours = {name.removesuffix(".py") for name in PROGRAMS} | set(FOLDERS)
    used = imported - sys.stdlib_module_names - ours - {"pyarrow"}
    with open(f"{ROOT}/requirements.txt") as file:
        required = {re.match(r"[\w-]+", line)[0] for line in file
                    if line.strip() and not line.startswith("#")}
    names = {"pillow": "PIL", "open_clip_torch": "open_clip"}
    assert used == {names.get(name, name) for name in required}
    assert used == {"torch", "deepspeed", "sentencepiece", "safetensors", "PIL", "numpy",
                    "open_clip", "tqdm", "huggingface_hub"}
    # SHR's judge is a server that the user names; no other module talks to one.
    alone = set().union(*(imports(tree) for path, tree in PROGRAMS.items()
                          if path != "evals/judge.py"))
    assert not {"urllib", "http", "socket", "ftplib"} & alone
    attention = [name for path in ("llama.py", "clip_vit.py", "post_decoder.py")
                 for name in attributes(PROGRAMS[path]) if "attention" in name and name.islower()]
    assert "scaled_dot_product_attention" in attention
    assert not any("flash" in name for name in attention)


def calls_of(name, tree):
    """Names of the methods that are called on a variable of this name."""
    methods = [node.func for node in ast.walk(tree)
               if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {method.attr for method in methods
            if isinstance(method.value, ast.Name) and method.value.id == name}


def test_the_loop_only_calls_the_engine():
    """5: forward, backward, step and questions about numbers; nothing that a ZeRO stage could
    forbid."""
    loop, = (node for node in PROGRAMS["train.py"].body
             if isinstance(node, ast.FunctionDef) and node.name == "loop")
    around = [PROGRAMS[f"training/{name}.py"]
              for name in ("engine", "batches", "reference", "guards", "log")]
    called = set().union(*(calls_of("engine", tree) for tree in (loop, *around)))
    asked = {name for name in called if name.startswith("get_") or "batch_size" in name
             or name in ("gradient_accumulation_steps", "eval", "train")}
    # `destroy` ends the engine of the rehearsal that checks the user's file.
    assert called - asked == {"backward", "step", "destroy"}
    assert "destroy" not in calls_of("engine", loop)
    assert "no_sync" not in {name for tree in PROGRAMS.values() for name in attributes(tree)}


def test_nothing_depends_on_a_generation_config(world, tmp_path):
    """8: one that contradicts itself lies in the base; it is neither read, nor validated, nor
    written."""
    shutil.copytree(world.base, tmp_path / "base")
    contradiction = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6'
    (tmp_path / "base" / "generation_config.json").write_text(contradiction)
    base = load_base(str(tmp_path / "base"))
    save_base(str(tmp_path / "again"), base)
    again = load_base(str(tmp_path / "again"))
    assert fingerprint(base.trunk, base.head) == fingerprint(again.trunk, again.head)
    assert "generation_config.json" not in os.listdir(tmp_path / "again")


def test_the_readme_says_what_is_normal():
    with open(f"{ROOT}/README.md", encoding="utf-8") as file:
        text = file.read().lower()
    assert "chosen reward falls too" in text and "yes-ratio" in text


# ---- Runs ----------------------------------------------------------------------------------------


def few_steps(world, folder, *flags):
    return run_train("--init", "identity", "--keep_correct", "--max_steps", 2,
                     "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1,
                     "--output_dir", folder, *dpo_flags(world), *flags)


@pytest.mark.parametrize("stage, offload", ((0, False), (2, True), (3, False)))
def test_nothing_is_compiled(world, tmp_path, monkeypatch, in_this_process, stage, offload):
    """11: torch's own AdamW, and no op of DeepSpeed's is built or loaded, on the CPU as under ZeRO
    with offload."""
    from torch.utils import cpp_extension

    def compiled(*args, **options):
        pytest.fail("something is compiled, or an op of DeepSpeed is loaded")

    for name in ("load", "load_inline", "_jit_compile"):
        monkeypatch.setattr(cpp_extension, name, compiled)
    from deepspeed.ops.op_builder.builder import OpBuilder
    monkeypatch.setattr(OpBuilder, "load", compiled)
    optimizers, initialize = [], sys.modules["deepspeed"].initialize

    def noted(**options):
        optimizers.append(options["optimizer"])
        return initialize(**options)

    monkeypatch.setattr("deepspeed.initialize", noted)
    few_steps(world, tmp_path / "run", "--stage", 2, "--deepspeed", zero_file(tmp_path, stage),
              *["--offload"] * offload)
    # The first one is of the rehearsal that checks the user's file.
    assert [type(optimizer) for optimizer in optimizers] == 2 * [torch.optim.AdamW]
    assert all(optimizer.defaults["fused"] for optimizer in optimizers)


def test_a_save_gathers_one_tensor_at_a_time(world, tmp_path, monkeypatch, in_this_process):
    """14: under ZeRO-3, and nothing but what was trained."""
    import deepspeed
    gathered, original, save = [], deepspeed.zero.GatheredParameters, train.save

    def noted(params, **options):
        gathered.append(params)
        return original(params, **options)

    def watched_save(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed.zero, "GatheredParameters", noted)
            save(*args)

    monkeypatch.setattr(train, "save", watched_save)
    few_steps(world, tmp_path / "run", "--stage", 2, "--deepspeed", zero_file(tmp_path, 3))
    tensors = read_safetensors(str(tmp_path / "run" / "trained.safetensors"))
    assert len(gathered) == len(tensors) and all(len(params) == 1 for params in gathered)
    assert all(0 not in lazy.shape for lazy in tensors.values())


def test_a_run_says_what_it_trains(world, tmp_path, capsys, in_this_process):
    """21, 27: how many tensors, of which groups; and how many rows lose the end of an answer."""
    few_steps(world, tmp_path / "run", "--stage", 1)
    said = capsys.readouterr().out
    count = len(read_safetensors(str(tmp_path / "run" / "trained.safetensors")))
    assert f"{count} tensors trained (post_decoder, " in said and "are cut" not in said
    shutil.copytree(world.base, tmp_path / "base")
    rows = preference_rows(world, load_base(world.base).trunk)
    longest = max(max(rows.row(i).position) for i in range(len(rows)))
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | {"tokenizer_model_max_length": longest}
    path.write_text(json.dumps(config))
    few_steps(world, tmp_path / "cut", "--stage", 1, "--model_name_or_path", tmp_path / "base")
    expected = r"\d+ of \d+ rows are longer than the model's \d+ tokens: their answers are cut"
    assert re.search(expected, capsys.readouterr().out)


def test_the_reference_is_no_second_model():
    """22: it owns what is trained of the head and nothing else; a block that starts as the identity
    is left out of it."""
    torch.manual_seed(0)
    config = small_config()
    for groups, owns in ((("post_decoder",), set()),
                         (("post_decoder", "lm_head"), {"lm_head.weight"})):
        trunk, head = Trunk(config), Head(config, config.block_config())
        set_trained(trunk, head, groups)
        objective = Objective(trunk, head, Loss("dpo"))
        shared = {id(p) for p in (*trunk.parameters(), *head.parameters())}
        own = {name for name, p in objective.reference.named_parameters() if id(p) not in shared}
        assert own == owns
    trunk, head = Trunk(config), Head(config)
    set_trained(trunk, head, ("llama",))
    assert not hasattr(Objective(trunk, head, Loss("dpo")), "reference")        # two numbers a pair


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llava-lora", "clip", "13b", "checkpoint-1000"))
def test_folders_are_known_by_what_they_hold(world, tmp_path, in_this_process, name):
    """9: a base, a trained checkpoint and an adapter, each under a name that says something else.
    """
    folders = base, trained, adapter = [str(tmp_path / part / name)
                                        for part in ("base", "trained", "adapter")]
    shutil.copytree(world.base, base)
    few_steps(world, trained, "--stage", 1, "--model_name_or_path", base)
    run_train("--lora_r", 2, "--max_steps", 1, "--output_dir", adapter, *dpo_flags(world),
              "--model_name_or_path", base)
    assert [checkpoint_type(path) for path in folders] == ["base", "trained", "adapter"]
    load_base(base, adapter=adapter)
    assert load_trained(trained, load_base(base)).block_config is not None


def test_no_id_is_out_of_range(world):
    """18: whatever is typed, ids are the tokenizer's, and a base has an embedding for each of them,
    or it does not load."""
    tokenizer, base = Tokenizer(world.tokenizer), load_base(world.base)
    embeddings = len(base.trunk.model.embed_tokens.weight)
    text = "".join(map(chr, range(1, 0x800))) + "🙂漢\u2581</s><s><unk><image>"
    for ids in (tokenizer.encode(text), tokenizer.encode(text, continues=True)):
        assert 0 <= min(ids) and max(ids) < len(tokenizer) <= embeddings
    assert embeddings == len(base.head.lm_head.weight)


@pytest.mark.parametrize("form", ("safetensors", "bin"))
def test_loading_needs_about_one_tensor_more(world, tmp_path, form):
    """17: the highest resident memory of a process that loads a model of 200 MB, beyond that model
    and what a tiny one needs."""
    tokenizer, folder = Tokenizer(world.tokenizer), str(tmp_path / "base")
    config = small_config(vocab_size=len(tokenizer))
    config.text.hidden_size, config.text.intermediate_size = 768, 2048
    config.text.num_hidden_layers = 7
    with torch.device("meta"):
        trunk, head = Trunk(config), Head(config)
    for module in (trunk, head):
        module.to_empty(device="cpu").requires_grad_(False)
        for parameter in module.parameters():
            parameter.fill_(0.5)
    save_base(folder, Llava(trunk, {"base": head}, tokenizer, None, ""))
    if form == "bin":
        tensors = {**trunk.model.state_dict(prefix="model."), **head.state_dict()}
        torch.save(tensors, f"{folder}/pytorch_model.bin")
        os.remove(f"{folder}/model.safetensors")
    result, tiny = (memory_of_loading(path) for path in (folder, world.base))
    print({name: f"{result[name] / 1e6:.0f} MB, tiny {tiny[name] / 1e6:.0f} MB"
           for name in ("model", "extra", "largest")})
    assert result["model"] > 180e6 and result["extra"] - tiny["extra"] < 40e6


def memory_of_loading(folder):
    said = succeeds("python", "bench/bench_load.py", "--load", "--folder", folder)
    return json.loads(said.splitlines()[-1])
