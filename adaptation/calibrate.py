"""Self-calibration data: an instruction-tuned model's own answers, and tasks of copying.

After LEP (arXiv 2412.21140) a model has new embeddings under layers that were tuned over the old ones. It is
brought back to itself with its own greedy answers, taken before the vocabulary changed, some 13,500 that passed
a judge, and 10,000 tasks of copying a text. This stage makes that data. The tuning on it is distill.train with
loss = "ce": rendered with the new tokenizer, the same words are learnt in new tokens.

`model` is therefore the instruction-tuned model in its own vocabulary. Its answers are filtered by what their
text tells: whether they end, repeat themselves, or are in another script than the question. Refusals stay:
they are how this model behaves, and that is what is to be kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from adaptation.answers import Answer, Ledger, answer_all
from adaptation.copying import PLACE, WORDINGS, copy_tasks
from foundation.chat import Chat
from foundation.dataio import Message, checked_messages, documents, records, write_jsonl
from foundation.errors import InputError, ModelError
from foundation.files import DigestCache
from foundation.filters import script_share, text_filter
from foundation.model import context_tokens, load
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, Reads, many, one
from foundation.tokenizer import Tokenizer

WINDOW = 30  # characters: some five words, more than two honest sentences share


class Settings(StageSettings):
    """What is asked, what is kept of the answers, and how many copy tasks stand beside them."""

    prompts: int = Field(0, ge=0, description="prompts that are asked, drawn by the seed; 0 = all")
    answer_tokens: int = Field(
        512, ge=1, le=32768, description="longest answer; one that does not end within is rejected"
    )
    min_characters: int = Field(1, ge=1, description="shorter answers are rejected")
    repeated_share: float = Field(
        0.3, ge=0, le=1, description=f"share of an answer's {WINDOW}-character windows that may repeat"
    )
    script: Literal["prompt", "any", "cyrillic", "russian", "latin"] = Field(
        "prompt", description="script that the answer's letters should have; prompt = the question's own"
    )
    script_share: float = Field(0.5, ge=0, le=1, description="least share of letters in `script`")
    same_answer: int = Field(3, ge=1, description="how often one and the same answer is kept")
    copy_tasks: int = Field(0, ge=0, description="tasks of copying a passage of `corpus`")
    copy_min_characters: int = Field(60, ge=1, description="shortest passage that is copied")
    copy_max_characters: int = Field(1000, ge=2, le=100_000, description="longest passage that is copied")
    copy_wordings: tuple[str, ...] = Field(
        WORDINGS, min_length=1, description=f"how copying is asked for; {PLACE} is the passage"
    )
    precision: Literal["fp32", "bf16", "nf4"] = Field(
        "fp32", description="of the model's weights; a GPU wants bf16, or nf4 (4 bits, bitsandbytes)"
    )
    batch_rows: int = Field(16, ge=1, description="prompts answered side by side: the most a kill can cost")

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        wrong = [f"copy_wordings: {w!r:.60} does not say {PLACE} once" for w in self.copy_wordings
                 if w.count(PLACE) != 1]  # fmt: skip
        if self.copy_min_characters >= self.copy_max_characters:
            wrong.append(
                f"copy_min_characters = {self.copy_min_characters} must be below "
                f"copy_max_characters = {self.copy_max_characters}"
            )
        if self.script == "any" and self.changed(["script_share"]):
            wrong.append("script_share has no effect with script = 'any'")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def disagreements(settings: Settings, reads: Reads) -> list[str]:
    """What can not go together in a recipe: the copy tasks, and the corpus that they are taken from."""
    return _corpus_trouble(settings, "corpus" in reads)


def _corpus_trouble(settings: Settings, has_corpus: bool) -> list[str]:
    if bool(settings.copy_tasks) == has_corpus:
        return []
    if has_corpus:
        return ["corpus: has no effect with copy_tasks = 0; set copy_tasks, or leave it out"]
    return [f"copy_tasks = {settings.copy_tasks} needs a corpus; reads = {{ corpus = ... }}"]


class Rejected(NamedTuple):
    """A prompt or answer that was not kept. The first word of `reason` names it in counts."""

    reason: str
    messages: list[Message]

    @property
    def name(self) -> str:
        return self.reason.partition(":")[0]


class Prompt(NamedTuple):
    """A conversation that awaits an answer, and its ids."""

    messages: list[Message]
    ids: list[int]


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/data.jsonl (answers, then copy tasks), out/rejected.jsonl and out/answers.jsonl.

    Raises InputError for prompts that are none or a corpus with too few passages, ModelError for a model that
    can not chat or whose answers are all rejected, StopRequested with every answered batch on disk.
    """
    if wrong := _corpus_trouble(settings, "corpus" in inputs):
        raise InputError(wrong[0])
    folder, rejected = one(inputs, "model"), list[Rejected]()
    tokenizer = Tokenizer(folder)
    chat = Chat(tokenizer)
    context = context_tokens(folder)
    prompts = _prompts(settings, many(inputs, "prompts"), chat, context, rejected, report)
    copies = _copies(settings, many(inputs, "corpus"), chat, context, report)
    ledger = Ledger(out / ".work" / "answers.jsonl", report)
    try:
        answers = answer_all(
            [prompt.ids for prompt in prompts],
            lambda: load(folder, precision=settings.precision),
            f"{DigestCache().content(folder)} {settings.precision}",
            tokenizer,
            ledger,
            report,
            answer_tokens=settings.answer_tokens,
            batch_rows=settings.batch_rows,
        )
        with (out / "answers.jsonl").open("wb") as file:
            file.writelines(ledger.published())
    finally:
        ledger.close()
    kept = _kept(settings, prompts, answers, rejected, report)
    write_jsonl(out / "data.jsonl", ({"messages": messages} for messages in [*kept, *copies]))
    write_jsonl(out / "rejected.jsonl", (each._asdict() for each in rejected))
    return {
        "asked": len(prompts),
        "kept": len(kept),
        "copies": len(copies),
        "rejected": len(rejected),
        "answer_tokens": sum(answer.tokens for answer in answers),
        **{f"rejected_{name}": count for name, count in sorted(_counts(rejected).items())},
    }


# --------------------------------------------------------------------------------------------- what is asked


def asked(paths: Iterable[Path]) -> Iterator[list[Message]]:
    """What each line asks: its "messages", less an answer at their end, or its "prompt".

    Raises InputError, by file and line, where nothing is asked, and for a file without lines.
    """
    for path in paths:
        number = 0
        for number, record in records(path):
            yield _asked(record, f"{path}, line {number}")
        if not number:
            raise InputError(f"{path}: holds no prompt", hint="every line is blank")


def _asked(record: dict[str, Any], where: str) -> list[Message]:
    if "messages" in record:
        messages = checked_messages(record["messages"], where, answered=False)
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    elif isinstance(record.get("prompt"), str):
        messages = [{"role": "user", "content": record["prompt"]}]
    else:
        raise InputError(
            f'{where}: neither "messages" nor a text under "prompt"; the keys are {sorted(record)[:8]}',
            hint='{"messages": [{"role": "user", "content": ...}]}, or {"prompt": ...}',
        )
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise InputError(f"{where}: nothing is asked; what is to be answered must be a user's message")
    return messages


def _prompts(
    settings: Settings,
    paths: Sequence[Path],
    chat: Chat,
    context: int,
    rejected: list[Rejected],
    report: Report,
) -> list[Prompt]:
    """The prompts that can be asked, in the order of the files, no two alike; the others go to `rejected`."""
    found: dict[bytes, list[Message]] = {}
    for messages in asked(paths):
        draw = _draw(settings.seed, messages)
        if draw in found:
            rejected.append(Rejected("repeated: this prompt stands before", messages))
        found.setdefault(draw, messages)
    chosen = set(sorted(found)[: settings.prompts or None])
    prompts = []
    for draw, messages in found.items():
        if draw not in chosen:
            continue
        try:
            ids = chat.prompt_ids(messages)
        except (InputError, ModelError) as error:  # a system prompt for Gemma, two questions in a row, ..
            rejected.append(Rejected(f"template: {error.message}", messages))
            continue
        if len(ids) + settings.answer_tokens > context:
            reason = f"context: {len(ids)} tokens and an answer of {settings.answer_tokens} exceed {context}"
            rejected.append(Rejected(reason, messages))
            continue
        prompts.append(Prompt(messages, ids))
    if not prompts:
        reason = next(each.reason for each in rejected if each.name != "repeated")
        raise InputError(
            f"none of {len(chosen)} prompts can be asked: {_said(rejected)}; the first: {reason}",
            hint="give prompts that the chat template takes; a lower answer_tokens leaves more room for them",
        )
    if earlier := sum(any(m["role"] == "assistant" for m in prompt.messages) for prompt in prompts):
        report.note(
            f"{earlier} prompts hold earlier answers, which are not the model's own; a tuning that reads whole "
            "conversations counts them too"
        )
    return prompts


def _draw(seed: int, messages: list[Message]) -> bytes:
    text = json.dumps([seed, messages], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _copies(
    settings: Settings, paths: Sequence[Path], chat: Chat, context: int, report: Report
) -> list[list[Message]]:
    """The copy tasks that fit the model. Raises InputError as `copy_tasks` does."""
    if not settings.copy_tasks:
        return []
    tasks = copy_tasks(
        documents(paths),
        settings.copy_tasks,
        shortest=settings.copy_min_characters,
        longest=settings.copy_max_characters,
        wordings=settings.copy_wordings,
        seed=settings.seed,
        report=report,
    )
    fitting = [task for task in tasks if _fits(chat, task, context)]
    if not fitting:
        raise InputError(
            f"none of {len(tasks)} copy tasks fits {context} tokens, the model's context",
            hint="lower copy_max_characters",
        )
    if len(fitting) < len(tasks):
        report.note(
            f"{len(tasks) - len(fitting)} of {len(tasks)} copy tasks do not fit {context} tokens and are left "
            "out; a lower copy_max_characters keeps them"
        )
    return fitting


def _fits(chat: Chat, task: list[Message], context: int) -> bool:
    try:
        return max(len(row.ids) for row in chat.encode(task)) <= context
    except InputError:  # a passage spells what this vocabulary can not write as plain text
        return False


# ---------------------------------------------------------------------------------------------- what is kept


def _kept(
    settings: Settings,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    rejected: list[Rejected],
    report: Report,
) -> list[list[Message]]:
    """The answered conversations that pass; the others go to `rejected`. Raises ModelError where none does."""
    kept: list[list[Message]] = []
    faulty: list[Rejected] = []
    seen: Counter[str] = Counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
        reason = fault(settings, prompt.messages[-1]["content"], answer)
        if not reason:
            said = " ".join(answer.text.casefold().split())
            seen[said] += 1
            if seen[said] > settings.same_answer:
                reason = f"same: kept {settings.same_answer} times already"
        if reason:
            faulty.append(Rejected(reason, messages))
        else:
            kept.append(messages)
    report.note(f"{len(kept)} of {len(prompts)} answers kept; rejected: {_said(faulty) or 'none'}")
    if not kept:
        raise ModelError(
            f"all {len(prompts)} answers were rejected: {_said(faulty)}; the first: {faulty[0].reason}",
            hint="`unended` wants a higher answer_tokens, `script` another script or a lower script_share; a "
            "model that only repeats itself was not tuned to chat, or its chat template is another's",
        )
    rejected += faulty
    return kept


def fault(settings: Settings, question: str, answer: Answer) -> str:
    """Why an answer is not kept, or ""."""
    if not answer.ended:
        return f"unended: {answer.tokens} tokens"
    if reason := text_filter(settings.min_characters, 0, "any", 0)(answer.text):
        return reason
    if (share := repeated_share(answer.text)) > settings.repeated_share:
        return f"repeats: {share:.2f} of it"
    if settings.script == "any" or not any(map(str.isalpha, answer.text)):
        return ""
    for script in ("cyrillic", "latin") if settings.script == "prompt" else (settings.script,):
        if settings.script == "prompt" and script_share(question, script) <= 0.5:  # not the question's own
            continue
        if (share := script_share(answer.text, script)) < settings.script_share:
            return f"script: {share:.2f} of the letters are {script}"
    return ""


def repeated_share(text: str) -> float:
    """Share of the windows of WINDOW characters that stand in `text` before; 0 for a text of one window."""
    windows = [text[start : start + WINDOW] for start in range(len(text) - WINDOW + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def _counts(rejected: Iterable[Rejected]) -> Counter[str]:
    return Counter(each.name for each in rejected)


def _said(rejected: Iterable[Rejected]) -> str:
    return ", ".join(f"{name} {count}" for name, count in _counts(rejected).most_common())
