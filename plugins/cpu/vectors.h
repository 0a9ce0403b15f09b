// Vectors of floats, and how narrower numbers become them.
//
// Vectors are the GNU vector extension: a vector is one register in AVX-512, two in AVX2, four in SSE and NEON. All
// functions are inlined, so that each is compiled for the instruction set of the function that calls it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC diagnostic ignored "-Wpsabi"  // it warns of how calls pass vectors, and all that take one are inlined
#define INLINE __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {
constexpr int kLanes = 16;  // floats of a vector
template <int Number> using Constant = std::integral_constant<int, Number>;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));
struct Bfloat { uint16_t bits; }; struct Half { uint16_t bits; };

template <class To> INLINE inline To read(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
template <class To, class From> INLINE inline To same_bits(const From& from) { return read<To>(&from); }
INLINE inline Words read_shorts(const void* from) { return __builtin_convertvector(read<Shorts>(from), Words); }
INLINE inline Floats load(const float* from) { return read<Floats>(from); }

constexpr Integers kFirst = {-1, -1, -1, -1, -1, -1, -1, -1};  // which lanes are the first half

// Bytes as integers. GCC has one instruction for it where a register holds all; else it takes two steps, or each lane.
template <bool OneRegister> INLINE inline Integers widen(const Bytes& bytes) {
    if constexpr (OneRegister) return __builtin_convertvector(bytes, Integers);
    else return __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Integers);
}

// What narrow numbers are as floats: each in the low half of a word, and nothing above it.
INLINE inline Floats widen(const Words& bits, Bfloat) { return same_bits<Floats>(bits << 16); }

// The exponent and mantissa of a half, moved to where a float has them, are the value times 2^-112, subnormals
// included. Infinity and NaN, the largest exponent, are completed to a float's largest.
INLINE inline Floats widen(const Words& bits, Half) {
    const Words magnitude = (bits & 0x7fff) << 13;
    const Words special = (Words)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    const Words scaled = same_bits<Words>(same_bits<Floats>(magnitude) * 0x1p112f);
    return same_bits<Floats>(scaled | special | ((bits & 0x8000) << 16));
}
// The same for numbers that stand in pairs: those in the low halves of words, and those in the high ones.
INLINE inline Floats widen_low(const Words& pairs, Bfloat) { return same_bits<Floats>(pairs << 16); }
INLINE inline Floats widen_high(const Words& pairs, Bfloat) { return same_bits<Floats>(pairs & 0xffff0000u); }
INLINE inline Floats widen_low(const Words& pairs, Half type) { return widen(pairs & 0xffff, type); }
INLINE inline Floats widen_high(const Words& pairs, Half type) { return widen(pairs >> 16, type); }

template <class Narrow> INLINE inline Floats load(const Narrow* from) { return widen(read_shorts(from), Narrow()); }

// Of Arm's instructions one widens four neighbouring halves; and GCC takes vectors of several registers apart, lane by
// lane, where it compares them.
#ifdef __aarch64__
typedef __fp16 Halves __attribute__((vector_size(32)));
INLINE inline Floats load(const Half* from) { return __builtin_convertvector(read<Halves>(from), Floats); }
constexpr bool kArm = true;
#else
constexpr bool kArm = false;
#endif

// The first `lanes` elements, and `rest` after them.
template <class Element> INLINE inline Floats load(const Element* from, int lanes, Element rest = Element()) {
    if (lanes == kLanes) return load(from);
    Element padded[kLanes];
    std::fill_n(padded, kLanes, rest);
    std::copy_n(from, lanes, padded);
    return load(padded);
}

// One number in all lanes. Multiplied by a float instead, a vector of several registers makes GCC put it together in
// memory, lane by lane.
INLINE inline Floats splat(float number) {
    float all[kLanes];
    std::fill_n(all, kLanes, number);
    return load(all);
}

INLINE inline void store(float* to, const Floats& from, int lanes = kLanes) {
    std::memcpy(to, &from, sizeof(float) * lanes);
}

// The nearest narrow number of each float, of two the even one; in the low half of a word. NaN becomes a quiet NaN.
INLINE inline Words narrow(const Floats& wide, Bfloat) {
    const Words bits = same_bits<Words>(wide);
    return wide == wide ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Words{} + 0x7fc0;
}

// Below 2^-14 a half is a multiple of 2^-24, which is the last place of 0.5: adding 0.5 rounds, and leaves the multiple
// in the low bits. From 65520 on it is infinity.
INLINE inline Words narrow(const Floats& wide, Half) {
    const Words bits = same_bits<Words>(wide), magnitude = bits & 0x7fffffff;
    const Words normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const Words tiny = same_bits<Words>(same_bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    const Words finite = magnitude < 0x38800000u ? tiny : normal;
    const Words all = magnitude >= 0x477ff000u ? Words{} + 0x7c00 : finite;
    return (wide == wide ? all : Words{} + 0x7e00) | (bits >> 16 & 0x8000);
}
template <class Narrow> INLINE inline void store(Narrow* to, const Floats& from, int lanes) {
    const Shorts shorts = __builtin_convertvector(narrow(from, Narrow()), Shorts);
    std::memcpy(to, &shorts, sizeof(Narrow) * lanes);
}

// Calls part(first, lanes) for every vector of `count` elements. Only the last may be short, and only there is `lanes`
// a number that the compiler does not know.
template <class Part> INLINE inline void each_vector(int count, Part part) {
    int first = 0;
    for (; first + kLanes <= count; first += kLanes) part(first, kLanes);
    if (first < count) part(first, count - first);
}

// Calls part(first, size) for `Count` vectors, `Together` at a time; the compiler knows the size. What `part` adds to
// stays in registers if one holds a vector, or if the loop is unrolled: from one iteration to the next, GCC keeps a
// vector of several registers in memory.
template <int Count, int Together, bool Unrolled, class Part> INLINE inline void each_vectors(Part part) {
    constexpr int whole = Count / Together * Together;
    const auto each = [&](int i) INLINE { part(i * kLanes, Constant<Together>()); };
    if constexpr (Unrolled) {
        UNROLL for (int i = 0; i < whole; i += Together) each(i);
    } else {
#pragma GCC unroll 1
        for (int i = 0; i < whole; i += Together) each(i);
    }
    if constexpr (whole < Count) part(whole * kLanes, Constant<Count - whole>());
}

typedef float Four __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourIndices{__VA_ARGS__})
typedef int32_t FourIndices __attribute__((vector_size(16)));
#endif

// All lanes added up to four sums, and four such fours to the sum of each: a few shuffles serve four sums at once.
INLINE inline Four fold(const Floats& lanes) {
    typedef float Eight __attribute__((vector_size(32)));
    struct Eights { Eight low, high; } const eights = same_bits<Eights>(lanes);
    struct Fours { Four low, high; } const fours = same_bits<Fours>(eights.low + eights.high);
    return fours.low + fours.high;
}
INLINE inline Four sums(const Four* of) {
    const Four first = SHUFFLE(of[0], of[1], 0, 2, 4, 6) + SHUFFLE(of[0], of[1], 1, 3, 5, 7);
    const Four second = SHUFFLE(of[2], of[3], 0, 2, 4, 6) + SHUFFLE(of[2], of[3], 1, 3, 5, 7);
    return SHUFFLE(first, second, 0, 2, 4, 6) + SHUFFLE(first, second, 1, 3, 5, 7);
}
INLINE inline float sum(const Floats& lanes) {
    const Four four = fold(lanes);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

// e^x for x <= 0 within 2 units in the last place; below -87, e^-87, about the smallest normal float; NaN for NaN.
// x = k ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves k in the low bits of a float, where a shift makes it an
// exponent. ln 2 is taken off in two parts, the first so short that its product with k is exact.
INLINE inline Floats exponential(const Floats& argument) {
    const Floats lowest = Floats{} - 87.0f, x = argument < lowest ? lowest : argument;
    const Floats shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    const Floats r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    const Floats high = ((r * (1.0f / 5040) + 1.0f / 720) * r + 1.0f / 120) * r + 1.0f / 24;
    const Floats series = ((high * r + 1.0f / 6) * r + 0.5f) * (r * r) + r + 1.0f;
    const Floats power = same_bits<Floats>(same_bits<Words>(series) + (same_bits<Words>(shifted) << 23));
    return x == x ? power : x;  // a NaN's payload would pass for an exponent
}
}  // namespace
