"""Loads `gptq serve`: many requests at once, clients that go away, bodies of garbage.

    python tests/interop/serve_load.py --gptq target/release/gptq --model PATH/TO/MODEL

Every request that is whole has to be answered as asked, or told to come again; nothing else may be left
behind: no text, no request, no file, and after the last round no more memory than after the first. There
are two rounds, or as many as `--minutes` take.
"""

import argparse
import http.client
import json
import random
import socket
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
        self.seconds = []

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
        kinds = ["whole", "stream", "echo", "leaves", "vanishes", "garbage", "half"]
        kind = dice.choices(kinds, [5, 3, 2, 2, 1, 1, 1])[0]
        if kind == "half":
            # A head that is not one, or that promises more than comes.
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            with socket.create_connection(self.place.split(":")) as connection:
                connection.sendall(dice.choice([head[: dice.randint(1, len(head))], dice.randbytes(300)]))
            self.count("half sent")
            return
        prompt = " ".join(dice.choices(WORDS, k=dice.randint(1, 60)))
        body = {"prompt": prompt, "max_tokens": dice.randint(1, 24), "temperature": dice.choice([0, 0.8]), "seed": number}
        if kind == "echo":
            body |= {"echo": True, "logprobs": 1, "max_tokens": dice.choice([0, 1])}
        if kind in ("stream", "leaves"):
            body["stream"] = True
        if kind in ("leaves", "vanishes"):
            body["max_tokens"] = 200
        payload = json.dumps(body).encode()
        if kind == "garbage":
            payload = dice.randbytes(dice.randint(1, 4000))
        while True:
            connection = self.connection()
            try:
                started = time.monotonic()
                connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
                if kind == "vanishes":
                    # Before a word of the answer.
                    time.sleep(dice.random())
                    self.count("vanished")
                    return
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
        if kind != "garbage":
            with self.lock:
                self.seconds.append(time.monotonic() - started)

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


def quantiles(seconds):
    ranked = sorted(seconds)
    return [round(ranked[min(int(share * len(ranked)), len(ranked) - 1)], 2) for share in (0.5, 0.95, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=0)
    args = parser.parse_args()
    command = [args.gptq, "serve", args.model, "--port", "0", "--device", "cpu", "-q", "--context", "512", "--queue", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    load = Load(process.stdout.readline().strip())
    states = [held(process.pid)]
    left_over, start, seed = None, time.monotonic(), 0
    while seed < 2 or time.monotonic() - start < 60 * args.minutes:
        seed += 1
        load.round(args.requests, args.at_once, seed)
        for _ in range(600):
            metrics = load.metrics()
            left_over = metrics["gptq_texts_active"] + metrics["gptq_requests_queued"]
            if not left_over:
                break
            time.sleep(0.1)
        states.append(held(process.pid))
    took = time.monotonic() - start
    process.terminate()
    code = process.wait()
    lost = load.counts["LOST"]
    print(json.dumps({
        "rounds": seed, "requests": seed * args.requests, "minutes": round(took / 60, 1), "at_once": args.at_once, "lost": lost, "counts": load.counts, "left_over": left_over,
        "memory_mb": [round(memory) for memory, _ in states], "files": [files for _, files in states], "exit": code,
        "tokens_in": metrics["gptq_prompt_tokens_total"], "tokens_out": metrics["gptq_completion_tokens_total"],
        "cancelled": metrics["gptq_texts_cancelled_total"],
        "tokens_out_a_second": round(metrics["gptq_completion_tokens_total"] / took, 1),
        "seconds_of_an_answer": dict(zip(("median", "p95", "most"), quantiles(load.seconds))),
    }, indent=1))
    first, last, files = states[1], states[-1], [files for _, files in states]
    grows = last[0] > first[0] * 1.1 or files[-1] > files[0] + 2
    sys.exit(bool(lost or left_over or code or grows))


if __name__ == "__main__":
    main()
