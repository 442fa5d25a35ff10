// Tests of embed, rope, sum_sq and adamw.
#pragma once
#include "expect.h"

inline void embed(int tokens, int width) {
    const int ld = padded(width), vocab = 11;
    const auto table = numbers::rows(1, vocab, width, ld, 1);
    const std::vector<uint32_t> ids = {10, 0, 7};
    device::Array<uint16_t> table_(table), y_(size_t(tokens) * ld);
    device::Array<uint32_t> ids_(ids);
    const int result = device::launch("embed", {unsigned(tokens), 1, 32, 0}, y_, table_, ids_, width, ld);
    const auto y = y_.read();
    bool same = true;
    for (int t = 0; t < tokens; t++)
        for (int d = 0; d < width; d++) same &= y[size_t(t) * ld + d] == table[size_t(ids[t]) * ld + d];
    expect("embed", tokens, width, result, same ? 0 : INFINITY, 0);
}

inline void rope(int tokens, int heads, int dim) {
    const int width = heads * dim, ld = padded(width), half = dim / 2, places = tokens + 2;
    const auto x = numbers::rows(1, tokens, width, ld, 1);
    std::vector<float> cos(size_t(places) * half), sin(cos.size());
    const auto angle = numbers::uniform(2, cos.size(), 6);
    for (size_t i = 0; i < cos.size(); i++) cos[i] = cosf(angle[i]), sin[i] = sinf(angle[i]);
    const std::vector<uint32_t> rows = {4, 1, 1};
    device::Array<float> cos_(cos), sin_(sin);
    device::Array<uint32_t> rows_(rows);
    for (float sign : {1.0f, -1.0f}) {
        device::Array<uint16_t> x_(x);
        const int result =
            device::launch("rope", {unsigned(tokens), 1, 64, 0}, x_, cos_, sin_, rows_, heads, dim, ld, sign);
        const auto y = x_.read();
        numbers::Worst worst;
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < heads * half; i++) {
                const size_t low = size_t(t) * ld + i / half * dim + i % half, at = size_t(rows[t]) * half + i % half;
                const double a = numbers::wide(x[low]), b = numbers::wide(x[low + half]);
                worst.add(numbers::wide(y[low]), a * cos[at] - b * sign * sin[at]);
                worst.add(numbers::wide(y[low + half]), b * cos[at] + a * sign * sin[at]);
            }
        expect("rope", tokens, width, result, worst.error, bf16_tolerance);
    }
}

inline void sum_sq(int n) {
    const auto x = numbers::uniform(1, n, 1);
    device::Array<float> x_(x);
    device::Array<double> out_(1);
    const unsigned blocks = unsigned(n + 1023) / 1024;
    int result = device::launch("sum_sq", {blocks, 1, 256, 8 * sizeof(double)}, x_, int64_t(n));
    if (!result) result = device::launch("sum_sq_total", {1, 1, 256, 8 * sizeof(double)}, out_, int(blocks));
    double sum = 0;
    for (float v : x) sum += double(v) * v;
    numbers::Worst worst;
    worst.add(out_.read()[0], sum);
    expect("sum_sq", 1, n, result, worst.error, 1e-13);
}

inline void adamw(int n) {
    const double lr = 3e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.1, max_norm = 0.5;
    const auto p = numbers::uniform(1, n, 0.1f), m = numbers::uniform(2, n, 0.01f), g = numbers::uniform(4, n, 0.1f);
    auto v = numbers::uniform(3, n, 1e-4f);
    double norm_sq = 0;
    for (float& x : v) x = fabsf(x);
    for (float x : g) norm_sq += double(x) * x;
    for (double most : {0.0, max_norm, 1e9}) {
        device::Array<float> p_(p), m_(m), v_(v), g_(g);
        device::Array<double> norm_(std::vector<double>{norm_sq});
        const double correct1 = 1 - pow(beta1, 3), correct2 = 1 - pow(beta2, 3);
        const int result = device::launch("adamw", {2, 1, 256, 4}, p_, m_, v_, g_, norm_, int64_t(n), most,
                                          float(1 - lr * decay), float(1 - beta1), float(beta2), float(1 - beta2),
                                          float(-lr / correct1), float(sqrt(correct2)), float(eps));
        const auto p1 = p_.read(), m1 = m_.read(), v1 = v_.read();
        const double clip = most == 0 ? 1 : fmin(1, most / (sqrt(norm_sq) + 1e-6));
        numbers::Worst worst;
        for (int i = 0; i < n; i++) {
            const double grad = g[i] * clip, first = beta1 * m[i] + (1 - beta1) * grad;
            const double second = beta2 * v[i] + (1 - beta2) * grad * grad;
            worst.add(m1[i], first);
            worst.add(v1[i], second);
            worst.add(p1[i], p[i] * (1 - lr * decay) - lr * first / correct1 / (sqrt(second / correct2) + eps));
        }
        expect("adamw", 1, n, result, worst.error, 1e-6);
    }
}
