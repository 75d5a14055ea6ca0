// gptq_block: solves one block of at most 128 consecutive columns for every row of W.
//
//   for each column i of the block, in order:
//     q   = clamp(rne(w_i / s) + zero, 0, max_code)          v = s (q - zero)
//     err = (w_i - v) / U_ii                                  w_j -= err U_ij           for j > i
//
// Layout   w [rows, ld] f32 row-major, the block's first column at w. Row-major because the scale
//          search and the trailing product both walk along a row; a block's 512 B of a row are whole
//          sectors, so column-block-major would gain nothing. u points at U[b, b], row-major,
//          leading dimension ld. scales [groups, rows] f32. codes [rows, ld] u8, at the block's first
//          column. err [rows, err_ld] f32, ditto. row_loss [rows] f64 += sum of err^2.
// Launch   256 threads, 64 rows a CTA: four lanes (a quad) share a row. Lane l of a quad holds
//          columns 16k + 4l .. + 3, so w is 8 float4 registers a lane. Columns are taken 16 at a
//          time; after 16 the registers move down by one float4, so every register index is a
//          constant while only 16 steps are unrolled. U passes through 8 KB of shared memory (two
//          buffers), zero below the diagonal, identity beyond the block's width; the four lanes of a
//          quad read 64 consecutive bytes and the eight quads of a warp the same ones.
// Regime   latency: 128 dependent steps of about 160 cycles (shuffle, two IEEE divisions, round,
//          FMA), 12 us a block, while the card has fewer than some 7 warps a scheduler.
// Bound    bytes: rows * 128 * (4 read + 4 err + 1 code), 33 MB or 11 us at 3 TB/s for 28672 rows.
//          issue: rows/8 warps * 128 * (45 + 5 * 18) instructions = 30 us on 132 SMs for 28672 rows.
//          LDS: rows/8 warps * 128 * 4.5 wide loads (half the triangle), each at most 4 cycles.
// Numerics divisions, v and w - v are IEEE and never contracted: extremes of a group sit on rounding
//          ties. The updates may use FMA. Each row has one owner and a fixed order of operations.

#include "gptq.cuh"

namespace {

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
    load_row(x, w, width, lane);
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
            const Solved s = quantize(wi, scale.step(), uc[i * kWidth + i], grid);
            loss = fmaf(s.error, s.error, loss);
            if (lane == i / 4) code4[i % 4] = s.code, err4[i % 4] = s.error;
            spread_error(x, uc, i, left, s.error, lane);
        }
        const int valid = live ? width - kChunk * chunk - 4 * lane : 0;
        store4(err + kChunk * chunk, err4, valid);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (c < valid) codes[kChunk * chunk + c] = (unsigned char)code4[c];
        }
        move_down(x);
    }
    if (live && lane == 0) row_loss[row] += (double)loss;
}

}  // namespace

// scales points at the group of the block's first column, of which `until` columns are still to
// come; groups_left counts that group and those after it.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
gptq_block(float* w, const float* u, const float* scales, unsigned char* codes, float* err,
           double* row_loss, int rows, int ld, int err_ld, int width, int groups_left, int until,
           int group_size, float zero, float max_code, int half_values) {
    solve(w, u, scales, codes, err, row_loss, rows, ld, err_ld, width, groups_left, until,
          group_size, Grid{zero, max_code, half_values != 0});
}
