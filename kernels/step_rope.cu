// step_rope: what comes between projections and attention for one new token of each sequence: norms of
// heads, rotary embedding, and the way into the cache.
//
// Layout   qkv [tokens, (heads + 2 kv_heads) * 2 half] f32: queries, which stay in place, keys, values. cos, sin
//          [positions, half] f32; gains [2 half] f32 or null. at [tokens]: sequence and position. keys, values
//          [sequences, capacity, kv_heads, 2 half] fp16.
// Launch   grid (heads + 2 kv_heads, tokens), 32 threads.
// Regime   latency: some kilobytes. Bound: about 1 us.
#include "dependent.cuh"
#include "half.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(32)
step_rope(float* qkv, const float* q_gain, const float* k_gain, float eps, const float* cos, const float* sin,
          const int2* at, half_t* keys, half_t* values, int heads, int kv_heads, int half, int capacity) {
    launch_next();
    wait_for_last();
    const int head = blockIdx.x, lane = threadIdx.x, dim = 2 * half;
    const int2 place = at[blockIdx.y];
    float* x = qkv + ((long long)blockIdx.y * (heads + 2 * kv_heads) + head) * dim;
    const long long row = (long long)place.x * capacity + place.y;
    if (head >= heads + kv_heads) {
        half_t* to = values + (row * kv_heads + head - heads - kv_heads) * dim;
        for (int i = lane; i < dim; i += 32) to[i] = float_to_half(x[i]);
        return;
    }
    const bool is_key = head >= heads;
    const float* gain = is_key ? k_gain : q_gain;
    float inverse = 1.0f;
    if (gain) {
        float squares = 0.0f;
        for (int i = lane; i < dim; i += 32) squares = fmaf(x[i], x[i], squares);
        inverse = rsqrtf(warp_reduce<Add>(squares) / dim + eps);
    }
    half_t* to = keys + (row * kv_heads + head - heads) * dim;
    for (int i = lane; i < half; i += 32) {
        const float low = x[i] * (gain ? inverse * gain[i] : 1.0f);
        const float high = x[i + half] * (gain ? inverse * gain[i + half] : 1.0f);
        const float c = cos[(long long)place.y * half + i], s = sin[(long long)place.y * half + i];
        const float first = low * c - high * s, second = high * c + low * s;
        if (is_key) {
            to[i] = float_to_half(first), to[i + half] = float_to_half(second);
        } else {
            x[i] = first, x[i + half] = second;
        }
    }
}
