// New rows of a pool: exact ones, and the records of packed ones. The layout is that of rows.h; how numbers are rounded,
// avl_edge/kv/formats.py says.

#pragma once

#include <cmath>

#include "rows.h"

namespace {
inline int64_t padded_bytes(int64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }
inline int group_of(int dim) { return std::min(dim & -dim, 32); }  // gcd(dim, 32)
inline int64_t record_bytes(bool int8, int heads, int dim) {
    const int64_t plane = padded_bytes(int64_t(heads) * dim / 2);
    return int8 ? padded_bytes(2 * heads) + 2 * plane : padded_bytes(2 * int64_t(heads) * (dim / group_of(dim))) + plane;
}

// A scale as it is stored, and its value.
inline float store_scale(uint8_t* to, float scale) {
    scale = std::min(std::max(scale, -65504.0f), 65504.0f);
    Half half;
    store(&half, Floats{} + scale, 1);
    std::memcpy(to, &half, sizeof half);
    return widen(Words{} + half.bits, Half())[0];
}

inline int code(float value, float scale, int lowest, int highest) {
    const float number = scale != 0 ? std::nearbyint(value / scale) : 0;
    return number > highest ? highest : number >= lowest ? int(number) : lowest;
}

// A row [heads, dim] as a record of int8, or of int4.
inline void encode(bool int8, const float* row, int heads, int dim, uint8_t* record) {
    const int group = int8 ? dim : group_of(dim), groups = dim / group, half = dim / 2;
    const int64_t plane = int64_t(heads) * half;
    std::fill_n(record, record_bytes(int8, heads, dim), uint8_t(0));
    uint8_t *upper = record + padded_bytes(2 * int64_t(heads) * groups), *lower = upper + padded_bytes(plane);
    for (int head = 0; head < heads; ++head, row += dim, upper += half, lower += half) {
        for (int g = 0; g < groups; ++g) {
            float low = 0, high = 0, invalid = 0;
            for (int i = g * group; i < (g + 1) * group; ++i) {
                low = std::min(low, row[i]), high = std::max(high, row[i]);
                invalid += row[i] != row[i] ? row[i] : 0;  // a NaN makes NaNs of all that share its scale
            }
            const float largest = int8 ? std::max(-low, high) / 127 : (high >= -low ? high : low) / -8;
            const float scale = store_scale(record + 2 * (head * groups + g), largest + invalid);
            for (int i = g * group; i < (g + 1) * group; ++i) {
                const int shift = i < half ? 0 : 4, byte = i % half;
                if (int8) {
                    const int number = code(row[i], scale, -127, 127) + 128;
                    upper[byte] |= uint8_t(number >> 4 << shift), lower[byte] |= uint8_t((number & 15) << shift);
                } else {
                    upper[byte] |= uint8_t((code(row[i], scale, -8, 7) + 8) << shift);
                }
            }
        }
    }
}
}  // namespace
