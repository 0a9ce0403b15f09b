// The books of a row pool and of its sequences' row tables: who owns a page, which rows are taken, which rows a step
// reads. Moves no key and no value. avl_edge/kv/books says what each function does, and has each in numpy as well; both
// leave the same numbers in the same arrays.
//
// A call does one thing for all layers of a sequence, or of a batch: thousands of rows for which an interpreter's loop
// would take milliseconds between two steps of a device.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {
enum Status : int32_t { kDone, kBeyondLimit, kNoPage, kFreedTwice, kNoMemory };

// The structures of avl_edge/kv/books/native.py.
struct Pool {
    uint8_t* taken;           // [pages, width], by page and slot; what it says of a page that nobody owns is void
    int32_t *held, *owner;    // [pages]: rows taken, and whose they are; -1: nobody's
    int16_t* packing;         // [pages]: which format's they are
    uint8_t* dirty;           // [pages]
    int32_t* free;            // [pages], a stack
    int64_t *free_count, width;
};

struct Share {  // what a lease has in one format
    int32_t* free;            // a stack of row ids in its pages
    int64_t *free_count, *lease;  // [4]: pages held, bytes, most pages ever held, limit
    int64_t row_bytes;
    int32_t owner, packing, rows, page_step, row_step, run, arena_step;  // ids: as in avl_edge/kv/layout.py, Packing
};
enum { kPages, kBytes, kPeak, kLimit };

struct Columns {  // a table of rows, [layers, stride]
    int32_t *ids, *positions, *counts;  // counts [layers]
    uint8_t* core;            // null where rows have no tiers, as are core_counts [layers]
    int32_t* core_counts;
    int64_t stride;
};

struct Run {  // rows that stand side by side in a list of each layer: those of a table, or those in a tier of it
    const int32_t *begins, *column, *counts;  // [layers]; [layers, stride], ids or positions; how many are meant
    const uint8_t* core;      // [layers, core_stride]; null: all rows
    int64_t stride, core_stride, tier;  // only rows whose core is `tier`
};

// Quotients of ids by a number that is known only now, without a division: exact below 2^31.
struct Divider {
    uint64_t inverse;
    explicit Divider(int32_t by) : inverse(((uint64_t(1) << 63) + by - 1) / by) {}
    int32_t operator()(int32_t value) const { return int32_t((unsigned __int128)(uint32_t(value)) * inverse >> 63); }
};

struct Place {
    int32_t page, slot;
};

// Where rows lie, and their ids: of a page's slots one run, or two, of which the second is in the other arena.
struct Places {
    const Share& share;
    Divider by_page, by_row;
    explicit Places(const Share& share) : share(share), by_page(share.page_step), by_row(share.row_step) {}
    Place of(int32_t id) const {
        const int32_t second = id >= share.arena_step, rest = id - (-second & share.arena_step), page = by_page(rest);
        return {page, (-second & share.run) + by_row(rest - page * share.page_step)};
    }
    int32_t id(Place place) const {
        const int32_t second = place.slot >= share.run, row = place.slot - (-second & share.run);
        return (-second & share.arena_step) + place.page * share.page_step + row * share.row_step;
    }
};

uint8_t& taken(const Pool& pool, Place place) { return pool.taken[place.page * pool.width + place.slot]; }

Status take_pages(const Pool& pool, const Share& share, int64_t count) {
    if (share.lease[kPages] + count > share.lease[kLimit]) return kBeyondLimit;
    if (count > *pool.free_count) return kNoPage;
    const int64_t rows = count * share.rows;
    std::memmove(share.free + rows, share.free, *share.free_count * sizeof(int32_t));
    const Places places(share);
    int32_t* to = share.free;
    for (int64_t at = *pool.free_count - count; at < *pool.free_count; ++at) {
        const int32_t page = pool.free[at];
        pool.dirty[page] = 1, pool.held[page] = 0;
        pool.owner[page] = share.owner, pool.packing[page] = int16_t(share.packing);
        std::memset(pool.taken + page * pool.width, 0, pool.width);
        for (int32_t slot = share.rows; slot-- > 0;) *to++ = places.id({page, slot});
    }
    *share.free_count += rows, *pool.free_count -= count;
    share.lease[kPages] += count;
    return kDone;
}

Status take(const Pool& pool, const Share& share, int64_t count, int32_t* ids) {
    if (const int64_t missing = count - *share.free_count; missing > 0)
        if (const Status status = take_pages(pool, share, (missing + share.rows - 1) / share.rows)) return status;
    const Places places(share);
    const int32_t* top = share.free + *share.free_count;
    for (int64_t i = 0; i < count; ++i) {
        const Place place = places.of(ids[i] = *--top);
        taken(pool, place) = 1;
        ++pool.held[place.page];
    }
    *share.free_count -= count;
    share.lease[kBytes] += count * share.row_bytes;
    share.lease[kPeak] = std::max(share.lease[kPeak], share.lease[kPages]);
    return kDone;
}

Status release(const Pool& pool, const Share& share, const int32_t* ids, int64_t count) {
    const Places places(share);
    int32_t *const begin = share.free, *const end = begin + *share.free_count;
    std::vector<int32_t> left;
    for (int64_t i = 0; i < count; ++i) {
        const Place place = places.of(ids[i]);
        if (pool.owner[place.page] != share.owner || !taken(pool, place)) {
            while (i-- > 0) {
                const Place before = places.of(ids[i]);
                taken(pool, before) = 1, ++pool.held[before.page];
            }
            return kFreedTwice;
        }
        end[i] = ids[i];
        taken(pool, place) = 0;
        if (--pool.held[place.page] == 0) left.push_back(place.page);
    }
    *share.free_count += count;
    share.lease[kBytes] -= count * share.row_bytes;
    if (left.empty()) return kDone;
    const auto gone = [&](int32_t id) { return pool.held[places.of(id).page] == 0; };
    *share.free_count = std::remove_if(begin, end + count, gone) - begin;
    std::sort(left.begin(), left.end(), [](int32_t a, int32_t b) { return a > b; });
    for (const int32_t page : left) pool.owner[page] = -1, pool.free[(*pool.free_count)++] = page;
    share.lease[kPages] -= int64_t(left.size());
    return kDone;
}

// Calls each(place in the table, place among those that are meant) for the rows of a run in a layer, in order.
template <class Each> void each_row(const Run& run, int64_t layer, Each each) {
    const int32_t count = run.counts[layer];
    if (!run.core) {
        for (int32_t i = 0; i < count; ++i) each(i, i);
        return;
    }
    const uint8_t* core = run.core + layer * run.core_stride;
    for (int32_t i = 0, n = 0; n < count; ++i) {
        each(i, n);  // what is written for a row that is not meant, the next one overwrites
        n += core[i] == run.tier;
    }
}

// The scores of a layer's rows that stand in one list, or in those of two tiers. Numbers of one size are copied as they
// are, whatever they mean.
template <class Number> void scores_of(const Run* runs, int64_t count, int64_t layer, const Number* from, Number* to) {
    const int64_t first = runs[0].begins[layer];
    if (count == 1) {
        std::copy_n(from + first, runs[0].counts[layer], to);
        return;
    }
    const int64_t second = runs[1].begins[layer];
    const uint8_t* core = runs[0].core + layer * runs[0].core_stride;
    const int32_t rows = runs[0].counts[layer] + runs[1].counts[layer];
    for (int64_t i = 0, n = 0; i < rows; ++i) {  // no branch: which tier is next is as good as random
        const int64_t is_first = core[i] == runs[0].tier, at = second + i - n;
        to[i] = from[at + (-is_first & (first + n - at))];
        n += is_first;
    }
}

template <class Number> void scatter(const Run* runs, int64_t count, int64_t layers, const void* scores, int64_t stride,
                                     void* to, int64_t to_stride) {
    for (int64_t layer = 0; layer < layers; ++layer)
        scores_of(runs, count, layer, static_cast<const Number*>(scores) + layer * stride,
                  static_cast<Number*>(to) + layer * to_stride);
}

// Scores as unsigned numbers of the same order: both zeros alike, NaN lowest of all.
template <class Number> using Key = std::conditional_t<sizeof(Number) == 4, uint32_t, uint64_t>;
template <class Number> Key<Number> key_of(Number score) {
    constexpr Key<Number> kSign = Key<Number>(1) << (8 * sizeof(Number) - 1);
    Key<Number> bits;
    score += Number(0);
    std::memcpy(&bits, &score, sizeof(bits));
    return std::isnan(score) ? 0 : bits & kSign ? ~bits : bits | kSign;
}

// The `count`th highest of n keys, from 1, which are left in disorder; `room` is for as many. No branch depends on a
// single key, where a partition's would be guessed wrongly half of the time.
template <class Key> Key highest(Key* keys, Key* room, int64_t n, int64_t count) {
    while (true) {
        const Key a = keys[n / 4], b = keys[n / 2], c = keys[3 * n / 4];
        const Key pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        int64_t above = 0, below = 0;
        for (int64_t i = 0; i < n; ++i) {
            const Key key = keys[i];
            keys[above] = key, above += key > pivot;
            room[below] = key, below += key < pivot;
        }
        if (count > n - below) count -= n - below, n = below, std::swap(keys, room);
        else if (count <= above) n = above;
        else return pivot;
    }
}

// The masks of the `count` highest of the n scores in each row: of equals the first ones.
template <class Number> void top(const Number* scores, int64_t rows, int64_t n, int64_t count, uint8_t* mask) {
    std::vector<Key<Number>> keys(n), ranked(n), room(n);
    for (int64_t row = 0; row < rows; ++row, scores += n, mask += n) {
        std::transform(scores, scores + n, keys.begin(), key_of<Number>);
        ranked = keys;
        const Key<Number> lowest = highest(ranked.data(), room.data(), n, count);
        int64_t equals = count;
        for (int64_t i = 0; i < n; ++i) equals -= mask[i] = keys[i] > lowest;
        for (int64_t i = 0; equals > 0; ++i)
            if (keys[i] == lowest) mask[i] = 1, --equals;
    }
}

template <class Work> int32_t guarded(const Work& work) try { return work(); } catch (const std::bad_alloc&) {
    return kNoMemory;
}
}  // namespace

extern "C" int32_t avl_take(const Pool* pool, const Share* share, int64_t count, int32_t* ids) {
    return take(*pool, *share, count, ids);
}

extern "C" int32_t avl_release(const Pool* pool, const Share* share, const int32_t* ids, int64_t count) {
    return guarded([&] { return release(*pool, *share, ids, count); });
}

// moved: positions, ids before and ids after, [2, 3, room]: of rows that leave the core, and of those that enter it;
// ends [2, layers]: how many there are up to the end of each layer.
extern "C" int32_t avl_retier(const Pool* pool, const Share* core_share, const Share* other_share,
                              const Columns* columns, int64_t layers, const uint8_t* wanted, int64_t wanted_stride,
                              int32_t* moved, int64_t room, int64_t* ends) {
    return guarded([&]() -> int32_t {
        const Share* shares[2] = {core_share, other_share};
        const size_t widest = size_t(columns->stride) + 1;
        std::vector<int32_t> where[2] = {std::vector<int32_t>(widest), std::vector<int32_t>(widest)};
        int64_t done[2] = {0, 0};
        for (int64_t layer = 0; layer < layers; ++layer) {
            const int64_t at = layer * columns->stride;
            const uint8_t *was = columns->core + at, *now = wanted + layer * wanted_stride;
            int64_t count[2] = {0, 0};
            for (int32_t i = 0; i < columns->counts[layer]; ++i) {  // a row that stays is overwritten by the next one
                where[0][count[0]] = where[1][count[1]] = i;
                count[0] += was[i] & ~now[i], count[1] += now[i] & ~was[i];
            }
            int32_t *ids[2][2];  // before and after
            for (int way = 0; way < 2; ++way) {
                int32_t* positions = moved + way * 3 * room + done[way];
                ids[way][0] = positions + room, ids[way][1] = positions + 2 * room;
                for (int64_t i = 0; i < count[way]; ++i) {
                    const int64_t row = at + where[way][i];
                    positions[i] = columns->positions[row], ids[way][0][i] = columns->ids[row];
                }
            }
            // Two rows that change places take each other's ids, so that no page is left or taken.
            const int64_t pairs = std::min(count[0], count[1]);
            for (int way = 0; way < 2; ++way) {
                std::copy_n(ids[!way][0], pairs, ids[way][1]);
                if (const Status status = release(*pool, *shares[way], ids[way][0] + pairs, count[way] - pairs))
                    return status;
            }
            for (int way = 0; way < 2; ++way) {
                int32_t* after = ids[way][1];
                if (const Status status = take(*pool, *shares[!way], count[way] - pairs, after + pairs)) return status;
                for (int64_t i = 0; i < count[way]; ++i) columns->ids[at + where[way][i]] = after[i];
                ends[way * layers + layer] = done[way] += count[way];
            }
            std::copy_n(now, columns->counts[layer], columns->core + at);
            columns->core_counts[layer] += int32_t(count[1] - count[0]);
        }
        return kDone;
    });
}

// gone: ids, positions and cores of the rows that go, [room] each. Returns how many.
extern "C" int64_t avl_compress(const Columns* columns, int64_t layers, const uint8_t* keep, int64_t keep_stride,
                                int32_t* gone_ids, int32_t* gone_positions, uint8_t* gone_core) {
    int64_t gone = 0;
    for (int64_t layer = 0; layer < layers; ++layer, keep += keep_stride) {
        int32_t *ids = columns->ids + layer * columns->stride, *positions = columns->positions + layer * columns->stride;
        uint8_t* core = columns->core ? columns->core + layer * columns->stride : nullptr;
        const int32_t count = columns->counts[layer];
        int32_t n = 0;
        for (int32_t i = 0; i < count; ++i) {
            if (keep[i]) {
                ids[n] = ids[i], positions[n] = positions[i];
                if (core) core[n] = core[i];
                ++n;
            } else {
                gone_ids[gone] = ids[i], gone_positions[gone] = positions[i];
                if (core) gone_core[gone] = core[i], columns->core_counts[layer] -= core[i];
                ++gone;
            }
        }
        if (core) std::fill(core + n, core + count, uint8_t(0));
        columns->counts[layer] = n;
    }
    return gone;
}

extern "C" void avl_set_core(const Columns* columns, int64_t layers, const uint8_t* wanted, int64_t wanted_stride) {
    for (int64_t layer = 0; layer < layers; ++layer, wanted += wanted_stride) {
        std::copy_n(wanted, columns->counts[layer], columns->core + layer * columns->stride);
        columns->core_counts[layer] = std::accumulate(wanted, wanted + columns->counts[layer], int32_t(0));
    }
}

extern "C" void avl_gather(const Run* runs, int64_t count, int64_t layers, int32_t* rows, int64_t stride) {
    for (const Run* run = runs; run < runs + count; ++run)
        for (int64_t layer = 0; layer < layers; ++layer) {
            const int32_t* from = run->column + layer * run->stride;
            int32_t* to = rows + layer * stride + run->begins[layer];
            each_row(*run, layer, [&](int32_t i, int32_t n) { to[n] = from[i]; });
        }
}

extern "C" void avl_scatter(const Run* runs, int64_t count, int64_t layers, const void* scores, int64_t stride, void* to,
                            int64_t to_stride, int64_t itemsize) {
    itemsize == 4 ? scatter<uint32_t>(runs, count, layers, scores, stride, to, to_stride)
                  : scatter<uint64_t>(runs, count, layers, scores, stride, to, to_stride);
}

// 0 < count <= n.
extern "C" int32_t avl_top(const void* scores, int64_t rows, int64_t n, int64_t itemsize, int64_t count, uint8_t* masks) {
    return guarded([&]() -> int32_t {
        itemsize == 4 ? top(static_cast<const float*>(scores), rows, n, count, masks)
                      : top(static_cast<const double*>(scores), rows, n, count, masks);
        return kDone;
    });
}
