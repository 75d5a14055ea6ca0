// step_attention: softmax(q k^T / sqrt(D)) v of one new token of each sequence over all that is in its cache,
// cut into splits of so many keys; step_join puts the splits together. Norms of heads, the rotary embedding and
// the new token's way into the cache come first.
//
// Layout   qkv [tokens, (heads + 2 kv_heads) * D] f32: queries, keys, values. keys, values [sequences, capacity,
//          kv_heads, D] fp16; at [tokens]: sequence and position. cos, sin [positions, D / 2] f32; gains [D] f32 or
//          null. sums [tokens, heads, splits, D] and stats [tokens, heads, splits] (maximum, sum) f32; only what a
//          token's length asks for is written. step_join: `to` as in ordered.cuh.
// Launch   grid (kv_heads * groups of up to GROUP query heads, splits, tokens), 128 threads, dynamic shared memory
//          for 64 keys and values of D and for GROUP (128 + 64) floats, queries and weights. step_join: grid (blocks
//          of 128 places, tokens), 512 threads.
// Regime   latency; memory for long sequences, whose keys and values are read once for all query heads that share
//          them. Bound: 4 kv_heads * D bytes a token of context and block, 16 MB at 4096 tokens and 8 heads of 128: 4
//          us at 4 TB/s.
//
// Keys and values of earlier tokens are on their way before the projections are made. Sixteen lanes share a key,
// eight values each: D is a multiple of 16, 128 at most. The new key and value are written by every block that reads
// them, the same bytes by each.
#include "dependent.cuh"
#include "mma.cuh"
#include "ordered.cuh"
#include "reduce.cuh"

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kMost = 128;
constexpr int kShares = 2 * kWarps;  // keys that are looked at side by side
constexpr int kKeys = 64;            // keys that are in shared memory at a time

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

// Queues copies of some keys or values; rows of dim values, `stride` apart in memory, none in shared memory.
__device__ __forceinline__ void fetch_rows(half_t* to, const half_t* from, int rows, int dim, long long stride) {
    const int chunks = dim / 8;
    for (int i = threadIdx.x; i < rows * chunks; i += kThreads) {
        const int row = i / chunks, at = i % chunks * 8;
        copy_async_16(shared_address(to + row * dim + at), from + row * stride + at, true);
    }
}

// What a thread knows of the keys so far: of each query head its eight values' weighted sums over its share.
template <int GROUP>
struct Running {
    float top[GROUP], total[GROUP], out[GROUP][8];
};

// Weighs `count` keys and values in shared memory. Scores are multiples of log2(e); `weights` holds kKeys a head.
template <int GROUP>
__device__ __forceinline__ void weigh(const half_t* keys, const half_t* values, int count, int dim, const float* query,
                                      float* weights, Running<GROUP>& run) {
    const int lane = threadIdx.x % 32, share = threadIdx.x / 16, part = threadIdx.x % 16;
    const bool active = part * 8 < dim;
    float mine[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) mine[g][i] = active ? query[g * kMost + part * 8 + i] : 0.0f;
    for (int key = share; key < kKeys; key += kShares) {
        float k[8] = {};
        if (active && key < count) eight(keys + key * dim + part * 8, k);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) dot = fmaf(mine[g][i], k[i], dot);
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
            if (part == g) weights[g * kKeys + key] = key < count ? dot : Max::identity();
        }
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        // Every warp for itself: two keys a lane.
        const float one = weights[g * kKeys + lane], two = weights[g * kKeys + lane + 32];
        const float top = fmaxf(run.top[g], warp_reduce<Max>(fmaxf(one, two)));
        const float fade = exp2f(run.top[g] - top);
        run.total[g] = run.total[g] * fade + warp_reduce<Add>(exp2f(one - top) + exp2f(two - top));
        run.top[g] = top;
#pragma unroll
        for (int i = 0; i < 8; ++i) run.out[g][i] *= fade;
    }
    for (int key = share; key < count; key += kShares) {
        float v[8] = {};
        if (active) eight(values + key * dim + part * 8, v);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            const float weight = exp2f(weights[g * kKeys + key] - run.top[g]);
#pragma unroll
            for (int i = 0; i < 8; ++i) run.out[g][i] = fmaf(weight, v[i], run.out[g][i]);
        }
    }
    __syncthreads();
}

// Query heads, turned and scaled; those that a group lacks are zeros. A head by a warp.
template <int GROUP>
__device__ __forceinline__ void make_queries(const Operands& o, const float* x, int count, Angles angles,
                                             float* query) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int g = warp; g < GROUP; g += kWarps) {
        if (g < count) {
            turn(x + g * o.dim, o.q_gain, o.eps, angles, o.scale, lane,
                 [&](int i, float value) { query[g * kMost + i] = value; });
        } else {
            for (int i = lane; i < o.dim; i += 32) query[g * kMost + i] = 0.0f;
        }
    }
}

// The new token's key and value, x and kv_heads heads behind it, into the cache at `row` and into shared memory.
__device__ __forceinline__ void make_newest(const Operands& o, const float* x, Angles angles, long long row, half_t* key,
                                            half_t* value) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp == kWarps - 1) {
        for (int i = lane; i < o.dim; i += 32) o.values[row + i] = value[i] = float_to_half(x[o.kv_heads * o.dim + i]);
    } else if (warp == kWarps - 2) {
        turn(x, o.k_gain, o.eps, angles, 1.0f, lane,
             [&](int i, float turned) { o.keys[row + i] = key[i] = float_to_half(turned); });
    }
}

// Adds up the shares and leaves what step_join takes: of query head g at `split` + g splits.
template <int GROUP>
__device__ __forceinline__ void put_split(const Operands& o, Running<GROUP>& run, float* parts, long long split,
                                          int count) {
    const int dim = o.dim, warp = threadIdx.x / 32, share = threadIdx.x / 16, part = threadIdx.x % 16;
#pragma unroll
    for (int g = 0; g < GROUP; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            run.out[g][i] += __shfl_xor_sync(0xffffffffu, run.out[g][i], 16);
            if (share % 2 == 0 && part * 8 < dim) parts[(warp * GROUP + g) * dim + part * 8 + i] = run.out[g][i];
        }
    if (threadIdx.x == 0) {
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            if (g < count) o.stats[split + g * gridDim.y] = make_float2(run.top[g], run.total[g]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * dim; i += kThreads) {
        const int g = i / dim, d = i % dim;
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < kWarps; ++from) sum += parts[(from * GROUP + g) * dim + d];
        o.sums[(split + g * gridDim.y) * dim + d] = sum;
    }
}

template <int GROUP>
__device__ __forceinline__ void attend(const Operands& o) {
    extern __shared__ uint4 shared[];
    const int heads = o.heads, kv_heads = o.kv_heads, dim = o.dim;
    half_t *keys = (half_t*)shared, *values = keys + kKeys * dim;
    float *query = (float*)(values + kKeys * dim), *weights = query + GROUP * kMost;
    launch_next();
    const int token = blockIdx.z, per = heads / kv_heads, chunks = (per + GROUP - 1) / GROUP;
    const int kv_head = blockIdx.x / chunks, chunk = blockIdx.x % chunks * GROUP;
    const int first_head = kv_head * per + chunk, count = min(GROUP, per - chunk);
    // Where tokens go is known before the step begins, and what is there is older than it.
    const int2 place = o.at[token];
    const int first = blockIdx.y * o.split, keys_here = min(o.split, place.y + 1 - first);
    if (keys_here <= 0) return;
    const bool newest = first + keys_here == place.y + 1;
    const long long stride = (long long)kv_heads * dim;
    const long long start = ((long long)place.x * o.capacity + first) * stride + kv_head * dim;
    const auto fetch = [&](int from) {
        // Without the newest, which is made here.
        const int rows = min(kKeys, keys_here - from - (newest ? 1 : 0));
        fetch_rows(keys, o.keys + start + from * stride, rows, dim, stride);
        fetch_rows(values, o.values + start + from * stride, rows, dim, stride);
        copy_async_commit();
    };
    fetch(0);
    wait_for_last();

    const float* qkv = o.qkv + (long long)token * (heads + 2 * kv_heads) * dim;
    const long long turned = (long long)place.y * (dim / 2);
    const Angles angles = {o.cos + turned, o.sin + turned, dim / 2};
    make_queries<GROUP>(o, qkv + first_head * dim, count, angles, query);
    Running<GROUP> run = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) run.top[g] = Max::identity();
    for (int from = 0; from < keys_here; from += kKeys) {
        if (from > 0) fetch(from);
        const int here = min(kKeys, keys_here - from);
        if (newest && from + here == keys_here) {
            const long long row = start + (keys_here - 1) * stride;
            make_newest(o, qkv + (heads + kv_head) * dim, angles, row, keys + (here - 1) * dim, values + (here - 1) * dim);
        }
        copy_async_wait<0>();
        __syncthreads();
        weigh<GROUP>(keys, values, here, dim, query, weights, run);
    }
    // The keys are done with: their place takes the shares.
    put_split<GROUP>(o, run, (float*)shared, ((long long)token * heads + first_head) * gridDim.y + blockIdx.y, count);
}

}  // namespace

// scale is log2(e) / sqrt(D).
#define STEP_ATTENTION(GROUP)                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)            \
        step_attention_##GROUP(const __grid_constant__ Operands o) {     \
        attend<GROUP>(o);                                                \
    }

STEP_ATTENTION(1)
STEP_ATTENTION(2)
STEP_ATTENTION(4)
STEP_ATTENTION(8)

extern "C" __global__ void __launch_bounds__(512)
step_join(const float* sums, const float2* stats, const int2* at, const __grid_constant__ Ordered to, int heads, int dim,
          int splits, int split) {
    constexpr int PLACES = 128, QUARTERS = 4;  // so many threads share a place's splits
    __shared__ float3 found[QUARTERS][PLACES];
    __shared__ OrderedRoom room;
    launch_next();
    const int here = threadIdx.x % PLACES, quarter = threadIdx.x / PLACES;
    const int place = blockIdx.x * PLACES + here, token = blockIdx.y;
    const int value = column_at(to, place, heads * dim);
    const int active = (at[token].y + split) / split;  // of position + 1 keys
    wait_for_last();
    float3 mine = {Max::identity(), 0.0f, 0.0f};  // maximum, total and weighted sum
    if (value >= 0) {
        const long long row = ((long long)token * heads + value / dim) * splits;
#pragma unroll 4
        for (int i = quarter; i < active; i += QUARTERS) {
            const float2 stat = stats[row + i];
            const float sum = sums[(row + i) * dim + value % dim];
            const float top = fmaxf(mine.x, stat.x), old = exp2f(mine.x - top), weight = exp2f(stat.x - top);
            mine = {top, mine.y * old + stat.y * weight, mine.z * old + sum * weight};
        }
    }
    found[quarter][here] = mine;
    __syncthreads();
    float top = mine.x, total = 0.0f, sum = 0.0f;
    for (int q = 0; q < QUARTERS; ++q) top = fmaxf(top, found[q][here].x);
    for (int q = 0; q < QUARTERS; ++q) {
        const float3 part = found[q][here];
        const float weight = exp2f(part.x - top);
        total = fmaf(weight, part.y, total);
        sum = fmaf(weight, part.z, sum);
    }
    // The first quarter's threads put it.
    const bool mine_to_put = quarter == 0 && value >= 0;
    put_ordered(to, token, quarter == 0 ? place : to.padded, mine_to_put ? float_to_half(sum / total) : 0, room);
}
