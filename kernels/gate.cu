// gate: one side of LoRA-CR from Grams in f64, for each module of a table
//
//   d: √dⱼ balances column j of B and row j of A.  G_B/(d dᵀ) = V Λ Vᵀ, kept where λ > 1e-12 λ₁;  R = Λ^½ Vᵀ
//   R blockdiag(d G_Aⁱⁱ d) Rᵀ = E diag(σ²) Eᵀ, kept where σ > 1e-6 σ₁, at most `top`, at least `share` of Σ σ² where share > 0
//   coords = Eᵀ R d, basis = d⁻¹ V Λ^-½ E, H_k(i, j) = coordsᵢ[k, :] G_Aⁱʲ coordsⱼ[k, :]ᵀ  ->  norm, cos, conflict, gamma
//   map = basis diag(gamma) coords
// Without a direction map is zero. Where a Gram holds NaN or infinity, or they are too large, K is NaN and the rest means nothing.
//
// A block of 256 threads a module (gridDim.x = modules); P <= 64, each adapter has a row or more. After the struct come
// two matrices of the largest n of the table, n (n + 1) doubles each with n = P rounded up to even; `scratch` is as large as map.
#include "kernel.cuh"
#include "jacobi.cuh"

struct Module {
    uint64_t gram, directions;       // elements from the start
    uint32_t rank, edges;            // P, E
    uint32_t bounds, unused;         // where its E + 1 bounds begin
};
struct Shared {
    JacobiShared jacobi;
    double scale[jacobi_rows];       // d
    double lambda[jacobi_rows], square[jacobi_rows];
    int order[jacobi_rows], edge[jacobi_rows], bounds[jacobi_rows + 1];
    int bad;
};

/// One direction from h[i, j] = ⟨zᵢ, zⱼ⟩, by one warp.
__device__ __forceinline__ void direction(double* norm, double* cos, double* gamma, double* conflict, const double* h,
                                          double sigma, int edges, bool opposition) {
    const int lane = threadIdx.x % 32;
    const double null = 1e-7;
    for (int i = lane; i < edges; i += 32) norm[i] = sqrt(max(h[i * edges + i], 0.0));
    __syncwarp();
    double total = 0.0, largest = 0.0;
    for (int i = 0; i < edges; i++) {
        if (norm[i] > null * sigma) total += norm[i], largest = max(largest, norm[i]);
    }
    const auto weight = [&](int i) { return norm[i] > null * sigma ? norm[i] : 0.0; };
    const auto part = [&](int i) { return total > 0.0 ? weight(i) / total : 0.0; };
    // ⟨zᵢ, z̄⟩, for now in the place of cos
    for (int i = lane; i < edges; i += 32) {
        double along = 0.0;
        for (int j = 0; j < edges; j++) along += h[i * edges + j] * part(j);
        cos[i] = along;
    }
    __syncwarp();
    double squared = 0.0;
    for (int i = 0; i < edges; i++) squared += part(i) * cos[i];
    const double consensus = sqrt(max(squared, 0.0));
    const bool agreed = consensus > null * largest;
    __syncwarp();
    for (int i = lane; i < edges; i += 32)
        cos[i] = agreed && weight(i) > 0.0 ? min(max(cos[i] / (norm[i] * consensus), -1.0), 1.0) : 0.0;
    __syncwarp();
    double against = 0.0;
    for (int i = 0; i < edges; i++) against += part(i) * (1.0 - cos[i]);
    const double c = min(max(against / 2.0, 0.0), 1.0);
    if (lane == 0) *conflict = c;
    for (int i = lane; i < edges; i += 32) {
        double keep = (1.0 - c) * max(cos[i], 0.0);
        if (opposition) {
            double others = 0.0, opposed = 0.0;
            for (int j = 0; j < edges; j++) {
                if (j != i) others += weight(j);
            }
            for (int j = 0; j < edges && others > 0.0 && weight(i) > 0.0; j++) {
                if (j == i || weight(j) == 0.0) continue;
                opposed += weight(j) / others * min(max(-h[i * edges + j] / (norm[i] * norm[j]), 0.0), 1.0);
            }
            keep = 1.0 - opposed;
        }
        gamma[i] = keep;
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(256, 1)
    gate(double* map, double* directions, double* scratch, const double* b, const double* a, const Module* table,
         const uint32_t* bounds, int top, double share, int opposition) {
    SHARED(Shared, shared);
    const Module m = table[blockIdx.x];
    const int rank = m.rank, edges = m.edges, n = jacobi_even(rank), ld = n + 1, thread = threadIdx.x;
    double *x = reinterpret_cast<double*>(&shared + 1), *y = x + n * ld;
    b += m.gram, a += m.gram, map += m.gram, scratch += m.gram, directions += m.directions;
    double *sigma = directions + 2, *conflict = sigma + rank, *norm = conflict + rank, *cos = norm + rank * edges;
    double* gamma = cos + rank * edges;

    if (thread == 0) shared.bad = 0;
    for (int e = thread; e <= edges; e += 256) shared.bounds[e] = bounds[m.bounds + e];
    __syncthreads();
    for (int j = thread; j < rank; j += 256) {
        int e = 0;
        while (shared.bounds[e + 1] <= j) e++;
        shared.edge[j] = e;
        // √(‖bⱼ‖ ‖aⱼ‖), for now in the place of λ
        shared.lambda[j] = sqrt(sqrt(max(b[j * rank + j], 0.0)) * sqrt(max(a[j * rank + j], 0.0)));
    }
    for (int i = thread; i < rank * rank; i += 256) {
        if (!isfinite(b[i]) || !isfinite(a[i])) atomicOr(&shared.bad, 1);
    }
    __syncthreads();
    if (shared.bad) {
        if (thread == 0) directions[0] = directions[1] = nan("");
        return;
    }
    for (int j = thread; j < rank; j += 256) {
        double largest = 0.0;
        for (int i = 0; i < rank; i++) largest = max(largest, shared.lambda[i]);
        const double of_b = sqrt(max(b[j * rank + j], 0.0)), of_a = sqrt(max(a[j * rank + j], 0.0));
        double d = 1.0;
        if (of_b > 0.0 && of_a > 0.0) d = sqrt(of_b / of_a);
        else if (of_b > 0.0 && largest > 0.0) d = of_b / largest;
        shared.scale[j] = d;
    }
    __syncthreads();
    for (int i = thread; i < n * n; i += 256) {
        const int row = i / n, column = i % n;
        const bool there = row < rank && column < rank;
        x[row * ld + column] = there ? b[row * rank + column] / shared.scale[row] / shared.scale[column] : 0.0;
    }
    __syncthreads();
    // The division of one and the other way round need not be equal.
    for (int i = thread; i < n * n; i += 256) {
        if (i / n < i % n) x[i / n * ld + i % n] = x[i % n * ld + i / n];
    }
    jacobi(x, y, n, ld, shared.jacobi);
    descending(shared.order, shared.lambda, x, rank, ld);
    int q = 0;
    while (q < rank && shared.lambda[q] > 1e-12 * shared.lambda[0] && shared.lambda[q] > 0.0) q++;

    // R[q, P], in the place of map
    for (int i = thread; i < q * rank; i += 256)
        map[i] = sqrt(shared.lambda[i / rank]) * y[i % rank * ld + shared.order[i / rank]];
    __syncthreads();
    for (int i = thread; i < q * rank; i += 256) {
        const int k = i / rank, j = i % rank, e = shared.edge[j];
        double sum = 0.0;
        for (int l = shared.bounds[e]; l < shared.bounds[e + 1]; l++)
            sum += map[k * rank + l] * (a[l * rank + j] * shared.scale[l] * shared.scale[j]);
        x[k * ld + j] = sum;
    }
    __syncthreads();
    const int even = jacobi_even(q);
    for (int i = thread; i < even * even; i += 256) {
        const int k = i / even, l = i % even;
        if (l > k) continue;
        double sum = 0.0;
        for (int j = 0; j < rank && k < q; j++) sum += x[k * ld + j] * map[l * rank + j];
        if (!isfinite(sum)) atomicOr(&shared.bad, 1);
        y[k * ld + l] = y[l * ld + k] = sum;
    }
    __syncthreads();
    if (shared.bad) {
        if (thread == 0) directions[0] = directions[1] = nan("");
        return;
    }
    int kept = 0;
    double energy = 0.0;
    if (q > 0) {
        jacobi(y, x, even, ld, shared.jacobi);
        descending(shared.order, shared.square, y, q, ld);
        for (int k = 0; k < q; k++) energy += max(shared.square[k], 0.0);
        const double first = sqrt(max(shared.square[0], 0.0));
        double sum = 0.0;
        for (bool enough = false; kept < q && kept < top && !enough; kept++) {
            const double one = max(shared.square[kept], 0.0);
            if (!(sqrt(one) > 1e-6 * first)) break;
            sum += one;
            enough = share > 0.0 && sum >= share * energy;
        }
    }
    if (thread == 0) directions[0] = kept, directions[1] = energy;
    for (int k = thread; k < rank; k += 256) {
        sigma[k] = k < kept ? sqrt(max(shared.square[k], 0.0)) : 0.0;
        if (k >= kept) conflict[k] = 0.0;
    }
    for (int i = kept * edges + thread; i < rank * edges; i += 256) norm[i] = cos[i] = gamma[i] = 0.0;

    // coords[K, P] in y, basis[P, K] in scratch, from E in x
    for (int i = thread; i < kept * rank; i += 256) {
        const int k = i / rank, j = i % rank;
        double sum = 0.0;
        for (int l = 0; l < q; l++) sum += x[l * ld + shared.order[k]] * map[l * rank + j];
        y[k * ld + j] = sum * shared.scale[j];
    }
    for (int i = thread; i < kept * rank; i += 256) {
        const int row = i / kept, k = i % kept;
        double sum = 0.0;
        for (int l = 0; l < q; l++) sum += map[l * rank + row] / shared.lambda[l] * x[l * ld + shared.order[k]];
        scratch[row * rank + k] = sum / shared.scale[row];
    }
    __syncthreads();

    // A warp a direction; H of as many as x has room for.
    const int warp = thread / 32, lane = thread % 32, warps = min(8, n * ld / (edges * edges));
    double* h = x + warp * edges * edges;
    for (int k = warp; k < kept && warp < warps; k += warps) {
        for (int i = lane; i < edges * edges; i += 32) {
            const int e = i / edges, f = i % edges;
            if (f > e) continue;
            double sum = 0.0;
            for (int l = shared.bounds[e]; l < shared.bounds[e + 1]; l++) {
                double towards = 0.0;
                for (int r = shared.bounds[f]; r < shared.bounds[f + 1]; r++)
                    towards += a[l * rank + r] * y[k * ld + r];
                sum += y[k * ld + l] * towards;
            }
            h[e * edges + f] = h[f * edges + e] = sum;
        }
        __syncwarp();
        direction(norm + k * edges, cos + k * edges, gamma + k * edges, conflict + k, h,
                  sqrt(max(shared.square[k], 0.0)), edges, opposition != 0);
    }
    __syncthreads();
    for (int i = thread; i < rank * rank; i += 256) {
        const int row = i / rank, column = i % rank, e = shared.edge[column];
        double sum = 0.0;
        for (int k = 0; k < kept; k++)
            sum += scratch[row * rank + k] * (y[k * ld + column] * gamma[k * edges + e]);
        map[i] = sum;
    }
}
KERNEL(gate)
KERNEL_SHARED(gate, Shared)
