// Eigenpairs of a symmetric matrix in shared memory by one block: Jacobi rotations of disjoint pairs, all pairs of a
// round at once, in the order of a round-robin tournament. The same bytes every time, whatever the block's size.
#pragma once

/// Rows of the largest matrix.
constexpr int jacobi_rows = 64;

struct JacobiShared {
    double cosine[jacobi_rows / 2], sine[jacobi_rows / 2], tangent[jacobi_rows / 2];
    int low[jacobi_rows / 2], high[jacobi_rows / 2], moved[jacobi_rows / 2];
};

/// Even rows that a matrix of `rows` takes, the last of them zero where `rows` is odd.
__device__ __forceinline__ int jacobi_even(int rows) { return rows + (rows & 1); }

/// `a`[n, n] = v diag(λ) vᵀ: λ stays on a's diagonal in no order, the columns of `v` are the vectors. n is even; rows of
/// both lie `ld` apart. The block has n/2 threads or more. Ends at once where a holds NaN. Before others' parts
/// are read the block must meet, as it does in `descending`.
__device__ __forceinline__ void jacobi(double* a, double* v, int n, int ld, JacobiShared& s) {
    const int half = n / 2, thread = threadIdx.x;
    for (int i = thread; i < n * n; i += blockDim.x) v[i / n * ld + i % n] = i / n == i % n ? 1.0 : 0.0;
    for (int sweep = 0; sweep < 40; sweep++) {
        for (int round = 0; round < n - 1; round++) {
            __syncthreads();
            if (thread < half) {
                const int x = thread == 0 ? n - 1 : (round + thread) % (n - 1);
                const int y = (round - thread + n - 1) % (n - 1);
                const int p = min(x, y), q = max(x, y);
                const double pp = a[p * ld + p], qq = a[q * ld + q], pq = a[p * ld + q];
                double t = 0.0, c = 1.0;
                // Relative to its own row and column, so that small eigenvalues of a Gram are as exact as large ones.
                const bool move = fabs(pq) > 2e-16 * sqrt(fabs(pp)) * sqrt(fabs(qq)) && fabs(pq) > 1e-290;
                if (move) {
                    const double tau = (qq - pp) / (2.0 * pq);
                    t = (tau < 0.0 ? -1.0 : 1.0) / (fabs(tau) + sqrt(1.0 + tau * tau));
                    c = 1.0 / sqrt(1.0 + t * t);
                }
                s.low[thread] = p, s.high[thread] = q;
                s.tangent[thread] = t, s.cosine[thread] = c, s.sine[thread] = t * c;
                s.moved[thread] = move || (round > 0 && s.moved[thread]);
            }
            __syncthreads();
            for (int task = thread; task < half * half + half * n; task += blockDim.x) {
                if (task >= half * half) {
                    const int pair = (task - half * half) % half, row = (task - half * half) / half;
                    double *x = v + row * ld + s.low[pair], *y = v + row * ld + s.high[pair];
                    const double c = s.cosine[pair], sn = s.sine[pair], old = *x;
                    *x = c * old - sn * *y;
                    *y = sn * old + c * *y;
                    continue;
                }
                const int i = task / half, j = task % half;
                if (i > j) continue;
                const int pi = s.low[i], qi = s.high[i], pj = s.low[j], qj = s.high[j];
                if (i == j) {
                    const double shift = s.tangent[i] * a[pi * ld + qi];
                    if (s.tangent[i] == 0.0) continue;
                    a[pi * ld + pi] -= shift;
                    a[qi * ld + qi] += shift;
                    a[pi * ld + qi] = a[qi * ld + pi] = 0.0;
                    continue;
                }
                const double ci = s.cosine[i], si = s.sine[i], cj = s.cosine[j], sj = s.sine[j];
                const double m00 = a[pi * ld + pj], m01 = a[pi * ld + qj], m10 = a[qi * ld + pj], m11 = a[qi * ld + qj];
                const double x0 = cj * m00 - sj * m01, x1 = sj * m00 + cj * m01;
                const double y0 = cj * m10 - sj * m11, y1 = sj * m10 + cj * m11;
                const double n00 = ci * x0 - si * y0, n10 = si * x0 + ci * y0;
                const double n01 = ci * x1 - si * y1, n11 = si * x1 + ci * y1;
                a[pi * ld + pj] = a[pj * ld + pi] = n00;
                a[pi * ld + qj] = a[qj * ld + pi] = n01;
                a[qi * ld + pj] = a[pj * ld + qi] = n10;
                a[qi * ld + qj] = a[qj * ld + qi] = n11;
            }
        }
        // Written before the round's second barrier, and next after the coming sweep's first.
        bool any = false;
        for (int pair = 0; pair < half; pair++) any |= s.moved[pair] != 0;
        if (!any) break;
    }
}

/// `order[k]` = where the k-th largest of the first `rows` eigenvalues lies on the diagonal; `values[k]` = it.
/// Of two that are equal the earlier one comes first. The block has met when it returns.
__device__ __forceinline__ void descending(int* order, double* values, const double* a, int rows, int ld) {
    // Every place holds an index even where NaN leaves one out.
    if (int(threadIdx.x) < rows) order[threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (int(threadIdx.x) < rows) {
        const double own = a[threadIdx.x * ld + threadIdx.x];
        int place = 0;
        for (int j = 0; j < rows; j++) {
            const double other = a[j * ld + j];
            place += other > own || (other == own && j < int(threadIdx.x));
        }
        order[place] = threadIdx.x;
        values[place] = own;
    }
    __syncthreads();
}
