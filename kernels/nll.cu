// nll: -log softmax(logits)[target], and KL(p || q) of two rows of logits, with its gradient by those of q.
//
// Layout   logits [rows, vocab] f32; targets u32 [rows]; out f32 [rows]; gradient [rows, vocab] fp16, `scale` times
//          what it is. Logits have been capped at `cap`, unless that is 0; the gradient is by those before.
// Launch   a block of 256 threads a row.
// Regime   memory: the row is read twice (maximum, sum), the second time mostly from the second-level
//          cache, for the divergence a third time and for its gradient a fourth.
// Bound    8 bytes a logit at 3 TB/s: the product that makes the logits takes a hundred times longer.
#include "half.cuh"
#include "reduce.cuh"

namespace {

__device__ __forceinline__ float log_sum_exp(const float* row, int vocab, float* scratch) {
    float top = Max::identity();
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) top = fmaxf(top, row[i]);
    top = block_reduce<Max>(top, scratch);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(row[i] - top);
    return top + logf(block_reduce<Add>(sum, scratch));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
nll(const float* logits, const unsigned* targets, float* out, int vocab) {
    __shared__ float scratch[32];
    const float* row = logits + (long long)blockIdx.x * vocab;
    const float norm = log_sum_exp(row, vocab, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = norm - row[targets[blockIdx.x]];
}

extern "C" __global__ void __launch_bounds__(256)
kl(const float* p_logits, const float* q_logits, float* out, int vocab) {
    __shared__ float scratch[32];
    const float* p = p_logits + (long long)blockIdx.x * vocab;
    const float* q = q_logits + (long long)blockIdx.x * vocab;
    const float p_norm = log_sum_exp(p, vocab, scratch), q_norm = log_sum_exp(q, vocab, scratch);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float log_p = p[i] - p_norm;
        sum += expf(log_p) * (log_p - (q[i] - q_norm));
    }
    sum = block_reduce<Add>(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
kl_gradient(const float* p_logits, const float* q_logits, float* out, half_t* gradient, int vocab, float scale,
            float cap) {
    __shared__ float scratch[32];
    const float* p = p_logits + (long long)blockIdx.x * vocab;
    const float* q = q_logits + (long long)blockIdx.x * vocab;
    half_t* to = gradient + (long long)blockIdx.x * vocab;
    const float p_norm = log_sum_exp(p, vocab, scratch), q_norm = log_sum_exp(q, vocab, scratch);
    const float inverse = cap > 0.0f ? 1.0f / cap : 0.0f;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float log_p = p[i] - p_norm, log_q = q[i] - q_norm, part = expf(log_p);
        sum += part * (log_p - log_q);
        const float tanh = q[i] * inverse;
        to[i] = float_to_half(scale * (1.0f - tanh * tanh) * (expf(log_q) - part));
    }
    sum = block_reduce<Add>(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
