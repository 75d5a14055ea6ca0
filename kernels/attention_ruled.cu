// attention_ruled: causal attention as attention.cu has it, with a cap on scores, a window of keys, and heads of any
// even size up to 256.
//
// Layout   q, out [windows * seq_len, heads * dim], k, v [windows * seq_len, kv_heads * dim], fp16 row major, dim up
//          to D; query head h reads key head h / (heads / kv_heads). Of one window, k and v may have `past` rows more:
//          keys before the first query.
//          A query sees itself and the `window` - 1 keys before it. Scores are cap * tanh(q k^T * scale / cap), for
//          which `inner` is 2 log2(e) * scale / cap and `outer` log2(e) * cap, or q k^T * scale, for which they are 0
//          and log2(e) * scale. attention_ruled_D takes multiples of 8 as dim, attention_words_D even numbers.
// Launch   grid (query tiles, heads, windows), 128 threads: 4 warps of 16 T queries, T being 2 for attention_ruled_D
//          up to 128 and 1 otherwise; dynamic shared memory (64 T + 2 * 64) * (D + 8) halves at most. Tile 0 of the
//          grid is the last of the window, since late queries see most keys and should start first.
// Regime   tensor cores, as attention.cu; steps of keys that no query of the block sees are left out. Columns from dim
//          to D are zeros that cost what others do. Steps are of 32 keys where registers do not hold 64.
// Bound    4 * D operations a query and key that it sees: half of a full product without a window. A cap costs two
//          operations of the special unit more a score, at 16 a clock and multiprocessor.
#include "attention.cuh"

namespace {

// Divides by the sums and writes the rows inside the window.
template <int D>
__device__ __forceinline__ void store(half_t* to, long long stride, float (&out)[D / 8][4], float (&sum)[2],
                                      int first_query, int seq_len, int dim, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = 1.0f / total;
        const int query = first_query + lane / 4 + half * 8;
        if (query >= seq_len) continue;
        half_t* row = to + query * stride;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            if (column < dim) {
                *reinterpret_cast<half2_t*>(row + column) =
                    floats_to_half2(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
            }
        }
    }
}

struct Shape {
    int heads, kv_heads, dim, seq_len, past, window;
};

template <int D, bool WORDS>
__device__ __forceinline__ void attention(const half_t* q, const half_t* k, const half_t* v, half_t* out,
                                          const Shape& of, float inner, float outer) {
    extern __shared__ uint4 shared[];
    constexpr int PITCH = (D / 8 + 1) * 16;
    constexpr int ROW_TILES = D > 128 || WORDS ? 1 : 2;
    constexpr int KEYS = ROW_TILES == 2 && D > 80 ? 32 : 64;  // what registers allow
    constexpr int QUERIES = WARPS * ROW_TILES * 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const long long q_stride = (long long)of.heads * of.dim, kv_stride = (long long)of.kv_heads * of.dim;
    const long long first_row = (long long)blockIdx.z * of.seq_len;
    const int head = blockIdx.y, kv_head = head / (of.heads / of.kv_heads);
    q += first_row * q_stride + head * of.dim;
    out += first_row * q_stride + head * of.dim;
    k += first_row * kv_stride + kv_head * of.dim;
    v += first_row * kv_stride + kv_head * of.dim;

    const unsigned q_at = shared_address(shared);
    const unsigned k_at = q_at + QUERIES * PITCH, v_at = k_at + KEYS * PITCH;
    const unsigned my_q = q_at + warp * ROW_TILES * 16 * PITCH;
    const int my_query = tile + warp * ROW_TILES * 16;
    const int keys = of.past + of.seq_len;
    const int first_step = max(of.past + tile + 1 - of.window, 0) / KEYS;
    const int steps = (of.past + min(tile + QUERIES, of.seq_len) + KEYS - 1) / KEYS;

    float sums[ROW_TILES][D / 8][4] = {};
    float top[ROW_TILES][2], sum[ROW_TILES][2] = {};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) top[r][0] = top[r][1] = -__int_as_float(0x7f800000);

    const int start = first_step * KEYS;
    copy_heads<D, QUERIES, WORDS>(q_at, q + tile * q_stride, q_stride, of.seq_len - tile, of.dim);
    copy_heads<D, KEYS, WORDS>(k_at, k + start * kv_stride, kv_stride, keys - start, of.dim);
    copy_async_commit();
    for (int step = first_step; step < steps; step++) {
        const int first_key = step * KEYS;
        // A warp whose queries all come before the first key, whose windows begin behind the last, or which has no
        // queries, has nothing to do but copy.
        const bool seen = my_query < of.seq_len && first_key < of.past + my_query + ROW_TILES * 16 &&
                          of.past + my_query - (first_key + KEYS - 1) < of.window;
        float s[ROW_TILES][KEYS / 8][4];
        copy_async_wait<0>();
        __syncthreads();
        copy_heads<D, KEYS, WORDS>(v_at, v + first_key * kv_stride, kv_stride, keys - first_key, of.dim);
        copy_async_commit();
        if (seen) scores<D, ROW_TILES, KEYS>(s, my_q, k_at, lane);
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) {
            const int next = first_key + KEYS;
            copy_heads<D, KEYS, WORDS>(k_at, k + next * kv_stride, kv_stride, keys - next, of.dim);
        }
        copy_async_commit();
        if (!seen) continue;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const int query = of.past + my_query + r * 16;  // as keys are counted
            if (inner > 0.0f) cap<KEYS>(s[r], inner);
            if (first_key + KEYS > min(query + 1, keys) || query + 15 - first_key >= of.window) {
                hide<KEYS>(s[r], query, first_key, keys, of.window, lane);
            }
            soften<D, KEYS, true>(s[r], sums[r], top[r], sum[r], outer);
        }
        weigh<D, ROW_TILES, KEYS>(sums, s, v_at, lane);
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        store<D>(out, q_stride, sums[r], sum[r], my_query + r * 16, of.seq_len, of.dim, lane);
    }
}

}  // namespace

#define ATTENTION(name, D, WORDS)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(                                               \
        const half_t* q, const half_t* k, const half_t* v, half_t* out, int heads, int kv_heads, int dim,        \
        int seq_len, int past, int window, float inner, float outer) {                                           \
        attention<D, WORDS>(q, k, v, out, Shape{heads, kv_heads, dim, seq_len, past, window}, inner, outer);     \
    }

ATTENTION(attention_ruled_32, 32, false)
ATTENTION(attention_ruled_64, 64, false)
ATTENTION(attention_ruled_80, 80, false)
ATTENTION(attention_ruled_96, 96, false)
ATTENTION(attention_ruled_112, 112, false)
ATTENTION(attention_ruled_128, 128, false)
ATTENTION(attention_ruled_160, 160, false)
ATTENTION(attention_ruled_192, 192, false)
ATTENTION(attention_ruled_256, 256, false)
ATTENTION(attention_words_128, 128, true)
ATTENTION(attention_words_256, 256, true)
