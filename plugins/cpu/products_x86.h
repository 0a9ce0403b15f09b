// Products by instructions that the compiler does not find: bytes that are widened, pairs of bfloat16. Included by
// products.h, whose declarations it needs.

#pragma once

namespace {
// Codes of 8 bits, widened by name: GCC would take them apart.
#define TARGET __attribute__((target("avx512bw,avx512vl,fma")))
struct ByteKernels {
    template <int Side, int Batch> TARGET static void tile(const Product& product, int64_t row, int b) {
        const Matrix& matrix = *product.matrix;
        const int64_t inputs = matrix.inputs, group = matrix.group, groups = inputs / group;
        const int8_t* codes = static_cast<const int8_t*>(matrix.data) + row * inputs;
        const float* vectors = product.vectors + b * product.stride;
        __m512 total[Side][Batch];
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q) total[r][q] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g) {
            __m512 part[Side][Batch];
            UNROLL for (int r = 0; r < Side; ++r)
                UNROLL for (int q = 0; q < Batch; ++q) part[r][q] = _mm512_setzero_ps();
            const auto add = [&](int64_t i, __mmask16 mask) TARGET INLINE {
                __m512 vector[Batch];
                UNROLL for (int q = 0; q < Batch; ++q)
                    vector[q] = _mm512_maskz_loadu_ps(mask, vectors + q * product.stride + i);
                UNROLL for (int r = 0; r < Side; ++r) {
                    const __m128i narrow = _mm_maskz_loadu_epi8(mask, codes + r * inputs + i);
                    const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
                    UNROLL for (int q = 0; q < Batch; ++q) part[r][q] = _mm512_fmadd_ps(wide, vector[q], part[r][q]);
                }
            };
            const int64_t end = (g + 1) * group, whole = end - group % kLanes;
            for (int64_t i = g * group; i < whole; i += kLanes) add(i, 0xffff);
            if (whole < end) add(whole, __mmask16((1 << (end - whole)) - 1));
            UNROLL for (int r = 0; r < Side; ++r) {
                const __m512 scale = _mm512_set1_ps(matrix.scales[(row + r) * groups + g]);
                UNROLL for (int q = 0; q < Batch; ++q) total[r][q] = _mm512_fmadd_ps(part[r][q], scale, total[r][q]);
            }
        }
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q)
                product.out[(b + q) * product.out_stride + row + r] = ::sum((Floats)total[r][q]);
    }
    TARGET static void codes8(const Product& product, int64_t begin, int64_t end) {
        each_tile<4>(product, begin, end, [&](int64_t row, int b, auto side, auto batch) TARGET {
            tile<side, batch>(product, row, b);
        });
    }
};
#undef TARGET

// With products of bfloat16 pairs.
#define TARGET __attribute__((target("avx512bw,avx512vl,avx512bf16,fma")))
struct Bf16Kernels {
    template <int Side, int Batch> TARGET static void tile(const Product& product, int64_t row, int b) {
        const Matrix& matrix = *product.matrix;
        const int64_t inputs = matrix.inputs, whole = inputs / 32 * 32;
        const uint16_t* weights = static_cast<const uint16_t*>(matrix.data) + row * inputs;
        const uint16_t* vectors[Batch];
        for (int q = 0; q < Batch; ++q)
            vectors[q] = reinterpret_cast<const uint16_t*>(product.vectors + (b + q) * product.stride);
        __m512 sum[Side][Batch];
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q) sum[r][q] = _mm512_setzero_ps();
        const auto add = [&](int64_t i, __mmask32 mask) TARGET INLINE {
            __m512bh vector[Batch];
            UNROLL for (int q = 0; q < Batch; ++q) vector[q] = (__m512bh)_mm512_loadu_si512(vectors[q] + i);
            UNROLL for (int r = 0; r < Side; ++r) {
                const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, weights + r * inputs + i);
                UNROLL for (int q = 0; q < Batch; ++q) sum[r][q] = _mm512_dpbf16_ps(sum[r][q], weight, vector[q]);
            }
        };
        for (int64_t i = 0; i < whole; i += 32) add(i, ~__mmask32(0));
        if (whole < inputs) add(whole, (__mmask32(1) << (inputs - whole)) - 1);
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q)
                product.out[(b + q) * product.out_stride + row + r] = ::sum((Floats)sum[r][q]);
    }

    // Codes of 4 bits, a block at a time. A 16-bit number of four codes, shifted to each of them, is a place in a table
    // of bfloat16, where the bits above the code count for nothing; what they are worth without their scales, from -8
    // to 7, is exact. Pairs of products add up over eight neighbours, which share a group.
    template <int Side, int Batch> TARGET static void tile4(const Product& product, int64_t row, int b) {
        static const struct Table {
            alignas(64) uint16_t values[32];
            Table() {
                for (int i = 0; i < 32; ++i) {
                    const float value = float(i % 16 - 8);
                    uint32_t bits;
                    std::memcpy(&bits, &value, sizeof bits);
                    values[i] = uint16_t(bits >> 16);
                }
            }
        } kTable;
        const Matrix& matrix = *product.matrix;
        const int64_t inputs = matrix.inputs, group = matrix.group, groups = inputs / group, bytes = inputs / 2;
        const uint8_t* codes = static_cast<const uint8_t*>(matrix.data) + row * bytes;
        const __m512i table = _mm512_load_si512(kTable.values);
        // Where in the scales from a block's first one on each lane's is; of a group beyond a block, the first.
        const int lanes = group >= kBlock ? 16 : int(group / 8);
        int32_t places[16];
        for (int lane = 0; lane < 16; ++lane) places[lane] = lane / lanes;
        const __m512i place = _mm512_loadu_si512(places);
        __m512 total[Side][Batch];
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q) total[r][q] = _mm512_setzero_ps();
        for (int64_t begin = 0; begin < inputs; begin += kBlock) {
            const int64_t size = std::min<int64_t>(kBlock, inputs - begin), first = begin / group;
            const __mmask64 mask = size == kBlock ? ~__mmask64(0) : (__mmask64(1) << size / 2) - 1;
            const __mmask16 scaled = __mmask16((1u << ((size + group - 1) / group)) - 1);
            __m512 part[Side][Batch];
            UNROLL for (int r = 0; r < Side; ++r) {
                const __m512i four = _mm512_maskz_loadu_epi8(mask, codes + r * bytes + begin / 2);
                __m512bh numbers[4];
                numbers[0] = (__m512bh)_mm512_permutexvar_epi16(four, table);
                numbers[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), table);
                numbers[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), table);
                numbers[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), table);
                UNROLL for (int q = 0; q < Batch; ++q) {
                    const float* own = product.vectors + (b + q) * product.stride;
                    const uint16_t* vector = reinterpret_cast<const uint16_t*>(own);
                    part[r][q] = _mm512_setzero_ps();
                    UNROLL for (int k = 0; k < 4; ++k)
                        part[r][q] = _mm512_dpbf16_ps(
                            part[r][q], numbers[k], (__m512bh)_mm512_loadu_si512(vector + begin + 32 * k));
                }
                const int64_t at = (row + r) * groups + first;
                const __m512 scales =
                    _mm512_permutexvar_ps(place, _mm512_maskz_loadu_ps(scaled, matrix.scales + at));
                if (matrix.zeros) {
                    const __m128i stored = _mm_maskz_loadu_epi8(scaled, matrix.zeros + at);
                    const __m512 zeros = _mm512_permutexvar_ps(place, _mm512_cvtepi32_ps(_mm512_sub_epi32(
                        _mm512_cvtepu8_epi32(stored), _mm512_set1_epi32(8))));
                    UNROLL for (int q = 0; q < Batch; ++q) {
                        const float* sums = product.vectors + (b + q) * product.stride + padded_length(inputs) / 2;
                        part[r][q] = _mm512_fnmadd_ps(zeros, _mm512_loadu_ps(sums + begin / 8), part[r][q]);
                    }
                }
                UNROLL for (int q = 0; q < Batch; ++q) total[r][q] = _mm512_fmadd_ps(part[r][q], scales, total[r][q]);
            }
        }
        UNROLL for (int r = 0; r < Side; ++r)
            UNROLL for (int q = 0; q < Batch; ++q)
                product.out[(b + q) * product.out_stride + row + r] = ::sum((Floats)total[r][q]);
    }

    TARGET static void bfloat16(const Product& product, int64_t begin, int64_t end) {
        each_tile<4>(product, begin, end, [&](int64_t row, int b, auto side, auto batch) TARGET {
            tile<side, batch>(product, row, b);
        });
    }
    TARGET static void codes4(const Product& product, int64_t begin, int64_t end) {
        each_tile<4>(product, begin, end, [&](int64_t row, int b, auto side, auto batch) TARGET {
            tile4<side, batch>(product, row, b);
        });
    }
};
#undef TARGET
}  // namespace
