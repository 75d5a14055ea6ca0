#!/usr/bin/env bash
# What is left to be measured of a whole 70B-wide model, each stage by itself: a machine with two GPUs and 256 GiB of memory,
# PyTorch and safetensors for the sources, and a Hub cache (HF_HOME) with wikitext-2.
#
#   whole70b.sh make | best | base | nine | bin        S=/dev/shm/whole70b GPTQ=target/release/gptq
#
# make: 138 GB of random fp16 weights. best: one branch of the recipe on both cards. base: a branch on one card, then `verify
# --base` of it, aimed at 90 s. nine: all branches, made, measured and verified, aimed at 28 minutes; goes on where it was
# stopped. bin: four blocks as `.bin` shards in float32 against the same as safetensors.
set -eu
cd "$(dirname "$0")/../.."
S=${S:-/dev/shm/whole70b} GPTQ=${GPTQ:-target/release/gptq} CONFIG=configs/stablebeluga2.toml
BRANCH=gptq-4bit-128g-actorder_True
TOKENIZER=tests/fixtures/demo-llama

timed() {
    local start=$SECONDS
    "$@"
    printf '%d s: %s\n' $((SECONDS - start)) "$*"
}

case ${1:-} in
make) timed python3 tests/bench/synthetic_checkpoint.py "$S/src" --blocks 80 --tokenizer "$TOKENIZER" ;;
best) timed "$GPTQ" quantize "$S/src" --bits 4 --group-size 128 --act-order --out "$S/best" --device cuda:all ;;
base)
    timed "$GPTQ" quantize "$S/src" --config "$CONFIG" --branch "$BRANCH" --out "$S/one" --device cuda:0
    timed "$GPTQ" verify "$S/one" --base "$S/src" --device cuda:0
    ;;
nine)
    timed "$GPTQ" sweep "$CONFIG" --model "$S/src" --out "$S/nine" --device cuda:all
    for branch in "$S"/nine/*/; do timed "$GPTQ" verify "$branch"; done
    ;;
bin)
    python3 tests/bench/synthetic_bin.py "$S/both" --blocks 4 --tokenizer "$TOKENIZER"
    for kind in bin safetensors; do
        timed "$GPTQ" quantize "$S/both/$kind" --config "$CONFIG" --branch "$BRANCH" --out "$S/of-$kind" --device cuda:0
    done
    cmp "$S/of-bin/model.safetensors" "$S/of-safetensors/model.safetensors"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 1
    ;;
esac
