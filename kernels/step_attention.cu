// step_attention: softmax(q k^T / sqrt(D)) v of one new token of each sequence over all that is in its cache,
// cut into splits of so many keys; step_join puts the splits together. Norms of heads, the rotary embedding and
// the new token's way into the cache come first.
//
// Layout   qkv [tokens, (heads + 2 kv_heads) * D] f32: queries, keys, values. keys, values [sequences, capacity,
//          kv_heads, D] fp16; at [tokens]: sequence and position. cos, sin [positions, D / 2] f32; gains [D] f32 or
//          null. sums [tokens, heads, splits, D] and stats [tokens, heads, splits] (maximum, sum) f32; only what a
//          token's length asks for is written. step_join: places [padded] the value that stands at each place, -1
//          for none, or null; out [tokens, padded] fp16, padded a multiple of 32; out_sums [tokens, padded / 32] f32
//          of every 32 of them.
// Launch   grid (kv_heads * groups of up to GROUP query heads, splits, tokens), 256 threads, dynamic shared memory
//          (GROUP * split + 9 * GROUP * 128) floats. step_join: grid (blocks of 256 places, tokens), 256 threads.
// Regime   memory for long sequences: every key and value is read once for all query heads that share it. Bound: 4
//          kv_heads * D bytes a token of context and block, 16 MB at 4096 tokens and 8 heads of 128: 4 us at 4 TB/s.
//
// Sixteen lanes share a key, eight values each: D is a multiple of 16, 128 at most. The new key and value are written
// by every block that reads them, the same bytes by each.
#include "dependent.cuh"
#include "half.cuh"
#include "reduce.cuh"

namespace {

constexpr int kWarps = 8, kShares = 16, kMost = 128;  // shares: keys that are read side by side

__device__ __forceinline__ void eight(const half_t* from, float (&to)[8]) {
    const uint4 v = *(const uint4*)from;
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = half2_to_floats(words[i]);
        to[2 * i] = f.x, to[2 * i + 1] = f.y;
    }
}

struct Angles {
    const float *cos, *sin;  // of one position
    int half;
};

// A head's values, normed where there is a gain, turned, times scale; a warp's work. `put(i, value)` takes them.
template <class Put>
__device__ __forceinline__ void turn(const float* x, const float* gain, float eps, Angles angles, float scale,
                                     int lane, Put put) {
    const int half = angles.half;
    if (gain) {
        float squares = 0.0f;
        for (int i = lane; i < 2 * half; i += 32) squares = fmaf(x[i], x[i], squares);
        scale *= rsqrtf(warp_reduce<Add>(squares) / (2 * half) + eps);
    }
    for (int i = lane; i < half; i += 32) {
        const float low = x[i] * (gain ? scale * gain[i] : scale);
        const float high = x[i + half] * (gain ? scale * gain[i + half] : scale);
        put(i, low * angles.cos[i] - high * angles.sin[i]);
        put(i + half, high * angles.cos[i] + low * angles.sin[i]);
    }
}

struct Operands {
    const float* qkv;
    half_t *keys, *values;
    const int2* at;
    const float *cos, *sin, *q_gain, *k_gain;
    float* sums;
    float2* stats;
    int heads, kv_heads, dim, capacity, split;
    float eps, scale;
};

template <int GROUP>
__device__ __forceinline__ void attend(const Operands& o) {
    extern __shared__ float shared[];
    const int heads = o.heads, kv_heads = o.kv_heads, dim = o.dim, split = o.split;
    float *weights = shared, *query = shared + GROUP * split, *parts = query + GROUP * kMost;
    launch_next();
    wait_for_last();
    const int token = blockIdx.z, per = heads / kv_heads, chunks = (per + GROUP - 1) / GROUP;
    const int kv_head = blockIdx.x / chunks, chunk = blockIdx.x % chunks * GROUP;
    const int first_head = kv_head * per + chunk, count = min(GROUP, per - chunk);
    const int2 place = o.at[token];
    const int first = blockIdx.y * split, keys_here = min(split, place.y + 1 - first);
    if (keys_here <= 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = threadIdx.x / 16, part = threadIdx.x % 16;
    const long long stride = (long long)kv_heads * dim;
    const half_t *keys = o.keys, *values = o.values;

    const float* qkv = o.qkv + (long long)token * (heads + 2 * kv_heads) * dim;
    const long long turned = (long long)place.y * (dim / 2);
    const Angles angles = {o.cos + turned, o.sin + turned, dim / 2};
    if (warp < count) {
        turn(qkv + (first_head + warp) * dim, o.q_gain, o.eps, angles, o.scale, lane,
             [&](int i, float value) { query[warp * kMost + i] = value; });
    } else if (warp < GROUP) {
        for (int i = lane; i < dim; i += 32) query[warp * kMost + i] = 0.0f;
    }
    if (first + keys_here == place.y + 1 && warp >= kWarps - 2) {
        const long long row = ((long long)place.x * o.capacity + place.y) * stride + kv_head * dim;
        const float* x = qkv + (heads + kv_head) * dim;
        if (warp == kWarps - 1) {
            for (int i = lane; i < dim; i += 32) o.values[row + i] = float_to_half(x[kv_heads * dim + i]);
        } else {
            turn(x, o.k_gain, o.eps, angles, 1.0f, lane,
                 [&](int i, float value) { o.keys[row + i] = float_to_half(value); });
        }
    }
    __syncthreads();
    const bool active = part * 8 < dim;
    const long long start = ((long long)place.x * o.capacity + first) * stride + kv_head * dim + part * 8;
    float mine[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) mine[g][i] = active ? query[g * kMost + part * 8 + i] : 0.0f;
#pragma unroll 2
    for (int key = share; key < (keys_here + kShares - 1) / kShares * kShares; key += kShares) {
        float k[8] = {};
        if (active && key < keys_here) eight(keys + start + key * stride, k);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) dot = fmaf(mine[g][i], k[i], dot);
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
            if (part == g && key < keys_here) weights[g * split + key] = dot;
        }
    }
    __syncthreads();
    if (warp < count) {
        float* row = weights + warp * split;
        float top = Max::identity(), sum = 0.0f;
        for (int i = lane; i < keys_here; i += 32) top = fmaxf(top, row[i]);
        top = warp_reduce<Max>(top);
        for (int i = lane; i < keys_here; i += 32) {
            row[i] = exp2f(row[i] - top);
            sum += row[i];
        }
        sum = warp_reduce<Add>(sum);
        if (lane == 0) {
            o.stats[((long long)token * heads + first_head + warp) * gridDim.y + blockIdx.y] = make_float2(top, sum);
        }
    }
    __syncthreads();
    float out[GROUP][8] = {};
#pragma unroll 2
    for (int key = share; key < keys_here; key += kShares) {
        float v[8] = {};
        if (active) eight(values + start + key * stride, v);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            const float weight = g < count ? weights[g * split + key] : 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) out[g][i] = fmaf(weight, v[i], out[g][i]);
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out[g][i] += __shfl_xor_sync(0xffffffffu, out[g][i], 16);
            if (lane < 16) parts[(warp * GROUP + g) * kMost + part * 8 + i] = out[g][i];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < count * dim; i += 256) {
        const int g = i / dim, d = i % dim;
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < kWarps; ++from) sum += parts[(from * GROUP + g) * kMost + d];
        o.sums[(((long long)token * heads + first_head + g) * gridDim.y + blockIdx.y) * dim + d] = sum;
    }
}

}  // namespace

// scale is log2(e) / sqrt(D).
#define STEP_ATTENTION(GROUP)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) step_attention_##GROUP(const __grid_constant__ Operands o) {   \
        attend<GROUP>(o);                                                                                            \
    }

STEP_ATTENTION(1)
STEP_ATTENTION(2)
STEP_ATTENTION(4)
STEP_ATTENTION(8)

extern "C" __global__ void __launch_bounds__(256)
step_join(const float* sums, const float2* stats, const int2* at, const int* places, half_t* out, float* out_sums,
          int heads, int dim, int splits, int split, int padded) {
    launch_next();
    const int place = blockIdx.x * 256 + threadIdx.x, token = blockIdx.y;
    const int value = place >= padded ? -1 : places ? places[place] : place < heads * dim ? place : -1;
    wait_for_last();
    if (place >= padded) return;
    half_t joined = 0;
    if (value >= 0) {
        const int active = (at[token].y + split) / split;  // of position + 1 keys
        const long long row = ((long long)token * heads + value / dim) * splits;
        float top = Max::identity();
        for (int i = 0; i < active; ++i) top = fmaxf(top, stats[row + i].x);
        float total = 0.0f, sum = 0.0f;
        for (int i = 0; i < active; ++i) {
            const float weight = exp2f(stats[row + i].x - top);
            total = fmaf(weight, stats[row + i].y, total);
            sum = fmaf(weight, sums[(row + i) * dim + value % dim], sum);
        }
        joined = float_to_half(sum / total);
    }
    const long long to = (long long)token * padded + place;
    out[to] = joined;
    const float sum = warp_reduce<Add>(half_to_float(joined));
    if (place % 32 == 0) out_sums[to / 32] = sum;
}
