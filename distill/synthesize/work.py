"""The work itself: rounds of prompts, candidates through the filters, one kept, all counted.

Everything is decided in the order of the prompts and from the answers alone, so a run that was killed comes
to the same files by walking through its ledger. A round is asked as a whole; with choose = "first" the next
candidate is asked only of prompts that have none yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from distill.synthesize import shape
from distill.synthesize.asks import Ask, Reply, Teacher, seed_of
from distill.synthesize.duplicates import NearDuplicates
from distill.synthesize.ledger import Ledger
from distill.synthesize.plan import Plan, Record, Task
from distill.synthesize.template import ANSWER
from foundation.dataio import Message
from foundation.errors import ModelError, StopRequested
from foundation.filters import text_filter
from foundation.report import Report, stop_if_asked
from foundation.stage import Figures


@dataclass
class Prompt:
    """One question: its record, the placeholders as filled, and the chat for the teacher."""

    number: int
    record: Record
    fields: dict[str, str]
    messages: list[Message]


@dataclass
class Candidate:
    """One answer to a prompt. `reason`: why it was rejected, "" while it is not."""

    number: int
    reply: Reply
    reason: str = ""
    answer: dict[str, str] = field(default_factory=dict)
    pair: list[Message] = field(default_factory=list)
    score: int = 0


class Synthesis:
    """One run over a plan."""

    def __init__(self, plan: Plan, teacher: Teacher, ledger: Ledger, report: Report) -> None:
        self.plan, self.settings = plan, plan.settings
        self.teacher, self.ledger, self.report = teacher, ledger, report
        settings = self.settings
        self._text_reason = text_filter(
            settings.min_characters, settings.max_characters, settings.script,
            settings.script_share if settings.script != "any" else 0.0,
        )  # fmt: skip
        self._near = NearDuplicates(settings.duplicate_jaccard) if settings.duplicate_jaccard else None
        for number, pair in enumerate(plan.seed_pairs(), 1):
            if self._near:
                self._near.add(f"seed {number}", self._compared(pair))
        self._pool: list[Task] = []
        self._counts: Counter[str] = Counter()
        self._rules: Counter[str] = Counter()
        self._barren = 0  # prompts in a row without a kept answer
        self._done = 0
        self._example = ""  # of a rejected answer, for the error that gives up

    def run(self, out: Path) -> Figures:
        """Write data.jsonl, provenance.jsonl and rejected.jsonl. Raises ModelError when nothing is kept."""
        records, size = self.plan.records, self.settings.batch_prompts
        with ExitStack() as files:
            names = ("data", "provenance", "rejected")
            opened = [
                files.enter_context((out / f"{name}.jsonl").open("w", encoding="utf-8")) for name in names
            ]
            for start in range(0, len(records), size):
                stop_if_asked(self.report)
                prompts = [
                    self._prompt(start + place, record)
                    for place, record in enumerate(records[start : start + size])
                ]
                tried, kept = self._round(prompts)
                self._write(prompts, tried, kept, opened)
                self._give_up_if_barren(prompts, kept)
                self._done += len(prompts)
                self._progress()
        if not self._counts["kept"]:
            raise self._nothing()
        for rule, count in self._rules.most_common():
            self.report.note(f"the validator's rule {rule} was broken by {count} answers")
        return self.figures()

    def figures(self) -> Figures:
        """Counts so far. `yield` is kept answers for each prompt; `cost` in the unit of the prices."""
        counts = self._counts
        reasons = {
            f"rejected_{k.partition(' ')[2]}": v for k, v in sorted(counts.items()) if k.startswith("rejected ")
        }
        named = ("asked", "candidates", "judged", "kept", "spare", "tokens_in", "tokens_out")
        return {
            "prompts": self._done,
            **{name: counts[name] for name in named},
            **reasons,
            "rejected": sum(reasons.values()),
            "yield": round(counts["kept"] / max(1, self._done), 4),
            "cost": self._cost(),
        }

    def _cost(self) -> float:
        prices = self.settings
        spent = self._counts["tokens_in"] * prices.price_in + self._counts["tokens_out"] * prices.price_out
        return round(spent / 1e6, 6)

    def _prompt(self, number: int, record: Record) -> Prompt:
        whole = self.plan.whole(record)
        fields = self.plan.fields(whole, number, self._pool)
        return Prompt(number, whole, fields, self.plan.template.ask(fields))

    def _round(self, prompts: list[Prompt]) -> tuple[dict[int, list[Candidate]], dict[int, Candidate]]:
        """Candidates by prompt, and the kept one of each prompt that has one."""
        tried: dict[int, list[Candidate]] = {prompt.number: [] for prompt in prompts}
        kept: dict[int, Candidate] = {}
        numbers = range(self.settings.candidates)
        for wave in [[n] for n in numbers] if self.settings.choose == "first" else [list(numbers)]:
            waiting = [prompt for prompt in prompts if prompt.number not in kept]
            pairs = [(prompt, number) for prompt in waiting for number in wave]
            replies = self._ask([self._question(prompt, number) for prompt, number in pairs])
            made = [
                (prompt, self._candidate(prompt, number, reply))
                for (prompt, number), reply in zip(pairs, replies, strict=True)
            ]
            self._judge([(prompt, one) for prompt, one in made if not one.reason])
            for prompt in waiting:
                own = [one for asked, one in made if asked is prompt]
                tried[prompt.number] += own
                if (best := self._choose(own)) is not None:
                    kept[prompt.number] = best
                    if self._near:
                        self._near.add(f"prompt {prompt.number}", self._compared(best.pair))
        if self.plan.joins:
            self._pool += [kept[prompt.number].answer for prompt in prompts if prompt.number in kept]
        return tried, kept

    def _question(self, prompt: Prompt, number: int) -> Ask:
        settings = self.settings
        drawn = settings.temperature > 0
        return Ask(
            tuple(prompt.messages),
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p if drawn else 1.0,
            seed_of(settings.seed, "answer", prompt.number, number) if drawn else 0,
        )

    def _ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """All replies, counted as they come. Raises StopRequested when the user stopped in between."""
        replies: dict[int, Reply] = {}
        for index, reply in self.ledger.ask(self.teacher, asks, self.report.stop_requested):
            replies[index] = reply
            self._counts.update(asked=1, tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
            self._progress()
        if len(replies) < len(asks):
            stop_if_asked(self.report)
            raise StopRequested("stopped as asked", hint="the same command goes on from here")
        return [replies[index] for index in range(len(asks))]

    def _candidate(self, prompt: Prompt, number: int, reply: Reply) -> Candidate:
        """The answer after all filters but the judge, cheap ones first. JSON is read before its script is."""
        self._counts["candidates"] += 1
        made, text = Candidate(number, reply), reply.text.strip()
        if reply.fault:
            made.reason = reply.fault
        elif reply.cut:
            made.reason = f"cut: it ran into max_new_tokens = {self.settings.max_new_tokens}"
        elif self.plan.template.shape:
            made.answer, problem = shape.read(text, self.plan.template.shape)
            made.reason = f"json: {problem}" if problem else ""
        else:
            made.answer = {ANSWER: text}
        if made.reason:
            return made
        made.reason = self._text_reason("\n".join(made.answer.values()))
        if not made.reason:
            made.pair = self.plan.template.pair(prompt.fields, made.answer, text)
            made.reason = self._repeated(made) or self._broken(prompt, text)
        return made

    def _broken(self, prompt: Prompt, text: str) -> str:
        rules = self.plan.validator.broken(text, prompt.record, self.plan.catalogue)
        self._rules.update(rules)
        return f"validator: {', '.join(rules)}" if rules else ""

    def _repeated(self, candidate: Candidate) -> str:
        if self._near is None or (found := self._near.find(self._compared(candidate.pair))) is None:
            return ""
        return f"duplicate: {found[1]:.2f} of {found[0]}"

    def _compared(self, pair: list[Message]) -> str:
        side = self.settings.duplicate_of
        return "\n".join(
            m["content"] for m in pair if m["role"] == side or (side == "both" and m["role"] != "system")
        )

    def _judge(self, passing: list[tuple[Prompt, Candidate]]) -> None:
        """Give each passing candidate its score, or a reason."""
        judge = self.plan.judge
        if judge is None or not passing:
            return
        asks = [
            Ask(
                tuple(
                    judge.ask({"question": prompt.messages[-1]["content"], "answer": one.reply.text.strip()})
                ),
                self.settings.judge_tokens,
            )
            for prompt, one in passing
        ]
        for (_, one), reply in zip(passing, self._ask(asks), strict=True):
            self._counts["judged"] += 1
            found, problem = shape.read(reply.text, judge.shape)
            if problem or reply.fault or reply.cut:
                one.reason = f"judge: {reply.fault or problem or 'cut'}"
            else:
                one.score = int(found["score"])
                if one.score < self.settings.judge_least:
                    one.reason = f"judge: a score of {one.score}"

    def _choose(self, candidates: list[Candidate]) -> Candidate | None:
        """The kept one: the best by the rule that repeats nothing kept in this round either."""
        rules = {
            "first": lambda one: one.number,
            "shortest": lambda one: (len(one.reply.text.strip()), one.number),
            "judge": lambda one: (-one.score, one.number),
        }
        for one in sorted((one for one in candidates if not one.reason), key=rules[self.settings.choose]):
            one.reason = self._repeated(one)
            if not one.reason:
                return one
        return None

    def _write(
        self,
        prompts: list[Prompt],
        tried: dict[int, list[Candidate]],
        kept: dict[int, Candidate],
        files: Sequence[TextIO],
    ) -> None:
        data, provenance, rejected = files
        for prompt in prompts:
            for one in tried[prompt.number]:
                told: dict[str, Any] = {"prompt": prompt.number, "candidate": one.number}
                if one is kept.get(prompt.number):
                    self._counts["kept"] += 1
                    _line(data, {"messages": one.pair})
                    score = {"score": one.score} if self.plan.judge else {}
                    used = {"tokens_in": one.reply.tokens_in, "tokens_out": one.reply.tokens_out}
                    _line(
                        provenance,
                        {**told, **score, **used, "teacher": self.teacher.identity, "record": prompt.record},
                    )
                    continue
                if one.reason:
                    self._counts["rejected " + one.reason.partition(":")[0]] += 1
                    self._example = f"{one.reason}; the answer: {one.reply.text[:160]!r}"
                else:
                    self._counts["spare"] += 1
                question = prompt.messages[-1]["content"]
                _line(
                    rejected,
                    {**told, "reason": one.reason or "spare", "question": question, "answer": one.reply.text},
                )

    def _give_up_if_barren(self, prompts: list[Prompt], kept: dict[int, Candidate]) -> None:
        for prompt in prompts:
            self._barren = 0 if prompt.number in kept else self._barren + 1
        if self._barren >= self.settings.give_up_prompts:
            self._done += len(prompts)
            raise self._nothing()

    def _nothing(self) -> ModelError:
        counts = {k.partition(" ")[2]: v for k, v in self._counts.most_common() if k.startswith("rejected ")}
        said = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        rules = ", ".join(f"{rule} {count}" for rule, count in self._rules.most_common())
        return ModelError(
            f"{self._barren} prompts in a row gave nothing that is kept ({self._counts['kept']} kept of "
            f"{self._done} prompts so far); rejected: {said}"
            + (f"; broken rules: {rules}" if rules else "")
            + f"\nthe last: {self._example}",
            hint="rejected.jsonl in the stage's folder has all; change template, filters or teacher",
        )

    def _progress(self) -> None:
        counts = self._counts
        rejected = sum(count for name, count in counts.items() if name.startswith("rejected "))
        shown: dict[str, float] = {
            "asked": counts["asked"],
            "kept": counts["kept"],
            "rejected": rejected,
            "yield": counts["kept"] / max(1, self._done),
            "tokens_in": counts["tokens_in"],
            "tokens_out": counts["tokens_out"],
            "cost": self._cost(),
        }
        self.report.progress(self._done, len(self.plan.records), "prompt", **shown)


def _line(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
