// attention_backward: the gradients by q, k and v of causal attention, with a cap on scores, a window of keys, and heads of
// any even size up to 256.
//
// With P the weights, dP = dout v^T and delta the product of each query's dout and out, products q k^T have the gradient
// dS = P * (dP - delta), times what a cap lets through, times scale; dq = dS k, dk = dS^T q, dv = P^T dout. P and dS are
// fp16 as operands of products, whose sums are f32.
//
// Layout   q, out, dout, dq [windows * seq_len, heads * dim], k, v, dk, dv [windows * seq_len, kv_heads * dim], fp16 row
//          major, dim up to D; query head h reads key head h / (heads / kv_heads). A query sees itself and the `window` - 1
//          keys before it. `inner` and `outer` are as in attention_ruled.cu, `scale` what products are multiplied by.
//          norms, deltas [windows, heads, seq_len] f32: of every query, the binary logarithm of the sum of its weights
//          before they are divided by it, and its delta; made by the first kernel for the second.
// Launch   attention_backward_queries_D, for norms, deltas and dq: grid (query tiles, heads, windows), 128 threads: 4 warps
//          of 16 queries; dynamic shared memory (128 + 2 * KEYS * STAGES) * (D + 8) halves, KEYS being 64 or, for D above
//          64, 32, and STAGES 2 or, for D above 128, 1.
//          attention_backward_keys_D, for dk and dv: grid (key tiles, kv_heads * parts, windows), 128 threads: 4 warps of 16
//          keys; dynamic shared memory (128 + 64 * STAGES) * (D + 8) halves. Parts are 2 for D above 128, of D / 2 columns
//          of dk and dv.
// Regime   tensor cores. A block of queries walks over its keys twice, for the norms and for dq; a block of keys walks over
//          the queries of all heads that read them, so that no sum is made by two blocks and its order is fixed. With two
//          stages a step is on the way while the one before is computed.
// Bound    16 * D operations a query and key that it sees, of which 10 * D are the least: 4.4 TFLOP, 25 ms at 180 TFLOP/s,
//          for 64 heads of 128 and 4 windows of 4096. Above 128 columns the two parts make scores twice.
#include "attention.cuh"
#include "reduce.cuh"

namespace {

constexpr int TILE = WARPS * 16;  // queries or keys of a block
constexpr int STEP = 32;          // queries of a step over them: one a lane, for norms and deltas

// What shared memory and registers allow: keys of a step over them, and steps that have a place.
template <int D>
constexpr int kKeys = D > 64 ? 32 : 64;
template <int D>
constexpr int kStages = D > 128 ? 1 : 2;

struct Shape {
    int heads, kv_heads, dim, seq_len, window;
};

__device__ __forceinline__ float minus_infinity() { return -__int_as_float(0x7f800000); }

template <int D, int ROWS>
__device__ __forceinline__ void copy_rows(unsigned to, const half_t* from, long long stride, int rows, int dim) {
    if (dim % 8 == 0) {
        copy_heads<D, ROWS, false>(to, from, stride, rows, dim);
    } else {
        copy_heads<D, ROWS, true>(to, from, stride, rows, dim);
    }
}

// Joins scores to the running maximum and sum of the two rows that this thread sees, as soften does.
template <int KEYS>
__device__ __forceinline__ void join(const float (&s)[KEYS / 8][4], float (&top)[2], float (&sum)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float best = top[half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) best = fmaxf(best, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        const float shift = best == minus_infinity() ? 0.0f : best * scale;
        sum[half] *= exp2_approx(top[half] * scale - shift);
        top[half] = best;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) sum[half] += exp2_approx(fmaf(s[n][i], scale, -shift));
    }
}

// The products of out and dout of this warp's 16 rows, each lane's two.
__device__ __forceinline__ void products(float (&delta)[2], const half_t* out, const half_t* dout, long long stride,
                                         int rows, int dim, int lane) {
    delta[0] = delta[1] = 0.0f;
    for (int row = 0; row < min(rows, 16); row++) {
        float sum = 0.0f;
        for (int column = 2 * lane; column < dim; column += 64) {
            const float2 a = half2_to_floats(*(const half2_t*)(out + row * stride + column));
            const float2 b = half2_to_floats(*(const half2_t*)(dout + row * stride + column));
            sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
        }
        sum = warp_reduce<Add>(sum);
        if (row == lane / 4) delta[0] = sum;
        if (row == lane / 4 + 8) delta[1] = sum;
    }
}

// Writes this warp's 16 rows, times a factor, inside the window.
template <int C>
__device__ __forceinline__ void store(half_t* to, long long stride, const float (&sums)[C / 8][4], float factor, int rows,
                                      int columns, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + half * 8;
        if (row >= rows) continue;
#pragma unroll
        for (int n = 0; n < C / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            if (column < columns) {
                *reinterpret_cast<half2_t*>(to + row * stride + column) =
                    floats_to_half2(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
            }
        }
    }
}

// What the score's cap lets through of a change, for a score before the exponential.
__device__ __forceinline__ float slope(float score, float inner) {
    return inner > 0.0f ? 1.0f - score * score : 1.0f;
}

template <int D>
__device__ __forceinline__ void queries(const half_t* q, const half_t* k, const half_t* v, const half_t* out,
                                        const half_t* dout, half_t* dq, float* norms, float* deltas, const Shape& of,
                                        float inner, float outer, float scale) {
    extern __shared__ uint4 shared[];
    constexpr int PITCH = (D / 8 + 1) * 16;
    constexpr int KEYS = kKeys<D>, STAGES = kStages<D>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = (gridDim.x - 1 - blockIdx.x) * TILE;
    const long long q_stride = (long long)of.heads * of.dim, kv_stride = (long long)of.kv_heads * of.dim;
    const long long first_row = (long long)blockIdx.z * of.seq_len;
    const int head = blockIdx.y, kv_head = head / (of.heads / of.kv_heads);
    const long long at = (first_row + tile) * q_stride + head * of.dim;
    q += at, out += at, dout += at, dq += at;
    k += first_row * kv_stride + kv_head * of.dim;
    v += first_row * kv_stride + kv_head * of.dim;

    const unsigned q_at = shared_address(shared), dout_at = q_at + TILE * PITCH;
    const unsigned places = dout_at + TILE * PITCH;
    const unsigned my_q = q_at + warp * 16 * PITCH, my_dout = dout_at + warp * 16 * PITCH;
    const int my_query = tile + warp * 16, my_rows = of.seq_len - my_query;
    const int first_step = max(tile - of.window + 1, 0) / KEYS;
    const int steps = (min(tile + TILE, of.seq_len) + KEYS - 1) / KEYS;
    // A warp whose queries all come before a step's first key, whose windows begin behind its last, or which has no
    // queries, has nothing to do but copy.
    const auto seen = [&](int first_key) {
        return my_rows > 0 && first_key < my_query + 16 && my_query - (first_key + KEYS - 1) < of.window;
    };
    const auto make_scores = [&](float (&s)[1][KEYS / 8][4], unsigned keys, int first_key) {
        scores<D, 1, KEYS>(s, my_q, keys, lane);
        if (inner > 0.0f) cap<KEYS>(s[0], inner);
        if (first_key + KEYS > min(my_query + 1, of.seq_len) || my_query + 15 - first_key >= of.window) {
            hide<KEYS>(s[0], my_query, first_key, of.seq_len, of.window, lane);
        }
    };
    const auto copy_step = [&](unsigned to, const half_t* from, int step) {
        copy_rows<D, KEYS>(to, from + (long long)step * KEYS * kv_stride, kv_stride, of.seq_len - step * KEYS, of.dim);
    };

    float top[2] = {minus_infinity(), minus_infinity()}, norm[2] = {}, delta[2];
    copy_rows<D, TILE>(q_at, q, q_stride, of.seq_len - tile, of.dim);
    copy_rows<D, TILE>(dout_at, dout, q_stride, of.seq_len - tile, of.dim);
    copy_step(places, k, first_step);
    copy_async_commit();
    products(delta, out + warp * 16 * q_stride, dout + warp * 16 * q_stride, q_stride, my_rows, of.dim, lane);
    for (int step = first_step; step < steps; step++) {
        // Keys take turns in the places of keys and values.
        const int turn = (step - first_step) % 2;
        const unsigned here = places + turn * KEYS * PITCH, other = places + (1 - turn) * KEYS * PITCH;
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) copy_step(other, k, step + 1);
        copy_async_commit();
        if (!seen(step * KEYS)) continue;
        float s[1][KEYS / 8][4];
        make_scores(s, here, step * KEYS);
        join<KEYS>(s[0], top, norm, outer);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        norm[half] += __shfl_xor_sync(0xffffffffu, norm[half], 1);
        norm[half] += __shfl_xor_sync(0xffffffffu, norm[half], 2);
        norm[half] = norm[half] > 0.0f ? fmaf(top[half], outer, log2f(norm[half])) : 0.0f;
        const int row = lane / 4 + half * 8;
        if (lane % 4 == 0 && row < my_rows) {
            const long long place = ((long long)blockIdx.z * of.heads + head) * of.seq_len + my_query + row;
            norms[place] = norm[half];
            deltas[place] = delta[half];
        }
    }

    float sums[1][D / 8][4] = {};
    const auto copy_stage = [&](int stage, int step) {
        copy_step(places + 2 * stage * KEYS * PITCH, k, step);
        copy_step(places + (2 * stage + 1) * KEYS * PITCH, v, step);
        copy_async_commit();
    };
    __syncthreads();
    if (STAGES == 2) copy_stage(0, first_step);
    for (int step = first_step; step < steps; step++) {
        const int first_key = step * KEYS, stage = STAGES == 2 ? (step - first_step) % 2 : 0;
        const unsigned k_at = places + 2 * stage * KEYS * PITCH, v_at = k_at + KEYS * PITCH;
        if (STAGES == 1 && step > first_step) __syncthreads();
        if (STAGES == 1) copy_stage(0, step);
        copy_async_wait<0>();
        __syncthreads();
        if (STAGES == 2 && step + 1 < steps) copy_stage(1 - stage, step + 1);
        if (!seen(first_key)) continue;
        float s[1][KEYS / 8][4], dp[1][KEYS / 8][4];
        make_scores(s, k_at, first_key);
        scores<D, 1, KEYS>(dp, my_dout, v_at, lane);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float score = s[0][n][i], p = exp2_approx(fmaf(score, outer, -norm[i / 2]));
                // A hidden key's score is no number to multiply by.
                s[0][n][i] = p > 0.0f ? p * (dp[0][n][i] - delta[i / 2]) * slope(score, inner) : 0.0f;
            }
        weigh<D, 1, KEYS>(sums, s, k_at, lane);
    }
    store<D>(dq + warp * 16 * q_stride, q_stride, sums[0], scale, my_rows, of.dim, lane);
}

template <int D>
__device__ __forceinline__ void keys(const half_t* q, const half_t* k, const half_t* v, const half_t* dout, half_t* dk,
                                     half_t* dv, const float* norms, const float* deltas, const Shape& of, float inner,
                                     float outer, float scale) {
    extern __shared__ uint4 shared[];
    constexpr int PITCH = (D / 8 + 1) * 16;
    constexpr int PARTS = D > 128 ? 2 : 1, C = D / PARTS, STAGES = kStages<D>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x * TILE;
    const long long q_stride = (long long)of.heads * of.dim, kv_stride = (long long)of.kv_heads * of.dim;
    const long long first_row = (long long)blockIdx.z * of.seq_len;
    const int kv_head = blockIdx.y / PARTS, part = blockIdx.y % PARTS * C, together = of.heads / of.kv_heads;
    const long long at = (first_row + tile) * kv_stride + kv_head * of.dim;
    k += at, v += at, dk += at + part, dv += at + part;
    q += first_row * q_stride + kv_head * together * of.dim;
    dout += first_row * q_stride + kv_head * together * of.dim;
    norms += ((long long)blockIdx.z * of.heads + kv_head * together) * of.seq_len;
    deltas += ((long long)blockIdx.z * of.heads + kv_head * together) * of.seq_len;

    const unsigned k_at = shared_address(shared), v_at = k_at + TILE * PITCH;
    const unsigned places = v_at + TILE * PITCH;
    const unsigned my_k = k_at + warp * 16 * PITCH, my_v = v_at + warp * 16 * PITCH;
    const int my_key = tile + warp * 16, my_rows = of.seq_len - my_key;
    // No query before the tile sees it, and none past its last key's window.
    const int end = min(of.seq_len, tile + TILE + min(of.window, of.seq_len) - 1);

    // The queries of one head after those of another.
    const int turns_of_head = (end - tile + STEP - 1) / STEP, turns = turns_of_head * together;
    const auto copy_stage = [&](int stage, int turn) {
        const int head = turn / turns_of_head, first = tile + turn % turns_of_head * STEP;
        const unsigned to = places + 2 * stage * STEP * PITCH;
        const long long from = first * q_stride + head * of.dim;
        copy_rows<D, STEP>(to, q + from, q_stride, of.seq_len - first, of.dim);
        copy_rows<D, STEP>(to + STEP * PITCH, dout + from, q_stride, of.seq_len - first, of.dim);
        copy_async_commit();
    };

    float by_k[1][C / 8][4] = {}, by_v[1][C / 8][4] = {};
    copy_rows<D, TILE>(k_at, k, kv_stride, of.seq_len - tile, of.dim);
    copy_rows<D, TILE>(v_at, v, kv_stride, of.seq_len - tile, of.dim);
    if (STAGES == 2) copy_stage(0, 0);
    for (int turn = 0; turn < turns; turn++) {
        const int stage = STAGES == 2 ? turn % 2 : 0;
        const unsigned q_at = places + 2 * stage * STEP * PITCH, dout_at = q_at + STEP * PITCH;
        const int head = turn / turns_of_head, first = tile + turn % turns_of_head * STEP;
        const bool there = first + lane < of.seq_len;
        const long long place = (long long)head * of.seq_len + first + lane;
        const float norm = there ? norms[place] : 0.0f, delta = there ? deltas[place] : 0.0f;
        if (STAGES == 1 && turn > 0) __syncthreads();
        if (STAGES == 1) copy_stage(0, turn);
        copy_async_wait<0>();
        __syncthreads();
        if (STAGES == 2 && turn + 1 < turns) copy_stage(1 - stage, turn + 1);
        if (my_rows <= 0 || my_key >= first + STEP || first - (my_key + 15) >= of.window) continue;
        float p[1][STEP / 8][4], ds[1][STEP / 8][4];
        scores<D, 1, STEP>(p, my_k, q_at, lane);
        if (inner > 0.0f) cap<STEP>(p[0], inner);
        scores<D, 1, STEP>(ds, my_v, dout_at, lane);
#pragma unroll
        for (int n = 0; n < STEP / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = n * 8 + lane % 4 * 2 + i % 2;
                const int query = first + column, key = my_key + lane / 4 + i / 2 * 8;
                const float its_norm = __shfl_sync(0xffffffffu, norm, column);
                const float its_delta = __shfl_sync(0xffffffffu, delta, column);
                const bool seen = key <= query && query - key < of.window && query < of.seq_len;
                const float score = p[0][n][i];
                const float weight = seen ? exp2_approx(fmaf(score, outer, -its_norm)) : 0.0f;
                p[0][n][i] = weight;
                ds[0][n][i] = weight * (ds[0][n][i] - its_delta) * slope(score, inner);
            }
        weigh<D, 1, STEP, C>(by_v, p, dout_at + part * 2, lane);
        weigh<D, 1, STEP, C>(by_k, ds, q_at + part * 2, lane);
    }
    dk += warp * 16 * kv_stride, dv += warp * 16 * kv_stride;
    store<C>(dk, kv_stride, by_k[0], scale, my_rows, of.dim - part, lane);
    store<C>(dv, kv_stride, by_v[0], 1.0f, my_rows, of.dim - part, lane);
}

}  // namespace

#define ATTENTION_BACKWARD(D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries_##D(                           \
        const half_t* q, const half_t* k, const half_t* v, const half_t* out, const half_t* dout, half_t* dq,          \
        float* norms, float* deltas, int heads, int kv_heads, int dim, int seq_len, int window, float inner,           \
        float outer, float scale) {                                                                                    \
        queries<D>(q, k, v, out, dout, dq, norms, deltas, Shape{heads, kv_heads, dim, seq_len, window}, inner, outer,  \
                   scale);                                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_##D(                              \
        const half_t* q, const half_t* k, const half_t* v, const half_t* dout, half_t* dk, half_t* dv,                 \
        const float* norms, const float* deltas, int heads, int kv_heads, int dim, int seq_len, int window,            \
        float inner, float outer, float scale) {                                                                       \
        keys<D>(q, k, v, dout, dk, dv, norms, deltas, Shape{heads, kv_heads, dim, seq_len, window}, inner, outer,      \
                scale);                                                                                                \
    }

ATTENTION_BACKWARD(32)
ATTENTION_BACKWARD(64)
ATTENTION_BACKWARD(96)
ATTENTION_BACKWARD(128)
ATTENTION_BACKWARD(192)
ATTENTION_BACKWARD(256)
