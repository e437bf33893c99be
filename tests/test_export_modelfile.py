"""The Modelfile against Ollama's documented grammar and template language; command lines against llama.cpp's.

Nothing of Ollama is at hand, so the references are written here: a reader of the documented grammar, and an
interpreter of the few parts of Go's text/template that its documentation shows. What the translated template
writes must be what the model's own template writes, jinja2 being the judge.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llamacpp
import pytest
from chat_formats import FORMATS, tokenizer_of
from handmade import CHAT_TEMPLATE, export, model_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from export import bundle
from export.shipping.commands import FLAGS, commands
from export.shipping.modelfile import Served, go_template, modelfile, quoted
from export.shipping.turns import Turns, describe
from foundation.chat import CHATML, Chat, ChatTemplate
from foundation.report import Silent

# ------------------------------------------------------------------- documented keys, copied as facts
# Ollama: docs/modelfile, "Valid Parameters and Values", and the table of instructions.
PARAMETERS = {
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float, "seed": int,
    "stop": str, "num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip
INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
# llama.cpp as pinned, common/arg.cpp: flags that llama-server and llama-cli both take, and the server's own.
COMMON = {"--model", "--ctx-size", "--temp", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--predict"}
SERVER = COMMON | {"--parallel", "--alias", "--lora-scaled", "--host", "--port"}

TRIPLE = '"' * 3
CONVERSATIONS = (
    "u", "uau", "uauau", "su", "suau", "suauau",
)  # fmt: skip
ROLES = {"s": "system", "u": "user", "a": "assistant"}
TEXTS = ("Кто ты?", "I am {{ nobody }}", "two\nlines", "<b>&</b>", "5 % 'quoted' \"words\"")


def parse(text: str) -> list[tuple[str, str, Any]]:
    """(instruction, parameter, value) of each line, by the documented grammar. ValueError for anything else."""
    out, rest = [], text
    while rest:
        line, _, after = rest.partition("\n")
        if not line.strip() or line.startswith("#"):
            rest = after
            continue
        match = re.match(r"([A-Za-z]+) (?:(?<=PARAMETER )(\w+) )?", rest)
        if match is None or match[1].upper() not in INSTRUCTIONS:
            raise ValueError(f"no instruction: {line!r}")
        value, rest = _value(rest[match.end() :])
        out.append((match[1].upper(), match[2] or "", value))
    return out


def _value(text: str) -> tuple[str, str]:
    """A quoted value ends where its quotes do, at the end of a line; a bare one at the end of its line."""
    for mark in (TRIPLE, '"'):
        if text.startswith(mark):
            end = re.compile(re.escape(mark) + r"(?:\n|$)").search(text, len(mark))
            if end is None:
                raise ValueError("a quote that does not end")
            inner = text[len(mark) : end.start()]
            if mark in inner or (mark == '"' and "\n" in inner):
                raise ValueError(f"a quote inside of quotes: {inner!r}")
            return inner, text[end.end() :]
    line, _, rest = text.partition("\n")
    return line, rest


def checked(text: str) -> list[tuple[str, str, Any]]:
    """`parse`, and every parameter of a documented name and type."""
    found = parse(text)
    assert [kind for kind, _, _ in found].count("FROM") == 1 and found[0][0] == "FROM"
    for kind, name, value in found:
        if kind == "PARAMETER":
            PARAMETERS[name](value)
    return found


# ------------------------------------------------------------------------------ Go's text/template, in part


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama hands to the model: .System is all system texts, .Messages every message."""
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    nodes, rest = _nodes(iter(parts), ())
    assert rest == "", "an {{ end }} too many"
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    listed = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    root = {"System": system, "Messages": listed, "Prompt": messages[-1]["content"]}
    return "".join(_run(nodes, {"$": root, ".": root}))


def _nodes(parts: Iterator[str], ends: tuple[str, ...]) -> tuple[list[Any], str]:
    """A list of nodes up to an action that begins with one of `ends`, and that action."""
    out: list[Any] = []
    for part in parts:
        action = part[2:-2].strip() if part.startswith("{{") else None
        if action is None:
            out.append(part)
        elif ends and action.split()[0] in ends:
            return out, action
        elif action.startswith("range "):
            inner, _ = _nodes(parts, ("end",))
            out.append(("range", action[6:], inner))
        elif action.startswith("if "):
            out.append(_branches(action[3:], parts))
        else:
            assert action.split()[0] not in ("end", "else"), action
            out.append(("value", action))
    return out, ""


def _branches(condition: str, parts: Iterator[str]) -> Any:
    then, action = _nodes(parts, ("end", "else"))
    if action.startswith("else if "):
        return ("if", condition, then, [_branches(action[8:], parts)])
    otherwise, _ = _nodes(parts, ("end",)) if action == "else" else ([], "")
    return ("if", condition, then, otherwise)


def _run(nodes: list[Any], scope: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif node[0] == "value":
            yield str(_evaluate(node[1], scope))
        elif node[0] == "if":
            yield from _run(node[2] if _evaluate(node[1], scope) else node[3], scope)
        else:
            names, _, over = node[1].rpartition(":=")
            index, _, item = (name.strip() for name in names.partition(","))
            for number, value in enumerate(_evaluate(over, scope)):
                yield from _run(node[2], scope | {".": value, index: number, item: value})


def _evaluate(expression: str, scope: dict[str, Any]) -> Any:
    words = re.findall(r'\(|\)|"[^"]*"|[^\s()]+', expression)
    value, rest = _call(words, scope)
    assert not rest, f"not understood: {rest}"
    return value


def _call(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    functions = {
        "eq": lambda a, b: a == b,
        "len": len,
        "slice": lambda a, b: a[b:],
        "and": lambda a, b: a and b,
        "not": lambda a: not a,
    }
    head, rest = words[0], words[1:]
    if head not in functions:
        return _operand(words, scope)
    arguments = []
    while rest and rest[0] != ")":
        value, rest = _operand(rest, scope)
        arguments.append(value)
    return functions[head](*arguments), rest


def _operand(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    head, rest = words[0], words[1:]
    if head == "(":
        value, rest = _call(rest, scope)
        assert rest[0] == ")"
        return value, rest[1:]
    if head.startswith('"'):
        return head[1:-1], rest
    if head.isdigit():
        return int(head), rest
    match = re.fullmatch(r"(\$\w*|)((?:\.\w+)*)", head)
    assert match and head, f"not an operand: {head!r}"
    value = scope[match[1] or "."]
    for field in filter(None, match[2].split(".")):
        value = value[field]
    return value, rest


def conversation(form: str) -> list[dict[str, str]]:
    return [{"role": ROLES[role], "content": TEXTS[n % len(TEXTS)]} for n, role in enumerate(form)]


def test_the_interpreter_computes_as_go_does() -> None:
    """By hand, from the documentation of text/template."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for template, wanted in (
        ("{{ .System }}-{{ $.System }}", "s-s"),
        ("{{ range .Messages }}[{{ .Role }}]{{ end }}", "[system][user]"),
        ("{{ range $i, $_ := .Messages }}{{ $i }}{{ if eq $i 1 }}!{{ else }}?{{ end }}{{ end }}", "0?1!"),
        ('{{ range .Messages }}{{ if eq .Role "x" }}a{{ else if eq .Role "user" }}b{{ end }}{{ end }}', "b"),
        ("{{ if and $.System (eq (len (slice $.Messages 1)) 1) }}one{{ end }}", "one"),
        ("{{ if not .System }}none{{ end }}.", "."),
    ):
        assert go(template, messages) == wanted


# ------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", FORMATS)
def test_families_are_translated_exactly(name: str, tmp_path: Path) -> None:
    """What Ollama would send is what the model's own template writes, less the bos that the engine puts."""
    chat = Chat(tokenizer_of(name, tmp_path))
    bos = FORMATS[name].bos or ""
    turns = describe(chat.render)
    assert turns is not None
    text = modelfile(Served("gguf/a.gguf", 8192, {"stop": []}, ""), turns, True, bos)
    template = next(value for kind, _, value in checked(text) if kind == "TEMPLATE")
    for form in CONVERSATIONS:
        if form.startswith("s") and name == "gemma2":
            assert "refuses a system text" in text
            continue
        assert bos + go(template, conversation(form)) == chat.render(conversation(form), prompt=True), form
    assert ("removes white space" in text) == (name in ("llama3", "gemma2", "gemma3", *MISTRALS))


MISTRALS = ("mistral-v0.1", "mistral-v0.3", "mistral-nemo")  # they trim what the assistant said


@pytest.mark.parametrize(
    "source",
    [
        CHATML,  # the quickstart's models: adaptation.scratch
        CHAT_TEMPLATE,
        CHATML.replace("<|im_end|>\n", "<|im_end|>"),
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",  # Zephyr
        "{% for m in messages %}{{ {'user': 'U', 'system': 'S', 'assistant': 'A'}[m.role] }}: {{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}",  # one of nobody's
    ],
)
def test_templates_of_turns_are_translated(source: str) -> None:
    template = ChatTemplate(source, "test")
    turns = describe(template.render)
    assert turns is not None
    written = go_template(turns)
    assert written is not None
    for form in CONVERSATIONS:
        assert go(written, conversation(form)) == template.render(conversation(form), prompt=True)


OF_OUR_FAMILIES = {
    "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
}  # fmt: skip


@pytest.mark.slow
def test_real_templates_are_translated_exactly_or_not_at_all() -> None:
    """Some seventy templates of published models, as llama.cpp keeps them for its own tests."""
    translated = set()
    for path in sorted((llamacpp.sources() / "models" / "templates").glob("*.jinja")):
        template = ChatTemplate(path.read_text(), path.name, {"bos_token": "<s>", "eos_token": "</s>"})
        turns = describe(template.render)
        if turns is None:
            continue
        translated.add(path.stem)
        written = go_template(turns)
        assert written is not None
        for form in CONVERSATIONS:
            if turns.place != "nowhere" or "s" not in form:
                said = template.render(conversation(form), prompt=True)
                assert go(written, conversation(form)) == said, (path.name, form)
    assert translated >= OF_OUR_FAMILIES
    assert len(translated) > 50


def test_chatml_is_short_and_takes_any_role() -> None:
    turns = describe(ChatTemplate(CHATML, "test").render)
    assert turns is not None and go_template(turns) == (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[-1].content }}",  # forgets
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}",
        CHATML.replace("message['content']", "message['content'] | replace('\n', ' ')"),
        "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}",  # counts
        "{{ messages | length }}" + CHATML,
        "{% if messages | length > 4 %}long{% endif %}" + CHATML,
        "{{ undefined.attribute }}",
        "{% for m in messages %}{% endfor %}x",
        "{% set system = messages[0].role == 'system' %}{% for m in messages if m.role != 'system' %}"
        "<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if system %}!{% endif %}<assistant>",  # drops a text
    ],
)
def test_other_templates_are_said_to_be_untranslated(source: str) -> None:
    assert describe(ChatTemplate(source, "test").render) is None
    text = modelfile(Served("gguf/a.gguf", 8192, {}, "MIT"), None, True)
    assert not [kind for kind, _, _ in checked(text) if kind == "TEMPLATE"]
    assert "# The chat template is not one that Samovar can write" in text


def test_a_base_model_goes_on_from_the_prompt() -> None:
    found = checked(modelfile(Served("gguf/a.gguf", 512, {}, ""), None, False))
    assert ("TEMPLATE", "", "{{ .Prompt }}") in found


def test_bos_is_left_to_the_engine_only_where_it_puts_it() -> None:
    plain = Turns("<s>", ("[", "]"), ("", "</s>"), "")
    served = Served("a.gguf", 1, {}, "")
    assert "TEMPLATE" in modelfile(served, plain, True) and '"<s>{{' in modelfile(served, plain, True).replace(
        TRIPLE, '"'
    )
    assert "<s>" not in modelfile(served, plain, True, "<s>")
    inside = Turns("", ("<s>[", "]"), ("", "</s>"), "")  # Llama 2 puts it before every question
    assert not [kind for kind, _, _ in parse(modelfile(served, inside, True, "<s>")) if kind == "TEMPLATE"]


@pytest.mark.parametrize("engine_puts_it", [True, False])
def test_bos_of_a_whole_bundle_is_written_once(tmp_path: Path, engine_puts_it: bool) -> None:
    folder = model_folder(tmp_path / "hf", "gemma3_text", vocab_size=800)
    tokenizer_of("gemma3", folder)
    if engine_puts_it:
        path = folder / "tokenizer.json"
        told = json.loads(path.read_text())
        number = next(token["id"] for token in told["added_tokens"] if token["content"] == "<bos>")
        one = {"Sequence": {"id": "A", "type_id": 0}}
        told["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, one],
            "pair": [one, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [number], "tokens": ["<bos>"]}},
        }
        path.write_text(json.dumps(told))
    source = export(folder, tmp_path / "g")
    bundle.run(bundle.Settings(), {"model": folder, "gguf": source}, tmp_path, Silent())
    found = checked((tmp_path / "bundle" / "Modelfile").read_text())
    template = next(value for kind, _, value in found if kind == "TEMPLATE")
    assert template.count("<bos>") == (0 if engine_puts_it else 1)


def test_actions_in_a_template_are_not_run_by_ollama() -> None:
    for text in ("{{ .System }}", "a {"):
        turns = Turns("", (text, ""), ("", ""), "")
        assert go_template(turns) is None
        assert "not one that Samovar can write" in modelfile(Served("a.gguf", 1, {}, ""), turns, True)


# --------------------------------------------------------------------------------------------- quoting


@given(st.text(alphabet=st.sampled_from('"\n\r\t \\#FROMaя\x00'), max_size=12))
@settings(max_examples=500, deadline=None)
def test_no_text_breaks_out_of_its_quotes(text: str) -> None:
    made = quoted(text)
    if made is None:
        return
    following = "PARAMETER seed 1\n"
    assert parse(f"SYSTEM {made}\n{following}") == [("SYSTEM", "", text), ("PARAMETER", "seed", "1")]


def test_hostile_strings_add_no_instruction() -> None:
    evil = ('a"b', f"{TRIPLE}\nFROM evil", "x\nFROM evil", '"\nFROM evil', "a\r\nFROM evil", "\\", "<|im_end|>")
    served = Served("gguf/a.gguf", 512, {"stop": list(evil)}, f"MIT{TRIPLE}\nFROM evil")
    for name in ("start", "ask", "default"):
        turns = Turns(
            **{"start": "", "user": ("u", "\n"), "answer": ("a", "\n"), "ask": "", "place": "turn"}
            | {name: evil[1]}
        )
        found = checked(modelfile(served, turns, True))
        assert [value for kind, _, value in found if kind == "FROM"] == ["./gguf/a.gguf"]
        assert [value for _, name, value in found if name == "stop"] == ['a"b', "\\", "<|im_end|>"]
        assert {kind for kind, _, _ in found} == {"FROM", "PARAMETER"}


def test_sampling_is_written_in_ollamas_types() -> None:
    told = {"temperature": 1, "top_k": 20, "top_p": 1e-05, "min_p": 0.0, "max_new_tokens": 99, "stop": []}
    found = {
        name: value for kind, name, value in checked(modelfile(Served("a", 9, told, ""), None, False)) if name
    }
    assert found == {
        "num_ctx": "9", "temperature": "1.0", "top_k": "20", "top_p": "1e-05", "min_p": "0.0",
        "num_predict": "99", "repeat_penalty": "1.0",  # which is 1.1 in Ollama unless it is told
    }  # fmt: skip


# --------------------------------------------------------------------------------------- command lines


def flags(line: list[str]) -> list[str]:
    return [word for word in line if word.startswith("--")]


def test_flags_are_those_of_llama_cpp() -> None:
    told: dict[str, Any] = dict.fromkeys(FLAGS, 1)
    lines = commands("tiny", "gguf/a.gguf", 100_000, told, ["adapters/x.gguf"])
    assert set(flags(lines["llama-server"])) <= SERVER
    assert set(flags(lines["llama-cli"])) <= COMMON
    assert set(FLAGS.values()) <= set(flags(lines["llama-server"]))
    assert lines["llama-server"][:5] == ["llama-server", "--model", "gguf/a.gguf", "--ctx-size", "8192"]


@pytest.mark.slow
def test_flags_stand_in_the_pinned_source() -> None:
    source = (llamacpp.sources() / "common" / "arg.cpp").read_text()
    assert [flag for flag in sorted(SERVER) if f'"{flag}"' not in source] == []


@pytest.fixture(scope="module")
def tools() -> Path:
    """llama.cpp's own programs, of the version that llama-cpp-python pins."""
    named = os.environ.get("SAMOVAR_LLAMA_TOOLS")
    if not named or not (Path(named) / "llama-server").is_file():
        pytest.skip("llama.cpp's tools are not at hand: SAMOVAR_LLAMA_TOOLS names no folder with llama-server")
    return Path(named)


def test_the_server_lists_every_flag(tools: Path) -> None:
    said = subprocess.run([tools / "llama-server", "--help"], capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said))
    assert listed >= SERVER


@pytest.mark.slow
def test_the_server_starts_on_a_bundle_and_answers(tools: Path, tmp_path: Path) -> None:
    from test_export_bundle import lora

    folder = model_folder(tmp_path / "hf")
    source = export(folder, tmp_path / "g", model_name="tiny")
    inputs = {"model": folder, "gguf": source, "adapters": lora(tmp_path / "polite.gguf")}
    bundle.run(bundle.Settings(), inputs, tmp_path, Silent())
    index = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    line = index["commands"]["llama-server"]
    assert shlex.join(line) in (tmp_path / "bundle" / "README.md").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(tools / line[0]), *line[1:], "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path / "bundle", stdout=log, stderr=log)
    try:
        assert _get(server, f"http://127.0.0.1:{port}/health", tmp_path / "log") == {"status": "ok"}
        models = _get(server, f"http://127.0.0.1:{port}/v1/models", tmp_path / "log")
        assert models["data"][0]["id"] == "tiny"
        adapters = _get(server, f"http://127.0.0.1:{port}/lora-adapters", tmp_path / "log")
        assert [(a["path"], a["scale"]) for a in adapters] == [("adapters/polite.gguf", 0.0)]
        alone, polite = (_answer(port, {"lora": [{"id": 0, "scale": scale}]}) for scale in (0.0, 1.0))
        assert _answer(port, {}) == alone != polite  # who names no adapter gets none
    finally:
        server.terminate()
        server.wait(20)


def _answer(port: int, more: dict[str, Any]) -> str:
    asked = {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 8, "cache_prompt": False, **more}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(request, timeout=60))
    assert 0 < answer["usage"]["completion_tokens"] <= 8
    return str(answer["choices"][0]["message"])


def _get(server: subprocess.Popen[bytes], url: str, log: Path) -> Any:
    """The JSON at `url`, once the server is up."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            return json.load(urllib.request.urlopen(url, timeout=5))
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer at {url}: {log.read_text()[-2000:]}")
