// The four loops that take all the time, over plain arrays of doubles whose sizes are multiples of eight.
//
// Sums run in eight lanes, which need neither reordered arithmetic (-ffast-math) nor flags for one machine: if the
// tool chain can, each loop is compiled for several instruction sets and the loader selects one.
#pragma once

#include <cstddef>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define OLSS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define OLSS_CLONES
#endif

namespace olss {

using Index = std::ptrdiff_t;
constexpr Index lanes = 8;

constexpr Index padded(Index size) { return (size + lanes - 1) / lanes * lanes; }

#if defined(__GNUC__)
typedef double Lanes __attribute__((vector_size(lanes * sizeof(double))));
#else
struct Lanes {
    double v[lanes];
    double operator[](Index i) const { return v[i]; }
    friend Lanes operator*(double s, Lanes a) {
        for (double& x : a.v) x *= s;
        return a;
    }
    friend Lanes operator*(Lanes a, const Lanes& b) {
        for (Index i = 0; i < lanes; ++i) a.v[i] *= b.v[i];
        return a;
    }
    Lanes& operator+=(const Lanes& b) {
        for (Index i = 0; i < lanes; ++i) v[i] += b.v[i];
        return *this;
    }
};
#endif

// The lanes are read and written through memcpy: the arrays need no alignment.
#define OLSS_LOAD(lanes_, from) std::memcpy(&(lanes_), (from), sizeof(Lanes))
#define OLSS_SUM(v) ((((v)[0] + (v)[4]) + ((v)[2] + (v)[6])) + (((v)[1] + (v)[5]) + ((v)[3] + (v)[7])))

// a . b
OLSS_CLONES inline double dot(const double* a, const double* b, Index size) {
    Lanes sum{}, x, y;
    for (Index i = 0; i < size; i += lanes) {
        OLSS_LOAD(x, a + i);
        OLSS_LOAD(y, b + i);
        sum += x * y;
    }
    return OLSS_SUM(sum);
}

// v -= q (q . v): takes the part along a unit vector out.
OLSS_CLONES inline void remove_part(double* v, const double* q, Index size) {
    Lanes sum{}, x, y;
    for (Index i = 0; i < size; i += lanes) {
        OLSS_LOAD(x, v + i);
        OLSS_LOAD(y, q + i);
        sum += x * y;
    }
    const double along = OLSS_SUM(sum);
    for (Index i = 0; i < size; ++i) v[i] -= along * q[i];
}

// For each of `count` vectors x, `stride` apart: along_a = a . x and along_b = b . x, in one pass over x.
OLSS_CLONES inline void project(const double* a, const double* b, Index size, const double* x, Index stride,
                                Index count, double* along_a, double* along_b) {
    for (Index k = 0; k < count; ++k, x += stride) {
        Lanes sum_a{}, sum_b{}, va, vb, vx;
        for (Index i = 0; i < size; i += lanes) {
            OLSS_LOAD(vx, x + i);
            OLSS_LOAD(va, a + i);
            OLSS_LOAD(vb, b + i);
            sum_a += va * vx;
            sum_b += vb * vx;
        }
        along_a[k] = OLSS_SUM(sum_a);
        along_b[k] = OLSS_SUM(sum_b);
    }
}

// A tile of a product: out[r][i] = sum over c < count of left[r][c] panel[c][i], with r < 4, i < 16.
constexpr Index tile_rows = 4, tile_columns = 2 * lanes;

OLSS_CLONES inline void multiply_tile(const double* left, Index left_stride, const double* panel,
                                      Index count, double* out, Index out_stride) {
    Lanes a0{}, a1{}, b0{}, b1{}, c0{}, c1{}, d0{}, d1{}, x, y;
    for (Index c = 0; c < count; ++c, ++left, panel += tile_columns) {
        OLSS_LOAD(x, panel);
        OLSS_LOAD(y, panel + lanes);
        a0 += left[0] * x;
        a1 += left[0] * y;
        b0 += left[left_stride] * x;
        b1 += left[left_stride] * y;
        c0 += left[2 * left_stride] * x;
        c1 += left[2 * left_stride] * y;
        d0 += left[3 * left_stride] * x;
        d1 += left[3 * left_stride] * y;
    }
    const Lanes result[tile_rows][2] = {{a0, a1}, {b0, b1}, {c0, c1}, {d0, d1}};
    for (Index r = 0; r < tile_rows; ++r) std::memcpy(out + r * out_stride, result[r], sizeof result[r]);
}

}  // namespace olss
