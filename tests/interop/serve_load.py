"""Loads `gptq serve`: many requests at once, clients that go away, bodies of garbage.

    python tests/interop/serve_load.py --gptq target/release/gptq --model PATH/TO/MODEL

Every request that is whole has to be answered as asked, or told to come again; nothing else may be left
behind: no text, no request, no file, and after the second round no more memory than after the first.
"""

import argparse
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

WORDS = "the king of a river said that no one knew where they had gone before winter came".split()


class Load:
    def __init__(self, address):
        self.place = urlparse(address).netloc
        self.counts = Counter()
        self.lock = threading.Lock()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def connection(self):
        return http.client.HTTPConnection(self.place, timeout=300)

    def get(self, path):
        connection = self.connection()
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def metrics(self):
        lines = (line.split(" ") for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def one(self, number, dice):
        """A request of a kind that the dice choose; what came of it is counted."""
        kind = dice.choices(["whole", "stream", "echo", "leaves", "garbage"], [5, 3, 2, 2, 1])[0]
        prompt = " ".join(dice.choices(WORDS, k=dice.randint(1, 60)))
        body = {"prompt": prompt, "max_tokens": dice.randint(1, 24), "temperature": dice.choice([0, 0.8]), "seed": number}
        if kind == "echo":
            body |= {"echo": True, "logprobs": 1, "max_tokens": dice.choice([0, 1])}
        if kind in ("stream", "leaves"):
            body["stream"] = True
        if kind == "leaves":
            body["max_tokens"] = 200
        payload = json.dumps(body).encode()
        if kind == "garbage":
            payload = dice.randbytes(dice.randint(1, 4000))
        while True:
            connection = self.connection()
            try:
                connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                if answer.status == 429:
                    answer.read()
                    self.count("told to come again")
                    time.sleep(0.2)
                    continue
                if kind == "leaves":
                    answer.read(20)
                    self.count("left")
                    return
                text = answer.read()
            finally:
                connection.close()
            break
        match kind:
            case "garbage":
                right = answer.status == 400 and b'"error"' in text
            case "stream":
                right = answer.status == 200 and text.endswith(b"data: [DONE]\n\n")
            case _:
                usage = json.loads(text).get("usage", {})
                right = answer.status == 200 and usage["completion_tokens"] <= body["max_tokens"]
        self.count(f"{kind} ok" if right else "LOST")

    def round(self, requests, at_once, seed):
        numbers = iter(range(requests))

        def work():
            while True:
                with self.lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    self.one(number, random.Random(seed * 1_000_003 + number))
                except Exception as error:
                    self.count("LOST")
                    print(f"request {number}: {error!r}")

        threads = [threading.Thread(target=work) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def held(process):
    """Memory in MB and open files of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    return kilobytes / 1000, len(list(Path(f"/proc/{process}/fd").iterdir()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    args = parser.parse_args()
    command = [args.gptq, "serve", args.model, "--port", "0", "--device", "cpu", "-q", "--context", "512", "--queue", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    load = Load(process.stdout.readline().strip())
    states = [held(process.pid)]
    left_over = None
    for seed in (1, 2):
        load.round(args.requests, args.at_once, seed)
        for _ in range(600):
            metrics = load.metrics()
            left_over = metrics["gptq_texts_active"] + metrics["gptq_requests_queued"]
            if not left_over:
                break
            time.sleep(0.1)
        states.append(held(process.pid))
    process.terminate()
    code = process.wait()
    lost = load.counts["LOST"]
    print(json.dumps({
        "requests": 2 * args.requests, "at_once": args.at_once, "lost": lost, "counts": load.counts, "left_over": left_over,
        "memory_mb": [round(memory) for memory, _ in states], "files": [files for _, files in states], "exit": code,
        "tokens_in": metrics["gptq_prompt_tokens_total"], "tokens_out": metrics["gptq_completion_tokens_total"],
        "cancelled": metrics["gptq_texts_cancelled_total"],
    }, indent=1))
    (_, first, second), files = states, [files for _, files in states]
    grows = second[0] > first[0] * 1.1 or files[2] > files[0] + 2
    sys.exit(bool(lost or left_over or code or grows))


if __name__ == "__main__":
    main()
