"""How a conversation is written: the templates of LLaVA's versions.

    v1        SYSTEM USER: question ASSISTANT: answer</s>USER: question ASSISTANT: ...
    mistral   [INST] question [/INST] answer </s>[INST] question [/INST] ...

`data.encode_conversation` makes tokens of it. Follows `vicuna_v1` and `mistral_instruct` in
`llava/conversation.py` of haotian-liu/LLaVA.
"""
from dataclasses import dataclass, replace

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
SYSTEM_HADPO_EVAL = SYSTEM.replace("user", "human")     # HA-DPO trains with the one, asks with this


@dataclass(frozen=True)
class Template:
    system: str = SYSTEM                        # in front of the first question; "" = nothing
    question: str = "USER: {} ASSISTANT:"
    closing: str = ""                           # between an answer and `</s>`
    around_image: tuple = ()                    # the ids of LLaVA v1's <im_start> and <im_end>


V1 = Template()
TEMPLATES = {"v1": V1, "mistral": Template("", "[INST] {} [/INST]", " ")}


def template_of(name, system, around_image=()):
    """A template, with another system sentence if it has one at all."""
    template = TEMPLATES[name]
    return replace(template, system=template.system and system, around_image=around_image)
