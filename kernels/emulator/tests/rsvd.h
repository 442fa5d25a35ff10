// Tests of rsvd and merge.
#pragma once
#include "expect.h"

namespace rsvd {

using namespace device;
using numbers::wide;

inline std::vector<double> doubles(uint64_t seed, size_t count) {
    const auto values = numbers::uniform(seed, count, 1);
    return std::vector<double>(values.begin(), values.end());
}

/// gᵢⱼ = Σ x[r, i] x[r, j] of x[rows, l].
inline std::vector<double> gram(const std::vector<double>& x, int l) {
    std::vector<double> g(size_t(l) * l);
    for (size_t r = 0; r < x.size() / l; r++)
        for (int i = 0; i < l; i++)
            for (int j = 0; j < l; j++) g[i * l + j] += x[r * l + i] * x[r * l + j];
    return g;
}

/// Three terms are the number; partial sums add up to what they are of.
inline void terms(int inner, int l, int splits) {
    const int ld = padded(inner), ld_partial = (3 * l + 3) / 4 * 4, ld_terms = padded(3 * l);
    const unsigned blocks = unsigned(inner * l + 255) / 256;
    std::vector<double> z = doubles(1, size_t(2) * inner * l);
    Array<double> z_(z), y_(size_t(inner) * l), back_(std::vector<double>(size_t(inner) * l, 0.5));
    Array<uint16_t> terms_(size_t(2) * 3 * l * ld), y_terms_(std::vector<uint16_t>(size_t(inner) * ld_terms, 0xffff));
    int result = launch("rsvd_terms", {blocks, 2, 256, 0}, terms_, z_, inner, l, ld);
    const auto partial = numbers::uniform(2, size_t(splits) * inner * ld_partial, 1);
    Array<float> partial_(partial);
    if (!result) result = launch("rsvd_split", {blocks, 1, 256, 0}, y_, y_terms_, partial_, inner, l, splits, ld_partial, ld_terms);
    if (!result) result = launch("rsvd_gather", {blocks, 1, 256, 0}, back_, partial_, inner, l, splits, ld_partial, 1);
    const auto terms = terms_.read(), y_terms = y_terms_.read();
    const auto y = y_.read(), back = back_.read();
    numbers::Worst worst;
    for (int m = 0; m < 2; m++)
        for (int i = 0; i < inner; i++)
            for (int j = 0; j < l; j++) {
                double sum = 0;
                for (int t = 0; t < 3; t++) sum += wide(terms[(size_t(m) * 3 * l + t * l + j) * ld + i]);
                worst.add(sum, float(z[(size_t(m) * inner + i) * l + j]));
            }
    for (int r = 0; r < inner; r++)
        for (int j = 0; j < l; j++) {
            double sum = 0, split = 0;
            for (int s = 0; s < splits; s++)
                for (int t = 0; t < 3; t++) sum += partial[(size_t(s) * inner + r) * ld_partial + t * l + j];
            for (int t = 0; t < 3; t++) split += wide(y_terms[size_t(r) * ld_terms + t * l + j]);
            worst.add(y[size_t(r) * l + j], float(sum));
            worst.add(split, float(sum));
            worst.add(back[size_t(r) * l + j], 0.5 + sum);
        }
    expect("rsvd's terms", inner, l, result, worst.error, 1e-14);
}

inline void energy(int rows, int inner) {
    const int ld = padded(inner), blocks = (rows + 15) / 16;
    const auto a = numbers::rows(1, rows, inner, ld, 1);
    Array<uint16_t> a_(a);
    Array<double> sums_(blocks);
    const int result = launch("rsvd_energy", {unsigned(blocks), 1, 256, own_struct}, sums_, a_, rows, inner, ld);
    const auto sums = sums_.read();
    numbers::Worst worst;
    for (int b = 0; b < blocks; b++) {
        double sum = 0;
        for (int r = b * 16; r < std::min(rows, b * 16 + 16); r++)
            for (int i = 0; i < inner; i++) sum += wide(a[size_t(r) * ld + i]) * wide(a[size_t(r) * ld + i]);
        worst.add(sums[b], sum);
    }
    expect("rsvd_energy", rows, inner, result, worst.error, 1e-13);
}

/// Of three matrices x[rows, l] the second has a column that is twice another's, or one of zeros; the third's Gram holds NaN.
inline void orthonormal(int rows, int l) {
    std::vector<double> x[2] = {doubles(1, size_t(rows) * l), doubles(2, size_t(rows) * l)};
    for (int r = 0; r < rows; r++) x[1][size_t(r) * l + l - 1] = l > 1 ? 2 * x[1][size_t(r) * l] : 0;
    std::vector<double> g = gram(x[0], l), second = gram(x[1], l);
    g.insert(g.end(), second.begin(), second.end());
    g.insert(g.end(), size_t(l) * l, 1.0);
    g.back() = NAN;
    Array<double> g_(g), w_(g.size());
    void* module = nullptr;
    unsigned long long variable;
    size_t bytes;
    unsigned shared;
    check(!cuInit(0) && !cuModuleLoadData(&module, "any") && !cuModuleGetGlobal_v2(&variable, &bytes, module, "rsvd_orthonormal_shared_bytes") &&
              !cuMemcpyDtoH_v2(&shared, variable, sizeof shared), "rsvd_orthonormal's shared memory");
    const int result = launch("rsvd_orthonormal", {3, 1, 64, shared + unsigned(16 * l * (l + 1))}, w_, g_, l, 1e-14);
    const auto w = w_.read();
    numbers::Worst worst;
    for (int m = 0; m < 2; m++) {
        std::vector<double> made(x[m].size());
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < l; j++)
                for (int k = 0; k < l; k++) made[size_t(r) * l + j] += x[m][size_t(r) * l + k] * w[size_t(m) * l * l + k * l + j];
        const auto one = gram(made, l);
        for (int i = 0; i < l; i++)
            for (int j = 0; j < l; j++) worst.add(one[i * l + j], i == j && (m == 0 || i < l - 1));
    }
    for (int i = 0; i < l * l; i++) check(std::isnan(w[size_t(2) * l * l + i]), "rsvd_orthonormal of NaN");
    expect("rsvd_orthonormal", rows, l, result, worst.error, 1e-11);
}

inline void values(int outer, int inner, int l, int k) {
    const int blocks = 70;
    const double cut = 1e-6;
    std::vector<double> lambda(2 * l), sums = doubles(4, 2 * blocks);
    for (int j = 0; j < l; j++) lambda[j] = 4.0 / (1 + j * j), lambda[l + j] = j == 0 ? 9.0 : j % 2 ? 1e-13 : -1e-14;
    const auto vectors = doubles(5, size_t(2) * l * l);
    const auto u = doubles(6, size_t(2) * outer * l), v = doubles(7, size_t(2) * inner * l), down = doubles(8, size_t(2) * inner * l);
    Array<double> lambda_(lambda), sums_(sums), vectors_(vectors), u_(u), v_(v), down_(down);
    Array<double> values_(2 * k), energy_(2), map_u_(vectors.size()), map_v_(vectors.size()), residuals_(2 * k);
    Array<double> u_out_(size_t(2) * outer * k), v_out_(size_t(2) * inner * k);
    int result = launch("rsvd_values", {2, 1, 64, own_struct}, values_, energy_, map_u_, map_v_, lambda_, vectors_, sums_, k, l, blocks, cut);
    if (!result)
        result = launch("rsvd_finish", {unsigned(k), 2, 256, own_struct}, residuals_, u_out_, v_out_, values_, u_, v_, down_, outer, inner, k, l);
    const auto found = values_.read(), energy = energy_.read(), map_u = map_u_.read(), map_v = map_v_.read();
    const auto residuals = residuals_.read(), u_out = u_out_.read(), v_out = v_out_.read();
    numbers::Worst worst;
    for (int m = 0; m < 2; m++) {
        const auto value = [&](int j) { return m == 1 && j > 0 ? 0 : std::sqrt(lambda[m * l + j]); };
        double sum = 0;
        for (int b = 0; b < blocks; b++) sum += sums[m * blocks + b];
        worst.add(energy[m], sum);
        for (int i = 0; i < l * l; i++) {
            const double x = vectors[m * l * l + i], s = value(i % l);
            worst.add(map_u[m * l * l + i], s == 0 ? 0 : x / s);
            worst.add(map_v[m * l * l + i], s == 0 ? 0 : x);
        }
        for (int j = 0; j < k; j++) {
            worst.add(found[m * k + j], value(j));
            double missing = 0, largest = 0;
            for (int i = 0; i < inner; i++) {
                const size_t at = (size_t(m) * inner + i) * l + j;
                missing += std::pow(down[at] - value(j) * v[at], 2);
            }
            worst.add(residuals[m * k + j], std::sqrt(missing));
            for (int i = 0; i < outer; i++) {
                const double x = u[(size_t(m) * outer + i) * l + j];
                if (std::fabs(x) > std::fabs(largest)) largest = x;
            }
            const double sign = largest < 0 ? -1 : 1;
            for (int i = 0; i < outer; i++) worst.add(u_out[(size_t(m) * outer + i) * k + j], sign * u[(size_t(m) * outer + i) * l + j]);
            for (int i = 0; i < inner; i++) worst.add(v_out[(size_t(m) * inner + i) * k + j], sign * v[(size_t(m) * inner + i) * l + j]);
        }
    }
    expect("rsvd_finish", outer, l, result, worst.error, 1e-12);
}

inline void test() {
    terms(5, 3, 1), terms(70, 24, 3);
    energy(1, 1), energy(35, 9), energy(48, 2100);
    for (int l : {1, 2, 17, 32, 64}) orthonormal(80, l);
    values(1, 1, 1, 1), values(300, 5, 3, 2), values(7, 600, 24, 16);
}

/// As `struct Update` of merge.cu.
struct Update {
    unsigned long long a, b;
    uint32_t rank;
    float scale;
};

inline void merge(int rows, int inner, std::vector<int> ranks) {
    std::vector<std::vector<float>> a, b;
    std::vector<Array<float>*> held;
    std::vector<Update> table;
    for (size_t u = 0; u < ranks.size(); u++) {
        // One number more: nothing has no address.
        a.push_back(numbers::uniform(10 + u, size_t(ranks[u]) * inner + 1, 1));
        b.push_back(numbers::uniform(20 + u, size_t(ranks[u]) * rows + 1, 1));
        held.push_back(new Array<float>(a[u]));
        held.push_back(new Array<float>(b[u]));
        table.push_back({held[2 * u]->pointer, held[2 * u + 1]->pointer, uint32_t(ranks[u]), 0.75f + u});
    }
    Array<Update> table_(table);
    const int blocks = (rows + 15) / 16, updates = int(ranks.size());
    const auto w = numbers::uniform(1, size_t(rows) * inner, 1);
    std::vector<uint16_t> narrow(w.size());
    for (size_t i = 0; i < w.size(); i++) narrow[i] = numbers::narrow(w[i]);
    Array<float> w_(w);
    Array<uint16_t> narrow_(narrow);
    Array<double> sums_(2 * blocks), narrow_sums_(2 * blocks);
    const Shape shape{unsigned(blocks), 1, 256, own_struct};
    int result = launch("merge_f32", shape, w_, sums_, table_, updates, rows, inner);
    if (!result) result = launch("merge_bf16", shape, narrow_, narrow_sums_, table_, updates, rows, inner);
    const auto got = w_.read();
    const auto got_narrow = narrow_.read();
    const auto sums = narrow_sums_.read();
    numbers::Worst worst;
    std::vector<double> lost(blocks), size(blocks);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < inner; c++) {
            const size_t at = size_t(r) * inner + c;
            double sum = 0;
            for (int u = 0; u < updates; u++)
                for (int k = 0; k < ranks[u]; k++) sum += double(table[u].scale * b[u][size_t(r) * ranks[u] + k]) * a[u][size_t(k) * inner + c];
            worst.add(got[at], float(w[at] + sum));
            worst.add(std::fabs(wide(got_narrow[at]) - wide(narrow[at]) - sum) <= std::fabs(wide(narrow[at]) + sum) / 256 ? 0 : NAN, 0);
            lost[r / 16] += std::pow(wide(got_narrow[at]) - wide(narrow[at]) - sum, 2);
            size[r / 16] += sum * sum;
        }
    for (int block = 0; block < blocks; block++) worst.add(sums[2 * block], lost[block]), worst.add(sums[2 * block + 1], size[block]);
    expect("merge", rows, inner, result, worst.error, 1e-12);
    for (Array<float>* array : held) delete array;
}

} // namespace rsvd
