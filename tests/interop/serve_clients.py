"""Holds `gptq serve` to what OpenAI's own client and lm-evaluation-harness make of it.

    pip install torch transformers openai 'lm-eval[api]'
    python tests/interop/serve_clients.py --gptq target/release/gptq --model PATH/TO/SmolLM2-135M-Instruct

The client asks for texts and answers, whole and streamed, and meets its own errors. The harness measures
a task of simple facts (`tasks/cloze_facts.*`) by way of the server and with its own backend of the same
folder in float32: every log-likelihood, every greedy flag and the accuracy have to be the same. Of a GPTQ
folder its own backend gets the dense model that `readers.py` unpacks it to. `--no-client` leaves out the
client, whose questions are for a model that answers.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKS = []
TOLERANCE = 1e-4
TASKS = Path(__file__).parent / "tasks"


def check(name, right, more=""):
    CHECKS.append((name, bool(right)))
    print(f"{'ok   ' if right else 'WRONG'} {name} {more}", flush=True)


class Server:
    """A server on a free port, ended with the block."""

    def __init__(self, gptq, model, *more):
        command = [gptq, "serve", model, "--port", "0", "--device", "cpu", "-q", *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        if not self.address.startswith("http://"):
            sys.exit("the server did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def length(model):
    """Tokens of a text: a kilobyte's worth, or what the model was made for."""
    return min(1024, json.loads((Path(model) / "config.json").read_text())["max_position_embeddings"])


def official_client(address, name):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    check("models", [model.id for model in client.models.list()] == [name])
    check("model", client.models.retrieve(name).id == name)

    asked = {"model": name, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked)
    choice = whole.choices[0]
    check("completion", "Paris" in choice.text, repr(choice.text))
    check("completion usage", whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens == 5)
    check("completion logprobs", len(choice.logprobs.token_logprobs) == 12 and "".join(choice.logprobs.tokens) == choice.text)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].text for part in parts if part.choices)
    check("completion stream", text == choice.text and parts[-1].usage == whole.usage)
    several = client.completions.create(model=name, prompt=["One", "Two"], n=2, max_tokens=4, seed=1, temperature=1)
    check("completions of several prompts", [choice.index for choice in several.choices] == [0, 1, 2, 3])

    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is 2 + 2?"}]
    asked = {"model": name, "messages": messages, "max_tokens": 16, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    said = whole.choices[0].message.content
    check("chat", whole.choices[0].message.role == "assistant" and said, repr(said))
    tokens = whole.choices[0].logprobs.content
    check("chat logprobs", "".join(token.token for token in tokens) == said and len(tokens[0].top_logprobs) == 2)
    text = ""
    for part in client.chat.completions.create(**asked, stream=True):
        text += part.choices[0].delta.content or ""
    check("chat stream", text == said)
    newer = {key: value for key, value in asked.items() if key != "max_tokens"}
    newer |= {"max_completion_tokens": 16, "user": "somebody", "store": False, "metadata": {"a": "b"}}
    again = client.chat.completions.create(**newer)
    check("chat with newer names", again.choices[0].message.content == said)
    with client.chat.completions.create(model=name, messages=messages, stream=True) as stream:
        next(iter(stream))
    check("chat stream left early", client.models.list().data)

    wrong = [
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, {"reasoning_effort": "high"}),
        (openai.NotFoundError, {"model": "another"}),
    ]
    for kind, more in wrong:
        error = raised(lambda: client.chat.completions.create(**{"model": name, "messages": messages, **more}))
        check(f"chat {kind.__name__} of {next(iter(more))}", isinstance(error, kind) and error.param in more, error)


def dense_folder(model, folder):
    """The folder of a dense model for transformers: `model` itself, or what its codes stand for."""
    if not (Path(model) / "quantize_config.json").exists():
        return model
    import readers

    readers.dense(model).save_pretrained(folder)
    for file in Path(model).glob("*token*"):
        shutil.copy(file, folder)
    return folder


def harness(address, model, dense, name, limit, ways):
    import lm_eval
    import yaml

    config = yaml.safe_load((TASKS / "cloze_facts.yaml").read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(TASKS / "cloze_facts.jsonl")

    def run(kind, arguments, batch):
        start = time.monotonic()
        result = lm_eval.simple_evaluate(
            model=kind, model_args=arguments, tasks=[dict(config)], batch_size=batch, limit=limit,
            log_samples=True, bootstrap_iters=0
        )
        samples = sorted(result["samples"]["cloze_facts"], key=lambda sample: sample["doc_id"])
        answers = [answer for sample in samples for answer in sample["filtered_resps"]]
        scores = result["results"]["cloze_facts"]
        return answers, scores["acc,none"], scores["acc_norm,none"], time.monotonic() - start

    theirs = run("hf", {"pretrained": dense, "tokenizer": model, "dtype": "float32", "device": "cpu"}, 8)
    for batch, concurrent in ways:
        arguments = {
            "model": name, "tokenizer": model, "base_url": f"{address}/v1/completions", "num_concurrent": concurrent,
            "max_length": length(model),
            # Else a model that begins its texts with a token would be asked without it, unlike by `hf`.
            "add_bos_token": True,
        }
        ours = run("local-completions", arguments, batch)
        # A greedy flag comes as it is, or as its name.
        flat = lambda answers: [(float(logprob), str(greedy) == "True") for logprob, greedy in answers]
        a, b = flat(ours[0]), flat(theirs[0])
        largest = max(abs(one[0] - other[0]) for one, other in zip(a, b, strict=True))
        what = f"lm_eval, batches of {batch}, {concurrent} at once"
        check(f"{what}: log-likelihoods", largest <= TOLERANCE, f"{len(a)}, largest difference {largest:.2e}")
        check(f"{what}: greedy flags", [one[1] for one in a] == [one[1] for one in b], f"{sum(one[1] for one in a)} greedy")
        check(f"{what}: accuracy", ours[1:3] == theirs[1:3], f"acc {ours[1]:.4f} and {theirs[1]:.4f}, acc_norm {ours[2]:.4f} and {theirs[2]:.4f}, {ours[3]:.1f} s and {theirs[3]:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--no-harness", action="store_true")
    parser.add_argument("--no-client", action="store_true")
    parser.add_argument("--limit", type=int, help="so many items of the task")
    parser.add_argument("--once", action="store_true", help="in one way of batching alone")
    args = parser.parse_args()
    name = Path(args.model).resolve().name
    with Server(args.gptq, args.model, "--context", str(length(args.model))) as server:
        if not args.no_client:
            official_client(server.address, name)
        if not args.no_harness:
            ways = ((8, 4),) if args.once else ((1, 1), (8, 4))
            with tempfile.TemporaryDirectory() as folder:
                harness(server.address, args.model, dense_folder(args.model, folder), name, args.limit, ways)
    wrong = [name for name, right in CHECKS if not right]
    print(json.dumps({"checks": len(CHECKS), "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
