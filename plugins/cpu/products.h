// Products of a matrix of weights with the vectors of a batch, the weights read where they lie, once for all vectors.
//
// Each product adds up by itself and in one order, whatever stands beside it: kRows rows of weights go side by side,
// and up to `Batch` vectors of an instruction set. So neither a batch nor a thread changes a bit of it.
//
// A format says in chunks of how many elements weights are read, and in which order it wants a vector's elements in a
// chunk; they are brought into it once per product (arrange). Sums are in float. Vectors meet weights in bfloat16 and
// in 4 bits rounded to bfloat16, as torch rounds them, on all processors; others, and those that meet kCodes4Exact, as
// they are: a model in float32 loses nothing then.

#pragma once

#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif

// GCC makes one instruction of a product and a sum where it sees fit, in one tile and not in another, and so one bit of
// their sums may differ; clang does it by what the source says. Where it pays, it is asked for by name.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "vectors.h"

// Weights, [outputs, inputs]; `format` is 0 for float, 1 for bfloat16, 2 for half; or 3 for codes of 8 bits, int8, and
// 4 or 5 for codes of 4 bits, of which an even element is in the low half of a byte and the next one in its high half. A
// code stands for (code - zero) * scale. There is one scale, and one zero, for `group` neighbours of a row: [outputs,
// inputs / group]. No zeros: 0 of 8 bits, 8 of 4 bits, where a group is a multiple of 32. `bias` [outputs] may be null.
struct Matrix {
    const void* data;
    const float* scales;
    const uint8_t* zeros;
    const float* bias;
    int64_t outputs, inputs, group;
    int64_t format;
};
enum MatrixFormat { kFloat32, kBfloat16, kFloat16, kCodes8, kCodes4, kCodes4Exact };

namespace {
constexpr int kSide = 4;       // rows of weights side by side
constexpr int kBlock = 128;    // vectors are padded with zeros to whole blocks, the longest chunk

struct Product {  // of some rows of a matrix with vectors [batch, stride], in the order of its format
    const Matrix* matrix;
    const float* vectors;
    int64_t stride;
    int batch;
    float* out;  // [batch, out_stride]
    int64_t out_stride;
};
struct Kernel {
    void (*multiply)(const Product&, int64_t begin, int64_t end);
    void (*arrange)(const float* from, int64_t count, float* to);  // `to` is `padded(count) * 3 / 2` floats at most
};
inline int64_t padded_length(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }
inline int64_t room_of_vector(int64_t count) { return padded_length(count) * 3 / 2; }

INLINE inline float rounded(float wide) {
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    if (wide != wide) return wide;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&wide, &bits, sizeof bits);
    return wide;
}

// Elements as they are.
inline void arrange_plain(const float* from, int64_t count, float* to) {
    std::copy_n(from, count, to);
    std::fill(to + count, to + padded_length(count), 0.0f);
}
// In each chunk of 32 the even elements, then the odd ones.
inline void arrange_exact_pairs(const float* from, int64_t count, float* to) {
    std::fill_n(to, padded_length(count), 0.0f);
    for (int64_t i = 0; i < count; ++i) to[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = from[i];
}
// The same, rounded.
inline void arrange_pairs(const float* from, int64_t count, float* to) {
    arrange_exact_pairs(from, count, to);
    for (int64_t i = 0; i < padded_length(count); ++i) to[i] = rounded(to[i]);
}
// As numbers of 16 bits.
inline void arrange_bfloats(const float* from, int64_t count, float* to) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(reinterpret_cast<Bfloat*>(bits + i), load(from + i), kLanes);
    if (i < count) store(reinterpret_cast<Bfloat*>(bits + i), load(from + i, int(count - i)), int(count - i));
    std::fill(bits + count, bits + padded_length(count), uint16_t(0));
}
// As numbers of 16 bits, of each block those of every fourth place together; then, behind all of them, the sums of each
// block's eights.
inline void arrange_fours(const float* from, int64_t count, float* to) {
    const int64_t length = padded_length(count);
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    float* sums = to + length / 2;
    std::fill_n(bits, length, uint16_t(0));
    std::fill_n(sums, length / 8, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const float wide = rounded(from[i]);
        uint32_t word;
        std::memcpy(&word, &wide, sizeof word);
        bits[i / kBlock * kBlock + i % 4 * 32 + i % kBlock / 4] = uint16_t(word >> 16);
        sums[i / 8] += wide;
    }
}

// Dense weights by vectors of floats, which `add` takes a chunk at a time.
struct Floats32 {
    using Element = float;
    static constexpr int chunk = kLanes;
    INLINE static void add(const float* weights, const float* vector, Floats& sum) {
        sum += load(weights) * load(vector);
    }
};
struct Floats16 {
    using Element = Half;
    static constexpr int chunk = kLanes;
    INLINE static void add(const Half* weights, const float* vector, Floats& sum) {
        sum += load(weights) * load(vector);
    }
};
struct Pairs {
    using Element = Bfloat;
    static constexpr int chunk = 2 * kLanes;
    INLINE static void add(const Bfloat* weights, const float* vector, Floats& sum) {
        const Words pairs = read<Words>(weights);
        sum += widen_low(pairs, Bfloat()) * load(vector);
        sum += widen_high(pairs, Bfloat()) * load(vector + kLanes);
    }
};

// The products of kSide rows, or one, with `Batch` vectors.
template <class Format, int Side, int Batch>
INLINE inline void multiply_dense(const Product& product, int64_t row, int b) {
    using Element = typename Format::Element;
    const Matrix& matrix = *product.matrix;
    const int64_t inputs = matrix.inputs, whole = inputs / Format::chunk * Format::chunk;
    const Element* weights = static_cast<const Element*>(matrix.data) + row * inputs;
    const float* vectors = product.vectors + b * product.stride;
    Floats sum[Side][Batch] = {};
#pragma GCC unroll 1
    for (int64_t i = 0; i < whole; i += Format::chunk)
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q)
                Format::add(weights + r * inputs + i, vectors + q * product.stride + i, sum[r][q]);
    if (whole < inputs) {
        UNROLL for (int r = 0; r < Side; ++r) {
            Element rest[Format::chunk] = {};
            std::copy(weights + r * inputs + whole, weights + (r + 1) * inputs, rest);
            UNROLL for (int q = 0; q < Batch; ++q)
                Format::add(rest, vectors + q * product.stride + whole, sum[r][q]);
        }
    }
    UNROLL for (int r = 0; r < Side; ++r)
        UNROLL for (int q = 0; q < Batch; ++q) product.out[(b + q) * product.out_stride + row + r] = ::sum(sum[r][q]);
}

// Codes by vectors of floats, group by group.
template <int Bits, bool OneRegister> struct Codes {
    static constexpr int chunk = Bits == 8 ? kLanes : 2 * kLanes;
    static constexpr int whole_zero = Bits == 8 ? 0 : 8;

    INLINE static void add(const uint8_t* codes, int32_t zero, const float* vector, Floats& sum) {
        if constexpr (Bits == 8) {
            typedef int8_t Signed __attribute__((vector_size(16)));
            const Signed bytes = read<Signed>(codes);
            Integers numbers;
            if constexpr (OneRegister) numbers = __builtin_convertvector(bytes, Integers);
            else {
                typedef int16_t Middle __attribute__((vector_size(32)));
                numbers = __builtin_convertvector(__builtin_convertvector(bytes, Middle), Integers);
            }
            sum += __builtin_convertvector(numbers - zero, Floats) * load(vector);
        } else {
            const Bytes bytes = read<Bytes>(codes);
            sum += __builtin_convertvector(widen<OneRegister>(bytes & 15) - zero, Floats) * load(vector);
            sum += __builtin_convertvector(widen<OneRegister>(bytes >> 4) - zero, Floats) * load(vector + kLanes);
        }
    }
};

template <int Bits, bool OneRegister, int Side, int Batch>
INLINE inline void multiply_codes(const Product& product, int64_t row, int b) {
    using Format = Codes<Bits, OneRegister>;
    const Matrix& matrix = *product.matrix;
    const int64_t inputs = matrix.inputs, group = matrix.group, groups = inputs / group, bytes = inputs * Bits / 8;
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.data) + row * bytes;
    const float* vectors = product.vectors + b * product.stride;
    Floats sum[Side][Batch] = {};
#pragma GCC unroll 1
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * group, whole = begin + group / Format::chunk * Format::chunk, end = begin + group;
        int32_t zeros[Side];
        UNROLL for (int r = 0; r < Side; ++r)
            zeros[r] = matrix.zeros ? matrix.zeros[(row + r) * groups + g] : Format::whole_zero;
        Floats part[Side][Batch] = {};
#pragma GCC unroll 1
        for (int64_t i = begin; i < whole; i += Format::chunk)
            UNROLL for (int r = 0; r < Side; ++r)
                UNROLL for (int q = 0; q < Batch; ++q)
                    Format::add(codes + r * bytes + i * Bits / 8, zeros[r], vectors + q * product.stride + i,
                                part[r][q]);
        if (whole < end) {  // codes of 8 bits alone: of 4 bits a group is whole chunks
            UNROLL for (int r = 0; r < Side; ++r) {
                uint8_t rest[kLanes] = {};
                float few[kLanes] = {};
                std::copy(codes + r * bytes + whole, codes + r * bytes + end, rest);
                UNROLL for (int q = 0; q < Batch; ++q) {
                    std::copy_n(vectors + q * product.stride + whole, end - whole, few);
                    Codes<8, OneRegister>::add(rest, zeros[r], few, part[r][q]);
                }
            }
        }
        UNROLL for (int r = 0; r < Side; ++r) {
            const float scale = matrix.scales[(row + r) * groups + g];
            UNROLL for (int q = 0; q < Batch; ++q) sum[r][q] += part[r][q] * splat(scale);
        }
    }
    UNROLL for (int r = 0; r < Side; ++r)
        UNROLL for (int q = 0; q < Batch; ++q) product.out[(b + q) * product.out_stride + row + r] = ::sum(sum[r][q]);
}

// Calls work(row, b, side, batch) for all rows from begin on, kSide at a time, then one; and for all vectors, `Most` at
// a time, then one.
template <int Most, class Work>
INLINE inline void each_tile(const Product& product, int64_t begin, int64_t end, Work work) {
    const auto rows = [&](int64_t row, auto side) INLINE {
        int b = 0;
        for (; b + Most <= product.batch; b += Most) work(row, b, side, Constant<Most>());
        if constexpr (Most > 1)
            for (; b < product.batch; ++b) work(row, b, side, Constant<1>());
    };
    for (; begin + kSide <= end; begin += kSide) rows(begin, Constant<kSide>());
    for (; begin < end; ++begin) rows(begin, Constant<1>());
}

template <class Format, int Most> INLINE inline void dense(const Product& product, int64_t begin, int64_t end) {
    each_tile<Most>(product, begin, end, [&](int64_t row, int b, auto side, auto batch) INLINE {
        multiply_dense<Format, side, batch>(product, row, b);
    });
}
template <int Bits, bool OneRegister, int Most>
INLINE inline void codes(const Product& product, int64_t begin, int64_t end) {
    each_tile<Most>(product, begin, end, [&](int64_t row, int b, auto side, auto batch) INLINE {
        multiply_codes<Bits, OneRegister, side, batch>(product, row, b);
    });
}

#define KERNELS(name, target, OneRegister, Most)                                                        \
    struct name {                                                                                       \
        target static void float32(const Product& p, int64_t b, int64_t e) { dense<Floats32, Most>(p, b, e); } \
        target static void bfloat16(const Product& p, int64_t b, int64_t e) { dense<Pairs, Most>(p, b, e); }   \
        target static void float16(const Product& p, int64_t b, int64_t e) { dense<Floats16, Most>(p, b, e); } \
        target static void codes8(const Product& p, int64_t b, int64_t e) { codes<8, OneRegister, Most>(p, b, e); } \
        target static void codes4(const Product& p, int64_t b, int64_t e) { codes<4, OneRegister, Most>(p, b, e); } \
    };
KERNELS(AnyKernels, , false, 1)
#ifdef __x86_64__
KERNELS(Avx2Kernels, __attribute__((target("avx2,fma"))), false, 1)
KERNELS(Avx512Kernels, __attribute__((target("avx512bw,avx512vl,fma"))), true, 4)
}  // namespace
#include "products_x86.h"
namespace {
#endif

template <class Kernels> Kernel kernel_of(int64_t format) {
    switch (format) {
        case kFloat32: return {Kernels::float32, arrange_plain};
        case kBfloat16: return {Kernels::bfloat16, arrange_pairs};
        case kFloat16: return {Kernels::float16, arrange_plain};
        case kCodes8: return {Kernels::codes8, arrange_plain};
        case kCodes4: return {Kernels::codes4, arrange_pairs};
        default: return {Kernels::codes4, arrange_exact_pairs};
    }
}

// What multiplies matrices of a format on this processor.
inline Kernel kernel_for(int64_t format) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512bf16")) {
            if (format == kBfloat16) return {Bf16Kernels::bfloat16, arrange_bfloats};
            if (format == kCodes4) return {Bf16Kernels::codes4, arrange_fours};
        }
        return format == kCodes8 ? Kernel{ByteKernels::codes8, arrange_plain} : kernel_of<Avx512Kernels>(format);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernel_of<Avx2Kernels>(format);
#endif
    return kernel_of<AnyKernels>(format);
}
}  // namespace
