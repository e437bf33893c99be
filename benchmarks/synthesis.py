"""Synthesis measured without a model: what the filters catch, what kills cost, how repeats are found at scale.

A scripted endpoint on this machine answers programme prompts out of the real catalogue, well or badly in known
ways, and misbehaves as endpoints do (429, 500, cut bodies, garbage, 400). So the truth about each answer is
known, and yield and catch rate are facts about the filters, not about a teacher.

    python benchmarks/synthesis.py --catalogue .../exercises.json --work /tmp/synthesis
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill.synthesize import catalogue as exercises  # noqa: E402
from distill.synthesize.duplicates import NearDuplicates  # noqa: E402

OUTPUTS = ("data.jsonl", "provenance.jsonl", "rejected.jsonl", "held.jsonl", "answers.jsonl")
# kind of answer -> share, and the reason that must be given for it ("" = it is good)
KINDS = {
    "good": (0.56, ""),
    "invented name": (0.08, "validator: known"),
    "above the list": (0.05, "validator: listed"),
    "two workouts": (0.06, "validator: count"),
    "polite preface": (0.08, "validator: structure"),
    "absurd volume": (0.05, "validator: volume"),
    "cut": (0.04, "cut"),
    "empty": (0.02, "empty"),
    "in Chinese": (0.03, "script"),
    "refused": (0.03, "refused"),
}
TROUBLE = {"429": 0.05, "500": 0.03, "cut body": 0.02, "garbage": 0.02}  # of requests, whatever they ask


class Teacher(ThreadingHTTPServer):
    """Its answer to a body is a function of the body; its troubles come in the order of the requests."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.catalogue = exercises.load(path)
        self.lock = threading.Lock()
        self.rng = random.Random(1)
        self.trouble: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # body digest -> times it was answered well: what was paid
        self.kinds: dict[str, str] = {}  # text -> kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle is what the trials are about."""

    def answer(self, body: dict[str, Any]) -> tuple[str, str]:
        """(kind, text)."""
        rng = random.Random(json.dumps(body, sort_keys=True))
        kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
        prompt = body["messages"][-1]["content"]
        listed = [
            line[2:].rpartition(" (")[0]
            for line in prompt.splitlines()
            if line.startswith("- ") and " (" in line
        ]
        goal = prompt.split("Goal: ")[1].split(".")[0]
        serving = [n for n in listed if exercises.serves(self.catalogue.by_name[n.lower()], goal)]
        text = "\n".join(_workout(number, listed, serving, rng) for number in (1, 2, 3))
        first = text.splitlines()[1]
        name = first[2:].split(":")[0]
        unlisted = sorted(e.name for e in self.catalogue.by_name.values() if e.name not in listed)
        changed = {
            "invented name": text.replace(name, "Levitating Squat", 1),
            "above the list": text.replace(name, rng.choice(unlisted), 1),
            "two workouts": text.partition("\nWorkout 3")[0],
            "polite preface": "Sure, here is your plan!\n" + text,
            "absurd volume": text.replace(first, first.split(":")[0] + ": 40 x 100", 1),
            "cut": text[: len(text) * 2 // 3],
            "empty": "",
            "in Chinese": "训练一：深蹲三组，每组十次。训练二：平板支撑。" + str(rng.random()),
        }
        return kind, changed.get(kind, text)


def _workout(number: int, listed: list[str], serving: list[str], rng: random.Random) -> str:
    names = rng.sample(serving, 3)
    names += rng.sample([name for name in listed if name not in names], rng.randint(0, 2))
    return f"Workout {number}\n" + "\n".join(
        f"- {n}: {rng.randint(2, 4)} x {rng.choice((8, 10, 12))}" for n in names
    )


class Handler(BaseHTTPRequestHandler):
    server: Teacher

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            trouble = server.rng.choices(["", *TROUBLE], [1 - sum(TROUBLE.values()), *TROUBLE.values()])[0]
            server.trouble[trouble or "none"] += 1
        if trouble == "429":
            return self._send(429, b"{}", {"Retry-After": "0"})
        if trouble == "500":
            return self._send(500, b"<html>", {"Retry-After": "0"})
        kind, text = server.answer(body)
        if kind == "refused":
            return self._send(400, b'{"error": "content policy"}', {})
        choice = {"message": {"content": text}, "finish_reason": "length" if kind == "cut" else "stop"}
        usage = {"prompt_tokens": len(str(body)) // 4, "completion_tokens": len(text) // 4}
        data = json.dumps({"choices": [choice], "usage": usage}).encode()
        if trouble == "cut body":
            return self._send(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
        if trouble == "garbage":
            return self._send(200, b"\xff" + data, {})
        with server.lock:
            server.kinds[text] = kind
            server.answered[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
        return self._send(200, data, {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


RUN = """
import json, sys
from pathlib import Path
from distill.synthesize.stage import Settings, run
from foundation.report import Silent
settings, catalogue, out = sys.argv[1:]
Path(out).mkdir(parents=True, exist_ok=True)
figures = run(Settings.model_validate_json(settings), {"catalogue": Path(catalogue)}, Path(out), Silent())
print(json.dumps(figures))
"""


def start(settings: dict[str, Any], catalogue: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-c", RUN, json.dumps(settings), str(catalogue), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def catch_table(out: Path, kinds: dict[str, str]) -> dict[str, dict[str, int]]:
    """kind of answer -> what became of it -> how often."""
    table: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for line in (out / "data.jsonl").read_text().splitlines():
        table[kinds[json.loads(line)["messages"][-1]["content"]]]["kept"] += 1
    for line in (out / "rejected.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind = "refused" if row["reason"].startswith("refused") else kinds[row["answer"]]
        wanted = KINDS[kind][1]
        right = (
            bool(wanted)
            and row["reason"].startswith(wanted.split(":")[0])
            and wanted.split(": ")[-1] in row["reason"]
        )
        table[kind]["rejected for it" if right else f"rejected: {row['reason'].partition(':')[0]}"] += 1
    return {kind: dict(sorted(found.items())) for kind, found in table.items()}


def scale(catalogue: exercises.Catalogue, count: int) -> dict[str, float]:
    """Near-duplicate search over programmes of the real catalogue, as many as AviationKD has."""
    rng, names = random.Random(5), sorted(e.name for e in catalogue.by_name.values())
    texts = [
        "\n".join(_workout(n, part := rng.sample(names, 40), part, rng) for n in (1, 2, 3))
        for _ in range(count)
    ]
    index, start_seconds, found = NearDuplicates(0.7), time.process_time(), 0
    for number, text in enumerate(texts):
        twin = text.replace("3 x 10", "3 x 12", 1)  # a planted near-copy, searched right after its original
        index.find(text)
        index.add(str(number), text)
        found += number % 10 == 0 and index.find(twin) is not None
    seconds = time.process_time() - start_seconds
    return {
        "texts": count,
        "cpu_microseconds_a_text": round(seconds / count * 1e6, 1),
        "planted_found": found / len(range(0, count, 10)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalogue", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--texts", type=int, default=67_392)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "synthesis.json")
    chosen = parser.parse_args()
    shutil.rmtree(chosen.work, ignore_errors=True)
    server = Teacher(chosen.catalogue)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    settings = {
        "template": "exercises-en", "validator": "exercises", "script": "latin", "script_share": 0.9,
        "candidates": 3, "prompts": chosen.prompts, "held_share": 0.05, "base_url": f"http://127.0.0.1:{server.server_address[1]}",
        "endpoint_model": "scripted", "parallel": 8, "price_in": 0.1, "price_out": 0.4,
        "grid": {
            "level": ["beginner", "intermediate", "expert"], "frequency": [2, 3, 4],
            "goal": ["strength", "mobility"], "avoid": ["none", "lower back", "shoulders", "neck", "calves"],
            "equipment": ["body only", "bands", "dumbbell", "barbell", "kettlebells", "cable, machine"],
        },
    }  # fmt: skip
    begun = time.perf_counter()
    said, _ = start(settings, chosen.catalogue, chosen.work / "whole").communicate()
    seconds = time.perf_counter() - begun
    result: dict[str, Any] = {
        "figures": json.loads(said),
        "seconds": round(seconds, 2),
        "endpoint": dict(server.trouble),
        "became_of": catch_table(chosen.work / "whole", server.kinds),
        "asked_twice": sum(count > 1 for count in server.answered.values()),
    }
    reference = {name: (chosen.work / "whole" / name).read_bytes() for name in OUTPUTS}
    rng, equal, twice = random.Random(3), 0, []
    for trial in range(chosen.kills):
        out = chosen.work / f"trial{trial}"
        server.answered.clear()
        for _ in range(2):
            process = start(settings, chosen.catalogue, out)
            try:
                process.communicate(timeout=rng.uniform(0.1, 0.6) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
        start(settings, chosen.catalogue, out).communicate()
        equal += all((out / name).read_bytes() == reference[name] for name in OUTPUTS)
        twice.append(sum(count - 1 for count in server.answered.values()))  # under way when it was killed
    result["kill_trials"] = {
        "trials": chosen.kills,
        "same_bytes": equal,
        "asked_again_because_under_way": twice,
    }
    result["near_duplicates"] = scale(server.catalogue, chosen.texts)
    chosen.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
