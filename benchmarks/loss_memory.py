"""Memory and time of head + loss, forward and backward: chunked, naive, and torch's own chunked cross-entropy.

Every case runs in a process of its own. Memory is the peak beyond what stood before (hidden states, head,
teacher's columns) and beyond the gradient of the head; the gradient of the hidden states is counted. On a CPU
it is the peak of the resident set, and seconds are the processor's; on a GPU it is the allocator's peak, and
seconds are the clock's. Left alone (--torch-rows 0), torch reads one or two positions at a time where the
vocabulary is 300 times the width, at ten times the seconds on a CPU; so it is given a number of positions.

    python benchmarks/loss_memory.py --torch-rows 220 --result benchmarks/results/loss_memory.json
    python benchmarks/loss_memory.py --device cuda --dtype bf16 --tokens 8192 --hidden 2560 --torch-rows 0
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = {
    "naive cross-entropy": "logits held whole, torch.nn.functional.cross_entropy",
    "torch chunked cross-entropy": "torch.nn.functional.linear_cross_entropy, --torch-rows positions at a time",
    "chunked cross-entropy": "foundation.chunked",
    "naive forward KL": "logits held whole in float32, log-softmax, gather, log(1-Q) by logsumexp of the rest",
    "chunked forward KL": "distill.losses, with cross-entropy",
    "chunked forward KL, frozen head": "the same with a head that is not trained, as under LoRA",
    "chunked forward KL, T = 2": "the same at a temperature: two softmaxes",
}
SHORT = ("--tokens", "--vocab", "--hidden", "--top-k", "--repeats", "--threads", "--torch-rows")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in zip(SHORT, (1024, 151_936, 512, 50, 3, 1, 110), strict=True):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of hidden states and head")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--result", type=Path)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.case:
        print(json.dumps(measure(chosen)))
        return
    found: dict[str, Any] = {}
    for case in chosen.cases:
        same = [f"{name}={getattr(chosen, name.strip('-').replace('-', '_'))}" for name in SHORT]
        command = [
            sys.executable,
            __file__,
            *same,
            "--device",
            chosen.device,
            "--dtype",
            chosen.dtype,
            "--case",
            case,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found[case] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-300:]}
        print(f"{case:34}", found[case], flush=True)
    if chosen.result:
        shape = {name: value for name, value in vars(chosen).items() if name not in ("cases", "case", "result")}
        chosen.result.write_text(json.dumps({"shape": shape, "cases": found}, indent=1) + "\n")


def measure(chosen: argparse.Namespace) -> dict[str, float]:
    """Peak MiB and median seconds of one case, forward and backward."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen.dtype]
    made = {"device": chosen.device, "dtype": dtype}
    hidden = torch.randn(chosen.tokens, chosen.hidden, **made).requires_grad_()
    weight = (torch.randn(chosen.vocab, chosen.hidden, **made) * 0.03).requires_grad_(
        "frozen" not in chosen.case
    )
    gold = torch.randint(0, chosen.vocab, (chosen.tokens,), device=chosen.device)
    columns = some_columns(chosen)
    run = case_of(chosen.case, hidden, weight, gold, columns, chosen.torch_rows)
    run(8).backward()  # libraries allocate their workspaces at the first use
    hidden.grad = weight.grad = None
    before = in_use(chosen.device)
    seconds = []
    clock = time.process_time if chosen.device == "cpu" else time.perf_counter
    for _ in range(chosen.repeats):
        started = clock()
        run(chosen.tokens).backward()
        if chosen.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
        gradient = 0 if weight.grad is None else weight.grad.nbytes
        hidden.grad = weight.grad = None
    peak = peak_bytes(chosen.device) - before - gradient
    return {"peak_mib": round(peak / 2**20, 1), "seconds": round(sorted(seconds)[len(seconds) // 2], 3)}


def some_columns(chosen: argparse.Namespace) -> dict[str, Any]:
    """A teacher's columns with distinct ids and a proper tail."""
    import torch

    ids = torch.stack([torch.randperm(chosen.vocab)[: chosen.top_k] for _ in range(chosen.tokens)])
    log_p = torch.randn(chosen.tokens, chosen.top_k + 1).mul(2).log_softmax(1)
    columns = {"topk_ids": ids.int(), "topk_logprobs": log_p[:, :-1].contiguous(), "tail_logprob": log_p[:, -1]}
    return {name: value.to(chosen.device) for name, value in columns.items()}


def case_of(case: str, hidden: Any, weight: Any, gold: Any, columns: dict[str, Any], torch_rows: int) -> Any:
    """A function of the number of positions -> the loss, summed."""
    import torch
    from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

    from distill.losses import make_loss
    from foundation.head import Head

    if case == "naive cross-entropy":
        return lambda n: cross_entropy(linear(hidden[:n], weight).float(), gold[:n], reduction="sum")
    if case == "torch chunked cross-entropy":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=torch_rows or None)
        return lambda n: linear_cross_entropy(hidden[:n], weight, gold[:n], reduction="sum", options=options)
    if case == "naive forward KL":
        return lambda n: naive_forward_kl(hidden[:n], weight, gold[:n], {c: v[:n] for c, v in columns.items()})
    head = Head(((lambda h: h, weight),))
    name = "ce" if case == "chunked cross-entropy" else "forward_kl"
    loss = make_loss(name, kl_lambda=0.5, ce_weight=1.0, temperature=2.0 if "T = 2" in case else 1.0)
    return lambda n: loss.of_hidden(hidden[:n], head, gold[:n], {c: v[:n] for c, v in columns.items()})[0]


def naive_forward_kl(hidden: Any, weight: Any, gold: Any, columns: dict[str, Any]) -> Any:
    from torch.nn.functional import linear

    log_q = linear(hidden, weight).float().log_softmax(1)  # [N, V]
    ids, log_p, tail = columns["topk_ids"].long(), columns["topk_logprobs"], columns["tail_logprob"]
    student = log_q.gather(1, ids)  # [N, K]
    off = log_q.scatter(1, ids, -float("inf")).logsumexp(1)  # [N]
    kd = (log_p.exp() * (log_p - student)).sum() + (tail.exp() * (tail - off)).sum()
    return 0.5 * kd - log_q.gather(1, gold[:, None]).sum()


def in_use(device: str) -> int:
    """Bytes in use now; the peak starts anew."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak of the resident set
    return _status("VmRSS")


def peak_bytes(device: str) -> int:
    """The most bytes in use since `in_use` was called."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
