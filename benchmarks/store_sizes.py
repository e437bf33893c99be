"""What the top-K store costs and loses, on a trained teacher with 151,936 ids.

Run benchmarks/teacher152k.py first. Its teacher reads held-out stories; the exact distributions (float64,
over all ids) are stored with K = 10, 50, 100 and compared with what is read back: bytes a position with
everything in the shard included, and the KL divergence of stored from exact over the entries and the tail.
The same log-probabilities are stored on three other sets of ids: permuted over the vocabulary, drawn anew for
each position from Zipf's law, and drawn evenly (the worst case). Then the mass-capped mode, other precisions,
and random-sampling KD. Speeds are of one thread, by its own CPU clock, the best of seven.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/store_sizes.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from teacher152k import BLOCK_TOKENS, OUT, VOCAB_TOKENS

from distill.shard_file import Columns, ShardFile, write_shard
from foundation.dataio import documents
from foundation.model import load
from foundation.rows import pack
from foundation.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "store_sizes.json"
KEPT = 100  # entries held for every position
DRAWS = 50
ROW_POSITIONS = BLOCK_TOKENS - 1
BARS = {10: 34, 50: 100, 100: 200}  # bytes a position, this project's own
PUBLISHED = {  # bytes a position; ../shared/notes/distillation-engineering.md
    "DistillKit, K = 10, exact": 43,
    "DistillKit, K = 50, budget (KL 5.2e-2)": 127,
    "DistillKit, K = 50, exact": 213,
    "DistillKit, K = 128": 344,
    "Megatron-LM, K = 10 (before zstd)": 50,
    "Megatron-LM, K = 50 (before zstd)": 250,
    "Megatron-LM, K = 100 (before zstd)": 500,
    "RuAdapt-KD, K = 10 (int32 + float32, no tail)": 80,
    "RuAdapt-KD, K = 100 (int32 + float32, no tail)": 800,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120, help=f"held-out rows of {ROW_POSITIONS} positions")
    parser.add_argument("--bits", type=int, default=6)
    options = parser.parse_args()
    if not (OUT / "model" / "config.json").is_file():
        print(f"skipped: {OUT / 'model'} is not there; run benchmarks/teacher152k.py first", file=sys.stderr)
        return 0
    exact = positions(options.rows)
    nats = -float(exact["gold"].mean())
    print(f"{len(exact['gold']):,} positions, {nats:.3f} nats per token")
    found: list[dict[str, Any]] = []
    rng = np.random.default_rng(7)
    every_id = {
        "the teacher's": exact["ids"],
        "permuted": rng.permutation(VOCAB_TOKENS)[exact["ids"]],
        "Zipf's law": zipf_ids(len(exact["ids"]), rng),
        "uniform": uniform_ids(len(exact["ids"]), rng),
    }
    for name, ids in every_id.items():
        for top_k in BARS:
            found.append(measured(f"ids: {name}", fixed(exact, ids, top_k), options.bits))
    found.append(measured("mass 0.999", massive(exact, 0.999), options.bits))
    for bits in (4, 5, 7, 8):
        found.append(measured("ids: the teacher's", fixed(exact, exact["ids"], 50), bits))
    found.append(measured(f"{DRAWS} draws", drawn(exact), options.bits, seed=11))
    result = {
        "positions": len(exact["gold"]),
        "held_nats_per_token": nats,
        "vocab_tokens": VOCAB_TOKENS,
        "stores": found,
        "bars_bytes_per_position": BARS,
        "published_bytes_per_position": PUBLISHED,
        "kept": verdict(found),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result["kept"].values()) else 1


# ------------------------------------------------------------------------------------- exact distributions


def positions(rows: int) -> dict[str, np.ndarray]:
    """The teacher's exact distributions on held-out rows, cached.

    ids, logprobs [P, KEPT]; tail beyond them, gold, log_z [P]; and ids drawn from each [P, DRAWS].
    """
    import torch

    cache = OUT / f"positions-{rows}.npz"
    if cache.is_file():
        with np.load(cache) as kept:
            return dict(kept)
    held = pack(documents([OUT / "text" / "held.jsonl"]), Tokenizer(OUT / "model"), BLOCK_TOKENS, OUT / "held")
    model = load(OUT / "model")
    generator = torch.Generator().manual_seed(5)
    parts: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for number in range(rows):
            ids = torch.from_numpy(np.array(held[number]["input_ids"]))
            logits = model(ids[None]).logits[0, :-1].double()  # [P, V]
            log_z = logits.logsumexp(-1)
            logits -= log_z[:, None]
            top, places = logits.topk(KEPT, dim=-1)
            gold = logits.gather(1, ids[1:, None])[:, 0]
            draws = logits.exp().float().multinomial(DRAWS, replacement=True, generator=generator)
            tail = logits.scatter_(1, places, float("-inf")).logsumexp(-1)
            row = {"ids": places, "logprobs": top, "tail": tail, "gold": gold, "log_z": log_z, "draws": draws}
            for name, values in row.items():
                parts.setdefault(name, []).append(values.numpy())
    exact = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    np.savez(cache, **exact)
    return exact


def uniform_ids(count: int, rng: np.random.Generator) -> np.ndarray:
    """KEPT different ids for each position, drawn evenly.  # [P, KEPT]"""
    return np.stack([rng.choice(VOCAB_TOKENS, KEPT, replace=False) for _ in range(count)])


def zipf_ids(count: int, rng: np.random.Generator) -> np.ndarray:
    """KEPT different ids for each position, in the order of draws with p(rank) ~ 1 / rank.  # [P, KEPT]"""
    shares = np.cumsum(1 / np.arange(1, VOCAB_TOKENS + 1))
    name = rng.permutation(VOCAB_TOKENS)
    rows = []
    for _ in range(count):
        ranks = np.searchsorted(shares, rng.random(6 * KEPT) * shares[-1])
        _, first = np.unique(ranks, return_index=True)
        rows.append(name[ranks[np.sort(first)[:KEPT]]])
    return np.stack(rows)


def fixed(exact: dict[str, np.ndarray], ids: np.ndarray, top_k: int) -> Columns:
    """Columns with the `top_k` largest entries of every position, in float64."""
    return capped(exact, ids, np.full(len(ids), top_k), top_k)


def massive(exact: dict[str, np.ndarray], mass: float) -> Columns:
    """Columns with the fewest entries that reach `mass`, at most KEPT."""
    reached = np.exp(exact["logprobs"]).cumsum(1) >= mass  # [P, KEPT]
    return capped(exact, exact["ids"], np.where(reached.any(1), reached.argmax(1) + 1, KEPT), KEPT)


def capped(exact: dict[str, np.ndarray], ids: np.ndarray, counts: np.ndarray, width: int) -> Columns:
    absent = np.arange(KEPT)[None] >= counts[:, None]  # [P, KEPT]
    left = np.where(absent, exact["logprobs"], -np.inf)
    tail = np.logaddexp.reduce(np.concatenate([left, exact["tail"][:, None]], axis=1), axis=1)  # [P]
    logprobs = np.where(absent, -np.inf, exact["logprobs"])[:, :width]
    chosen = np.where(absent, 0, ids)[:, :width]
    return columns(exact, chosen, logprobs, tail)


def drawn(exact: dict[str, np.ndarray]) -> Columns:
    """Columns of random-sampling KD: the different ids among DRAWS draws, weights count / DRAWS."""
    ids = np.zeros((len(exact["draws"]), DRAWS), dtype=np.int32)
    weights = np.full(ids.shape, -np.inf)
    for n, row in enumerate(exact["draws"]):
        different, counts = np.unique(row, return_counts=True)
        ids[n, : len(different)], weights[n, : len(different)] = different, np.log(counts / DRAWS)
    return columns(exact, ids, weights, np.full(len(ids), -np.inf))


def columns(exact: dict[str, np.ndarray], ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray) -> Columns:
    return {
        "topk_ids": ids.astype(np.int32),
        "topk_logprobs": logprobs,
        "tail_logprob": tail,
        "gold_logprob": exact["gold"],
        "log_z": exact["log_z"],
    }


# ----------------------------------------------------------------------------------------------- measuring


def measured(name: str, exact: Columns, bits: int, seed: int | None = None) -> dict[str, Any]:
    """Store, read back, compare; see the module."""
    count, width = exact["topk_ids"].shape
    rows = count // ROW_POSITIONS
    keys = [number.to_bytes(16, "little") for number in range(rows)]
    narrow = {**exact, "topk_logprobs": exact["topk_logprobs"].astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"

        def write() -> None:
            write_shard(
                path, narrow, keys, [ROW_POSITIONS] * rows, vocab_tokens=VOCAB_TOKENS, bits=bits, seed=seed
            )

        write_seconds, _ = best_of(write)
        shard = ShardFile(path)
        read_seconds, parts = best_of(lambda: [shard.columns(place) for place in range(rows)])
        stored = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        entries = float((exact["topk_logprobs"] > -np.inf).sum(1).mean())
        found: dict[str, Any] = {
            "store": name,
            "top_k": width,
            "bits": bits,
            "entries": entries,
            "bytes_per_position": shard.size_bytes / count,
            "parts": {part: size / count for part, size in shard.parts().items()},
            "plain_bytes": 8 * entries,
            "encoded_per_second": count / write_seconds,
            "decoded_per_second": count / read_seconds,
        }
    if seed is None:
        kl = divergence(stored, exact)  # [P]
        found |= {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
        }
    said = " ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
        if key != "parts"
    )
    print(said, flush=True)
    return found


def divergence(stored: Columns, exact: Columns) -> np.ndarray:
    """KL(stored || exact) over the entries and the tail, in float64; the ids must agree.  # [P]"""
    ours, theirs = sorted_entries(stored), sorted_entries(exact)
    if not np.array_equal(ours[0], theirs[0]):
        raise AssertionError("the ids that were read are not those that were written")
    q, p = ours[1], theirs[1]
    there = q > -np.inf
    on = (np.exp(q) * (np.where(there, q, 0) - np.where(there, p, 0))).sum(1)
    tail = stored["tail_logprob"].astype(np.float64)
    return on + np.exp(tail) * (tail - exact["tail_logprob"])


def sorted_entries(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) [P, K] by id, absent entries last."""
    ids = np.where(columns["topk_logprobs"] > -np.inf, columns["topk_ids"], 2**30)
    order = ids.argsort(1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(
        columns["topk_logprobs"].astype(np.float64), order, 1
    )


def best_of(act: Any, times: int = 7) -> tuple[float, Any]:
    """(least CPU seconds of this thread, the last answer)"""
    act()  # compiled, and in the page cache
    seconds = []
    for _ in range(times):
        start = time.thread_time()
        answer = act()
        seconds.append(time.thread_time() - start)
    return min(seconds), answer


def verdict(stores: list[dict[str, Any]]) -> dict[str, bool]:
    """Which of the bars are kept."""
    found = {(store["store"], store["top_k"]): store for store in stores if store["bits"] == stores[0]["bits"]}
    kept = {}
    for name in ("ids: the teacher's", "ids: permuted"):
        for top_k, bar in BARS.items():
            store = found[name, top_k]
            kept[f"{name}, K = {top_k}: at most {bar} bytes"] = store["bytes_per_position"] <= bar
            kept[f"{name}, K = {top_k}: KL"] = store["kl_mean"] <= 2e-4 and store["kl_p99"] <= 1e-3
    kept["uniform ids, K = 50: at most 140 bytes"] = found["ids: uniform", 50]["bytes_per_position"] <= 140
    store = found["ids: the teacher's", 50]
    kept["K = 50: 200,000 positions encoded in a second"] = store["encoded_per_second"] >= 200_000
    kept["K = 50: decoded faster"] = store["decoded_per_second"] > store["encoded_per_second"]
    return kept


if __name__ == "__main__":
    sys.exit(main())
