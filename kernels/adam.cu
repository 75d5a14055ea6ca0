// adam: a step of Adam in place, g being the gradient times `factor`:
// m += (1 - beta1) * (g - m), v += (1 - beta2) * (g^2 - v), x -= rate * m * mean / (sqrt(v) * root + epsilon).
//
// Layout   gradient, m, v, x: n values of f32; mean and root are one over 1 - beta1^t and over its root of beta2.
// Launch   256 threads, grid-stride.
// Regime   memory. Bound: 28 bytes a value at 3 TB/s: 0.06 ms for the 6.7 M scales of a 70B block in groups of 128.

extern "C" __global__ void __launch_bounds__(256)
adam(const float* gradient, float* m, float* v, float* x, float factor, float one_less_beta1, float one_less_beta2,
     float rate, float mean, float root, float epsilon, long long n) {
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL) {
        const float g = gradient[i] * factor;
        const float first = m[i] + one_less_beta1 * (g - m[i]);
        const float second = v[i] + one_less_beta2 * (g * g - v[i]);
        m[i] = first;
        v[i] = second;
        x[i] -= rate * first * mean / (sqrtf(second) * root + epsilon);
    }
}
