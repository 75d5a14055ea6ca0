// Bulk copies into shared memory, the barriers that tell when they are there, and what blocks leave for each other
// (sm_90 and newer).
#pragma once
#include "mma.cuh"

// A barrier in shared memory, of so many arrivals a phase.
static __device__ __forceinline__ void barrier_make(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers known to the copy engine.
static __device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// An arrival; the phase also waits for so many bytes.
static __device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over; a phase further ahead must not be under way.
static __device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{ .reg .pred over;\n"
        "again:\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "  @!over bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Copies bytes, a multiple of 16, and counts them off the barrier's phase.
static __device__ __forceinline__ void copy_bulk(unsigned shared, const void* global, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

// What the driver makes of a matrix and the size of a box of it; an argument of the kernel.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};

// Copies the box that begins at (x, y), zeros where the matrix ends, and counts all its bytes off the barrier's phase.
static __device__ __forceinline__ void copy_box(unsigned shared, const TensorMap* map, int x, int y, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// Values that one block leaves for another where there were zeros: no value is all zeros itself (a zero goes as -0), so
// whoever waits for it needs no other sign.
static __device__ __forceinline__ void leave(float4* place, float4 v) {
    const auto bits = [](float value) { return value == 0.0f ? 0x80000000u : __float_as_uint(value); };
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(bits(v.x)), "r"(bits(v.y)),
                 "r"(bits(v.z)), "r"(bits(v.w))
                 : "memory");
}

// What is there, and whether all four are.
static __device__ __forceinline__ bool look(const float4* place, float4& v) {
    unsigned x, y, z, w;
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "l"(place)
                 : "memory");
    v = make_float4(__uint_as_float(x), __uint_as_float(y), __uint_as_float(z), __uint_as_float(w));
    return x != 0 && y != 0 && z != 0 && w != 0;
}

// Zeros again, for the next kernel.
static __device__ __forceinline__ void clear(float4* place) { *place = make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
