// Kernels that are launched before the one ahead of them is done (sm_90 and newer; nothing elsewhere,
// where each waits for the one ahead as a whole).
#pragma once

// The next kernel may be put on the card; it sees this one's results after its own wait.
static __device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel ahead is done. Nothing that it or one before it reads or writes may be written
// before this, nor anything read that they write, as far back as the last copy or kernel of the other kind.
static __device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
