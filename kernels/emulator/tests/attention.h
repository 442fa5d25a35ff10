// Tests of attention: packed documents, caches and prefix trees, any even head width.
#pragma once
#include "expect.h"
#include "tensor_map.h"
#include <algorithm>
#include <functional>
#include <utility>

namespace attention {

using Run = std::pair<int, int>;

struct Segment {
    int start, end, own;
    std::vector<Run> past; // first row and number of rows
    /// Rows of k and v that query `t` sees.
    std::vector<int> keys(int t) const {
        std::vector<int> rows;
        for (Run run : past)
            for (int i = 0; i < run.second; i++) rows.push_back(run.first + i);
        for (int i = 0; i <= t - start; i++) rows.push_back(own + i);
        return rows;
    }
};

struct Case {
    std::vector<Segment> segments;
    int heads, kv, dim, tokens, keys;
};

/// Documents of the given lengths, one after another.
inline Case packed(std::vector<int> lengths, int heads, int kv, int dim) {
    Case c{{}, heads, kv, dim, 0, 0};
    for (int n : lengths) {
        c.segments.push_back({c.tokens, c.tokens + n, c.tokens, {}});
        c.tokens += n;
    }
    c.keys = c.tokens;
    return c;
}

inline int width_of(int dim) {
    for (int width : {32, 64, 80, 96, 128})
        if (dim <= width) return width;
    return 256;
}

/// Tiles of up to `rows` of each segment's pairs (or keys), then the runs of the past.
inline std::vector<uint32_t> list(const Case& c, int rows, bool keys, unsigned& tiles) {
    std::vector<uint32_t> tile, runs;
    const int group = c.heads / c.kv;
    tiles = 0;
    for (const Segment& s : c.segments)
        for (int i = 0; i < (s.end - s.start) * (keys ? 1 : group); i += rows) tiles++;
    for (const Segment& s : c.segments) {
        unsigned past = 0;
        for (Run run : s.past) past += run.second;
        for (int i = 0; i < (s.end - s.start) * (keys ? 1 : group); i += rows)
            tile.insert(tile.end(), {unsigned(i), unsigned((s.end - s.start) * group), unsigned(s.start), unsigned(s.own), past,
                                     unsigned(6 * tiles + runs.size())});
        for (Run run : s.past) runs.insert(runs.end(), {unsigned(run.first), unsigned(run.second)});
    }
    tile.insert(tile.end(), runs.begin(), runs.end());
    return tile;
}

/// Softmax of one query and head in f64.
struct Row {
    std::vector<int> keys;
    std::vector<double> exps;
    double sum, lse;
};

struct Inputs {
    std::vector<uint16_t> q, k, v;
    int ld_q, ld_k;
};

inline Inputs inputs(const Case& c) {
    const int ld_q = padded(c.heads * c.dim), ld_k = padded(c.kv * c.dim);
    return {numbers::rows(1, c.tokens, c.heads * c.dim, ld_q, 3), numbers::rows(2, c.keys, c.kv * c.dim, ld_k, 2),
            numbers::rows(3, c.keys, c.kv * c.dim, ld_k, 2), ld_q, ld_k};
}

inline Row softmax(const Case& c, const Inputs& x, const Segment& s, int t, int h, float scale) {
    Row row{s.keys(t), {}, 0, 0};
    double most = -INFINITY;
    for (int u : row.keys) {
        double dot = 0;
        for (int i = 0; i < c.dim; i++)
            dot += numbers::wide(x.q[size_t(t) * x.ld_q + h * c.dim + i]) *
                   numbers::wide(x.k[size_t(u) * x.ld_k + h / (c.heads / c.kv) * c.dim + i]);
        row.exps.push_back(dot * scale);
        most = fmax(most, dot * scale);
    }
    for (double& e : row.exps) row.sum += e = exp(e - most);
    row.lse = most + log(row.sum);
    return row;
}

/// Whether Hopper's kernel is launched where there is one.
inline bool hopper = false;

/// Launches the forward kernel; o and lse as it left them.
inline int forward(const Case& c, const Inputs& x, float scale, std::vector<uint16_t>& o, std::vector<float>& lse) {
    using namespace device;
    const int width = width_of(c.dim), rows = width > 128 ? 64 : 128, keys = width > 96 ? 32 : 64;
    unsigned tiles = 0;
    Array<uint32_t> list_(list(c, rows, false, tiles));
    Array<uint16_t> q_(x.q), k_(x.k), v_(x.v), o_(std::vector<uint16_t>(x.q.size(), 0x7fff));
    Array<float> lse_(std::vector<float>(size_t(c.tokens) * c.heads, NAN));
    const std::string kernel = "attention_" + std::to_string(width);
    int result;
    if (hopper && (c.dim == 64 || c.dim == 128)) {
        const auto map = [&](const Array<uint16_t>& matrix, int rows) { return tensor_map(matrix.pointer, c.keys, c.kv * c.dim, x.ld_k, rows); };
        result = launch((kernel + "_sm90").c_str(), {tiles, unsigned(c.kv), 384, own_struct}, o_, lse_, q_, map(k_, 8), map(k_, 1), map(v_, 8),
                        map(v_, 1), list_, c.heads, c.heads / c.kv, x.ld_q, scale);
    } else {
        const Shape shape{tiles, unsigned(c.kv), 128, unsigned(rows + 2 * keys) * (width + 8) * 2};
        result = launch(kernel.c_str(), shape, o_, lse_, q_, k_, v_, list_, c.heads, c.heads / c.kv, c.dim, x.ld_q, x.ld_k, scale);
    }
    o = o_.read(), lse = lse_.read();
    return result;
}

inline void test(const Case& c) {
    const float scale = 1 / sqrtf(float(c.dim));
    const Inputs x = inputs(c);
    std::vector<uint16_t> o;
    std::vector<float> lse;
    const int result = forward(c, x, scale, o, lse);
    numbers::Worst worst, worst_lse;
    std::vector<bool> named(c.tokens);
    for (const Segment& s : c.segments)
        for (int t = s.start; t < s.end; t++) {
            named[t] = true;
            for (int h = 0; h < c.heads; h++) {
                const Row row = softmax(c, x, s, t, h, scale);
                worst_lse.add(lse[size_t(t) * c.heads + h], row.lse);
                for (int i = 0; i < c.dim; i++) {
                    double sum = 0;
                    for (size_t u = 0; u < row.keys.size(); u++)
                        sum += row.exps[u] * numbers::wide(x.v[size_t(row.keys[u]) * x.ld_k + h / (c.heads / c.kv) * c.dim + i]);
                    worst.add(numbers::wide(o[size_t(t) * x.ld_q + h * c.dim + i]), sum / row.sum);
                }
            }
        }
    for (int t = 0; t < c.tokens; t++)
        for (int i = 0; i < x.ld_q; i++)
            if (!named[t] || i >= c.heads * c.dim) device::check(o[size_t(t) * x.ld_q + i] == 0x7fff, "attention wrote elsewhere");
    expect("attention", c.tokens, c.dim, result, worst.error, bf16_tolerance);
    expect("attention lse", c.tokens, c.dim, result, worst_lse.error, 2e-6);
}

/// Gradients against the derivative's formula in f64, from the forward kernel's o and log-sum-exp.
inline void backward(const Case& c) {
    using namespace device;
    using numbers::wide;
    const float scale = 1 / sqrtf(float(c.dim));
    const Inputs x = inputs(c);
    const auto do_ = numbers::rows(4, c.tokens, c.heads * c.dim, x.ld_q, 1);
    std::vector<uint16_t> o;
    std::vector<float> lse;
    check(!forward(c, x, scale, o, lse), "attention");

    const int width = width_of(c.dim), group = c.heads / c.kv;
    unsigned tiles = 0, key_tiles = 0;
    Array<uint32_t> list_(list(c, width > 128 ? 64 : 128, false, tiles)), key_list_(list(c, 64, true, key_tiles));
    const std::vector<uint16_t> unwritten_q(x.q.size(), 0x7fff), unwritten_k(x.k.size(), 0x7fff);
    Array<uint16_t> dq_(unwritten_q), dk_(unwritten_k), dv_(unwritten_k), do__(do_), o_(o), q_(x.q), k_(x.k), v_(x.v);
    Array<float> lse_(lse), delta_(lse.size());
    const unsigned keys = width > 128 ? 16 : width > 96 ? 32 : 64, pairs = width > 128 ? 16 : width > 80 ? 32 : 64;
    const int parts = width > 128 ? 1 : 2;
    int result = launch(("attention_dq_" + std::to_string(width)).c_str(),
                        {tiles * parts, unsigned(c.kv), 128, (128 + 4 * keys) * unsigned(width + 8) * 2}, dq_, delta_, do__, o_, lse_,
                        q_, k_, v_, list_, parts, c.heads, group, c.dim, x.ld_q, x.ld_k, scale);
    Shape shape{key_tiles, unsigned(c.kv), 128, (128 + 4 * pairs) * unsigned(width + 8) * 2};
    shape.grid_z = width > 128 ? 2 : 1;
    if (!result)
        result = launch(("attention_dkv_" + std::to_string(width)).c_str(), shape, dk_, dv_, do__, lse_, delta_, q_, k_, v_, key_list_, c.heads, group, c.dim, x.ld_q, x.ld_k, scale);

    std::vector<double> dq(x.q.size()), dk(x.k.size()), dv(x.k.size());
    std::vector<bool> named(c.tokens);
    double longest = 1;
    for (const Segment& s : c.segments)
        for (int t = s.start; t < s.end; t++) {
            named[t] = true;
            longest = fmax(longest, s.end - s.start);
            for (int h = 0; h < c.heads; h++) {
                const Row row = softmax(c, x, s, t, h, scale);
                const size_t at = size_t(t) * x.ld_q + h * c.dim;
                double delta = 0;
                for (int i = 0; i < c.dim; i++) delta += wide(do_[at + i]) * wide(o[at + i]);
                for (size_t u = 0; u < row.keys.size(); u++) {
                    const size_t key = size_t(row.keys[u]) * x.ld_k + h / group * c.dim;
                    const double p = row.exps[u] / row.sum;
                    double dp = 0;
                    for (int i = 0; i < c.dim; i++) dp += wide(do_[at + i]) * wide(x.v[key + i]);
                    const double ds = scale * p * (dp - delta);
                    for (int i = 0; i < c.dim; i++) {
                        dq[at + i] += ds * wide(x.k[key + i]);
                        dk[key + i] += ds * wide(x.q[at + i]);
                        dv[key + i] += p * wide(do_[at + i]);
                    }
                }
            }
        }
    // Sums of as many terms as queries and heads see a key, each rounded to bf16.
    const double tolerance = bf16_tolerance * (1 + sqrt(longest * group) / 8);
    const auto compare = [&](const char* name, const Array<uint16_t>& found_, const std::vector<double>& wanted, int ld, int columns) {
        const auto found = found_.read();
        numbers::Worst worst;
        for (int t = 0; t < c.tokens; t++)
            for (int i = 0; i < ld; i++) {
                const size_t at = size_t(t) * ld + i;
                if (named[t] && i < columns) worst.add(wide(found[at]), wanted[at]);
                else check(found[at] == 0x7fff, "attention_bwd wrote elsewhere");
            }
        expect(name, c.tokens, c.dim, result, worst.error, tolerance);
    };
    compare("attention dq", dq_, dq, x.ld_q, c.heads * c.dim);
    compare("attention dk", dk_, dk, x.ld_k, c.kv * c.dim);
    compare("attention dv", dv_, dv, x.ld_k, c.kv * c.dim);
}

/// A document in pieces, each with the earlier ones as past, gives the bytes of the whole document.
inline void pieces() {
    const Case whole = packed({150}, 4, 2, 64);
    const Inputs x = inputs(whole);
    std::vector<uint16_t> o, o_pieces;
    std::vector<float> lse, lse_pieces;
    device::check(!forward(whole, x, 0.1f, o, lse), "attention");
    Case cut{{{0, 1, 0, {}}, {1, 70, 1, {{0, 1}}}, {70, 149, 70, {{0, 30}, {30, 0}, {30, 40}}}, {149, 150, 149, {{0, 149}}}}, 4, 2, 64, 150, 150};
    device::check(!forward(cut, x, 0.1f, o_pieces, lse_pieces), "attention");
    device::check(o == o_pieces && !memcmp(lse.data(), lse_pieces.data(), lse.size() * 4), "attention in pieces");
}

inline std::vector<Case> documents() {
    std::vector<Case> cases = {packed({1}, 1, 1, 2),          packed({7}, 1, 1, 8),    packed({63, 64, 65}, 1, 1, 16),
                               packed({1, 2, 129}, 6, 2, 80), packed({31, 40, 37, 33}, 4, 2, 32), packed({70}, 3, 3, 96),
                               packed({70}, 2, 1, 256),       packed({5, 0, 9}, 4, 1, 30), packed({3, 40}, 67, 1, 6),
                               packed({90, 3}, 4, 1, 128),    packed({33}, 2, 2, 150)};
    // Rows between and after the segments belong to nobody.
    Case holes = packed({3, 70, 4, 20}, 4, 2, 24);
    holes.segments.erase(holes.segments.begin() + 2);
    holes.tokens += 5, holes.keys += 5;
    cases.push_back(holes);
    return cases;
}

/// Hopper's kernel: as many keys as a block of them has, one less and one more, groups that do not divide a tile, holes,
/// pasts of pieces.
inline void test_hopper() {
    hopper = true;
    for (const int dim : {64, 128}) {
        test(packed({1}, 1, 1, dim));
        test(packed({127, 128, 129, 3}, 1, 1, dim));
        test(packed({70, 41}, 6, 2, dim));
        test(packed({300}, 4, 1, dim));
        Case holes = packed({3, 70, 4, 20}, 4, 2, dim);
        holes.segments.erase(holes.segments.begin() + 2);
        holes.tokens += 5, holes.keys += 5;
        test(holes);
        test({{{0, 1, 499, {{0, 499}}}, {1, 2, 640, {{510, 130}}}}, 8, 2, dim, 2, 650});
        test({{{0, 30, 0, {}}, {30, 41, 30, {{0, 30}}}, {41, 90, 41, {{0, 30}}}, {90, 97, 90, {{0, 30}, {41, 49}}}}, 6, 3, dim, 97, 97});
    }
    pieces();
    hopper = false;
}

inline void test() {
    for (const Case& c : documents()) test(c);
    // Two steps of decoding, and a prefix tree: a stem, two branches, and a leaf of the second.
    test({{{0, 1, 499, {{0, 499}}}, {1, 2, 640, {{510, 130}}}}, 8, 2, 64, 2, 650});
    test({{{0, 30, 0, {}}, {30, 41, 30, {{0, 30}}}, {41, 90, 41, {{0, 30}}}, {90, 97, 90, {{0, 30}, {41, 49}}}}, 6, 3, 40, 97, 97});
    test({{{2, 70, 80, {{0, 0}, {3, 77}}}}, 2, 2, 12, 72, 150});
    pieces();
}

} // namespace attention
