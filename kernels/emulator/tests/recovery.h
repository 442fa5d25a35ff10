// Tests of what conflict-aware recovery is made of: gram, apply, eigh and gate, against plain loops in f64.
#pragma once
#include "expect.h"
#include <algorithm>
#include <numeric>

namespace recovery {

using namespace device;
using numbers::Worst;
using Values = std::vector<double>;

inline Values random(uint64_t seed, size_t count) {
    const auto narrow = numbers::uniform(seed, count, 1);
    return Values(narrow.begin(), narrow.end());
}

// As in gram.cu and apply.cu.
struct Stack {
    uint64_t x, square;
    uint32_t first, rows, rank, side;
};

inline int side_of(int rank) { return rank > 32 ? 64 : rank > 16 ? 32 : 16; }

/// The table of stacks of n × P, and the blocks of all of them.
template <class Blocks>
inline std::vector<Stack> table(const std::vector<std::pair<int, int>>& stacks, unsigned& blocks, Blocks blocks_of) {
    std::vector<Stack> entries;
    uint64_t x = 0, square = 0;
    blocks = 0;
    for (const auto& [rows, rank] : stacks) {
        entries.push_back({x, square, blocks, uint32_t(rows), uint32_t(rank), uint32_t(side_of(rank))});
        x += uint64_t(rows) * rank, square += uint64_t(rank) * rank;
        blocks += unsigned(blocks_of(rows, rank));
    }
    return entries;
}

inline int up(int n, int to) { return (n + to - 1) / to; }

inline const std::vector<std::pair<int, int>> stacks = {{1, 1}, {3, 2}, {300, 16}, {65, 17}, {257, 33}, {64, 70}, {5, 100}};

inline void gram() {
    unsigned blocks = 0;
    const auto entries = table(stacks, blocks, [](int, int rank) {
        const int n = up(rank, side_of(rank));
        return n * (n + 1) / 2;
    });
    const Stack& last = entries.back();
    const Values x = random(1, last.x + size_t(last.rows) * last.rank);
    Array<double> x_(x), out_(last.square + size_t(last.rank) * last.rank);
    Array<Stack> table_(entries);
    const int result = launch("gram", {blocks, 1, 256, own_struct}, out_, x_, table_, int(entries.size()));
    const Values out = out_.read();
    Worst worst;
    for (const Stack& s : entries)
        for (size_t i = 0; i < s.rank; i++)
            for (size_t j = 0; j < s.rank; j++) {
                double sum = 0;
                for (size_t r = 0; r < s.rows; r++) sum += x[s.x + r * s.rank + i] * x[s.x + r * s.rank + j];
                worst.add(out[s.square + i * s.rank + j], sum);
                check(out[s.square + i * s.rank + j] == out[s.square + j * s.rank + i], "gram is symmetric");
            }
    expect("gram", int(entries.size()), int(last.rank), result, worst.error, 1e-13);
}

inline void apply() {
    unsigned blocks = 0;
    const auto entries = table(stacks, blocks, [](int rows, int rank) {
        return up(rank, side_of(rank)) * up(rows, 4096 / side_of(rank));
    });
    const Stack& last = entries.back();
    const Values x = random(1, last.x + size_t(last.rows) * last.rank), w = random(2, last.square + size_t(last.rank) * last.rank);
    Array<double> x_(x), w_(w), out_(x.size());
    Array<Stack> table_(entries);
    const int result = launch("apply", {blocks, 1, 256, own_struct}, out_, x_, w_, table_, int(entries.size()));
    const Values out = out_.read();
    Worst worst;
    for (const Stack& s : entries)
        for (size_t r = 0; r < s.rows; r++)
            for (size_t j = 0; j < s.rank; j++) {
                double sum = 0;
                for (size_t i = 0; i < s.rank; i++) sum += x[s.x + r * s.rank + i] * w[s.square + i * s.rank + j];
                worst.add(out[s.x + r * s.rank + j], sum);
            }
    expect("apply", int(entries.size()), int(last.rank), result, worst.error, 1e-13);
}

/// Shared memory of eigh and gate: the struct and two matrices of the largest P.
inline unsigned shared_bytes(const char* name, int rank) {
    unsigned own = 0;
    void* module = nullptr;
    unsigned long long variable;
    size_t size;
    check(!cuModuleLoadData(&module, "any") && !cuModuleGetGlobal_v2(&variable, &size, module, (std::string(name) + "_shared_bytes").c_str()) &&
              !cuMemcpyDtoH_v2(&own, variable, sizeof own), "a kernel's shared memory");
    const int n = rank + rank % 2;
    return own + 2 * unsigned(n * (n + 1)) * sizeof(double);
}

/// Matrices of several sizes in one launch, one of them diagonal and one that holds NaN.
inline void eigh(const std::vector<int>& sizes, unsigned threads) {
    struct Matrix {
        uint64_t values, vectors;
        uint32_t rows, unused;
    };
    std::vector<Matrix> entries;
    uint64_t rows = 0, squares = 0;
    for (int n : sizes) {
        entries.push_back({rows, squares, uint32_t(n), 0});
        rows += uint64_t(n), squares += uint64_t(n) * n;
    }
    const int most = *std::max_element(sizes.begin(), sizes.end());
    Values a = random(1, squares);
    for (size_t m = 0; m < entries.size(); m++)
        for (size_t i = 0, n = entries[m].rows; i < n; i++)
            for (size_t j = 0; j < n; j++) {
                double& one = a[entries[m].vectors + i * n + j];
                if (m == 1) one = i == j ? double(i % 3) : 0.0;
                else if (j > i) one = NAN; // the lower triangle counts
                else if (m == 2 && i == n - 1 && j == 0) one = NAN;
            }
    Array<double> a_(a), values_(rows), vectors_(squares);
    Array<Matrix> table_(entries);
    const int result = launch("eigh", {unsigned(sizes.size()), 1, threads, shared_bytes("eigh", most)}, values_, vectors_, a_, table_);
    check(!result, "eigh");
    const Values values = values_.read(), vectors = vectors_.read();
    Worst worst;
    for (size_t m = 0; m < entries.size(); m++) {
        const size_t n = entries[m].rows;
        const double *l = &values[entries[m].values], *v = &vectors[entries[m].vectors], *of = &a[entries[m].vectors];
        if (m == 2) {
            for (size_t i = 0; i < n; i++) check(std::isnan(l[i]), "values of a matrix with NaN");
            continue;
        }
        for (size_t i = 0; i < n; i++) {
            if (i > 0) check(l[i - 1] >= l[i], "values descend");
            for (size_t j = 0; j <= i; j++) {
                double made = 0, dot = 0;
                for (size_t k = 0; k < n; k++) made += v[i * n + k] * l[k] * v[j * n + k], dot += v[k * n + i] * v[k * n + j];
                worst.add(made, of[i * n + j]);
                worst.add(dot, i == j);
            }
        }
    }
    expect("eigh", int(sizes.size()), most, result, worst.error, 1e-12);
}

/// Eigenpairs of a symmetric matrix, the largest value first, by rotations of one pair at a time. The k-th vector is row k.
inline std::pair<Values, std::vector<Values>> eigenpairs(Values a, int n) {
    Values v(size_t(n) * n);
    for (int i = 0; i < n; i++) v[size_t(i) * n + i] = 1;
    for (int sweep = 0; sweep < 30; sweep++)
        for (int p = 0; p < n; p++)
            for (int q = p + 1; q < n; q++) {
                if (fabs(a[p * n + q]) < 1e-300) continue;
                const double tau = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
                const double t = (tau < 0 ? -1 : 1) / (fabs(tau) + sqrt(1 + tau * tau)), c = 1 / sqrt(1 + t * t), s = t * c;
                const auto rotate = [&](double& x, double& y) {
                    const double old = x;
                    x = c * old - s * y, y = s * old + c * y;
                };
                for (int k = 0; k < n; k++) rotate(a[k * n + p], a[k * n + q]);
                for (int k = 0; k < n; k++) rotate(a[p * n + k], a[q * n + k]);
                for (int k = 0; k < n; k++) rotate(v[p * n + k], v[q * n + k]);
            }
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return a[i * n + i] > a[j * n + j]; });
    Values values;
    std::vector<Values> vectors;
    for (int i : order) values.push_back(a[i * n + i]), vectors.emplace_back(&v[size_t(i) * n], &v[size_t(i) * n] + n);
    return {values, vectors};
}

/// Adapters D = B A of `ranks` with B of `out` rows and A of `in` columns.
struct Adapters {
    std::vector<int> ranks;
    int out, in;
};

/// Modules in one launch against the updates themselves: U are the left singular vectors of [D₁ … D_E], zᵢₖ = uₖᵀ Dᵢ, and
/// B times the map times all of A is Σᵢ U diag(γᵢ) Uᵀ Dᵢ. The last module holds a Gram with infinity.
inline void gate(const std::vector<Adapters>& modules, int top, bool opposition) {
    struct Module {
        uint64_t gram, directions;
        uint32_t rank, edges, bounds, unused;
    };
    std::vector<Module> entries;
    std::vector<uint32_t> bounds;
    std::vector<Values> b, a; // [out, P], [P, in]
    Values gram_b, gram_a;
    uint64_t directions = 0;
    int most = 0;
    for (const Adapters& m : modules) {
        const int rank = std::accumulate(m.ranks.begin(), m.ranks.end(), 0), edges = int(m.ranks.size());
        entries.push_back({gram_b.size(), directions, uint32_t(rank), uint32_t(edges), uint32_t(bounds.size()), 0});
        bounds.push_back(0);
        for (int r : m.ranks) bounds.push_back(bounds.back() + uint32_t(r));
        b.push_back(random(10 + b.size(), size_t(m.out) * rank)), a.push_back(random(50 + a.size(), size_t(rank) * m.in));
        // Columns of unlike strength, so that singular values lie apart.
        for (size_t i = 0; i < b.back().size(); i++) b.back()[i] *= pow(0.8, double(i % rank));
        for (int i = 0; i < rank; i++)
            for (int j = 0; j < rank; j++) {
                double of_b = 0, of_a = 0;
                for (int o = 0; o < m.out; o++) of_b += b.back()[size_t(o) * rank + i] * b.back()[size_t(o) * rank + j];
                for (int c = 0; c < m.in; c++) of_a += a.back()[size_t(i) * m.in + c] * a.back()[size_t(j) * m.in + c];
                gram_b.push_back(of_b), gram_a.push_back(of_a);
            }
        directions += 2 + 2 * rank + 3 * rank * edges;
        most = std::max(most, rank);
    }
    gram_a.back() = INFINITY;
    Array<double> map_(gram_b.size()), directions_(directions), scratch_(gram_b.size()), b_(gram_b), a_(gram_a);
    Array<Module> table_(entries);
    Array<uint32_t> bounds_(bounds);
    const int result = launch("gate", {unsigned(entries.size()), 1, 256, shared_bytes("gate", most)}, map_, directions_, scratch_, b_, a_,
                              table_, bounds_, top, 0.0, int(opposition));
    const Values map = map_.read(), found = directions_.read();
    check(!result, "gate");
    check(std::isnan(found[entries.back().directions]), "K of a module with infinity");
    Worst worst;
    for (size_t n = 0; n + 1 < entries.size(); n++) {
        const auto [out, in] = std::make_pair(modules[n].out, modules[n].in);
        const int rank = int(entries[n].rank), edges = int(entries[n].edges);
        const uint32_t* bound = &bounds[entries[n].bounds];
        const double* of = &found[entries[n].directions];
        std::vector<Values> d(edges, Values(size_t(out) * in));
        for (int e = 0; e < edges; e++)
            for (int o = 0; o < out; o++)
                for (int c = 0; c < in; c++)
                    for (uint32_t j = bound[e]; j < bound[e + 1]; j++)
                        d[e][size_t(o) * in + c] += b[n][size_t(o) * rank + j] * a[n][size_t(j) * in + c];
        Values square(size_t(out) * out), wanted(size_t(out) * in);
        for (int i = 0; i < out; i++)
            for (int j = 0; j < out; j++)
                for (const Values& one : d)
                    for (int c = 0; c < in; c++) square[size_t(i) * out + j] += one[size_t(i) * in + c] * one[size_t(j) * in + c];
        const auto [values, u] = eigenpairs(square, out);
        const int kept = std::min({rank, out, top});
        check(of[0] == kept, "directions that are kept");
        for (int k = 0; k < kept; k++) {
            worst.add(of[2 + k], sqrt(values[k]));
            std::vector<Values> z(edges, Values(in));
            for (int e = 0; e < edges; e++)
                for (int o = 0; o < out; o++)
                    for (int c = 0; c < in; c++) z[e][c] += u[k][o] * d[e][size_t(o) * in + c];
            const auto dot = [](const Values& x, const Values& y) { return std::inner_product(x.begin(), x.end(), y.begin(), 0.0); };
            Values norm, mean(in), cos;
            double total = 0, conflict = 0;
            for (const Values& one : z) norm.push_back(sqrt(dot(one, one))), total += norm.back();
            for (int e = 0; e < edges; e++)
                for (int c = 0; c < in; c++) mean[c] += norm[e] / total * z[e][c];
            for (int e = 0; e < edges; e++) cos.push_back(dot(z[e], mean) / (norm[e] * sqrt(dot(mean, mean))));
            for (int e = 0; e < edges; e++) conflict += norm[e] / total * (1 - cos[e]) / 2;
            worst.add(of[2 + rank + k], conflict);
            for (int e = 0; e < edges; e++) {
                double opposed = 0;
                for (int j = 0; j < edges; j++)
                    if (j != e) opposed += norm[j] / (total - norm[e]) * fmax(-dot(z[e], z[j]) / (norm[e] * norm[j]), 0);
                const double gamma = opposition ? 1 - opposed : (1 - conflict) * fmax(cos[e], 0);
                const double* tables = of + 2 + 2 * rank + k * edges + e;
                worst.add(tables[0], norm[e]);
                worst.add(tables[rank * edges], cos[e]);
                worst.add(tables[2 * rank * edges], gamma);
                for (int o = 0; o < out; o++)
                    for (int c = 0; c < in; c++) wanted[size_t(o) * in + c] += u[k][o] * gamma * z[e][c];
            }
        }
        for (int k = kept; k < rank; k++) worst.add(of[2 + k], 0), worst.add(of[2 + rank + k], 0);
        for (int o = 0; o < out; o++) {
            Values coords(rank);
            for (int i = 0; i < rank; i++)
                for (int j = 0; j < rank; j++) coords[j] += b[n][size_t(o) * rank + i] * map[entries[n].gram + size_t(i) * rank + j];
            for (int c = 0; c < in; c++) {
                double sum = 0;
                for (int j = 0; j < rank; j++) sum += coords[j] * a[n][size_t(j) * in + c];
                worst.add(sum, wanted[size_t(o) * in + c]);
            }
        }
    }
    expect("gate", int(modules.size()), most, result, worst.error, 1e-9);
}

inline void eigh() {
    eigh({1, 8, 5, 2, 17, 32}, 128);
    eigh({33, 3, 40, 56}, 256);
}

inline void gate() {
    for (const bool opposition : {false, true})
        gate({{{1}, 1, 3}, {{2, 2}, 9, 11}, {{3, 5, 2}, 12, 24}, {{8, 8, 8}, 40, 30}, {{1, 1, 1, 1, 1, 1, 1}, 13, 9}, {{17, 18}, 36, 40}, {{3, 4}, 9, 9}}, 20, opposition);
}

} // namespace recovery
