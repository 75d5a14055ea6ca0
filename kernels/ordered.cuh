// Tokens' values in the order of a weight's columns, as products take them.
//
// Of fp16 weights x [tokens, padded] fp16. Of codes whole numbers of 16 bits, (256 high + low) * unit, both signed
// bytes, unit a power of two for the columns of a cell, 32 * every of them: [token][64 columns][low, high]
// [8 columns: 4][32 columns: 2][8], two bytes a column; and beside them, [token][cell], -(sum of low), -(sum of high)
// and unit. padded is a multiple of 128 then.
//
// For streams (coded_stream.cuh) fp16 values again, of `slots` tokens side by side: [8 places][slots][8], of 32 places
// those with 4 <= place % 8 behind the others, and of each half first those with 0 and 2 = place % 4, of all eights, then
// those with 1 and 3; and [cell][slots] the sums of its values, f32. What slots without a token hold is nobody's.
#pragma once
#include "half.cuh"

// Where they go: `every` sub-blocks have a cell, 0 for fp16.
struct Ordered {
    const int* places;  // the column that stands at each place, -1 for none, or null where each is in its own
    half_t* x;
    int4* cells;
    int padded, every;
    int slots;  // of a stream, or 0
};
static_assert(sizeof(Ordered) == 40, "as in ordered.rs");

// The column of `cols` that stands at a place, -1 for none.
static __device__ __forceinline__ int column_at(const Ordered& to, int place, int cols) {
    return place >= to.padded ? -1 : to.places ? to.places[place] : place < cols ? place : -1;
}

// What threads of a block tell each other: of every warp its largest magnitude and its sums.
struct OrderedRoom {
    unsigned most[32];
    int2 sums[32];
    float totals[32];
};

// As put_ordered, for streams.
static __device__ __forceinline__ void put_in_stream(const Ordered& to, int token, int place, half_t value,
                                                     OrderedRoom& room) {
    const int warp = threadIdx.x / 32;
    float total = half_to_float(value);
    for (int apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffffu, total, apart);
    if (threadIdx.x % 32 == 0) room.totals[warp] = total;
    __syncthreads();
    if (place >= to.padded) return;
    const int at = place / 32 * 32 + place % 8 / 4 * 16 + place % 2 * 8 + place % 32 / 8 * 2 + place % 4 / 2;
    to.x[((long long)(at / 8) * to.slots + token) * 8 + at % 8] = value;
    if (place % (32 * to.every) == 0) {
        float sum = 0.0f;
        for (int i = 0; i < to.every; ++i) sum += room.totals[warp + i];
        ((float*)to.cells)[(long long)(place / 32 / to.every) * to.slots + token] = sum;
    }
}

// Puts a value at a place of a token; all threads of a block call it, with neighboring places from a multiple of 128
// on, 0 where none is there. A value that is not finite makes its cell NaN.
static __device__ __forceinline__ void put_ordered(const Ordered& to, int token, int place, half_t value,
                                                   OrderedRoom& room) {
    const bool there = place < to.padded;
    if (to.every == 0) {
        if (there) to.x[(long long)token * to.padded + place] = value;
        return;
    }
    if (to.slots > 0) {
        put_in_stream(to, token, place, value, room);
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp - warp % to.every;
    const unsigned most_here = __reduce_max_sync(0xffffffffu, value & 0x7fffu);
    if (lane == 0) room.most[warp] = most_here;
    __syncthreads();
    unsigned most = 0;
    for (int i = 0; i < to.every; ++i) most = max(most, room.most[first + i]);
    // The largest value becomes 2^14 to 32639, whose high byte is 127.
    const float limit = half_to_float((half_t)most) * (32768.0f / 32640.0f);
    const int exponent = most == 0 ? 0 : 14 - ((__float_as_int(limit) >> 23) - 127);
    const int whole = __float2int_rn(half_to_float(value) * __int_as_float((exponent + 127) << 23));
    const int low = (int)(signed char)whole, high = (whole - low) >> 8;
    const int low_sum = __reduce_add_sync(0xffffffffu, low), high_sum = __reduce_add_sync(0xffffffffu, high);
    if (lane == 0) room.sums[warp] = make_int2(low_sum, high_sum);
    __syncthreads();
    if (!there) return;
    signed char* at = (signed char*)to.x + 2ll * token * to.padded + place / 64 * 128 + place % 32 / 8 * 16 +
                      place % 64 / 32 * 8 + place % 8;
    at[0] = (signed char)low, at[64] = (signed char)high;
    if (place % (32 * to.every) == 0) {
        int2 sums = {0, 0};
        for (int i = 0; i < to.every; ++i) sums.x -= room.sums[first + i].x, sums.y -= room.sums[first + i].y;
        const int unit = most < 0x7c00u ? (127 - exponent) << 23 : 0x7fc00000;
        const int cell = place / 32 / to.every;
        to.cells[(long long)token * (to.padded / 32 / to.every) + cell] = make_int4(sums.x, sums.y, unit, 0);
    }
}
