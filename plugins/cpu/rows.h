// Rows of every format: where the bytes of a row lie, and how they are read as floats.
//
// A Row<Format, Dim, OneRegister> is a row as an item of work reads it; Dim is the head size where the compiler knows
// it, or 0; OneRegister says whether a register holds a vector. The dimensions of a head are read in an order of the
// format's own, in which they have places:
//   order(dim)               the place of every dimension; none where places are dimensions
//   together                 how many neighbouring vectors come from the same bytes, where the head size is known
//   abreast                  how many rows' keys are multiplied side by side, at most
//   summed                   how many rows' values are added side by side
//   head_bytes(dim)          bytes of a head, scales aside: what an item's share of a row is measured by
//   open(arena, id, heads)   says which row it is, and which of its heads will be read
//   at(head, i, v, lanes)    `lanes` places of a head from i + v * kLanes on, as floats; the compiler knows v, and i is
//                            a multiple of `together` vectors
//   prefetch(arena, id, heads)

#pragma once

#include <vector>

#include "vectors.h"

namespace {
constexpr int kRows = 4;      // of which a query, or a sum of values, is loaded once for all
constexpr int kSlice = 1024;  // bytes of a row that an item reads: sixteen cache lines, found by one page walk

struct Heads { int begin, end; };  // neighbouring key/value heads
struct Arena {                     // the keys or the values of a part
    const void* data;
    int64_t row_stride, head_stride;  // of exact rows, in elements
    int kv_heads, dim;
};

INLINE inline void prefetch_bytes(const void* from, int count) {
    const char* byte = static_cast<const char*>(from);
    for (int i = 0; i < count; i += 64) __builtin_prefetch(byte + i);
    __builtin_prefetch(byte + count - 1);  // the last line, where the first does not begin at `from`
}

// Exact rows, [row, kv head, dim]: of a head, the elements are side by side. Where the head size is known, elements of
// 16 bits are read in pairs, as words: a shift or a mask makes a vector of the even ones and one of the odd ones, where
// widening neighbours would have to move them through the register.
template <class Element, int Dim, bool OneRegister = false> struct Row {
    const Element* row;
    int64_t head_stride;

    static constexpr int known = Dim, abreast = kRows, summed = kRows;
    static constexpr bool in_pairs = sizeof(Element) == 2 && Dim && Dim % (2 * kLanes) == 0 &&
                                     !(kArm && std::is_same_v<Element, Half>);
    static constexpr int together = in_pairs ? 2 : 1;
    static std::vector<int> order(int dim) {
        std::vector<int> places(in_pairs ? dim : 0);
        for (int i = 0; i < int(places.size()); ++i)
            places[i] = i / (2 * kLanes) * 2 * kLanes + i % 2 * kLanes + i % (2 * kLanes) / 2;
        return places;
    }
    static int head_bytes(int dim) { return dim * int(sizeof(Element)); }

    INLINE inline void open(const Arena& arena, int64_t id, const Heads&) {
        row = static_cast<const Element*>(arena.data) + id * arena.row_stride;
        head_stride = arena.head_stride;
    }
    INLINE inline Floats at(int head, int i, int v, int lanes) const {
        const Element* from = row + head * head_stride + i;
        if constexpr (in_pairs) {
            const Words pairs = read<Words>(from + v / 2 * 2 * kLanes);
            return v % 2 ? widen_high(pairs, Element()) : widen_low(pairs, Element());
        } else {
            return load(from + v * kLanes, lanes);
        }
    }
    static INLINE inline void prefetch(const Arena& arena, int64_t id, const Heads& heads) {
        Row ahead;
        ahead.open(arena, id, heads);
        for (int head = heads.begin; head < heads.end; ++head)
            prefetch_bytes(ahead.row + head * ahead.head_stride, (Dim ? Dim : arena.dim) * int(sizeof(Element)));
    }
};

// Packed rows are records: scales, which are halves, then one or two planes of nibbles; each section begins at a
// multiple of kUnit bytes, and ids count in units of it. In a plane a head has dim / 2 bytes, of which byte j holds
// dimension j in its low half and dimension j + dim / 2 in its high half. A value is (nibbles * step + bias) * scale,
// with one scale for a head, or for a group of its dimensions. int8 has the upper nibbles in the first plane and the
// lower ones in the second; a coarse scan of it takes the middle of the 16 numbers that an upper nibble stands for.
//
// Each head size has a way to make vectors of a plane's bytes, and with it an order of the dimensions, into which the
// query is brought once. All products are exact: the values are those of any other decoder.
// - By words, in chunks of kPiece bytes, where a known size makes a half whole chunks: 16-bit numbers of four nibbles,
//   widened to 32 bits; shifts and masks then give four vectors, of the even low, even high, odd low and odd high
//   dimensions. So no byte has to be moved.
// - By bytes, in chunks of kLanes, where a head is whole vectors: a vector of the low dimensions, then one of the high
//   ones. Of an odd number of vectors the last is of half a chunk, low and high. Nibbles become numbers before they are
//   widened. A group of fewer than 32 dimensions may begin within a vector, but only with its second half.
// - One by one, where a vector could not be filled.
constexpr int kUnit = 16, kPiece = 2 * kLanes;
struct Int8 { static constexpr int planes = 2, step = 1, bias = -128; static constexpr bool grouped = false; };
struct Coarse { static constexpr int planes = 1, step = 16, bias = 8 - 128; static constexpr bool grouped = false; };
struct Int4 { static constexpr int planes = 1, step = 1, bias = -8; static constexpr bool grouped = true; };

template <class Format, int Dim, bool OneRegister> struct PackedRow {
    static_assert(Dim % kLanes == 0, "a head is whole vectors where its size is known");
    static constexpr int known = Dim;
    static constexpr int abreast = 1;  // unpacking takes more registers, and more code, than is saved
    // Several only where registers hold them: found by timing AVX2, and for Arm by counting instructions.
    static constexpr int summed = OneRegister || (Format::planes == 1 && !kArm) ? kRows : 1;
    static constexpr bool by_words = Dim && Dim % (2 * kPiece) == 0;
    static constexpr int group(int dim) { return Format::grouped ? std::min(dim & -dim, 32) : dim; }  // gcd(dim, 32)
    static constexpr int head_bytes(int dim) { return dim / 2 * Format::planes; }
    // With more scales at a time than registers can hold, GCC puts the vectors of each together in memory.
    static constexpr bool few = Format::grouped && !OneRegister && !by_words;
    static constexpr int together = !Dim ? 1 : few ? 2 : 4;
    static std::vector<int> order(int dim) {
        std::vector<int> places(dim % kLanes ? 0 : dim);
        const int half = dim / 2;
        for (int i = 0; i < int(places.size()); ++i) {
            const int high = i / half, chunk = by_words ? kPiece : kLanes, byte = i % half % chunk;
            const int begin = i % half - byte, size = std::min(chunk, half - begin);
            const int place = by_words ? (byte % 2 * 2 + high) * kLanes + byte / 2 : high * size + byte;
            places[i] = 2 * begin + place;
        }
        return places;
    }

    static constexpr int kScales = Dim ? (kSlice / head_bytes(Dim) * (Dim / group(Dim)) / kLanes + 1) * kLanes : 1;
    const Half* scales;
    const uint8_t *upper, *lower;  // planes
    int first, size;               // the first head to be read; the head size
    float steps[kScales], biases[kScales];  // of the heads to be read, where the head size is known

    INLINE inline int head_size() const { return Dim ? Dim : size; }
    INLINE inline int groups() const { return head_size() / group(head_size()); }
    INLINE inline void find(const Arena& arena, int64_t id) {
        const auto padded = [](int bytes) INLINE { return (bytes + kUnit - 1) / kUnit * kUnit; };
        size = arena.dim;
        const int dim = head_size();
        const uint8_t* record = static_cast<const uint8_t*>(arena.data) + id * kUnit;
        scales = reinterpret_cast<const Half*>(record);
        upper = record + padded(2 * arena.kv_heads * groups());
        lower = upper + padded(arena.kv_heads * dim / 2);
    }
    // Scales are widened whole vectors at a time: beyond the last are nibbles of the record, which nobody will use.
    INLINE inline void open(const Arena& arena, int64_t id, const Heads& heads) {
        find(arena, id);
        first = heads.begin;
        for (int i = 0; Dim && i < (heads.end - first) * groups(); i += kLanes) {
            const Floats wide = load(scales + first * groups() + i);
            store(steps + i, wide * Format::step, kLanes);
            store(biases + i, wide * Format::bias, kLanes);
        }
    }
    INLINE inline Floats at(int head, int i, int v, int lanes) const {
        if constexpr (by_words) return from_words(head, i, v);
        else return head_size() % kLanes ? one_by_one(head, i, lanes) : from_bytes(head, i, v);
    }
    INLINE inline Floats from_words(int head, int i, int v) const {
        const int byte = (i / kLanes + v) / 4 * kPiece, shift = v % 4 * 4, from = head * (Dim / 2) + byte;
        Words number = read_shorts(upper + from) >> shift & 15;
        if (Format::planes == 2) number = number << 4 | (read_shorts(lower + from) >> shift & 15);
        const int dimension = byte + v % 2 * (Dim / 2);
        return scaled((Integers)number, head, dimension, dimension);
    }
    static INLINE inline Bytes low_then_high(const Bytes& pairs) {
        const Bytes low = {15, 15, 15, 15, 15, 15, 15, 15};
        return (pairs & low) | (pairs >> 4 & ~low);
    }
    INLINE inline Floats from_bytes(int head, int i, int v) const {
        const int half = head_size() / 2, vector = i / kLanes + v, byte = vector / 2 * kLanes;
        const bool both = byte + kLanes > half, high = (Dim ? v : vector) % 2;  // both: of half a chunk
        const auto nibbles = [&](const uint8_t* plane) INLINE {
            const uint8_t* from = plane + head * half + byte;
            if (both) return low_then_high(same_bits<Bytes>(Longs{} + read<uint64_t>(from)));
            return high ? read<Bytes>(from) >> 4 : read<Bytes>(from) & 15;
        };
        Bytes number = nibbles(upper);
        if (Format::planes == 2) number = same_bits<Bytes>(same_bits<Longs>(number) << 4) | nibbles(lower);
        const int dimension = byte + (high && !both ? half : 0), other = both ? byte + half : dimension + kLanes / 2;
        return scaled(widen<OneRegister>(number), head, dimension, other);
    }
    INLINE inline Floats one_by_one(int head, int i, int lanes) const {
        int32_t numbers[kLanes] = {}, bits[kLanes] = {};
        for (int lane = 0; lane < lanes; ++lane) {
            const int half = size / 2, from = head * half + (i + lane) % half, shift = (i + lane) / half * 4;
            numbers[lane] = upper[from] >> shift & 15;
            if (Format::planes == 2) numbers[lane] = numbers[lane] << 4 | (lower[from] >> shift & 15);
            bits[lane] = scales[head * groups() + (i + lane) / group(size)].bits;
        }
        const Floats wide = __builtin_convertvector(read<Integers>(numbers) * Format::step + Format::bias, Floats);
        return wide * widen(read<Words>(bits), Half());
    }
    // Numbers as values, where the first half of the lanes has the scale of one dimension, the second that of another.
    INLINE inline Floats scaled(const Integers& numbers, int head, int dimension, int other) const {
        const Floats wide = __builtin_convertvector(numbers, Floats);
        const int from = (head - (Dim ? first : 0)) * groups(), dim = head_size();
        const int scale = from + dimension / group(dim), next = from + other / group(dim);
        if constexpr (!Dim) {
            const Words bits = kFirst ? Words{} + scales[scale].bits : Words{} + scales[next].bits;
            return (wide * Format::step + Format::bias) * widen(bits, Half());
        } else if (group(Dim) % kPiece && Format::grouped) {
            return wide * (kFirst ? splat(steps[scale]) : splat(steps[next])) +
                   (kFirst ? splat(biases[scale]) : splat(biases[next]));
        } else {
            return wide * splat(steps[scale]) + splat(biases[scale]);
        }
    }
    static INLINE inline void prefetch(const Arena& arena, int64_t id, const Heads& heads) {
        PackedRow row;
        row.find(arena, id);
        const int count = heads.end - heads.begin, half = row.head_size() / 2;
        prefetch_bytes(row.scales + heads.begin * row.groups(), 2 * count * row.groups());
        prefetch_bytes(row.upper + heads.begin * half, count * half);
        if (Format::planes == 2) prefetch_bytes(row.lower + heads.begin * half, count * half);
    }
};
template <int Dim, bool OneRegister> struct Row<Int8, Dim, OneRegister> : PackedRow<Int8, Dim, OneRegister> {};
template <int Dim, bool OneRegister> struct Row<Coarse, Dim, OneRegister> : PackedRow<Coarse, Dim, OneRegister> {};
template <int Dim, bool OneRegister> struct Row<Int4, Dim, OneRegister> : PackedRow<Int4, Dim, OneRegister> {};
}  // namespace
