// Rows of every format: where the bytes of a row lie, and how they are read as floats.
//
// A Row<Format, Dim> is a row as an item of work reads it; Dim is the head size where the compiler knows it, or 0. The
// dimensions of a head are read in an order of the format's own, in which they have places:
//   order(dim)               the place of every dimension; none for exact rows, where places are dimensions
//   width(dim)               places of a head; more than dimensions where a vector could not be filled
//   lanes(dim)               vectors must not cross multiples of it
//   together                 how many neighbouring vectors come from the same bytes, where the head size is known
//   abreast                  how many rows' keys are multiplied side by side, at most
//   unrolls(dim)             whether there is a Row of this known head size
//   head_bytes(dim)          bytes of a head, scales aside: what an item's share of a row is measured by
//   open(arena, id, heads)   says which row it is, and which of its heads will be read
//   at(head, i, v, lanes)    `lanes` places of a head from i + v * kLanes on, as floats; the compiler knows v, and i is
//                            a multiple of `together` vectors
//   prefetch(arena, id, heads)

#pragma once

#include <numeric>
#include <vector>

#include "vectors.h"

namespace {
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
template <class Element, int Dim> struct Row {
    const Element* row;
    int64_t head_stride;

    static constexpr int known = Dim, abreast = 4;
    static constexpr bool in_pairs = sizeof(Element) == 2 && Dim && Dim % (2 * kLanes) == 0;
    static constexpr int together = in_pairs ? 2 : 1;
    static constexpr bool unrolls(int) { return true; }
    static std::vector<int> order(int dim) {
        std::vector<int> places(in_pairs ? dim : 0);
        for (int i = 0; i < int(places.size()); ++i)
            places[i] = i / (2 * kLanes) * 2 * kLanes + i % 2 * kLanes + i % (2 * kLanes) / 2;
        return places;
    }
    static int width(int dim) { return dim; }
    static INLINE inline int lanes(int dim) { return dim; }
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
// lower ones in the second; a coarse look at it takes the middle of the 16 numbers that an upper nibble stands for.
//
// Nibbles are read as 16-bit numbers of four, widened to 32 bits: shifts and masks then give four vectors, of the even
// low, even high, odd low and odd high dimensions of a chunk of up to kPiece bytes. So no byte has to be moved, but the
// dimensions have an order of their own, into which the query is brought once. All products are exact: the values are
// those of any other decoder.
constexpr int kUnit = 16, kPiece = 2 * kLanes;
struct Int8 { static constexpr int planes = 2, step = 1, bias = -128; static constexpr bool grouped = false; };
struct Coarse { static constexpr int planes = 1, step = 16, bias = 8 - 128; static constexpr bool grouped = false; };
struct Int4 { static constexpr int planes = 1, step = 1, bias = -8; static constexpr bool grouped = true; };

template <class Format, int Dim> struct PackedRow {
    static_assert(Dim % (2 * kPiece) == 0, "halves are whole chunks where the head size is known");
    const Half* scales;
    const uint8_t *upper, *lower;  // planes
    int first, size;               // the first head to be read; the head size
    float steps[Dim ? kSlice / kLanes : 1], biases[Dim ? kSlice / kLanes : 1];  // of the heads to be read, where known

    static constexpr int known = Dim, together = Dim ? 4 : 1;
    static constexpr int abreast = 1;  // unpacking takes more registers, and more code, than is saved
    static constexpr bool unrolls(int dim) { return dim % (2 * kPiece) == 0; }
    static INLINE inline int chunk(int dim) { return Dim ? kPiece : std::gcd(dim / 2, kPiece); }
    static INLINE inline int group(int dim) { return Format::grouped ? Dim ? 32 : std::gcd(dim, 32) : dim; }
    static INLINE inline int lanes(int dim) { return Dim ? kLanes : (chunk(dim) + 1) / 2; }
    static int width(int dim) { return dim / 2 / chunk(dim) * 4 * lanes(dim); }
    static int head_bytes(int dim) { return dim / 2 * Format::planes; }
    static std::vector<int> order(int dim) {
        std::vector<int> places(dim);
        for (int i = 0; i < dim; ++i) {
            const int high = i / (dim / 2), number = i % (dim / 2) / chunk(dim), byte = i % (dim / 2) % chunk(dim);
            places[i] = (number * 4 + byte % 2 * 2 + high) * lanes(dim) + byte / 2;
        }
        return places;
    }

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
        const int dim = head_size(), vector = Dim ? v : i / lanes;
        const int byte = (Dim ? i / kLanes + v : vector) / 4 * chunk(dim), shift = vector % 4 * 4;
        const int from = head * (dim / 2) + byte;
        Words number = read_shorts(upper + from, chunk(dim)) >> shift & 15;
        if (Format::planes == 2) number = number << 4 | (read_shorts(lower + from, chunk(dim)) >> shift & 15);
        const int scale = (Dim ? head - first : head) * groups() + (byte + vector % 2 * (dim / 2)) / group(dim);
        const float wide = Dim ? 0 : load(scales + scale, 1)[0];
        const float step = Dim ? steps[scale] : wide * Format::step, bias = Dim ? biases[scale] : wide * Format::bias;
        return __builtin_convertvector((Integers)number, Floats) * splat(step) + splat(bias);
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
template <int Dim> struct Row<Int8, Dim> : PackedRow<Int8, Dim> {};
template <int Dim> struct Row<Coarse, Dim> : PackedRow<Coarse, Dim> {};
template <int Dim> struct Row<Int4, Dim> : PackedRow<Int4, Dim> {};
}  // namespace
