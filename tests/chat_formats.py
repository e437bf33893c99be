"""Chat formats of well-known families: templates written for these tests, and what they must render.

Each template renders what the family's own one renders for plain conversations; the expected texts are written
out by hand. Answers stand in {% generation %} blocks from where the generation prompt ends to the end token, so
that transformers' own mask can be the reference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from handmade import byte_level, sentencepiece_like

from foundation.tokenizer import Tokenizer


@dataclass(frozen=True)
class Format:
    """`special`: control tokens. `plain`: added tokens that are not special. `end`: what closes an answer."""

    template: str
    special: tuple[str, ...]
    end: str
    eos: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    sentencepiece: bool = False


QWEN2_5 = Format(
    """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role + '\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}""",
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    "<|im_end|>",
)

# The last answer gets an empty block of thoughts; answers before the last question lose theirs.
QWEN3 = Format(
    """\
{%- set last = namespace(question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}<|im_start|>{{ message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thoughts = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' %}
        {%- set said = parts[-1].lstrip('\n') %}
        {%- generation %}
            {%- if loop.index0 > last.question and (loop.last or thoughts) -%}
                {{ '<think>\n' + thoughts + '\n</think>\n\n' }}
            {%- endif -%}
            {{ said }}<|im_end|>
        {%- endgeneration %}
    {%- else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}""",
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    "<|im_end|>",
    plain=("<think>", "</think>"),
)

LLAMA3 = Format(
    """\
{{- bos_token }}
{%- set now = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set date = date_string if date_string is defined else now %}
{%- if messages[0].role == 'system' %}
    {%- set system, rest = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date + '\n\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|eot_id|>",
    "<|eot_id|>",
    bos="<|begin_of_text|>",
)

_GEMMA_TURNS = """\
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}{{ (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
_GEMMA: dict[str, Any] = {
    "special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "end": "<end_of_turn>",
    "eos": "<eos>",  # not what ends a turn
    "bos": "<bos>",
}
GEMMA2 = Format(
    """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set first, rest = '', messages %}
"""
    + _GEMMA_TURNS,
    **_GEMMA,
)
GEMMA3 = Format(
    """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first, rest = messages[0].content + '\n\n', messages[1:] %}
{%- else %}
    {%- set first, rest = '', messages %}
{%- endif %}
"""
    + _GEMMA_TURNS,
    **_GEMMA,
)

_MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system, rest = messages[0].content + '\n\n', messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{%- set last = (rest | selectattr('role', 'equalto', 'user') | list) | length %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' -%}
        {{ '[INST]SPACE' + (system if loop.index0 // 2 + 1 == last else '') + message.content + '[/INST]' }}
    {%- else %}
        {%- generation %}{{ 'SPACE' + message.content | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
_INST: dict[str, Any] = {"end": "</s>", "eos": "</s>", "bos": "<s>"}
MISTRAL_V3 = Format(
    _MISTRAL.replace("SPACE", " "),
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    **_INST,
    sentencepiece=True,
)
NEMO = Format(_MISTRAL.replace("SPACE", ""), ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), **_INST)
# The same text, but [INST] is no token, and a space stands before every text that is encoded.
MISTRAL_V1 = Format(_MISTRAL.replace("SPACE", " "), ("<unk>", "<s>", "</s>"), **_INST, sentencepiece=True)

FORMATS = {
    "qwen2.5": QWEN2_5,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "mistral-v0.1": MISTRAL_V1,
    "mistral-v0.3": MISTRAL_V3,
    "mistral-nemo": NEMO,
}


@cache
def _backend(name: str) -> str:
    """tokenizer.json of a small vocabulary with the family's control tokens and its way with spaces."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

    chosen = FORMATS[name]
    made = Tokenizer.from_str(sentencepiece_like() if chosen.sentencepiece else byte_level())
    if chosen.sentencepiece:  # without Strip: a space that is put first is to be seen
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence(steps)
    if name == "mistral-v0.3":
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chosen.special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in chosen.plain])
    return made.to_str()


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    """The tokenizer of a format in `folder`, which transformers can load too."""
    chosen = FORMATS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_backend(name), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chosen.template, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": chosen.eos,
        "bos_token": chosen.bos,
        "pad_token": chosen.eos,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer(folder)
