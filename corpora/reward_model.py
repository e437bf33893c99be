"""A reward model: a sequence classifier of transformers with one logit, which says how good a conversation is.

Two kinds are known. One has a chat template (mostly a decoder, read at its last token): the whole conversation
is rendered through it. The other has none (mostly an encoder, as multilingual-e5 in Vikhr): it reads the pair
of prompt and answer as its tokenizer encodes pairs. Either way contents are text, in which the spelling of a
control token gives none: an answer could otherwise bring its own end.

A score does not depend on what else is in its batch: padding is masked, and where a decoder names no padding
token one is taken that the batch does not hold, since transformers looks for the last token that is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from foundation.chat import Chat, Quoted
from foundation.dataio import Message
from foundation.errors import ModelError
from foundation.model import check_files, context_tokens, load_classifier, read_config
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

SUFFIX = "ForSequenceClassification"
PARTS = "token_type_ids"  # as transformers calls it


class Encoding(NamedTuple):
    """Ids [T] as the model reads them, and which part of a pair each belongs to."""

    ids: list[int]
    parts: list[int]


class RewardTokenizer(Tokenizer):
    """A tokenizer that can encode pairs."""

    def pair(self, prompt: str, answer: str) -> Encoding:
        """Ids with the control tokens that the tokenizer sets around and between; texts are plain."""
        self._backend.encode_special_tokens = True
        found = self._backend.encode(prompt, answer, add_special_tokens=True)
        return Encoding(found.ids, found.type_ids)


class RewardModel:
    """Conversations to scores. Raises ModelError for a folder that is no reward model."""

    def __init__(self, folder: Path, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        self.folder = folder
        self.tokenizer = RewardTokenizer(folder)
        self._chat = Chat(self.tokenizer) if self.tokenizer.chat_template is not None else None
        check_files(folder)
        _check_kind(folder, read_config(folder))
        self._model = load_classifier(folder, precision)
        self._model.config.get_text_config().use_cache = False  # nothing is generated
        self.pad_id: int | None = self._model.config.get_text_config().pad_token_id
        named = self.tokenizer.config.get("model_input_names", [PARTS])
        self._has_parts = PARTS in named and (getattr(self._model.config, "type_vocab_size", None) or 0) > 1
        self.longest = _longest(folder, self._model)

    def encode(self, messages: list[Message]) -> Encoding:
        """The conversation as the model reads it. Raises ModelError as a chat template may."""
        if self._chat is None:
            prompt = "\n".join(message["content"] for message in messages[:-1])
            return self.tokenizer.pair(prompt, messages[-1]["content"])
        quoted = Quoted(messages, self.tokenizer)
        ids = quoted.ids(self._chat.render(quoted.messages, prompt=False))
        if not ids:
            raise ModelError(f"{self.folder}: the chat template renders nothing")
        return Encoding(ids, [0] * len(ids))

    def scores(self, batch: Sequence[Encoding]) -> np.ndarray:
        """The model's logit for each encoding, float32 [N]. Raises ModelError when one is no number."""
        import numpy as np
        import torch

        width = max(len(row.ids) for row in batch)
        pad_id = _unused(batch) if self.pad_id is None else self.pad_id
        self._model.config.get_text_config().pad_token_id = pad_id
        ids = torch.full((len(batch), width), pad_id)  # [B, T]
        mask, parts = torch.zeros_like(ids), torch.zeros_like(ids)
        for number, row in enumerate(batch):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            parts[number, : len(row.ids)] = torch.tensor(row.parts)
            mask[number, : len(row.ids)] = 1
        fed = {"input_ids": ids, "attention_mask": mask} | (
            {"token_type_ids": parts} if self._has_parts else {}
        )
        try:
            with torch.inference_mode():
                logits = self._model(
                    **{name: value.to(self._model.device) for name, value in fed.items()}
                ).logits
        except torch.OutOfMemoryError:
            raise ModelError(
                f"the reward model and a batch of {len(batch)} x {width} tokens do not fit the device's memory",
                hint="lower batch_rows, or take precision = 'bf16'",
            ) from None
        scores: np.ndarray = logits[:, 0].float().cpu().numpy()  # [B]
        if not np.isfinite(scores).all():
            raise ModelError(
                f"{self.folder}: the reward is not a number", hint="its weights hold NaN or infinity"
            )
        return scores


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelError, naming what is there, unless it is a sequence classifier with one logit."""
    named = config.get("architectures") or ["no architecture"]
    if not any(str(name).endswith(SUFFIX) for name in named):
        raise ModelError(
            f"{folder}: {', '.join(map(str, named))} is no reward model; {SUFFIX} with one logit is needed",
            hint="`reward` takes a model that scores conversations, not one that writes them",
        )
    labels = config.get("id2label")
    logits = len(labels) if isinstance(labels, dict) else int(config.get("num_labels", 2))
    if logits != 1:
        said = ", ".join(map(str, labels.values()))[:80] if isinstance(labels, dict) else "unnamed"
        raise ModelError(
            f"{folder}: {named[0]} has {logits} logits ({said}); a reward model has one",
            hint="a classifier of several classes gives no single score to choose by",
        )


def _longest(folder: Path, model: Any) -> int:
    """Most tokens that the model reads. RoBERTa's kind counts positions from behind its padding's id."""
    found = context_tokens(folder)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = module.padding_idx
            found = min(found, module.num_embeddings - (0 if padding is None else padding + 1))
    return found


def _unused(batch: Sequence[Encoding]) -> int:
    """The lowest id that no row holds."""
    used = {number for row in batch for number in row.ids}
    return next(number for number in range(len(used) + 1) if number not in used)
