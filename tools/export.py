"""Write a checkpoint as other programs load it: transformers, vLLM, SGLang, LLaVA, peft.

    python -m tools.export tiny/base for-vllm                   # transformers, vLLM, SGLang
    python -m tools.export tiny/base other --format llava       # LLaVA's own code, and this one
    python -m tools.export tiny/base quarter --bits 4           # with bitsandbytes' 4 bits
    python -m tools.export out/lora adapter --format peft       # LoRA alone, on the llava-hf base
    python -m tools.export out/lora whole --push me/my-llava    # and upload it, private at first

`llava-hf` is the layout of huggingface.co/llava-hf: Hugging Face's names, a vocabulary with
`<image>` and `<pad>` behind LLaMA's pieces and padded to a multiple of 64, and the files of
tokenizer, processor and chat template. The template's text is what train.py trains with. The new
rows of embeddings and lm_head are copies of `<unk>`'s, so none of them is ever likelier.
Deliberately different from the conversion in huggingface/transformers: the processor pads to a
square as LLaVA does, and layers of the tower behind the selected one, which nothing reads, are
zeros.

A post-interaction block is refused, and so is VoCo-LLaMA: no public server can run them.
"""
import os
import shutil
from dataclasses import asdict

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall where cores are shared
import torch

from checkpoints.card import pope_of, values_of, write_card
from checkpoints.hub import folder_of, import_hub, is_name
from checkpoints.load import Source, base_of, checkpoint_type, load_whole
from checkpoints.quantised import QUANTISATION, whole_tensors
from checkpoints.save import preprocessor_config, save_base
from clip_vit import TOWER, CLIPVisionTower
from data import BOS, EOS, IMAGE
from llama import LINEARS
from support.command_line import Parser
from support.common import InputError, read_json, run_program, write_json
from support.folders import check_can_write
from support.outputs import check_output_folder
from support.templates import SYSTEM
from support.tensors import read_file, write_tensors

FORMATS = "llava", "llava-hf", "peft"
MULTIPLE = 64               # rows of a vocabulary that GPUs multiply fast
# Our names' beginnings → those of huggingface.co/llava-hf.
RENAMES = {TOWER: TOWER,
           "model.mm_projector.0.": "multi_modal_projector.linear_1.",
           "model.mm_projector.2.": "multi_modal_projector.linear_2.",
           "model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
PEFT_LAYERS = "base_model.model.model.language_model.layers."
# The v1 template: SYSTEM USER: <image>\n… ASSISTANT: …</s>USER: … ASSISTANT:
CHAT = ("{{ '" + SYSTEM.replace("'", "\\'") + " ' }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}"
        "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endfor %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


# ---- Hugging Face's layout -----------------------------------------------------------------------


def hf_tensors(model):
    """A Llava → {Hugging Face's name: tensor}."""
    tensors = {}
    for name, tensor in whole_tensors(model).items():
        ours = next(prefix for prefix in RENAMES if name.startswith(prefix))
        tensors[RENAMES[ours] + name[len(ours):]] = tensor
    # There the projector is as wide inside as LLaMA; zeros behind a narrow one change nothing.
    wide = model.config.text.hidden_size - len(tensors["multi_modal_projector.linear_1.bias"])
    for name, padding in (("1.weight", (0, 0, 0, wide)), ("1.bias", (0, wide)),
                          ("2.weight", (0, wide))):
        name = f"multi_modal_projector.linear_{name}"
        tensors[name] = torch.nn.functional.pad(tensors[name], padding)
    rows = padded_vocabulary(model)
    for name in "language_model.model.embed_tokens.weight", "language_model.lm_head.weight":
        weight = tensors[name]
        unknown = weight[:1].expand(rows - len(weight), -1)
        tensors[name] = torch.cat((weight[:rows], unknown))
    whole = CLIPVisionTower(model.config.vision, -1).vision_model
    like = tensors["vision_tower.vision_model.pre_layrnorm.weight"]
    for name, tensor in whole.state_dict().items():
        missing = like.new_zeros(tensor.shape)
        tensors.setdefault(TOWER + name, missing)
    for name, value in (("weight", torch.ones_like(like)), ("bias", torch.zeros_like(like))):
        tensors[f"{TOWER}post_layernorm.{name}"] = value
    return tensors


def padded_vocabulary(model):
    """Rows of the vocabulary with `<image>` and `<pad>`."""
    rows = max(model.config.text.vocab_size, len(model.tokenizer) + 2)
    return -(-rows // MULTIPLE) * MULTIPLE


def hf_config(model):
    config, image = model.config, len(model.tokenizer)
    dtype = str(model.head.lm_head.weight.dtype).removeprefix("torch.")
    text = asdict(config.text) | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": padded_vocabulary(model), "bos_token_id": BOS, "eos_token_id": EOS,
        "pad_token_id": image + 1, "torch_dtype": dtype, "tie_word_embeddings": False}
    vision = {"model_type": "clip_vision_model", "projection_dim": 768, **asdict(config.vision)}
    if config.projector_depth != 2 or config.image_start_end or config.pinpoints:
        raise InputError("--format llava-hf: is LLaVA-1.5's layout, which has a projector of two "
                         "layers, no <im_start> and no tiles; say --format llava")
    if (config.projector_hidden_size or 0) > config.text.hidden_size:
        raise InputError(f"--format llava-hf: the projector's inner width is "
                         f"{config.projector_hidden_size}, and there it is LLaMA's "
                         f"({config.text.hidden_size}); say --format llava")
    told = {"quantization_config": QUANTISATION} if config.bits < 16 else {}
    return {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], **told,
            "text_config": text, "vision_config": vision, "image_token_index": image,
            "image_token_id": image, "pad_token_id": image + 1, "projector_hidden_act": "gelu",
            "vision_feature_layer": config.select_layer, "ignore_index": -100,
            "vision_feature_select_strategy": "default", "multimodal_projector_bias": True,
            "image_seq_length": config.vision.num_patches, "torch_dtype": dtype,
            "tie_word_embeddings": False,
            "image_aspect_ratio": "pad" if config.pad_images else "square"}


def tokenizer_files(model):
    """{file: JSON value} of LLaMA's tokenizer with `<image>` and `<pad>`."""
    pieces = len(model.tokenizer)
    ids = {"<unk>": 0, "<s>": BOS, "</s>": EOS, IMAGE: pieces, "<pad>": pieces + 1}
    added = {str(number): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
                           "single_word": False, "special": True} for text, number in ids.items()}
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True,
            "add_eos_token": False, "added_tokens_decoder": added, **named, "image_token": IMAGE,
            "extra_special_tokens": {"image_token": IMAGE}, "padding_side": "left",
            "processor_class": "LlavaProcessor", "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_length, "chat_template": CHAT},
        "special_tokens_map.json": named,
        "added_tokens.json": {IMAGE: pieces, "<pad>": pieces + 1}}


def write_hf(folder, model):
    """The files of a llava-hf folder."""
    vision, pieces = model.config.vision, len(model.tokenizer)
    images = preprocessor_config(model.preprocess) | {"processor_class": "LlavaProcessor"}
    if model.config.pad_images:
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    files = tokenizer_files(model) | {
        "config.json": hf_config(model), "preprocessor_config.json": images,
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE,
            "patch_size": vision.patch_size, "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default"},
        "chat_template.json": {"chat_template": CHAT},
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS,
                                   "pad_token_id": pieces + 1}}
    for name, value in files.items():
        write_json(os.path.join(folder, name), value)
    shutil.copyfile(model.tokenizer.path, os.path.join(folder, "tokenizer.model"))
    write_tensors(os.path.join(folder, "model.safetensors"), hf_tensors(model))


# ---- What is exported ----------------------------------------------------------------------------


def write_peft(folder, checkpoint):
    """A LoRA checkpoint of ours for the llava-hf base, whose LLaMA has other names."""
    place = folder_of(checkpoint)
    values = read_json(os.path.join(place, "adapter_config.json"), dict)
    path = os.path.join(place, "adapter_model.safetensors")
    if not os.path.isfile(path):
        raise InputError(f"{checkpoint}: holds no adapter_model.safetensors; --format peft takes a "
                         "LoRA checkpoint of ours")
    tensors = {}
    for name, lazy in read_file(path).items():
        layers = "base_model.model.model.layers."
        if not name.startswith(layers):
            raise InputError(f"{path}: {name} is no LoRA of LLaMA's layers; say --format llava-hf, "
                             "which writes the whole model")
        tensors[PEFT_LAYERS + name[len(layers):]] = lazy.read()
    values["target_modules"] = rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(LINEARS)})"
    write_json(os.path.join(folder, "adapter_config.json"), values)
    write_tensors(os.path.join(folder, "adapter_model.safetensors"), tensors)


def refuse_block(args, what):
    """InputError for what no public program can run, before weights are read."""
    place = folder_of(args.checkpoint)
    values = values_of(place)
    base = values_of(folder_of(base_of(args.checkpoint, args.model_name_or_path)))
    if values.get("block") or base.get("post_interaction_block"):
        raise InputError(f"{args.checkpoint}: has a post-interaction block, which reads CLIP's "
                         "features behind LLaMA, and no public server can run it; the programs "
                         "here can, also from the whole model of python -m tools.merge")
    if base.get("num_voco"):
        raise InputError(f"{args.checkpoint}: compresses images into <voco> tokens, and no public "
                         "server knows their mask; the programs here do")
    if args.format == "peft":
        if args.bits:
            raise InputError("--format peft: an adapter has no linears to write in --bits "
                             f"{args.bits}; leave it out")
        if what != "adapter":
            raise InputError(f"{args.checkpoint}: --format peft takes a LoRA checkpoint, and this "
                             "is none; say --format llava-hf")
        if os.path.isfile(os.path.join(place, "trained.safetensors")):
            raise InputError(f"{args.checkpoint}: more than LoRA was trained; say --format "
                             "llava-hf, which writes the whole model")


def load(args):
    """The whole model."""
    model = load_whole(Source([args.checkpoint], args.model_name_or_path, args.vision_tower,
                              args.bits))
    if model.head.block_config:                     # of the notes' file only its tensors tell
        raise InputError(f"{args.checkpoint}: has a post-interaction block, and no public server "
                         "can run it")
    return model


def export(args):
    """Write OUT, which appears under its name when it is whole."""
    what = checkpoint_type(args.checkpoint)
    refuse_block(args, what)
    model = None if args.format == "peft" else load(args)
    if args.format == "llava":
        save_base(args.output, model)
    else:
        partial = f"{args.output.rstrip('/')}.partial"
        os.makedirs(partial)
        if args.format == "peft":
            write_peft(partial, args.checkpoint)
        else:
            write_hf(partial, model)
        os.rename(partial, args.output)
    place = folder_of(args.checkpoint)
    values = values_of(place)
    named = base_of(args.checkpoint, args.model_name_or_path)
    if what != "base" or not values.get("arguments"):
        values = values | {"base": named}
    name = os.path.basename(os.path.realpath(args.output))
    write_card(args.output, name, values, pope_of(place))


# ---- The hub -------------------------------------------------------------------------------------


def on_the_hub(name, act):
    """What `act(api)` returns; InputError in one line for whatever the server says against it."""
    hub = import_hub()
    try:
        return act(hub.HfApi())
    except Exception as e:          # of several libraries
        kind, reason = type(e).__name__, str(e).strip().partition("\n")[0]
        login = "Token" in kind or "401" in reason or "403" in reason
        cure = "hf auth login, with a token that may write" if login else "check name and network"
        raise InputError(f"--push {name}: {hub.constants.ENDPOINT} does not take it ({kind}: "
                         f"{reason}); {cure}") from e


def push(name, folder):
    def upload(api):
        return api.upload_folder(repo_id=name, folder_path=folder,
                                 commit_message="Exported by nanoHADPO")
    import_hub().utils.disable_progress_bars()
    on_the_hub(name, upload)
    print(f"{folder}: uploaded to {name}, which is private if it is new")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="trained checkpoint, LoRA adapter, or a base")
    add("output", metavar="OUT", help="folder to write; must not exist yet")
    add("--format", choices=FORMATS, default="llava-hf",
        help="transformers' layout, LLaVA's own, or LoRA alone for peft")
    add("--bits", type=int, choices=(4, 16), help="write LLaMA's linears in 4 bits, as "
        "bitsandbytes does, or in all 16; default: as the files are")
    add("--model_name_or_path", help="the base, where CKPT does not name it")
    add("--vision_tower", help="CLIP's folder, where base and CKPT name none that is there")
    add("--push", metavar="NAME", help="upload OUT to OWNER/NAME on the Hugging Face hub; default: "
        "nothing is uploaded")
    args = parser.parse_args()
    if os.path.lexists(args.output):
        raise InputError(f"{args.output}: exists already; name a new folder")
    check_output_folder(args.output, "OUT")
    check_can_write(os.path.dirname(os.path.realpath(args.output)))
    if args.push:
        if not is_name(args.push) or "@" in args.push:
            raise InputError(f"--push {args.push}: is no name of the hub's, OWNER/NAME")
        on_the_hub(args.push, lambda api: api.create_repo(args.push, private=True, exist_ok=True))
    try:
        export(args)
    except OSError as e:
        raise InputError(f"{args.output}: cannot be written ({e.strerror}); make room there, or "
                         "name another folder") from e
    print(f"{args.output}: {args.checkpoint} in the format {args.format}")
    if args.push:
        push(args.push, args.output)


if __name__ == "__main__":
    run_program(main)
