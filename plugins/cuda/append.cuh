// A new row into its place, in every format; a block's threads share one row.

#pragma once

#include "rows.cuh"

namespace {

template <class Format> struct Writer;

template <> struct Writer<Exact> {
    __device__ __forceinline__ static void write(const Row* from, int kv_heads, void* arena, int slot, int row_stride,
                                                 int head_stride) {
        Row* to = static_cast<Row*>(arena) + (long long)slot * row_stride;
        for (int i = threadIdx.x; i < kv_heads * kPieces; i += kThreads) {
            const int head = i / kPieces, piece = i % kPieces;
            *reinterpret_cast<uint4*>(to + (long long)head * head_stride + piece * kPiece) =
                reinterpret_cast<const uint4*>(from)[i];
        }
    }
};

// As avl_edge/kv/formats.py encodes, bit for bit: the scale is the value of largest magnitude over the number that it
// becomes, as a half, and numbers are taken by that half, rounded to even. A NaN makes its scale one.
template <class Code> struct RecordWriter {
    using At = Record<Code>;

    __device__ __forceinline__ static void write(const Row* from, int kv_heads, void* arena, int slot, int, int) {
        unsigned char* record = static_cast<unsigned char*>(arena) + (long long)slot * kUnit;
        unsigned short* scales = reinterpret_cast<unsigned short*>(record);
        for (int i = threadIdx.x; i < kv_heads * At::kGroups; i += kThreads)
            scales[i] = (unsigned short)pack(Half{}, scale_of(from + i * Code::kGroup), 0);
        __syncthreads();  // of which each warp has written some
        for (int i = threadIdx.x; i < kv_heads * kPieces; i += kThreads)
            write_piece(from + i / kPieces * HEAD_DIM, i / kPieces, i % kPieces, kv_heads, scales, record);
    }

private:
    __device__ __forceinline__ static float scale_of(const Row* group) {
        float low = 0, high = 0;  // a value of its own sign bounds them only where it is the largest
#pragma unroll
        for (int i = 0; i < Code::kGroup; i += kPiece) {
            float wide[kPiece];
            ::widen<Row>(*reinterpret_cast<const uint4*>(group + i), wide);
#pragma unroll
            for (int k = 0; k < kPiece; ++k) {
                low = wide[k] >= low || low != low ? low : wide[k];
                high = wide[k] <= high || high != high ? high : wide[k];
            }
        }
        const float scale = Code::scale(low, high);
        return scale > kLargestScale ? kLargestScale : scale < -kLargestScale ? -kLargestScale : scale;
    }

    __device__ __forceinline__ static void write_piece(const Row* head_row, int head, int piece, int kv_heads,
                                                       const unsigned short* scales, unsigned char* record) {
        unsigned planes[2] = {0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int first = Packed<Code>::dimension(piece, half * kPiece / 2);
            const float scale = unpack(Half{}, scales[head * At::kGroups + first / Code::kGroup]).x;
            const uint2 bits = *reinterpret_cast<const uint2*>(head_row + first);
            const unsigned words[2] = {bits.x, bits.y};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float2 pair = unpack(Row{}, words[i]);
                add(number_of(pair.x, scale), 16 * i + 4 * half, planes);
                add(number_of(pair.y, scale), 16 * i + 8 + 4 * half, planes);
            }
        }
#pragma unroll
        for (int i = 0; i < Code::kPlanes; ++i)
            *reinterpret_cast<unsigned*>(record + At::word(i, kv_heads, head, piece)) = planes[i];
    }

    __device__ __forceinline__ static unsigned number_of(float value, float scale) {
        const float number = scale != 0 ? rintf(value / scale) : 0;
        return unsigned(int(fminf(fmaxf(number, Code::kLowest), Code::kHighest)) + Code::kBias);
    }

    // Puts a number's nibbles at a bit of the words that hold them.
    __device__ __forceinline__ static void add(unsigned number, int bit, unsigned (&planes)[2]) {
        if (Code::kPlanes == 2) {
            planes[0] |= number >> 4 << bit;
            planes[1] |= (number & 15) << bit;
        } else {
            planes[0] |= number << bit;
        }
    }
};

template <> struct Writer<Int8> : RecordWriter<Int8> {};
template <> struct Writer<Int4> : RecordWriter<Int4> {};

}  // namespace
