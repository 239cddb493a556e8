"""Small chat templates of the kinds that real models have, with transformers' markers around what an answer is.

A model's own template has no markers: `tokenizer_of` removes them, and `marked` keeps them for the reference.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

MARKERS = re.compile(r"\{% (end)?generation %\}")
BEGIN, END = "{% generation %}", "{% endgeneration %}"


@dataclass(frozen=True)
class Model:
    """A chat model's tokenizer: its template with markers, special tokens, and the ids at which it stops by name.

    Attributes:
        stops: end tokens of generation_config.json.
    """

    template: str
    specials: tuple[str, ...]
    eos: str
    stops: tuple[str, ...] = ()
    bos: str | None = None


_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
)
_CHATML_TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
_CHATML_OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)

GEMMA = Model(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    f"{BEGIN}{{{{ m.content | trim + '<end_of_turn>' }}}}{END}{{{{ '\n' }}}}"
    "{% else %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<eos>",
    ("<eos>", "<end_of_turn>"),
    "<bos>",
)
PHI3 = Model(  # ends the text, but not each turn, with the end of sequence
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
    f"{BEGIN}{{{{ m.content + '<|end|>' }}}}{END}{{{{ '\n' }}}}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "<|endoftext|>",
    ("<|endoftext|>", "<|assistant|>", "<|end|>"),
)
QWEN2 = Model(
    _CHATML_TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    f"{BEGIN}{{{{ m.content or '' }}}}{_CALLS}{{{{ '<|im_end|>' }}}}{END}{{{{ '\n' }}}}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _CHATML_OPENING,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "<|endoftext|>",
    ("<|im_end|>", "<|endoftext|>"),
)
QWEN3 = Model(  # thoughts of answers before the last question are left out
    _CHATML_TOOLS + _LAST_QUESTION + "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content, thoughts = m.content or '', m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    f"{BEGIN}{{% if loop.index0 > ns.last and (loop.last or thoughts) %}}"
    "{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    f"{_CALLS}{{{{ '<|im_end|>' }}}}{END}{{{{ '\n' }}}}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _CHATML_OPENING,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "<|im_end|>",
    ("<|im_end|>", "<|endoftext|>"),
)
LLAMA3 = Model(  # names the date; writes a call instead of the content
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') }}"
    "{% if tools %}{{ '\n' + (tools | tojson) }}{% endif %}{{ '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}"
    f"{BEGIN}{{% if 'tool_calls' in m %}}{{% if m.tool_calls | length != 1 %}}"
    "{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ (m.tool_calls[0].function.arguments | tojson) + '}' }}"
    f"{{% else %}}{{{{ m.content | trim }}}}{{% endif %}}{{{{ '<|eot_id|>' }}}}{END}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    "<|eot_id|>",
    ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "<|begin_of_text|>",
)
MISTRAL = Model(  # no opening of an answer, a space before it, tools before the last question
    _LAST_QUESTION + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% elif m.role == 'assistant' %}"
    f"{BEGIN}{{% if m.tool_calls %}}{{{{ '[TOOL_CALLS] [' }}}}{{% for c in m.tool_calls %}}"
    "{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
    f"{{% else %}}{{{{ ' ' + m.content | trim + eos_token }}}}{{% endif %}}{END}"
    "{% else %}{{ raise_exception('only user, tool and assistant') }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    "</s>",
    ("</s>",),
    "<s>",
)
HEADLESS = Model(  # ignores add_generation_prompt, so the model has to learn the header of its turn
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    f"{BEGIN}{{{{ '<|assistant|>' + m.content + eos_token }}}}{END}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endif %}{% endfor %}",
    ("</s>", "<|assistant|>", "<|user|>", "<|system|>"),
    "</s>",
)
R1 = Model(  # opens the thoughts in the prompt, and leaves them out of every finished turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}{{ '<|Assistant|><|tool_calls|>' }}"
    "{% for c in m.tool_calls %}{{ c.function.name + '\n' + c.function.arguments }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '<|tool|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ("<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<|tool_calls|>", "<|tool|>"),
    "<eos>",
    bos="<bos>",
)


def tokenizer_of(model: Model, folder: Path | None = None, marked: bool = False):
    """Returns a tokenizer of one token per byte; with `folder` it is that of a model with a generation_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*model.specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(model.specials))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=model.bos, eos_token=model.eos)
    fast.chat_template = model.template if marked else MARKERS.sub("", model.template)
    if folder is not None:
        ends = [vocab[token] for token in model.stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        fast.name_or_path = str(folder)
    return fast
