#!/usr/bin/env python3
"""A checkpoint quantized by AutoRound on the windows that `gptq quantize` calibrates on, for `gptq ppl --base` to judge.

    autoround.py MODEL OUT --text FILE.parquet|FILE.txt [--bits 2] [--group-size 64] [--windows 128] [--seq-len 2048]
                 [--seed 0] [--iters 200] [--alg-ext]

Windows are those of a recipe with `join = "card"`: rows as they are, empty ones as " \\n", and offsets by Python's generator. The
file is written in AutoGPTQ's layout. Needs auto-round, torch, transformers and, for parquet, pyarrow.
"""
import argparse, json, pathlib, random, shutil, time

import tokenizers, torch, transformers
from auto_round import AutoRound


def rows(path):
    if path.suffix == ".txt":
        return [path.read_text()]
    import pyarrow.parquet
    return pyarrow.parquet.read_table(path)["text"].to_pylist()


def windows(args):
    text = "".join(row if row else " \n" for row in rows(args.text))
    ids = tokenizers.Tokenizer.from_file(str(args.model / "tokenizer.json")).encode(text).ids
    random.seed(args.seed)
    starts = [random.randint(0, len(ids) - args.seq_len - 1) for _ in range(args.windows)]
    return torch.tensor([ids[start:start + args.seq_len] for start in starts])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--alg-ext", action="store_true")
    args = parser.parse_args()
    tokens = windows(args)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    start = time.time()
    rounder = AutoRound(model, tokenizer, bits=args.bits, group_size=args.group_size, sym=not args.asym, iters=args.iters,
                        dataset=batches, seqlen=args.seq_len, nsamples=args.windows, batch_size=8, seed=args.seed,
                        enable_alg_ext=args.alg_ext)
    rounder.quantize_and_save(str(args.out), format="auto_gptq")
    print(json.dumps({"out": str(args.out), "seconds": round(time.time() - start, 1), "bits": args.bits,
                      "group_size": args.group_size, "iters": args.iters, "alg_ext": args.alg_ext, "asym": args.asym}))


if __name__ == "__main__":
    main()
