// As check.cpp, a small case of the kernel for low-rank rows: with coefficients in the rows' type, and in int8.

#include "low_rank_driver.cpp"

#include "check.h"

namespace {

constexpr int kKvHeads = 2, kHeads = kKvHeads * GROUP, kRow = kKvHeads * HEAD_DIM, kContext = 50, kSplits = 2;
constexpr int kRank = kMixed + 3, kStored = kRank + 2;  // more than are taken at once, and an odd number of them

struct Case {
    bool packed;
    int record = ((packed ? 2 + kStored : kStored * int(sizeof(Row))) + 15) / 16 * 16, pool = 20;
    std::vector<int> offsets = {0, 0, 1, 2 * WARPS * kWarpRows + 4};
    int batch = int(offsets.size()) - 1, capacity = offsets.back();
    std::vector<int> rows = std::vector<int>(capacity), positions = rows, bases = std::vector<int>(batch * kRank);
    std::vector<Row> query = random_rows(batch * kHeads * HEAD_DIM), angles = random_rows(kContext * HEAD_DIM);
    std::vector<int> smoothing;            // the first row that is no direction of a basis read, or none
    std::vector<unsigned char> arenas[2];  // keys and values: two bases, then records

    explicit Case(bool packed) : packed(packed) {
        for (auto& arena : arenas) {
            const std::vector<Row> directions = random_rows(begin_of_records() / sizeof(Row));
            arena.resize(begin_of_records() + size_t(pool) * record);
            std::memcpy(arena.data(), directions.data(), begin_of_records());
            for (int row = 0; row < pool; ++row) fill(&arena[begin_of_records() + row * record]);
        }
        for (int i = 0; i < capacity; ++i) {
            rows[i] = (begin_of_records() + int(generator() % pool) * record) / 16;
            positions[i] = int(generator() % kContext);
        }
        for (int i = 0; i < kRow; ++i) {  // a scale is no small number
            Row* scale = reinterpret_cast<Row*>(arenas[1].data()) + kRank * kRow + i;
            scale->bits = (unsigned short)pack(Row{}, 0.5f + std::fabs(widened(*scale)), 0);
        }
        for (int b = 0; b < batch; ++b) smoothing.push_back(b % 2 ? -1 : kRank);
        for (int b = 0; b < batch; ++b)
            for (int r = 0; r < kRank; ++r) bases[b * kRank + r] = b % 2 * kStored + r;
    }
    static int begin_of_records() { return 2 * kStored * kRow * int(sizeof(Row)); }

    void fill(unsigned char* bytes) const {
        const unsigned short scale = (unsigned short)pack(Half{}, 0.002f, 0);
        if (packed) std::memcpy(bytes, &scale, 2);
        for (int r = 0; r < kStored; ++r) {
            const int number = int(generator() % 255) - 127;
            const unsigned short bits = (unsigned short)pack(Row{}, 0.002f * number, 0);
            if (packed) bytes[2 + r] = (unsigned char)number;
            else std::memcpy(bytes + r * sizeof(Row), &bits, sizeof(Row));
        }
    }
    double coefficient(const unsigned char* bytes, int r) const {
        if (!packed) return widened(read<Row>(bytes + r * sizeof(Row)));
        return double((signed char)bytes[2 + r]) * unpack(Half{}, read<unsigned short>(bytes)).x;
    }
    template <class Value> static Value read(const unsigned char* bytes) {
        Value value;
        std::memcpy(&value, bytes, sizeof(Value));
        return value;
    }
    // Element `i` of a head of the listed row `at`, as its record and its sequence's basis have it.
    double element(int arena, int sequence, int at, int head, int i) const {
        const unsigned char* bytes = arenas[arena].data();
        double sum = 0;
        for (int r = 0; r < kRank; ++r) {
            const int row = bases[sequence * kRank + r];
            const double direction = widened(read<Row>(bytes + (row * kRow + head * HEAD_DIM + i) * sizeof(Row)));
            sum += coefficient(bytes + rows[at] * 16, r) * direction;
        }
        return sum;
    }
    double key(int sequence, int at, int head, int i) const {
        const int pair = i % (HEAD_DIM / 2), half = HEAD_DIM / 2;
        const Row* turn = &angles[positions[at] * HEAD_DIM];
        const double sign = i < half ? -1 : 1, other = element(0, sequence, at, head, (i + half) % HEAD_DIM);
        const double turned =
            element(0, sequence, at, head, i) * widened(turn[pair]) + sign * other * widened(turn[pair + half]);
        if (smoothing[sequence] < 0) return turned;
        const size_t place = (size_t(smoothing[sequence]) * kRow + head * HEAD_DIM + i) * sizeof(Row);
        return (turned - widened(read<Row>(&arenas[0][place]))) / widened(read<Row>(&arenas[1][place]));
    }
};

bool decode(bool packed) {
    const Case own(packed);
    const int batch = own.batch, capacity = own.capacity;
    std::vector<float> sums = unwritten(batch * kSplits * kHeads * HEAD_DIM), logits = unwritten(kHeads * capacity);
    std::vector<float> states = unwritten(batch * kSplits * kHeads * 2), out(batch * kHeads * HEAD_DIM);
    const int *begins = own.offsets.data(), *ends = begins + 1;
    run("avl_attend_low_rank", {kKvHeads, kSplits, unsigned(batch)}, own.query.data(), own.arenas[0].data(),
        own.arenas[1].data(), own.rows.data(), begins, ends, own.positions.data(), own.bases.data(), own.angles.data(),
        own.smoothing.data(), kRow, HEAD_DIM, kRow, HEAD_DIM, capacity, 0, kSplits, kRank, kRank, int(packed), sums.data(), states.data(),
        logits.data());

    std::vector<double> expected(out.size());
    for (int b = 0; b < batch; ++b) {
        const int begin = begins[b], count = ends[b] - begin;
        const int used = count ? ceil_div(count, rows_per_split(count, kSplits)) : 0;
        for (int h = 0; h < kHeads; ++h) {
            const std::vector<double> weights =
                softmax(&own.query[(b * kHeads + h) * HEAD_DIM], count,
                        [&](int r, int i) { return own.key(b, begin + r, h / GROUP, i); });
            double mass = 0;
            const auto share = [&](int s) { return std::exp2(double(states[((b * kSplits + s) * kHeads + h) * 2])); };
            for (int s = 0; s < used; ++s) mass += share(s) * states[((b * kSplits + s) * kHeads + h) * 2 + 1];
            for (int i = 0; i < HEAD_DIM; ++i) {
                const int at = (b * kHeads + h) * HEAD_DIM + i;
                for (int s = 0; s < used; ++s)
                    out[at] += float(share(s) * sums[((b * kSplits + s) * kHeads + h) * HEAD_DIM + i] / mass);
                for (int r = 0; r < count; ++r) expected[at] += weights[r] * own.element(1, b, begin + r, h / GROUP, i);
            }
        }
    }
    return close(packed ? "int8" : "out", expected, out, 1e-4);
}

}  // namespace

int main() {
    const bool good = decode(false);
    return decode(true) && good ? 0 : 1;
}
