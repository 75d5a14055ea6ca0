// Bulk copies into shared memory, the barriers that tell when they are there, and signals between blocks (sm_90 and
// newer).
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

static __device__ __forceinline__ void map_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box that begins at (x, y), zeros where the matrix ends, and counts all its bytes off the barrier's phase.
static __device__ __forceinline__ void copy_box(unsigned shared, const TensorMap* map, int x, int y, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// Tells other blocks that what this one wrote before is there; its other threads have passed a barrier with this one.
static __device__ __forceinline__ void signal(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits for so many signals, and begins anew.
static __device__ __forceinline__ void await_signals(int* counter, int count) {
    int seen;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen != count);
    *counter = 0;
}
