// Tests of the matrix products: kernels/linear.cu, linear_bwd.cu, lora.cu and importance.cu against plain loops in f64.
#pragma once
#include "device.h"
#include "numbers.h"
#include <memory>

namespace products {

using namespace device;
using namespace numbers;

constexpr double tolerance = 1.0 / 256;

inline int row_of(int width) { return width > 64 ? (width + 63) / 64 * 64 : (width + 15) / 16 * 16; }
inline int up(int n, int to) { return (n + to - 1) / to; }

/// A matrix of bf16 in padded rows on both sides, NaN between them.
struct Matrix {
    int rows, width, ld;
    std::vector<uint16_t> host;
    std::unique_ptr<Array<uint16_t>> device;
    Matrix(uint64_t seed, int rows, int width, float scale) : Matrix(seed, rows, width, row_of(width), scale) {}
    Matrix(uint64_t seed, int rows, int width, int ld, float scale)
        : rows(rows), width(width), ld(ld), host(numbers::rows(seed, rows, width, ld, scale)),
          device(std::make_unique<Array<uint16_t>>(host)) {}
    double at(int r, int c) const { return wide(host[size_t(r) * ld + c]); }
    unsigned long long pointer() const { return device->pointer; }
    void read() { host = device->read(); }
};
/// One to write: NaN all over.
inline Matrix unwritten(int rows, int width) {
    Matrix m(0, rows, width, 0);
    m.host.assign(m.host.size(), 0xffff);
    m.device = std::make_unique<Array<uint16_t>>(m.host);
    return m;
}
/// Whether the padding of the rows is zero up to the next multiple of eight.
inline bool zero_padding(const Matrix& m) {
    for (int r = 0; r < m.rows; r++)
        for (int c = m.width; c < (m.width + 7) / 8 * 8; c++)
            if (m.host[size_t(r) * m.ld + c] & 0x7fff) return false;
    return true;
}

// As in linear.cu and lora.cu.
struct Rows {
    unsigned long long factor;
    int start, end, rank, unused = 0;
};
struct Output {
    unsigned long long y, w, t, bias;
    int width, ld, ld_t, groups_end, tiles_end, unused = 0;
};
struct Task {
    unsigned long long x, residual, h;
    int rows, tokens, inner, ld_x, ld_w, outputs, across, unused = 0;
    Output output[4];
    Rows group[144];
};

struct Group {
    int start, end, rank;
};
struct Case {
    int tokens, copies, inner;
    std::vector<int> widths;
    std::vector<Group> groups;
    enum { none, bias, residual, swiglu } with;
};

/// The operands of a case.
struct Inputs {
    Case test;
    int rows, rank = 1;
    Matrix x, h, residual;
    std::vector<Matrix> w, t, y, factors; // factors of the first output's groups, then of the second's
    std::vector<std::vector<float>> bias_values;
    std::vector<std::unique_ptr<Array<float>>> biases;

    explicit Inputs(const Case& test)
        : test(test), rows(test.tokens * test.copies), x(1, test.tokens, test.inner, 1), h(unwritten(rows, test.widths[0])),
          residual(9, rows, test.widths[0], 1) {
        for (const Group& g : test.groups) rank = std::max(rank, g.rank);
        for (size_t j = 0; j < test.widths.size(); j++) {
            const int width = test.widths[j];
            w.emplace_back(10 + j, width, test.inner, 1);
            t.emplace_back(20 + j, rows, rank, 1);
            y.push_back(unwritten(rows, width));
            bias_values.push_back(uniform(30 + j, width, 1));
            biases.push_back(std::make_unique<Array<float>>(bias_values.back()));
            for (const Group& g : test.groups) factors.emplace_back(40 + factors.size(), width, g.rank, (g.rank + 7) / 8 * 8, 1);
        }
    }
    unsigned long long bias(size_t j) const { return test.with == Case::bias ? biases[j]->pointer : 0; }

    /// Compares what the kernel left.
    void expect(const char* kernel, int result) {
        Worst worst;
        h.read();
        bool padding = true;
        for (size_t j = 0; j < w.size(); j++) {
            y[j].read();
            padding &= zero_padding(y[j]);
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < test.widths[j]; o++) {
                    double sum = test.with == Case::bias ? bias_values[j][o] : test.with == Case::residual ? residual.at(r, o) : 0;
                    for (int i = 0; i < test.inner; i++) sum += x.at(r % test.tokens, i) * w[j].at(o, i);
                    for (size_t g = 0; g < test.groups.size(); g++) {
                        const Group& of = test.groups[g];
                        if (r < of.start || r >= of.end) continue;
                        const Matrix& b = factors[j * test.groups.size() + g];
                        for (int k = 0; k < of.rank; k++) sum += t[j].at(r, k) * b.at(o, k);
                    }
                    worst.add(y[j].at(r, o), sum);
                }
        }
        if (test.with == Case::swiglu) {
            padding &= zero_padding(h);
            for (int r = 0; r < rows; r++)
                for (int o = 0; o < h.width; o++) {
                    const double z = y[0].at(r, o);
                    worst.add(h.at(r, o), z / (1 + exp(-z)) * y[1].at(r, o));
                }
        }
        printf("%-18s %4d x %d, %4d in, %4d out (%zu), %zu groups: error %.1e\n", kernel, test.tokens, test.copies, test.inner,
               test.widths[0], test.widths.size(), test.groups.size(), worst.error);
        check(!result, kernel);
        check(worst.error <= tolerance, kernel);
        check(padding, "zeros in the padding");
    }
};

inline void linear(const char* kernel, int m, int n, unsigned threads, const Case& test) {
    Inputs in(test);
    Task task{};
    task.x = in.x.pointer();
    task.rows = in.rows, task.tokens = test.tokens, task.inner = test.inner;
    task.ld_x = task.ld_w = in.x.ld;
    task.outputs = int(test.widths.size());
    int group = 0;
    for (size_t j = 0; j < test.widths.size(); j++) {
        for (const Group& g : test.groups) {
            task.group[group] = {in.factors[group].pointer(), g.start, g.end, g.rank};
            group++;
        }
        task.across += up(test.widths[j], test.with == Case::swiglu ? n / 2 : n);
        task.output[j] = {in.y[j].pointer(), in.w[j].pointer(), in.t[j].pointer(), in.bias(j), test.widths[j], in.y[j].ld, in.t[j].ld,
                          group, task.across};
    }
    if (test.with == Case::swiglu) task.across = task.output[0].tiles_end, task.h = in.h.pointer();
    if (test.with == Case::residual) task.residual = in.residual.pointer();
    in.expect(kernel, launch(kernel, {unsigned(up(in.rows, m) * task.across), 1, threads, own_struct}, task));
}

inline std::vector<Case> linear_cases() {
    return {
        {1, 1, 1, {1}, {}, Case::none},
        {1, 1, 7, {3}, {{0, 1, 1}}, Case::bias},
        {63, 1, 33, {65}, {{0, 63, 8}}, Case::residual},
        {65, 1, 64, {63, 17}, {{0, 65, 17}}, Case::bias},
        {130, 1, 97, {129, 20, 70}, {{0, 130, 16}}, Case::none},
        {37, 3, 100, {131}, {{0, 37, 4}, {40, 74, 64}, {74, 111, 33}}, Case::none},
        {64, 1, 31, {358}, {{0, 64, 8}}, Case::residual},
        {129, 1, 172, {172, 172}, {{0, 129, 8}}, Case::swiglu},
        {3, 1, 130, {70, 70}, {{0, 2, 17}, {2, 3, 3}}, Case::swiglu},
        {3, 1, 8, {257, 257}, {}, Case::swiglu},
        {257, 1, 40, {8}, {{100, 200, 2}}, Case::bias},
    };
}

inline void linear() {
    for (const Case& test : linear_cases()) {
        const bool pair = test.with == Case::swiglu;
        linear(pair ? "linear_swiglu_64" : "linear_64", 64, 64, 128, test);
        linear(pair ? "linear_swiglu_128" : "linear_128", 128, 128, 128, test);
        linear(pair ? "linear_swiglu_256" : "linear_256", 128, 256, 256, test);
    }
}

// As in lora.cu and lib/philox.cuh.
struct Factor {
    unsigned long long out, in;
    int rows, columns, ld, step_row, step_column;
    float scale;
};
struct Factors {
    Factor job[32];
};
struct Part {
    unsigned long long t;
    int ld, first, rank, width;
};
struct Parts {
    Part part[4];
};
struct Dropout {
    uint32_t key0 = 0x1234567, key1 = 0x89abcdef, step_low = 5, step_high = 0, least = 0;
    float scale = 1;
};

/// Word `place` of Philox4x32-10.
inline uint32_t philox(const Dropout& d, uint64_t place) {
    uint32_t c[4] = {uint32_t(place / 4), uint32_t(place / 4 >> 32), d.step_low, d.step_high}, k[2] = {d.key0, d.key1};
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = 0xd2511f53ull * c[0], p1 = 0xcd9e8d57ull * c[2];
        const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k[1], uint32_t(p0)};
        memcpy(c, next, sizeof c);
        k[0] += 0x9e3779b9u, k[1] += 0xbb67ae85u;
    }
    return c[place % 4];
}
inline Dropout dropping(double p) {
    Dropout d;
    d.least = uint32_t(ceil(p * (1 << 24)));
    d.scale = float(1 / (1 - p));
    return d;
}
inline double mask(const Dropout& d, uint64_t place) { return philox(d, place) >> 8 >= d.least ? d.scale : 0.0; }

/// t = (m∘x) Aᵀ / (1 − p) of two adapters at once, rows first..first + rows of copies of x.
inline void thin(int tokens, int first, int rows, int inner, int rank0, int rank1, int split, double p) {
    const int columns = rank0 + rank1, ld_partial = (columns + 3) / 4 * 4, splits = up(inner, split);
    const Matrix x(1, tokens, inner, 1);
    const auto a0 = uniform(2, size_t(rank0) * inner, 1), a1 = uniform(3, size_t(rank1) * inner, 1);
    Array<float> a0_(a0), a1_(a1), partial(size_t(splits) * rows * ld_partial);
    Array<uint16_t> packed(size_t(columns) * x.ld);
    const Dropout d = dropping(p);
    Factors factors{};
    factors.job[0] = {packed.pointer, a0_.pointer, rank0, inner, x.ld, inner, 1, 1};
    factors.job[1] = {packed.pointer + size_t(2) * rank0 * x.ld, a1_.pointer, rank1, inner, x.ld, inner, 1, 1};
    int result = launch("lora_factors", {unsigned(up(std::max(rank0, rank1) * x.ld, 2048)), 2, 256, 0}, factors);
    Shape shape{unsigned(up(rows, 64)), unsigned(up(columns, 64)), 128, own_struct};
    shape.grid_z = unsigned(splits);
    if (!result)
        result = launch("lora_thin", shape, partial, x.pointer(), packed, first, rows, tokens, columns, ld_partial, inner, x.ld,
                        x.ld, split, int(p > 0), d);
    Matrix t0 = unwritten(first + rows, rank0), t1 = unwritten(first + rows, rank1);
    Parts parts{};
    parts.part[0] = {t0.pointer(), t0.ld, 0, rank0, t0.ld};
    parts.part[1] = {t1.pointer(), t1.ld, rank0, rank1, t1.ld};
    if (!result)
        result = launch("lora_thin_sum", {unsigned(up(rows * std::max(t0.ld, t1.ld), 256)), 2, 256, 0}, partial, first, rows,
                        ld_partial, splits, d.scale, parts);
    t0.read(), t1.read();
    Worst worst;
    for (int r = first; r < first + rows; r++)
        for (int c = 0; c < columns; c++) {
            double sum = 0;
            const float* a = c < rank0 ? &a0[size_t(c) * inner] : &a1[size_t(c - rank0) * inner];
            for (int i = 0; i < inner; i++)
                sum += x.at(r % tokens, i) * wide(narrow(a[i])) * (p > 0 ? mask(d, uint64_t(r % tokens) * inner + i) : 1.0);
            worst.add(c < rank0 ? t0.at(r, c) : t1.at(r, c - rank0), sum);
        }
    bool untouched = true;
    for (int r = 0; r < first; r++) untouched &= t0.host[size_t(r) * t0.ld] == 0xffff;
    printf("%-18s %4d of %d rows, %4d in, ranks %d and %d, %d splits, p %.1f: error %.1e\n", "lora_thin", rows, tokens, inner, rank0,
           rank1, splits, p, worst.error);
    check(!result, "lora_thin");
    check(worst.error <= tolerance, "lora_thin");
    check(untouched, "rows of other groups");
}

inline void lora() {
    thin(1, 0, 1, 1, 1, 1, 32, 0);
    thin(65, 0, 65, 97, 8, 16, 64, 0.3);
    thin(37, 40, 60, 358, 17, 64, 128, 0);
    thin(64, 0, 64, 130, 4, 8, 160, 0.1);
    thin(200, 0, 200, 64, 64, 64, 32, 0.5);
}

// As in linear_bwd.cu and lora.cu.
struct Gradient {
    unsigned long long dy, w;
    int width, ld;
};
struct TaskBwd {
    unsigned long long dx, u, a;
    int tokens, inner, ld_x, ld_w, ranks, ld_u, ld_a, outputs, drops;
    Dropout dropout;
    Gradient output[4];
};
struct GradientPart {
    unsigned long long grad;
    int first, rank, step_column, step_rank;
    float scale;
};
struct GradientParts {
    GradientPart part[4];
};

struct CaseBwd {
    int tokens, inner;
    std::vector<int> widths;
    int ranks;
    double p;
};

/// The operands of a case.
struct InputsBwd {
    CaseBwd test;
    Dropout dropout;
    Matrix u, a, dx;
    std::vector<Matrix> dy, w;

    explicit InputsBwd(const CaseBwd& test)
        : test(test), dropout(dropping(test.p)), u(1, test.tokens, std::max(test.ranks, 1), up(std::max(test.ranks, 1), 8) * 8, 1),
          a(2, std::max(test.ranks, 1), test.inner, 1), dx(unwritten(test.tokens, test.inner)) {
        for (size_t j = 0; j < test.widths.size(); j++) {
            dy.emplace_back(10 + j, test.tokens, test.widths[j], 1);
            w.emplace_back(20 + j, test.widths[j], test.inner, 1);
        }
    }

    /// Compares what the kernel left.
    void expect(const char* kernel, int result) {
        dx.read();
        Worst worst;
        for (int t = 0; t < test.tokens; t++)
            for (int i = 0; i < test.inner; i++) {
                double sum = 0;
                for (int r = 0; r < test.ranks; r++) sum += u.at(t, r) * a.at(r, i);
                if (test.p > 0) sum *= mask(dropout, uint64_t(t) * test.inner + i);
                for (size_t j = 0; j < w.size(); j++)
                    for (int o = 0; o < test.widths[j]; o++) sum += dy[j].at(t, o) * w[j].at(o, i);
                worst.add(dx.at(t, i), sum);
            }
        printf("%-18s %4d x %4d, %4d out (%zu), ranks %d, p %.1f: error %.1e\n", kernel, test.tokens, test.inner, test.widths[0],
               w.size(), test.ranks, test.p, worst.error);
        check(!result, kernel);
        check(worst.error <= tolerance, kernel);
        check(zero_padding(dx), "zeros in the padding");
    }
};

inline void linear_bwd(const char* kernel, int m, int n, unsigned threads, const CaseBwd& test) {
    InputsBwd in(test);
    TaskBwd task{in.dx.pointer(), in.u.pointer(), in.a.pointer(), test.tokens, test.inner, in.dx.ld, in.dx.ld, test.ranks,
                 in.u.ld, in.a.ld, int(in.w.size()), test.p > 0, in.dropout, {}};
    for (size_t j = 0; j < in.w.size(); j++) task.output[j] = {in.dy[j].pointer(), in.w[j].pointer(), test.widths[j], in.dy[j].ld};
    in.expect(kernel, launch(kernel, {unsigned(up(test.tokens, m) * up(test.inner, n)), 1, threads, own_struct}, task));
}

inline std::vector<CaseBwd> linear_bwd_cases() {
    return {
        {1, 1, {1}, 1, 0},           {63, 65, {33}, 0, 0},  {65, 63, {64, 17}, 24, 0.2}, {130, 257, {31, 97, 8}, 33, 0},
        {129, 172, {130, 130}, 16, 0.5}, {64, 358, {70}, 64, 0}, {3, 1127, {8}, 8, 0.1},
    };
}

inline void linear_bwd() {
    for (const CaseBwd& test : linear_bwd_cases()) {
        linear_bwd("linear_bwd_64", 64, 64, 128, test);
        linear_bwd("linear_bwd_128", 128, 128, 128, test);
        linear_bwd("linear_bwd_256", 128, 256, 256, test);
    }
}

/// grad += scale · (m∘wide)ᵀ thin / (1 − p), and with `both` u = wide · factorᵀ.
inline void gradient(int n, int tokens, int columns, int ranks, int span, double p, bool both) {
    const std::string kernel = "lora_gradient_" + std::to_string(n);
    const int spans = up(tokens, span), blocks = up(columns, 256), ld = up(ranks, 4) * 4;
    const Matrix wide(1, tokens, columns, 1), thin(2, tokens, ranks, 1), factor(3, ranks, columns, 1);
    Matrix u = unwritten(tokens, ranks);
    const auto before = uniform(4, size_t(columns) * ranks, 1);
    Array<float> partial(size_t(spans) * columns * ld), thin_partial(size_t(blocks) * tokens * ld), grad(before);
    const Dropout d = dropping(p);
    Shape shape{unsigned(blocks), unsigned(up(ranks, n)), 256, own_struct};
    shape.grid_z = unsigned(spans);
    int result = launch(kernel.c_str(), shape, partial, both ? thin_partial.pointer : 0ull, wide.pointer(), thin.pointer(),
                        factor.pointer(), tokens, columns, ranks, ld, wide.ld, thin.ld, factor.ld, span, int(p > 0), d);
    // The first rank's column apart from the others', and in another layout.
    GradientParts parts{};
    parts.part[0] = {grad.pointer, 0, 1, 1, columns, 0.5f};
    parts.part[1] = {grad.pointer + size_t(4) * columns, 1, ranks - 1, ranks - 1, 1, 0.25f * d.scale};
    if (!result)
        result = launch("lora_gradient_sum", {unsigned(up(columns * ranks, 256)), ranks > 1 ? 2u : 1u, 256, 0}, partial, columns, ld,
                        spans, parts);
    Parts thin_parts{};
    thin_parts.part[0] = {u.pointer(), u.ld, 0, ranks, ranks};
    if (!result && both)
        result = launch("lora_thin_sum", {unsigned(up(tokens * ranks, 256)), 1, 256, 0}, thin_partial, 0, tokens, ld, blocks, 1.0f,
                        thin_parts);
    const auto found = grad.read();
    u.read();
    Worst worst;
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < ranks; r++) {
            double sum = 0;
            for (int t = 0; t < tokens; t++)
                sum += wide.at(t, c) * thin.at(t, r) * (p > 0 && mask(d, uint64_t(t) * columns + c) == 0 ? 0 : 1);
            const size_t at = r == 0 ? c : columns + size_t(c) * (ranks - 1) + r - 1;
            worst.add(found[at], before[at] + (r == 0 ? 0.5f : 0.25f * d.scale) * sum);
        }
    Worst worst_u;
    for (int t = 0; t < tokens && both; t++)
        for (int r = 0; r < ranks; r++) {
            double sum = 0;
            for (int c = 0; c < columns; c++) sum += wide.at(t, c) * factor.at(r, c);
            worst_u.add(u.at(t, r), sum);
        }
    printf("%-18s %4d x %4d, rank %d, spans of %d, p %.1f: error %.1e %.1e\n", kernel.c_str(), tokens, columns, ranks, span, p,
           worst.error, worst_u.error);
    check(!result, kernel.c_str());
    check(worst.error <= 1e-5, kernel.c_str());
    check(worst_u.error <= tolerance, kernel.c_str());
}

inline void gradients() {
    for (int n : {16, 32, 64}) {
        gradient(n, 1, 1, 1, 32, 0, true);
        gradient(n, 97, 257, 8, 64, 0, true);
        gradient(n, 130, 358, 17, 512, 0.3, false);
        gradient(n, 65, 172, 70, 32, 0, true);
    }
}

// As in importance.cu.
struct Scores {
    int count, kind[7];
};

inline void importance(bool second, int out, int inner, std::vector<int> lengths) {
    const char* kernel = second ? "importance_second" : "importance_first";
    const int m = 128, n = second ? 64 : 128, down = up(out, m), across = up(inner, n), count = int(lengths.size());
    const Scores scores = second ? Scores{4, {0, 1, 2, 3}} : Scores{2, {0, 1}};
    std::vector<uint32_t> samples;
    int tokens = 1; // one that belongs to no sample
    for (size_t j = 0; j < lengths.size(); j++) {
        const float weight = 1 + 0.5f * float(j);
        uint32_t bits;
        memcpy(&bits, &weight, 4);
        samples.insert(samples.end(), {uint32_t(tokens), uint32_t(lengths[j]), bits});
        tokens += lengths[j];
    }
    if (samples.empty()) samples.assign(3, 0);
    const Matrix dy(1, tokens, out, 1), x(2, tokens, inner, 1), w(3, out, inner, 1);
    Array<uint32_t> samples_(samples);
    Array<double> row_parts(size_t(across) * scores.count * out), col_parts(size_t(down) * scores.count * inner);
    Array<double> row_sums(size_t(scores.count) * out), col_sums(size_t(scores.count) * inner);
    int result = launch(kernel, {unsigned(down * across), 1, 256, own_struct}, row_parts, col_parts, dy.pointer(), x.pointer(),
                        w.pointer(), samples_, count, std::max(count, 1), out, inner, dy.ld, x.ld, w.ld, scores);
    for (const bool rows : {true, false}) {
        const size_t length = size_t(scores.count) * (rows ? out : inner);
        if (!result)
            result = launch("importance_sum", {unsigned(up(int(length), 256)), 1, 256, 0}, rows ? row_sums : col_sums,
                            rows ? row_parts : col_parts, rows ? across : down, length);
    }
    const auto by_row = row_sums.read(), by_column = col_sums.read();
    std::vector<double> rows(by_row.size()), columns(by_column.size());
    for (int o = 0; o < out; o++)
        for (int i = 0; i < inner; i++) {
            double g = 0, f = 0;
            int token = 1;
            for (size_t j = 0; j < lengths.size(); j++) {
                double acc = 0;
                for (int t = 0; t < lengths[j]; t++, token++) acc += dy.at(token, o) * x.at(token, i);
                g += acc;
                f += pow((1 + 0.5 * double(j)) * acc, 2) / count;
            }
            const double weight = w.at(o, i), values[] = {fabs(weight * g), weight * g, weight * weight * f,
                                                          fabs(weight * g - 0.5 * weight * weight * f)};
            for (int s = 0; s < scores.count; s++) rows[size_t(s) * out + o] += values[s], columns[size_t(s) * inner + i] += values[s];
        }
    Worst worst;
    for (size_t k = 0; k < rows.size(); k++) worst.add(by_row[k], rows[k]);
    for (size_t k = 0; k < columns.size(); k++) worst.add(by_column[k], columns[k]);
    printf("%-18s %4d x %4d, %d samples: error %.1e\n", kernel, out, inner, count, worst.error);
    check(!result, kernel);
    check(worst.error <= 1e-5, kernel);
}

inline void importance() {
    for (const bool second : {false, true}) {
        importance(second, 1, 1, {1});
        importance(second, 7, 13, {});
        importance(second, 127, 65, {5, 1, 33, 64, 16});
        importance(second, 129, 172, {31, 70});
        importance(second, 64, 358, {97});
    }
}

} // namespace products
