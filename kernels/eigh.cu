// eigh: a = vectors diag(values) vectorsᵀ, values descending; f64, for each symmetric matrix of a table
//
// A block of 64 threads or more a matrix (gridDim.x = matrices), of at most 64 rows, in shared memory: after the struct
// come two matrices of the largest n of the table, n (n + 1) doubles each with n its rows rounded up to even. A matrix that holds
// NaN or infinity gets values of NaN.
#include "kernel.cuh"
#include "jacobi.cuh"

struct Matrix {
    uint64_t values, vectors;        // elements from the start; a lies where vectors do
    uint32_t rows, unused;
};
struct Shared {
    JacobiShared jacobi;
    double values[jacobi_rows];
    int order[jacobi_rows];
    int bad;
};

extern "C" __global__ void __launch_bounds__(256)
    eigh(double* values, double* vectors, const double* a, const Matrix* table) {
    SHARED(Shared, shared);
    const Matrix m = table[blockIdx.x];
    const int rows = m.rows, n = jacobi_even(rows), ld = n + 1;
    double *x = reinterpret_cast<double*>(&shared + 1), *v = x + n * ld;
    a += m.vectors;
    if (threadIdx.x == 0) shared.bad = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n * n; i += blockDim.x) {
        const int row = i / n, column = i % n;
        // The lower triangle counts.
        const double value = row < rows && column < rows ? a[max(row, column) * rows + min(row, column)] : 0.0;
        if (!isfinite(value)) atomicOr(&shared.bad, 1);
        x[row * ld + column] = value;
    }
    __syncthreads();
    if (shared.bad) {
        for (int i = threadIdx.x; i < rows; i += blockDim.x) values[m.values + i] = nan("");
        for (int i = threadIdx.x; i < rows * rows; i += blockDim.x) vectors[m.vectors + i] = nan("");
        return;
    }
    jacobi(x, v, n, ld, shared.jacobi);
    descending(shared.order, shared.values, x, rows, ld);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) values[m.values + i] = shared.values[i];
    for (int i = threadIdx.x; i < rows * rows; i += blockDim.x)
        vectors[m.vectors + i] = v[i / rows * ld + shared.order[i % rows]];
}
KERNEL(eigh)
KERNEL_SHARED(eigh, Shared)
