// rsvd: what the search for the largest singular values of weights A[O, I] needs beside its products, which are lora_thin
// (Y = A Z), lora_gradient (Aᵀ Y), gram, eigh and apply. l directions are carried; matrices of one size lie one after the other.
//
// A is exact in bf16. Z and Y are f32 numbers as three bf16 terms whose sum they are, side by side as 3 l columns, so that
// the tensor cores' products are those of f32: term t of direction j is column t l + j.
//
// rsvd_start: z[m, i, j] = 2 · uniform − 1 at place i l + j of matrix m's numbers. A thread draws four places.
// rsvd_terms: terms[m, t l + j, i] of z[m, i, j], rows ld apart. A thread an element of z.
// rsvd_split: y[r, j] = Σ_split Σ_t partial[split, r, t l + j], rounded to f32, and its terms[r, t l + j]. A thread an element.
// rsvd_gather: back[c, j] (+)= Σ_span Σ_t partial[span, c, t l + j]. A thread an element.
// rsvd_energy: sums[first + block] = Σ a² over 16 rows a block.
// rsvd_orthonormal: w = L⁻ᵀ of g = L Lᵀ, as src/ops/rsvd.rs has it. A block of 64 threads a matrix, l ≤ 64; after the struct
//   come two matrices of l (l + 1) doubles.
// rsvd_values: values = √λ, 0 up to `cut` of the largest; map_u = vectors / values and map_v = vectors, with zeros where the
//   value is 0; energy = Σ of its sums. A block of 64 threads a matrix.
// rsvd_finish: residuals = ‖down − value · v‖, and, where u_out is not null, u and v with the sign that makes the largest
//   entry of u positive. A block of 256 threads a direction: gridDim = (k, matrices).
//
// f64 where nothing else is said; sums in the order of their indices, over a block as reduce.cuh makes them.
#include "kernel.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "rows.cuh"

/// The number of a thread among all of gridDim.x.
__device__ __forceinline__ size_t thread_number() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }

extern "C" __global__ void __launch_bounds__(256) rsvd_start(double* z, const uint2* keys, int64_t count) {
    const int64_t first = int64_t(thread_number()) * 4;
    const uint2 key = keys[blockIdx.y];
    const uint4 words = philox({key.x, key.y, 0, 0, 0, 0.0f}, uint64_t(first) / 4);
    z += int64_t(blockIdx.y) * count;
    for (int i = 0; i < 4 && first + i < count; i++)
        z[first + i] = 2.0f * (float(philox_word(words, i) >> 8) * (1.0f / 16777216.0f)) - 1.0f;
}
KERNEL(rsvd_start)

/// `x` as three terms, the first the nearest, each next one the nearest of what is left; `step` elements apart.
__device__ __forceinline__ void three_terms(bf16* to, size_t step, float x) {
#pragma unroll
    for (int term = 0; term < 3; term++) {
        const bf16 nearest = __float2bfloat16_rn(x);
        to[term * step] = nearest;
        x -= __bfloat162float(nearest);
    }
}

extern "C" __global__ void __launch_bounds__(256) rsvd_terms(bf16* terms, const double* z, int inner, int l, int ld) {
    const size_t at = thread_number();
    if (at >= size_t(inner) * l) return;
    const size_t i = at / l, j = at % l, matrix = blockIdx.y;
    three_terms(terms + (matrix * 3 * l + j) * ld + i, size_t(l) * ld, float(z[matrix * inner * l + at]));
}
KERNEL(rsvd_terms)

extern "C" __global__ void __launch_bounds__(256)
    rsvd_split(double* y, bf16* terms, const float* partial, int rows, int l, int splits, int ld_partial, int ld_terms) {
    const size_t at = thread_number(), row = at / l;
    const int j = int(at % l);
    if (row >= size_t(rows)) return;
    double sum = 0.0;
    for (int split = 0; split < splits; split++)
        for (int term = 0; term < 3; term++) sum += partial[(size_t(split) * rows + row) * ld_partial + term * l + j];
    const float rounded = float(sum);
    y[at] = rounded;
    three_terms(terms + row * ld_terms + j, l, rounded);
}
KERNEL(rsvd_split)

extern "C" __global__ void __launch_bounds__(256)
    rsvd_gather(double* back, const float* partial, int inner, int l, int spans, int ld_partial, int add) {
    const size_t at = thread_number(), column = at / l;
    const int j = int(at % l);
    if (column >= size_t(inner)) return;
    double sum = add ? back[at] : 0.0;
    for (int span = 0; span < spans; span++)
        for (int term = 0; term < 3; term++) sum += partial[(size_t(span) * inner + column) * ld_partial + term * l + j];
    back[at] = sum;
}
KERNEL(rsvd_gather)

struct EnergyShared {
    double sums[8];
};

extern "C" __global__ void __launch_bounds__(256) rsvd_energy(double* sums, const bf16* a, int rows, int inner, int ld) {
    SHARED(EnergyShared, shared);
    double sum = 0.0;
    for (int r = blockIdx.x * 16; r < min(rows, int(blockIdx.x + 1) * 16); r++)
        for (int column = threadIdx.x * 8; column < inner; column += 256 * 8) {
            float v[8];
            load8(v, a + size_t(r) * ld + column, inner - column);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += double(v[i]) * v[i];
        }
    sum = block_sum(sum, shared.sums);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
KERNEL(rsvd_energy)
KERNEL_SHARED(rsvd_energy, EnergyShared)

struct OrthonormalShared {
    double unit[64], diagonal[64];   // 1 / the columns' lengths; L's diagonal, 0 where a column depends on others
    double pivot;
    int bad;
};

extern "C" __global__ void __launch_bounds__(64) rsvd_orthonormal(double* w, const double* g, int l, double dependent) {
    SHARED(OrthonormalShared, shared);
    const int ld = l + 1, thread = threadIdx.x;
    double *factor = reinterpret_cast<double*>(&shared + 1), *inverse = factor + l * ld;
    g += size_t(blockIdx.x) * l * l;
    w += size_t(blockIdx.x) * l * l;
    if (thread == 0) shared.bad = 0;
    __syncthreads();
    for (int i = thread; i < l * l; i += 64) {
        const double value = g[i];
        if (!isfinite(value)) atomicOr(&shared.bad, 1);
        factor[i / l * ld + i % l] = value;
        inverse[i / l * ld + i % l] = 0.0;
    }
    __syncthreads();
    if (shared.bad) {
        for (int i = thread; i < l * l; i += 64) w[i] = nan("");
        return;
    }
    if (thread < l) {
        const double square = factor[thread * ld + thread];
        shared.unit[thread] = square > 0.0 ? 1.0 / sqrt(square) : 0.0;
    }
    __syncthreads();
    // Thread i makes row i of L, in the place of g's lower triangle, a column at a time.
    for (int j = 0; j < l; j++) {
        double rest = 0.0;
        if (thread >= j && thread < l) {
            double sum = 0.0;
            for (int k = 0; k < j; k++) sum += factor[thread * ld + k] * factor[j * ld + k];
            rest = shared.unit[thread] * shared.unit[j] * factor[thread * ld + j] - sum;
        }
        if (thread == j) shared.pivot = shared.diagonal[j] = rest > dependent ? sqrt(rest) : 0.0;
        __syncthreads();
        if (thread > j && thread < l) factor[thread * ld + j] = shared.pivot > 0.0 ? rest / shared.pivot : 0.0;
        __syncthreads();
    }
    // Thread j makes column j of the inverse, from the diagonal up.
    if (thread < l && shared.diagonal[thread] > 0.0) {
        const int j = thread;
        inverse[j * ld + j] = 1.0 / shared.diagonal[j];
        for (int i = j - 1; i >= 0; i--) {
            if (!(shared.diagonal[i] > 0.0)) continue;
            double sum = 0.0;
            for (int k = i + 1; k <= j; k++) sum += factor[k * ld + i] * inverse[k * ld + j];
            inverse[i * ld + j] = -sum / shared.diagonal[i];
        }
    }
    __syncthreads();
    for (int i = thread; i < l * l; i += 64) w[i] = shared.unit[i / l] * inverse[i / l * ld + i % l];
}
KERNEL(rsvd_orthonormal)
KERNEL_SHARED(rsvd_orthonormal, OrthonormalShared)

struct ValuesShared {
    double sums[2];
};

extern "C" __global__ void __launch_bounds__(64)
    rsvd_values(double* values, double* energy, double* map_u, double* map_v, const double* lambda, const double* vectors,
                const double* sums, int k, int l, int blocks, double cut) {
    SHARED(ValuesShared, shared);
    const size_t matrix = blockIdx.x;
    const double* own = lambda + matrix * l;
    // NaN stays what it is.
    auto root = [](double x) { return x < 0.0 ? 0.0 : sqrt(x); };
    auto value = [&](int j) {
        const double v = root(own[j]);
        return v <= cut * root(own[0]) ? 0.0 : v;
    };
    for (int i = threadIdx.x; i < l * l; i += 64) {
        const double v = value(i % l), x = vectors[matrix * l * l + i];
        map_u[matrix * l * l + i] = v == 0.0 ? 0.0 : x / v;
        map_v[matrix * l * l + i] = v == 0.0 ? 0.0 : x;
    }
    for (int j = threadIdx.x; j < k; j += 64) values[matrix * k + j] = value(j);
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += 64) sum += sums[matrix * blocks + i];
    sum = block_sum(sum, shared.sums);
    if (threadIdx.x == 0) energy[matrix] = sum;
}
KERNEL(rsvd_values)
KERNEL_SHARED(rsvd_values, ValuesShared)

struct FinishShared {
    double sums[8];
    double largest[256];             // of each thread's entries of u, with its sign
    int row[256];
};

extern "C" __global__ void __launch_bounds__(256)
    rsvd_finish(double* residuals, double* u_out, double* v_out, const double* values, const double* u, const double* v,
                const double* down, int outer, int inner, int k, int l) {
    SHARED(FinishShared, shared);
    const int j = blockIdx.x, thread = threadIdx.x;
    const size_t matrix = blockIdx.y;
    u += matrix * outer * l + j;
    v += matrix * inner * l + j;
    down += matrix * inner * l + j;
    const double value = values[matrix * k + j];
    double sum = 0.0, largest = 0.0;
    int row = 0;
    for (int i = thread; i < inner; i += 256) {
        const double missing = down[size_t(i) * l] - value * v[size_t(i) * l];
        sum += missing * missing;
    }
    for (int i = thread; i < outer; i += 256)
        if (const double x = u[size_t(i) * l]; fabs(x) > fabs(largest)) largest = x, row = i;
    shared.largest[thread] = largest;
    shared.row[thread] = row;
    sum = block_sum(sum, shared.sums); // its barrier is that of the entries too
    if (thread == 0) residuals[matrix * k + j] = sqrt(sum);
    if (!u_out) return;
    for (int other = 0; other < 256; other++) {
        const double x = shared.largest[other];
        if (fabs(x) > fabs(largest) || (fabs(x) == fabs(largest) && shared.row[other] < row))
            largest = x, row = shared.row[other];
    }
    const double sign = largest < 0.0 ? -1.0 : 1.0;
    for (int i = thread; i < outer; i += 256) u_out[(matrix * outer + i) * k + j] = sign * u[size_t(i) * l];
    for (int i = thread; i < inner; i += 256) v_out[(matrix * inner + i) * k + j] = sign * v[size_t(i) * l];
}
KERNEL(rsvd_finish)
KERNEL_SHARED(rsvd_finish, FinishShared)
