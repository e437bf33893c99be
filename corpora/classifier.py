"""A quality classifier: one weight a bucket of n-grams, and the sigmoid of their sum.

    weights.safetensors   weights float32 [2^bits], bias float64 [1]
    quality.json          which n-grams, how it was trained, what it scored on held-out documents

Nothing here is a pickle. Training is in quality.py; numpy is all that scoring needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.ngrams import Grams, features
from foundation.artifact import hint_for
from foundation.errors import ArtifactError
from foundation.files import read_json, sha256_file, write_json, writing

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
WEIGHTS = "weights.safetensors"
FACTS = "quality.json"


class Classifier:
    """Texts to probabilities of being good, each text by itself."""

    def __init__(self, grams: Grams, weights: np.ndarray, bias: float) -> None:
        self.grams, self.weights, self.bias = grams, weights, bias

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N] in [0, 1]. A sum in numpy's own order: BLAS' would depend on the number of threads."""
        import numpy as np

        scores = np.empty(len(texts), dtype=np.float32)
        for number, text in enumerate(texts):
            buckets, values = features(text, self.grams)
            evidence = float((self.weights[buckets].astype(np.float64) * values).sum()) + self.bias
            scores[number] = 1 / (1 + math.exp(-max(-700.0, min(700.0, evidence))))
        return scores

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the weights, and after them what is known of them: without quality.json there is none."""
        import numpy as np
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        bias = np.array([self.bias], dtype=np.float64)
        with writing(folder):
            save_file({"weights": self.weights, "bias": bias}, str(folder / WEIGHTS))
            digest = sha256_file(folder / WEIGHTS)
        known = {"format": FORMAT, "grams": self.grams._asdict(), "weights_sha256": digest}
        write_json(folder / FACTS, known | facts)


def load_classifier(folder: Path) -> Classifier:
    """The classifier in `folder`. Raises ArtifactError when it is none, or was altered."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    facts = read_json(folder / FACTS)
    if not isinstance(facts, dict):
        hint = "`quality` is the folder of that name that a corpora.quality stage writes"
        raise ArtifactError(f"{folder}: no {FACTS} that can be read", hint=hint_for(folder, FACTS, hint))
    if facts.get("format") != FORMAT:
        said = f"{folder}: {FACTS} has format {facts.get('format')!r}, known here is {FORMAT}"
        raise ArtifactError(said, hint=_AGAIN)
    path = folder / WEIGHTS
    if not path.is_file() or sha256_file(path) != facts.get("weights_sha256"):
        raise ArtifactError(f"{path}: missing, or not the file that {FACTS} was written for", hint=_AGAIN)
    try:
        grams, tensors = Grams(**facts["grams"]), load_file(str(path))
        weights, bias = tensors["weights"], float(tensors["bias"][0])
    except (KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: no quality classifier ({error!r})", hint=_AGAIN) from None
    if weights.shape != (1 << grams.bits,) or not (np.isfinite(weights).all() and math.isfinite(bias)):
        raise ArtifactError(
            f"{path}: weights of shape {weights.shape}, all finite, are needed: {1 << grams.bits}", hint=_AGAIN
        )
    return Classifier(grams, weights, bias)


_AGAIN = "train it again with corpora.quality"
