// gptq_block: solves one block of at most 128 consecutive columns for every row of W.
//
//   for each column i of the block, in order:
//     q   = clamp(rne(w_i / s) + zero, 0, max_code)          v = s (q - zero)
//     err = (w_i - v) / U_ii                                  w_j -= err U_ij           for j > i
//
// gptq_try: the same for one group that is a block, under each candidate s = ratio * 2 absmax /
// max_code, of which only sum err^2 is kept. gptq_pick: the candidate with the least, the first of
// equals.
//
// Layout   w [rows, ld] f32 row-major, the block's first column at w. Row-major because the scale
//          search and the trailing product both walk along a row; a block's 512 B of a row are whole
//          sectors, so column-block-major would gain nothing. u points at U[b, b], row-major,
//          leading dimension ld. scales [groups, rows] f32. codes [rows, ld] u8, at the block's first
//          column. err [rows, err_ld] f32, ditto. row_loss [rows] f64 += sum of err^2.
//          trials [ratios, rows] float2: a candidate's scale and its sum of err^2.
// Launch   256 threads, 64 rows a CTA; gptq_try has a grid of y = ratios; gptq_pick a thread a row. Four lanes (a quad) share a row. Lane l of a quad holds
//          columns 16k + 4l .. + 3, so w is 8 float4 registers a lane. Columns are taken 16 at a
//          time; after 16 the registers move down by one float4, so every register index is a
//          constant while only 16 steps are unrolled. U passes through 8 KB of shared memory (two
//          buffers), zero below the diagonal, identity beyond the block's width; the four lanes of a
//          quad read 64 consecutive bytes and the eight quads of a warp the same ones.
// Regime   latency: 128 dependent steps of about 160 cycles (shuffle, two IEEE divisions, round,
//          FMA), 12 us a block, while the card has fewer than some 7 warps a scheduler.
// Bound    bytes: rows * 128 * (4 read + 4 err + 1 code), 33 MB or 11 us at 3 TB/s for 28672 rows.
//          issue: rows/8 warps * 128 * (45 + 5 * 18) instructions = 30 us on 132 SMs for 28672 rows.
//          gptq_try: that times the ratios, 34: 65 ms for 28672 x 8192. Codes and errors are not
//          stored, and W comes from L2 after the first ratio.
//          LDS: rows/8 warps * 128 * 4.5 wide loads (half the triangle), each at most 4 cycles.
// Numerics divisions, v and w - v are IEEE and never contracted: extremes of a group sit on rounding
//          ties. The updates may use FMA. Each row has one owner and a fixed order of operations.

#include "half.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;                      // lanes that share a row
constexpr int kRows = kThreads / kLanes;       // rows of a CTA
constexpr int kChunk = 16;                     // columns between two barriers
constexpr int kWidth = 128;                    // most columns of a block
constexpr int kChunks = kWidth / kChunk;
constexpr int kStage = kChunk * kWidth;        // floats of U in one buffer
constexpr int kFetch = kStage / kThreads;      // of which a thread brings this many

struct Grid {
    float zero, max_code;
    bool half_values;  // v is rounded to fp16, as loaders of the file do
};

struct Solved {
    float code, error;
};

__device__ __forceinline__ float file_scale(float scale, bool half_scales) {
    if (!half_scales) return scale;
    const float rounded = half_to_float(float_to_half(scale));
    return rounded == 0.0f ? 0x1p-24f : rounded;
}

__device__ __forceinline__ Solved quantise(float w, float scale, float pivot, const Grid& grid) {
    const float rounded = __fadd_rn(rintf(__fdiv_rn(w, scale)), grid.zero);
    const float code = fminf(fmaxf(rounded, 0.0f), grid.max_code);
    float value = __fmul_rn(scale, __fsub_rn(code, grid.zero));
    if (grid.half_values) value = half_to_float(float_to_half(value));
    return {code, __fdiv_rn(__fsub_rn(w, value), pivot)};
}

// Rows of U from 16 * chunk on, columns relative to 16 * chunk; identity beyond the width.
__device__ __forceinline__ void fetch(const float* matrix, int ld, int width, int chunk,
                                      float (&out)[kFetch]) {
#pragma unroll
    for (int t = 0; t < kFetch; ++t) {
        const int at = threadIdx.x + t * kThreads;
        const int row = kChunk * chunk + at / kWidth;
        const int col = kChunk * chunk + at % kWidth;
        const bool inside = row < width && col < width && row <= col;
        out[t] = inside ? matrix[(long long)row * ld + col] : (row == col ? 1.0f : 0.0f);
    }
}

__device__ __forceinline__ void stage(float* shared, const float (&values)[kFetch]) {
#pragma unroll
    for (int t = 0; t < kFetch; ++t) shared[threadIdx.x + t * kThreads] = values[t];
}

// `valid` (at most 4) floats of a row; the rest are 0. Groups of odd sizes start unaligned blocks.
__device__ __forceinline__ float4 load4(const float* p, int valid) {
    if (valid >= 4 && (reinterpret_cast<size_t>(p) & 15) == 0) {
        return *reinterpret_cast<const float4*>(p);
    }
    return {valid > 0 ? p[0] : 0.0f, valid > 1 ? p[1] : 0.0f, valid > 2 ? p[2] : 0.0f,
            valid > 3 ? p[3] : 0.0f};
}

__device__ __forceinline__ void store4(float* p, const float (&v)[4], int valid) {
    if (valid >= 4 && (reinterpret_cast<size_t>(p) & 15) == 0) {
        *reinterpret_cast<float4*>(p) = {v[0], v[1], v[2], v[3]};
        return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        if (c < valid) p[c] = v[c];
    }
}

// w += factor * u, component by component.
__device__ __forceinline__ void axpy(float (&w)[4], float factor, float4 u) {
    w[0] = fmaf(factor, u.x, w[0]);
    w[1] = fmaf(factor, u.y, w[1]);
    w[2] = fmaf(factor, u.z, w[2]);
    w[3] = fmaf(factor, u.w, w[3]);
}

// The scale of the current column; asks for the next group's one group ahead.
struct Scales {
    const float* next_at;
    const float* last;
    long long rows;
    int group_size, until;
    float current, next;

    // `until` columns of the group at `first` are still to come; `last` is the last group's scale.
    __device__ Scales(const float* first, const float* last, int rows, int group_size, int until)
        : next_at(first), last(last), rows(rows), group_size(group_size), until(until) {
        current = *next_at;
        look_ahead();
    }
    __device__ void look_ahead() {
        if (next_at != last) next_at += rows;
        next = *next_at;
    }
    __device__ float step() {
        if (until == 0) {
            current = next;
            until = group_size;
            look_ahead();
        }
        --until;
        return current;
    }
};

__device__ __forceinline__ void solve(float* w, const float* u, const float* scales,
                                      unsigned char* codes, float* err, double* row_loss, int rows,
                                      int ld, int err_ld, int width, int groups_left, int until,
                                      int group_size, Grid grid) {
    __shared__ __align__(16) float su[2][kStage];
    const int lane = threadIdx.x % kLanes;
    const int row = blockIdx.x * kRows + threadIdx.x / kLanes;
    const bool live = row < rows;
    const int safe_row = live ? row : 0;  // threads without a row work on row 0 and store nothing
    const int chunks = (width + kChunk - 1) / kChunk;
    w += (long long)safe_row * ld + 4 * lane;
    codes += (long long)safe_row * ld + 4 * lane;
    err += (long long)safe_row * err_ld + 4 * lane;
    const float* first = scales + safe_row;
    Scales scale(first, first + (long long)(groups_left - 1) * rows, rows, group_size, until);

    float x[kChunks][4];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
        const float4 v = load4(w + kChunk * k, width - kChunk * k - 4 * lane);
        x[k][0] = v.x, x[k][1] = v.y, x[k][2] = v.z, x[k][3] = v.w;
    }
    float next_u[kFetch];
    fetch(u, ld, width, 0, next_u);
    float loss = 0.0f;

    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int left = chunks - chunk;
        const float* uc = su[chunk & 1];
        stage(su[chunk & 1], next_u);
        __syncthreads();  // also keeps this buffer's readers of two chunks ago apart from its writers
        if (left > 1) fetch(u, ld, width, chunk + 1, next_u);
        float code4[4], err4[4];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const float wi = __shfl_sync(0xffffffffu, x[0][i % 4], i / 4, kLanes);
            const Solved s = quantise(wi, scale.step(), uc[i * kWidth + i], grid);
            loss = fmaf(s.error, s.error, loss);
            if (lane == i / 4) code4[i % 4] = s.code, err4[i % 4] = s.error;
#pragma unroll
            for (int k = 0; k < kChunks; ++k) {
                if (k < left) {
                    const int at = i * kWidth + kChunk * k + 4 * lane;
                    axpy(x[k], -s.error, *reinterpret_cast<const float4*>(uc + at));
                }
            }
        }
        const int valid = live ? width - kChunk * chunk - 4 * lane : 0;
        store4(err + kChunk * chunk, err4, valid);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (c < valid) codes[kChunk * chunk + c] = (unsigned char)code4[c];
        }
#pragma unroll
        for (int k = 0; k < kChunks - 1; ++k) {
#pragma unroll
            for (int c = 0; c < 4; ++c) x[k][c] = x[k + 1][c];
        }
    }
    if (live && lane == 0) row_loss[row] += (double)loss;
}

// Sum of err^2 of each row's group under one candidate scale a row.
__device__ __forceinline__ float attempt(float (&x)[kChunks][4], float (&su)[2][kStage],
                                         const float* u, int ld, int width, float scale,
                                         const Grid& grid) {
    const int lane = threadIdx.x % kLanes;
    const int chunks = (width + kChunk - 1) / kChunk;
    float next_u[kFetch];
    fetch(u, ld, width, 0, next_u);
    float loss = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int left = chunks - chunk;
        const float* uc = su[chunk & 1];
        stage(su[chunk & 1], next_u);
        __syncthreads();  // as in solve
        if (left > 1) fetch(u, ld, width, chunk + 1, next_u);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const float wi = __shfl_sync(0xffffffffu, x[0][i % 4], i / 4, kLanes);
            const Solved s = quantise(wi, scale, uc[i * kWidth + i], grid);
            // Beyond the width w is 0, and so is its error.
            loss = fmaf(s.error, s.error, loss);
#pragma unroll
            for (int k = 0; k < kChunks; ++k) {
                if (k < left) {
                    const int at = i * kWidth + kChunk * k + 4 * lane;
                    axpy(x[k], -s.error, *reinterpret_cast<const float4*>(uc + at));
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kChunks - 1; ++k) {
#pragma unroll
            for (int c = 0; c < 4; ++c) x[k][c] = x[k + 1][c];
        }
    }
    return loss;
}

}  // namespace

// One group of `width` columns at w, and U's block on its diagonal.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
gptq_try(const float* w, const float* u, const float* ratios, float2* trials, int rows, int ld,
         int width, float zero, float max_code, int half_scales, int half_values) {
    __shared__ __align__(16) float su[2][kStage];
    const int lane = threadIdx.x % kLanes;
    const int row = blockIdx.x * kRows + threadIdx.x / kLanes;
    const bool live = row < rows;
    w += (long long)(live ? row : 0) * ld + 4 * lane;
    float x[kChunks][4];
    float absmax = 0.0f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
        const float4 v = load4(w + kChunk * k, width - kChunk * k - 4 * lane);
        x[k][0] = v.x, x[k][1] = v.y, x[k][2] = v.z, x[k][3] = v.w;
#pragma unroll
        for (int c = 0; c < 4; ++c) absmax = fmaxf(absmax, fabsf(x[k][c]));
    }
    absmax = fmaxf(absmax, __shfl_xor_sync(0xffffffffu, absmax, 1));
    absmax = fmaxf(absmax, __shfl_xor_sync(0xffffffffu, absmax, 2));
    const float base = __fdiv_rn(2.0f * (absmax == 0.0f ? 1.0f : absmax), max_code);
    const float scale = file_scale(__fmul_rn(ratios[blockIdx.y], base), half_scales != 0);
    const Grid grid{zero, max_code, half_values != 0};
    const float loss = attempt(x, su, u, ld, width, scale, grid);
    if (live && lane == 0) trials[(long long)blockIdx.y * rows + row] = {scale, loss};
}

extern "C" __global__ void __launch_bounds__(kThreads)
gptq_pick(const float2* trials, float* scales, int rows, int ratio_count) {
    const int row = blockIdx.x * kThreads + threadIdx.x;
    if (row >= rows) return;
    float best = trials[row].x;
    float least = __int_as_float(0x7f800000);
    for (int k = 0; k < ratio_count; ++k) {
        const float2 trial = trials[(long long)k * rows + row];
        if (trial.y < least) best = trial.x, least = trial.y;
    }
    scales[row] = best;
}

// scales points at the group of the block's first column, of which `until` columns are still to
// come; groups_left counts that group and those after it.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
gptq_block(float* w, const float* u, const float* scales, unsigned char* codes, float* err,
           double* row_loss, int rows, int ld, int err_ld, int width, int groups_left, int until,
           int group_size, float zero, float max_code, int half_values) {
    solve(w, u, scales, codes, err, row_loss, rows, ld, err_ld, width, groups_left, until,
          group_size, Grid{zero, max_code, half_values != 0});
}
